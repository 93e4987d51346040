"""The private names of other libraries that this floor uses, all of them, each behind one function.

A private name may change in any version. :data:`PRIVATE` says of each what it is for and what to do when it is gone;
``tests/hybrid/test_compat.py`` checks that each still behaves as it is relied upon, and that none stands elsewhere in
this floor. :data:`TRIED` are the versions with which that test has passed; torch 2.11 lacks one thing, see
:func:`clear_dtensor_caches`.

Nothing is imported here at import time: the parent of local ranks needs the names of variables without torch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn

TRIED = {"torch": ("2.11.0", "2.13.0"), "transformers": ("5.24.0",)}


class Private(NamedTuple):
    """Why a private name is used, and what to do when it is gone."""

    used_for: str
    when_gone: str


# Names of torch and transformers as tests/support/private_names.py reports them, and one of the standard library.
PRIVATE = {
    "torch.distributed.tensor._redistribute": Private(
        "the name of the logger whose advice on flattening (fsdp, tp) is not for our users",
        "give silence_redistribute_advice() the new logger and text; without it a warning is printed at each clipping",
    ),
    "torch.distributed.tensor.debug._clear_sharding_prop_cache": Private(
        "forgetting how DTensor planned operations on meshes that no call uses any more, in ranks that serve tests",
        "clear what takes its place in clear_dtensor_caches(), or let RankPool start new processes after some calls",
    ),
    "functools._lru_cache_wrapper": Private(
        "finding DTensor's other caches, which the function above leaves alone and which keep meshes too",
        "as above",
    ),
    "torch._dynamo": Private(
        "importing once, in the process that forks the ranks, what each would import at its first custom operation",
        "leave import_before_fork() empty; the ranks' first operations then take a second longer",
    ),
    "._parameters": Private(
        "computing a module's own forward with local tensors where it holds DTensors: setattr takes no plain tensor",
        "in WholeModule, delete the parameters and set attributes of their names for the time of the forward",
    ),
    "._modules": Private(
        "a stage of a Hugging Face model: its own forward with other children, parameters and buffers the same",
        "in with_children, copy a module without its children in another way, such that both share what they hold",
    ),
    "._orig_mod": Private(
        "the name of a module within the one that torch.compile makes of it, so that both drop the same",
        "strip the name that stands there then in without_compiled(); until then a compiled part drops other elements",
    ),
    "._tp_plan": Private(
        "the plan by which a Hugging Face model says how its modules are split",
        "read the plan where transformers keeps it then; until then users pass plan=",
    ),
    "._init_weights": Private(
        "computing buffers that no state dict holds, such as rotary frequencies, of a Hugging Face model built on meta",
        "see how from_pretrained computes them; without it PlacedPart.to_empty() refuses such models by name",
    ),
    "._keys_to_ignore_on_save": Private(
        "the names of a Hugging Face model's state dict that save_pretrained leaves out, such as computed positions",
        "see what save_pretrained leaves out then, in names_not_saved(); else they are written, and loading says so",
    ),
    "._tied_weights_keys": Private(
        "the names that from_pretrained ties again, with versions of transformers that have no all_tied_weights_keys",
        "drop it with the last such version in is_tied_again()",
    ),
    "._hf_peft_config_loaded": Private(
        "telling a Hugging Face model with adapters, of which save_pretrained writes these alone",
        "see what save_pretrained does then; else such a model's slices are written as a whole model's",
    ),
    "._is_hf_initialized": Private(
        "letting a Hugging Face model set one parameter and leave others as they are",
        "see how from_pretrained tells its class so; others are on meta then, and what is drawn may differ by layout",
    ),
    "._buffers": Private(
        "the same of persistent buffers that a folder lacks, while the model's class sets their values",
        "set the attribute, which takes a plain tensor, for the time of the call",
    ),
    "._keep_in_fp32_modules": Private(
        "modules that a Hugging Face model keeps in fp32 when it is loaded in fp16",
        "see how from_pretrained tells them apart; without it they are loaded as the rest is",
    ),
    "._keep_in_fp32_modules_strict": Private("the same in bf16, too", "as above"),
    "._keys_to_ignore_on_load_missing": Private(
        "names that a Hugging Face model's class does not save, because it computes them",
        "see how from_pretrained tells them apart; without it they are reported as missing",
    ),
    "._keys_to_ignore_on_load_unexpected": Private(
        "names in old folders that a Hugging Face model's class does without",
        "see how from_pretrained tells them apart; without it they are reported as unexpected",
    ),
    "TORCHELASTIC_USE_AGENT_STORE": Private(
        "whether the launcher serves the store where ranks meet, which rank 0 must then not do",
        "find another sign in agent_serves_store(); a second server on the port fails with 'address already in use'",
    ),
    "TORCHELASTIC_RUN_ID": Private(
        "telling apart the runs that one store serves",
        "any value that is equal on all ranks of a run and differs between runs, in run_id()",
    ),
    "TORCHELASTIC_RESTART_COUNT": Private(
        "telling apart torchrun's restarts of one run, which share a store",
        "as for TORCHELASTIC_RUN_ID",
    ),
}

_LOGGER = "torch.distributed.tensor._redistribute"
_ADVICE = "operations will be performed. This is suboptimal"
_SERVED, _RUN, _RESTART = "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"


class _DropAdvice(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return _ADVICE not in str(record.msg)


def silence_redistribute_advice() -> None:
    """Drop DTensor's advice, given at every clipping and every merge, to flatten (fsdp, tp) into one mesh axis.

    What is reduced there in two steps is one number, the norm, and what is gathered in two is a parameter that someone
    looks at or saves; neither is worth a third process group.
    """
    logger = logging.getLogger(_LOGGER)
    if not any(isinstance(known, _DropAdvice) for known in logger.filters):
        logger.addFilter(_DropAdvice())


def clear_dtensor_caches() -> None:
    """Make DTensor forget how it planned operations, and with that the meshes and process groups of earlier calls.

    With torch 2.11 they stay: something else keeps them there, and ranks that serve many calls have more threads.
    """
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("torch.distributed.tensor")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if name.endswith("_cache") and isinstance(value, dict):
                value.clear()
            for cached in (value, *vars(value).values()) if isinstance(value, type) else (value,):
                cached = getattr(cached, "__func__", cached)  # of a static method
                if isinstance(cached, functools._lru_cache_wrapper):
                    cached.cache_clear()
    if modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()


def import_before_fork() -> None:
    """Import what the first call of a custom operation, or of an optimizer, imports, where DTensor is imported."""
    if "torch.distributed.tensor" in sys.modules:
        import torch._dynamo  # noqa: F401


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Return the dictionary in which a module keeps its own parameters; what is put there, the module computes with."""
    return module._parameters  # type: ignore[return-value]


def with_children(
    module: nn.Module, children: Mapping[str, nn.Module | None], constants: Mapping[str, Any]
) -> nn.Module:
    """Return a module of the same class that shares all with ``module`` but these children and plain attributes."""
    made = object.__new__(type(module))
    vars(made).update(vars(module))
    vars(made).update(constants, _modules={**module._modules, **children})
    return made


def running_eagerly() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which what torch.compile has made runs as it was written."""
    import torch

    # Where its package is not imported, which takes seconds, nothing is compiled.
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def without_compiled(name: str) -> str:
    """Return a module's name without the parts that torch.compile's wrappers add."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def hugging_face_plan(model: nn.Module) -> dict[str, str] | None:
    """Return the plan that a Hugging Face model brings along, pattern to style; None where it has none."""
    plan = getattr(model, "_tp_plan", None)
    if isinstance(plan, dict) and plan:
        return plan
    plan = getattr(getattr(model, "config", None), "base_model_tp_plan", None)
    if not plan:
        return None
    base = getattr(model, "base_model_prefix", "")
    return {f"{base}.{name}" if base and hasattr(model, base) else name: style for name, style in plan.items()}


def initialize_hugging_face(model: nn.Module, name: str) -> None:
    """Let the innermost Hugging Face model around the module ``name`` set that module's own buffers, if there is one.

    transformers 5 computes them there, 4 does not.
    """
    import torch

    holder = _initializer(model, name)
    if holder is not None:
        module = model.get_submodule(name)
        parameters = parameters_of(module)
        held = dict(parameters)
        # They would be drawn anew.
        parameters.update(
            {key: torch.empty(p.shape, dtype=p.dtype, device="meta") for key, p in held.items() if p is not None}
        )
        try:
            holder(module)
        finally:
            parameters.update(held)


def _initializer(model: nn.Module, name: str) -> Callable[[nn.Module], None] | None:
    """Return by which method the innermost Hugging Face model around the module ``name`` sets its values."""
    parts = name.split(".") if name else []
    for end in range(len(parts), -1, -1):
        found = getattr(model.get_submodule(".".join(parts[:end])), "_init_weights", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return None


def initial_value(model: nn.Module, name: str, value: torch.Tensor, stand_ins: Mapping[str, nn.Module]) -> None:
    """Let a Hugging Face model set ``value``, which takes the place of its parameter or buffer ``name``.

    As from_pretrained does with what a folder lacks: by the module that holds it, then by those around it, of which
    some set what their children hold. Of these only ``value`` has memory; ``stand_ins`` take modules' places.
    """
    import torch

    holder, _, own = name.rpartition(".")
    parts = holder.split(".") if holder else []
    for end in range(len(parts), -1, -1):
        path = ".".join(parts[:end])
        initialize = _initializer(model, path)
        if initialize is None:
            continue
        module = model.get_submodule(path)
        tensors: list[dict[str, Any]] = [held for m in module.modules() for held in (m._parameters, m._buffers)]
        kept = [(held, dict(held)) for held in tensors]
        for held, _ in kept:
            for key, x in held.items():
                if x is not None:
                    held[key] = torch.empty(x.shape, dtype=x.dtype, device="meta")
                    held[key]._is_hf_initialized = True
        try:
            leaf: Any = model.get_submodule(holder)
            for held in (leaf._parameters, leaf._buffers):
                if own in held:
                    held[own] = value
            stand_in = stand_ins.get(path)
            if stand_in is not None:
                parameters_of(stand_in).update(parameters_of(module))
            initialize(module if stand_in is None else stand_in)
        finally:
            for held, before in kept:
                held.update(before)


def tied_weights(model: nn.Module) -> dict[str, str]:
    """Return the names that a Hugging Face model ties, each with the name under which it is saved."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def untie(model: nn.Module, name: str) -> None:
    """Let a Hugging Face model know that ``name`` is tied no more."""
    known = getattr(model, "all_tied_weights_keys", None)
    if known is not None:
        known.pop(name, None)


def may_be_missing(model: nn.Module) -> list[str]:
    """Return regular expressions of the names that a Hugging Face model's class does not save."""
    return list(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())


def may_be_unexpected(model: nn.Module) -> list[str]:
    """Return regular expressions of the names in a folder that a Hugging Face model's class does without."""
    return list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())


def kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Return the ends of names of modules that a Hugging Face model keeps in fp32 when the rest is in ``dtype``."""
    import torch

    found = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        found += getattr(model, "_keep_in_fp32_modules", None) or ()
    return found if dtype in (torch.float16, torch.bfloat16) else []


def names_not_saved(model: nn.Module) -> set[str]:
    """Return the names of a Hugging Face model's state dict that its save_pretrained leaves out."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def is_tied_again(model: nn.Module, name: str) -> bool:
    """Return whether from_pretrained ties this parameter of a Hugging Face model to another one."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is not None:
        return name in tied
    patterns = getattr(model, "_tied_weights_keys", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def names_when_saved(model: nn.Module, names: Iterable[str]) -> dict[str, str] | None:
    """Return under which name a Hugging Face model's save_pretrained writes each tensor of its state dict.

    None: it does more than that: it changes the tensors, or writes adapters, quantised tensors or code.
    """
    import torch

    known: Any = model
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "_hf_peft_config_loaded", False):
        return None
    if known.is_remote_code() if hasattr(model, "is_remote_code") else False:
        return None
    tensors = {name: torch.empty(1, device="meta") for name in names}
    # The model's own library has imported it, if it has it.
    revert = getattr(sys.modules.get("transformers.core_model_loading"), "revert_weight_conversion", None)
    if revert is None:  # transformers 4 writes them as they are
        return {name: name for name in tensors}
    own = {id(tensor): name for name, tensor in tensors.items()}
    try:
        written = revert(known, dict(tensors))
    except Exception:  # it cannot change tensors that have no values
        return None
    found = {own[id(tensor)]: name for name, tensor in written.items() if id(tensor) in own}
    return found if len(found) == len(tensors) == len(written) else None


def agent_serves_store() -> bool:
    """Return whether what started this process, torchrun or our own launcher, serves the store where ranks meet."""
    return os.environ.get(_SERVED) == "True"


def run_id(environ: Mapping[str, str] = os.environ) -> str:
    """Return the name of this run in the store, which may outlive it: a restart, or the next call of local ranks."""
    return f"{environ.get(_RUN, '')}/{environ.get(_RESTART, '0')}"


def launcher_key(environ: Mapping[str, str] = os.environ) -> str:
    """Return the key of a run's store under which our own launcher writes the first failure that it sees."""
    return f"{run_id(environ)}/launcher/first"


def served_run(name: str) -> dict[str, str]:
    """Return the variables that tell ranks that their launcher serves the store, for a run of this name."""
    return {_SERVED: "True", _RUN: name, _RESTART: "0"}


def attention_of(config: Any) -> str:
    """Return the name of the attention that a Hugging Face model of this configuration computes."""
    return str(getattr(config, "_attn_implementation", ""))
