"""Reward movement on two processes equals that of one on the same groups of completions, also through a checkpoint.

Started by torchrun, this file is one of the two processes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from test_scores_grpo import made_trainer

import ppnet
from ppnet.train.grpo import RewardMovementTrainer

FORMS = ("groups", "split", "signed")
SETTINGS: dict[str, dict[str, Any]] = {
    "free": {},
    "own": {"importance_sampling_level": "sequence", "score_every": 2},
    "threshold": {"loss_type": "grpo", "reward_threshold": 0.6},
}


class Given(RewardMovementTrainer):
    """Its completions depend on the prompt and their place in the group alone, not on the process."""

    def _generate_single_turn(self, prompt_ids: Any, images: Any, fields: Any, generations: int, *args: Any) -> Any:
        completions = []
        for place, prompt in enumerate(prompt_ids):
            seed = sum((i + 1) * int(token) for i, token in enumerate(prompt)) * 10 + place % generations
            length = 2 + seed % 4
            source = torch.Generator().manual_seed(seed)
            completions.append(torch.randint(3, 13, (length,), generator=source).tolist())
        return completions, None


def run(folder: Path, name: str, processes: int, resume: str | None = None) -> Any:
    """Four steps of two groups of four completions, however many processes share them."""
    trainer = made_trainer(
        folder, tiny("llama", dtype=torch.float64, pad_token_id=0, vocab_size=13), Given,
        ["a b c", "d", "e f", "g h i j", "b", "c d", "a e", "f g h"], per_device_train_batch_size=8 // processes,
        gradient_accumulation_steps=1, learning_rate=0.1, optim="sgd", max_steps=4, save_strategy="steps",
        save_steps=2, **SETTINGS[name],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def of_one_process(folder: Path) -> None:
    for name in SETTINGS:
        trainers = [run(folder / name, name, 2)]
        trainers.append(run(folder / name, name, 2, str(folder / name / "checkpoint-2")))
        for which, trainer in zip(("whole", "resumed"), trainers, strict=True):
            for form in FORMS:
                scores = trainer.reward_scores(form)  # which both processes must call
                if trainer.accelerator.is_main_process:
                    scores.save(folder / f"{name}-{which}-{form}.safetensors")
            if trainer.accelerator.is_main_process:
                torch.save(trainer.model.state_dict(), folder / f"{name}-{which}.pt")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in SETTINGS:
        alone = run(tmp_path / f"{name}-alone", name, 1)
        assert alone._sums[0].groups >= 2
        for which in ("whole", "resumed"):
            weights = torch.load(tmp_path / f"{name}-{which}.pt")
            for parameter, value in alone.model.state_dict().items():
                torch.testing.assert_close(weights[parameter], value, rtol=1e-6, atol=1e-8)
            for form in FORMS:
                expected = alone.reward_scores(form)
                found = ppnet.Scores.load(tmp_path / f"{name}-{which}-{form}.safetensors")
                assert found.tokens == expected.tokens > 0
                for site, units in expected.items():
                    scale = float(units.abs().max())
                    torch.testing.assert_close(found[site], units, rtol=1e-5, atol=1e-6 * scale, msg=f"{name} {site}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    of_one_process(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
