"""A small model from SFT over GRPO to a pruned and healed one, on a task whose reward can be verified.

Run: python benchmarks/quality_grpo.py --seeds 3 (trl: pip install 'ppnet[rl]'; digit_completion.py has the task). Per
seed, a Llama of 0.3 M parameters learns digit completion by SFT until half of its answers to held-out prompts are
right, then by GRPO, and movement is collected in both phases. The result is cut to fractions of its gated parameters by
several scores, with and without redistribution. The two best methods and random are then healed by the dense model's
answers (KL), and by GRPO with the dense model as the reference of its KL term. Scores, redistribution and KL see the
dense model's own completions of the training prompts, no right answers. Rewards are of greedy completions of the test
prompts, KL is from the dense model after GRPO.

Every finished phase and row is kept in --out: the same command goes on where it was killed. The result is
quality_grpo.json there; of a whole run it is copied to benchmarks/results/ by hand.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # trl reports its use otherwise

import torch
from digit_completion import (
    MAX_NEW_TOKENS,
    answer,
    character_tokenizer,
    completions_of,
    divergence,
    load_prompts,
    rewards_of,
    sequences,
    share_reward,
)
from transformers import DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

import ppnet
from ppnet.evaluate.speed import setting
from ppnet.train import MovementCallback, RewardMovementMixin, default_arguments, kl_reference

PROMPTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "rl"
METHODS = ("random", "magnitude", "activation", "taylor", "obs", "mama")
RESULT = "quality_grpo.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run does; --out holds runs of one recipe."""

    width: int = 128
    layers: int = 2
    neurons: int = 256
    initial: float = 0.05  # standard deviation of the first weights; from 0.02 this task is hardly learnt
    sft_steps: int = 400
    held_out: int = 257  # training prompts that SFT does not see but GRPO does
    sft_until: float = 0.5  # share of exactly right answers to those
    sft_rate: float = 2e-3
    grpo_steps: int = 120
    grpo_rate: float = 2e-4
    prompts_per_step: int = 16
    num_generations: int = 8
    sizes: tuple[float, ...] = (0.75, 0.5, 0.25)
    heal_size: float = 0.5
    heal_steps: int = 100
    heal_rate: float = 1e-3
    heal_grpo_steps: int = 30
    heal_beta: float = 0.05


QUICK = Recipe(
    width=32, layers=2, neurons=32, sft_steps=60, sft_rate=5e-3, grpo_steps=6, sizes=(0.5,), heal_size=0.5,
    heal_steps=6, heal_grpo_steps=2,
)  # fmt: skip


# ---- training --------------------------------------------------------------------------------------------------------


class Progress(TrainerCallback):
    """One line per log."""

    def __init__(self, name, shown):
        self.name, self.shown, self.start = name, shown, time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        found = ", ".join(f"{key} {float(logs[key]):.3f}" for key in self.shown if key in (logs or {}))
        if found:
            seconds = time.perf_counter() - self.start
            print(f"{self.name}: step {state.global_step} of {state.max_steps}, {found}, {seconds:.0f} s", flush=True)


class UntilSolved(TrainerCallback):
    """Ends SFT when the model answers a share of held-out prompts exactly."""

    def __init__(self, name, tokenizer, prompts, until, every=10):
        self.name, self.tokenizer, self.prompts, self.until, self.every = name, tokenizer, prompts, until, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            found = rewards_of(model, self.tokenizer, self.prompts)["exact"]
            print(f"{self.name}: step {state.global_step}, {found:.2f} of held-out prompts exact", flush=True)
            control.should_training_stop |= found >= self.until


def quiet(trainer):
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_sft(model, tokenizer, prompts, recipe, seed, folder, name):
    """Supervised training on the right answers; returns the trainer and the movement."""
    movement = MovementCallback()
    arguments = default_arguments(
        folder, max_steps=recipe.sft_steps, learning_rate=recipe.sft_rate, lr_scheduler_type="constant_with_warmup",
        warmup_steps=20, weight_decay=0.1, per_device_train_batch_size=64, save_strategy="no", seed=seed, use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    shown, held_out = prompts[: -recipe.held_out], prompts[-recipe.held_out :]
    trainer = quiet(Trainer(
        model=model, args=arguments, train_dataset=sequences(tokenizer, shown, map(answer, shown)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[movement, UntilSolved(name, tokenizer, held_out, recipe.sft_until)],
    ))  # fmt: skip
    trainer.train()
    return trainer, movement


def grpo_trainer(kind, model, tokenizer, prompts, recipe, seed, folder, name, *, steps, beta=0.0, **options):
    """A GRPO trainer of the share of right numbers."""
    from datasets import Dataset
    from trl import GRPOConfig

    config = GRPOConfig(
        str(folder), max_steps=steps, learning_rate=recipe.grpo_rate, lr_scheduler_type="constant_with_warmup",
        warmup_steps=5, per_device_train_batch_size=recipe.prompts_per_step * recipe.num_generations, beta=beta,
        num_generations=recipe.num_generations, max_completion_length=MAX_NEW_TOKENS, save_strategy="no", seed=seed,
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, logging_steps=max(1, steps // 6),
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    return quiet(kind(
        model=model, reward_funcs=share_reward, args=config, train_dataset=dataset, processing_class=tokenizer,
        callbacks=[Progress(name, ("reward", "frac_reward_zero_std", "kl"))], **options,
    ))  # fmt: skip


def movement_trainer():
    from trl import GRPOTrainer

    class MovementGRPOTrainer(RewardMovementMixin, GRPOTrainer):
        """GRPO that collects reward movement."""

    return MovementGRPOTrainer


# ---- one run ---------------------------------------------------------------------------------------------------------


class Run:
    """The phases of one seed after the other, and what of them is in the folder already."""

    def __init__(self, folder, recipe, seeds, prompts, test):
        self.folder, self.recipe, self.seeds = folder, recipe, seeds
        self.prompts, self.test = prompts, test
        self.tokenizer = character_tokenizer()
        self.rows = self.read("rows.json") or []

    def read(self, name):
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name, value):
        """Complete or not at all."""
        path = self.folder / name
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        temporary.replace(path)

    def done(self, **key):
        return any(key.items() <= row.items() for row in self.rows)

    def add(self, start, small, dense, rows, **row):
        """Measures a model and keeps the row."""
        row |= rewards_of(small, self.tokenizer, self.test)
        row |= {"kl": divergence(dense, small, rows), "params": small.num_parameters()}
        self.rows.append({**row, "seconds": round(time.perf_counter() - start, 2)})
        self.write("rows.json", self.rows)
        names = row["phase"], row.get("method"), row.get("size"), row.get("redistribute") and "redistributed"
        about = ", ".join(str(name) for name in (*names, row.get("heal")) if name)
        print(f"seed {row['seed']}: {about}: exact {row['exact']:.3f}, share {row['share']:.3f}, KL {row['kl']:.4f}, "
              f"{row['params']:,} parameters", flush=True)  # fmt: skip

    # ---- phases ------------------------------------------------------------------------------------------------------

    def sft(self, seed):
        place = f"seed{seed}"
        if self.done(seed=seed, phase="sft"):
            return
        start = time.perf_counter()
        recipe = self.recipe
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(self.tokenizer), hidden_size=recipe.width, intermediate_size=recipe.neurons,
            num_hidden_layers=recipe.layers, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=32,
            tie_word_embeddings=False, initializer_range=recipe.initial, bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id,
        ))  # fmt: skip
        _, movement = train_sft(
            model, self.tokenizer, self.prompts, recipe, seed, self.folder / place, f"seed {seed} SFT"
        )
        movement.scores().save(self.folder / place / "sft.safetensors")
        ppnet.save(model.eval(), self.folder / place / "sft", self.tokenizer)
        self.add(start, model, model, self.answered(model, self.test), seed=seed, phase="sft")

    def grpo(self, seed):
        place = self.folder / f"seed{seed}"
        if self.done(seed=seed, phase="grpo"):
            return
        start = time.perf_counter()
        model = ppnet.load(place / "sft")
        trainer = grpo_trainer(
            movement_trainer(), model, self.tokenizer, self.prompts, self.recipe, seed, place, f"seed {seed} GRPO",
            steps=self.recipe.grpo_steps, reward_threshold=1.0,
        )  # fmt: skip
        trainer.train()
        trainer.reward_scores().save(place / "grpo.safetensors")
        ppnet.save(model.eval(), place / "grpo", self.tokenizer)
        self.add(start, model, model, self.answered(model, self.test), seed=seed, phase="grpo")

    def answered(self, model, prompts):
        """Prompts with the model's own greedy completions, right or wrong."""
        return sequences(self.tokenizer, prompts, completions_of(model, self.tokenizer, prompts))

    def dense(self, seed):
        """The model after GRPO; what it says to the training prompts, which is all that scores, redistribution and
        distillation see; and to the test prompts, which KL is measured on."""
        model = ppnet.load(self.folder / f"seed{seed}" / "grpo")
        return model, self.answered(model, self.prompts), self.answered(model, self.test)

    def scores(self, dense, data, method, seed):
        given = {}
        if method == "mama":
            place = self.folder / f"seed{seed}"
            given = {name: ppnet.Scores.load(place / f"{phase}.safetensors")
                     for name, phase in (("sft", "sft"), ("reward", "grpo"))}  # fmt: skip
        return ppnet.score(dense, data, method=method, seed=seed, progress=False, **given)

    def small(self, dense, data, scores, size, redistribute):
        plan = ppnet.plan(dense, size, of="gated", scores=scores)
        return ppnet.compact(dense, plan, redistribute=data if redistribute else None)

    def table(self, seed):
        dense, data, own = self.dense(seed)
        for method in METHODS:
            scores = None
            for size in self.recipe.sizes:
                for redistribute in (False, True):
                    key = {"seed": seed, "phase": "prune", "method": method, "size": size, "redistribute": redistribute}
                    if self.done(**key):
                        continue
                    start = time.perf_counter()
                    scores = scores or self.scores(dense, data, method, seed)
                    self.add(start, self.small(dense, data, scores, size, redistribute), dense, own, **key)

    def healed(self, methods, seed):
        dense, data, own = self.dense(seed)
        recipe, size = self.recipe, self.recipe.heal_size
        for method in methods:
            for how in ("KL", "GRPO"):
                key = {"seed": seed, "phase": "heal", "method": method, "size": size, "redistribute": True, "heal": how}
                if self.done(**key):
                    continue
                start = time.perf_counter()
                small = self.small(dense, data, self.scores(dense, data, method, seed), size, True)
                if how == "KL":
                    ppnet.heal(
                        small, dense, data, steps=recipe.heal_steps, learning_rate=recipe.heal_rate, batch_size=64,
                        weight=1.0, seed=seed, progress=False,
                    )  # fmt: skip
                else:
                    from trl import GRPOTrainer

                    name = f"seed {seed} {method} GRPO"
                    with kl_reference(small, self.folder / f"seed{seed}" / "grpo"):
                        trainer = grpo_trainer(
                            GRPOTrainer, small, self.tokenizer, self.prompts, recipe, seed, self.folder / f"seed{seed}",
                            name, steps=recipe.heal_grpo_steps, beta=recipe.heal_beta,
                        )  # fmt: skip
                    trainer.train()
                self.add(start, small.eval(), dense, own, **key)

    def counted(self):
        """The rows of the seeds that were asked for; the folder may hold more."""
        return [row for row in self.rows if row["seed"] < self.seeds]

    def mean(self, value, **key):
        found = [row[value] for row in self.counted() if key.items() <= row.items()]
        return statistics.mean(found) if found else None

    def best(self):
        """The two methods of the highest share of right numbers at the size that is healed; random for comparison."""
        key = {"phase": "prune", "size": self.recipe.heal_size, "redistribute": True}
        ranked = sorted(METHODS, key=lambda method: -self.mean("share", method=method, **key))
        return [*ranked[:2], *(["random"] if "random" not in ranked[:2] else [])]


def show(run):
    """The table: means over seeds."""

    def line(name, **key):
        values = [run.mean(value, **key) for value in ("exact", "share", "kl", "params")]
        if values[0] is not None:
            print(f"{name:<44} {values[0]:6.3f} {values[1]:6.3f} {values[2]:8.4f} {values[3]:>10,.0f}")

    print(
        f"\n{'mean over seeds, greedy on the test prompts':<44} {'exact':>6} {'share':>6} {'KL':>8} {'parameters':>10}"
    )
    line("dense after SFT (KL: 0)", phase="sft")
    line("dense after GRPO (KL: 0)", phase="grpo")
    for size in run.recipe.sizes:
        for method in METHODS:
            for redistribute in (False, True):
                about = f"{size} of the gated, {method}" + (", redistributed" if redistribute else "")
                line(about, phase="prune", method=method, size=size, redistribute=redistribute)
    for method in METHODS:
        for how in ("KL", "GRPO"):
            line(f"{run.recipe.heal_size}, {method}, redistributed, healed by {how}", phase="heal", method=method,
                 heal=how)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("quality-grpo"), help="folder of what is finished")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="folder of the prompts' files, if there are any")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: whether everything runs")
    options = parser.parse_args()
    recipe = QUICK if options.quick else Recipe()
    if options.seeds < 1:
        parser.error(f"--seeds: {options.seeds} must be at least 1")
    try:
        import trl
    except ImportError:
        parser.error("trl: is not installed; pip install 'ppnet[rl]'")
    try:
        prompts, test, source = load_prompts(options.prompts)
    except (ValueError, OSError) as error:
        parser.error(f"--prompts: {error}")
    about = {
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
        "prompts": source,
        "trained on": len(prompts),
    }
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {options.out} cannot be a folder ({error})")
    run = Run(options.out, recipe, options.seeds, prompts, test)
    before = run.read("settings.json")
    if before is None and any(options.out.iterdir()):
        parser.error(f"--out: {options.out} holds something else; give a new folder")
    if before not in (None, about):
        parser.error(f"--out: {options.out} holds a run of other settings (--quick, --prompts or an older recipe); "
                     "give a new folder")  # fmt: skip
    run.write("settings.json", about)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what trl calls
    for seed in range(options.seeds):
        for phase in (run.sft, run.grpo, run.table):
            phase(seed)
    methods = run.best()
    for seed in range(options.seeds):
        run.healed(methods, seed)
    show(run)
    result = {
        "command": " ".join(["python", "benchmarks/quality_grpo.py", *sys.argv[1:]]),
        "machine": {**setting(run.dense(0)[0]), "trl": trl.__version__},
        **about,
        "test prompts": len(test),
        "seeds": options.seeds,
        "seconds": round(sum(row["seconds"] for row in run.counted())),
        "rows": run.counted(),
    }
    run.write(RESULT, result)
    print(f"\n{options.out / RESULT}: {result['seconds']} s in all")


if __name__ == "__main__":
    main()
