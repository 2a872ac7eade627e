"""Movement through training against sums by hand: accumulation, clipping, rates, adapters, several processes."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.multiprocessing as mp
from helpers import tiny, token_ids
from scoring import autograd_gates
from transformers import Trainer, TrainerCallback, default_data_collator

import ppnet
from ppnet.errors import PPNetError, TrainingError, UnsupportedModelError
from ppnet.families import structure_of
from ppnet.train import MovementCallback, default_arguments

ROWS = token_ids(8, 10)
DATA = [{"input_ids": row, "labels": row} for row in ROWS]


class Watch(TrainerCallback):
    """The weights before every optimizer step, and its learning rate."""

    def __init__(self):
        self.models, self.rates = [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.models.append(copy.deepcopy(model))
        for module in self.models[-1].modules():
            module._forward_pre_hooks.clear()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def run(folder, model, **changes):
    batches = []

    def collate(rows):
        batches.append(torch.stack([row["input_ids"] for row in rows]))
        return default_data_collator(rows)

    watch, movement = Watch(), MovementCallback()
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 1e-3,
    }
    arguments = default_arguments(folder, use_cpu=True, save_strategy="no", **{**options, **changes})
    Trainer(model=model, args=arguments, train_dataset=DATA, data_collator=collate, callbacks=[watch, movement]).train()
    return movement, watch, batches


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_movement_by_hand(tmp_path, checkpointing):
    model = tiny("llama", dtype=torch.float64)
    movement, watch, batches = run(tmp_path, model, activation_checkpointing=checkpointing)
    assert len(watch.models) == 2 and len(batches) >= 4 and watch.rates[0] != watch.rates[1]
    absolute, signed = movement.scores(), movement.scores("signed")
    expected = {name: [0.0, 0.0] for name in absolute}
    for step, (weights, rate) in enumerate(zip(watch.models, watch.rates, strict=True)):
        for batch in batches[2 * step : 2 * step + 2]:
            # the loss of a step is the mean over the predicted tokens of its four sequences
            for name, gates in autograd_gates(weights.eval(), batch).items():
                expected[name][0] = expected[name][0] + gates.abs().sum(0) / (4 * 9)
                expected[name][1] = expected[name][1] - rate * gates.sum(0) / (4 * 9)
    for name, (size, moved) in expected.items():
        torch.testing.assert_close(absolute[name], size, rtol=1e-6, atol=1e-12)
        # the Trainer takes log-probabilities in float32
        torch.testing.assert_close(signed[name], moved, rtol=1e-5, atol=1e-5 * float(moved.abs().max()))
    assert absolute.method == "movement" and absolute.tokens == 8 * 9 and absolute.options == {"form": "absolute"}
    assert all(not module._forward_pre_hooks for module in model.modules())
    made = ppnet.plan(model, 0.6, scores=absolute)
    assert made.source == "movement"
    mama = ppnet.score(model, ROWS, "mama", sft=absolute, weights={"kl": 0})
    assert mama["layers.0.neuron"].argmax() == ppnet.score(model, ROWS, "mama", sft=dict(absolute), weights={"kl": 0})[
        "layers.0.neuron"].argmax()  # fmt: skip


def test_signed_movement_is_the_growth_of_the_weights(tmp_path):
    """Plain gradient descent moves 1/2 ||W_out[:, u]||^2 by the signed movement, to first order in the rate."""
    model = tiny("qwen2", dtype=torch.float64)
    before = copy.deepcopy(model)
    movement, _, _ = run(
        tmp_path, model, optim="sgd", learning_rate=1e-5, weight_decay=0.0, max_grad_norm=0.0, max_steps=3,
        lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    signed = movement.scores("signed")
    for site in structure_of(model).sites:
        norms = [m.get_submodule(site.consumer.name).weight.detach()[:, site.consumer.index].square().sum((0, 2)) / 2
                 for m in (before, model)]  # fmt: skip
        torch.testing.assert_close(norms[1] - norms[0], signed[site.name], rtol=2e-3, atol=1e-9)


def test_training_is_not_changed(tmp_path):
    models = []
    for callbacks in ([], [MovementCallback()]):
        model = tiny("gpt2")
        arguments = default_arguments(tmp_path, use_cpu=True, save_strategy="no", max_steps=3, learning_rate=1e-2)
        Trainer(model=model, args=arguments, train_dataset=DATA, data_collator=default_data_collator,
                callbacks=callbacks).train()  # fmt: skip
        models.append(model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    plain = tiny("llama", dtype=torch.float64)
    gates = autograd_gates(plain, ROWS)
    adapted = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(target_modules=["down_proj", "o_proj", "up_proj"], r=2)
    )
    movement, _, _ = run(tmp_path, adapted, max_steps=1, gradient_accumulation_steps=4)
    # adapters start as nothing: the first step's movement is the plain model's
    for name, units in movement.scores().items():
        torch.testing.assert_close(units, gates[name].abs().sum(0) / (8 * 9), rtol=1e-6, atol=1e-12)


def test_it_refuses_what_it_cannot_do(tmp_path):
    movement = MovementCallback()
    with pytest.raises(TrainingError, match="no training step has run"):
        movement.scores()
    with pytest.raises(UnsupportedModelError, match="carries gates"):
        run(tmp_path, ppnet.wrap(tiny("llama")))
    arguments = default_arguments(tmp_path, use_cpu=True)
    arguments.fp16 = True
    with pytest.raises(TrainingError, match="fp16: True"):
        movement.on_train_begin(arguments, None, None, model=tiny("llama"))
    movement, _, _ = run(tmp_path, tiny("llama"), max_steps=1)
    with pytest.raises(PPNetError, match="form: 'both'"):
        movement.scores("both")


def test_tokens_are_predicted_ones_and_scores_are_copies(tmp_path):
    rows = [{"input_ids": row, "labels": row.masked_fill(torch.arange(10) < 4, -100)} for row in ROWS]
    movement = MovementCallback()
    arguments = default_arguments(tmp_path, use_cpu=True, save_strategy="no", max_steps=2,
                                  per_device_train_batch_size=2)  # fmt: skip
    Trainer(model=tiny("gpt2"), args=arguments, train_dataset=rows, data_collator=default_data_collator,
            callbacks=[movement]).train()  # fmt: skip
    scores = movement.scores()
    assert scores.tokens == 2 * 2 * 6
    kept = {name: units.clone() for name, units in scores.items()}
    for total in movement._absolute:
        total.add_(1)
    assert all(torch.equal(units, kept[name]) for name, units in scores.items())


class Interrupt(TrainerCallback):
    """Ends the training within its second step, as Ctrl-C does."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt


def interrupted(folder, model):
    movement = MovementCallback()
    arguments = default_arguments(folder, use_cpu=True, save_strategy="no", max_steps=3)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=DATA, data_collator=default_data_collator,
        callbacks=[Interrupt(), movement],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return movement, trainer


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]


def test_an_interrupted_training_leaves_nothing_that_acts(tmp_path):
    model = tiny("llama")
    movement, _trainer = interrupted(tmp_path, model)
    seen = movement.tokens
    sums = {name: units.clone() for name, units in movement.scores().items()}
    clean = copy.deepcopy(model)
    assert all(getattr(hook, "probe", None) is None for hook in hooks(clean))
    scores = ppnet.score(model, ROWS, "taylor")
    assert all(torch.equal(units, ppnet.score(clean, ROWS, "taylor")[name]) for name, units in scores.items())
    small = ppnet.compact(model, 0.6, scores="magnitude")
    assert not hooks(small)
    small(input_ids=ROWS, labels=ROWS).loss.backward()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    loaded(input_ids=ROWS, labels=ROWS).loss.backward()
    assert movement.tokens == seen
    assert all(torch.equal(units, sums[name]) for name, units in movement.scores().items())
    # the next training removes the hooks of the one before, but not those of its own other callbacks
    both = [MovementCallback(), MovementCallback()]
    arguments = default_arguments(tmp_path, use_cpu=True, save_strategy="no", max_steps=1)
    Trainer(
        model=model, args=arguments, train_dataset=DATA, data_collator=default_data_collator, callbacks=both
    ).train()
    assert both[0].tokens == both[1].tokens > 0 and movement.tokens == seen and not hooks(model)
    other = tiny("llama")
    movement, _trainer = interrupted(tmp_path, other)
    movement.close()
    assert not hooks(other) and movement.tokens == seen


def _process(rank, folder, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE="2", OMP_NUM_THREADS="1")  # fmt: skip
    torch.set_num_threads(1)
    movement, _, _ = run(folder, tiny("llama", dtype=torch.float64), max_steps=1, gradient_accumulation_steps=1)
    if rank == 0:
        movement.scores().save(os.path.join(folder, "scores.safetensors"))


@pytest.mark.slow
def test_two_processes_average(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_process, args=(str(tmp_path), port), nprocs=2, start_method="spawn")
    together = ppnet.Scores.load(tmp_path / "scores.safetensors")
    alone, _, _ = run(
        tmp_path, tiny("llama", dtype=torch.float64), max_steps=1, gradient_accumulation_steps=1,
        per_device_train_batch_size=4,
    )  # fmt: skip
    # the same four sequences, whose loss is the mean over all of them either way
    for name, units in alone.scores().items():
        torch.testing.assert_close(together[name], units, rtol=1e-6, atol=1e-12)
    assert together.tokens == 36
