"""Collecting: padding, batches, checkpointing, autocast; models stay as they were; wrapped and accelerated models."""

from __future__ import annotations

import pytest
import torch
from helpers import DECODERS, tiny, token_ids
from scoring import DATA_METHODS, IDS, REWARDED, options_of

import ppnet
from ppnet.errors import CheckpointError, DataError, PPNetError, UnsupportedModelError
from ppnet.families import structure_of
from ppnet.scores import score, score_methods

ALL = {method: (method, options_of(method)) for method in DATA_METHODS}
# Fisher information is drawn, so other batches draw otherwise.
FIXED = {m: o for m, o in ALL.items() if m not in ("kl", "mama", "obs")} | {
    "mama": ("mama", {"weights": {"kl": 0, "obs": 0, "reward": 1}}),
    "obs": ("obs", {"weighting": "output"}),
}
ROWS = [
    {"input_ids": row[:length], "rewards": reward, "groups": group}
    for row, length, reward, group in zip(IDS, (12, 5, 9, 2), REWARDED["rewards"], REWARDED["groups"], strict=True)
]


def close(one, other, rtol=1e-9):
    for method in one:
        for name, units in one[method].items():
            torch.testing.assert_close(
                other[method][name], units, rtol=rtol, atol=rtol * float(units.abs().max()), msg=f"{method} of {name}"
            )


@pytest.mark.parametrize("model_type", DECODERS)
def test_batches_and_padding_do_not_matter(model_type):
    model = tiny(model_type, dtype=torch.float64)
    alone = score_methods(model, ROWS, FIXED, batch_size=1)
    together = score_methods(model, ROWS, FIXED, batch_size=4)
    pairs = score_methods(model, ROWS, FIXED, batch_size=3)
    close(alone, together)
    close(alone, pairs)
    assert alone["taylor"].tokens == together["taylor"].tokens == 11 + 4 + 8 + 1
    # what stands in the padding is of no account
    padded = torch.full((4, 12), 7)
    mask = torch.zeros(4, 12, dtype=torch.int64)
    for i, row in enumerate(ROWS):
        padded[i, : len(row["input_ids"])] = row["input_ids"]
        mask[i, : len(row["input_ids"])] = 1
    extra = {"rewards": REWARDED["rewards"], "groups": REWARDED["groups"]}
    close(alone, score_methods(model, {"input_ids": padded, "attention_mask": mask, **extra}, FIXED))
    labels = padded.masked_fill(mask == 0, -100)
    close(alone, score_methods(model, {"input_ids": padded, "labels": labels, **extra}, FIXED))
    if model_type != "gpt2":  # learned positions are counted from the left edge
        left = {
            "input_ids": torch.stack([r.roll(12 - int(m.sum())) for r, m in zip(padded, mask, strict=True)]),
            "attention_mask": mask.flip(1),
        }
        # rotary angles are float32 whatever the model is
        close(alone, score_methods(model, {**left, **extra}, FIXED), rtol=1e-5)


def test_prompts_without_labels_are_context_only():
    model = tiny("llama", dtype=torch.float64)
    labels = IDS.clone()
    labels[:, :6] = -100
    part = score_methods(model, {"input_ids": IDS, "labels": labels}, {m: (m, {}) for m in ("taylor", "activation")})
    whole = score_methods(model, IDS, {m: (m, {}) for m in ("taylor", "activation")})
    assert part["taylor"].tokens == 4 * 6
    close({"activation": whole["activation"]}, {"activation": part["activation"]})
    assert not torch.allclose(part["taylor"]["layers.1.neuron"], whole["taylor"]["layers.1.neuron"], rtol=1e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_activation_checkpointing(model_type, reentrant):
    model = tiny(model_type, dtype=torch.float64)
    plain = score_methods(model, REWARDED, ALL)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    handle = model.get_submodule(structure_of(model).sites[0].consumer.name).register_forward_hook(
        lambda *_: runs.append(1)
    )
    checkpointed = score_methods(model, REWARDED, ALL)
    handle.remove()
    assert len(runs) >= 2  # it really ran again
    close(plain, checkpointed)
    assert not model.training and not any(module.training for module in model.modules())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_lower_precision(model_type):
    model = tiny(model_type)
    exact = score_methods(model, REWARDED, FIXED)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = score_methods(model, REWARDED, FIXED)
    low = score_methods(model.to(torch.bfloat16), REWARDED, FIXED)
    for method in ("taylor", "activation", "bias", "obs"):
        for name, units in exact[method].items():
            for other in (mixed, low):
                assert torch.corrcoef(torch.stack([units, other[method][name]]))[0, 1] > 0.98


def state_of(model):
    return (
        [(name, p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()],
        [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
    )


def same(one, other):
    for (name, flag, grad), (name_, flag_, grad_) in zip(one[0], other[0], strict=True):
        assert (name, flag) == (name_, flag_)
        assert (grad is None) == (grad_ is None) and (grad is None or torch.equal(grad, grad_))
    assert one[1] == other[1]


def test_the_model_is_left_as_it_was():
    model = tiny("llama").train()
    model.model.layers[1].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    for parameter in parameters[3:6]:
        parameter.grad = torch.ones_like(parameter)
    before = state_of(model)
    score_methods(model, REWARDED, ALL)
    same(before, state_of(model))
    seen = []

    def failing(outputs, batch):
        seen.append([p.requires_grad for p in parameters])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, IDS, "taylor", loss=failing)
    assert seen == [[False] * len(parameters)]
    same(before, state_of(model))
    random = torch.get_rng_state()
    score(model, IDS, "mama")
    score(model, method="random")
    assert torch.equal(random, torch.get_rng_state())


def test_dropout_is_off():
    model = tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    first, second = (score(model, IDS, "taylor") for _ in range(2))
    close({"taylor": first}, {"taylor": second}, rtol=1e-12)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_models_with_gates_and_accelerated_models(model_type):
    plain = score_methods(tiny(model_type), REWARDED, ALL)
    model = ppnet.wrap(tiny(model_type))
    close(plain, score_methods(model, REWARDED, ALL), rtol=2e-4)
    with torch.no_grad():
        for parameter in model.puppet.parameters():
            parameter.add_(0.1)
    model.train()
    with ppnet.resize(model, 0.5):
        resized = model(IDS).logits
        found = score_methods(model, REWARDED, FIXED)
        assert torch.equal(model(IDS).logits, resized)
    assert model.training and [s.name for s in structure_of(tiny(model_type)).sites] == list(found["taylor"])
    fast = ppnet.accelerate(tiny(model_type))
    close(plain, score_methods(fast, REWARDED, ALL), rtol=2e-4)
    scored = score(fast, method="magnitude", form="paths")
    close({"m": score(tiny(model_type), method="magnitude", form="paths")}, {"m": scored}, rtol=1e-5)


def test_several_methods_in_one_pass():
    model = tiny("llama")
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    named = ppnet.score_methods(model, IDS, ["taylor", "activation", "magnitude"], batch_size=2)
    assert list(named) == ["taylor", "activation", "magnitude"] and len(passes) == 2
    for name, scores in named.items():
        assert scores == ppnet.score(model, IDS, name, batch_size=2) and scores.method == name
    labelled = ppnet.score_methods(model, IDS, {"a": "taylor", "b": ("magnitude", {"form": "paths"})}, batch_size=2)
    assert labelled["a"] == named["taylor"] and labelled["b"] == ppnet.score(model, None, "magnitude", form="paths")
    for methods, message in (
        ("mama", r"methods: 'mama' must be a list of names"),
        (3, "methods: 3 must be a list of names"),
        ([], "methods: none given"),
        ({"a": 3}, r"methods: 3 must be a name or \(name, options\)"),
        (["mamba"], "method: 'mamba' is not known"),
    ):
        with pytest.raises(PPNetError, match=message):
            ppnet.score_methods(model, IDS, methods)


def test_one_kind_of_gates_only():
    model = ppnet.wrap(tiny("llama"), ppnet.PuppetConfig(kinds=("neuron",)))
    assert {name.rpartition(".")[2] for name in score(model, IDS, "taylor")} == {"neuron"}


def test_other_losses():
    model = tiny("llama", dtype=torch.float64)

    def nll(outputs, batch):
        log_p = torch.log_softmax(outputs.logits[:, :-1], -1)
        return -log_p.gather(-1, batch["input_ids"][:, 1:, None]).sum((1, 2))

    own, default = score(model, IDS, "taylor", loss=nll), score(model, IDS, "taylor")
    assert own.tokens == default.tokens == 4 * 11
    close({"t": default}, {"t": {name: units * 4 / 44 for name, units in own.items()}})
    base = model.model  # without a head: no logits
    with pytest.raises(PPNetError, match="returns no logits"):
        score(base, IDS, "taylor")
    made = score(base, IDS, "taylor", loss=lambda outputs, batch: outputs.last_hidden_state.square().sum((1, 2)))
    assert all((units > 0).any() for units in made.values())
    assert len(score(base, IDS, "activation")) == 6


@pytest.mark.parametrize(
    ("data", "method", "options", "error", "message"),
    [
        (IDS, "tailor", {}, PPNetError, "method: 'tailor' is not known; use one of activation"),
        (IDS, "taylor", {"sigh": 1}, PPNetError, "sigh: is no option of method 'taylor'; it takes sign"),
        (IDS, "random", {"sign": 1}, PPNetError, "it takes none"),
        (IDS, "taylor", {"sign": "both"}, PPNetError, "sign: 'both' is not known; use one of 'sequence'"),
        (None, "magnitude", {"form": "cube"}, PPNetError, "form: 'cube'"),
        (None, "taylor", {}, PPNetError, "data: None, but taylor need"),
        ([], "taylor", {}, DataError, "data: is empty"),
        ("", "mama", {}, DataError, "empty"),
        (IDS + 90, "taylor", {}, DataError, "outside the model's vocabulary"),
        (IDS, "reward", {}, DataError, "rewards are needed, but not in it"),
        ({**REWARDED, "rewards": [1.0, 1.0, 0.5, 0.5]}, "reward", {}, DataError, "no group of completions is verified"),
        (REWARDED, "reward", {"threshold": 2.0}, DataError, r"threshold \(2.0\)"),
        ({**REWARDED, "rewards": [1.0, float("nan"), 0, 0]}, "reward", {}, DataError, "rewards hold NaN"),
        (IDS, "mama", {"weights": {"sfd": 1}}, PPNetError, r"weights: \['sfd'\] are no indicators"),
        (IDS, "mama", {"weights": {"sft": -1}}, PPNetError, "weights: sft: must be a finite number >= 0, got -1"),
        (IDS, "mama", {"weights": {"kl": "high"}}, PPNetError, "weights: kl: must be a finite number"),
        (IDS, "mama", {"weights": {"kl": float("inf")}}, PPNetError, "weights: kl: must be a finite number"),
        (IDS, "mama", {"weights": "kl"}, PPNetError, "weights: must map indicators"),
        (IDS, "mama", {"sft": "no.safetensors"}, CheckpointError, "sft: cannot read no.safetensors"),
        (IDS, "mama", {"sft": torch.ones(3)}, PPNetError, "sft: a Tensor; give ppnet.Scores"),
        (IDS, "mama", {"kl": ppnet.Scores({}, method="kl", model_type="gpt2")}, PPNetError, "kl: .* model_type 'gpt2'"),
        (IDS, ["taylor"], {}, PPNetError, r"method: \['taylor'\] is not known"),
        (IDS, "taylor", {"length": "8"}, DataError, "length: must be an integer"),
        (IDS, "taylor", {"batch_size": 2.5}, DataError, "batch_size: must be an integer"),
        (IDS, "taylor", {"max_tokens": 1e2}, DataError, "max_tokens: must be an integer"),
        (IDS, "random", {"seed": "x"}, PPNetError, "seed: must be an integer"),
        (REWARDED, "reward", {"threshold": "a"}, PPNetError, "threshold: must be a finite number"),
        ({**REWARDED, "groups": ["a", "a", "b", "b"]}, "reward", {}, DataError, "groups must be one number"),
        (REWARDED, "reward", {"kappa": "a"}, PPNetError, r"kappa: must be a finite number in \[0, 1\], got 'a'"),
        (REWARDED, "reward", {"kappa": 1.5, "form": "split"}, PPNetError, r"kappa: .* got 1\.5"),
        (None, "magnitude", {"kappa": "a"}, PPNetError, "kappa: must be a finite number"),
        (b"abc", "taylor", {}, DataError, "data: b'abc' are bytes"),
        ([{"story": "a"}], "taylor", {}, DataError, r"column: 'text' .*\['story'\].*column=\.\.\."),
        (IDS, "mama", {"form": "sum"}, PPNetError, "form: 'sum'"),
        (IDS, "mama", {"sft": {"layers.0.neuron": torch.ones(3)}}, PPNetError, "sft: site 'layers.0.kv_group' needs 4"),
        (IDS, "kl", {"loss": lambda o, b: o}, PPNetError, "loss: fisher information"),
        (IDS, "taylor", {"loss": lambda o, b: torch.zeros(())}, PPNetError, r"tensor of shape \(4,\)"),
    ],
)
def test_errors(data, method, options, error, message):
    model = tiny("llama")
    before = state_of(model)
    with pytest.raises(error, match=message):
        score(model, data, method, **options)
    same(before, state_of(model))


def test_models_that_cannot_be_scored():
    model = tiny("llama")
    with pytest.raises(UnsupportedModelError, match="already compacted"):
        score(ppnet.compact(model, 0.6, scores="magnitude", allocation="global"), IDS, "taylor")
    with pytest.raises(UnsupportedModelError, match="no config"):
        score(torch.nn.Linear(2, 2), IDS, "taylor")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite"):
        score(model, IDS, "taylor")
    with pytest.raises(PPNetError, match="are NaN or infinite for 1 of 44"):
        score(model, method="magnitude")


def test_groups_count_once_they_are_complete():
    model = tiny("llama", dtype=torch.float64)
    rows = [{"input_ids": row, "rewards": r, "groups": g} for row, r, g in zip(token_ids(6, 9), (1, 0, 0, 3, 2, 2),
            (5, 9, 5, 9, 7, 7), strict=True)]  # fmt: skip
    alone = [score([model][0], [r for r in rows if r["groups"] == g], "reward") for g in (5, 9)]
    both = score(model, rows, "reward", batch_size=2)
    high = score(model, rows, "reward", threshold=3.0)
    for name in both:
        torch.testing.assert_close(both[name], (alone[0][name] + alone[1][name]) / 2, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(high[name], alone[1][name], rtol=1e-9, atol=1e-15)
