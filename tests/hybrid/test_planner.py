"""Pure layer, and 4 gloo ranks where said: the planner's published models, its rules, times, hardware and search."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from fusemesh.hybrid.apply import capabilities_of
from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.planner import cost, memory, operations, search
from fusemesh.hybrid.planner.hardware import Curve, Hardware, Link, find_hardware, from_dict, named_hardware
from fusemesh.hybrid.planner.job import BatchSplit, TrainingJob
from fusemesh.hybrid.planner.model import ModelDescription
from fusemesh.hybrid.planner.published import FAMILIES, PublishedDecoder, find_decoder, find_model, named_models
from fusemesh.hybrid.ranks.testing import RankPool
from fusemesh.transformer.description import describe
from tests.support.ranks import planner as planner_ranks

H100, A100 = find_hardware("h100"), find_hardware("a100")
# Of our own modules, which every axis splits.
LLAMA_SIZES = dataclasses.replace(find_decoder("llama3-8b"), family="")
LLAMA = LLAMA_SIZES.describe()
CONFIG = planner_ranks.CONFIGS["decoder"]


def cpu(**changes: object) -> Hardware:
    """A machine of 2 cores, of round numbers."""
    link = Link(1e-4, 1e9)
    values = {"name": "c", "device": "cpu", "memory": 1 << 34, "peak": {"float32": 1e11}, "bandwidth": 1e10}
    values |= {"intra": link, "inter": link, "cores": 2, "slowdown": Curve(((1.0, 1.0), (2.0, 1.0), (4.0, 2.0)))}
    return Hardware(**{**values, **changes})  # type: ignore[arg-type]


def interleave(virtual_stages: int) -> PipelineOptions:
    """1F1B, interleaved where there are several stages a rank."""
    return PipelineOptions(0, "interleaved1f1b" if virtual_stages > 1 else "1f1b", virtual_stages)


# --- models


PUBLISHED = {
    "gpt2": 124_439_808,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b": 7_241_732_096,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", named_models())
def test_parameters_are_the_published_number(name: str) -> None:
    entry = named_models()[name]
    assert find_model(name).parameters == entry["parameters"] == PUBLISHED.get(name, entry["parameters"])
    assert entry["source"]


def test_gpt3_has_about_175_billion() -> None:
    assert find_model("gpt3-175b").parameters == pytest.approx(174.6e9, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_published_decoder_of_our_sizes_is_our_transformer(bias: bool, tied: bool) -> None:
    """Two sources, one of published sizes and one of our modules, give one description."""
    config = dataclasses.replace(CONFIG, use_bias=bias, tie_embeddings=tied)
    ours = describe(config)
    published = PublishedDecoder(
        name=ours.name,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        sequence_length=config.max_sequence_length,
        bias=bias,
        tied=tied,
    ).describe()

    def in_order(model: ModelDescription) -> ModelDescription:
        layers = tuple(
            dataclasses.replace(layer, weights=tuple(sorted(layer.weights, key=lambda w: w.name)))
            for layer in model.layers
        )
        outer = tuple(sorted(model.outer, key=lambda o: o.weight.name))
        return dataclasses.replace(model, layers=layers, outer=outer)

    assert in_order(published) == in_order(ours)


SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# Of each family, what of a config makes other parameters, or is believed to.
CHANGES: list[dict[str, object]] = [
    {},
    *({key: value} for key in ("attention_bias", "mlp_bias", "qkv_bias", "bias") for value in (True, False)),
    {"attention_bias": True, "mlp_bias": True},
    *({"tie_word_embeddings": value} for value in (True, False)),
    {"head_dim": 16},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 4, "attention_bias": True, "head_dim": 24},
    {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    {"n_inner": 50},
]


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_configs_count_as_their_models(family: str, tmp_path: Path) -> None:
    """Parameters, and what parallelize can do with them, by transformers' own class on meta."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    for number, change in enumerate(CHANGES):
        values = {**(GPT2 if family == "gpt2" else SIZES), **change}
        config = AutoConfig.for_model(family, **values)
        with torch.device("meta"):
            real = AutoModelForCausalLM.from_config(config)
        path = tmp_path / f"{number}.json"
        # Also keys that transformers would leave out, as people and other tools write them.
        path.write_text(json.dumps({**config.to_dict(), **values}))
        model = find_model(str(path))
        assert model.parameters == sum(p.numel() for p in real.parameters()), change
        assert model.sequence_length == 64
        assert model.capabilities == capabilities_of(real) == FAMILIES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_hugging_face_config_leaves_out_is_as_there(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = {"mistral": 8, "qwen2": 32}.get(family, 4)
    values = GPT2 if family == "gpt2" else {**SIZES, "num_attention_heads": heads, "hidden_size": 8 * heads}
    values = {key: value for key, value in values.items() if key != "num_key_value_heads"}
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **values}))
    assert find_model(str(tmp_path)).parameters == sum(p.numel() for p in real.parameters())


def test_named_models_are_of_a_family() -> None:
    assert {entry["family"] for entry in named_models().values()} == set(FAMILIES)


def test_models_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--model: expected one of gpt2, .*config\.json, received 'llama9'"):
        find_model("llama9")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"--model: expected a config of model_type llama, .*received 'bert'"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 4}')
    with pytest.raises(ValueError, match="has no key 'num_attention_heads', which a llama config needs"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"--model: expected a Hugging Face config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **GPT2, "add_cross_attention": True}))
    with pytest.raises(ValueError, match=r"--model: expected a decoder alone, .*add_cross_attention"):
        find_model(str(tmp_path))
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of num_heads = 32"):
        dataclasses.replace(LLAMA_SIZES, num_kv_heads=3)


# --- memory


@pytest.mark.distributed
@pytest.mark.parametrize("text", ["fsdp4", "tp2", "fsdp2 x tp2"])
def test_a_model_is_cut_layer_by_layer(rank_pool: RankPool, text: str) -> None:
    """While it is cut, the whole model and the layer in hand are there, and never the whole beside all its parts."""
    config, layout = dataclasses.replace(CONFIG, num_layers=6), Layout.parse(text)
    job = TrainingJob(8, config.max_sequence_length, dtype="float32", whole_at_start=True)
    planned_start = memory.estimate(describe(config), job, layout, cpu(), BatchSplit()).phases["start"]
    for peak, parts in rank_pool.run(planner_ranks.cutting, text, config, ranks=layout.world_size):
        whole = 4 * describe(config).parameters
        # A few bytes more are torch's own, numbers that describe the mesh.
        assert whole <= peak <= planned_start + 256 and planned_start < whole + parts


@pytest.mark.parametrize("name", ["llama3-8b", "gpt3-175b", "qwen2.5-0.5b"])
def test_more_ranks_never_store_more(name: str) -> None:
    model, job = find_model(name), TrainingJob(64, 2048)
    for axis in ("tp", "fsdp", "pp"):
        for degree in (1, 2, 4):
            less = memory.stored(model, job, Layout(**{axis: 2 * degree}))
            assert less <= memory.stored(model, job, Layout(**{axis: degree})), (axis, degree)
    assert memory.stored(model, job, Layout(dp=8)) == memory.stored(model, job, Layout())


def test_what_schedules_hold() -> None:
    layout, job = Layout(pp=4), TrainingJob(32, 2048)
    held = [memory.in_flight(job, layout, stage, 16) for stage in range(4)]
    assert held == [4, 3, 2, 1]
    assert memory.in_flight(job, layout, 0, 2) == 2
    gpipe = dataclasses.replace(job, pipeline=PipelineOptions(schedule="gpipe"))
    assert [memory.in_flight(gpipe, layout, stage, 16) for stage in range(4)] == [16] * 4
    interleaved = dataclasses.replace(job, pipeline=interleave(2))
    assert memory.in_flight(interleaved, layout, 0, 16) == 4 * (1 + 3 / 8)


def test_stages_hold_the_whole_model_once_and_a_tied_head_twice() -> None:
    for name, copies in (("llama3-8b", 0), ("gpt2", 50257 * 768)):
        model, layout = find_model(name), Layout(pp=4)
        total = sum(memory.stored(model, TrainingJob(8, 64), layout, stage=stage)[0] for stage in range(4))
        assert total == 4 * (model.parameters + copies)


def test_logits_of_tokens_take_no_more_than_some_chunks() -> None:
    job, split = TrainingJob(8, 2048, sequence_parallel=False), BatchSplit(8)
    for model in (find_model("llama3-8b"), LLAMA):
        found = []
        for tp in (1, 8):
            done = {op.name: op for op in operations.last_operations(model, job, tp, 1, "gpu")}
            assert done["head.again"].flops == done["head"].flops == 2 * 2048 * 4096 * 128256 / tp
            assert ("loss.sums" in done) == (tp == 8) and "head.gather" not in done
            found.append(memory.estimate(model, job, Layout(tp=tp), H100, split).parts["logits"])
        # Whole they would be 3 GiB, of tp8 0.4 GiB.
        assert found == [3 * 2**26 + 4 * 2048 * 4096] * 2


def test_recompute_keeps_less() -> None:
    share = LLAMA.share(Layout(fsdp=64), 0, 1)
    jobs = [TrainingJob(64, 8192, recompute=kind) for kind in ("none", "full")]
    none, full = (memory.kept_by_layers(LLAMA, share, job, 1, "gpu", 1, 1.0)[0] for job in jobs)
    assert full < 0.1 * none


# --- time


def cut(layout: Layout, parts: int) -> BatchSplit:
    """A step in ``parts``: in the pipeline if there is one, else one after the other."""
    return BatchSplit(parts) if layout.pp == 1 else BatchSplit(1, parts)


def test_items_add_up_and_a_bubble_is_what_the_formula_says() -> None:
    job = TrainingJob(64, 2048)
    for layout in (Layout(fsdp=8), Layout(dp=2, tp=4), Layout(pp=4, tp=2)):
        found = cost.estimate(LLAMA, job, layout, H100, cut(layout, 8))
        assert found.seconds == pytest.approx(sum(item.seconds for item in found.items))
    bubble = {}
    for virtual in (1, 2):
        job = TrainingJob(64, 2048, pipeline=interleave(virtual))
        found = cost.estimate(LLAMA, job, Layout(pp=4), H100, BatchSplit(1, 16))
        work = sum(i.seconds for i in found.items if i.name not in ("bubble", "update", "shards", "data parallel"))
        idle = sum(i.seconds for i in found.items if i.name == "bubble")
        bubble[virtual] = idle / work
    assert bubble[1] == pytest.approx(3 / 16) and bubble[2] == pytest.approx(3 / 32)


def test_collectives_cost_what_the_ring_says() -> None:
    link = Link(1e-6, 1e9)
    hardware = dataclasses.replace(H100, intra=link, inter=Link(1e-5, 1e8), ranks_per_node=4, fits={})
    assert hardware.collective_s("all_gather", 1e9, 4, 1, 4) == pytest.approx(3e-6 + 0.75)
    assert hardware.collective_s("all_reduce", 1e9, 4, 1, 4) == pytest.approx(2 * (3e-6 + 0.75))
    # One rank a node, and four ranks a node with an adapter each.
    assert hardware.collective_s("reduce_scatter", 1e9, 4, 4, 16) == pytest.approx(3e-5 + 7.5)
    assert hardware.collective_s("reduce_scatter", 1e9, 16, 1, 16) == pytest.approx(15e-5 + 15 / 16 / 0.4)
    assert hardware.collective_s("send", 1e8, 2, 8, 16) == pytest.approx(1e-5 + 1)
    assert hardware.collective_s("all_reduce", 1e9, 1, 1, 8) == 0
    measured = dataclasses.replace(hardware, fits={"all_reduce:2:4": Link(1.0, 1e9)})
    assert measured.collective_s("all_reduce", 1e9, 2, 1, 4) == 2


def test_ranks_that_share_cores_take_turns() -> None:
    model = describe(dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=512))
    job = TrainingJob(64, 64, 1, "float32")
    step = {n: cost.estimate(model, job, Layout(dp=n), cpu(), BatchSplit()).by_kind()["compute"] for n in (1, 2, 4)}
    assert step[2] == pytest.approx(step[1] / 2, rel=0.05) and step[4] == pytest.approx(step[2], rel=0.05)
    # A pipeline's stage that waits leaves its core to another, so that four stages on two cores lose next to nothing.
    model = dataclasses.replace(model, layers=model.layers[:1] * 4)
    idle = cost.estimate(model, job, Layout(pp=4), cpu(), BatchSplit(1, 4)).by_kind()
    assert idle.get("idle", 0.0) < 0.2 * idle["compute"]


# --- search


def test_every_layout_is_ranked_or_refused_with_a_reason() -> None:
    found = search.plan(LLAMA, TrainingJob(512, 8192), H100, 64)
    layouts = [c.layout for c in found.layouts] + [r.layout for r in found.rejected]
    assert len(layouts) == len(set(layouts)) == 84 and all(layout.world_size == 64 for layout in layouts)
    seconds = [c.cost.seconds for c in found.layouts]
    assert seconds == sorted(seconds) and all(c.memory.total <= H100.memory for c in found.layouts)
    assert all(r.why for r in found.rejected)


REASONS = [
    ("tp16", {}, "tp: tp16 would leave a node of 8 ranks.*--gpus-per-node"),
    ("tp8", {"num_heads": 12, "num_kv_heads": 12}, "num_heads: 12 heads cannot be split over tp8"),
    ("tp4", {"num_heads": 24, "num_kv_heads": 6}, "num_kv_heads: 6 key/value heads fit tp4 only if"),
    ("tp8", {"intermediate_size": 1001}, "intermediate_size: 1001 cannot be split over tp8"),
    ("tp8", {"sequence": 1001}, "sequence_length: 1001 tokens cannot be split over tp8"),
    ("dp3", {}, "global_batch: 64 samples cannot be dealt to 3 replicas"),
    ("dp4", {"microbatches": 3}, "microbatches: 16 samples a replica cannot be cut into 3 parts.*--microbatches"),
    ("dp4", {"accumulation": 3}, "global_batch_size: expected a multiple of replicas.*training.accumulation"),
    ("pp4 x dp4", {"accumulation": 8}, "training.global_batch_size / .*1f1b on pp4 cuts a replica's batch"),
    ("pp64", {}, "num_layers: 32 layers cannot be dealt to pp64.*use pp up to 32"),
    ("pp8 x dp16", {}, "microbatches: 1f1b on pp8 needs at least 8 microbatches, and 4 samples a replica"),
    ("dp8", {"memory": 10**10}, r"memory: needs .* a rank, most of it .*--memory allows 9\.31 GiB"),
]


@pytest.mark.parametrize(("text", "change", "message"), REASONS)
def test_reasons_name_the_flag(text: str, change: dict[str, int], message: str) -> None:
    change = dict(change)
    parts = {key: change.pop(key) for key in ("microbatches", "accumulation") if key in change}
    job = TrainingJob(64, change.pop("sequence", 1024), **parts)
    hardware = dataclasses.replace(H100, memory=change.pop("memory", 10**15))
    found = search.consider(dataclasses.replace(LLAMA_SIZES, **change).describe(), job, hardware, Layout.parse(text))  # type: ignore[arg-type]
    assert isinstance(found, search.Rejected)
    assert re.search(message, found.why), found.why


def test_uneven_vocabularies_and_replicated_kv_heads_are_legal() -> None:
    model = dataclasses.replace(LLAMA_SIZES, vocab_size=128_257, num_kv_heads=2).describe()
    assert isinstance(search.consider(model, TrainingJob(64, 1024), H100, Layout(tp=8, fsdp=8)), search.Choice)


def test_a_model_that_fits_nowhere_names_the_nearest_miss() -> None:
    small = dataclasses.replace(H100, memory=10**10)
    found = search.plan(LLAMA, TrainingJob(512, 8192), small, 8)
    assert not found.layouts
    miss = found.nearest_miss
    assert miss is not None and miss.short_by is not None
    shortfalls = [r.short_by for r in found.rejected if r.short_by is not None]
    assert miss.short_by == min(shortfalls) > 0
    # With just so much more memory it fits, and with a byte less it does not.
    enough = dataclasses.replace(small, memory=small.memory + miss.short_by)
    assert [c.layout for c in search.plan(LLAMA, TrainingJob(512, 8192), enough, 8).layouts] == [miss.layout]
    enough = dataclasses.replace(enough, memory=enough.memory - 1)
    assert not search.plan(LLAMA, TrainingJob(512, 8192), enough, 8).layouts


def test_tensor_parallelism_is_not_what_an_8b_model_wants_and_a_70b_model_does() -> None:
    best = search.plan(LLAMA, TrainingJob(512, 8192), H100, 64).layouts[0].layout
    assert best.tp == 1 and best.fsdp > 1
    large = dataclasses.replace(find_decoder("llama3-70b"), family="").describe()
    best = search.plan(large, TrainingJob(512, 8192), H100, 64).layouts[0].layout
    assert best.tp > 1


# --- hardware


def test_stated_hardware_has_a_source_for_each_number() -> None:
    for name, entry in named_hardware().items():
        hardware = find_hardware(name)
        named = ", ".join(entry["sources"])
        for key in (
            "memory",
            "peak",
            "bandwidth",
            "intra",
            "inter",
            "matmul_fraction",
            "attention_fraction",
            "overlap",
        ):
            assert key in named, (name, key)
        assert hardware.device == "gpu" and from_dict(hardware.as_dict()) == hardware


def test_hardware_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(A100.as_dict()))
    assert find_hardware(str(path)) == A100
    path.write_text('{"name": "x"}')
    with pytest.raises(ValueError, match=r"--gpu: not a description of hardware: .*missing"):
        find_hardware(str(path))
    with pytest.raises(ValueError, match=r"--gpu: expected local .*a100, h100, h200, or a JSON file, received 'v100'"):
        find_hardware("v100")


UNITS = [
    ({"memory": 80}, r"--gpu: memory: expected bytes, such as 80e9 \(or of bytes \"80GB\"\), received 80"),
    ({"memory": "80"}, "--gpu: memory: expected a size with its unit, received '80'; write 80GB"),
    ({"reserved": 2}, "--gpu: reserved: expected bytes, .*received 2"),
    ({"bandwidth": 3350}, "--gpu: bandwidth: expected bytes/s, .*received 3350"),
    ({"peak": {"bfloat16": 989}}, r"--gpu: peak\.bfloat16: expected FLOP/s, .*received 989"),
    ({"intra": {"latency": 5, "bandwidth": 4e11}}, r"--gpu: intra\.latency: expected seconds, received 5; 5 micro"),
    ({"inter": {"latency": 5e-6, "bandwidth": 50}}, "--gpu: bandwidth: expected bytes/s, .*received 50"),
]


@pytest.mark.parametrize(("change", "message"), UNITS)
def test_numbers_of_hardware_in_another_unit(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**A100.as_dict(), **change}))
    with pytest.raises(ValueError, match=message):
        find_hardware(str(path))
    path.write_text(json.dumps({**A100.as_dict(), "memory": "80GB", "bandwidth": "2039 GB/s"}))
    assert find_hardware(str(path)) == A100


def test_curves_pass_through_their_points_and_stay_flat_beyond() -> None:
    curve = Curve(((1.0, 1.0), (100.0, 10.0)))
    assert [curve(x) for x in (0.1, 1, 100, 1e9)] == pytest.approx([1, 1, 10, 10])
    assert curve(10) == pytest.approx(10**0.5)


WRONG = [
    ({"global_batch": 0}, "global_batch: expected a positive integer, received 0"),
    ({"microbatches": 0}, "microbatches: expected a positive integer"),
    ({"dtype": "int8"}, "dtype: expected one of .*received 'int8'"),
    ({"recompute": "all"}, "recompute: expected one of"),
    ({"accumulation": 0}, "accumulation: expected a positive integer"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_jobs_that_are_none(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingJob(**{"global_batch": 8, "sequence_length": 8, **change})  # type: ignore[arg-type]


def test_a_dtype_without_a_rate() -> None:
    with pytest.raises(ValueError, match="dtype: hardware 'c' states no rate for 'bfloat16'; use one of float32"):
        search.plan(describe(CONFIG), TrainingJob(8, 64), cpu(), 1)
