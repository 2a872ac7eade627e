"""Every family on tiny random models: what is masked equals what is removed, trains, generates, reloads anywhere."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from functools import cache, partial

import pytest
import torch
from helpers import EVERY_TYPE, auto_class, tiny, token_ids
from plans import batch, logits, plan_of, random_plan, relative, zeroed
from safetensors.torch import save_file
from test_skip import gated, reference_gradients
from transformers import AutoModel, AutoModelForCausalLM

import ppnet
from ppnet.errors import CheckpointError, EquivalenceError, UnsupportedModelError
from ppnet.families import FAMILIES, structure_of
from ppnet.families.layout import Layout, sites_of
from ppnet.scores.probe import Probe
from ppnet.streaming import compact_folder
from ppnet.verify import verify_sites

TOLERANCE = 1e-5
TYPES = [model_type for model_type in EVERY_TYPE if FAMILIES[model_type].decoder]
BY_LAYOUT = [model_type for model_type in TYPES if FAMILIES[model_type].stem == "decoder"]
VARIANTS = [(model_type, name) for model_type in TYPES for name in FAMILIES[model_type].variants]


@pytest.fixture(autouse=True)
def registered():
    ppnet.register()


def tied(model_type: str) -> bool:
    """Every other type ties its embeddings, so that both are seen in half of the time; `slow` tests see the others."""
    return EVERY_TYPE.index(model_type) % 2 == 0


@cache
def made(model_type: str, tie: bool):
    """A model, a plan with other widths in every layer, the model with these units masked, and the compacted one."""
    model = tiny(model_type, tie_word_embeddings=tie)
    plan = random_plan(model)
    return model, plan, zeroed(model, plan), ppnet.compact(model, plan)


def greedy(model, **options) -> torch.Tensor:
    """Of two sequences, one of them padded; longer than every tiny model's sliding window."""
    return model.generate(**batch(), max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("model_type", TYPES)
class TestFamily:
    def test_masked_equals_compacted(self, model_type):
        model, plan, masked, small = made(model_type, tied(model_type))
        assert relative(logits(model, batch()), logits(masked, batch())) > 0.01
        assert relative(logits(masked, batch()), logits(small, batch())) <= TOLERANCE
        assert sum(p.numel() for p in small.parameters()) == plan.cost.params < plan.dense_cost.params
        output, embedding = small.get_output_embeddings().weight, small.get_input_embeddings().weight
        assert (output is embedding) == tied(model_type)
        assert all(attention_config(small, site) for site in structure_of(model).sites)

    def test_generates_with_every_cache(self, model_type):
        _, _, masked, small = made(model_type, tied(model_type))
        expected = greedy(masked)
        assert torch.equal(expected, greedy(small))
        assert torch.equal(expected, greedy(small, cache_implementation="static"))
        assert torch.equal(expected, greedy(small, use_cache=False))

    def test_gradients_flow_to_every_gate(self, model_type):
        model = gated(model_type, preset="default").train()
        _, expected, draw = reference_gradients(model, token_ids(), 0)
        assert 0.1 < float(draw.mask.double().mean()) < 0.9
        model(token_ids(), labels=token_ids()).loss.backward()
        moved = model.puppet.s_gate.grad != 0
        assert moved.float().mean() > 0.9  # OPT's ReLU leaves some neurons dead on so few tokens
        assert torch.equal(moved, expected["puppet.s_gate"] != 0)
        for name, parameter in model.named_parameters():
            want = expected[name]
            if want is not None:
                assert (parameter.grad - want).abs().max() <= 3e-6 * want.abs().max() + 1e-9, name

    def test_a_size_is_the_compacted_model(self, model_type):
        model, plan, masked, small = made(model_type, tied(model_type))
        dense = logits(model, batch())
        model = ppnet.wrap(copy.deepcopy(model))
        assert torch.equal(logits(model, batch()), dense)
        with ppnet.resize(model, plan):
            assert relative(logits(masked, batch()), logits(model, batch())) <= TOLERANCE
            assert torch.equal(greedy(model), greedy(small))
        assert torch.equal(logits(ppnet.unwrap(model), batch()), dense)
        assert not any("forward" in vars(module) for module in model.modules())

    def test_reloads_with_ppnet(self, model_type, tmp_path):
        _, _, _, small = made(model_type, tied(model_type))
        ppnet.save(small, tmp_path / "small")
        for reloaded in (AutoModelForCausalLM.from_pretrained(tmp_path / "small"), ppnet.load(tmp_path / "small")):
            assert type(reloaded) is type(small)
            assert torch.equal(logits(reloaded, batch()), logits(small, batch()))
            output, embedding = reloaded.get_output_embeddings().weight, reloaded.get_input_embeddings().weight
            assert (output.data_ptr() == embedding.data_ptr()) == tied(model_type)

    def test_from_folder_to_folder(self, model_type, tmp_path):
        model, plan, _, small = made(model_type, tied(model_type))
        ppnet.save(model, tmp_path / "dense", max_shard_size="40KB")
        ppnet.save(small, tmp_path / "small")
        compact_folder(tmp_path / "dense", tmp_path / "streamed", plan)
        for file in (tmp_path / "small").iterdir():
            assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes(), file.name

    def test_accelerated(self, model_type):
        _, _, _, small = made(model_type, tied(model_type))
        expected = greedy(small)
        fast = ppnet.accelerate(copy.deepcopy(small))
        assert torch.equal(greedy(fast), expected)
        assert torch.equal(greedy(fast, cache_implementation="static"), expected)
        assert relative(logits(small, batch()), logits(fast, batch())) <= TOLERANCE

    def test_sorted(self, model_type):
        model, _, _, _ = made(model_type, tied(model_type))
        ordered = ppnet.sort_(copy.deepcopy(model), scores="magnitude")
        assert relative(logits(model, batch()), logits(ordered, batch())) <= TOLERANCE
        plan = ppnet.plan(ordered, 0.8, scores="position")
        assert all(plan.prefix(name) for name in plan.kept)
        expected = logits(zeroed(ordered, plan), batch())
        with ppnet.resize(ppnet.wrap(ordered), plan):
            assert relative(expected, logits(ordered, batch())) <= TOLERANCE

    def test_redistributes(self, model_type):
        """In sequence where a layer only adds up what its sub-layers give; that is refused elsewhere."""
        model, plan, _, _ = made(model_type, tied(model_type))
        data = [{"input_ids": token_ids(batch=6, length=30, seed=seed)} for seed in (1, 2)]
        more = {"gemma2", "gemma3_text", "glm4", "granite", "olmo2", "olmo3"}  # norms of outputs, a multiplier
        options = {"redistribute": data, "sequential": model_type not in more}
        if model_type in more:
            with pytest.raises(UnsupportedModelError, match=r"does more than to add .* use sequential=False"):
                ppnet.compact(model, plan, redistribute=data)
        small = ppnet.compact(model, plan, **options)
        errors = small.ppnet_plan.extra["redistribution"]["errors"]
        assert errors.keys() == plan.kept.keys()
        assert all(error["after"] <= error["before"] for error in errors.values())

    def test_scores_see_sequences(self, model_type):
        """Also where a layer flattens its tokens: what is summed is by sequence."""
        model, _, _, _ = made(model_type, tied(model_type))
        sites, shapes = structure_of(model).sites, {}
        probe = Probe(model, sites, sink=lambda number, x, dx: shapes.update({number: (x.shape, dx.shape)}))
        try:
            ids = token_ids(batch=3, length=17)
            model(ids, labels=ids).loss.backward()
        finally:
            probe.remove()
            model.zero_grad()
        assert shapes == {number: ((3, 17, site.consumer.index.numel()),) * 2 for number, site in enumerate(sites)}


def attention_config(small, site) -> bool:
    """Whether an attention's config follows the model's: its implementation can then be switched."""
    block = small.get_submodule(site.block)
    return not hasattr(block, "config") or block.config._attn_implementation == small.config._attn_implementation


@pytest.mark.parametrize(("model_type", "name"), VARIANTS)
def test_variants(model_type, name):
    """Biases, one KV head, the other order of norms or residuals, and what else a family's models differ in."""
    model = tiny(model_type, **FAMILIES[model_type].variants[name])
    assert verify_sites(model) <= TOLERANCE
    plan = random_plan(model)
    small = ppnet.compact(model, plan)
    assert torch.equal(greedy(small), greedy(zeroed(model, plan)))


# ---- other processes -------------------------------------------------------------------------------------------------

RELOAD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    data = load_file(folder / "expected" / "data.safetensors")
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("loaded without its code")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, data["logits"]), folder.name
    made = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(made, data["generated"]), folder.name
    bare = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(bare).__name__.startswith("PPNet") and [p.shape for p in bare.parameters()]
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, data["logits"]), folder.name
    print(folder.name)
assert not [name for name in sys.modules if name.split(".")[0] == "ppnet"]
"""


@pytest.mark.parametrize("other", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "the other ties"])
def test_reload_in_a_fresh_process_without_ppnet(other, tmp_path):
    """All types that share a modelling file in one process; `test_shipped.py` has those with a file of their own."""
    torch.set_num_threads(1)
    for model_type in BY_LAYOUT:
        _, _, _, small = made(model_type, tied(model_type) != other)
        folder = tmp_path / "folders" / model_type
        small.save_pretrained(folder)
        (folder / "expected").mkdir()
        with torch.no_grad():
            expected = {**batch(), "logits": small(**batch()).logits, "generated": greedy(small)}
        save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected" / "data.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", RELOAD, str(tmp_path / "folders")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.split() == sorted(BY_LAYOUT)


# ---- classes and configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", BY_LAYOUT)
def test_equal_widths_give_the_stock_class_where_it_can_hold_them(model_type, tmp_path):
    model = tiny(model_type)
    layout_has_heads = FAMILIES[model_type].stock_expressible(structure_of(model).sites[0], model.config)
    units = structure_of(model).sites[0].units
    groups = units // 2 if layout_has_heads else units
    plan = plan_of(model, lambda site: range(groups) if site.kind == "kv_group" else range(0, 18, 2))
    small = ppnet.compact(model, plan)
    assert type(small) is type(model)
    small.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert torch.equal(logits(reloaded, batch()), logits(small, batch()))
    assert relative(logits(zeroed(model, plan), batch()), logits(reloaded, batch())) <= TOLERANCE


@pytest.mark.parametrize("model_type", ["olmo2", "gpt_neox", "opt", "stablelm"])
def test_fewer_heads_are_never_left_to_a_stock_class_that_cannot_hold_them(model_type):
    """Its norms would have the wrong eps, its heads the wrong width, and shapes alone need not show it."""
    model = tiny(model_type)
    units = structure_of(model).sites[0].units
    plan = plan_of(model, lambda site: range(site.units if site.kind == "neuron" else units // 2))
    assert type(ppnet.compact(model, plan)).__name__ == f"PPNet{type(model).__name__}"


def test_other_widths_are_never_loaded_as_garbage(tmp_path):
    """transformers fills what does not fit with random numbers, if told to; ppnet refuses what was filled."""
    small = made("gemma3_text", False)[3]
    small.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    neurons = len(small.ppnet_plan.kept["layers.0.neuron"])
    assert f'"intermediate_size": {neurons}' in config
    (tmp_path / "config.json").write_text(
        config.replace(f'"intermediate_size": {neurons}', f'"intermediate_size": {neurons + 1}')
    )
    with pytest.raises(CheckpointError, match="mismatched keys"):
        ppnet.load(tmp_path, ignore_mismatched_sizes=True)
    with pytest.raises(CheckpointError, match="do not fit"):
        ppnet.load(tmp_path)


def test_a_layers_own_config_is_the_shared_one_but_for_its_entries():
    """Phi-3's attention reads its number of heads from its config, which must stay the model's in all else."""
    model, plan, masked, small = made("phi3", False)
    expected = logits(masked, batch())
    for implementation in ("eager", "sdpa"):
        small.set_attn_implementation(implementation)
        assert relative(expected, logits(small, batch())) <= TOLERANCE
        for layer, module in enumerate(small.model.layers):
            kept = len(plan.kept[f"layers.{layer}.kv_group"])
            assert module.self_attn.config.num_attention_heads == 2 * kept
            assert module.self_attn.config._attn_implementation == implementation
            assert module.self_attn.config.max_position_embeddings == 64
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert copied.model.layers[0].self_attn.config._shared is copied.config
        assert torch.equal(logits(copied, batch()), logits(small, batch()))
    wrapped = ppnet.wrap(copy.deepcopy(model))
    with ppnet.resize(wrapped, plan):
        assert relative(expected, logits(wrapped, batch())) <= TOLERANCE
    assert all(module.self_attn.config is wrapped.config for module in wrapped.model.layers)


@pytest.mark.parametrize("model_type", ["olmo2", "phi3", "opt"])
def test_gated_models_can_be_pickled(model_type):
    model, plan, masked, _ = made(model_type, False)
    gated_model = ppnet.wrap(copy.deepcopy(model))
    with ppnet.resize(gated_model, plan):
        copied = pickle.loads(pickle.dumps(gated_model))
    assert relative(logits(masked, batch()), logits(copied, batch())) <= TOLERANCE  # of the size it had
    ppnet.resize(copied, None)
    assert torch.equal(logits(copied, batch()), logits(model, batch()))


def test_what_a_family_refuses():
    with pytest.raises(UnsupportedModelError, match=r"config\.qk_layernorm of stablelm gives every head a norm"):
        ppnet.inspect(tiny("stablelm", qk_layernorm=True))
    phi3 = tiny("phi3")
    phi3.model.layers[0].self_attn.num_key_value_heads = 4
    phi3.model.layers[1].self_attn.o_proj = torch.nn.Linear(56, 32)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn has 7 query heads for 4 KV heads"):
        ppnet.inspect(phi3)


def test_the_classes_of_a_modelling_file_are_made_when_asked_for(tmp_path):
    from ppnet.shipped import modeling_ppnet_decoder as module

    assert module.PPNetGemma2Model is module.PPNetGemma2Model
    assert module.PPNetGemma2Config.model_type == "ppnet_gemma2"
    for name in ("PPNetNonsense", "Gemma2Model", "PPNetAutoModel", "__path__"):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)
    ppnet.save(made("gemma2", False)[3], tmp_path)
    assert AutoModel.from_pretrained(tmp_path).__class__ is module.PPNetGemma2Model


# ---- tables that are wrong -------------------------------------------------------------------------------------------


def with_sites(model, **changes):
    """The structure of a model as another layout than its own would have it."""
    structure = structure_of(model)
    layout = FAMILIES[model.config.model_type].sites.args[0](model.config)
    wrong = Layout(**{**vars(layout), **changes})
    return structure.__class__(**{**vars(structure), "sites": partial(sites_of, lambda config: wrong)(model)})


@pytest.mark.parametrize(
    ("model_type", "changes", "blamed"),
    [
        ("gpt_neox", {"interleaved": False}, r"layers\.0\.kv_group"),
        ("gpt_bigcode", {"interleaved": False}, r"layers\.0\.kv_group"),
        ("phi3", {"counts": {"num_key_value_heads": "kv_heads"}}, r"layers\.0\.kv_group"),
        ("opt", {"counts": {}}, r"layers\.0\.kv_group"),
        ("olmo2", {"across": {}}, r"layers\.0\.kv_group"),
        ("olmo2", {"across": {"q_norm": "q"}}, r"layers\.0\.kv_group"),
        ("gemma", {"reads": {"q": "q_proj", "k": "k_proj", "v": "k_proj"}}, r"layers\.0\.kv_group"),
        ("gemma", {"makes": {"gate": "gate_proj"}}, r"layers\.0\.neuron"),
    ],
)
def test_a_wrong_table_is_found_out(model_type, changes, blamed):
    model = tiny(model_type)
    assert verify_sites(model, with_sites(model)) <= TOLERANCE
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(EquivalenceError, match=rf"removing units of {blamed} .* is not the same as masking them"):
        verify_sites(model, with_sites(model, **changes))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_verification_is_part_of_inspection():
    model = tiny("olmo3")
    found = ppnet.inspect(model, verify=True)
    assert found.verified is not None and found.verified <= TOLERANCE
    assert "verified: removal equals masking" in str(found) and found.to_dict()["verified"] == found.verified
    assert ppnet.inspect(model).verified is None
    gates = ppnet.wrap(model)
    with torch.no_grad():
        gates.puppet.s_out.add_(0.3)
    assert ppnet.inspect(gates, verify=True).verified <= TOLERANCE
    with torch.device("meta"):
        empty = auto_class("olmo3").from_config(tiny("olmo3").config)
    with pytest.raises(UnsupportedModelError, match="is on the meta device; load the weights first"):
        ppnet.inspect(empty, verify=True)
