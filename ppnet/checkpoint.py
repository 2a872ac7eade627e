"""Folders of models: dense, with gates, or compacted. Written whole or not at all; safetensors and JSON, never pickle.

A folder of a model with gates is the stock model's folder with a ``ppnet`` entry in config.json (the gates' options)
and ``puppet.*`` tensors among the weights; without ppnet it loads as the dense model. A compacted model's folder is an
ordinary model folder with ``ppnet_plan.json``, and the modelling file where layers differ in width.
"""

from __future__ import annotations

import json
import struct
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ppnet.errors import CheckpointError, PPNetError
from ppnet.families import FAMILIES, structure_of
from ppnet.files import atomic_directory
from ppnet.gates import PuppetConfig
from ppnet.plan import Plan
from ppnet.shipped import PREFIX, shipped
from ppnet.wrap import attach, select_kinds

PLAN_FILE = "ppnet_plan.json"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What an older save of the same model may have left that the new one does not overwrite.
REPLACEABLE = ("model*.safetensors", INDEX_FILE, PLAN_FILE, "modeling_ppnet_*.py", "generation_config.json")
# safetensors' own limit; a larger "header length" means that the first bytes are something else.
LONGEST_HEADER = 100_000_000


def save(model: nn.Module, directory: str | Path, tokenizer: Any = None) -> None:
    """Writes a dense, gated or compacted model so that `load` gives it back. The folder appears complete or not at all.

    An older folder of a model is replaced. A folder that holds anything else is left alone.

    Args:
        model: a `PreTrainedModel`.
        directory: the folder to write.
        tokenizer: its tokenizer, saved beside it.

    Raises:
        CheckpointError: `directory` is a file or the working directory, or holds files that replacing it would delete.
        OSError: the disk is full or not writable; what was there before is untouched.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"directory: {directory} is a file; give the name of a folder.")
    if directory.is_dir() and directory.samefile("."):
        raise CheckpointError(
            f"directory: {directory} is the current working directory, which saving would replace; name a folder in it."
        )
    with atomic_directory(directory) as work:
        model.save_pretrained(work)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(work)
        plan = getattr(model, "ppnet_plan", None)
        if plan is not None:
            plan.save(work / PLAN_FILE)
        _refuse_to_lose(directory, {file.name for file in work.iterdir()})


def _refuse_to_lose(directory: Path, written: set[str]) -> None:
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
    config = _read_config(path)
    files = _weight_files(path)
    for file in files:
        _check_safetensors(file)
    stock = _model_class(path, config)
    _check_config(stock, path)
    model = _from_pretrained(stock, path, from_pretrained_kwargs)
    if "ppnet" in config:
        gates = _read_gates(files)
        if gates and config["model_type"] in FAMILIES:
            _attach_gates(model, path, config["ppnet"], gates)
        else:
            del model.config.ppnet
            warnings.warn(
                f"{path / CONFIG_FILE} has options of gates, but the gates were not saved: the model comes without "
                "them. To keep gates, load with ppnet.load (not AutoModel) before saving.",
                stacklevel=2,
            )
    if (path / PLAN_FILE).exists():
        plan = Plan.load(path / PLAN_FILE)
        _check_plan(model, plan, path)
        model.ppnet_plan = plan
    return model


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"path: cannot read {file}: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"path: {file} holds a JSON {type(data).__name__}, expected an object.")
    return data


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(
            f"path: {path} is not a folder. Give a local folder; huggingface_hub.snapshot_download(name) fetches one."
        )
    if not (path / CONFIG_FILE).is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(f"path: {path} has no {CONFIG_FILE} (found {found}); it is not a model folder.")
    return _read_json(path / CONFIG_FILE)


# ---- weight files ----------------------------------------------------------------------------------------------------


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: one, or the shards that the index names."""
    if (path / INDEX_FILE).is_file():
        shards = _read_json(path / INDEX_FILE).get("weight_map")
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


def _check_safetensors(file: Path) -> None:
    """Compares a file's size with what its header announces, without reading the weights.

    Raises:
        CheckpointError: truncated, or not a safetensors file.
    """
    size = file.stat().st_size
    foreign = (
        f"path: {file} ({size:,} bytes) is not a safetensors file; save the model with ppnet.save or save_pretrained."
    )
    if size < 8:
        raise CheckpointError(f"path: {file} is truncated: {size} bytes, not even a header; copy or save it again.")
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > LONGEST_HEADER:
            raise CheckpointError(foreign)
        raw = stream.read(length)
    if len(raw) < length:
        raise CheckpointError(
            f"path: {file} is truncated: {size:,} bytes, its header alone needs {8 + length:,}; copy or save it again."
        )
    try:
        header = json.loads(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(foreign) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise CheckpointError(
            f"path: {file} is {state}: {size:,} bytes, its header announces {expected:,}; copy or save it again."
        )


# ---- models ----------------------------------------------------------------------------------------------------------


def _model_class(path: Path, config: dict[str, Any]) -> type:
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


def _check_config(stock: Any, path: Path) -> None:
    """Builds the model of a folder without weights.

    Raises:
        CheckpointError: config.json holds values that the class does not accept.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            stock(stock.config_class.from_pretrained(path))
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


def _attach_gates(model: Any, path: Path, options: Any, gates: dict[str, Tensor]) -> None:
    try:
        puppet_config = PuppetConfig.from_dict(options)
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


def _check_plan(model: Any, plan: Plan, path: Path) -> None:
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
