"""A Hugging Face folder in a layout against plain transformers: the outputs of each module, the loss, the tokenizer.

A folder may load, train and save without an error and still be another model: a rotation left out, an embedding not
scaled, a tied head that is drawn anew. A loss shows that late and little; the outputs of modules show it at the first
one that differs.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from fusemesh.hybrid import checkpoint
from fusemesh.hybrid.apply import parallelize
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.hybrid.hugging_face import heads
from fusemesh.hybrid.hugging_face.load import load_pretrained
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.ranks.join import World, build_mesh, distributed

from . import folder
from .build import build, longest

# Relative difference, by norm, of two fp32 outputs: above what the order of sums changes, below what a mistake does.
TOLERANCE = 1e-4
LENGTH = 32
_TEXT = (
    "She wrote: “Don't panic — 42 ÷ 6 is 7!” Der Fluß war tief; の川は深い. def f(x):\n    return x ** 2  # a comment\n"
)


@dataclass(frozen=True)
class Difference:
    """The outputs of one module: ``relative`` is the norm of their difference over that of transformers' own."""

    module: str
    relative: float


@dataclass
class Verification:
    """The outcome of :func:`verify_rank`.

    names: of the modules compared, with outputs of one shape in both; modules: how many of the plain model have an
    output. largest: of all differences. first: the first module in the order of the forward that differs by more than
    :data:`TOLERANCE`, None where none does. loss, plain_loss: means over the targets. new: weights that the folder
    lacks and that are drawn. tokenizer: problems, empty where there are none; None without a tokenizer.
    """

    layout: str
    model: str
    names: list[str]
    modules: int
    largest: Difference
    first: Difference | None
    loss: float
    plain_loss: float
    new: list[str] = field(default_factory=list)
    tokenizer: list[str] | None = None

    @property
    def problems(self) -> list[str]:
        """What is wrong, a line each."""
        found = []
        if self.first is not None:
            found.append(
                f"{self.first.module} differs from transformers' by {self.first.relative:.2g} of its norm (at most "
                f"{TOLERANCE:g} is rounding), the first of all modules"
            )
        if not abs(self.loss - self.plain_loss) <= TOLERANCE * max(1.0, abs(self.plain_loss)):
            found.append(f"the loss is {self.loss:.6f} in {self.layout}, {self.plain_loss:.6f} in plain transformers")
        return found + (self.tokenizer or [])

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**asdict(self), "compared": len(self.names), "problems": self.problems}


def task_of(path: str) -> str:
    """Return the task that a folder's architecture was made for.

    Raises:
        ValueError: it names none.
    """
    made = (list(getattr(folder.config_of(path), "architectures", None) or []) or [""])[0]
    found = folder.task_of_class(made)
    if not found:
        raise ValueError(
            f"--task: expected {', '.join(folder.AUTO_CLASSES)} for {path!r}, whose architecture {made or '(none)'} "
            "has no head of one of these, received none"
        )
    return found


def verify_rank(path: str, task: str, layout: str, device: str = "cpu") -> dict[str, Any]:
    """Do one rank's part of comparing the model of a folder in a layout with plain transformers on rank 0, in fp32.

    Returns:
        :meth:`Verification.as_dict`, the same on every rank.

    Raises:
        ValueError: the folder cannot be loaded, or the layout is none for it.
    """
    with distributed(device) as world:
        return verify(world, path, task, Layout.parse(layout))


def verify(world: World, path: str, task: str, layout: Layout) -> dict[str, Any]:
    """Do :func:`verify_rank` on ranks that have joined."""
    mesh = build_mesh(layout, world)
    model = build(path, task, dtype=torch.float32)[0].eval()
    name, kind = type(model).__name__, model.kind
    parallelize(model, mesh, layout)
    report = load_pretrained(model, folder.read(path))
    # A pipeline cuts a replica's samples into micro-batches.
    samples = _samples(path, model, layout.replicas * layout.pp)
    with _recorded(model) as own:
        model.logits(*samples.first(world.device), **samples.inputs(slice(1), world.device))
    replica = layout.replica_of(world.rank)
    at = slice(replica * layout.pp, (replica + 1) * layout.pp)
    tokens, targets = (x[at].to(world.device) for x in (samples.tokens, samples.targets))
    with torch.no_grad():
        loss = sum_over_replicas(model.loss(tokens, targets, **samples.inputs(at, world.device)).double(), mesh)
    drawn = _whole(model, report.newly_initialised)
    gathered: list[Any] = [None] * world.world_size if world.is_first else []
    dist.gather_object((own, drawn), gathered if world.is_first else None, dst=0)

    def compare() -> dict[str, Any]:
        plain = _plain(path, task, {name: x for _, found in gathered for name, x in found.items()})
        losses = []
        theirs: dict[str, torch.Tensor] = {}
        for row in range(len(samples.tokens)):
            at = slice(row, row + 1)
            with _recorded(plain) as outputs:
                logits = _logits(plain, kind, samples.tokens[at], samples.target_tokens[at])
            theirs = theirs or outputs
            losses.append(heads.summed_loss(logits.detach(), samples.targets[at]).double())
        found = list(_differences(theirs, [outputs for outputs, _ in gathered]))
        assert found, "no module of the plain model has an output of the same shape"
        count = int((samples.targets != -100).sum())
        return Verification(
            layout=str(layout),
            model=name,
            names=[one.module for one in found],
            modules=len(theirs),
            largest=max(found, key=lambda one: _order(one.relative)),
            first=next((one for one in found if not one.relative <= TOLERANCE), None),
            loss=float(loss) / count,
            plain_loss=float(sum(losses)) / count,
            new=sorted(report.newly_initialised),
            tokenizer=tokenizer_problems(path, plain.get_input_embeddings().num_embeddings),
        ).as_dict()

    return checkpoint.on_first_rank(compare)


@dataclass(frozen=True)
class _Samples:
    """tokens int64 [R, S]; targets as the model's head takes them; target_tokens [R, S] or [0, 0]."""

    tokens: torch.Tensor
    targets: torch.Tensor
    target_tokens: torch.Tensor

    def first(self, device: torch.device) -> tuple[torch.Tensor]:
        return (self.tokens[:1].to(device),)

    def inputs(self, rows: slice, device: torch.device) -> dict[str, torch.Tensor]:
        return {"target_tokens": self.target_tokens[rows].to(device)} if len(self.target_tokens) else {}


def _samples(path: str, model: Any, count: int) -> _Samples:
    """Return this many rows of tokens: of a text where the folder has a tokenizer, else drawn."""
    most = longest(model.config)
    length = LENGTH if most is None else min(LENGTH, most)
    vocabulary = model.config.vocab_size
    special = {getattr(model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    try:
        tokenizer = _tokenizer(path)
    except Exception:
        # It is reported as a problem.
        tokenizer = None
    ids = [] if tokenizer is None else tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    ids = [x for x in ids if x < vocabulary and x not in special]
    if len(ids) < 2:
        drawn = torch.randint(vocabulary, (4 * length,), generator=torch.Generator().manual_seed(0)).tolist()
        ids = [x for x in drawn if x not in special] or drawn
    rows = [[ids[(3 * row + column) % len(ids)] for column in range(length)] for row in range(count)]
    tokens, kind = torch.tensor(rows), model.kind
    end = getattr(model.config, "eos_token_id", None)
    if model.anatomy.is_pair and isinstance(end, int):
        # Off which some read a text's class.
        tokens[:, -1] = end
    none = torch.empty((0, 0), dtype=torch.int64)
    if kind == "tokens":
        return _Samples(tokens, torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100), none)
    if kind == "pair":
        return _Samples(tokens, tokens.flip(1), tokens.roll(1, 1))
    if kind == "class":
        return _Samples(tokens, (torch.arange(count) % model.config.num_labels)[:, None], none)
    return _Samples(tokens, torch.tensor([[1, length // 2]]).expand(count, 2).contiguous(), none)


def _logits(plain: Any, kind: str, tokens: torch.Tensor, target_tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers' own forward, in the shape of ours."""
    more = {"decoder_input_ids": target_tokens} if kind == "pair" else {}
    with torch.no_grad():
        found = plain(input_ids=tokens, **more)
    if kind == "span":
        return torch.stack([found.start_logits, found.end_logits], 1)
    logits: torch.Tensor = found.logits
    return logits.unsqueeze(1) if kind == "class" else logits


def _plain(path: str, task: str, drawn: Mapping[str, torch.Tensor]) -> Any:
    """Return transformers' own model of a folder in fp32, with the same values of weights that the folder lacks."""
    import transformers

    auto = getattr(transformers, folder.AUTO_CLASSES[task][0])
    options = {"local_files_only": True, "dtype": torch.float32, "attn_implementation": "eager"}
    shows = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        plain = auto.from_pretrained(path, **options).eval()
    finally:
        if shows:
            transformers.utils.logging.enable_progress_bar()
    own = plain.state_dict()
    with torch.no_grad():
        for name, value in drawn.items():
            own[name].copy_(value)
    return plain


def _whole(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return those of a placed model's parameters that this rank holds a part of, whole, on the CPU."""
    found = {}
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        if name in names:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[name] = whole.detach().cpu()
    return found


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the first output of each module within a model by its name, in the order in which they end."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) and output else output
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            # Of a module that is called twice, the first call.
            found.setdefault(name, x.detach().float().cpu())

    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _differences(theirs: Mapping[str, torch.Tensor], ranks: list[Mapping[str, torch.Tensor]]) -> Iterator[Difference]:
    """Yield for each module its largest difference over the ranks that have its whole output."""
    for name, x in theirs.items():
        own = [found[name] for found in ranks if name in found and found[name].shape == x.shape]
        if own:
            size = float(x.norm())
            relative = [float((y - x).norm()) / size if size else float((y != 0).any()) for y in own]
            yield Difference(name, max(relative, key=_order))


def _order(relative: float) -> float:
    """Return a number to compare by: NaN is the largest."""
    return relative if relative == relative else float("inf")


def _tokenizer(path: str) -> Any:
    """Return the tokenizer of a folder; None where it has no files of one.

    Raises:
        Exception: whatever transformers raises for files that it cannot read.
    """
    import transformers

    # Of none transformers makes an empty one for some families.
    if not any(file.suffix in _VOCABULARIES and _IS_TOKENIZER.match(file.name) for file in Path(path).iterdir()):
        return None
    return transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)


_VOCABULARIES = (".json", ".txt", ".model", ".spm")
_IS_TOKENIZER = re.compile("tokenizer|vocab|merges|spiece|source|target|sentencepiece")


def tokenizer_problems(path: str, rows: int) -> list[str] | None:
    """Return what is wrong with a folder's tokenizer, a line each; None where there is none.

    Texts that are encoded, decoded and encoded again give the same tokens, and so do those of a copy that is saved and
    read again; each token has a row of the embedding.

    Args:
        rows: of the embedding.
    """
    try:
        tokenizer = _tokenizer(path)
    except Exception as error:
        return [f"the tokenizer cannot be read: {type(error).__name__}: {error}"]
    if tokenizer is None:
        return None
    found = []
    ids = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids)
    if tokenizer.unk_token_id not in ids and tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
        found.append(f"the tokenizer does not return to the same tokens: {_TEXT!r} is decoded to {text!r}")
    with tempfile.TemporaryDirectory() as copy:
        tokenizer.save_pretrained(copy)
        if _tokenizer(copy)(_TEXT)["input_ids"] != tokenizer(_TEXT)["input_ids"]:
            found.append("the tokenizer, saved and read again, gives other tokens")
    if len(tokenizer) > rows:
        found.append(f"the tokenizer has {len(tokenizer)} tokens, and the model's embedding {rows} rows")
    return found
