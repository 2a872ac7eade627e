"""``ppnet train``: gates and weights together, from a trained model or from scratch."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ppnet.cli.common import (
    Device,
    Force,
    Json,
    Separator,
    Tokenizer,
    check_output,
    load_model,
    load_scores,
    load_tokenizer,
    place,
    quiet_stdout,
    show,
)
from ppnet.errors import CheckpointError, DataError, PPNetError

if TYPE_CHECKING:
    from ppnet.train import PuppetTrainer

DENSE = "dense"  # subfolder of the dense phase
# How gates train, not what they are: these options may change when gates are trained further.
CHANGEABLE = (
    "gate_gradient", "sampled_fraction", "dense_fraction", "lambda_distribution", "lambda_rate", "u_max",
    "smallest_size", "lambda_warmup", "prefix_fraction", "prefix_warmup", "sandwich", "penalty", "distill",
    "distill_temperature", "gate_lr", "decay_gates", "seed",
)  # fmt: skip


def train(
    source: Annotated[
        Path, typer.Argument(help="Model folder, or a config.json to start from scratch.", show_default=False)
    ],
    data: Annotated[list[Path], typer.Option("--data", help="UTF-8 text or .jsonl file; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoints and, at the end, of the model with gates.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps with gates.")] = 1000,
    dense_steps: Annotated[int, typer.Option(help="Optimizer steps without gates before that.")] = 0,
    preset: Annotated[
        str | None, typer.Option(help="Form of the gates, default or paper; if not given: default.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of the weights.")] = 3e-4,
    gate_lr: Annotated[float | None, typer.Option(help="Learning rate of the gates; default 0.03")] = None,
    batch: Annotated[int, typer.Option(help="Sequences per device and micro-step.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Micro-steps per optimizer step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    distill: Annotated[
        float | None, typer.Option(help="Weight of the model's own dense pass as a teacher, 0 to 1.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="The units' importance inside the gates: a file that `ppnet score` wrote.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Any PuppetConfig option, e.g. lambda_rate=0.5; may be repeated.")
    ] = None,
    separator: Separator = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read only the first so many tokens.")] = None,
    tokenizer: Tokenizer = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16; weights stay in float32.")] = False,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint in --out.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order, lambda and masks.")] = 0,
    device: Device = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train gates and weights together, so that the model works at every size.

    Example:  ppnet train models/llama --data train.txt --out puppet --steps 2000
    A model folder with gates is trained further: its gates keep their form.

    Example:  ppnet train models/llama --data train.txt --scores scores.safetensors --out puppet

    Example:  ppnet train config.json --tokenizer models/llama --data train.txt --out puppet --dense-steps 3000
    """
    from ppnet.gates import PuppetConfig
    from ppnet.train import text_blocks
    from ppnet.wrap import fit, is_wrapped, wrap

    for name, value in (("steps", steps), ("batch", batch), ("accumulate", accumulate), ("save-steps", save_steps)):
        if value < 1:
            raise PPNetError(f"{name}: must be at least 1, got {value}.")
    if dense_steps < 0:
        raise PPNetError(f"dense-steps: must be at least 0, got {dense_steps}.")
    for file in data:
        if not file.is_file():
            raise DataError(f"data: {file} does not exist; give existing text or .jsonl files.")
    if not resume:
        check_output(out, force)
    words_folder = tokenizer or (source if source.is_dir() else source.parent)
    with quiet_stdout():
        given = _gate_options(preset, gate_lr, distill, seed, options)
        config = PuppetConfig(**given)
        words = load_tokenizer(words_folder)
        model = _model(source, seed, place(device))
        ranking = load_scores(scores)
        if is_wrapped(model):
            _train_further(model, source, given, dense_steps, ranking)
        else:
            fit(model, config, ranking)  # what is wrong with them shows before the dense phase, not after it
        blocks = text_blocks(list(data), words, length, separator=separator, max_tokens=max_tokens, model=model)
        if not resume:
            _remove_old_checkpoints(out)
        arguments = {
            "learning_rate": lr, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate,
            "bf16": bf16, "save_steps": save_steps, "seed": seed, "use_cpu": place(device) == "cpu",
            "logging_steps": max(1, min(50, steps // 10)),
        }  # fmt: skip
        dense_loss = None
        if dense_steps:
            model, dense_loss = _dense_phase(model, words, blocks, out / DENSE, dense_steps, arguments, resume)
        if not is_wrapped(model):
            wrap(model, config, scores=ranking)
        trainer, loss = _run(model, words, blocks, out, steps, arguments, resume)
        trainer.save_model(str(out))
    result = _summary(trainer, out, blocks.tokens, steps, dense_steps, loss, dense_loss)
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in result.items() if not isinstance(value, dict)]
    gates = [f"{name}: {value:.4g}" for name, value in result["gates"].items()]
    show(result, json, *lines, "gates: " + ", ".join(gates), f"next: ppnet report {out} --data valid.txt --out report")


def _gate_options(
    preset: str | None, gate_lr: float | None, distill: float | None, seed: int, options: list[str] | None
) -> dict[str, Any]:
    """The options of `PuppetConfig` that were given."""
    import json

    from ppnet.gates import PuppetConfig

    named = {"preset": preset, "gate_lr": gate_lr, "distill": distill, "seed": seed}
    values: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    allowed = sorted(PuppetConfig.__dataclass_fields__)
    for pair in options or []:
        name, found, text = pair.partition("=")
        if not found or name not in allowed:
            raise PPNetError(f"set: {pair!r} must be name=value with a name of {', '.join(allowed)}.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text  # a word
        values[name] = tuple(value) if isinstance(value, list) else value
    return values


def _train_further(model: Any, source: Path, given: dict[str, Any], dense_steps: int, scores: Any) -> None:
    """Applies the options that may change to a model that has gates.

    Raises:
        PPNetError: dense steps, options of the gates' form, or scores.
    """
    advice = "leave it out to train the gates further, or start from the dense model (ppnet.unwrap takes gates off)."
    if dense_steps:
        raise PPNetError(f"dense-steps: {dense_steps}, but {source} has gates already; {advice}")
    form = [name for name in given if name not in CHANGEABLE] + ["scores"] * (scores is not None)
    if form:
        raise PPNetError(f"{', '.join(form)}: the gates of {source} keep the form they were trained in; {advice}")
    model.puppet.config = replace(model.puppet.config, **given)
    model.config.ppnet = model.puppet.config.to_dict()


def _model(source: Path, seed: int, device: str) -> Any:
    """The model of a folder, or a fresh one with the weights that `seed` gives."""
    if source.is_dir():
        return load_model(source, device)
    if not source.is_file():
        raise CheckpointError(f"source: {source} does not exist; give a model folder or a config.json.")
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(seed)
    try:
        config = AutoConfig.from_pretrained(str(source))
        if hasattr(config, "ppnet"):  # of a folder with gates, whose weights are not used
            del config.ppnet
        model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # validators and constructors refuse values with many exception types
        raise CheckpointError(f"source: {source} is not a model config that works ({error}).") from error
    return model.to(device)


def _remove_old_checkpoints(out: Path) -> None:
    """Checkpoints of an earlier run would otherwise be taken for this run's when it is resumed."""
    for folder in (out, out / DENSE):
        for entry in folder.glob("checkpoint-*") if folder.is_dir() else ():
            if re.fullmatch(r"checkpoint-\d+", entry.name):
                shutil.rmtree(entry)
    if (out / DENSE / "config.json").is_file():
        shutil.rmtree(out / DENSE)


def _run(
    model: Any, words: Any, blocks: Any, folder: Path, steps: int, arguments: dict[str, Any], resume: bool
) -> tuple[PuppetTrainer, float]:
    """Trains up to `steps` optimizer steps; the trainer and the mean training loss."""
    from transformers import default_data_collator

    from ppnet.train import PuppetTrainer, default_arguments, last_good_checkpoint

    trainer = PuppetTrainer(
        model=model,
        args=default_arguments(folder, max_steps=steps, **arguments),
        train_dataset=blocks,
        data_collator=default_data_collator,  # blocks have one length; the tokenizer's own would ask for a pad token
        processing_class=words,
    )
    begun = folder.is_dir() and last_good_checkpoint(folder) is not None
    output = trainer.train(resume_from_checkpoint=True if resume and begun else None)
    return trainer, float(output.training_loss)


def _dense_phase(
    model: Any, words: Any, blocks: Any, folder: Path, steps: int, arguments: dict[str, Any], resume: bool
) -> tuple[Any, float | None]:
    """The phase without gates; a resumed run that has finished it reads the result."""
    if resume and (folder / "model.safetensors").is_file():
        return load_model(folder, str(next(model.parameters()).device)), None
    trainer, loss = _run(model, words, blocks, folder, steps, arguments, resume)
    trainer.save_model(str(folder))
    return trainer.model, loss


def _summary(
    trainer: PuppetTrainer, out: Path, tokens: int, steps: int, dense_steps: int, loss: float, dense_loss: float | None
) -> dict[str, Any]:
    puppet = trainer.model.puppet
    return {
        "out": out,
        "steps": steps,
        "dense_steps": dense_steps,
        "training_tokens": tokens,
        "training_loss": loss,
        "dense_training_loss": dense_loss,
        "parameters": puppet.costs.dense.params,
        "gates": puppet.metrics(),
    }


def add_to(app: typer.Typer) -> None:
    app.command()(train)
