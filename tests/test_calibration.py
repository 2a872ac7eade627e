"""Calibration data of every kind: the same tokens whatever they come in, padding marked, bad data refused."""

from __future__ import annotations

import json

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
    # padding goes to the right, where no position depends on it
    assert batch["attention_mask"].tolist() == [[1] * 7 + [0] * 5, [1] * 12]
    assert torch.equal(batch["input_ids"][0, :7], ids[0, 5:]) and torch.equal(batch["input_ids"][1], ids[1])
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    labels = ids.clone()
    labels[:, :4] = -100  # a prompt: no label, but no padding
    labels[1, 9:] = -100
    (batch,) = calibration_batches(MODEL, [{"input_ids": ids, "labels": labels}])
    assert torch.equal(batch["labels"], labels)
    assert batch["attention_mask"].sum(1).tolist() == [12, 9]
    rated = [{"input_ids": IDS[:5], "rewards": 1.0, "groups": 0}, {"input_ids": IDS[:9], "rewards": 0.0, "groups": 0}]
    (batch,) = calibration_batches(MODEL, rated)
    assert batch["rewards"].tolist() == [1.0, 0.0] and batch["groups"].tolist() == [0, 0]


def test_padding_on_the_left_moves_no_position():
    import ppnet

    model = tiny("gpt2")
    rows = [IDS[:12] + 3, IDS[20:27] + 3]
    ids, mask = torch.zeros(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, 12 - len(tokens) :], mask[row, 12 - len(tokens) :] = tokens, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    for method in ("taylor", "activation"):
        expected = ppnet.score(model, rows, method)
        for name, units in ppnet.score(model, batch, method).items():
            torch.testing.assert_close(units, expected[name])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert ppnet.score(model, {**batch, "position_ids": positions}, "activation").tokens == 17
    with pytest.raises(DataError, match="position_ids are not used"):
        calibration_batches(model, {**batch, "position_ids": torch.arange(12).expand(2, 12)})


def rated(*groups, size=8):
    return [{"input_ids": IDS[i : i + size], "rewards": float(i % 2), "groups": g} for i, g in enumerate(groups)]


def test_completions_stay_whole():
    for options in ({"length": 6}, {}):
        size = 8 if options else 65
        with pytest.raises(DataError, match=f"with rewards and groups has {size} tokens, more than the .* not cut"):
            calibration_batches(MODEL, rated(0, 0, size=size), **options)
    (batch,) = calibration_batches(MODEL, rated(0, 0, 0, 1, 1, 1, 2, 2), max_tokens=30)
    assert batch["groups"].tolist() == [0, 0, 0, 1, 1, 1]
    (batch,) = calibration_batches(MODEL, iter(rated(0, 0, 1, 1, 2, 2)), max_tokens=20)
    assert batch["groups"].tolist() == [0, 0, 1, 1]
    (batch,) = calibration_batches(MODEL, rated(0, 1, 2, 0, 1, 2), max_tokens=10)
    assert batch["groups"].tolist() == [0, 1, 0, 1]


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
        (IDS, {"length": 1}, "length: must be an integer of at least 2 .*, got 1"),
        (IDS, {"length": "8"}, "length: must be an integer of at least 2 .*, got '8'"),
        (IDS, {"length": 65}, "more than the model's context of 64"),
        (IDS[:10], {"length": 20}, "fewer than one block of length=20"),
        (IDS, {"batch_size": 0}, "batch_size: must be an integer of at least 1, got 0"),
        (IDS, {"batch_size": 2.5}, "batch_size: must be an integer"),
        (IDS, {"max_tokens": 1}, "max_tokens: must be an integer of at least 2, or None for all, got 1"),
        (IDS, {"max_tokens": 1e2}, "max_tokens: must be an integer"),
        (IDS, {"seed": "x"}, "seed: must be an integer"),
        (b"abc", {}, "data: b'abc' are bytes"),
        ("missing/file.txt", {}, "^data: 'missing/file.txt' does not exist"),
        (torch.tensor([[3, 200]]), {}, "^data: token id 200"),
        ([{"input_ids": IDS[:4], "rewards": 1.0, "groups": "a"}], {}, "groups must be one number"),
        ([{"input_ids": IDS[:4], "rewards": 1.0, "groups": 0.5}], {}, "groups must be integers"),
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


CHATS = [
    {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d e"}], "source": "x"},
    {"messages": [{"role": "user", "content": "f"}, {"role": "assistant", "content": "g"}], "source": "y"},
]
TEMPLATE = "{% for m in messages %}<s> {{ m.content }} </s> {% endfor %}"


def test_chats_are_written_by_the_template(tmp_path):
    from datasets import Dataset

    tokenizer = words()
    tokenizer.chat_template = TEMPLATE
    first, second = ([WORDS[word] for word in text.split()] for text in ("<s> a b </s> <s> c d e </s>",
                                                                        "<s> f </s> <s> g </s>"))  # fmt: skip
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    other = [{"talk": row["messages"]} for row in CHATS]
    for data in (CHATS, Dataset.from_list(CHATS), iter(CHATS), file, str(file), [file], other):
        (batch,) = calibration_batches(MODEL, data, tokenizer, column="talk" if data is other else "text")
        assert batch["input_ids"].tolist() == [first, [*second, 0, 0, 0]]
        assert batch["labels"].tolist() == [first, [*second, -100, -100, -100]]
        assert batch["attention_mask"].sum(1).tolist() == [9, 6]
    rewarded = [{**row, "rewards": float(i), "groups": 0} for i, row in enumerate(CHATS)]
    assert calibration_batches(MODEL, rewarded, tokenizer)[0]["rewards"].tolist() == [0, 1]
    texts = [{**row, "text": "a b c d"} for row in CHATS]  # the named column wins
    assert calibration_batches(MODEL, texts, tokenizer)[0]["input_ids"][0, :5].tolist() == [3, 4, 5, 6, 2]


def test_chats_that_cannot_be_written():
    tokenizer = words()
    with pytest.raises(DataError, match=r"tokenizer: .* has no chat template.*'messages'"):
        calibration_batches(MODEL, CHATS, tokenizer)
    with pytest.raises(DataError, match=r"tokenizer: None, but 'messages' are chats"):
        calibration_batches(MODEL, CHATS)
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(DataError, match=r"row 1 has no chat under 'messages' \(\['messages'\]\)"):
        calibration_batches(MODEL, [CHATS[0], {"messages": "a"}], tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match=r"the chat template refuses row 0 .*no system role"):
        calibration_batches(MODEL, CHATS, tokenizer)


def test_text_needs_a_tokenizer():
    with pytest.raises(DataError, match="tokenizer: None"):
        calibration_batches(MODEL, "some text")
