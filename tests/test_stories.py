"""Real trained models (../shared, skipped without it): a story model through gates, sizes and compaction; a sorter."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppnet
from ppnet.evaluate import perplexity
from ppnet.train import PuppetTrainer, default_arguments, text_blocks

SHARED = Path(__file__).parents[2] / "shared"
STORIES, SORTER = SHARED / "models/stories260K", SHARED / "models/gpt-nano-sort"
TEXT = SHARED / "data/tinystories"
SEPARATOR = "<|endoftext|>"
needs_stories = pytest.mark.skipif(not STORIES.is_dir() or not TEXT.is_dir(), reason="needs ../shared")
needs_sorter = pytest.mark.skipif(not SORTER.is_dir(), reason="needs ../shared")


def stories():
    return AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)


def nll(model, tokenizer):
    """Of the first 20,000 characters of the held-out stories, each its own sequence with BOS."""
    text = (TEXT / "valid.txt").read_text()[:20_000]
    return perplexity(model, tokenizer, text, separator=SEPARATOR, progress=False).nll


def sample_logits(model):
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


@needs_stories
def test_gates_and_sizes_of_a_trained_model():
    model, tokenizer = stories()
    plain = nll(model, tokenizer)
    assert 1.2 < plain < 1.45
    dense = sample_logits(model)
    ppnet.wrap(model)
    assert torch.equal(sample_logits(model), dense)
    assert nll(model, tokenizer) == plain
    with ppnet.resize(model, 0.5, metric="flops") as half:
        masked, masked_nll = sample_logits(model), nll(model, tokenizer)
    small = ppnet.compact(model, half.plan)
    assert sum(p.numel() for p in small.parameters()) == half.cost.params
    assert (sample_logits(small) - masked).abs().max() <= 1e-5 * masked.abs().max()
    assert nll(small, tokenizer) == pytest.approx(masked_nll, rel=1e-5)
    assert masked_nll > plain + 0.5
    assert torch.equal(sample_logits(ppnet.unwrap(model)), dense)


@needs_stories
def test_a_short_training_makes_half_the_units_enough_for_more(tmp_path):
    """60 small steps: half the gated units lose much of what removing them cost, and the dense model keeps its NLL."""
    model, tokenizer = stories()
    dense = nll(model, tokenizer)
    ppnet.wrap(model, ppnet.PuppetConfig(gate_lr=3e-2))

    def at_half():
        with ppnet.resize(model, 0.5, of="gated"):
            return nll(model, tokenizer)

    before = at_half()
    documents = (TEXT / "train.txt").read_text()[:200_000].split(SEPARATOR)
    blocks = text_blocks([story.strip() for story in documents], tokenizer, 128, bos=True, progress=False)
    arguments = default_arguments(
        tmp_path, max_steps=60, per_device_train_batch_size=4, save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    PuppetTrainer(model, arguments, train_dataset=blocks).train()
    # Measured: dense 1.282 -> 1.323, half 5.52 -> 4.27.
    assert at_half() < before - 0.5
    assert nll(model, tokenizer) < dense + 0.1


@needs_sorter
def test_the_sorter_sorts_after_gates_and_compaction():
    model = AutoModelForCausalLM.from_pretrained(SORTER).eval()
    inputs = torch.tensor(list(product(range(3), repeat=6)))[::9]

    def sorts(sorter):
        """Share of inputs whose six greedy digits are the input sorted."""
        ids = inputs
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, sorter(ids[:, -11:]).logits[:, -1:].argmax(dim=-1)], dim=1)
        return float((ids[:, 6:] == inputs.sort(dim=1).values).all(dim=1).double().mean())

    assert sorts(model) == 1.0
    ppnet.wrap(model)
    for size in (1.0, 0.9, 0.5):
        with ppnet.resize(model, size):
            masked = sorts(model)
        small = ppnet.compact(model, size, check=True)
        assert sorts(small) == masked
        assert masked == 1.0 if size == 1.0 else masked < 1.0
    assert sorts(model) == 1.0
