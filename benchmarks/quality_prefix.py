"""What prefixes cost: NLL of sizes that keep the first units of one order, against the units that the gates keep there.

Run: python benchmarks/quality_prefix.py --steps 100 (needs ../shared). Gates are trained on stories260K for some steps.
At a size the learned set is every unit with rho >= 1/2 at the u whose set costs most nearly that size; one unit of a
layer stays always. Beside it, at the same u: the first units of every layer's one order (`Puppet.order_key`), as many
as the learned set has there; and what is deployed, `ppnet.plan` at the learned set's own cost. Sets may differ, since
f^gate depends on lambda, and with it the order of two units. Writes benchmarks/results/quality_prefix.json.
"""

import argparse
import json
import tempfile
from itertools import pairwise
from pathlib import Path

from quality_stories import SEPARATOR, SHARED, nll, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppnet import PuppetConfig, plan, resize, wrap
from ppnet.plan import make_plan
from ppnet.train import text_blocks

SIZES = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
POINTS = 256


def learned_sets(puppet):
    """u -> the units of every site with rho >= 1/2 there, at least the most probable one."""
    offsets, found = puppet.structure.offsets(), {}
    for step in range(POINTS):
        rho = puppet.inclusion(step / POINTS).detach()
        parts = [rho[start:stop] for start, stop in pairwise(offsets)]
        found[step / POINTS] = [(part >= 0.5).nonzero().flatten().tolist() or [int(part.argmax())] for part in parts]
    return found


def rows(model, measure):
    """One row per size."""
    puppet = model.puppet
    structure, costs = puppet.structure, puppet.costs
    gated = costs.dense.params - costs.fixed.params
    keys = puppet.order_key().split([site.units for site in structure.sites])
    orders = [key.argsort(descending=True, stable=True).tolist() for key in keys]
    sets = learned_sets(puppet)
    cost = {u: costs.total([len(units) for units in kept]) for u, kept in sets.items()}
    plans = {size: plan(model, size, of="gated") for size in SIZES}
    for made in plans.values():
        firsts = zip(structure.sites, orders, strict=True)
        assert all(made.kept[site.name] == sorted(order[: len(made.kept[site.name])]) for site, order in firsts)

    def at(made):
        with resize(model, made):
            return round(measure(model), 4)

    for size in SIZES:
        u = min(cost, key=lambda u: abs(cost[u].params - costs.fixed.params - size * gated))
        learned = sets[u]
        counts = [len(units) for units in learned]
        prefix = [order[:count] for order, count in zip(orders, counts, strict=True)]
        other = sum(len(set(a) - set(b)) for a, b in zip(learned, prefix, strict=True))
        common = {"cost": cost[u], "dense_cost": costs.dense, "u": u}
        deployed = plan(model, cost[u].params)
        yield {
            "size": size,
            "gated params of the set": round((cost[u].params - costs.fixed.params) / gated, 4),
            "u": u,
            "units that differ": round(other / sum(counts), 4),
            "learned set": at(make_plan(structure, learned, **common)),
            "prefix, as many per layer": at(make_plan(structure, prefix, **common)),
            "ppnet.plan of that cost": at(deployed),
            "u of the plan": round(deployed.u, 4),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--gate-lr", type=float, default=None)
    parser.add_argument("--presets", nargs="+", default=["default", "paper"])
    parser.add_argument("--valid-characters", type=int, default=40_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality_prefix.json")
    options = parser.parse_args()
    folder, stories = SHARED / "models" / "stories260K", SHARED / "data" / "tinystories"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    valid = (stories / "valid.txt").read_text()[: options.valid_characters]
    needed = options.steps * options.batch * options.length
    text = (stories / "train.txt").read_text()[: 6 * needed].split(SEPARATOR)
    blocks = text_blocks([story.strip() for story in text if story.strip()], tokenizer, options.length, bos=True,
                         max_tokens=needed)  # fmt: skip
    found = {"options": {name: str(value) for name, value in vars(options).items() if name != "out"}}
    for preset in options.presets:
        model = wrap(
            AutoModelForCausalLM.from_pretrained(folder), PuppetConfig(preset=preset, prefix_fraction=0.0)
        ).train()
        train(model, blocks, options, 0, tempfile.mkdtemp())
        model.eval()
        found[preset] = {"dense": round(nll(model, tokenizer, valid), 4), "rows": []}
        for row in rows(model, lambda model: nll(model, tokenizer, valid)):
            found[preset]["rows"].append(row)
            print(preset, json.dumps(row), flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
