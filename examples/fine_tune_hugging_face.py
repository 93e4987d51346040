"""Fine-tune a Hugging Face folder in a layout, in a script of your own; save it, and load it in one process.

The folder is a small Llama with random weights, made on the spot, the text this file; with --model and your own batches
it is a real run. One process, or as many as the layout has ranks:

    python examples/fine_tune_hugging_face.py
    torchrun --nproc-per-node 4 examples/fine_tune_hugging_face.py --layout "fsdp2 x tp2"
    torchrun --nproc-per-node 4 examples/fine_tune_hugging_face.py --layout "fsdp2 x tp2" --model ./Llama-3.2-1B
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fusemesh
from fusemesh.hybrid.checkpoint import on_first_rank
from fusemesh.hybrid.data_parallel import sum_over_replicas
from fusemesh.hybrid.hugging_face.load import load_pretrained
from fusemesh.hybrid.ranks.join import build_mesh, distributed
from fusemesh.integrations.transformers import register

BATCH, LENGTH = 8, 64


def make_folder(path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, intermediate_size=128, vocab_size=256, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(path)


def build(folder):
    """The folder's model without memory: each rank gives some to its parts alone."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="fusemesh", dtype=torch.float32)


def batch_of(step, layout, rank):
    """This replica's share of a step's samples: bytes of this file from places drawn by the step."""
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(0, len(text) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    samples = torch.stack([text[start : start + LENGTH] for start in starts.tolist()])
    return samples.chunk(layout.replicas)[layout.replica_of(rank)]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", default="single", help='such as "fsdp2 x tp2"')
    parser.add_argument("--model", help="a Hugging Face folder; default: a small one is made")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-3, help="lower for a model that has learnt something")
    parser.add_argument("--out", default="runs/fine_tuned")
    options = parser.parse_args(arguments)
    layout = fusemesh.Layout.parse(options.layout)
    register()
    with distributed() as world:
        folder = options.model or f"{options.out}-before"
        if options.model is None:
            on_first_rank(lambda: make_folder(folder))
        mesh = build_mesh(layout, world)
        model = fusemesh.parallelize(build(folder), mesh, layout)
        load_pretrained(model, folder)  # each rank reads the bytes of its parts
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
        count = BATCH * (LENGTH - 1)  # tokens of a step over all replicas: losses are sums, divided by it once

        def loss_of(step):
            ids = batch_of(step, layout, world.rank).to(world.device)
            return model(ids, labels=ids, num_items_in_batch=count, use_cache=False).loss

        losses = []
        for step in range(options.steps):
            loss = loss_of(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(sum_over_replicas(loss, mesh).item())
        with torch.no_grad():
            last = sum_over_replicas(loss_of(options.steps), mesh).item()
        model.save_pretrained(options.out)  # every rank calls it, and writes its own parts
        if world.rank > 0:
            return 0

    alone = AutoModelForCausalLM.from_pretrained(options.out, attn_implementation="fusemesh")
    ids = batch_of(options.steps, fusemesh.Layout(), 0)
    with torch.no_grad():
        loaded = alone(ids, labels=ids, use_cache=False).loss.item()
    print(f"layout {layout}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {options.steps} steps")
    print(f"the next batch: {last:.6f} on {world.world_size} ranks, {loaded:.6f} from {options.out} in one process")
    return 0 if abs(last - loaded) < 1e-4 * loaded else 1


if __name__ == "__main__":
    sys.exit(main())
