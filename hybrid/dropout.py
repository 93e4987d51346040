"""Dropout whose bits depend on positions in the whole alone, so that every layout trains as one process does.

Torch's dropout takes its bits from a generator in the order of calls, so that another cut of the batch, the heads, the
features or the layers drops other elements. Within :meth:`DropoutByPosition.forward` each call of dropout has a key:
the seed, the step, the name of the module in the whole model that calls it, and how many such calls came before it in
this forward. Philox of this key and of (feature, position, head, sample) in the whole decides about an element, as for
attention weights (:mod:`fusemesh.kernels.attention.reference.philox`), and our attention takes its seeds there, too.
So neither padding, nor micro-batches, nor what else a rank computes matters.

:mod:`fusemesh.hybrid.dropout_calls` sees the calls and answers them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fusemesh.kernels.attention.call.place import place_of

from . import compat
from .dropout_calls import USE_OURS, Forward, drawing
from .layout import Layout


class DropoutByPosition:
    """The dropout of one model, on a mesh or not.

    ``model(...)`` within :meth:`forward` drops by position; backward may run outside. What else a model draws of
    torch's generators there, and would so differ between layouts, is refused.

    Args:
        model: what is called; parallelized before it is called first, if it is at all.
        seed: of the run, equal on every rank.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self._step, self._first, self._is_said = -1, 0, False

    def at(self, step: int, first_sample: int, seed: int | None = None) -> None:
        """Say which samples of which step the next call has; without it each call is a step of its own.

        Args:
            step: of the run; each drops other elements.
            first_sample: the place in the step's batch, over all replicas and accumulated calls, of the call's first
                sample. The others follow it.
            seed: of the run; None leaves it.
        """
        self.seed = self.seed if seed is None else seed
        self._step, self._first, self._is_said = step, first_sample, True

    def begin(self, samples: int) -> None:
        """Begin a call with so many samples of this replica: those that :meth:`at` says, or else of a new step."""
        if not self._is_said:
            places = (place_of(module) for module in self.model.modules())
            replica = next((place.samples for place in places if place is not None), 0)
            self._step, self._first = self._step + 1, replica * samples
        self._is_said = False

    @contextlib.contextmanager
    def forward(self, samples: int) -> Iterator[None]:
        """Let the model, called once in the block with so many samples, drop by position."""
        self.begin(samples)
        with self.part(samples):
            yield

    @contextlib.contextmanager
    def part(self, samples: int, before: int = 0, stage: nn.Module | None = None) -> Iterator[None]:
        """Let a part of the samples of a call that has begun, and of the layers, drop by position in the block.

        Args:
            before: samples of this replica that come before these in the call.
            stage: the part of the model that is called; of what the model does not hold itself, the names are those
                within the stage's children.
        """
        if not drops(self.model):
            # A dropout of which its config does not know would differ between layouts silently.
            with _no_other_draws(self.model):
                yield
            return
        parts = (part.named_modules() for part in (*(stage.children() if stage is not None else ()), self.model))
        names = {module: compat.without_compiled(name) for part in parts for name, module in part}
        _check(names)
        state = Forward(f"{self.seed}/{self._step}", names, self._first + before, samples)
        with _no_other_draws(self.model), drawing(state):
            yield

    def numbering(self, stage: Any, module: nn.Module, samples: int) -> Any:
        """Return torch's ``stage`` of a pipeline, whose forward of each micro-batch of so many samples drops theirs.

        Args:
            module: the part of the model that it runs.
        """
        run = stage.forward_one_chunk

        def numbered(number: int, *args: Any, **kwargs: Any) -> Any:
            with self.part(samples, number * samples, module):
                return run(number, *args, **kwargs)

        stage.forward_one_chunk = numbered
        return stage


def dropout_of(model: nn.Module) -> DropoutByPosition:
    """Return the model's own :class:`DropoutByPosition`, which is made when it is asked for first."""
    found: DropoutByPosition = vars(model).setdefault("fusemesh_dropout", DropoutByPosition(model))
    return found


def drops(model: nn.Module) -> bool:
    """Return whether a model in training may drop something: one whose config and modules say that it does not, no."""
    config = getattr(model, "config", None)
    if not model.training or config is None:
        return model.training
    said = (value for name, value in vars(config).items() if "drop" in name)
    rates = itertools.chain(said, (module.p for module in model.modules() if isinstance(module, nn.Dropout)))
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def check_layers_stay(model: nn.Module, layout: Layout) -> None:
    """Check that no layer is left out by chance where others wait for it.

    Raises:
        ValueError: a module's ``layerdrop`` is above 0 and ``layout`` has fsdp or pp.
    """
    if layout.fsdp == layout.pp == 1:
        return
    for name, module in model.named_modules():
        rate = getattr(module, "layerdrop", 0)
        if isinstance(rate, (int, float)) and rate > 0:
            key = f"{name.rpartition('.')[2]}_layerdrop"
            key = key if hasattr(getattr(module, "config", None), key) else "layerdrop"
            raise ValueError(
                f"{key}: expected 0 on {layout}, whose ranks gather or compute every layer together, received {rate}; "
                "set it to 0 in the model's config, or use dp and tp alone"
            )


def _check(names: dict[nn.Module, str]) -> None:
    """Raise where a part of a model would run again without being seen."""
    for module, name in names.items():
        if getattr(module, "gradient_checkpointing", False):
            raise ValueError(
                f"gradient_checkpointing_enable(): expected False, received True on {name or type(module).__name__}, "
                "whose dropout would be drawn anew in backward; use parallelize(..., recompute='full')"
            )


@contextlib.contextmanager
def _no_other_draws(model: nn.Module) -> Iterator[None]:
    """Raise after the block if it has drawn from torch's generators: other layouts draw other numbers."""
    if not model.training or not hasattr(model, "config"):
        yield
        return
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    before = _generators(device)
    yield
    if not all(map(torch.equal, before, _generators(device))):
        raise ValueError(
            f"dropout: expected {type(model).__name__} to draw random numbers by F.dropout and our attention alone, "
            "received a model that draws from torch's generators otherwise, so that layouts would differ; set the "
            f"other dropout to 0, and for attention weights {USE_OURS}"
        )


def _generators(device: torch.device) -> list[torch.Tensor]:
    found = [torch.get_rng_state()]
    return [*found, torch.cuda.get_rng_state(device)] if device.type == "cuda" else found
