"""Fused decoder layers: a step is two operators per layer, and the layer's own forward wherever that would not do."""

from __future__ import annotations

import copy
import io
from collections import Counter

import pytest
import torch
from decoding import FUSED, LAYERS, Calls, pair, same, step, twice
from helpers import generate, logits, tiny, token_ids
from plans import plan_of
from torch import nn
from transformers import StaticCache

from ppnet import accelerate, compact, decelerate, resize, unwrap, wrap
from ppnet.wrap import ACCELERATED

# ---- the same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FUSED)
def test_a_step_is_two_operators_per_layer(model_type):
    plain, model = pair(model_type)
    assert model.__dict__[ACCELERATED]["layers"] == [f"model.layers.{i}" for i in range(LAYERS)]
    ours, calls = step(model)
    assert calls.counts == {"qkv_decode": LAYERS, "attend_mlp_decode": LAYERS, "rms_norm": 1, "linear_decode": 1}
    assert same(ours, step(plain)[0])


def test_gpt2_has_layers_of_its_own():
    _, model = pair("gpt2")
    assert model.__dict__[ACCELERATED]["layers"] == [] and step(model)[1].layers == 0


@pytest.mark.parametrize("model_type", FUSED)
def test_any_number_of_new_tokens(model_type):
    plain, model = pair(model_type)
    for sequences, new in ((1, 1), (1, 2), (1, 7), (1, 8), (2, 3), (8, 1), (2, 4), (3, 3), (9, 1)):
        ids = token_ids(sequences, new + 5)
        ours, calls = step(model, ids, new)
        assert calls.layers == (LAYERS if sequences * new <= 8 else 0), (sequences, new)
        assert same(ours, step(plain, ids, new)[0])
        ours, calls = step(model, ids, new, StaticCache(model.config, max_cache_len=20))
        assert calls.layers == (LAYERS if sequences * new <= 8 else 0), (sequences, new)
        assert same(ours, step(plain, ids, new, StaticCache(plain.config, max_cache_len=20))[0])


@pytest.mark.parametrize("model_type", FUSED)
def test_generate(model_type):
    (plain, model), ids = pair(model_type), token_ids(2, 5)
    padding = torch.ones_like(ids)
    padding[0, :2] = 0
    ways = {}, {"attention_mask": padding}, {"num_beams": 3}, {"cache_implementation": "static"}
    for options in (*ways, {"cache_implementation": "static", "attention_mask": padding}, {"use_cache": False}):
        with Calls() as calls:
            tokens = generate(model, ids, **options)
        assert torch.equal(tokens, generate(plain, ids, **options)), options
        assert calls.layers >= (0 if "use_cache" in options else 9 * LAYERS)


def test_padded_logits():
    (plain, model), ids = pair("qwen3"), token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ours, calls = step(model, ids, 2, mask=mask)
    assert calls.layers == LAYERS and same(ours, step(plain, ids, 2, mask=mask)[0])


@pytest.mark.parametrize(
    "model_type, window",
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
)
def test_sliding_windows(model_type, window):
    (plain, model), ids = pair(model_type, **window), token_ids(2, 9)
    for new in (1, 3):
        ours, calls = step(model, ids, new)
        assert calls.layers == LAYERS and same(ours, step(plain, ids, new)[0])
    assert torch.equal(generate(model, ids), generate(plain, ids))


@pytest.mark.parametrize("model_type", FUSED)
def test_every_size_of_a_gated_model(model_type):
    model = wrap(tiny(model_type))
    with torch.no_grad():
        for parameter in model.puppet.parameters():  # amplitudes and thresholds that are not neutral
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    sizes, expected = (0.7, 1.0, 0.4, 0.7), {}
    for size in sizes:
        resize(model, size)
        expected[size] = step(model)[0], step(model, new=3)[0]
    accelerate(model)
    for size in sizes:
        resize(model, size)
        for new, own in zip((1, 3), expected[size], strict=True):
            ours, calls = step(model, new=new)
            assert calls.layers == LAYERS, size
            assert same(ours, own)
    small = accelerate(compact(model, 0.4))
    ours, calls = step(small)
    assert calls.layers == LAYERS and same(ours, expected[0.4][0])


def test_a_layer_that_keeps_one_unit():
    dense = tiny("qwen3")
    plan = plan_of(dense, lambda site: [0] if ".1." in site.name else range(site.units))
    small = compact(dense, plan)
    expected = step(small)[0]
    ours, calls = step(accelerate(small))
    assert calls.layers == LAYERS and same(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    plain, model = pair("qwen3", dtype=dtype)
    exact, own, (ours, calls) = step(copy.deepcopy(plain).double())[0], step(plain)[0], step(model)
    assert calls.layers == LAYERS and ours.dtype == dtype
    assert (ours.double() - exact).abs().mean() <= 2 * (own.double() - exact).abs().mean()


# ---- a pass that is no plain step ------------------------------------------------------------------------------------


def test_global_hooks():
    (plain, model), called = pair(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        ours, calls = step(model)
    finally:
        handle.remove()
    assert calls.layers == 0 and set(model.modules()) - set(called) <= {model.model.layers}
    assert same(ours, step(plain)[0])


def test_attentions_and_hidden_states():
    (plain, model), ids = pair(), token_ids(2, 1)
    with torch.no_grad(), Calls() as calls:
        out = model(ids, output_hidden_states=True)
    own = plain(ids, output_hidden_states=True)
    assert calls.layers == 0  # transformers hooks the attention blocks for any output that is asked for
    assert len(out.hidden_states) == LAYERS + 1
    assert all(same(a, b, 4) for a, b in zip(out.hidden_states, own.hidden_states, strict=True))
    for each in (plain, model):
        each.set_attn_implementation("eager")
    with torch.no_grad():
        out, own = model(ids, output_attentions=True), plain(ids, output_attentions=True)
    assert len(out.attentions) == LAYERS
    assert all(same(a, b) for a, b in zip(out.attentions, own.attentions, strict=True))


def test_attentions_that_are_asked_for_without_eager_attention():
    """There are none, as with SDPA."""
    found = []
    for model in pair():
        with torch.no_grad():
            found.append(model(token_ids(2, 1), output_attentions=True).attentions)
    assert found[0] == found[1]


def test_dropout_in_training():
    _, model = pair(attention_dropout=0.5)
    attention = model.model.layers[0].self_attn
    for module in (model, attention):  # all of it, then attention alone, for samples of its predictions
        model.eval()
        module.train()
        (one, calls), (other, _) = step(model), step(model)
        assert calls.layers == (0 if module is model else LAYERS - 1)
        assert (one - other).abs().max() > 1e-4


def test_gradients_and_autocast():
    (plain, model), ids = pair(), token_ids(2, 1)
    with Calls() as calls:
        out = model(ids).logits
    assert calls.layers == 0 and out.requires_grad and same(out, plain(ids).logits)
    results = []
    for each in (plain, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(step(each))
    (own, _), (ours, calls) = results
    assert calls.layers == 0 and (ours - own).abs().max() <= 0.05


def test_inference_mode():
    plain, model = pair()
    with torch.inference_mode():
        ours, calls = step(model)
        assert calls.layers == LAYERS and same(ours, step(plain)[0])


def test_another_attention():
    plain, model = pair()
    model.set_attn_implementation("sdpa")
    ours, calls = step(model)
    assert calls.layers == 0 and same(ours, step(plain)[0])


def test_another_dtype_afterwards():
    plain, model = pair()
    assert (step(model.double())[0] - step(plain.double())[0]).abs().max() <= 1e-12
    assert step(model)[1].layers == 0
    exact = step(plain)[0]
    ours, calls = step(model.half())
    own = step(plain.half())[0]
    assert calls.layers == LAYERS
    assert (ours.double() - exact).abs().mean() <= 2 * (own.double() - exact).abs().mean()


# ---- what users do with models ---------------------------------------------------------------------------------------


def test_functional_call_computes_with_the_weights_it_gets():
    plain, model = pair("qwen3")
    generator = torch.Generator().manual_seed(7)
    others = {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in plain.state_dict().items()}
    with torch.no_grad():
        own, ours = (torch.func.functional_call(each, others, (token_ids(2, 1),)).logits for each in (plain, model))
    assert same(ours, own, 8) and not same(ours, logits(model, token_ids(2, 1)), 100)


def test_batches_of_models():
    """vmap over the weights, as ensembles do."""
    results, ids = [], token_ids(2, 1)
    for model in pair(attn_implementation="eager"):
        stacked = {n: torch.stack([p, 1.1 * p]) for n, p in model.state_dict().items()}

        def call(weights, model=model):
            return torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits

        with torch.no_grad():
            results.append(torch.func.vmap(call)(stacked))
    assert same(results[1], results[0], 4)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how):
    plain, model = pair("qwen3")
    before = step(model)[0]
    if how == "deepcopy":
        clone = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    ours, calls = step(clone)
    assert calls.layers == LAYERS and torch.equal(ours, before)
    with torch.no_grad():
        for each in (clone, plain):
            each.model.layers[0].mlp.up_proj.weight.mul_(3)
            each.model.layers[0].input_layernorm.weight.mul_(2)
            each.model.layers[1].self_attn.q_norm = type(each.model.layers[1].self_attn.q_norm)(each.config.head_dim)
    clone.model.layers[1].mlp.register_forward_hook(twice)
    plain.model.layers[1].mlp.register_forward_hook(twice)
    ours, calls = step(clone)
    assert calls.layers == LAYERS - 1 and same(ours, step(plain)[0], 4)
    ours, calls = step(model)
    assert calls.layers == LAYERS and torch.equal(ours, before)


def test_decelerate_and_unwrap():
    plain, model = pair()
    ours, calls = step(decelerate(model))
    assert not calls.counts and same(ours, step(plain)[0])
    assert not any({"_ppnet_layer", "forward"} & module.__dict__.keys() for module in model.modules())
    ours, calls = step(unwrap(accelerate(wrap(model))))
    assert not calls.counts and same(ours, step(plain)[0])


def test_compiled_steps_with_a_static_cache():
    (plain, model), ids, graphs = pair("qwen3"), token_ids(2, 6), []

    def backend(graph, inputs):
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes if "ppnet" in str(node.target)))
        return graph

    cache, own = (StaticCache(model.config, max_cache_len=16) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        for token in range(2):
            out = compiled(ids[:, token : token + 1], past_key_values=cache, use_cache=True).logits
    expected = step(plain, torch.cat([ids, ids[:, :2]], 1), 2, own)[0][:, -1:]
    assert same(out, expected)
    assert all(graph["ppnet.qkv_decode.default"] == LAYERS for graph in graphs)
    assert all(graph["ppnet.attend_mlp_decode.default"] == LAYERS for graph in graphs)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, nn.Identity])
def test_norms_that_are_not_known(norm):
    """Other than Llama's, or of an eps that the dtype decides: attention and MLP are fused, the layer is not."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = (
            norm(model.config.hidden_size),
            norm(model.config.hidden_size),
        )
    expected = step(model)[0]
    ours, calls = step(accelerate(model))
    assert model.__dict__[ACCELERATED]["layers"] == [] and calls.layers == 0
    assert calls.counts["gated_mlp_decode"] == LAYERS and same(ours, expected)
