"""Pure layer: what a layout's text means, which rank stands where, and what is refused, without a process group."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from fusemesh.hybrid.layout import AXES, LOSS_AXES, SAMPLE_AXES, TABLE, Layout


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("single", Layout()),
        ("tp4", Layout(tp=4)),
        ("dp2xtp2", Layout(dp=2, tp=2)),
        ("dp2 x tp2", Layout(dp=2, tp=2)),
        (" DP2 X TP2 ", Layout(dp=2, tp=2)),
        ("dp=2, tp=2", Layout(dp=2, tp=2)),
        ("dp2 fsdp4", Layout(dp=2, fsdp=4)),
        ("fsdp2 x tp16 x dp3", Layout(dp=3, fsdp=2, tp=16)),
        ("dp2 x tp2 x pp2 x cp4", Layout(dp=2, tp=2, pp=2, cp=4)),
    ],
)
def test_parse(text: str, layout: Layout) -> None:
    assert Layout.parse(text) == layout
    assert Layout.parse(str(layout)) == layout
    assert Layout.parse(layout) is layout


def test_the_table_of_axes() -> None:
    """Whoever reads it sees every degree of a layout once; what has no implementation is refused."""
    assert sorted(AXES) == sorted(field.name for field in dataclasses.fields(Layout))
    assert SAMPLE_AXES == ("dp", "fsdp") and LOSS_AXES == ("dp", "fsdp", "cp")
    built = [axis.name for axis in TABLE if axis.is_built]
    assert built == ["pp", "dp", "fsdp", "tp"]
    for axis in TABLE:
        layout = Layout(**{axis.name: 2})
        assert axis.parts in layout.describe()
        if axis.is_built:
            layout.validate(world_size=2)
        else:
            with pytest.raises(ValueError, match=f"{axis.title} .* use {axis.name}1 with {', '.join(built)}"):
                layout.validate()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected axes"),
        ("dp", "'dp' is no axis and degree"),
        ("4", "'4' is no axis and degree"),
        ("dp2 tp", "'tp' is no axis and degree"),
        ("dp2.5", "no axis and degree"),
        ("dp2 x dp4", "dp is given twice"),
        ("mp2", "unknown axis 'mp'"),
        ("dp0", "dp must be a positive integer, received 0"),
        ("dp-2", "no axis and degree"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"layout: .*{message}"):
        Layout.parse(text)


@pytest.mark.parametrize("degree", [0, -1, 2.0, True, "2", None])
def test_a_degree_is_a_positive_integer(degree: object) -> None:
    with pytest.raises(ValueError, match="layout: fsdp must be a positive integer"):
        Layout(fsdp=degree)  # type: ignore[arg-type]


def test_ranks_are_laid_out_with_tp_fastest() -> None:
    layout = Layout(pp=2, dp=3, fsdp=2, cp=1, tp=4)
    assert layout.world_size == 48 and layout.replicas == 6
    points = list(itertools.product(*(range(degree) for degree in layout.shape)))
    for rank, point in enumerate(points):
        assert layout.coordinates(rank) == dict(zip(AXES, point, strict=True))
        assert rank == sum(place * layout.stride(axis) for axis, place in zip(AXES, point, strict=True))
        assert layout.replica_of(rank) == point[AXES.index("dp")] * 2 + point[AXES.index("fsdp")]
    for rank in (-1, 48):
        with pytest.raises(ValueError, match=r"rank: .* has ranks 0 to 47"):
            layout.coordinates(rank)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("tp4", {"num_heads": 4, "num_kv_heads": 2}),
        ("tp4", {"num_heads": 4, "num_kv_heads": 1}),
        ("tp2", {"num_heads": 12, "num_kv_heads": 6, "intermediate_size": 22}),
        ("tp4", {"sequence_length": 10, "sequence_parallel": False}),
        ("tp4", {"sequence_length": 12}),
        ("dp2 x fsdp2", {"global_batch": 8, "world_size": 4, "num_heads": 3, "sequence_length": 7}),
        ("single", {"world_size": 1, "num_layers": 1, "virtual_stages": 2}),
        ("pp4 x tp2", {"num_layers": 4, "world_size": 8}),
        ("pp2", {"num_layers": 5, "virtual_stages": 2}),
    ],
)
def test_validate_accepts(text: str, sizes: dict) -> None:
    Layout.parse(text).validate(**sizes)


@pytest.mark.parametrize(
    ("text", "sizes", "key", "parts"),
    [
        ("cp2", {}, "layout", ["context parallel", "not there yet", "cp1"]),
        ("pp4", {"num_layers": 3}, "num_layers", ["3 layers", "pp4", "4 stages", "pp up to 3", "at least 4 layers"]),
        (
            "pp2",
            {"num_layers": 5, "virtual_stages": 3},
            "num_layers",
            ["pp2 x 3 virtual", "6 stages", "pp up to 1", "pipeline.virtual_stages 2,", "at least 6 layers"],
        ),
        (
            "pp4",
            {"num_layers": 7, "virtual_stages": 2},
            "num_layers",
            ["pp up to 3", "pipeline.virtual_stages 1 and pipeline.schedule 1f1b"],
        ),
        ("dp2 x tp2", {"world_size": 8}, "layout", ["needs 4 ranks", "8 were started", "--nproc 4"]),
        ("tp4", {"num_heads": 6}, "num_heads", ["6", "tp4", "[1, 2, 3, 6]"]),
        ("tp3", {"num_heads": 6, "num_kv_heads": 2}, "num_kv_heads", ["2", "tp3", "[1, 2, 4, 6]"]),
        ("tp4", {"num_heads": 12, "num_kv_heads": 6}, "num_kv_heads", ["6", "tp4", "[1, 2, 3, 6]"]),
        ("tp4", {"intermediate_size": 42}, "intermediate_size", ["42", "multiple of 4"]),
        ("tp4", {"sequence_length": 10}, "sequence_length", ["10", "multiple of 4", "sequence_parallel=False"]),
        ("dp2 x fsdp2", {"global_batch": 6}, "global_batch", ["6", "4 replicas", "multiple of 4"]),
    ],
)
def test_validate_refuses(text: str, sizes: dict, key: str, parts: list[str]) -> None:
    """The error names the user's key, what was received, and legal values."""
    with pytest.raises(ValueError) as caught:
        Layout.parse(text).validate(**sizes)
    assert str(caught.value).startswith(f"{key}: ")
    for part in parts:
        assert part in str(caught.value)


def test_describe() -> None:
    text = Layout.parse("dp2 x tp2").describe()
    assert text.splitlines()[0] == "dp2 x tp2: 4 ranks"
    assert "replicas of the model" in text and "matmul" in text and "fsdp" not in text
    assert Layout().describe() == "single: 1 rank"
