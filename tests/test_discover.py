"""Finding the units of decoders that no family knows: proved, or refused with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import EVERY_TYPE, randomised, tiny
from plans import batch, logits, random_plan, relative, zeroed
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import ppnet
from ppnet.discover import trace
from ppnet.errors import CheckpointError, UnsupportedModelError
from ppnet.families import FAMILIES, structure_of
from ppnet.families.decoders import DERIVED, TINY
from ppnet.families.layout import Layout, sites_of
from ppnet.tracing import TRACING

TOLERANCE = 1e-5
DECODERS = [model_type for model_type in EVERY_TYPE if FAMILIES[model_type].decoder]
VARIANTS = [(model_type, name) for model_type in DECODERS for name in FAMILIES[model_type].variants]
# Numbers of heads that the forward reads, a plain MLP, one without a module of its own, q|k|v head by head.
UNKNOWN = {"seed_oss": TINY, "arcee": TINY, "biogpt": DERIVED, "persimmon": DERIVED}


@pytest.fixture(autouse=True)
def as_before():
    """What a test discovers is unknown to the next one."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def unknown(model_type: str, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**UNKNOWN.get(model_type, TINY), **changes})
    return randomised(AutoModelForCausalLM.from_config(config)).eval()


def greedy(model, **options) -> torch.Tensor:
    return model.generate(**batch(), max_new_tokens=8, do_sample=False, **options)


def described(sites):
    return [
        (site.name, site.block, site.activation, leaf.name, leaf.role, leaf.blocks, leaf.index.tolist())
        for site in sites
        for leaf in (*site.leaves, *site.across)
    ]


@pytest.mark.parametrize(
    ("model_type", "name"),
    [(known, "") for known in DECODERS]
    + [pytest.param(known, name, marks=pytest.mark.slow) for known, name in VARIANTS],
)  # fmt: skip
def test_what_is_known_by_name_is_found_by_behaviour(model_type, name):
    model = tiny(model_type, **FAMILIES[model_type].variants.get(name, {}))
    before = model.config.to_dict()
    layout = trace(model)
    assert described(sites_of(lambda config: layout, model)) == described(structure_of(model).sites)
    assert model.config.to_dict() == before and model.config._attn_implementation != TRACING
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    kept = {site.name: site.attributes(1) for site in structure_of(model).sites}
    for site in sites_of(lambda config: layout, model):  # what a table knows to be read is among what was found
        assert kept[site.name].items() <= site.attributes(1).items()


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_an_unknown_type_works_like_a_known_one(model_type, tmp_path):
    model = unknown(model_type)
    with pytest.raises(UnsupportedModelError, match=r"is not supported.*ppnet\.discover\(model\) looks for the units"):
        ppnet.inspect(model)
    dense = logits(model, batch())
    ppnet.discover(model)
    assert ppnet.inspect(model, verify=True).verified <= TOLERANCE
    plan = random_plan(model)
    masked, small = zeroed(model, plan), ppnet.compact(model, plan)
    assert relative(dense, logits(masked, batch())) > 0.01
    assert relative(logits(masked, batch()), logits(small, batch())) <= TOLERANCE
    assert torch.equal(greedy(small), greedy(masked))
    assert torch.equal(greedy(small, cache_implementation="static"), greedy(masked))
    gated = ppnet.wrap(model).train()
    gated(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert gated.puppet.s_gate.grad.any()
    with ppnet.resize(gated.eval(), plan):
        assert relative(logits(masked, batch()), logits(gated, batch())) <= TOLERANCE
    with pytest.raises(UnsupportedModelError, match="is known already"):
        ppnet.discover(model)


LOAD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
root = Path(sys.argv[1])
if sys.argv[2] == "ppnet":
    import ppnet
    load = ppnet.load
else:
    from transformers import AutoModelForCausalLM
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
for folder in sorted(root.glob("*/small")):
    data = load_file(folder.parent / "data.safetensors")
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    model = load(folder)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, data["logits"]), folder
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), data["generated"]), folder
    if sys.argv[2] == "ppnet":
        gated = load(folder.parent / "gated")
        with torch.no_grad():
            assert torch.equal(gated(**inputs).logits, data["dense"]), folder
        ppnet.compact_folder(folder.parent / "gated", folder.parent / "streamed", model.ppnet_plan)
        assert (folder / "model.safetensors").read_bytes() == (
            folder.parent / "streamed" / "model.safetensors").read_bytes()
    print(folder.parent.name)
assert sys.argv[2] == "ppnet" or not [name for name in sys.modules if name.split(".")[0] == "ppnet"]
"""


@pytest.mark.parametrize("way", ["ppnet", pytest.param("transformers", marks=pytest.mark.slow)])
def test_other_processes_know_what_was_discovered(way, tmp_path):
    torch.set_num_threads(1)
    for model_type in ("seed_oss", "persimmon"):
        model = unknown(model_type)
        ppnet.discover(model)
        plan = random_plan(model)
        small, folder = ppnet.compact(model, plan), tmp_path / "folders" / model_type
        expected = {**batch(), "logits": small(**batch()).logits.detach(), "generated": greedy(small)}
        ppnet.save(small, folder / "small")
        ppnet.save(ppnet.wrap(model), folder / "gated")
        with torch.no_grad():
            expected["dense"] = model(**batch()).logits
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / "data.safetensors")
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    paths = {} if way == "ppnet" else {"PYTHONPATH": ""}
    command = [sys.executable, "-P", "-c", LOAD, str(tmp_path / "folders"), way]
    run = subprocess.run(command, cwd=tmp_path, env=environment | paths, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.split() == ["persimmon", "seed_oss"]
    config = tmp_path / "folders" / "seed_oss" / "small" / "config.json"
    del FAMILIES["seed_oss"]
    config.write_text(json.dumps({**json.loads(config.read_text()), "ppnet_traced": {"layer": "x"}}))
    with pytest.raises(CheckpointError, match=r"ppnet_traced of config\.json is damaged"):
        ppnet.load(config.parent)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", r"experts\.gate_up_proj is no matrix"),
        ("gptj", "does not go through transformers' attention functions"),
        ("diffllama", r"what self_attn\.v_proj makes goes to"),
        ("olmo_hybrid", "are of different classes"),
        ("bitnet", r"the features of mlp\.gate_proj do not enter mlp\.down_proj one by one"),
    ],
)
def test_what_no_layout_describes_is_refused(model_type, reason):
    changes = {"rotary_dim": 4} if model_type == "gptj" else {}
    model = unknown(model_type, **({"head_dim": 4} if model_type == "bitnet" else {}), **changes)
    before = model.config.to_dict()
    with pytest.raises(UnsupportedModelError, match=rf"cannot find its units: .*{reason}"):
        ppnet.discover(model)
    assert model_type not in FAMILIES and model.config.to_dict() == before


def test_what_was_found_is_not_believed_before_it_is_proved(monkeypatch):
    model = unknown("persimmon")
    found = trace(model)
    wrong = Layout(**{**vars(found), "counts": {}})
    monkeypatch.setattr(sys.modules["ppnet.discover"], "trace", lambda model: wrong)
    with pytest.raises(UnsupportedModelError, match=r"seemed to be found, but model: removing units of layers\.0\.kv"):
        ppnet.discover(model)
    assert "persimmon" not in FAMILIES and not hasattr(model.config, "ppnet_traced")


def test_what_is_not_a_decoder_with_weights_is_refused():
    bert = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", is_decoder=True, **{
        name: value for name, value in DERIVED.items() if name != "num_key_value_heads"}))  # fmt: skip
    bert.config.model_type = "unheard_of"
    with pytest.raises(UnsupportedModelError, match="cannot find its units"):
        ppnet.discover(bert)
    with pytest.raises(UnsupportedModelError, match="does not generate"):
        ppnet.discover(unknown("seed_oss").model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model("seed_oss", **TINY))
    with pytest.raises(UnsupportedModelError, match="are on the meta device; load them first"):
        ppnet.discover(empty)
