"""Sampled tokens of ppnet.speculate have the target's distribution, by tests that a wrong rule fails."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from helpers import tiny
from scipy import stats
from test_sort import trained

import ppnet
from ppnet.speculation.acceptance import Sampled, Verdict

VOCABULARY, NEW, RUNS = 4, 4, 400


def p_value(found, expected):
    """Of Pearson's chi-squared test; cells that expect fewer than 5 are put together."""
    total = sum(found.values())
    large = {key: p * total for key, p in expected.items() if p * total >= 5}
    rest = total - sum(large.values())
    observed = [found.get(key, 0) for key in large]
    cells, counts = list(large.values()), observed
    if rest > 0:
        cells, counts = [*cells, rest], [*observed, total - sum(observed)]
    assert all(key in expected for key in found)
    return stats.chisquare(counts, [c * total / sum(cells) for c in cells]).pvalue


@pytest.fixture(scope="module")
def pair():
    """A target and a draft that disagree about tokens more often than not."""
    changes = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "pad_token_id": None, "max_position_embeddings": 16}
    model = ppnet.sort_(trained(tiny("llama", seed=3, **changes)))
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model, ppnet.draft(model, 0.62)


def sequences(model, prompt, **warp):
    """Probability of every continuation of NEW tokens, by one pass over all of them."""
    every = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=NEW)))
    ids = torch.cat([torch.tensor([prompt]).expand(len(every), -1), every], 1)
    with torch.no_grad():
        logits = model(ids).logits[:, len(prompt) - 1 : -1].double()
    p = Sampled(**warp).probabilities(logits.flatten(0, 1)).view(*logits.shape)
    each = p.gather(2, every[..., None])[..., 0].prod(1).tolist()
    return {tuple(row): value for row, value in zip(every.tolist(), each, strict=True) if value > 0}


def sampled(pair, prompt, length, seed, **warp):
    source = torch.Generator().manual_seed(seed)
    found: Counter = Counter()
    accepted = rejected = 0
    for _ in range(RUNS):
        result = ppnet.speculate(
            *pair, prompt, max_new_tokens=NEW, do_sample=True, draft_length=length, generator=source,
            eos_token_id=None, **warp,
        )  # fmt: skip
        found[tuple(result.sequences[0, len(prompt) :].tolist())] += 1
        accepted, rejected = accepted + result.accepted, rejected + result.rejected
    return found, accepted / (accepted + rejected)


PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.mark.parametrize(
    "warp, length", [(PLAIN, 2), (PLAIN, 1), ({"temperature": 0.6, "top_k": 3, "top_p": 0.9}, 2)], ids=str
)
def test_the_distribution_is_the_targets(pair, warp, length):
    found, acceptance = sampled(pair, [1, 2, 3], length, 0, **warp)
    assert p_value(found, sequences(pair[0], [1, 2, 3], **warp)) > 1e-3
    assert 0.3 < acceptance < 0.95
    # Neither has the draft that distribution, which these runs are enough to see.
    theirs = sequences(pair[1], [1, 2, 3], **warp)
    assert any(key not in theirs for key in found) or p_value(found, theirs) < 1e-9


@pytest.mark.parametrize("wrong", ["accept all", "redraw from p"])
def test_a_wrong_rule_is_seen(pair, wrong, monkeypatch):
    right = Sampled.judge

    def judge(self, logits, proposed, drawn_from):
        if wrong == "accept all":
            return Verdict(len(proposed), self.draw(self.probabilities(logits)[-1]), False)
        verdict = right(self, logits, proposed, drawn_from)
        return Verdict(verdict.accepted, self.draw(self.probabilities(logits)[verdict.accepted]), verdict.rejected)

    monkeypatch.setattr(Sampled, "judge", judge)
    found, _ = sampled(pair, [1, 2, 3], 2, 0, **PLAIN)
    assert p_value(found, sequences(pair[0], [1, 2, 3], **PLAIN)) < 1e-4


def test_the_rule_itself():
    """One drafted token, 20,000 times: tokens are distributed as p, and stay as often as sum min(p, q)."""
    source = torch.Generator().manual_seed(0)
    rule = Sampled(**PLAIN, generator=source)
    logits, draft = torch.randn(2, 5, generator=source), torch.randn(5, generator=source)
    p, q = rule.probabilities(logits)[0], rule.probabilities(draft[None])[0]
    found, stayed = Counter(), 0
    for _ in range(20_000):
        token, drawn_from = rule.propose(draft)
        verdict = rule.judge(logits, [token], [drawn_from])
        stayed += verdict.accepted
        found[token if verdict.accepted else verdict.next] += 1
        assert verdict.rejected == (not verdict.accepted)
    assert p_value(found, dict(enumerate(p.tolist()))) > 1e-3
    assert stats.binomtest(stayed, 20_000, float(torch.minimum(p, q).sum())).pvalue > 1e-3


def test_seeds_and_limits(pair):
    model, small = pair

    def run(**options):
        options = {"do_sample": True, "max_new_tokens": 8, "eos_token_id": None, "draft_length": 3, **options}
        return ppnet.speculate(model, small, [1, 2], **options).sequences[0].tolist()

    first = [run(generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    assert first == [run(generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    assert len({tuple(one) for one in first}) > 1
    likeliest = run(do_sample=False)
    assert run(top_k=1) == run(top_p=1e-6) == run(temperature=1e-3) == likeliest


def test_a_draft_that_is_the_whole_model(pair):
    model = pair[0]
    result = ppnet.speculate(model, 1.0, [1, 2], max_new_tokens=13, do_sample=True, draft_length=3, eos_token_id=None)
    assert result.acceptance == 1.0 and result.tokens_per_verification == 4.0
