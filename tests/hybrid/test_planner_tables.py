"""Pure layer: the planner's times against published ones. No constant was fitted to these tables.

They are those of Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM"
(2021), tables 1 and 2 (with the sizes as Megatron-LM's README gave them in April 2021), and of Korthikanti et al.,
"Reducing Activation Recomputation in Large Transformer Models" (2022), table 5.
"""

from __future__ import annotations

import dataclasses
import statistics

from fusemesh.hybrid.layout import Layout
from fusemesh.hybrid.pipeline_options import PipelineOptions
from fusemesh.hybrid.planner import cost
from fusemesh.hybrid.planner.hardware import find_hardware
from fusemesh.hybrid.planner.job import BatchSplit, TrainingJob
from fusemesh.hybrid.planner.model import ModelDescription
from fusemesh.hybrid.planner.published import PublishedDecoder

A100 = find_hardware("a100")


def interleave(virtual_stages: int) -> PipelineOptions:
    """1F1B, interleaved where there are several stages a rank."""
    return PipelineOptions(0, "interleaved1f1b" if virtual_stages > 1 else "1f1b", virtual_stages)


def cut(layout: Layout, parts: int) -> BatchSplit:
    """A step in ``parts``: in the pipeline if there is one, else one after the other."""
    return BatchSplit(parts) if layout.pp == 1 else BatchSplit(1, parts)


def gpt(hidden: int, layers: int, heads: int) -> ModelDescription:
    """Megatron's GPT of a table."""
    return PublishedDecoder(
        name="gpt",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden,
        vocab_size=51200,
        sequence_length=2048,
        gated=False,
        tied=True,
        bias=True,
        layer_norm=True,
        learned_positions=2048,
    ).describe()


def megatron(batch: int, pipeline: PipelineOptions, recompute: str, *, sequence_parallel: bool) -> TrainingJob:
    """A step as Megatron took it in these papers: before FlashAttention, gradients added within the matmuls."""
    return TrainingJob(
        batch,
        2048,
        sequence_parallel=sequence_parallel,
        pipeline=pipeline,
        recompute=recompute,
        fused_attention=False,
        fused_loss=False,
        fused_accumulation=True,
    )


# billions of parameters: layers, hidden size, heads, tp, pp, GPUs, batch, measured TFLOP/s a GPU
NARAYANAN = {
    1.7: (24, 2304, 24, 1, 1, 32, 512, 137),
    3.6: (30, 3072, 32, 2, 1, 64, 512, 138),
    7.5: (36, 4096, 32, 4, 1, 128, 512, 142),
    18.4: (40, 6144, 48, 8, 1, 256, 1024, 135),
    39.1: (48, 8192, 64, 8, 2, 512, 1536, 138),
    76.1: (60, 10240, 80, 8, 4, 1024, 1792, 140),
    145.6: (80, 12288, 96, 8, 8, 1536, 2304, 148),
    310.1: (96, 16384, 128, 8, 16, 1920, 2160, 155),
    529.6: (105, 20480, 128, 8, 35, 2520, 2520, 163),
    1008.0: (128, 25600, 160, 8, 64, 3072, 3072, 163),
}


def test_times_of_narayanan_table_1() -> None:
    """Layouts as published; microbatch and virtual stages, which are not, are the planner's best, as they were tuned.

    Megatron did not hide data-parallel communication then.
    """
    hardware, errors = dataclasses.replace(A100, overlap=0.0), {}
    for size, (layers, hidden, heads, tp, pp, gpus, batch, measured) in NARAYANAN.items():
        model, layout = gpt(hidden, layers, heads), Layout(dp=gpus // tp // pp, tp=tp, pp=pp)
        found = []
        for virtual in (1, 2, 3, 4) if pp > 1 else (1,):
            if layers % (pp * virtual):
                continue
            for samples in (1, 2, 4, 8, 16):
                count, rest = divmod(batch // layout.dp, samples)
                if rest or (virtual > 1 and count % pp):
                    continue
                job = TrainingJob(
                    batch,
                    2048,
                    None,
                    "bfloat16",
                    False,
                    interleave(virtual),
                    "full",
                    fused_attention=False,
                    fused_loss=False,
                )
                found.append(cost.estimate(model, job, layout, hardware, cut(layout, count)).seconds)
        flops = 96 * batch * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
        errors[size] = flops / gpus / min(found) / 1e12 / measured - 1
    # 5.7 % in the mean, at most 12.4 %: no better than one rate for all rows (5.9 %), for these rows are alike.
    assert statistics.mean(map(abs, errors.values())) < 0.06, errors
    assert max(map(abs, errors.values())) < 0.13, errors


# billions of parameters: layers, hidden size, heads, pp, virtual stages, batch, microbatch, seconds with full
# recomputation, and with selective recomputation and sequence parallelism; tp is 8, dp 1
KORTHIKANTI = {
    22: (48, 6144, 64, 1, 1, 4, 4, 1.42, 1.10),
    175: (96, 12288, 96, 8, 3, 64, 1, 18.13, 13.75),
    530: (105, 20480, 128, 35, 3, 280, 1, 49.05, 37.83),
    1000: (128, 25600, 160, 64, 1, 512, 1, 94.42, 71.49),
}


def test_times_of_korthikanti_table_5() -> None:
    errors = {}
    for size, (layers, hidden, heads, pp, virtual, batch, samples, full, selective) in KORTHIKANTI.items():
        for recompute, measured in (("full", full), ("selective", selective)):
            job = megatron(batch, interleave(virtual), recompute, sequence_parallel=recompute == "selective")
            layout = Layout(tp=8, pp=pp)
            found = cost.estimate(gpt(hidden, layers, heads), job, layout, A100, cut(layout, batch // samples))
            errors[size, recompute] = found.seconds / measured - 1
    # 4.0 % in the mean, at most 6.6 %.
    assert statistics.mean(map(abs, errors.values())) < 0.042, errors
    assert max(map(abs, errors.values())) < 0.07, errors


def test_zero_3_falls_behind_with_more_gpus_as_narayanan_table_2_says() -> None:
    """174.6 B parameters, batch 1536 on 384, 768 and 1536 GPUs: the order, not the distance.

    Measured, ZeRO-3 took 1.06, 1.7 and 3.2 times as long as tensor and pipeline parallelism; estimated are 0.87, 0.99
    and 1.25, because our gathers use all of a node's adapters at once, which that ZeRO-3 did not.
    """
    model, hardware, ratios = gpt(12288, 96, 96), dataclasses.replace(A100, overlap=0.0), []
    for gpus, samples in ((384, 4), (768, 2), (1536, 1)):
        job = megatron(1536, PipelineOptions(), "full", sequence_parallel=False)
        sharded = cost.estimate(model, job, Layout(fsdp=gpus), hardware, BatchSplit(1536 // gpus // samples))
        split = cost.estimate(
            model, job, Layout(dp=gpus // 96, tp=8, pp=12), hardware, BatchSplit(1, 1536 // (gpus // 96))
        )
        ratios.append(sharded.seconds / split.seconds)
    assert ratios[0] < 1 < ratios[2] and ratios[0] < ratios[1] < ratios[2], ratios
