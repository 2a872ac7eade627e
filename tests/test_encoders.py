"""Encoders made smaller: other heads, redistribution behind post-norms, healing without logits, gates."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from encoders import ROWS, bare, hidden
from helpers import tiny, token_ids
from plans import plan_of, random_plan, relative
from torch import nn
from transformers import (
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

import ppnet
from ppnet.calibration import calibration_batches
from ppnet.compact import compact
from ppnet.errors import TrainingError, UnsupportedModelError
from ppnet.families import is_decoder, predicts_tokens, structure_of
from ppnet.train.healing import LastLog
from ppnet.units import leaf_module

# ---- compaction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooler", [True, False])
def test_padded_sentences_of_a_compacted_model(pooler):
    model = bare()
    if not pooler:
        model.pooler = None
    small = compact(model, random_plan(model))
    (batch,) = calibration_batches(model, ROWS)
    together = hidden(small, **batch)
    for row, ids in enumerate(ROWS):
        assert relative(hidden(small, input_ids=ids[None])[0], together[row, : len(ids)]) < 1e-5
    heads = [layer.attention.self.num_attention_heads for layer in small.encoder.layer]
    assert heads == [len(small.ppnet_plan.kept[f"layers.{layer}.kv_group"]) for layer in range(3)]
    assert [layer.attention.self.all_head_size for layer in small.encoder.layer] == [8 * count for count in heads]


RELOAD = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
for folder in sorted(Path(sys.argv[1]).iterdir()):
    auto = (folder / "auto").read_text()
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
    data = load_file(folder / "data" / "data.safetensors")
    with torch.no_grad():
        found = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"])[0]
    assert torch.allclose(found, data["expected"], atol=1e-6), folder.name
    print(folder.name)
assert not [name for name in sys.modules if name.split(".")[0] == "ppnet"]
"""
HEADS = {
    "AutoModelForSequenceClassification": BertForSequenceClassification,
    "AutoModelForTokenClassification": BertForTokenClassification,
    "AutoModelForQuestionAnswering": BertForQuestionAnswering,
}


def test_bare_models_and_other_heads_reload_with_and_without_ppnet(tmp_path):
    from safetensors.torch import save_file

    config = tiny("bert").config
    no_pooler = bare()
    no_pooler.pooler = None
    made = {"AutoModel": [bare(), no_pooler], **{auto: [stock(config).eval()] for auto, stock in HEADS.items()}}
    (batch,) = calibration_batches(no_pooler, ROWS)
    folders = tmp_path / "folders"
    for auto, dense in made.items():
        for number, model in enumerate(dense):
            assert not predicts_tokens(model)
            small = compact(model, random_plan(model))
            folder = folders / f"{auto}-{number}"
            small.save_pretrained(folder)
            (folder / "data").mkdir()
            with torch.no_grad():
                expected = small(**batch)[0].contiguous()
            save_file({**batch, "expected": expected}, folder / "data" / "data.safetensors")
            (folder / "auto").write_text(auto)
            again = ppnet.load(folder)
            assert type(again) is type(small) and again.state_dict().keys() == small.state_dict().keys()
            with torch.no_grad():
                assert torch.equal(again(**batch)[0], expected)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", RELOAD, str(folders)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert len(run.stdout.split()) == 5


def test_neurons_alone_give_the_stock_class_whatever_the_head():
    model = BertForNextSentencePrediction(tiny("bert").config).eval()
    neurons = plan_of(model, lambda site: range(site.units if site.kind == "kv_group" else 9))
    small = compact(model, neurons)
    assert type(small) is BertForNextSentencePrediction and small.config.intermediate_size == 9
    with pytest.raises(UnsupportedModelError, match=r"BertForNextSentencePrediction .* BertForMaskedLM, .* BertModel"):
        compact(model, random_plan(model))


def test_decoders_of_the_family_and_what_only_decoders_do():
    with pytest.raises(UnsupportedModelError, match="is_decoder=True"):
        structure_of(bare(is_decoder=True))
    model = tiny("bert")
    assert not is_decoder(model) and not is_decoder(compact(model, random_plan(model))) and is_decoder(tiny("llama"))
    for call in (
        lambda: ppnet.accelerate(model),
        lambda: ppnet.evaluate.perplexity(model, None, [[3, 4, 5]]),
        lambda: ppnet.evaluate.speed(model, prompt_tokens=4, new_tokens=2),
        lambda: ppnet.plan(model, 0.9, metric="latency", scores="magnitude"),
    ):
        with pytest.raises(UnsupportedModelError, match=r"BertForMaskedLM is an encoder, which has no"):
            call()


# ---- redistribution --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
def test_heads_that_are_combinations_of_others_cost_nothing(sequential):
    """Heads with the same queries and keys are linear in their values; duplicated neurons are in the family tests."""
    model = bare()
    with torch.no_grad():
        for site in structure_of(model).sites:
            if site.kind != "kv_group":
                continue
            for role in ("q", "k"):
                leaf = site.leaf(role)
                module = leaf_module(model, leaf)
                for unit in (1, 2, 3):
                    module.weight[leaf.index[unit]] = module.weight[leaf.index[0]]
                    module.bias[leaf.index[unit]] = module.bias[leaf.index[0]]
            leaf = site.leaf("v")
            for tensor in (leaf_module(model, leaf).weight, leaf_module(model, leaf).bias):
                tensor[leaf.index[3]] = 0.5 * tensor[leaf.index[0]] - 2 * tensor[leaf.index[1]]
    plan = plan_of(model, lambda site: range(3 if site.kind == "kv_group" else site.units))
    data = list(token_ids(batch=40, length=17))
    (batch,) = calibration_batches(model, ROWS)
    expected = hidden(model, **batch)[batch["attention_mask"].bool()]
    without = hidden(compact(model, plan), **batch)[batch["attention_mask"].bool()]
    small = compact(model, plan, redistribute=data, ridge=1e-7, sequential=sequential)
    found = hidden(small, **batch)[batch["attention_mask"].bool()]
    assert relative(expected, without) > 0.05
    assert relative(expected, found) < 1e-3


def test_padding_is_not_redistributed():
    model = bare()
    plan = random_plan(model)
    ids = token_ids(batch=12, length=16)
    padded = {
        "input_ids": nn.functional.pad(ids, (0, 5), value=7),
        "attention_mask": nn.functional.pad(torch.ones_like(ids), (0, 5)),
    }
    short = [ids[0][:3], *ids[1:]]  # padding within a batch
    one, other, third = (compact(model, plan, redistribute=data) for data in ({"input_ids": ids}, padded, short))
    assert other.ppnet_plan.extra["redistribution"]["tokens"] == 192
    assert third.ppnet_plan.extra["redistribution"]["tokens"] == 192 - 13
    for name, value in one.state_dict().items():
        assert relative(value, other.state_dict()[name]) < 1e-3, name


# ---- healing ---------------------------------------------------------------------------------------------------------


def test_a_model_without_logits_heals_by_hidden_states():
    model = bare()
    small = compact(model, random_plan(model))
    with pytest.raises(TrainingError, match=r"^hidden: 0, .*no logits of tokens to learn; set hidden=1"):
        ppnet.heal(copy.deepcopy(small), model, ROWS, steps=1)
    (batch,) = calibration_batches(model, ROWS)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        own, theirs = (m(**batch, output_hidden_states=True).hidden_states for m in (small, model))
    ratios = [
        ((a - b).square().sum(-1) / b.square().sum(-1))[real].mean() for a, b in zip(own[1:], theirs[1:], strict=True)
    ]
    log = LastLog()
    healed = ppnet.heal(copy.deepcopy(small), model, ROWS, steps=1, batch_size=4, hidden=1.0, callbacks=[log])
    # All real tokens count, and no padding.
    assert float(log.values["hidden_loss"]) == pytest.approx(float(torch.stack(ratios).mean()), rel=1e-3)
    assert "nll" not in log.values and "distillation_kl" not in log.values
    healed = ppnet.heal(copy.deepcopy(small), model, ROWS, steps=40, batch_size=4, hidden=1.0, hidden_layers=(-1,))
    expected = hidden(model, **batch)[real]
    assert relative(expected, hidden(healed, **batch)[real]) < 0.7 * relative(expected, hidden(small, **batch)[real])


def test_adapters_heal_encoders():
    pytest.importorskip("peft")
    model = bare()
    small = compact(model, random_plan(model))
    before = {name: value.clone() for name, value in small.state_dict().items()}
    healed = ppnet.heal(small, model, ROWS, steps=3, hidden=1.0, lora=2)
    assert healed is small and healed.state_dict().keys() == before.keys()
    name = small.encoder.layer[0].output.dense
    assert not torch.equal(name.weight, before["encoder.layer.0.output.dense.weight"])


def test_masked_language_models_heal_with_and_without_labels():
    model = tiny("bert")
    small = compact(model, random_plan(model))
    with pytest.raises(TrainingError, match=r"^weight: 0.9 leaves a share to the NLL .* set weight=1"):
        ppnet.heal(copy.deepcopy(small), model, ROWS, steps=1)
    log = LastLog()
    ppnet.heal(copy.deepcopy(small), model, ROWS, steps=2, weight=1.0, callbacks=[log])
    assert "distillation_kl" in log.values and "nll" not in log.values
    ids = token_ids(batch=2, length=9)
    labels = torch.full_like(ids, -100)
    labels[:, ::3] = ids[:, ::3]
    batch = {"input_ids": ids.masked_fill(labels != -100, 95), "labels": labels}
    with torch.no_grad():
        logits = small(input_ids=batch["input_ids"]).logits
    # An encoder's labels stand where they count: none is shifted.
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    ppnet.heal(small, model, batch, steps=1, batch_size=2, callbacks=[log])
    assert float(log.values["nll"]) == pytest.approx(float(expected), rel=1e-3)
    with pytest.raises(TrainingError, match="teacher: a BertModel has no logits of tokens"):
        ppnet.heal(small, model.bert, ROWS, steps=1, weight=1.0)


# ---- gates -----------------------------------------------------------------------------------------------------------


def test_gates_on_an_encoder_come_off_again():
    model = bare()
    (batch,) = calibration_batches(model, ROWS)
    dense = hidden(model, **batch)
    ppnet.wrap(model)
    twin = copy.deepcopy(model)
    assert torch.equal(hidden(twin, **batch), dense)
    with ppnet.resize(model, 0.5):
        assert model.encoder.layer[0].attention.self.num_attention_heads < 4
        small = compact(model, 0.5)
        real = batch["attention_mask"].bool()
        assert relative(hidden(model, **batch)[real], hidden(small, **batch)[real]) < 1e-5
    ppnet.unwrap(model)
    assert torch.equal(hidden(model, **batch), dense)
    assert model.encoder.layer[0].attention.self.num_attention_heads == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_gates_train_with_the_labels_of_an_encoder(tmp_path):
    """The dense pass teaches the positions whose labels count, which are not shifted."""
    from ppnet.train import PuppetTrainer, default_arguments
    from ppnet.train.trainer import aligned_targets

    labels = torch.tensor([[5, -100, 7]])
    assert torch.equal(aligned_targets({"labels": labels}, shifted=False), labels)
    model = ppnet.wrap(tiny("bert"), ppnet.PuppetConfig(distill=0.5, dense_fraction=0.0))
    rows = [{"input_ids": ids, "labels": ids.masked_fill(ids % 3 > 0, -100)} for ids in token_ids(batch=4)]
    arguments = default_arguments(tmp_path, max_steps=2, use_cpu=True, save_strategy="no", logging_steps=1)
    before = model.puppet.theta.detach().clone()
    trainer = PuppetTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(model.puppet.theta, before)
    assert "distillation_kl" in trainer.state.log_history[0]
