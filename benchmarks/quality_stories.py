"""stories260K on TinyStories: train gates for a few minutes, then NLL at fractions of the gated parameters.

Run: python benchmarks/quality_stories.py --steps 1500 --seeds 3 (needs ../shared). Beside the elastic model: magnitude
pruning of the original at the same sizes, and the same model fine-tuned without gates on the same tokens, which is what
the gates have to be measured against. Writes benchmarks/results/quality_stories.json.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppnet import PuppetConfig, compact, evaluate, plan, resize, wrap
from ppnet.train import PuppetTrainer, default_arguments, param_groups, text_blocks

SHARED = Path(__file__).resolve().parents[2] / "shared"
SEPARATOR = "<|endoftext|>"
FRACTIONS = (1.0, 0.75, 0.5, 0.25)


def nll(model, tokenizer, text):
    return evaluate.perplexity(model, tokenizer, text, separator=SEPARATOR, batch_size=16, progress=False).nll


def train(model, blocks, options, seed, folder):
    """One phase of options.steps steps; the same tokens in the same order for the same seed."""
    arguments = default_arguments(
        folder, learning_rate=options.lr, per_device_train_batch_size=options.batch, max_steps=options.steps,
        save_strategy="no", logging_steps=100, use_cpu=not torch.cuda.is_available(), data_seed=seed, disable_tqdm=True,
    )  # fmt: skip
    groups = param_groups(model, options.lr, options.gate_lr)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    trainer = PuppetTrainer(model=model, args=arguments, train_dataset=blocks, optimizers=(optimizer, None))
    start = time.perf_counter()
    trainer.train()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--gate-lr", type=float, default=None)
    parser.add_argument("--distill", type=float, default=None)
    parser.add_argument("--lambda-distribution", default=PuppetConfig().lambda_distribution)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--valid-characters", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality_stories.json")
    options = parser.parse_args()
    folder = SHARED / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    valid = (SHARED / "data" / "tinystories" / "valid.txt").read_text()[: options.valid_characters]
    stories = SHARED / "data" / "tinystories" / "train.txt"
    blocks = text_blocks(stories, tokenizer, options.length, separator=SEPARATOR, pack=False, bos=True)
    rows = {"original": nll(original, tokenizer, valid), "magnitude": {}, "elastic": {}, "fine-tuned": []}
    rows["seconds"] = []
    for fraction in FRACTIONS:
        small = compact(original, plan(original, fraction, of="gated", scores="magnitude"))
        rows["magnitude"][str(fraction)] = nll(small, tokenizer, valid)
        rows["elastic"][str(fraction)] = []
    log = tempfile.mkdtemp()
    for seed in range(options.seeds):
        tuned = copy.deepcopy(original).train()
        train(tuned, blocks, options, seed, log)
        rows["fine-tuned"].append(nll(tuned.eval(), tokenizer, valid))
        model = wrap(
            copy.deepcopy(original),
            PuppetConfig(seed=seed, distill=options.distill, lambda_distribution=options.lambda_distribution),
        ).train()
        rows["seconds"].append(train(model, blocks, options, seed, log))
        for fraction in FRACTIONS:
            with resize(model.eval(), fraction, of="gated"):
                rows["elastic"][str(fraction)].append(nll(model, tokenizer, valid))
        print(json.dumps(rows), flush=True)
    rows["options"] = {name: str(value) for name, value in vars(options).items() if name != "out"}
    rows["tokens per phase"] = options.steps * options.batch * options.length
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    tuned_mean = statistics.mean(rows["fine-tuned"])
    print(f"original {rows['original']:.4f}; fine-tuned without gates, equal tokens: {tuned_mean:.4f}")
    for fraction in FRACTIONS:
        values = rows["elastic"][str(fraction)]
        spread = f"{min(values):.4f} to {max(values):.4f}"
        print(f"gated params {fraction:.2f}: elastic {statistics.mean(values):.4f} ({spread}), "
              f"magnitude {rows['magnitude'][str(fraction)]:.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
