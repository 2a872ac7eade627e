"""Sums that a training accumulates, in a file of a checkpoint's folder: safetensors with JSON in the metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ppnet.errors import CheckpointError
from ppnet.units import Structure


def save_sums(
    file: Path, form: str, structure: Structure, sums: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes the file; it appears complete or not at all.

    Args:
        form: what the file holds, and its version: ``"ppnet.movement/1"``.
        sums: name -> (units of all sites,), in the structure's order.
        facts: JSON values beside them.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    about = {"format": form, "units": json.dumps(_units(structure)), "facts": json.dumps(dict(facts))}
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in sums.items()}, temporary, metadata=about)
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: could not be written ({error}); free disk space, then resume.") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_sums(file: Path, form: str, structure: Structure, names: tuple[str, ...]) -> tuple[dict[str, Tensor], Any]:
    """Reads what `save_sums` wrote: the sums, on the CPU, and the facts.

    Raises:
        CheckpointError: a damaged or foreign file, or one of other units.
    """
    try:
        with safe_open(str(file), framework="pt") as stream:
            about = stream.metadata() or {}
            if about.get("format") != form:
                raise CheckpointError(
                    f"{file}: has format {about.get('format')!r}, this version reads {form!r}; resume with the ppnet "
                    "version that wrote it, or delete the file to start the sums anew."
                )
            if json.loads(about["units"]) != _units(structure):
                raise CheckpointError(
                    f"{file}: holds sums of other sites or widths than this {structure.model_type!r} model's, or of "
                    "another order of its units; resume with the model of the saved run, or delete the file to start "
                    "the sums anew."
                )
            sums = {name: stream.get_tensor(name) for name in names}
            facts = json.loads(about["facts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{file}: is truncated or damaged ({error}); resume from another checkpoint, or delete the file to start "
            "the sums anew."
        ) from error
    if any(value.shape != (structure.total_units,) or not torch.isfinite(value).all() for value in sums.values()):
        raise CheckpointError(f"{file}: holds NaN, or sums of another shape; resume from another checkpoint.")
    return sums, facts


def _units(structure: Structure) -> dict[str, Any]:
    about = {"model_type": structure.model_type, "sites": {site.name: site.units for site in structure.sites}}
    return {**about, "order": structure.order} if structure.order else about
