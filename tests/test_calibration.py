"""Calibration data of every kind: the same tokens whatever they come in, padding marked, bad data refused."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from scoring import TEXT, WORDS, words
from torch.utils.data import DataLoader

from ppnet.calibration import calibration_batches, tokens_of
from ppnet.errors import DataError
from ppnet.train import text_blocks

MODEL = tiny("llama")


IDS = torch.tensor([WORDS[word] for word in TEXT.split()])


def flat(batches, name="input_ids"):
    return torch.cat([batch[name].flatten() for batch in batches])


def test_text_files_and_ids_give_the_same_blocks(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    expected = torch.cat([IDS, torch.tensor([WORDS["</s>"]])])[:300].view(-1, 20)
    for data in (TEXT, file, str(file), [TEXT], [file], [{"text": TEXT}], iter([{"text": TEXT}])):
        batches = calibration_batches(MODEL, data, words(), length=20, batch_size=4)
        assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 3]
        assert torch.equal(flat(batches).view(-1, 20), expected)
        assert torch.equal(flat(batches, "labels"), flat(batches)) and all(
            b.keys() == {"input_ids", "labels"} for b in batches
        )
        assert sum(map(tokens_of, batches)) == 300
    for ids in (IDS, IDS.tolist(), IDS.numpy(), IDS.int()):
        assert torch.equal(flat(calibration_batches(MODEL, ids, length=20)), IDS)
    with_bos = calibration_batches(MODEL, TEXT, words(add_bos=True), length=20)[0]["input_ids"]
    assert with_bos[0, 0] == 1 and torch.equal(with_bos[0, 1:], IDS[:19])
    assert calibration_batches(MODEL, TEXT, words(add_bos=True), length=20, bos=False)[0]["input_ids"][0, 0] == IDS[0]


def test_datasets_and_loaders():
    from datasets import Dataset

    rows = [{"input_ids": IDS[i * 20 : i * 20 + 20].tolist()} for i in range(10)]
    blocks = text_blocks(IDS[:200], length=20)
    loader = DataLoader(blocks, batch_size=3)
    for data in (Dataset.from_list(rows), rows, IDS[:200].view(10, 20), [r["input_ids"] for r in rows], blocks, loader):
        batches = calibration_batches(MODEL, data, batch_size=4)
        assert torch.equal(flat(batches), IDS[:200]) and [len(b["input_ids"]) for b in batches] == [4, 4, 2]
        assert all("attention_mask" not in batch for batch in batches)
    text = calibration_batches(MODEL, Dataset.from_list([{"text": TEXT}, {"text": "a b c"}]), words(), length=20)
    assert flat(text).numel() == 300


def test_sequences_are_padded_and_cut():
    rows = [IDS[:7], IDS[7:12], IDS[12:15], IDS[20:21], IDS[30:70]]
    first, second = calibration_batches(MODEL, rows, length=30, batch_size=3)
    assert first["input_ids"].shape == (3, 7)
    assert first["attention_mask"].sum(1).tolist() == [7, 5, 3]
    assert torch.equal(first["labels"] == -100, first["attention_mask"] == 0)
    assert second["input_ids"].shape == (2, 30) and second["attention_mask"].sum(1).tolist() == [30, 10]
    assert tokens_of(second) == 40


def test_labels_and_masks_are_kept():
    ids = IDS[:24].view(2, 12)
    left = torch.ones_like(ids)
    left[0, :5] = 0
    (batch,) = calibration_batches(MODEL, {"input_ids": ids, "attention_mask": left})
    assert torch.equal(batch["attention_mask"], left) and torch.equal(batch["input_ids"], ids)
    assert torch.equal(batch["labels"], ids.masked_fill(left == 0, -100))
    labels = ids.clone()
    labels[:, :4] = -100  # a prompt: no label, but no padding
    labels[1, 9:] = -100
    (batch,) = calibration_batches(MODEL, [{"input_ids": ids, "labels": labels}])
    assert torch.equal(batch["labels"], labels)
    assert batch["attention_mask"].sum(1).tolist() == [12, 9]
    rated = [{"input_ids": IDS[:5], "rewards": 1.0, "groups": 0}, {"input_ids": IDS[:9], "rewards": 0.0, "groups": 0}]
    (batch,) = calibration_batches(MODEL, rated)
    assert batch["rewards"].tolist() == [1.0, 0.0] and batch["groups"].tolist() == [0, 0]


def test_max_tokens_and_seed():
    few = [flat(calibration_batches(MODEL, IDS, length=10, max_tokens=50, seed=seed)) for seed in (0, 0, 1)]
    assert all(ids.numel() == 50 for ids in few)
    assert torch.equal(few[0], few[1]) and not torch.equal(few[0], few[2])
    blocks = {tuple(row) for row in IDS.view(-1, 10).tolist()}
    assert {tuple(row) for row in few[2].view(-1, 10).tolist()} <= blocks
    endless = ({"input_ids": IDS[:10]} for _ in iter(int, 1))
    assert sum(map(tokens_of, calibration_batches(MODEL, endless, max_tokens=35))) == 40
    endless = ({"text": TEXT} for _ in iter(int, 1))
    assert sum(map(tokens_of, calibration_batches(MODEL, endless, words(), max_tokens=60, length=20))) == 60
    assert flat(calibration_batches(MODEL, IDS, max_tokens=None)).numel() <= 300
    assert calibration_batches(MODEL, IDS[:9])[0]["input_ids"].shape == (1, 8)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("", {}, "data: the given text is empty"),
        ([], {}, "data: is empty"),
        ([""], {}, "holds no text"),
        ("missing/file.txt", {}, "does not exist"),
        (torch.tensor([3]), {}, "1 tokens"),
        ([[3], [4]], {}, "no sequence of at least 2 tokens"),
        (torch.tensor([[3, 200]]), {}, "token id 200 is outside the model's vocabulary of 96"),
        (IDS, {"length": 1}, "length: 1 must be >= 2"),
        (IDS, {"length": 65}, "more than the model's context of 64"),
        (IDS[:10], {"length": 20}, "fewer than one block of length=20"),
        (IDS, {"batch_size": 0}, "batch_size: 0"),
        (IDS, {"max_tokens": 1}, "max_tokens: 1"),
        (IDS.float(), {}, "1-D integers"),
        (IDS.float().view(2, -1), {}, "dtype torch.float32"),
        ({"input_ids": IDS[:4], "labels": IDS[:3]}, {}, "labels have shape"),
        ([{"input_ids": IDS[:4]}, {"ids": IDS[:4]}], {}, "an example has no input_ids"),
        ([{"words": "a"}], {}, "column: 'text'"),
        (7, {}, "int cannot be read"),
        ([{"input_ids": IDS[:4], "rewards": [1.0, 2.0]}], {}, "one number per sequence"),
    ],
)
def test_bad_data_is_refused(data, options, message):
    with pytest.raises(DataError, match=message):
        calibration_batches(MODEL, data, words(), **options)


def test_text_needs_a_tokenizer():
    with pytest.raises(DataError, match="tokenizer: None"):
        calibration_batches(MODEL, "some text")
