"""The private names of torch and triton that this floor uses, all of them, each behind one name of ours.

A private name may change in any version. :data:`PRIVATE` says of each what it is for and what to do when it is gone;
``tests/kernels/test_compat.py`` checks that each still behaves as it is relied upon, and that none stands elsewhere in
this floor. :data:`TRIED` are the versions with which that test has passed.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch.autograd import forward_ad

C = TypeVar("C", bound=type)

TRIED = {"torch": ("2.13.0",), "triton": ("3.6.0", "3.7.1", "3.9.0")}


class Private(NamedTuple):
    """Why a private name is used, and what to do when it is gone."""

    used_for: str
    when_gone: str


# Names as tests/support/private_names.py reports them.
PRIVATE = {
    "._dynamo_marked_constant": Private(
        "letting torch.compile take a function's result as a constant, without importing torch._dynamo for it (2 s)",
        "use torch.compiler.assume_constant_result, which sets the same mark",
    ),
    "torch._C._SetExcludeDispatchKeyGuard": Private(
        "differentiating a score mod inside an op, where PyTorch records nothing for autograd",
        "refuse mods with gradients where the reference runs as an op: packed calls under torch.compile",
    ),
    "torch._C._nn.scaled_dot_product_attention": Private(
        "calling PyTorch's kernel while fusemesh.accelerate() has given its public name to a function of ours",
        "keep the function that F.scaled_dot_product_attention names when this module is imported",
    ),
    "torch._C._functorch": Private(
        "which transforms of torch.func a call runs under, and whether vmap maps a tensor or hides its requires_grad",
        "take `torch.func` calls for ordinary ones: ops without a rule then fail by PyTorch's own messages",
    ),
    "torch._C._vmapmode": Private(
        "the level of the older vmap in which torch.autograd.grad(is_grads_batched=True) calls backward ops",
        "drop the rule of op_rules.py for it where torch.autograd uses torch.func.vmap, whose rule is another",
    ),
    "_batch_dim": Private(
        "taking the samples of the older vmap apart, and putting results together",
        "as for torch._C._vmapmode",
    ),
    "torch.autograd.forward_ad._current_level": Private(
        "whether a level of forward-mode differentiation is open, which no op of ours has a rule for",
        "raise in a jvp rule, if torch.library takes one by then: without either, tangents are silently zero",
    ),
    "._ragged_idx": Private(
        "which dimension of a jagged tensor is the jagged one",
        "find the dimension whose size is a nested integer",
    ),
    "._maybe_max_seqlen": Private(
        "the longest sequence of a jagged tensor where that is known, without waiting for the device",
        "take the number of all rows while a graph is traced",
    ),
    "._get_max_seqlen": Private(
        "the longest sequence of a jagged tensor, found once and kept with it",
        "compute offsets().diff().max(), which waits for the device at every call",
    ),
    "_qkv_same_embed_dim": Private(
        "keeping nn.TransformerEncoderLayer from computing our MultiheadAttention by kernels of its own in inference",
        "find another attribute that the layer's why_not_sparsity_fast_path reads",
    ),
    "triton.runtime.driver._active": Private(
        "compiling for a GPU that is absent: what the JIT asks of a driver is answered by an object of ours",
        "see how triton's own tests mock a target (triton.backends.compiler.GPUTarget)",
    ),
    "knobs.runtime.add_stages_inspection_hook": Private(
        "compiling as far as PTX, which takes a third of the time and no assembler, for the emulator",
        "let the kernels be assembled, and read asm['ptx'] of what Triton compiled",
    ),
    "knobs.cache.manager_class": Private(
        "keeping PTX that was not assembled where no other compilation finds it (triton 3.6's hook has no key)",
        "set TRITON_CACHE_DIR to another folder for processes that emulate",
    ),
    ".warmup": Private(
        "compiling exactly what a launch would, without launching",
        "call triton.compile with an ASTSource of the launch's types",
    ),
    ".cache_key": Private(
        "telling compiled kernels apart by the source of the score mods inside, not by their names",
        "hash the source of the jit function and of what it calls",
    ),
    "triton.runtime.interpreter": Private(
        "repairing 16-bit arithmetic in the interpreter, and halving its time: see INTERPRETER",
        "drop a repair that Triton has made itself; tests/kernels/test_interpreter.py says which",
    ),
}


def assume_constant_result(function: Callable[..., Any]) -> None:
    """Let torch.compile call ``function`` once and take its result as a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


scaled_dot_product_attention: Callable[..., torch.Tensor] = torch._C._nn.scaled_dot_product_attention


def recording() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autograd records also inside an op, whose own gradient is somebody else's matter."""
    guard: contextlib.AbstractContextManager[Any]
    guard = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    return guard


# The transforms of torch.func, as :func:`transforms` names them.
VMAP, GRADIENT, FORWARD = "vmap", "grad", "jvp"
_NAMES = {"Vmap": VMAP, "Grad": GRADIENT, "Jvp": FORWARD}


# Where torch.compile leaves a caller as it is, it compiles the functions that name a module of torch by themselves. One
# compiled outside of all transforms has no guard against them, and would say the same inside: so this one names none.
_functorch_level = torch._C._functorch.maybe_current_level
_functorch_levels = torch._C._functorch.get_interpreter_stack
_forward_mode = vars(forward_ad)


def transforms() -> tuple[str, ...]:
    """Return which transforms the code runs under, each once; torch.autograd.forward_ad's open level is FORWARD."""
    is_forward = _forward_mode["_current_level"] >= 0
    if _functorch_level() is None and not is_forward:
        return ()
    found = {_NAMES.get(level.key().name) for level in _functorch_levels() or ()}
    if is_forward:
        found.add(FORWARD)
    return tuple(name for name in _NAMES.values() if name in found)


# torch.compile enters the transforms that it traces, and guards on those around the graph.
assume_constant_result(transforms)


def requires_grad(x: torch.Tensor) -> bool:
    """Return ``x.requires_grad``, also of a tensor inside vmap, which shows False whatever it was made of."""
    while not x.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def has_tangent(x: torch.Tensor) -> bool:
    """Return whether ``x`` has a forward-mode derivative, also inside further transforms."""
    while forward_ad.unpack_dual(x).tangent is None:
        if not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


def is_mapped(x: torch.Tensor) -> bool:
    """Return whether vmap maps ``x``, so that it has other contents for each sample."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def older_vmap_level() -> int:
    """Return how many calls of the older vmap, that of is_grads_batched, are around."""
    level: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def samples_of(x: torch.Tensor, level: int) -> torch.Tensor | None:
    """Return the samples of the older vmap one after the other, [samples, ...]; None if it does not map ``x``."""
    if not torch._C._functorch.is_legacy_batchedtensor(x):
        return None
    samples: torch.Tensor = torch._remove_batch_dim(x, level, 0, 0)
    return samples


def as_mapped(samples: torch.Tensor, level: int) -> torch.Tensor:
    """Return [samples, ...] as the older vmap shows it to what it maps."""
    mapped: torch.Tensor = torch._add_batch_dim(samples, 0, level)
    return mapped


def ragged_dim(x: Any) -> int:
    """Return which dimension of a jagged tensor is the jagged one."""
    return int(x._ragged_idx)


def longest_is_known(x: Any) -> bool:
    """Return whether a jagged tensor knows the length of its longest sequence."""
    return x._maybe_max_seqlen is not None


def longest_of(x: Any) -> int:
    """Return the length of a jagged tensor's longest sequence; waits for the device where it is not known."""
    longest: int = x._get_max_seqlen()
    return longest


def keep_from_fused_path(module_class: C) -> C:
    """Have nn.TransformerEncoderLayer call modules of this class, also in inference; return the class.

    Where the attribute is true, the layer computes inference by kernels of its own from the module's parameters, past
    forward and whatever is set beyond torch's arguments.
    """
    module_class._qkv_same_embed_dim = False  # type: ignore[attr-defined]
    return module_class


class _Seam:
    """Triton's active driver while blocks of :func:`driver` run: in their threads their object, elsewhere what was."""

    def __init__(self) -> None:
        self.named: contextvars.ContextVar[tuple[Any, bool] | None] = contextvars.ContextVar(
            "fusemesh_triton_driver", default=None
        )
        self.changing = threading.Lock()
        self.blocks = 0
        self.before: Any = None  # Triton's driver, its hook on the stages of a compilation, its cache's class
        self.hook: Any = None
        self.manager: Any = None
        self.set_manager: Any = None

    def __getattr__(self, name: str) -> Any:
        from triton.runtime import driver as drivers

        named = self.named.get()
        if named is None:
            return getattr(drivers.default if self.before is None else self.before, name)
        return getattr(named[0], name)

    @property
    def stops_at_text(self) -> bool:
        """Whether this thread compiles as far as PTX."""
        named = self.named.get()
        return named is not None and not named[1]

    def enter(self) -> None:
        from triton import knobs
        from triton.runtime import driver as drivers

        with self.changing:
            self.blocks += 1
            if self.blocks > 1:
                return
            # `reset_active` would look for a GPU, so what was active before is put back by hand.
            self.before, self.hook = drivers._active, knobs.runtime.add_stages_inspection_hook
            self.set_manager, self.manager = vars(knobs.cache).get("manager_class"), knobs.cache.manager_class
            drivers.set_active(self)
            knobs.runtime.add_stages_inspection_hook = self.stages
            # A function, not a class: Triton writes a class's name into the environment, for children.
            knobs.cache.manager_class = self.cache

    def leave(self) -> None:
        from triton import knobs
        from triton.runtime import driver as drivers

        with self.changing:
            self.blocks -= 1
            if self.blocks:
                return
            drivers._active, knobs.runtime.add_stages_inspection_hook = self.before, self.hook
            if self.set_manager is None:  # the environment's, or none
                del knobs.cache.manager_class
            else:
                knobs.cache.manager_class = self.set_manager

    def stages(self, backend: Any = None, stages: Any = None, *more: Any) -> Any:
        if stages is not None and self.stops_at_text:
            stages["cubin"] = lambda source, metadata: source.encode()
        if self.hook is not None:
            return self.hook(backend, stages, *more)
        # Without arguments Triton (from 3.7 on) asks what tells this hook's compilations from others; the cache does.
        return ("", "") if stages is None else None

    def cache(self, key: str, **options: Any) -> Any:
        from triton.runtime.cache import FileCacheManager

        return (self.manager or FileCacheManager)(f"fusemesh-ptx-{key}" if self.stops_at_text else key, **options)


_seam = _Seam()


@contextlib.contextmanager
def driver(named: Any, *, assembles: bool = True) -> Iterator[None]:
    """Within the block Triton's JIT asks ``named`` for the target, the device and the stream, in this thread.

    Args:
        named: answers by the attributes of Triton's own drivers.
        assembles: False compiles NVIDIA's kernels as far as PTX, which stands for the machine code, and keeps them
            in folders of Triton's cache where no other compilation finds them.
    """
    _seam.enter()
    token = _seam.named.set((named, assembles))
    try:
        yield
    finally:
        _seam.named.reset(token)
        _seam.leave()


def compile_launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what ``kernel[grid](*args, **kwargs)`` would run, compiled and not launched."""
    return kernel.warmup(*args, grid=grid, **kwargs)


def source_key(function: Any) -> str:
    """Return a hash of a jit function's source and of the source of all that it calls."""
    return str(function.cache_key)


class Interpreter(NamedTuple):
    """The parts of Triton's interpreter that are replaced or called; names of attributes are strings."""

    module: Any
    builder_class: Any
    builder: Any  # the instance that all kernels use
    handle: Any  # the class of a block's numbers
    nearest_even: Any  # a rounding mode
    lang_scope: Callable[[], Any]  # a scope in which nothing of triton.language was replaced
    is_builtin: Callable[[Any], bool]
    dot: str = "create_dot"
    cast: str = "cast_impl"
    fp_to_fp: str = "create_fp_to_fp"
    numpy_dtype: str = "_get_np_dtype"
    patch_lang: str = "_patch_lang"
    unwrap: str = "_unwrap_if_constexpr"  # of triton.language.core


def interpreter() -> Interpreter:
    """Return the interpreter's parts.

    Raises:
        RuntimeError: this version of Triton has no such parts, so that its arithmetic cannot be repaired.
    """
    import triton
    from triton.runtime import interpreter as module

    try:
        found = Interpreter(
            module,
            module.InterpreterBuilder,
            module.interpreter_builder,
            module.TensorHandle,
            module._ir.ROUNDING_MODE.RTNE,
            module._LangPatchScope if hasattr(module, "_LangPatchScope") else lambda: None,
            triton.language.core.is_builtin,
        )
    except AttributeError as error:
        raise _cannot_repair(str(error)) from error
    for name in (found.dot, found.cast, found.fp_to_fp):
        if not hasattr(found.builder_class, name):
            raise _cannot_repair(f"InterpreterBuilder has no {name}")
    return found


def _cannot_repair(reason: str) -> RuntimeError:
    import triton

    return RuntimeError(
        f"triton {triton.__version__}: {reason}, so the interpreter's bfloat16 and fp8 arithmetic cannot be repaired; "
        "use triton 3.6 to 3.9"
    )


def is_known(condition: bool) -> bool:
    """Return a condition on sizes; False for one on a traced graph's symbols that may be false, without a guard."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # loaded by then, and 1 s before

    return statically_known_true(condition)
