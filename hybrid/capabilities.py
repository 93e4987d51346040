"""Axes over which a kind of model can be split: what parallelize refuses and the planner leaves out."""

from __future__ import annotations

from dataclasses import dataclass

from .layout import Layout


@dataclass(frozen=True)
class Capabilities:
    """What a layout may ask of a model, apart from its sizes.

    Args:
        model: its class, for errors.
        tp: whether its modules say how tp splits them, or a table does.
        pp: whether it can be cut into stages.
        sequence_parallel: whether tp may split activations along the sequence between the matmuls.
        without_table: the first parameter that nothing splits, of a model that is split but for some; for errors.
        family: what a Hugging Face model's config calls its family; for errors.
    """

    model: str = "Transformer"
    tp: bool = True
    pp: bool = True
    sequence_parallel: bool = True
    without_table: str = ""
    family: str = ""

    def check(self, layout: Layout) -> None:
        """Check that the model can be split over each axis of ``layout``.

        Raises:
            ValueError: it cannot; the message says what is missing, and is the same for every degree.
        """
        if layout.tp > 1 and not self.tp:
            of = f" for its parameter {self.without_table!r}" if self.without_table else ""
            raise ValueError(
                f"tp: {self.model} brings no tensor-parallel table{of}; pass one to parallelize() by plan=, or use "
                "fsdp in the place of tp"
            )
        if layout.pp > 1 and not self.pp:
            other = "fsdp or tp" if self.tp else "fsdp"
            remedy = "derive it from fusemesh.hybrid.pipeline_parallel.PipelinedModel"
            if self.family:
                remedy = (
                    f"add the family {self.family!r} with its head to fusemesh.hybrid.hugging_face.anatomy, which says "
                    "where a model has its blocks"
                )
            raise ValueError(
                f"pp: {self.model} brings no stage(), by which it is cut into stages; {remedy}, or use {other} in the "
                "place of pp"
            )


# A Transformer of fusemesh.hybrid.tensor.modules.
EVERYTHING = Capabilities()
