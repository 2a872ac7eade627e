"""Sums of movement and of reward movement go on where training is resumed: the uninterrupted run's, to the bit."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny, token_ids
from training import one_thread  # noqa: F401
from transformers import Trainer, default_data_collator

from ppnet.errors import CheckpointError
from ppnet.scores import Scores
from ppnet.train import MovementCallback, PuppetTrainer, default_arguments

ROWS = token_ids(8, 10)
DATA = [{"input_ids": row, "labels": row} for row in ROWS]


def moved(
    folder: Path, kind: Any = Trainer, resume: Any = None, resume_from: Any = None, model: Any = None, **changes: Any
) -> MovementCallback:
    """Five steps of two micro-batches, with a checkpoint every second step."""
    movement = MovementCallback(resume_from=resume_from)
    options = {"learning_rate": 1e-2, "max_steps": 5, "save_steps": 2, "logging_steps": 1}
    arguments = default_arguments(
        folder, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        save_total_limit=None, **{**options, **changes},
    )  # fmt: skip
    kind(
        model=tiny("llama") if model is None else model, args=arguments, train_dataset=DATA,
        data_collator=default_data_collator, callbacks=[movement],
    ).train(resume_from_checkpoint=resume)  # fmt: skip
    return movement


def both(movement: MovementCallback) -> tuple[Scores, Scores]:
    return movement.scores(), movement.scores("signed")


@pytest.mark.parametrize("kind", [Trainer, PuppetTrainer])
def test_movement_goes_on(tmp_path: Path, kind: Any) -> None:
    whole = moved(tmp_path / "run", kind)
    for step in (2, 4):
        resumed = moved(tmp_path / "run", kind, resume=str(tmp_path / f"run/checkpoint-{step}"))
        assert both(resumed) == both(whole) and resumed.tokens == whole.tokens == 5 * 4 * 9
    # The stock Trainer would train a finished run for a step more.
    shutil.rmtree(tmp_path / "run/checkpoint-5")
    newest = moved(tmp_path / "run", kind, resume=True)
    assert both(newest) == both(whole)
    folder = tmp_path / "run/checkpoint-4"
    assert not list(folder.glob(".*")) and (folder / "ppnet_movement.safetensors").stat().st_size < 20_000
    fresh = moved(tmp_path / "other", kind)  # nothing of another run comes into one that is not resumed
    assert both(fresh) == both(whole)


def test_a_checkpoint_without_sums_starts_anew_and_says_so(tmp_path: Path, caplog: Any) -> None:
    whole = moved(tmp_path / "run")
    last = tmp_path / "run/checkpoint-4"
    kept = tmp_path / "kept.safetensors"
    (last / "ppnet_movement.safetensors").rename(kept)
    with caplog.at_level(logging.WARNING):
        resumed = moved(tmp_path / "run", resume=str(last))
    assert "Resuming at step 4 without sums of movement: no ppnet_movement.safetensors" in caplog.text
    assert resumed.tokens == 4 * 9
    kept.rename(last / "ppnet_movement.safetensors")
    # what is missing is what the checkpoint of step 4 held
    part = moved(tmp_path / "part", resume=str(last), resume_from=last, max_steps=4)
    for name, units in whole.scores().items():
        torch.testing.assert_close(part.scores()[name] + resumed.scores()[name], units, rtol=1e-12, atol=0)


def test_checkpoints_of_other_folders_are_not_mixed_up(tmp_path: Path, caplog: Any) -> None:
    whole = moved(tmp_path / "run")
    moved(tmp_path / "branch", learning_rate=5e-2)  # another run has a checkpoint-4 here, too
    last = tmp_path / "run/checkpoint-4"
    with caplog.at_level(logging.WARNING):
        unknown = moved(tmp_path / "branch", resume=str(last), save_strategy="no")
    assert "MovementCallback(resume_from=that folder)" in caplog.text and unknown.tokens == 4 * 9
    caplog.clear()
    named = moved(tmp_path / "branch", resume=str(last), resume_from=last, save_strategy="no")
    assert both(named) == both(whole) and "without sums" not in caplog.text
    with pytest.raises(CheckpointError, match=r"resume_from: .*nowhere holds no ppnet_movement\.safetensors"):
        moved(tmp_path / "branch", resume=str(last), resume_from=tmp_path / "nowhere")


def test_damaged_sums_are_named(tmp_path: Path) -> None:
    moved(tmp_path / "run")
    last = tmp_path / "run/checkpoint-4"
    file = last / "ppnet_movement.safetensors"
    good = file.read_bytes()
    for content in (good[:-8], good[:50], b""):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"ppnet_movement\.safetensors: is truncated or damaged .* sums anew"):
            moved(tmp_path / "run", resume=str(last))
    Scores({"a": [1.0]}, method="random", model_type="llama").save(file)
    with pytest.raises(CheckpointError, match=r"has format 'ppnet\.scores/1', .* reads 'ppnet\.movement/1'"):
        moved(tmp_path / "run", resume=str(last))
    other = tiny("llama", intermediate_size=40)
    moved(tmp_path / "narrow", model=other)
    shutil.copy(tmp_path / "narrow/checkpoint-4/ppnet_movement.safetensors", file)
    with pytest.raises(CheckpointError, match="sums of other sites or widths than this 'llama' model's"):
        moved(tmp_path / "run", resume=str(last))


# ---- GRPO ------------------------------------------------------------------------------------------------------------


def rewarded(folder: Path, resume: Any = None, **changes: Any) -> Any:
    from test_scores_grpo import made_trainer

    # trl's sampler does not come back to the same prompts in a later epoch than the first, with or without the mixin.
    prompts = ["a b c", "d", "e f", "g h i j"] * 4
    options = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2, "max_steps": 5, **changes}
    trainer = made_trainer(folder, prompts=prompts, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def forms(trainer: Any) -> list[Scores]:
    return [trainer.reward_scores(form) for form in ("groups", "split", "signed")]


@pytest.mark.parametrize("changes", [{}, {"importance_sampling_level": "sequence", "score_every": 3}])
def test_reward_movement_goes_on(tmp_path: Path, changes: dict[str, Any]) -> None:
    pytest.importorskip("trl")
    whole = rewarded(tmp_path / "run", **changes)
    resumed = rewarded(tmp_path / "run", resume=str(tmp_path / "run/checkpoint-2"), **changes)
    assert resumed._generations == whole._generations == 5 and resumed._groups_given == whole._groups_given == 10
    assert resumed._sums[0].groups == whole._sums[0].groups > 1
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert forms(resumed) == forms(whole) and resumed._tokens == whole._tokens
    shutil.rmtree(tmp_path / "run/checkpoint-5")
    assert forms(rewarded(tmp_path / "run", resume=True, **changes)) == forms(whole)


def test_reward_movement_without_sums_says_so(tmp_path: Path, caplog: Any) -> None:
    pytest.importorskip("trl")
    whole = rewarded(tmp_path / "run")
    file = tmp_path / "run/checkpoint-4/ppnet_rewards.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"ppnet_rewards\.safetensors: is truncated or damaged"):
        rewarded(tmp_path / "run", resume=str(file.parent))
    file.unlink()
    with caplog.at_level(logging.WARNING):
        resumed = rewarded(tmp_path / "run", resume=str(file.parent))
    assert "without sums of reward movement: no ppnet_rewards.safetensors in it" in caplog.text
    assert resumed._generations == 1 and resumed._sums[0].groups < whole._sums[0].groups
