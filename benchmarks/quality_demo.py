"""The demo's quality over seeds: ways to spend the same tokens, against the model trained without gates.

Run: python benchmarks/quality_demo.py --seeds 3. Every variant sees as many tokens as the anchor (the model trained
without gates to the end), and the last phase in the same order. "paper" trains with gates from the first step, in the
published form; "default" trains densely first and gates the rest, "draws" does so with Bernoulli masks alone. Writes
benchmarks/results/quality_demo.json.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

from ppnet import PuppetConfig, wrap
from ppnet.demo import (
    PAPER_RATIOS,
    Recipe,
    library_text,
    new_model,
    perplexity_of,
    quality_table,
    train,
    train_tokenizer,
)
from ppnet.train import text_blocks

# name -> (dense share of the steps, learning rate of the gates (None: as the demo), PuppetConfig options)
VARIANTS = {
    "paper": (0.0, 1.5e-3, {"preset": "paper", "gate_gradient": "exact"}),
    "default": (0.6, None, {}),
    "draws": (0.6, None, {"prefix_fraction": 0.0}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument(
        "--extra", default="{}", help='further variants as JSON: {"name": [dense share, gate lr or null, {options}]}'
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality_demo.json")
    options = parser.parse_args()
    known = VARIANTS | json.loads(options.extra)
    variants = {name: known[name] for name in [*filter(None, options.variants.split(",")), *json.loads(options.extra)]}
    results = {"recipe": dataclasses.asdict(Recipe()), "steps": options.steps, "paper ratios": PAPER_RATIOS, "runs": []}
    texts, held_out = library_text()
    tokenizer = train_tokenizer(texts, Recipe().vocabulary)
    blocks = text_blocks(texts, tokenizer, Recipe().length, progress=False)
    valid = text_blocks(
        held_out, tokenizer, Recipe().length, max_tokens=Recipe().valid_tokens, progress=False
    ).ids.long()
    log = Path(tempfile.mkdtemp())
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        recipe = Recipe(seed=seed, steps=options.steps)
        model, done, snapshots = new_model(recipe), 0, {}
        for stop in sorted({round(share * recipe.steps) for share, _, _ in variants.values()} | {recipe.steps}):
            if stop > done:
                train(model, blocks, recipe, log, done, stop, f"seed {seed}, ungated")
            snapshots[stop], done = copy.deepcopy(model), stop
        anchor = perplexity_of(model.eval(), valid, recipe)
        for name, (share, gate_lr, config) in variants.items():
            start = round(share * recipe.steps)
            elastic = wrap(copy.deepcopy(snapshots[start]), PuppetConfig(**{"seed": seed, **config})).train()
            own = dataclasses.replace(recipe, gate_lr=gate_lr or recipe.gate_lr)
            begun = time.perf_counter()
            train(elastic, blocks, own, log, start, recipe.steps, f"seed {seed}, {name}")
            rows = quality_table(elastic.eval(), anchor, valid, recipe)
            run = {"seed": seed, "variant": name, "options": known[name], "ungated perplexity": anchor, "rows": rows}
            results["runs"].append({**run, "gate phase seconds": time.perf_counter() - begun})
            print(name, seed, [round(row["/ ungated"], 3) for row in rows], [round(r["/ own dense"], 3) for r in rows])
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    for name in variants:
        runs = [run["rows"] for run in results["runs"] if run["variant"] == name]
        for column in zip(*runs, strict=True):
            ungated, own = ([row[key] for row in column] for key in ("/ ungated", "/ own dense"))
            print(
                f"{name:>12} at {column[0]['gated FLOPs']:.1f} of the gated FLOPs: {statistics.mean(ungated):.3f} "
                f"x ungated ({min(ungated):.3f} to {max(ungated):.3f}), {statistics.mean(own):.3f} x own dense "
                f"(paper {column[0]['paper / own dense']})"
            )


if __name__ == "__main__":
    main()
