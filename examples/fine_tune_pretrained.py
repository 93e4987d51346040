"""Fine-tune a Hugging Face folder by the command, and load the result with transformers.

A small model with random weights and a tokenizer are made on the spot, so that it runs anywhere; --model takes a folder
of yours, --text your texts:

    python examples/fine_tune_pretrained.py --layout "fsdp2 x tp2"
    python examples/fine_tune_pretrained.py --model ./Qwen3-0.6B --text texts/ --layout "fsdp2 x tp2"
"""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fusemesh import cli


def make_folder(folder, texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["</s>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train([str(path) for path in sorted(Path(texts).iterdir()) if path.is_file()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 512}
    config = Qwen3Config(**heads, **sizes, max_position_embeddings=128, eos_token_id=0)
    Qwen3ForCausalLM(config).save_pretrained(folder)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", default="single", help='such as "fsdp2 x tp2"')
    parser.add_argument("--model", help="a Hugging Face folder; default: a small one is made")
    parser.add_argument("--text", default=str(Path(__file__).parents[1] / "docs"), help="a folder of texts")
    parser.add_argument("--steps", default="60")
    parser.add_argument("--out", default="runs/pretrained_example")
    options = parser.parse_args(arguments)
    folder, more = options.model, []
    if folder is None:
        folder = f"{options.out}-source"
        make_folder(folder, options.text)
        # Random weights have more to learn than the default of fine-tuning is for.
        more = ["--lr", "3e-3", "--batch-size", "8"]
    command = ["train", "language_model", "--model.pretrained", folder, "--data.path", options.text]
    status = cli.main([*command, *more, "--steps", options.steps, "--layout", options.layout, "--out", options.out])
    if status:
        return status

    model = AutoModelForCausalLM.from_pretrained(f"{options.out}/model")
    tokenizer = AutoTokenizer.from_pretrained(f"{options.out}/model")
    ids = tokenizer("A layout", return_tensors="pt").input_ids
    print(tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
