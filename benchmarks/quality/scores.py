"""The table of scores: every way to choose units x redistribution x healing, on trained models, by calibration seed.

Rows are of five sections. "gated": the shares 25, 50 and 75 % of the gated parameters (heads and neurons alike) are
removed, by every scorer. "mama": weights of its indicators, which its defaults were chosen from. "masks": as many
single weights become zero (Wanda, SparseGPT); nothing gets smaller. "neurons": the shares of the MLPs' parameters
alone, which is what other libraries can remove. "gates": a short gate training, with a score as the importance inside
the gates and with the default importance, then cut to the sizes. Healing has the same tokens for everybody; "gates"
rows have seen their gate training besides.
"""

from __future__ import annotations

import copy
import tempfile
import time

import masks
import peers
from scores_table import losers, plot, table
from store import Rows, read
from subjects import SUBJECTS, train

import ppnet
from ppnet.cost import cost_model
from ppnet.families import structure_of
from ppnet.scores import score_methods
from ppnet.scores.mama import WEIGHTS
from ppnet.train import PuppetTrainer

REMOVED = (0.25, 0.5, 0.75)
METHODS = ("random", "magnitude", "activation", "bias", "taylor", "movement", "kl", "obs", "mama")
PEERS = {
    "Torch-Pruning magnitude": (peers.torch_pruning_mlp, "magnitude"),
    "Torch-Pruning taylor": (peers.torch_pruning_mlp, "taylor"),
    "optipfair MAW": (peers.optipfair_mlp, "MAW"),
    "optipfair VOW": (peers.optipfair_mlp, "VOW"),
    "optipfair PON": (peers.optipfair_mlp, "PON"),
    "optipfair MAW data": (peers.optipfair_mlp, "MAW data"),
}
# What the defaults of mama were chosen from: weights of its indicators, the others 0.
MAMA = {
    "activation": {"activation": 1.0},
    "obs": {"obs": 1.0},
    "activation + obs": {"activation": 1.0, "obs": 1.0},
    "activation + obs + .1 magnitude + .1 bias + .1 sft": {**WEIGHTS, "reward": 0.0},
    "activation + obs + .25 sft": {"activation": 1.0, "obs": 1.0, "sft": 0.25},
    "obs + sft": {"obs": 1.0, "sft": 1.0},
    ".1 magnitude + .1 bias + sft + .5 kl": {"magnitude": 0.1, "bias": 0.1, "sft": 1.0, "kl": 0.5},
}
# Those of METHODS that are compared with other libraries, on neurons alone.
NEURON_METHODS = ("random", "magnitude", "activation", "taylor", "mama")


class Study:
    """One subject; rows that are in the file already are not made again."""

    def __init__(self, subject, rows, healing=True):
        self.subject, self.rows, self.healing = subject, rows, healing
        self.structure = structure_of(subject.model)

    def run(self, seeds, sections):
        self.row({"section": "dense"}, lambda: self.subject.model)
        for seed in range(seeds):
            data = self.subject.calibration(seed)
            for section in sections:
                getattr(self, section)(seed, data)

    def row(self, key, make):
        """Measures what `make` returns, unless that was done."""
        if self.rows.done(**key):
            return
        start = time.perf_counter()
        model = make()
        self.rows.add(start, key, value=self.subject.measure(model), params=model.num_parameters())

    def healed(self, key, make):
        """A row before and one after healing, of one model."""
        made = None

        def once():
            nonlocal made
            made = made if made is not None else make()
            return made

        self.row({**key, "healed": False}, once)
        if self.healing:
            self.row({**key, "healed": True}, lambda: self.subject.heal(once(), key["seed"]))

    # ---- sections ----------------------------------------------------------------------------------------------------

    def scores(self, seed, data, names):
        """Scores of all methods from one pass, made when the first is asked for."""
        made = {}

        def of(name):
            if not made:
                made.update(score_methods(
                    self.subject.model, data, names, seed=seed, loss=self.subject.loss, max_tokens=None,
                    batch_size=self.subject.score_batch, progress=False,
                ))  # fmt: skip
            return made[name]

        return of

    def cut(self, key, data, plan):
        for redistributed in (False, True):
            self.healed(
                {**key, "redistributed": redistributed},
                lambda on=redistributed: ppnet.compact(
                    self.subject.model, plan(), redistribute=data if on else None, check=False
                ),
            )

    def gated(self, seed, data):
        names = [name for name in METHODS if name not in self.subject.without]
        scores = self.scores(seed, data, names)
        for name in names:
            for removed in REMOVED:
                key = {"section": "gated", "method": name, "removed": removed, "seed": seed}
                self.cut(key, data, lambda name=name, removed=removed: self.plan(scores(name), removed))

    def mama(self, seed, data):
        """Weights of mama's indicators, without healing."""
        none = dict.fromkeys(WEIGHTS, 0.0)
        variants = {name: w for name, w in MAMA.items() if not any(w.get(gone) for gone in self.subject.without)}
        scores = self.scores(seed, data, {name: ("mama", {"weights": none | w}) for name, w in variants.items()})
        for name in variants:
            for removed in REMOVED:
                for redistributed in (False, True):
                    key = {"section": "mama", "method": name, "removed": removed, "seed": seed}
                    self.row(
                        {**key, "redistributed": redistributed, "healed": False},
                        lambda name=name, removed=removed, on=redistributed: ppnet.compact(
                            self.subject.model, self.plan(scores(name), removed), check=False,
                            redistribute=data if on else None,
                        ),
                    )  # fmt: skip

    def plan(self, scores, removed):
        return ppnet.plan(self.subject.model, 1 - removed, of="gated", scores=scores)

    def masks(self, seed, data):
        for name in masks.MASKS:
            for removed in REMOVED:
                self.row(
                    {"section": "masks", "method": name, "removed": removed, "seed": seed},
                    lambda name=name, removed=removed: masks.masked(self.subject.model, data, name, removed),
                )

    def neurons(self, seed, data):
        if not self.subject.language_model or seed > 0:  # other libraries' choices hardly depend on the data
            return
        model, scores = self.subject.model, self.scores(seed, data, NEURON_METHODS)
        costs = cost_model(model, self.structure)
        heads = [site.units if site.kind == "kv_group" else 0 for site in self.structure.sites]
        attention = (costs.total(heads).params - costs.total([0] * len(heads)).params) / (
            costs.dense.params - costs.total([0] * len(heads)).params
        )
        for removed in REMOVED:
            key = {"section": "neurons", "removed": removed, "seed": seed}
            for name in NEURON_METHODS:
                self.cut({**key, "method": name}, data, lambda name=name, removed=removed: ppnet.plan(
                    model, attention + (1 - removed) * (1 - attention), of="gated", scores=scores(name),
                    floor={"kv_group": 1.0, "neuron": 0.0},
                ))  # fmt: skip
            layers = round(removed * self.structure.layers)
            self.healed(
                {
                    **key,
                    "method": f"optipfair depth, {layers} of {self.structure.layers} layers",
                    "redistributed": False,
                },
                lambda layers=layers: peers.optipfair_depth(model, data, layers).eval(),
            )
            for name, (peer, option) in PEERS.items():
                self.healed(
                    {**key, "method": name, "redistributed": False},
                    lambda peer=peer, option=option, removed=removed: peer(model, data, removed, option).eval(),
                )

    def gates(self, seed, data):
        if not self.subject.language_model:
            return
        trained = {}

        def puppet(name):
            if name not in trained:
                trained.clear()
                trained[name] = self.train_gates(name, seed, data)
            return trained[name]

        for name in ("mama", "scale_free"):
            for removed in REMOVED:
                key = {"section": "gates", "method": f"gates on {name}", "removed": removed, "seed": seed}
                for redistributed in (False, True):
                    self.healed(
                        {**key, "redistributed": redistributed},
                        lambda name=name, removed=removed, on=redistributed: ppnet.compact(
                            puppet(name), ppnet.plan(puppet(name), 1 - removed, of="gated"),
                            redistribute=data if on else None, check=False,
                        ),
                    )  # fmt: skip

    def train_gates(self, name, seed, data):
        subject = self.subject
        scores = None
        if name != "scale_free":
            scores = ppnet.score(subject.model, data, method=name, seed=seed, max_tokens=None, progress=False)
        model = ppnet.wrap(
            copy.deepcopy(subject.model), ppnet.PuppetConfig(seed=seed, distill=0.5, prefix_fraction=0.0), scores=scores
        ).train()
        blocks = [{"input_ids": ids, "labels": ids} for ids in subject.training_blocks(seed, subject.gate_steps)]
        with tempfile.TemporaryDirectory() as folder:
            train(
                model, blocks, folder, f"gates on {name}", steps=subject.gate_steps, rate=subject.heal_rate,
                batch=subject.heal_batch, seed=seed, kind=PuppetTrainer, logs=4,
            )  # fmt: skip
        return model.eval()


SECTIONS = ("gated", "mama", "gates", "masks", "neurons")


def main(options):
    for name in options.subjects:
        subject = SUBJECTS[name](options.models)
        recipe = {"study": "scores", "subject": name, "mama": WEIGHTS, **subject.recipe}
        rows = Rows(options.out / f"scores-{name}.jsonl", recipe)
        Study(subject, rows, healing=not options.without_healing).run(options.seeds, options.sections)


def tabulate(options):
    """Writes scores.md and a plot per subject, and prints where a scorer loses to random."""
    parts = []
    for name in options.subjects:
        path = options.out / f"scores-{name}.jsonl"
        if not path.exists():
            continue
        recipe, rows = read(path)
        parts.append(table(recipe, rows))
        plot(recipe, rows, options.out / f"scores-{name}.png")
        print("\n".join([name, *losers(recipe, rows)]))
    text = "\n".join(["# Scores", "", "Written by `python benchmarks/quality scores --table`.", "", *parts])
    (options.out / "scores.md").write_text(text)
