"""The dense teacher as the reference model of TRL's trainers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ppnet.errors import CheckpointError, TrainingError


@contextmanager
def kl_reference(model: Any, teacher: str | os.PathLike[str]) -> Iterator[None]:
    """Trainers of TRL that are made inside take the model of a folder as the reference of their KL term.

    With ``beta > 0``, `trl.GRPOTrainer` (and `RLOOTrainer`) does not copy the model that it is given: it loads
    ``model.config._name_or_path`` again (TRL 1.16). A model that was just compacted still names the dense model there,
    one that was saved and loaded names itself, and nothing says which of the two the KL is taken to. Here it is said:

        with kl_reference(small, "dense-folder"):
            trainer = trl.GRPOTrainer(model=small, args=trl.GRPOConfig(beta=0.05, ...), ...)

    Leave ``sync_ref_model`` at False: it copies weights between models of one shape. `trl.DistillationTrainer` and
    `DistillationMixin` need none of this; their teacher is an argument.

    Args:
        model: the small model, without PEFT adapters.
        teacher: folder of the dense model.

    Raises:
        CheckpointError: no model folder. TrainingError: another vocabulary, or adapters (TRL then has no reference
            model: it takes the small one with its adapters off).
    """
    path = Path(teacher) / "config.json"
    try:
        vocabulary = json.loads(path.read_text()).get("vocab_size")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"teacher: cannot read {path} ({error}); give the folder of the dense model.") from error
    own = model.get_input_embeddings().weight.shape[0]
    if vocabulary != own:
        raise TrainingError(
            f"teacher: {teacher} has a vocabulary of {vocabulary}, the model of {own}; the teacher must be the model "
            "that it was made from, or one with the same tokenizer."
        )
    if hasattr(model, "peft_config"):
        raise TrainingError(
            "model: has PEFT adapters, and TRL then takes the model without them as the reference, not the teacher; "
            "merge them first (model.merge_and_unload()), or train without."
        )
    before = model.config._name_or_path
    model.config._name_or_path = str(teacher)
    try:
        yield
    finally:
        model.config._name_or_path = before
