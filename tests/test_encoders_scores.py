"""Encoders as data and scores see them: sentences with special tokens, padding that does not count, a given loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoders import ROWS, bare, pooled_loss, words
from helpers import GatedReference, tiny
from scoring import permute
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertJapaneseTokenizer,
)

import ppnet
from ppnet.calibration import calibration_batches
from ppnet.compact import compact
from ppnet.errors import DataError, PPNetError
from ppnet.families import FAMILIES, structure_of
from ppnet.scores import score, score_methods

WITH_LOSS = {
    "taylor": ("taylor", {}),
    "squared": ("taylor", {"sign": "squared"}),
    "movement": ("movement", {}),
    "mama": ("mama", {}),
    "obs": ("obs", {}),
    "activation": ("activation", {}),
    "bias": ("bias", {}),
}


# ---- data ------------------------------------------------------------------------------------------------------------


def test_sentences_keep_their_special_tokens_and_have_no_labels(tmp_path):
    model = bare()
    (batch,) = calibration_batches(model, ["a b c", " ", "d"], words())
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[1, 3, 4, 5, 2], [1, 6, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    (cut,) = calibration_batches(model, ["a b c", "d"], words(), length=4)
    assert cut["input_ids"].tolist() == [[1, 3, 4, 2], [1, 5, 2, 0], [1, 6, 2, 0]]
    file = tmp_path / "text.txt"
    file.write_text("a b\nc\n\n")
    for data, options in ((file, {"separator": "\n"}), ([{"text": "a b"}, {"text": "c"}], {})):
        (batch,) = calibration_batches(model, data, words(), **options)
        assert batch["input_ids"].tolist() == [[1, 3, 4, 2], [1, 5, 2, 0]]
    assert len(calibration_batches(model, ["a b"] * 100, words(), max_tokens=20)[0]["input_ids"]) == 5
    with pytest.raises(DataError, match=r"length: 2 leaves no room beside the tokenizer's 2 special tokens"):
        calibration_batches(model, ["a"], words(), length=2)
    with pytest.raises(DataError, match="tokenizer: None"):
        calibration_batches(model, ["a"])
    with pytest.raises(DataError, match="data: holds no sequence"):
        calibration_batches(model, [" "], words())


def test_ids_and_labels_are_taken_as_they_are():
    model = bare()
    (batch,) = calibration_batches(model, [[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]] and "labels" not in batch
    labels = torch.tensor([[-100, 9, -100, -100]])
    (batch,) = calibration_batches(model, {"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": labels})
    # What follows the last label is no padding where attention looks both ways.
    assert torch.equal(batch["labels"], labels) and batch["input_ids"].shape == (1, 4)
    assert torch.equal(calibration_batches(model, torch.arange(3, 9))[0]["input_ids"], torch.arange(3, 9)[None])


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_padding_does_not_count():
    model = bare().double()
    alone = score_methods(model, ROWS, WITH_LOSS, loss=pooled_loss, batch_size=1)
    together = score_methods(model, ROWS, WITH_LOSS, loss=pooled_loss, batch_size=3)
    ids = torch.full((4, 14), 7)
    mask = torch.zeros_like(ids)
    for row, sentence in enumerate(ROWS):
        ids[row, : len(sentence)], mask[row, : len(sentence)] = sentence, 1
    filled = score_methods(model, {"input_ids": ids, "attention_mask": mask}, WITH_LOSS, loss=pooled_loss)
    for method, units in alone.items():
        for name in units:
            for other in (together, filled):
                torch.testing.assert_close(other[method][name], units[name], rtol=1e-9, atol=1e-12, msg=method)
    assert alone["activation"].tokens == sum(map(len, ROWS))


def test_gradients_of_a_given_loss_against_plain_autograd():
    model = bare().double()
    structure = structure_of(model)
    gates = torch.ones(structure.total_units, dtype=torch.float64, requires_grad=True)
    rows = []
    with GatedReference(model, structure, gates):
        for ids in ROWS:
            loss = pooled_loss(model(input_ids=ids[None]), {"input_ids": ids[None]})
            rows.append(torch.autograd.grad(loss.sum(), gates, retain_graph=True)[0])
    expected = torch.stack(rows).abs().sum(0).split([site.units for site in structure.sites])
    found = score(model, ROWS, "taylor", loss=pooled_loss)
    for site, units in zip(structure.sites, expected, strict=True):
        torch.testing.assert_close(found[site.name], units / len(ROWS), rtol=1e-9, atol=1e-12)


def test_permuting_units_permutes_scores():
    model = bare().double()
    methods = {**WITH_LOSS, "magnitude": ("magnitude", {}), "paths": ("magnitude", {"form": "paths"})}
    before = score_methods(model, ROWS, methods, loss=pooled_loss)
    orders = {site.name: torch.randperm(site.units) for site in structure_of(model).sites}
    for site in structure_of(model).sites:
        permute(model, site, orders[site.name])
    after = score_methods(model, ROWS, methods, loss=pooled_loss)
    for method in methods:
        for name, order in orders.items():
            torch.testing.assert_close(after[method][name], before[method][name][order], rtol=1e-9, atol=1e-12)


def test_kl_of_a_model_with_logits_needs_no_loss():
    kl = score(tiny("bert"), ROWS, "kl")
    assert kl.tokens == sum(map(len, ROWS)) and all((units > 0).all() for units in kl.values())


def test_what_needs_a_loss_or_logits_says_so():
    for model in (bare(), tiny("bert")):
        for method in ("taylor", "movement", "mama"):
            with pytest.raises(PPNetError, match=r"^loss: None, .*encoder.* give loss=\(the model's output, batch\)"):
                score(model, ROWS, method)
        with pytest.raises(PPNetError, match=r"^method: rewards are of completions"):
            score(model, ROWS, "reward")
        assert score(model, method="random") and score(model, method="magnitude")
    with pytest.raises(PPNetError, match=r"^loss: None, .*BertModel is an encoder"):
        score(bare(), ROWS, "obs")
    assert score(bare(), ROWS, "obs", weighting="output") and score(tiny("bert"), ROWS, "obs")
    guarded = {"kl": 0.5}
    for options in ({}, {"loss": pooled_loss}):
        with pytest.raises(PPNetError, match=r'BertModel has no logits of tokens; .* weights=\{"kl": 0\}'):
            score(bare(), ROWS, "mama", weights=guarded, **options)
    with pytest.raises(PPNetError, match=r'^loss: fisher information .*weights=\{"kl": 0\}'):
        score(tiny("bert"), ROWS, "mama", weights=guarded, loss=lambda output, batch: output.logits.sum((1, 2)))


def test_labels_of_whole_sequences_reach_the_loss():
    """A classifier's: one number per sequence, from rows or from batches."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**FAMILIES["bert"].tiny_configs("bert"), num_labels=3)).eval()
    labels, seen = [2, 0, 1, 1], []

    def loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
        seen.append(batch["labels"].tolist())
        return torch.nn.functional.cross_entropy(output.logits, batch["labels"], reduction="none")

    rows = [{"input_ids": row, "labels": label} for row, label in zip(ROWS, labels, strict=True)]
    alone = score(model, rows, "taylor", loss=loss, batch_size=3)
    assert seen == [[2, 0, 1], [1]]
    (padded,) = calibration_batches(model, rows, batch_size=4)
    assert padded["labels"].tolist() == labels and padded["attention_mask"].sum() == sum(map(len, ROWS))
    together = score(model, padded, "taylor", loss=loss)
    for name, units in alone.items():
        torch.testing.assert_close(together[name], units, rtol=1e-4, atol=1e-9)
    with pytest.raises(DataError, match="sequence with labels has 12 tokens, more than the 8"):
        score(model, rows, "taylor", loss=loss, length=8)
    small = compact(model, 0.8, scores="magnitude")
    assert ppnet.heal(small, model, rows, steps=1, hidden=1.0, progress=False) is small


def test_second_sentences_are_refused_and_tokenizers_in_python_are_read(tmp_path):
    pair = {"input_ids": ROWS[0], "token_type_ids": [0] * 6 + [1] * 6}
    with pytest.raises(DataError, match=r"^data: token_type_ids are not used, and these are not all 0; give"):
        score(bare(), [pair], "activation")
    pair["token_type_ids"] = [0] * 12
    assert score(bare(), [pair], "activation")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertJapaneseTokenizer(
        str(tmp_path / "vocab.txt"), word_tokenizer_type="basic", subword_tokenizer_type="character"
    )
    rows = calibration_batches(bare(), ["abc de", "hhh"], tokenizer, length=4, batch_size=8)[0]
    assert rows["input_ids"].tolist() == [
        [2, 5, 6, 3], [2, 7, 8, 3], [2, 9, 3, 0], [2, 12, 12, 3], [2, 12, 3, 0]
    ]  # fmt: skip
