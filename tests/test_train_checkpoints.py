"""Checkpoints: complete or absent, damaged ones named, and runs killed with SIGKILL that end with the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny
from torch import Tensor
from training import one_thread, trainer, wrapped  # noqa: F401
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import ppnet
from ppnet.errors import CheckpointError
from ppnet.train import (
    PuppetTrainer,
    last_good_checkpoint,
    verify_checkpoint,
)
from ppnet.train.checkpointing import remove_leftovers, rng_state, rotate, set_rng_state

logging.disable_progress_bar()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A finished run with checkpoints at steps 2, 4, 6, and its final weights."""
    folder = tmp_path_factory.mktemp("run")
    model = wrapped()
    trainer(model, folder, save_total_limit=None).train()
    return folder, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def copy_of(finished: tuple[Path, Any], folder: Path) -> Path:
    shutil.copytree(finished[0], folder, dirs_exist_ok=True)
    return folder


def test_checkpoint_is_json_and_safetensors_and_loads_elsewhere(finished: Any) -> None:
    folder = finished[0] / "checkpoint-6"
    assert {file.suffix for file in folder.rglob("*")} == {".json", ".safetensors"}
    manifest = verify_checkpoint(folder)
    assert manifest["step"] == 6 and manifest["puppet"]["lambda_warmup"] == 3
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(plain.lm_head.weight, finished[1]["lm_head.weight"])


def test_resume_is_exact_from_every_checkpoint(finished: Any, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path)
    for step in (2, 4):
        model = wrapped()
        trainer(model, folder, save_total_limit=None).train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert all(torch.equal(tensor, finished[1][name]) for name, tensor in model.state_dict().items())


def test_resuming_a_finished_run_changes_nothing(finished: Any, tmp_path: Path) -> None:
    model = wrapped()
    # 6 of the 12 steps of an epoch, so the epoch is not what ends the run.
    trainer(model, copy_of(finished, tmp_path)).train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, finished[1][name]) for name, tensor in model.state_dict().items())
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_dense_resume_restores_dropout(tmp_path: Path) -> None:
    def run() -> Any:
        model = tiny("gpt2", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.2)
        return trainer(model, tmp_path, gradient_accumulation_steps=2, save_steps=1, save_total_limit=None)

    whole = run()
    whole.train()
    # 24 blocks, 2 x 2 per step: step 6 ends the epoch.
    for step in (1, 5):
        part = run()
        part.train(resume_from_checkpoint=tmp_path / f"checkpoint-{step}")
        for name, tensor in part.model.state_dict().items():
            assert torch.equal(tensor, whole.model.state_dict()[name]), name


def test_rng_state_round_trip() -> None:
    state = json.loads(json.dumps(rng_state()))
    first = random.random(), np.random.rand(), torch.rand(3).tolist()
    set_rng_state(state)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == first


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "rng_state.json"])
def test_truncated_checkpoint_names_the_file(finished: Any, tmp_path: Path, name: str) -> None:
    folder = copy_of(finished, tmp_path)
    file = folder / "checkpoint-6" / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{name}: has .* bytes"):
        trainer(wrapped(), folder).train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert last_good_checkpoint(folder) == folder / "checkpoint-4"


def test_damaged_content_names_the_file(finished: Any, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path)
    for name in ("model.safetensors", "optimizer.json"):
        file = folder / "checkpoint-6" / name
        whole = file.read_bytes()
        file.write_bytes(b"\xff" * len(whole))
        with pytest.raises(CheckpointError, match=name):
            trainer(wrapped(), folder).train(resume_from_checkpoint=str(folder / "checkpoint-6"))
        file.write_bytes(whole)


def test_foreign_and_missing_checkpoints(finished: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "checkpoint-9")
    run = trainer(wrapped(), tmp_path)
    with pytest.raises(CheckpointError, match=r"ppnet_checkpoint\.json: is missing"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="is not a folder"):
        run.train(resume_from_checkpoint=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"has gates, this model has none: ppnet\.wrap it"):
        trainer(tiny("llama"), tmp_path).train(resume_from_checkpoint=str(finished[0] / "checkpoint-2"))
    other = ppnet.wrap(tiny("llama", intermediate_size=64))
    with pytest.raises(CheckpointError, match=r"has shape \(.*resume with the model"):
        trainer(other, tmp_path).train(resume_from_checkpoint=str(finished[0] / "checkpoint-2"))
    with pytest.raises(CheckpointError, match=r"written by optimizer AdamW, this run uses SGD"):
        trainer(wrapped(), tmp_path, optim="sgd").train(resume_from_checkpoint=str(finished[0] / "checkpoint-2"))
    trainer(tiny("llama"), tmp_path / "weights", save_only_model=True).train()
    with pytest.raises(CheckpointError, match="save_only_model=True"):
        trainer(tiny("llama"), tmp_path / "weights").train(resume_from_checkpoint=True)


def test_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path)
    run.train()
    run.state.global_step = 7
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-7: could not be written .*checkpoint-6; free"):
            run._save_checkpoint(run.model, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert verify_checkpoint(tmp_path / "checkpoint-6")["step"] == 6


def test_rotation_and_leftovers(finished: Any, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path)
    (folder / ".checkpoint-6.abc.tmp").mkdir()
    (folder / "checkpoint-4").rename(folder / ".checkpoint-4.1.old")
    (folder / "checkpoint-5").mkdir()
    assert last_good_checkpoint(folder) == folder / "checkpoint-6"
    remove_leftovers(folder)
    rotate(folder, 2, {folder / "checkpoint-2"})
    # The incomplete checkpoint-5 is not ppnet's to delete, and it does not count.
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]


# ---- killed runs ----------------------------------------------------------------------------------------------------


def killed_run(folder: str, options: dict[str, Any], kill_at: int | None, counter: str) -> None:
    """Trains (or resumes); SIGKILLs itself at an event: a micro-step, or anything done to a file of a checkpoint."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    events = 0

    def happened() -> None:
        nonlocal events
        events += 1
        if events == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and "checkpoint-" in str(args[0]):
            happened()

    class Counted(PuppetTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            happened()
            return super().training_step(*args, **kwargs)

    model = wrapped() if options.pop("wrapped") else tiny("llama")
    run = trainer(model, Path(folder), kind=Counted, max_steps=5, save_steps=1, save_total_limit=1, **options)
    sys.addaudithook(audit)
    run.train(resume_from_checkpoint=last_good_checkpoint(folder) is not None)
    model.save_pretrained(f"{folder}/final")
    Path(counter).write_text(str(events))


@pytest.fixture(scope="module")
def processes() -> Any:
    # A server that has imported everything forks each run, so that imports are paid once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training", "ppnet.train"])
    return context


def start(processes: Any, folder: Path, options: dict[str, Any], kill_at: int | None) -> Any:
    process = processes.Process(target=killed_run, args=(str(folder), dict(options), kill_at, str(folder) + ".events"))
    process.start()
    return process


def finish(processes: Any, folder: Path, options: dict[str, Any], kill_at: int | None = None) -> int:
    process = start(processes, folder, options, kill_at)
    process.join(120)
    return process.exitcode


def final(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


CASES = {
    "gates-accumulated": ({"wrapped": True, "gradient_accumulation_steps": 2}, (29, 62)),
    "gates-bf16": ({"wrapped": True, "bf16": True}, (44,)),
}


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_run_ends_with_the_same_bits(processes: Any, tmp_path: Path, case: str) -> None:
    options, kills = CASES[case]
    assert finish(processes, tmp_path / "whole", options) == 0
    for kill_at in kills:
        assert finish(processes, tmp_path / "killed", options, kill_at) == -signal.SIGKILL
    assert finish(processes, tmp_path / "killed", options) == 0
    assert final(tmp_path / "killed") == final(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"wrapped": True}, {"wrapped": False, "gradient_accumulation_steps": 2}])
def test_a_kill_at_any_event_changes_nothing(processes: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    assert finish(processes, tmp_path / "whole", options) == 0
    events = int((tmp_path / "whole.events").read_text())
    for kill_at in range(1, events + 1):
        folder = tmp_path / str(kill_at)
        assert finish(processes, folder, options, kill_at) == -signal.SIGKILL
        assert finish(processes, folder, options) == 0
        assert final(folder) == final(tmp_path / "whole"), kill_at


@pytest.mark.slow
def test_kills_from_outside_at_random_times_change_nothing(processes: Any, tmp_path: Path) -> None:
    options = {"wrapped": True, "gradient_accumulation_steps": 2}
    assert finish(processes, tmp_path / "whole", options) == 0
    source = random.Random(0)
    for _ in range(15):
        process = start(processes, tmp_path / "killed", options, None)
        process.join(source.uniform(0.2, 3.0))
        process.kill()
        process.join()
    assert finish(processes, tmp_path / "killed", options) == 0
    assert final(tmp_path / "killed") == final(tmp_path / "whole")
