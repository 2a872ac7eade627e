"""A model folder without its weights: class and config on the meta device, its gates, and where every weight lies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppnet.checkpoint import (
    CONFIG_FILE,
    built,
    model_class,
    read_config,
    read_json,
    restore_gates,
    weight_files,
)
from ppnet.errors import CheckpointError, PPNetError, UnsupportedModelError
from ppnet.shards import INDEX_FILE
from ppnet.stored import DTYPES, Entry, StoredWeights, read_header
from ppnet.units import reading

# Names of BERT's norms in old folders, which transformers renames as it loads them.
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@dataclass(frozen=True)
class Blueprint:
    """What `ppnet.load` would give, but for the values of its weights.

    Attributes:
        model: on the meta device, in the dtype it would be loaded in, with its gates (whose numbers are there).
        weights: the files, read in that dtype.
        sources: name in the model's state dict -> name in the files; tied parameters share one.
    """

    model: Any
    weights: StoredWeights
    sources: Mapping[str, str]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, what looks at the weights of the model's leaves reads them, one tensor at a time."""
        last = lru_cache(maxsize=1)(lambda name: self.weights.read(self.sources[name]))
        with reading(self.model, last):
            yield


def read_blueprint(path: Path, dtype: torch.dtype | str | None = None) -> Blueprint:
    """Reads the JSON files of a folder and the headers of its weights.

    Args:
        dtype: as `ppnet.load` takes it; None: that of config.json, or of the first weight.

    Raises:
        CheckpointError: as `ppnet.load`: damaged, truncated or missing files, weights that are not those of the config.
        UnsupportedModelError: quantised weights.
        PPNetError: an unknown dtype.
    """
    config = read_config(path)
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"path: the weights in {path} are quantised, and units of such modules cannot be cut out; dequantise the "
            "model first."
        )
    files = weight_files(path)
    entries = _entries(path, files)
    stock = model_class(path, config)
    model = built(stock, path)
    loaded = _dtype(dtype, model.config, entries)
    model = model.to(loaded).eval()
    if model.can_generate():
        model.generation_config = _generation_config(path)
    sources = _sources(model, entries, path)
    restore_gates(model, path, config, files)
    return Blueprint(model, StoredWeights(entries, loaded), sources)


def _entries(path: Path, files: list[Path]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for file in files:
        entries.update(read_header(file))
    if (path / INDEX_FILE).is_file():
        for name, shard in read_json(path / INDEX_FILE)["weight_map"].items():
            if name not in entries or entries[name].file.name != shard:
                raise CheckpointError(
                    f"path: {path / INDEX_FILE} says that {name} is in {shard}, where it is not; files of two models "
                    "may have been mixed, copy or save it again."
                )
    return entries


def _dtype(asked: torch.dtype | str | None, config: Any, entries: Mapping[str, Entry]) -> torch.dtype:
    if asked is None:
        asked = getattr(config, "dtype", None)
    if asked is None:
        asked = next((DTYPES[entry.dtype] for entry in entries.values() if entry.dtype in DTYPES), torch.float32)
    found: Any = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if found not in DTYPES.values():
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES.values())
        raise PPNetError(f"dtype: {asked!r} is not known; use one of {known}.")
    return found


def _generation_config(path: Path) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # there is no such file; older folders have its entries in config.json
        return GenerationConfig.from_pretrained(path, config_file_name=CONFIG_FILE, _from_model_config=True)


# ---- names -----------------------------------------------------------------------------------------------------------


def _sources(model: Any, entries: Mapping[str, Entry], path: Path) -> dict[str, str]:
    """Name in the model's state dict -> name in the files.

    Raises:
        CheckpointError: missing or unknown names, or other shapes.
    """
    wrong = f"path: the weights in {path} do not fit its {CONFIG_FILE}: "
    again = "; files of two models may have been mixed, copy or save it again."
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    sources: dict[str, str] = {}
    missing: list[str] = []
    used: set[str] = set()
    for names in tied.values():
        found = [stored for name in names if (stored := _stored_name(name, model.base_model_prefix, entries))]
        if not found:
            missing += names
            continue
        _check_tied(names, found, entries)
        used.update(found)
        sources.update(dict.fromkeys(names, found[0]))
        shape = tuple(tensors[names[0]].shape)
        for stored in found:
            if entries[stored].shape != shape:
                raise CheckpointError(
                    f"{wrong}{stored} has the shape {entries[stored].shape}, the config says {shape}{again}"
                )
    if missing:
        raise CheckpointError(f"{wrong}missing keys {sorted(missing)[:5]}{again}")
    expected = [r"^puppet\.", r"rotary_emb\.inv_freq", *(model._keys_to_ignore_on_load_unexpected or [])]
    left = [name for name in entries if name not in used and not any(re.search(known, name) for known in expected)]
    if left:
        raise CheckpointError(f"{wrong}unexpected keys {sorted(left)[:5]}{again}")
    return sources


def _stored_name(name: str, prefix: str, entries: Mapping[str, Entry]) -> str | None:
    """The name under which files have a tensor: bare models are stored without the prefix, old ones with old names."""
    old = name
    for new, before in OLD_NAMES.items():
        old = old.replace(new, before)
    for spelling in (name, old):
        for stored in (spelling, spelling.removeprefix(f"{prefix}."), f"{prefix}.{spelling}"):
            if stored in entries:
                return stored
    return None


def _check_tied(names: list[str], stored: list[str], entries: Mapping[str, Entry]) -> None:
    """Refuses tensors that the config ties and that are stored twice with different values.

    Raises:
        CheckpointError: they differ.
    """
    first, *others = dict.fromkeys(stored)
    for other in others:
        if (entries[first].dtype, entries[first].shape) == (entries[other].dtype, entries[other].shape):
            with StoredWeights(entries, DTYPES.get(entries[first].dtype, torch.float32)) as weights:
                pairs = zip(weights.blocks(first), weights.blocks(other), strict=True)
                if all(torch.equal(left, right) for left, right in pairs):
                    continue
        raise CheckpointError(
            f"path: {CONFIG_FILE} ties {' and '.join(names)}, but {first} and {other} are stored and differ; "
            "set tie_word_embeddings to false there, or save the model again."
        )
