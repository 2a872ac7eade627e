"""Folders of models: dense, with gates, or compacted. Written whole or not at all; safetensors and JSON, never pickle.

A folder of a model with gates is the stock model's folder with a ``ppnet`` entry in config.json (the gates' options)
and ``puppet.*`` tensors among the weights; without ppnet it loads as the dense model. A compacted model's folder is an
ordinary model folder with ``ppnet_plan.json``, and the modelling file where layers differ in width.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ppnet.errors import CheckpointError, DataError, PPNetError
from ppnet.families import FAMILIES, structure_of
from ppnet.families.layout import register_traced
from ppnet.files import atomic_directory
from ppnet.gates import PuppetConfig
from ppnet.plan import Plan
from ppnet.shards import INDEX_FILE, WEIGHTS_FILE
from ppnet.shipped import PREFIX, register, shipped
from ppnet.stored import read_header
from ppnet.wrap import attach, select_kinds

PLAN_FILE = "ppnet_plan.json"
CONFIG_FILE = "config.json"
TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model")
# What an older save of the same model may have left that the new one does not overwrite.
REPLACEABLE = ("model*.safetensors", INDEX_FILE, PLAN_FILE, "modeling_ppnet_*.py", "generation_config.json")


def save(
    model: nn.Module, directory: str | Path, tokenizer: Any = None, *, max_shard_size: int | str | None = None
) -> None:
    """Writes a dense, gated or compacted model so that `load` gives it back. The folder appears complete or not at all.

    An older folder of a model is replaced. A folder that holds anything else is left alone.

    Args:
        model: a `PreTrainedModel`.
        directory: the folder to write.
        tokenizer: its tokenizer, saved beside it.
        max_shard_size: of a file of weights, in bytes or as ``"5GB"``; None: transformers' own.

    Raises:
        CheckpointError: `directory` is a file or the working directory, or holds files that replacing it would delete.
        OSError: the disk is full or not writable; what was there before is untouched.
    """
    with model_folder(directory) as work:
        sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.save_pretrained(work, **sharding)  # type: ignore[operator]
        save_beside(model, work, tokenizer)


def save_beside(model: nn.Module, folder: Path, tokenizer: Any) -> None:
    """Writes what a folder holds beside the model itself: the tokenizer, and the plan of a compacted model."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    plan = getattr(model, "ppnet_plan", None)
    if plan is not None:
        plan.save(folder / PLAN_FILE)


@contextmanager
def model_folder(directory: str | Path) -> Iterator[Path]:
    """Yields a new folder that takes the name `directory` when the block ends without an error: `atomic_directory`.

    Raises:
        CheckpointError, OSError: as `save`.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"directory: {directory} is a file; give the name of a folder.")
    if directory.is_dir() and directory.samefile("."):
        raise CheckpointError(
            f"directory: {directory} is the current working directory, which saving would replace; name a folder in it."
        )
    with atomic_directory(directory) as work:
        yield work
        refuse_to_lose(directory, {file.name for file in work.iterdir()})


def refuse_to_lose(directory: Path, written: set[str]) -> None:
    """Refuses to replace a folder that holds other files than a model's.

    Args:
        written: names of the files that the new folder has.

    Raises:
        CheckpointError: there are others, which would be deleted.
    """
    if not directory.is_dir():
        return
    lost = sorted(
        entry.name
        for entry in directory.iterdir()
        if entry.is_dir() or not (entry.name in written or any(fnmatch(entry.name, known) for known in REPLACEABLE))
    )
    if lost:
        raise CheckpointError(
            f"directory: {directory} also holds {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}, which saving "
            "would delete. Save to a new folder (for tokenizer files, pass tokenizer=)."
        )


def load(path: str | Path, **from_pretrained_kwargs: Any) -> Any:
    """Loads a folder written by `save`, by a Trainer, or by `save_pretrained`: gates and plan come back with the model.

    Args:
        path: a local folder.
        **from_pretrained_kwargs: passed on to the model class, e.g. ``dtype``, ``device_map``.

    Returns:
        A compacted model (with its ``ppnet_plan``), the dense model with its gates, or the dense model.

    Raises:
        CheckpointError: no such folder; no or damaged config.json; truncated, missing or foreign weight files; weights,
            gates or plan that do not belong to the config.

    Warns:
        UserWarning: config.json names gates that were not saved, since the model was loaded without them before.
    """
    path = Path(path)
    config = read_config(path)
    files = weight_files(path)
    for file in files:
        read_header(file)
    stock = model_class(path, config)
    built(stock, path)
    model = _from_pretrained(stock, path, from_pretrained_kwargs)
    restore_gates(model, path, config, files)
    if (path / PLAN_FILE).exists():
        plan = Plan.load(path / PLAN_FILE)
        check_plan(model, plan, path)
        model.ppnet_plan = plan
    return model


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        DataError: there is none. CheckpointError: the folder's config.json is damaged.
    """
    from transformers import AutoTokenizer

    register()  # a compacted model's config is then known, and no code of the folder is asked for
    state = "holds no tokenizer that loads" if Path(folder).is_dir() else "is not there"
    absent = f"tokenizer: {folder} {state}; name its folder with --tokenizer."
    files = [file.name for file in Path(folder).iterdir()] if Path(folder).is_dir() else []
    if files and not any(fnmatch(name, known) for name in files for known in TOKENIZER_FILES):
        raise DataError(absent)  # for some models, transformers would make an empty one
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(absent) from error
    except Exception as error:  # config.json is read, too, and its validators raise many exception types
        raise CheckpointError(f"tokenizer: {Path(folder) / 'config.json'} is damaged ({error}); correct it.") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"path: cannot read {file}: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"path: {file} holds a JSON {type(data).__name__}, expected an object.")
    return data


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(
            f"path: {path} is not a folder. Give a local folder; huggingface_hub.snapshot_download(name) fetches one."
        )
    if not (path / CONFIG_FILE).is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"path: {path} has no {CONFIG_FILE} (found {found}); it is not a model folder.")
    config = read_json(path / CONFIG_FILE)
    register_traced(config)
    return config


# ---- weight files ----------------------------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that the index names."""
    if (path / INDEX_FILE).is_file():
        shards = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"path: {path / INDEX_FILE} has no weight_map; the index is damaged, save again.")
        files = [path / name for name in sorted(set(shards.values()))]
    else:
        files = [path / WEIGHTS_FILE]
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"path: {file} is missing; ppnet reads {WEIGHTS_FILE}, or {INDEX_FILE} and its shards."
            )
    return files


# ---- models ----------------------------------------------------------------------------------------------------------


def model_class(path: Path, config: dict[str, Any]) -> type:
    """The class that config.json names: a shipped one, or transformers' own."""
    import transformers

    model_type, names = config.get("model_type"), config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    base = str(model_type).removeprefix(PREFIX)
    if base not in FAMILIES:
        raise CheckpointError(
            f"path: {path / CONFIG_FILE} has model_type {model_type!r}; supported are {', '.join(sorted(FAMILIES))} "
            f"and their compacted forms ({PREFIX}<model_type>)."
        )
    if base != model_type:
        classes = shipped(base)
        found = next((item for item in classes.models.values() if item.__name__ == name), None)
    else:
        found = getattr(transformers, str(name), None)
    if found is None or not hasattr(found, "from_pretrained"):
        raise CheckpointError(
            f"path: {path / CONFIG_FILE} names the class {name!r} under architectures, which neither ppnet nor "
            "transformers has; save the model again."
        )
    return found


def built(stock: Any, path: Path) -> Any:
    """The model of a folder without its weights, on the meta device.

    Raises:
        CheckpointError: config.json holds values that the class does not accept.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return stock(stock.config_class.from_pretrained(path))
    except Exception as error:  # validators and constructors refuse values with many exception types
        raise CheckpointError(
            f"path: {path / CONFIG_FILE} does not describe a {stock.__name__} ({type(error).__name__}: {error}); "
            "correct it or save the model again."
        ) from error


def _from_pretrained(stock: type, path: Path, kwargs: dict[str, Any]) -> Any:
    """`from_pretrained` that expects gates among the weights and accepts no other surprise.

    Raises:
        CheckpointError: weights are missing, left over, or of other shapes than the config says.
    """
    # A subclass of the same name carries the pattern of expected extra keys: no warning about the gates, and no change
    # to the class that everybody else uses. The model is handed out as an instance of the stock class.
    ignored = [*(stock._keys_to_ignore_on_load_unexpected or []), r"^puppet\."]  # type: ignore[attr-defined]
    body = {
        "_keys_to_ignore_on_load_unexpected": ignored,
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
    }
    reader: Any = type(stock.__name__, (stock,), body)
    try:
        model, report = reader.from_pretrained(path, **{**kwargs, "output_loading_info": True})
    except RuntimeError as error:
        raise CheckpointError(f"path: the weights in {path} do not fit its {CONFIG_FILE}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            names = sorted(str(key) for key in report[problem])[:5]
            raise CheckpointError(
                f"path: the weights in {path} do not fit its {CONFIG_FILE}: {problem.replace('_', ' ')} {names}; files "
                "of two models may have been mixed, copy or save it again."
            )
    model.__class__ = stock
    model._keys_to_ignore_on_load_unexpected.discard(ignored[-1])
    return model


def _read_gates(files: list[Path]) -> dict[str, Tensor]:
    """The ``puppet.*`` tensors of a folder, under their names within the container."""
    gates: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118  (safe_open is not iterable)
                if name.startswith("puppet."):
                    gates[name.removeprefix("puppet.")] = stream.get_tensor(name)
    return gates


def restore_gates(model: Any, path: Path, config: dict[str, Any], files: list[Path]) -> None:
    """Attaches the gates that a folder holds to its model, whose weights may be missing (on the meta device).

    Raises:
        CheckpointError: gates that do not belong to the config.

    Warns:
        UserWarning: options of gates without gates.
    """
    if "ppnet" not in config:
        return
    gates = _read_gates(files)
    if gates and config["model_type"] in FAMILIES:
        _attach_gates(model, path, config["ppnet"], gates)
        return
    del model.config.ppnet
    warnings.warn(
        f"{path / CONFIG_FILE} has options of gates, but the gates were not saved: the model comes without "
        "them. To keep gates, load with ppnet.load (not AutoModel) before saving.",
        stacklevel=3,
    )


def _attach_gates(model: Any, path: Path, options: Any, gates: dict[str, Tensor]) -> None:
    try:
        # Folders from before there were prefix masks go on training with draws.
        puppet_config = PuppetConfig.from_dict({"prefix_fraction": 0.0, "prefix_warmup": 0.0, **options})
    except (PPNetError, TypeError) as error:
        raise CheckpointError(f"path: the entry 'ppnet' of {path / CONFIG_FILE} is damaged: {error}") from error
    attach(model, select_kinds(structure_of(model), puppet_config.kinds), puppet_config)
    expected = model.puppet.state_dict()
    wrong = sorted(set(gates) ^ set(expected)) or sorted(n for n in gates if gates[n].shape != expected[n].shape)
    if wrong:
        first = wrong[0]
        state = "missing" if first not in gates else "unknown" if first not in expected else "of another shape"
        raise CheckpointError(
            f"path: the gates in {path} do not fit its {CONFIG_FILE}: puppet.{first} is {state} ({len(wrong)} in all); "
            "the entry 'ppnet' and the weights must come from the same save."
        )
    model.puppet.load_state_dict(gates)


def check_plan(model: Any, plan: Plan, path: Path) -> None:
    """Raises CheckpointError unless the plan's kept widths are the model's widths."""
    base = model.config.model_type.removeprefix(PREFIX)
    if plan.model_type != base:
        raise CheckpointError(f"path: {path / PLAN_FILE} was made for {plan.model_type!r}, the model is a {base!r}.")
    widths = {site.name: site.units for site in FAMILIES[base].sites(model)}
    for name, kept in plan.kept.items():
        if widths.get(name) != len(kept):
            raise CheckpointError(
                f"path: {path / PLAN_FILE} keeps {len(kept)} units of {name}, the model has {widths.get(name)}; the "
                "plan and the weights must come from the same save."
            )
