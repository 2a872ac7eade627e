"""Training: objective, stopping, checkpoints, and runs killed with SIGKILL that end with the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.utils import logging

import ppnet
from ppnet.errors import CheckpointError, PPNetError, TrainingError
from ppnet.train import (
    PuppetCallback,
    PuppetTrainer,
    PuppetTrainerMixin,
    TextBlocks,
    default_arguments,
    distillation_loss,
    last_good_checkpoint,
    param_groups,
    verify_checkpoint,
)
from ppnet.train.checkpointing import remove_leftovers, rng_state, rotate, set_rng_state

logging.disable_progress_bar()
LENGTH = 12
MARKER = 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Models this small are faster on one thread, above all where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blocks(count: int = 24, marked: int | None = None) -> TextBlocks:
    ids = torch.randint(3, 96, (count, LENGTH), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    if marked is not None:
        ids[marked, 3] = MARKER
    return TextBlocks(ids.reshape(-1), LENGTH)


def wrapped(**options: Any) -> Any:
    return ppnet.wrap(tiny("llama"), ppnet.PuppetConfig(**{"lambda_warmup": 3, **options}))


def arguments(folder: Path, **overrides: Any) -> Any:
    values = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 2, "use_cpu": True}
    return default_arguments(folder, **{**values, "disable_tqdm": True, **overrides})


def trainer(model: Any, folder: Path, data: Any = None, kind: Any = PuppetTrainer, **overrides: Any) -> Any:
    callbacks = overrides.pop("callbacks", None)
    return kind(model, arguments(folder, **overrides), train_dataset=data or blocks(), callbacks=callbacks)


class GradientSpy(TrainerCallback):
    """Keeps the gradients of the first optimizer step. Callbacks run in order, so it comes after PuppetCallback."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.grads:
            self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_gradients(model: Any, folder: Path, kind: Any = PuppetTrainer, **overrides: Any) -> dict[str, Tensor]:
    spy = GradientSpy()
    callbacks = [*overrides.pop("callbacks", []), spy]
    data = overrides.pop("data", None)
    options = {"max_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0, **overrides}
    trainer(model, folder, data, kind, callbacks=callbacks, **options).train()
    return spy.grads


def same_draw_every_time(model: Any) -> None:
    draw = model.puppet.draw

    def repeat() -> Any:
        model.puppet._draw_count = 1
        return draw()

    model.puppet.draw = repeat


# ---- objective ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_loss_is_the_closed_form(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11).double().requires_grad_(), torch.randn(2, 5, 11).double()
    targets = torch.randint(0, 11, (2, 5))
    targets[0, 2:4] = -100
    p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
    expected = temperature**2 * ((p * (p.log() - q.log())).sum(-1) * (targets != -100)).sum()
    total, count = distillation_loss(student, teacher, targets, temperature)
    assert count == 8
    torch.testing.assert_close(total, expected)
    (got,) = torch.autograd.grad(3 * total, student)
    (want,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(got, want)


def test_distillation_loss_rejects_wrong_shapes() -> None:
    with pytest.raises(PPNetError, match=r"student \(1, 2, 3\), teacher \(1, 2, 4\)"):
        distillation_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long))


def test_objective_is_nll_distillation_and_penalty(tmp_path: Path) -> None:
    model = wrapped(dense_fraction=0.0, distill=0.25, distill_temperature=2.0, lambda_warmup=0)
    run = trainer(model, tmp_path)
    ids = torch.stack([blocks()[i]["input_ids"] for i in range(2)])
    labels = ids.clone()
    labels[1, 5:] = -100
    model.train()
    loss = run.compute_loss(model, {"input_ids": ids, "labels": labels}, num_items_in_batch=torch.tensor(30))
    penalty = model.puppet.penalty()
    model.puppet._draw_count = 0
    gated = model(input_ids=ids).logits.double()[:, :-1]
    dense = model.eval()(input_ids=ids).logits.double()[:, :-1]
    valid = labels[:, 1:] != -100
    nll = nn.functional.cross_entropy(gated[valid], labels[:, 1:][valid], reduction="sum") / 30
    p, q = torch.softmax(dense / 2, -1), torch.softmax(gated / 2, -1)
    kl = 4 * (p * (p / q).log()).sum(-1)[valid].sum() / 30
    assert model.puppet.last_lambda > 0
    torch.testing.assert_close(loss.double(), 0.75 * nll + 0.25 * kl + penalty.double(), rtol=1e-5, atol=1e-6)


def test_penalty_gradient_reaches_the_gates(tmp_path: Path) -> None:
    model = wrapped(dense_fraction=0.0, distill=0.0, penalty=50.0)
    grads = first_gradients(model, tmp_path)
    model.puppet.clear()
    model.puppet._lambdas.append(model.puppet.last_lambda)
    # The first step changed the gates a little, so the direction is compared, not the bits.
    model.zero_grad()
    model.puppet.penalty().backward()
    theta = model.puppet.theta.grad.flatten(), grads["puppet.theta"].flatten()
    assert nn.functional.cosine_similarity(*theta, dim=0) > 0.95


def test_accumulated_micro_batches_equal_one_batch(tmp_path: Path) -> None:
    grads = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = wrapped(dense_fraction=0.0, distill=0.5, gate_gradient="exact")
        same_draw_every_time(model)
        data = blocks()
        # Unequal numbers of labels per micro-batch: a mean of means would differ.
        data.lengths = torch.tensor([LENGTH, 4, 7] * 8)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        grads.append(first_gradients(model, tmp_path, data=data, **options))
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_callback_gives_the_mixins_gradient(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    config = {"dense_fraction": 0.0, "distill": 0.0, "hierarchy": "pooled"}
    mixin = first_gradients(wrapped(**config), tmp_path, **options)
    callback = first_gradients(wrapped(**config), tmp_path, kind=Trainer, callbacks=[PuppetCallback()], **options)
    assert callback.keys() == mixin.keys()
    for name, grad in mixin.items():
        torch.testing.assert_close(callback[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_mixin_and_callback_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="count twice"):
        trainer(wrapped(), tmp_path, callbacks=[PuppetCallback()]).train()
    with pytest.raises(TrainingError, match=r"no gates; call ppnet\.wrap"):
        trainer(tiny("llama"), tmp_path, kind=Trainer, callbacks=[PuppetCallback()]).train()


def test_mixin_goes_before_any_trainer(tmp_path: Path) -> None:
    class Positional(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
        ) -> Any:
            return model(input_ids=inputs["input_ids"]).logits.square().mean() * 0.01

    mixed = type("Mixed", (PuppetTrainerMixin, Positional), {})
    run = trainer(wrapped(distill=0.0), tmp_path, kind=mixed, max_steps=2)
    run.train()
    assert {"penalty", "nll", "lambda"} <= set(run.state.log_history[0])
    run = trainer(wrapped(distill=0.5, dense_fraction=0.0), tmp_path, kind=mixed, max_steps=2)
    with pytest.raises(TrainingError, match=r"distill: 0\.5 needs logits"):
        run.train()


def test_evaluation_is_dense(tmp_path: Path) -> None:
    model = wrapped()
    run = PuppetTrainer(model, arguments(tmp_path, per_device_eval_batch_size=4), eval_dataset=blocks(4))
    loss = run.evaluate()["eval_loss"]
    plain = tiny("llama")
    ids = torch.stack([blocks(4)[i]["input_ids"] for i in range(4)])
    assert loss == pytest.approx(plain(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    assert int(model.puppet.draws) == 0


def test_activation_checkpointing_gives_the_same_gradient(tmp_path: Path) -> None:
    plain = first_gradients(wrapped(dense_fraction=0.0), tmp_path)
    checkpointed = first_gradients(wrapped(dense_fraction=0.0), tmp_path, activation_checkpointing=True)
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-4, atol=1e-6, msg=name)


# ---- optimizer ------------------------------------------------------------------------------------------------------


def test_parameter_groups() -> None:
    model = wrapped()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["name"]: g for g in param_groups(model, 1e-3, weight_decay=0.2)}
    members = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert groups["weights"]["weight_decay"] == 0.2
    assert groups["no_decay"]["weight_decay"] == groups["gates"]["weight_decay"] == 0.0
    assert groups["gates"]["lr"] == pytest.approx(1e-2)
    assert members["gates"] == {n for n in names.values() if n.startswith("puppet.")}
    assert "model.embed_tokens.weight" in members["no_decay"] and "model.norm.weight" in members["no_decay"]
    assert {n for n in names.values() if n.endswith("bias")} <= members["no_decay"]
    assert "model.layers.0.mlp.up_proj.weight" in members["weights"]
    assert sum(map(len, members.values())) == len(names)
    assert param_groups(model, 1e-3, gate_lr=0.5)[-1]["lr"] == 0.5
    paper = ppnet.wrap(tiny("llama"), ppnet.PuppetConfig(preset="paper"))
    assert param_groups(paper, 1e-3)[-1]["lr"] == 1e-3 and param_groups(paper, 1e-3)[-1]["weight_decay"] == 0.1
    assert [g["name"] for g in param_groups(tiny("llama"), 1e-3)] == ["weights", "no_decay"]
    with pytest.raises(PPNetError, match="lr: -1"):
        param_groups(model, -1)
    with pytest.raises(PPNetError, match="no trainable parameter"):
        param_groups(tiny("llama").requires_grad_(False), 1e-3)


def test_fused_updates_are_seen_by_cached_importance(tmp_path: Path) -> None:
    model = wrapped(dense_fraction=0.0)
    trainer(model, tmp_path, save_strategy="no", optim="adamw_torch_fused", learning_rate=1e-2).train()
    cached = model.puppet.importance(0.5)
    fresh = wrapped()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(cached, fresh.puppet.importance(0.5))


# ---- stopping -------------------------------------------------------------------------------------------------------


def poison(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    return output * float("nan") if (args[0] == MARKER).any() else None


def test_nan_loss_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    model = wrapped()
    model.model.embed_tokens.register_forward_hook(poison)
    run = trainer(model, tmp_path, blocks(marked=9), train_sampling_strategy="sequential")
    with pytest.raises(TrainingError) as caught:
        run.train()
    message = str(caught.value)
    for part in ("stopped at step 5", "loss is nan", "learning rate", "lambda", str(tmp_path / "checkpoint-4")):
        assert part in message
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert last_good_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_infinite_gradient_stops(tmp_path: Path) -> None:
    model = tiny("llama")
    before = model.lm_head.weight.detach().clone()
    model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(TrainingError, match=r"step 1: the gradient norm is (nan|inf).*checkpoint: None"):
        trainer(model, tmp_path).train()
    assert torch.equal(model.lm_head.weight, before)


def test_callback_stops_on_nan(tmp_path: Path) -> None:
    model = wrapped()
    model.model.embed_tokens.register_forward_hook(poison)
    run = trainer(model, tmp_path, blocks(marked=0), Trainer, callbacks=[PuppetCallback()], max_steps=12)
    with pytest.raises(TrainingError, match="gradient norm is nan"):
        run.train()


def test_non_finite_weights_are_never_saved(tmp_path: Path) -> None:
    run = trainer(tiny("llama"), tmp_path)
    run.train()
    with torch.no_grad():
        run.model.lm_head.weight[0, 0] = float("inf")
    run.state.global_step = 7
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: holds NaN or infinite"):
        run._save_checkpoint(run.model, None)
    assert not (tmp_path / "checkpoint-7").exists()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A finished run with checkpoints at steps 2, 4, 6, and its final weights."""
    folder = tmp_path_factory.mktemp("run")
    model = wrapped()
    trainer(model, folder, save_total_limit=None).train()
    return folder, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def copy_of(finished: tuple[Path, Any], folder: Path) -> Path:
    import shutil

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
    import random

    import numpy as np

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
    context.set_forkserver_preload(["test_trainer", "ppnet.train", "ppnet"])
    return context


def start(processes: Any, folder: Path, options: dict[str, Any], kill_at: int | None) -> Any:
    arguments = (str(folder), dict(options), kill_at, str(folder) + ".events")
    process = processes.Process(target=killed_run, args=arguments)
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
    import random

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
