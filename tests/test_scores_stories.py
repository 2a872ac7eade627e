"""Scores on a trained model and real text: what is worth its forward passes must beat drawing lots."""

from __future__ import annotations

from pathlib import Path

import pytest

import ppnet
from ppnet.scores import score_methods

# Beside the repository, or beside the folder of its worktrees.
SHARED = next((p / "shared" for p in Path(__file__).resolve().parents[2:4] if (p / "shared").is_dir()), Path("shared"))
STORIES, TEXT = SHARED / "models/stories260K", SHARED / "data/tinystories"


@pytest.mark.skipif(not STORIES.is_dir() or not TEXT.is_dir(), reason="needs ../shared")
def test_scores_beat_random_removal():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    stories = [story.strip() for story in (TEXT / "train.txt").read_text()[:60_000].split("<|endoftext|>")]
    held_out = (TEXT / "valid.txt").read_text()[:20_000]
    methods = {name: (name, {}) for name in ("random", "activation", "taylor", "mama")}
    made = score_methods(model, [s for s in stories if s], methods, tokenizer=tokenizer, length=256, max_tokens=2**13)
    draws = [made.pop("random"), *(ppnet.score(model, method="random", seed=seed) for seed in (1, 2))]

    def nll(scores, size, allocation="uniform"):
        small = ppnet.compact(model, size, of="gated", scores=scores, allocation=allocation, check=False)
        return ppnet.evaluate.perplexity(
            small, tokenizer, held_out, separator="<|endoftext|>", max_tokens=2500, progress=False
        ).nll

    for size in (0.75, 0.5):
        lots = [nll(scores, size) for scores in draws]
        for name, scores in made.items():
            assert nll(scores, size) < min(lots) - 0.2, (name, size, lots)
    # ranks within a kind over all layers can be compared between layers
    assert nll(made["mama"], 0.75, "global") < min(nll(draws[0], 0.75), nll(draws[1], 0.75)) - 0.2
