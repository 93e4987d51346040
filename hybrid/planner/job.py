"""What one optimizer step does, whatever its layout; the one place that names the options of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of an element in compute. Parameters, gradients and optimizer states stay in fp32 unless compute is fp64.
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
SCHEDULES = ("1f1b", "gpipe", "interleaved")
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Job:
    """One optimizer step.

    Args:
        global_batch: samples over all replicas.
        sequence_length: tokens a sample.
        microbatches: parts into which a replica's samples are cut: gradient accumulation, and the pipeline's
            microbatches. None: the planner chooses for each layout.
        dtype: of compute.
        sequence_parallel: whether tp also splits activations along the sequence between the matmuls.
        schedule: of the pipeline. virtual_stages: stages of one rank; above 1 only in ``interleaved``.
        recompute: what backward computes again instead of keeping it: ``none``, ``selective`` (attention's core) or
            ``full`` (each layer). Our trainer does ``none``.
        fused_attention: False charges for scores that travel through memory, as before FlashAttention.
        whole_at_start: whether every rank first holds the whole model, as our trainer does before it cuts it.
        clip: whether the gradient's norm is clipped.

    Raises:
        ValueError: a number below 1, or an unknown word.
    """

    global_batch: int
    sequence_length: int
    microbatches: int | None = None
    dtype: str = "bfloat16"
    sequence_parallel: bool = True
    schedule: str = "1f1b"
    virtual_stages: int = 1
    recompute: str = "none"
    fused_attention: bool = True
    whole_at_start: bool = False
    clip: bool = True

    def __post_init__(self) -> None:
        for name in ("global_batch", "sequence_length", "microbatches", "virtual_stages"):
            value = getattr(self, name)
            if value is None and name == "microbatches":
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive integer, received {value!r}")
        for name, choices in (("dtype", tuple(ITEM_BYTES)), ("schedule", SCHEDULES), ("recompute", RECOMPUTE)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, received {getattr(self, name)!r}")
        if self.virtual_stages > 1 and self.schedule != "interleaved":
            raise ValueError(
                f"virtual_stages: expected 1 with schedule {self.schedule!r}, received {self.virtual_stages}; use "
                "schedule='interleaved'"
            )

    @property
    def item(self) -> int:
        """Bytes of an activation's element, and of a parameter where it is computed with."""
        return ITEM_BYTES[self.dtype]

    @property
    def master(self) -> int:
        """Bytes of an element of stored parameters, of gradients, and of each of AdamW's two states."""
        return 8 if self.dtype == "float64" else 4


def split_layers(num_layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage in order, as even as possible, the first ones larger."""
    each, more = divmod(num_layers, stages)
    return tuple(each + (stage < more) for stage in range(stages))
