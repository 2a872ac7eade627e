"""Compaction from folder to folder, without ever building the model: `ppnet.compact_folder`.

The small model is made by `ppnet.compact`'s own code on the meta device, so class, config, names, shapes and the parts
that stay are the same. Values go from file to file in blocks of bounded size; what multiplies them is applied by the
same code, too (`ppnet.kept`), so that every written value is bit for bit the one that compaction in memory gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppnet.blueprint import Blueprint, read_blueprint
from ppnet.checkpoint import check_plan, load_tokenizer, model_folder, refuse_to_lose, save_beside
from ppnet.compact import amplitudes, plan_of, planned_structure, shrunk
from ppnet.errors import CheckpointError, DataError, EquivalenceError, PPNetError
from ppnet.evaluate.progress import Progress
from ppnet.kept import Kept, kept_parts, multiplied
from ppnet.plan import Plan
from ppnet.shards import Shards


@dataclass(frozen=True)
class CompactedFolder:
    """What `compact_folder` wrote.

    Attributes:
        path: the folder.
        plan: which units stayed, as in ``ppnet_plan.json``.
        model_class: the name of its class.
        tensors, bytes: how many tensors of how many bytes the weights are; files: of how many files.
        bytes_read: from the source's weights, reading for the plan and for the check included.
        verified: whether what was written was read back.
        tokenizer: whether there is one.
    """

    path: Path
    plan: Plan
    model_class: str
    tensors: int
    bytes: int
    files: int
    bytes_read: int
    verified: bool
    tokenizer: bool


def compact_folder(
    source: str | Path,
    out: str | Path,
    size_or_plan: Any,
    *,
    metric: str = "params",
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer: Any = None,
    verify: bool = True,
    **plan_kwargs: Any,
) -> CompactedFolder:
    """Compacts a model folder into another one without building the model: memory is needed for a few blocks of it.

    The files are those that ``ppnet.save(ppnet.compact(ppnet.load(source, dtype=dtype), size_or_plan, ...), out)``
    writes, bit for bit. Of the source only what stays is read, and whole output projections, whose columns lie apart.
    To rank units by gates, or by ``scores="magnitude"``, the weights that this looks at are read once more, one tensor
    at a time. `out` appears complete or not at all, and the source is never written to.

    Memory: a few blocks of 16 MiB and what folds amplitudes into them, whatever the model and the shards; while units
    are ranked by weights, one tensor (magnitude: a few float32 copies of one).

    Args:
        source: a folder of a dense or gated model, as `ppnet.load` takes it: one safetensors file, or shards.
        out: the folder to write; an older model there is replaced, as by `ppnet.save`.
        size_or_plan: as in `ppnet.compact`.
        metric: what a size means: ``params``, ``flops`` or ``bytes``. ``latency`` runs the model, so it needs
            `ppnet.compact`, or a plan.
        dtype: what the weights are converted to before anything else; None: the folder's.
        max_shard_size: of a file of weights, in bytes or as ``"5GB"``.
        tokenizer: saved beside the weights; None: the source's, if it has one.
        verify: read back what was written: the config must build a model of exactly the stored names, shapes and
            dtypes, and the first, middle and last row of every tensor must be the source's. Logits are not compared:
            that takes both models (`ppnet.compact` does it).
        **plan_kwargs: further arguments of `ppnet.plan`: `of`, `scores`, `allocation`, `normalise`, `floor`,
            `multiple_of`.

    Raises:
        CheckpointError: the source is damaged, truncated, or not what its config says; `out` is the source, or holds
            files that replacing it would delete.
        UnsupportedModelError, PlanError, SizeError: as `ppnet.compact`.
        PPNetError: ``metric="latency"``, an unknown dtype, `max_shard_size` is no size.
        EquivalenceError: what was read back is not what was to be written.
        OSError: the disk is full or not writable.
    """
    source, out = Path(source), Path(out)
    if out.exists() and source.exists() and out.samefile(source):
        raise CheckpointError(f"out: {out} is the source, which stays as it is; name another folder.")
    if metric == "latency" and not isinstance(size_or_plan, Plan):
        raise PPNetError(
            "metric: 'latency' is measured on the model in memory; make the plan first (ppnet.plan, or ppnet resize "
            "--out plan.json) and give it, or use ppnet.compact."
        )
    found = read_blueprint(source, dtype)
    model = found.model
    with found.weights:
        with found.reading():
            plan = plan_of(model, size_or_plan, metric, plan_kwargs)
        structure = planned_structure(model, plan)
        parts = kept_parts(model, structure, plan, amplitudes(model, structure, plan))
        small = shrunk(model, structure, plan, parts)
        words = _tokenizer(source) if tokenizer is None else tokenizer
        shards = Shards(_stored_tensors(small), max_shard_size)
        with model_folder(out) as work:
            _save_without_weights(small, work)
            save_beside(small, work, words)
            # Before the time is spent, not only at the end.
            refuse_to_lose(out, {file.name for file in work.iterdir()} | set(shards.files))
            shards.check_room(work)
            with Progress(shards.total_bytes, "compacting") as progress:

                def blocks(name: str) -> Iterator[Tensor]:
                    for block in _kept_blocks(found, name, parts.get(name)):
                        yield block
                        progress.advance(block.nbytes)

                shards.write(work, blocks, small.num_parameters())
            if verify:
                _verify(work, shards.tensors, found, parts, plan)
    return CompactedFolder(
        path=out,
        plan=plan,
        model_class=type(small).__name__,
        tensors=len(shards.tensors),
        bytes=shards.total_bytes,
        files=len(shards.files),
        bytes_read=found.weights.bytes_read,
        verified=verify,
        tokenizer=words is not None,
    )


def _tokenizer(source: Path) -> Any:
    try:
        return load_tokenizer(source)
    except DataError:
        return None  # a model without a tokenizer stays one


def _stored_tensors(small: Any) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` stores of a model that was loaded: of tied ones one, in its own order."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    small._weight_conversions = []  # nothing was renamed
    return revert_weight_conversion(small, remove_tied_weights_from_state_dict(small.state_dict(), small))


def _save_without_weights(small: Any, folder: Path) -> None:
    """`save_pretrained`, which writes config, generation config and modelling file, with nothing to store."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        small.save_pretrained(folder, state_dict={})
    finally:
        if shown:
            logging.enable_progress_bar()


def _kept_blocks(found: Blueprint, name: str, part: Kept | None) -> Iterator[Tensor]:
    """What stays of a parameter, amplitudes folded in, in blocks of rows."""
    row = 0
    for block in found.weights.blocks(found.sources[name], part):
        rows = slice(row, row + len(block))
        row = rows.stop
        yield block if part is None else multiplied(block, _of_rows(part.factors, rows))


def _of_rows(factors: Mapping[int, Tensor], rows: slice) -> dict[int, Tensor]:
    return {axis: factor[rows] if axis == 0 else factor for axis, factor in factors.items()}


# ---- reading back ----------------------------------------------------------------------------------------------------


def _verify(
    folder: Path, tensors: Mapping[str, Tensor], found: Blueprint, parts: Mapping[str, Kept], plan: Plan
) -> None:
    """Reads a written folder as `ppnet.load` would, and rows of every tensor beside the source's.

    Raises:
        EquivalenceError: it is not what was to be written.
    """
    try:
        written = read_blueprint(folder)
        check_plan(written.model, plan, folder)
    except CheckpointError as error:
        raise EquivalenceError(f"compact_folder: what was written does not load: {error}") from error
    with written.weights as weights:
        for name, tensor in tensors.items():
            code = weights.entries[name].dtype if name in weights.entries else "nothing"
            if name not in weights.entries or weights.read_dtype(name) != tensor.dtype:
                raise EquivalenceError(f"compact_folder: {name} was written as {code}, not as {tensor.dtype}.")
            length = tensor.shape[0] if tensor.dim() else 1
            for row in sorted({0, length // 2, length - 1}):
                expected = _expected_row(found, name, parts.get(name), row)
                if not torch.equal(weights.row(name, row).view(torch.uint8), expected.view(torch.uint8)):
                    raise EquivalenceError(
                        f"compact_folder: row {row} of {name} was written with other values than the source's in "
                        f"{folder}; nothing was kept. Check the disk and its memory, and whether the source changed."
                    )


def _expected_row(found: Blueprint, name: str, part: Kept | None, row: int) -> Tensor:
    """A row of a small tensor from one row of the source: (1, width)."""
    source = found.sources[name]
    if part is None:
        return found.weights.row(source, row)
    whole = found.weights.row(source, int(part.features[row]) if part.dim == 0 else row)
    kept = whole if part.dim == 0 else whole.index_select(1, part.features)
    return multiplied(kept, _of_rows(part.factors, slice(row, row + 1)))
