"""ppnet.speculate and ppnet.draft: the target's own output, from one set of weights."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from helpers import DECODERS, logits, tiny, token_ids
from refusals import refused
from test_sort import trained

import ppnet
from ppnet.errors import DataError, PlanError, PPNetError, UnsupportedModelError
from ppnet.evaluate.memory import peak_bytes
from ppnet.ops.linear_decode import MOST_TOKENS
from ppnet.speculation.decoding import _tie
from ppnet.speculation.drafts import memory, storages, tensors_of
from ppnet.speculation.pace import FIRST_ROUNDS, LONGEST, Pace, expected_speedup, expected_tokens
from ppnet.wrap import engine_of, is_accelerated, is_wrapped

NEW = 16


def sorted_model(model_type="llama", accelerated=False, **changes):
    model = ppnet.sort_(trained(tiny(model_type, **changes)))
    return ppnet.accelerate(model) if accelerated else model


def greedy(model, ids, new=NEW, **options):
    return model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)


# ---- the same output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("model_type", DECODERS)
def test_greedy_output_is_the_targets(model_type, accelerated):
    model, ids = sorted_model(model_type, accelerated), token_ids(1, 7)
    expected = greedy(model, ids)
    accepted = []
    for size in (0.55, 1.0):
        small = ppnet.draft(model, size)
        assert is_accelerated(small) == accelerated and type(small) is type(model)
        for length in (None, 3):
            found = ppnet.speculate(model, small, ids, max_new_tokens=NEW, draft_length=length)
            assert torch.equal(found.sequences, expected), (size, length)
            assert found.new_tokens == expected.shape[1] - 7
            assert found.verifications == len(found.lengths) + found.rechecked
            assert length is None or max(found.lengths) <= length
        accepted.append(found.acceptance)
        assert torch.equal(greedy(model, ids, assistant_model=small), expected)
    # Drafts that are right, and, but for qwen3's, which are right by themselves, drafts that are not.
    assert accepted[-1] == 1.0 and (accepted[0] < 1.0 or model_type == "qwen3")
    assert not accelerated or found.rechecked == 0


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_target_may_have_a_size_too(accelerated):
    model, ids = sorted_model(accelerated=accelerated), token_ids(1, 5)
    with ppnet.resize(model, 0.8) as resized:
        expected = greedy(model, ids)
        found = ppnet.speculate(model, 0.6, ids, max_new_tokens=NEW)
        assert torch.equal(found.sequences, expected)
        assert engine_of(model).fixed is resized.plan
    assert not torch.equal(greedy(model, ids), expected)


@pytest.mark.parametrize("accelerated", [False, True])
def test_without_gates(accelerated):
    model, ids = tiny("qwen2"), token_ids(1, 5)
    if accelerated:
        ppnet.accelerate(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = greedy(model, ids)
    found = ppnet.speculate(model, 0.8, ids, max_new_tokens=NEW, scores="magnitude")
    assert torch.equal(found.sequences, expected)
    plan = ppnet.plan(model, 0.8, scores="magnitude")
    by_plan = ppnet.draft(model, plan)
    small = ppnet.compact(ppnet.decelerate(copy.deepcopy(model)) if accelerated else model, plan)
    assert (logits(by_plan, ids) - logits(small, ids)).abs().max() < 1e-5
    assert not is_wrapped(model) and not hasattr(model.config, "ppnet") and is_accelerated(model) == accelerated
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ppnet.sort_(model, "magnitude")
    ordered = ppnet.draft(model, 0.8)  # its order ranks the units, nothing else has to
    assert (logits(ordered, ids) - logits(small, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("accelerated", [False, True])
def test_sliding_windows(accelerated):
    """What a window has forgotten comes back when drafted tokens are taken back."""
    model, ids = sorted_model("mistral", accelerated, sliding_window=5), token_ids(1, 9)
    expected = greedy(model, ids)
    assert not torch.equal(expected, greedy(sorted_model("mistral", sliding_window=None), ids))
    for size, length in ((0.6, 7), (1.0, 3)):
        found = ppnet.speculate(model, size, ids, max_new_tokens=NEW, draft_length=length)
        assert torch.equal(found.sequences, expected)
    assert found.accepted > 0


def test_ends():
    """eos among accepted tokens, as the token after them, as the first; lengths of 1; prompts of 1; (T,) ids."""
    model = sorted_model()
    ids, small = token_ids(1, 7), ppnet.draft(model, 0.8)
    whole = greedy(model, ids, eos_token_id=None)[0, 7:].tolist()
    for token in list(dict.fromkeys(whole))[:4]:
        for length in (0, 3):
            expected = greedy(model, ids, eos_token_id=token)
            found = ppnet.speculate(model, small, ids, max_new_tokens=NEW, eos_token_id=token, draft_length=length)
            assert torch.equal(found.sequences, expected)
            several = ppnet.speculate(model, small, ids, max_new_tokens=NEW, eos_token_id=[token, 0])
            assert torch.equal(several.sequences, greedy(model, ids, eos_token_id=[token, 0]))
    model.generation_config.eos_token_id = whole[3]
    assert ppnet.speculate(model, small, ids, max_new_tokens=NEW).new_tokens == whole.index(whole[3]) + 1
    assert ppnet.speculate(model, small, ids, max_new_tokens=NEW, eos_token_id=None).new_tokens == NEW
    for new in (1, 2, 3):
        found = ppnet.speculate(model, small, ids, max_new_tokens=new, eos_token_id=None, draft_length=7)
        assert found.sequences[0, 7:].tolist() == whole[:new] and found.proposed <= max(0, new - 2) + (new > 2)
    one = torch.tensor([5])
    expected = greedy(model, one[None], eos_token_id=None)
    assert torch.equal(ppnet.speculate(model, small, one, max_new_tokens=NEW, eos_token_id=None).sequences, expected)


def test_logits_too_close_to_call():
    """Without the decode operators, rounding may change which of two equal logits is the largest."""
    torch.manual_seed(0)
    rechecked = 0
    for seed in range(2):
        model = tiny("llama", seed=seed, dtype=torch.bfloat16)
        with torch.no_grad():
            model.lm_head.weight[48:] = model.lm_head.weight[:48]  # the first of two equal ones is generate's
        ppnet.sort_(model, "magnitude")
        ids = token_ids(1, 7, seed=seed)
        found = ppnet.speculate(model, 1.0, ids, max_new_tokens=NEW, draft_length=4, eos_token_id=None)
        assert torch.equal(found.sequences, greedy(model, ids, eos_token_id=None))
        rechecked += found.rechecked
    assert rechecked > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", DECODERS)
def test_a_verification_computes_tokens_as_if_alone(model_type, dtype):
    """What makes greedy output exact: to the bit, with the decode operators, for as many tokens as are verified."""
    wide = {"n_inner" if model_type == "gpt2" else "intermediate_size": 64}
    model, ids = ppnet.accelerate(tiny(model_type, dtype=dtype, **wide)), token_ids(1, 12 + MOST_TOKENS)
    from transformers import DynamicCache

    with torch.no_grad():
        alone, together = DynamicCache(), DynamicCache()
        model(ids[:, :12], past_key_values=alone), model(ids[:, :12], past_key_values=together)
        single = [model(ids[:, i : i + 1], past_key_values=alone).logits for i in range(12, ids.shape[1])]
        assert torch.equal(torch.cat(single, 1), model(ids[:, 12:], past_key_values=together).logits)
    assert _tie(model) == 0.0
    other = {name: width - 20 for name, width in wide.items()}
    assert (_tie(ppnet.accelerate(tiny(model_type, dtype=dtype, **other))) == 0.0) == (dtype == torch.float32)
    assert _tie(ppnet.decelerate(model)) > 0.0


def test_a_width_that_fills_no_whole_vectors_is_rechecked():
    model = ppnet.accelerate(tiny("llama", dtype=torch.bfloat16, hidden_size=48, intermediate_size=64))
    assert _tie(model) > 0.0


def test_gates_of_one_kind_verify_in_half_precision():
    model = ppnet.wrap(
        tiny("llama", dtype=torch.bfloat16, intermediate_size=64), ppnet.PuppetConfig(kinds=("kv_group",))
    )
    ppnet.accelerate(model.eval())
    ppnet.resize(model, 0.9)
    found = ppnet.speculate(model, 0.8, token_ids(1, 6), max_new_tokens=6, eos_token_id=None)
    assert found.new_tokens == 6


def test_a_draft_from_before_sorting_is_refused():
    model = ppnet.wrap(tiny("llama"), ppnet.PuppetConfig()).eval()
    small = ppnet.draft(model, 0.8)
    ppnet.sort_(model)
    with pytest.raises(PPNetError, match=r"draft_size: a draft that was made before ppnet\.sort_"):
        ppnet.speculate(model, small, token_ids(1, 6), max_new_tokens=4)
    ppnet.speculate(model, ppnet.draft(model, 0.8), token_ids(1, 6), max_new_tokens=4)


def test_what_changes_samples_in_other_ways_is_refused():
    model = ppnet.wrap(tiny("llama"), ppnet.PuppetConfig()).eval()
    model.generation_config.min_p = 0.9
    with pytest.raises(PPNetError, match=r"min_p=0\.9"):
        ppnet.speculate(model, 0.8, token_ids(1, 6), max_new_tokens=4, do_sample=True)
    ppnet.speculate(model, 0.8, token_ids(1, 6), max_new_tokens=4)


# ---- one set of weights ----------------------------------------------------------------------------------------------


WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_draft_copies_no_weights(accelerated):
    model = sorted_model(accelerated=accelerated, **WIDE)
    plan, made = ppnet.plan(model, 0.5), []
    ppnet.draft(model, plan)  # whatever is made once
    allocated = peak_bytes(lambda: made.append(ppnet.draft(model, plan)))
    small = made[0]
    theirs = dict(model.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in small.named_parameters())
    assert allocated < 0.05 * plan.cost.bytes
    found = memory(model, small)
    assert found.weights == sum(storages((*model.parameters(), *model.buffers())).values())
    assert found.draft_weights == plan.cost.bytes and found.draft_own < 0.03 * plan.cost.bytes
    result = ppnet.speculate(model, small, token_ids(1, 6), max_new_tokens=8)
    per_token = 2 * 3 * 8 * 8 * 4  # k and v of 3 layers, 8 groups of 8, float32
    held = result.sequences.shape[1] - 1
    assert result.memory.cache == held * per_token and 0 < result.memory.draft_cache < held * per_token
    # An unsorted model without the operators has its units gathered, and says so.
    gathered = memory(model := trained(tiny("llama", **WIDE)), ppnet.draft(model, 0.5))
    assert gathered.draft_own > 0.9 * (gathered.draft_weights - model.puppet.costs.fixed.bytes)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_draft_follows_the_weights(accelerated):
    model = sorted_model(accelerated=accelerated)
    small, ids = ppnet.draft(model, 0.7), token_ids(1, 6)
    before = logits(small, ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj.weight" in name:
                parameter.mul_(1.3)
    after = logits(small, ids)
    assert (after - before).abs().max() > 0.01
    with ppnet.resize(model, engine_of(small).fixed):
        assert torch.equal(logits(model, ids), after)


def test_a_draft_stands_alone():
    model, ids = sorted_model(), token_ids(1, 6)
    small, expected = ppnet.draft(model, 0.7), logits(model, ids)
    alone = logits(small, ids)
    ppnet.resize(small, 0.9)
    assert torch.equal(logits(model, ids), expected) and engine_of(model).fixed is None
    ppnet.resize(model, 0.6)
    ppnet.resize(small, 0.7)
    assert torch.equal(logits(small, ids), alone)
    again = copy.deepcopy(small)
    assert not storages(again.parameters()).keys() & storages(model.parameters()).keys()
    assert torch.equal(logits(again, ids), alone)
    assert {t.device for t in tensors_of(small)} == {torch.device("cpu")}


def test_modes_return():
    model = sorted_model().train()
    small = ppnet.draft(model, 0.7)
    assert model.training and not small.training
    ppnet.speculate(model, small, token_ids(1, 6), max_new_tokens=4)
    assert model.training and engine_of(model).fixed is None


# ---- how many tokens to draft ----------------------------------------------------------------------------------------


def test_closed_form():
    assert expected_tokens(1.0, 3) == 4 and expected_tokens(0.0, 3) == 1
    assert expected_tokens(0.8, 5) == pytest.approx((1 - 0.8**6) / (1 - 0.8))
    # Table 1 of Leviathan et al. 2023: alpha, gamma, c -> speed.
    for alpha, gamma, cost, speed in (
        (0.6, 2, 0.0, 1.96),
        (0.7, 3, 0.0, 2.53),
        (0.8, 5, 0.0, 3.69),
        (0.9, 10, 0.0, 6.86),
    ):
        assert expected_speedup(alpha, gamma, cost) == pytest.approx(speed, abs=0.01)


def run(pace, acceptance, draft_cost, verify_cost, rounds, source):
    """Rounds of a made-up pair; the lengths that it chose."""
    lengths = []
    for _ in range(rounds):
        length = pace.length(LONGEST)
        stay = next((i for i in range(length) if torch.rand((), generator=source) > acceptance), length)
        pace.observe(length, stay, stay < length, draft_cost * length, verify_cost(length + 1))
        lengths.append(length)
    return lengths


@pytest.mark.parametrize(
    "acceptance, draft_cost", [(0.95, 0.05), (0.8, 0.2), (0.6, 0.3), (0.3, 0.1), (0.3, 0.8), (0.05, 0.3)]
)
def test_the_length_is_the_best_one(acceptance, draft_cost):
    def verify(tokens):
        return 1 + 0.05 * (tokens - 1)

    speeds = [expected_speedup(acceptance, n, draft_cost, verify(n + 1)) for n in range(LONGEST + 1)]
    pace, source = Pace(), torch.Generator().manual_seed(0)
    lengths = run(pace, acceptance, draft_cost, verify, 400, source)[100:]
    assert pace.acceptance == pytest.approx(acceptance, abs=0.15)
    assert statistics.mean(speeds[n] for n in lengths) > 0.93 * max(speeds)


def test_the_length_follows_a_change():
    pace, source = Pace(), torch.Generator().manual_seed(0)
    assert statistics.median(run(pace, 0.95, 0.1, lambda n: 1.0, 100, source)[FIRST_ROUNDS:]) >= 5
    assert statistics.median(run(pace, 0.05, 0.4, lambda n: 1.0, 400, source)[-100:]) == 0
    assert statistics.median(run(pace, 0.95, 0.1, lambda n: 1.0, 800, source)[-100:]) >= 5


def test_a_draft_remembers_its_pace():
    model = sorted_model()
    small, ids = ppnet.draft(model, 0.8), token_ids(1, 6)
    rounds = 0
    for _ in range(2):
        rounds += len(ppnet.speculate(model, small, ids, max_new_tokens=NEW, eos_token_id=None).lengths)
    pace = small.__dict__["_ppnet_pace"]
    assert pace.rounds == rounds and pace.draft_seconds > 0 and pace.verify_seconds(3) > 0
    ppnet.speculate(model, small, ids, max_new_tokens=NEW, draft_length=2)
    assert pace.rounds == rounds


# ---- wrong requests --------------------------------------------------------------------------------------------------


def test_refusals():
    model, ids = sorted_model(), token_ids(1, 6)
    small = ppnet.draft(model, 0.7)
    for options, error, message in (
        ({"input_ids": token_ids(3, 6)}, DataError, "input_ids: 3 sequences.*takes one"),
        ({"input_ids": ids[:, :0]}, DataError, r"input_ids: got \(1, 0\)"),
        ({"input_ids": ids.float()}, DataError, r"of torch\.float32; give int64 ids"),
        ({"input_ids": ids + 96}, DataError, r"the model's are in \[0, 96\)"),
        ({"max_new_tokens": 59}, DataError, "exceed the model's context of 64 tokens; ask for at most 58"),
        ({"max_new_tokens": 0}, PPNetError, "max_new_tokens: 0 must be at least 1"),
        ({"temperature": 0.0}, PPNetError, "temperature: 0.0 must be above 0"),
        ({"top_p": 1.5}, PPNetError, r"top_k, top_p: 0, 1\.5"),
        ({"draft_length": 8}, PPNetError, "draft_length: 8 must be 0 to 7"),
        ({"eos_token_id": "end"}, PPNetError, "eos_token_id: 'end' must be an id"),
        ({"draft_size": model}, PPNetError, "draft_size: the model itself"),
        ({"draft_size": tiny("llama", vocab_size=97)}, PPNetError, "a model of 97 tokens.*the target has 96"),
        ({"metric": "flops"}, PPNetError, "metric: only used to make a plan"),
    ):
        with refused(model, error, message):
            ppnet.speculate(model, **{"draft_size": small, "input_ids": ids, "max_new_tokens": 4, **options})
    with refused(dense := tiny("llama"), PlanError, "scores: None, and this LlamaForCausalLM has no gates"):
        ppnet.speculate(dense, 0.5, ids, max_new_tokens=4)
    with refused(model, UnsupportedModelError, "is an encoder"):
        ppnet.draft(tiny("bert"), 0.5)
    small_one = ppnet.compact(model, 0.6)
    with pytest.raises(UnsupportedModelError, match="already compacted"):
        ppnet.draft(small_one, 0.5)
    model.generation_config.repetition_penalty = 1.2
    with pytest.raises(PPNetError, match=r"repetition_penalty=1\.2, which speculate does not apply"):
        ppnet.speculate(model, small, ids)
