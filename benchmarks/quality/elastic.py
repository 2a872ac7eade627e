"""Elasticity: what a model of every size costs in quality, against models trained for that size alone.

Anchors of equal tokens: "dense" is the model without gates; "alone" are dense models of every size, trained by
themselves; "paper" is the published scheme to the letter; "matformer" and "sandwich" train prefixes without gates;
"activation", "mama", ... cut the dense model in one shot. The retrofit regime begins at the dense model and trains on
for a fifth of its tokens; "longer" is the dense model trained on as long without gates, "... healed" the one-shot cuts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import masks
import text
import torch
from elastic_table import plot, plot_trade, table
from low_rank import freeze, low_rank
from nested import NestedTrainer, first_units
from recipe import SUBJECTS, Meter, new_model, schedule, widths
from store import Rows, read
from subjects import pretrained
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback
from variants import RUNS, Variant

import ppnet
from ppnet.evaluate import perplexity
from ppnet.train import PuppetTrainer, default_arguments, param_groups
from ppnet.wrap import engine_of

RANK = 8


class Study:
    """One recipe and seed; rows that are in the file already are not made again, nor are trained models."""

    def __init__(self, name: str, rows: Rows, folder: Path, seed: int) -> None:
        self.recipe, self.rows, self.seed = SUBJECTS[name], rows, seed
        self.folder = folder / f"elastic-{name}"
        self.text = text.load(self.recipe.text, self.recipe.length)

    # ---- training ----------------------------------------------------------------------------------------------------

    def phase(self, model: Any, name: str, first: int, steps: int, lr: float, factor: Any, kind: Any = Trainer,
              gate_lr: float | None = None, micro_batches: int = 1, **options: Any) -> dict[str, float]:  # fmt: skip
        """Trains on the blocks of steps `first` and on; returns what it took."""
        recipe = self.recipe
        blocks = self.text.blocks(self.seed, first * recipe.batch, steps * recipe.batch)
        groups = param_groups(model.train(), lr, gate_lr or recipe.gate_lr)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        meter = Meter(model)
        with tempfile.TemporaryDirectory() as log:
            trainer = kind(
                model=model, train_dataset=blocks, optimizers=(optimizer, LambdaLR(optimizer, factor)),
                args=default_arguments(
                    log, per_device_train_batch_size=recipe.batch // micro_batches,
                    gradient_accumulation_steps=micro_batches, max_steps=steps, save_strategy="no",
                    logging_steps=max(1, steps // 4), disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
                    seed=self.seed, train_sampling_strategy="sequential",
                ),
                **options,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            start = time.perf_counter()
            trainer.train()
        meter.handle.remove()
        model.eval()
        taken = {
            "seconds": time.perf_counter() - start,
            "flops": meter.flops,
            "tokens": steps * recipe.batch * recipe.length,
        }
        losses = [round(log["loss"], 3) for log in trainer.state.log_history if "loss" in log]
        print(f"{name}, seed {self.seed}: {steps} steps in {taken['seconds']:.0f} s, losses {losses}", flush=True)
        return taken

    def trained(self, name: str, make: Callable[[], tuple[Any, dict[str, float]]], **key: Any) -> Any:
        """A trained model, kept in its folder; what training took becomes a row."""
        folder = self.folder / f"{name.replace(' ', '-')}-{self.seed}"
        if not (folder / "config.json").exists():
            start = time.perf_counter()
            model, taken = make()
            # The row first: a folder without one would never get it. After a kill in between there are two.
            taken = {f"training_{unit}": value for unit, value in taken.items()}
            self.rows.add(start, {"run": name, "seed": self.seed, "what": "training", **key}, **taken)
            ppnet.save(model, folder)
        return ppnet.load(folder).eval()

    def taken(self, name: str) -> dict[str, float]:
        """What training took, from its row."""
        row = self.rows.select(run=name, seed=self.seed, what="training")[-1]
        return {unit: row[f"training_{unit}"] for unit in ("seconds", "flops", "tokens")}

    def dense(self) -> Any:
        if self.recipe.pretrained:
            return pretrained(self.recipe.pretrained, self.folder.parent)
        return self.first_steps(self.recipe.steps, "dense")

    def first_steps(self, steps: int, name: str | None = None) -> Any:
        """The model without gates after so many steps of the whole schedule."""
        name = name or f"first {steps}"

        def make() -> Any:
            recipe = self.recipe
            model = new_model(recipe, len(self.text.tokenizer), self.seed)
            return model, self.phase(model, name, 0, steps, recipe.lr, schedule(recipe.steps, recipe.warmup))

        return self.trained(name, make)

    def train_on(
        self, model: Any, name: str, kind: Any = Trainer, lr: float | None = None, gate_lr: float | None = None,
        micro_batches: int = 1,
    ) -> dict[str, float]:  # fmt: skip
        """The retrofit phase: from the dense model on."""
        recipe = self.recipe
        return self.phase(
            model, name, recipe.steps, recipe.retrofit_steps, lr or recipe.retrofit_lr,
            schedule(recipe.retrofit_steps, recipe.warmup // 2), kind, gate_lr, micro_batches,
        )  # fmt: skip

    def elastic(self, name: str, variant: Variant) -> Any:
        """Gates: on the dense model (retrofit), or after the variant's share of the dense steps (scratch)."""

        def make() -> Any:
            recipe = self.recipe
            if variant.regime == "retrofit":
                model = self.wrap(self.dense(), variant)
                if variant.trains == "gates":
                    freeze(model)
                with low_rank(model, RANK) if variant.trains == "lora" else nullcontext():
                    lr = variant.lr * recipe.retrofit_lr
                    return model, self.train_on(model, name, PuppetTrainer, lr, variant.gate_lr, variant.micro_batches)
            first, taken = round(variant.dense_share * recipe.steps), dict.fromkeys(("seconds", "flops", "tokens"), 0.0)
            if first:
                model = self.first_steps(first)
                taken = self.taken(f"first {first}")
            else:
                model = new_model(recipe, len(self.text.tokenizer), self.seed)
            rest = self.phase(
                self.wrap(model, variant), name, first, recipe.steps - first, recipe.lr,
                schedule(recipe.steps, recipe.warmup, first), PuppetTrainer, variant.gate_lr,
                variant.micro_batches,
            )  # fmt: skip
            return model, {unit: taken[unit] + rest[unit] for unit in taken}

        return self.trained(name, make)

    def wrap(self, model: Any, variant: Variant) -> Any:
        scores = self.scores(model, variant.scores) if variant.scores else None
        own = {"seed": self.seed, "smallest_size": self.recipe.fractions[-1]}
        config = ppnet.PuppetConfig(**{**own, **variant.options})
        ppnet.wrap(model, config, scores=scores)
        return model

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def nll(self, model: Any) -> float:
        found = perplexity(model, None, self.text.valid, window=self.recipe.length, batch_size=16, progress=False)
        return found.nll

    def row(self, name: str, fraction: float, make: Callable[[], Any], **key: Any) -> None:
        key = {"run": name, "seed": self.seed, "fraction": fraction, **key}
        if not self.rows.done(**key):
            start = time.perf_counter()
            model = make()
            self.rows.add(start, key, value=self.nll(model), params=model.num_parameters())

    def sizes(self, name: str, model: Any, plan: Callable[[Any, float], ppnet.Plan] | None = None) -> None:
        """A gated model at every fraction, in place."""
        for fraction in self.recipe.fractions:

            def resized(fraction: float = fraction) -> Any:
                if plan is not None:
                    ppnet.resize(model, plan(model, fraction))
                else:
                    ppnet.resize(model, fraction, metric="flops", of="gated")
                return model

            self.row(name, fraction, resized)
        ppnet.resize(model, 1.0)

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        blocks = self.text.blocks(self.seed + 500, 0, self.recipe.calibration)
        ids = torch.stack([block["input_ids"] for block in blocks])
        return [{"input_ids": part, "labels": part} for part in ids.split(8)]

    def scores(self, model: Any, method: str) -> ppnet.Scores:
        return ppnet.score(model, self.calibration(), method=method, seed=self.seed, max_tokens=None, progress=False)

    # ---- runs --------------------------------------------------------------------------------------------------------

    def run(self, name: str) -> None:
        variant = RUNS[name]
        if isinstance(variant, Variant):
            if not self.done(name, self.recipe.fractions):
                self.sizes(name, self.elastic(name, variant))
        else:
            getattr(self, variant[0])(name, *variant[1:])

    def done(self, name: str, fractions: tuple[float, ...]) -> bool:
        return all(self.rows.done(run=name, seed=self.seed, fraction=fraction) for fraction in fractions)

    def run_dense(self, name: str) -> None:
        self.row(name, 1.0, self.dense)

    def run_longer(self, name: str) -> None:
        def make() -> Any:
            model = self.dense()
            return model, self.train_on(model, name)

        self.row(name, 1.0, lambda: self.trained(name, make))

    def run_alone(self, name: str) -> None:
        recipe = self.recipe
        self.row(name, 1.0, self.dense)
        for fraction in self.recipe.fractions[1:]:

            def make(fraction: float = fraction) -> Any:
                model = new_model(recipe, len(self.text.tokenizer), self.seed, *widths(recipe, fraction))
                taken = self.phase(
                    model, f"alone at {fraction}", 0, recipe.steps, recipe.lr, schedule(recipe.steps, recipe.warmup)
                )
                return model, taken

            self.row(
                name,
                fraction,
                lambda fraction=fraction, make=make: self.trained(f"alone {fraction}", make, part_of=name),
            )

    def run_nested(self, name: str, rule: str) -> None:
        if self.done(name, self.recipe.fractions):
            return

        def make() -> Any:
            recipe = self.recipe
            model = new_model(recipe, len(self.text.tokenizer), self.seed)
            ppnet.wrap(model, ppnet.PuppetConfig(amplitudes=False, seed=self.seed))
            taken = self.phase(
                model, name, 0, recipe.steps, recipe.lr, schedule(recipe.steps, recipe.warmup), kind=NestedTrainer,
                rule=rule, smallest=recipe.fractions[-1],
            )  # fmt: skip
            engine_of(model).fix(None)
            return model, taken

        self.sizes(name, self.trained(name, make), first_units)

    def run_cut(self, name: str, method: str, healed: bool) -> None:
        if self.done(name, self.recipe.fractions[1:]):
            return
        model = self.dense()
        scores, data = self.scores(model, method), self.calibration()
        for fraction in self.recipe.fractions[1:]:

            def make(fraction: float = fraction) -> Any:
                plan = ppnet.plan(model, fraction, metric="flops", of="gated", scores=scores)
                small = ppnet.compact(model, plan, redistribute=data, check=False)
                return self.healed(small, model, 1.0) if healed else small.eval()

            self.row(name, fraction, make)

    def run_deployed(self, name: str, run: str, share: float, redistribute: bool = False) -> None:
        """What the gates of `run` keep at every fraction, compacted, then healed by the gated model's dense pass.

        Args:
            share: of the retrofit's steps that every size is healed for; 0: not healed.
            redistribute: whether the outputs of what is removed are moved to what is kept (least squares).
        """
        if self.done(name, self.recipe.fractions):
            return
        model, data = self.elastic(run, RUNS[run]), self.calibration() if redistribute else None
        self.row(name, 1.0, lambda: model)
        for fraction in self.recipe.fractions[1:]:

            def make(fraction: float = fraction) -> Any:
                plan = ppnet.plan(model, fraction, metric="flops", of="gated")
                small = ppnet.compact(model, plan, redistribute=data, check=False)
                return self.healed(small, model, share) if share else small.eval()

            self.row(name, fraction, make)

    def healed(self, small: Any, teacher: Any, share: float) -> Any:
        """`small` after a share of the retrofit's steps, on the retrofit's tokens."""
        recipe, steps = self.recipe, round(share * self.recipe.retrofit_steps)
        blocks = self.text.blocks(self.seed, recipe.steps * recipe.batch, recipe.retrofit_steps * recipe.batch)
        ppnet.heal(
            small, teacher, torch.stack([block["input_ids"] for block in blocks]), steps=steps,
            learning_rate=recipe.retrofit_lr, batch_size=recipe.batch, seed=self.seed, progress=False,
        )  # fmt: skip
        return small.eval()

    def run_masks(self, name: str) -> None:
        model, data = self.dense(), self.calibration()
        for fraction in self.recipe.fractions[1:]:
            self.row(name, fraction, lambda fraction=fraction: masks.masked(model, data, name, 1 - fraction))


def main(options: Any) -> None:
    for subject in options.subjects:
        recipe = {"study": "elastic", "subject": subject, **SUBJECTS[subject].about()}
        rows = Rows(options.out / f"elastic-{subject}.jsonl", recipe)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            study = Study(subject, rows, options.models, seed)
            for name in options.runs:
                study.run(name)


def tabulate(options: Any) -> None:
    parts = []
    for subject in options.subjects:
        path = options.out / f"elastic-{subject}.jsonl"
        if path.exists():
            (recipe, rows), fractions = read(path), SUBJECTS[subject].fractions
            parts.append(table(recipe, rows, fractions))
            plot(recipe, rows, fractions, options.out / f"elastic-{subject}.png")
            if any(row["run"] == "alone" for row in rows):
                plot_trade(recipe, rows, fractions, options.out / f"elastic-{subject}-cost.png")
    text_ = "\n".join(["# Elasticity", "", "Written by `python benchmarks/quality elastic --table`.", "", *parts])
    (options.out / "elastic.md").write_text(text_)
    print(text_)
