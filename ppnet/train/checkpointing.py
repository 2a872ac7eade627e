"""Training checkpoints without pickle: safetensors and JSON, complete or absent, resumed bit for bit.

A checkpoint ``checkpoint-<step>`` is written under a temporary name, flushed to disk and renamed. Its files:

- ``model.safetensors`` (or shards with an index), ``config.json``, tokenizer files: as `save_pretrained` writes them;
- ``optimizer.safetensors`` and ``optimizer.json``: optimizer state by parameter name;
- ``scheduler.json``, ``scaler.json`` (fp16 only), ``rng_state.json``, ``trainer_state.json``, ``training_args.json``;
- ``ppnet_checkpoint.json``: the manifest, which lists every file with its size.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppnet.errors import CheckpointError

MANIFEST = "ppnet_checkpoint.json"
OPTIMIZER = "optimizer"
SCHEDULER = "scheduler.json"
SCALER = "scaler.json"
RNG_STATE = "rng_state.json"
_FORMAT = 1
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+)\..*\.(tmp|old)")


# ---- files ----------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: the file is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); resume from another checkpoint.") from error


def write_json(path: Path, data: Any) -> None:
    """Writes JSON. Floats keep every bit (shortest round-trip representation).

    Raises:
        CheckpointError: `data` holds something that JSON cannot say.
    """
    try:
        path.write_text(json.dumps(data), encoding="utf-8")
    except TypeError as error:
        raise CheckpointError(
            f"{path.name}: the state holds a value that JSON cannot store ({error}), and checkpoints are never "
            "pickled; use an optimizer or scheduler whose state is numbers and tensors, or save_only_model=True."
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """
    try:
        return load_file(path, device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is truncated or not a safetensors file ({error}).") from error


def write_manifest(folder: Path, **facts: Any) -> None:
    """Lists all files of the folder with their sizes in bytes, beside the given facts (JSON values)."""
    files = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    write_json(folder / MANIFEST, {"format": _FORMAT, "files": files, **facts})


def verify_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Checks that a checkpoint is complete and returns its manifest.

    Raises:
        CheckpointError: not a folder, not written by ppnet.train, written by a newer version, or a file is missing or
            has another size than when it was written. The message names the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint: {str(path)!r} is not a folder; give the path of a checkpoint-<step> folder."
        )
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder / MANIFEST}: is missing, so {folder} was not written by ppnet.train (or not completely); "
            "load its weights with from_pretrained and start a new run instead."
        )
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{folder / MANIFEST}: is not a manifest written by ppnet.train.")
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r} is not known (this version reads {_FORMAT}); "
            "resume with the ppnet version that wrote it."
        )
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing; resume from another checkpoint.")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: has {file.stat().st_size} bytes, {size} were written (truncated or overwritten); resume from "
                "another checkpoint."
            )
    return manifest


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Complete checkpoints in a folder, by step, oldest first. Incomplete and foreign ones are left out."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        match = _CHECKPOINT.fullmatch(entry.name)
        if match is None:
            continue
        try:
            verify_checkpoint(entry)
        except CheckpointError:
            continue
        found.append((int(match.group(1)), entry))
    return [path for _, path in sorted(found)]


def last_good_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step in a folder, or None. Half-written ones are passed over."""
    _restore_replaced(Path(output_dir))
    found = checkpoints(output_dir)
    return found[-1] if found else None


def _restore_replaced(folder: Path) -> None:
    """Gives a checkpoint its name back if the run was killed between moving it away and moving its successor in."""
    for entry in folder.glob(".checkpoint-*.old"):
        match = _LEFTOVER.fullmatch(entry.name)
        if match is not None and not (folder / match.group(1)).exists():
            entry.rename(folder / match.group(1))


def remove_leftovers(output_dir: str | os.PathLike[str]) -> None:
    """Removes what a killed run left half-written. Call it when no other run writes to the folder."""
    folder = Path(output_dir)
    _restore_replaced(folder)
    for entry in folder.glob(".checkpoint-*"):
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, protected: set[Path]) -> None:
    """Deletes the oldest complete checkpoints beyond `limit`, never one in `protected`. None or 0: no limit.

    A checkpoint loses its name before its files are deleted, so a kill in between leaves no incomplete checkpoint.
    """
    if not limit or limit < 0:
        return
    found = checkpoints(output_dir)
    excess = len(found) - max(limit, len(protected))
    for path in [path for path in found if path not in protected][: max(0, excess)]:
        doomed = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# ---- weights --------------------------------------------------------------------------------------------------------


def check_finite_weights(model: nn.Module) -> None:
    """Raises CheckpointError if a parameter holds NaN or infinity, naming the first one."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise CheckpointError(
                f"{name}: holds NaN or infinite weights, so no checkpoint is written; resume from the last good one."
            )


def load_weights(model: nn.Module, folder: Path) -> None:
    """Loads the weights of a checkpoint into the model, in place, exactly as they were saved.

    Raises:
        CheckpointError: a file is damaged, or a tensor is missing, unexpected or of another shape or dtype.
    """
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    own = model.state_dict()
    loaded: set[str] = set()
    for shard in shards:
        tensors = read_tensors(folder / shard)
        _check_tensors(folder / shard, tensors, own)
        model.load_state_dict(tensors, strict=False)
        loaded |= set(tensors)
    # Tied tensors are written once, under one of their names.
    storages = {own[name].data_ptr() for name in loaded}
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    for name, tensor in own.items():
        if name not in loaded and tensor.data_ptr() not in storages and not any(p.search(name) for p in ignored):
            raise CheckpointError(
                f"{folder}: holds no tensor {name!r} of the model; build (and wrap) the model as in the saved run."
            )


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Compares names, shapes and dtypes with the model's before anything is overwritten."""
    for name, tensor in tensors.items():
        if name not in own:
            raise CheckpointError(
                f"{path}: holds {name!r}, which the model has not; build (and wrap) the model as in the saved run."
            )
        saved, expected = (tuple(tensor.shape), tensor.dtype), (tuple(own[name].shape), own[name].dtype)
        if saved != expected:
            raise CheckpointError(
                f"{path}: {name!r} has shape {saved[0]} and dtype {saved[1]}, the model's are {expected[0]} and "
                f"{expected[1]}; resume with the model, dtype and PuppetConfig of the saved run."
            )


# ---- optimizer ------------------------------------------------------------------------------------------------------


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Writes optimizer state by parameter name: tensors to safetensors, numbers and group options to JSON.

    Raises:
        CheckpointError: a parameter is not the model's, or a state value is neither a tensor nor a JSON value.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    layout: dict[str, Any] = {
        "class": type(getattr(optimizer, "optimizer", optimizer)).__name__,
        "groups": [],
        "state": {},
    }

    def encode(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        stored = value.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory.
        tensors[key] = stored.clone() if stored.data_ptr() in storages else stored
        storages.add(stored.data_ptr())
        return {"tensor": key}

    for number, group in enumerate(optimizer.param_groups):
        members = []
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise CheckpointError(
                    f"optimizer: group {number} holds a parameter of shape {tuple(parameter.shape)} that is not the "
                    "model's, so its state cannot be saved by name; build the optimizer from ppnet.train.param_groups."
                )
            name = names[id(parameter)]
            members.append(name)
            state = optimizer.state.get(parameter, {})
            layout["state"][name] = {key: encode(f"{name}/{key}", value) for key, value in state.items()}
        options = {key: encode(f"group{number}/{key}", value) for key, value in group.items() if key != "params"}
        layout["groups"].append({"params": members, "options": options})
    save_file(tensors, folder / f"{OPTIMIZER}.safetensors")
    write_json(folder / f"{OPTIMIZER}.json", layout)


def in_order_of(parameter: Tensor, value: Any) -> Any:
    """A tensor of a parameter's shape in its memory order: an update of another order rounds differently."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Inverse of `save_optimizer`, in place.

    Raises:
        CheckpointError: the files are damaged, or the optimizer is of another class or has other parameter groups.
    """
    path = folder / f"{OPTIMIZER}.json"
    layout = read_json(path)
    tensors = read_tensors(folder / f"{OPTIMIZER}.safetensors")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    current = type(getattr(optimizer, "optimizer", optimizer)).__name__
    if layout["class"] != current:
        raise CheckpointError(f"{path}: written by optimizer {layout['class']}, this run uses {current}; use the same.")
    members = [[names.get(id(parameter), "?") for parameter in group["params"]] for group in optimizer.param_groups]
    if members != [group["params"] for group in layout["groups"]]:
        raise CheckpointError(
            f"{path}: its parameter groups are not those of this run; keep weight decay exclusions, frozen parameters "
            "and gates as in the saved run."
        )

    def decode(value: Any) -> Any:
        if not (isinstance(value, dict) and "tensor" in value):
            return value
        if value["tensor"] not in tensors:
            raise CheckpointError(f"{folder / OPTIMIZER}.safetensors: holds no {value['tensor']!r}.")
        return tensors[value["tensor"]]

    groups, state, number = [], {}, 0
    for saved, group in zip(layout["groups"], optimizer.param_groups, strict=True):
        options = {key: decode(value) for key, value in saved["options"].items()}
        # JSON has no tuples; optimizers unpack betas as either, but the options should not change type.
        options = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in options.items()}
        groups.append({**options, "params": list(range(number, number + len(saved["params"])))})
        for name, parameter in zip(saved["params"], group["params"], strict=True):
            entry = {key: in_order_of(parameter, decode(value)) for key, value in layout["state"][name].items()}
            if entry:
                state[number] = entry
            number += 1
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# ---- random numbers -------------------------------------------------------------------------------------------------


def _encode_bytes(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def rng_state() -> dict[str, Any]:
    """States of the Python, NumPy, torch CPU and torch CUDA (all visible devices) generators, as JSON values."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _encode_bytes(torch.random.get_rng_state()),
        "cuda": [_encode_bytes(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Inverse of `rng_state`; CUDA devices that are not there (or were not) are left as they are."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(_decode_bytes(state["torch"]))
    if torch.cuda.is_available():
        for device, text in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_decode_bytes(text), device)
