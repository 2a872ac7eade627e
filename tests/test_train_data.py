"""Text to blocks: packing, documents, sources, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from torch import Tensor

from ppnet.errors import DataError
from ppnet.train import check_vocabulary, text_blocks

EOS, BOS = 1, 2


class Characters:
    """A tokenizer of one token per character, with the calling convention of transformers."""

    eos_token_id: int | None = EOS
    bos_token_id: int | None = BOS

    def __call__(self, texts: list[str], add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def rows(blocks: Any) -> list[list[int]]:
    return [blocks[i]["input_ids"].tolist() for i in range(len(blocks))]


def test_packing_joins_documents_with_eos() -> None:
    blocks = text_blocks(["abc", "", "de"], Characters(), 3)
    assert rows(blocks) == [ids("abc"), [EOS, *ids("de")]]
    assert (blocks.tokens, blocks.dropped) == (6, 1)
    item = blocks[-1]
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert torch.equal(item["labels"], item["input_ids"])
    with pytest.raises(IndexError, match=r"index: 2 must be in \[-2, 2\)"):
        blocks[2]
    assert rows(text_blocks(["abc"], Characters(), 5, bos=True)) == [[BOS, *ids("abc"), EOS]]


def test_documents_of_their_own_are_padded_and_unlabelled_there() -> None:
    blocks = text_blocks(["abcde", "f", "g" * 7], Characters(), 4, pack=False, bos=True)
    assert rows(blocks) == [
        [BOS, *ids("abc")],
        [*ids("de"), EOS, EOS],
        [BOS, *ids("f"), EOS, EOS],
        [BOS, *ids("ggg")],
        [*ids("gggg")],
    ]
    assert blocks[1]["labels"].tolist() == [*ids("de"), EOS, -100]
    assert blocks[-4]["labels"].tolist() == [*ids("de"), EOS, -100]
    # The last document's eos is alone in its block, where it predicts nothing.
    assert (blocks.tokens, blocks.dropped) == (18, 1)


def test_files_lists_and_separators(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("ab<|end|>cd", encoding="utf-8")
    lines.write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in ("ab", "cd")) + "\n\n", encoding="utf-8")
    expected = [[*ids("ab"), EOS], [*ids("cd"), EOS]]
    assert rows(text_blocks(text, Characters(), 3, separator="<|end|>")) == expected
    assert rows(text_blocks(str(lines), Characters(), 3)) == expected
    assert rows(text_blocks([str(lines), lines], Characters(), 3)) == expected * 2
    assert rows(text_blocks(text, Characters(), 12)) == [[*ids("ab<|end|>cd"), EOS]]


def test_datasets_and_iterables() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"body": ["ab", "cd"]})
    expected = [[*ids("ab"), EOS], [*ids("cd"), EOS]]
    assert rows(text_blocks(data, Characters(), 3, column="body")) == expected
    assert rows(text_blocks(data.to_iterable_dataset(), Characters(), 3, column="body")) == expected
    endless = ({"text": "ab"} for _ in iter(int, 1))
    assert text_blocks(endless, Characters(), 3, max_tokens=10).tokens == 9
    tokenised = datasets.Dataset.from_dict({"input_ids": [[5, 6], [7, 8]]})
    assert rows(text_blocks(tokenised, None, 2)) == [[5, 6], [7, 8]]
    assert rows(text_blocks(tokenised, Characters(), 3)) == [[5, 6, EOS], [7, 8, EOS]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_token_ids(dtype: torch.dtype) -> None:
    blocks = text_blocks(torch.arange(10, dtype=dtype), length=4)
    assert rows(blocks) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert blocks.dropped == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", r"'nowhere\.txt' does not exist; .*\[text\]"),
        (Path("."), "is a folder"),
        ([], "holds no text"),
        (["", ""], "holds no text"),
        (["abc"], r"has 4 tokens, fewer than one block of length=8 needs"),
        (torch.zeros(2, 2, dtype=torch.long), r"shape \(2, 2\) and dtype torch\.int64; they must be 1-D integers"),
        (torch.zeros(9), "dtype torch.float32"),
        (7, "is of type int"),
        ([3, 4], "holds a int; documents must be strings"),
        ([{"body": "x"}], r"column: 'text' with text is not in an example; its keys are \['body'\]"),
    ],
)
def test_bad_sources(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_blocks(source, Characters(), 8)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        text_blocks(tmp_path / "latin.txt", Characters(), 4)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2 is not JSON"):
        text_blocks(tmp_path / "bad.jsonl", Characters(), 4)
    with pytest.raises(DataError, match=r"missing\.txt' does not exist"):
        text_blocks([tmp_path / "bad.jsonl", tmp_path / "missing.txt"], Characters(), 4)


def test_bad_options() -> None:
    with pytest.raises(DataError, match="length: 1 must be >= 2"):
        text_blocks(["abc"], Characters(), 1)
    with pytest.raises(DataError, match="tokenizer: None is allowed for token ids only"):
        text_blocks(["abc"], None, 2)
    plain = Characters()
    plain.bos_token_id = None
    with pytest.raises(DataError, match=r"no bos_token_id for bos=True; set tokenizer\.bos_token\."):
        text_blocks(["abc"], plain, 2, bos=True)
    with pytest.raises(DataError, match="every document has fewer than 2 tokens"):
        text_blocks(torch.tensor([3]), None, 2, pack=False)


@pytest.mark.parametrize(("bad", "shown"), [(96, "96"), (-1, "-1")])
def test_ids_outside_the_vocabulary(bad: int, shown: str) -> None:
    model = tiny("llama")
    size = model.get_input_embeddings().num_embeddings
    values: Tensor = torch.tensor([3, 4, size if bad > 0 else bad, 5])
    shown = str(size) if bad > 0 else shown
    with pytest.raises(DataError, match=f"token id {shown} is outside the model's vocabulary of {size}"):
        check_vocabulary(values, model)
    with pytest.raises(DataError, match="tokenizer does not match"):
        text_blocks(values, None, 2, model=model)
    check_vocabulary(torch.tensor([0, size - 1]), model)


def test_blocks_do_not_exceed_the_models_context() -> None:
    for model_type in ("llama", "gpt2"):
        model = tiny(model_type)
        assert len(text_blocks(torch.arange(64), length=64, model=model)) == 1
        with pytest.raises(DataError, match=r"length: 65 tokens are more than the model's context of 64"):
            text_blocks(torch.arange(70), length=65, model=model)
