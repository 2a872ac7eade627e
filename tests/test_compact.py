"""Compaction: the small model computes what the masked one computes, is ordinary, and costs what was promised."""

import copy
import gc
import json
import weakref

import pytest
import torch
from helpers import DECODERS, MODEL_TYPES, WITH_SLOW_TYPES, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import batch, logits, plan_of, random_plan, relative, zeroed
from transformers import AutoModelForCausalLM

import ppnet
from ppnet.compact import compact, planned_structure
from ppnet.equivalence import check_equivalent, masked
from ppnet.errors import EquivalenceError, PlanError, PPNetError, UnsupportedModelError
from ppnet.families import structure_of

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def registered():
    ppnet.register()


def equal_widths(model, kv_groups: int, neurons: int):
    """The last `kv_groups` groups and every other of the first 2 * `neurons` neurons, in every layer."""
    return plan_of(
        model,
        lambda site: range(site.units)[-kv_groups:] if site.kind == "kv_group" else range(0, 2 * neurons, 2),
    )


def greedy(model, **options):
    return model.generate(**batch(), max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_logits_equal_the_masked_model(model_type, tie):
    model = tiny(model_type, tie_word_embeddings=tie)
    plan = random_plan(model)
    small = compact(model, plan)
    assert relative(logits(zeroed(model, plan), batch()), logits(small, batch())) <= TOLERANCE
    assert sum(p.numel() for p in small.parameters()) == plan.cost.params < plan.dense_cost.params
    output, embedding = small.get_output_embeddings().weight, small.get_input_embeddings().weight
    assert (output is embedding) == tie
    assert small.ppnet_plan is plan


@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_kept_sets(model_type, data):
    model = tiny(model_type)
    sets = {
        site.name: data.draw(st.sets(st.integers(0, site.units - 1), min_size=1), label=site.name)
        for site in structure_of(model).sites
    }
    plan = plan_of(model, lambda site: sets[site.name])
    small = compact(model, plan, check=False)
    assert relative(logits(zeroed(model, plan), batch()), logits(small, batch())) <= TOLERANCE
    assert sum(p.numel() for p in small.parameters()) == plan.cost.params


@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_one_unit_per_site_and_all_units(model_type):
    model = tiny(model_type)
    one = plan_of(model, lambda site: [site.units - 1])
    assert relative(logits(zeroed(model, one), batch()), logits(compact(model, one), batch())) <= TOLERANCE
    everything = compact(model, plan_of(model, lambda site: range(site.units)))
    assert type(everything) is type(model)
    assert everything.config.to_dict() == model.config.to_dict()
    assert torch.equal(logits(everything, batch()), logits(model, batch()))


@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_given_model_is_untouched_bit_for_bit(model_type):
    model = tiny(model_type, tie_word_embeddings=True)
    model.train()
    model.get_submodule(structure_of(model).sites[0].block).eval()
    before = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    small = compact(model, random_plan(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert parameters == {name: id(p) for name, p in model.named_parameters()}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [m.training for m in small.modules()] == [m.training for m in before.modules()]
    assert model.config.to_dict() == before.config.to_dict()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert not shared


def test_flags_dtype_and_generation_config_are_kept():
    model = tiny("llama", dtype=torch.bfloat16)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    small = compact(model, random_plan(model))
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert not small.model.layers[1].mlp.up_proj.weight.requires_grad
    assert small.model.layers[1].mlp.gate_proj.weight.requires_grad
    assert small.generation_config.temperature == 0.3
    assert small.config._attn_implementation == model.config._attn_implementation
    layer = small.model.layers[0]
    assert layer.self_attn.config is small.config
    assert layer.mlp.up_proj.out_features == layer.mlp.up_proj.weight.shape[0] == layer.mlp.down_proj.in_features


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bfloat16_weights_are_the_kept_ones_exactly(model_type):
    model = tiny(model_type, dtype=torch.bfloat16)
    plan = random_plan(model)
    small = compact(model, plan)
    assert relative(logits(zeroed(model, plan).float(), batch()), logits(small.float(), batch())) <= TOLERANCE


@pytest.mark.parametrize("model_type", DECODERS)
def test_greedy_generation_with_both_caches(model_type):
    model = tiny(model_type)
    plan = random_plan(model)
    small, reference = compact(model, plan), zeroed(model, plan)
    expected = greedy(reference)
    assert torch.equal(expected, greedy(small))
    assert torch.equal(expected, greedy(small, cache_implementation="static"))
    assert torch.equal(expected, greedy(small, use_cache=False))


@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_attention_implementation_can_be_switched(model_type):
    model = tiny(model_type)
    plan = random_plan(model)
    small = compact(model, plan)
    expected = logits(small, batch())
    small.set_attn_implementation("eager")
    assert relative(expected, logits(small, batch())) <= TOLERANCE
    outputs = small(**batch(), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4
    site = structure_of(model).sites[0]
    queries = site.consumer.features_per_unit // site.producer("k").parts["k"].shape[1]
    kept = [len(plan.kept[f"layers.{layer}.kv_group"]) for layer in range(3)]
    assert [weights.shape[1] for weights in outputs.attentions] == [queries * groups for groups in kept]


def test_a_compacted_model_trains():
    model = tiny("qwen3")
    small = compact(model, random_plan(model)).train()
    inputs = batch()
    small.gradient_checkpointing_enable()
    small(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in small.parameters())


def test_export_with_dynamic_length():
    model = tiny("llama")
    small = compact(model, random_plan(model))
    inputs = {"input_ids": batch()["input_ids"], "use_cache": False}
    program = torch.export.export(
        small, (), inputs, dynamic_shapes={"input_ids": {1: torch.export.Dim.AUTO}, "use_cache": None}, strict=False
    )
    longer = torch.randint(96, (2, 17))
    assert relative(small(longer).logits, program.module()(input_ids=longer, use_cache=False).logits) <= TOLERANCE


def test_dense_weights_of_units_are_never_copied():
    model = tiny("llama")
    copied = []
    original = torch.nn.Parameter.__deepcopy__

    def record(parameter, memo):
        copied.append(tuple(parameter.shape))
        return original(parameter, memo)

    torch.nn.Parameter.__deepcopy__ = record
    try:
        compact(model, random_plan(model), check=False)
    finally:
        torch.nn.Parameter.__deepcopy__ = original
    assert (44, 32) not in copied and (32, 44) not in copied and (64, 32) not in copied
    assert (96, 32) in copied


# ---- classes and configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_equal_widths_give_the_stock_class(model_type, tmp_path):
    model = tiny(model_type)
    small = compact(model, equal_widths(model, 2, 9))
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == model_type and config["architectures"] == [type(model).__name__]
    assert "per_layer_config" not in config and "auto_map" not in config
    assert (config["num_key_value_heads"], config["num_attention_heads"], config["intermediate_size"]) == (2, 4, 9)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert torch.equal(logits(reloaded, batch()), logits(small, batch()))
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".json", ".safetensors"]


def test_head_width_is_stated_once_heads_go(tmp_path):
    model = tiny("qwen2", head_dim=4)
    del model.config.head_dim  # qwen2 does not declare it: 32 / 8 heads = 4 follows from the other numbers
    small = compact(model, equal_widths(model, 2, 9))
    small.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["head_dim"] == 4
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), batch()), logits(small, batch()))


def test_what_the_stock_config_refuses_gets_the_shipped_class():
    llama = tiny("llama")
    plan = equal_widths(llama, 3, 9)  # 6 heads do not divide the width of 32, which LlamaConfig insists on
    assert type(compact(llama, plan)).__name__ == "PPNetLlamaForCausalLM"
    gpt2 = tiny("gpt2")
    assert type(compact(gpt2, equal_widths(gpt2, 2, 9))).__name__ == "PPNetGPT2LMHeadModel"
    neurons = plan_of(gpt2, lambda site: range(site.units if site.kind == "kv_group" else 9))
    small = compact(gpt2, neurons)
    assert type(small) is type(gpt2) and small.config.n_inner == 9


def test_gpt2_with_default_n_inner(tmp_path):
    model = tiny("gpt2", n_inner=None)
    small = compact(model, random_plan(model))
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), batch()), logits(small, batch()))


def test_bare_decoder():
    model = tiny("llama").model
    plan = random_plan(model)
    small = compact(model, plan)
    assert type(small).__name__ == "PPNetLlamaModel"
    assert len(small(**batch(), output_hidden_states=True).hidden_states) == 4


# ---- models with gates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("kv_group", "neuron"), ("neuron",)], ids=["both", "neurons"])
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("model_type", WITH_SLOW_TYPES)
def test_gates_are_folded_exactly(model_type, preset, kinds):
    model = ppnet.wrap(tiny(model_type), ppnet.PuppetConfig(preset=preset, kinds=kinds))
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for gate in model.puppet.parameters():
            gate.add_(torch.randn(gate.shape, generator=source) * 0.3)
    model.train()
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()  # leaves a draw in force
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = ppnet.plan(model, 0.8)
    small = compact(model, 0.8)
    assert small.ppnet_plan.kept == plan.kept and plan.u > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    small.eval()
    dense = ppnet.unwrap(copy.deepcopy(model)).eval()
    with masked(dense, planned_structure(model, plan), plan, model.puppet.scales(plan.u)):
        assert relative(logits(dense, inputs), logits(small, inputs)) <= TOLERANCE
    with ppnet.resize(model.eval(), plan):
        assert relative(logits(model, inputs), logits(small, inputs)) <= TOLERANCE
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in small.modules())
    assert not hasattr(small, "puppet") and not hasattr(small.config, "ppnet")
    assert all(not name.startswith("puppet") for name in small.state_dict())
    assert sum(p.numel() for p in small.parameters()) == plan.cost.params


def test_compacted_model_does_not_hold_the_wrapped_one():
    model = ppnet.wrap(tiny("llama"))
    small = compact(model, 0.8)
    embedding = weakref.ref(model.get_input_embeddings())
    del model
    gc.collect()
    assert embedding() is None
    assert sum(p.numel() for p in small.parameters()) > 0


def test_gated_plan_on_a_model_without_gates_warns():
    model = ppnet.wrap(tiny("llama"))
    plan = ppnet.plan(model, 0.8)
    ppnet.unwrap(model)
    with pytest.warns(UserWarning, match="amplitudes"):
        compact(model, plan)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong():
    model = tiny("llama")
    plan = random_plan(model)
    with pytest.raises(PPNetError, match=r"metric, of: only used to make a plan"):
        compact(model, plan, metric="flops", of="gated")
    with pytest.raises(PlanError, match=r"made for model_type 'llama', the model is 'mistral'"):
        compact(tiny("mistral"), plan)
    with pytest.raises(PlanError, match="dense widths differ"):
        compact(tiny("llama", intermediate_size=48), plan)
    with pytest.raises(UnsupportedModelError, match="already compacted"):
        compact(compact(model, plan), plan)
    gated = ppnet.wrap(tiny("llama"))
    neurons = ppnet.plan(ppnet.wrap(tiny("llama"), ppnet.PuppetConfig(kinds=("neuron",))), 0.9)
    with pytest.raises(PlanError, match="3 sites, the model's gates of 6"):
        compact(gated, neurons)


def test_a_wrong_result_is_caught_and_located():
    model = tiny("llama")
    plan = random_plan(model)
    small = compact(model, plan)
    assert check_equivalent(model, small, structure_of(model), plan) <= TOLERANCE
    with torch.no_grad():
        small.model.layers[1].self_attn.o_proj.weight[0, 0] += 0.1
    with pytest.raises(EquivalenceError, match="first differ after layer 1"):
        check_equivalent(model, small, structure_of(model), plan)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(EquivalenceError, match="nan of the largest logit"):
        compact(model, plan)
