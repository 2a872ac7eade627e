"""Perplexity equals a plain one-token-at-a-time computation; speed runs the real decoding and restores the model."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ppnet.errors import DataError, PPNetError
from ppnet.evaluate import perplexity, speed
from ppnet.evaluate.progress import Progress, duration

SHARED = Path(__file__).parents[2] / "shared"


class Characters:
    """A tokenizer for tests: one id per character, BOS 1, as a Hugging Face tokenizer is called."""

    bos_token_id = 1

    def __init__(self, adds_bos: bool = False, shift: int = 0) -> None:
        self.adds_bos = adds_bos
        self.shift = shift

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [3 + self.shift + ord(c) % 29 for c in text]
        return {"input_ids": [1, *ids] if self.adds_bos and add_special_tokens else ids}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=48, bos_token_id=1, eos_token_id=2, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def plain_nll(model, documents, window, stride) -> tuple[float, int]:
    """Token by token, one forward pass per scored token, in float64: the definition."""
    double = model.__class__(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids in documents:
            scored = 0
            for begin in range(0, len(ids), stride):
                end = min(begin + window, len(ids))
                for t in range(max(scored, begin + 1), end):
                    logits = double(ids[begin:t][None]).logits[0, -1]
                    total -= float(torch.log_softmax(logits, -1)[ids[t]])
                    tokens += 1
                scored = end
                if end == len(ids):
                    break
    return total / tokens, tokens


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (48, 48), (48, 1)])
def test_perplexity_is_the_definition(model, window, stride):
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(40, (n,), generator=generator) for n in (70, 3, 33, 2)]
    result = perplexity(model, None, documents, window=window, stride=stride, batch_size=3)
    nll, tokens = plain_nll(model, documents, window, stride)
    assert result.tokens == tokens
    assert result.nll == pytest.approx(nll, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert (result.window, result.stride, result.documents) == (window, stride, 4)


def test_last_partial_window_counts(model):
    ids = torch.arange(45) % 40
    result = perplexity(model, None, ids, window=20)
    assert result.windows == 3
    assert result.tokens == 19 + 19 + 4


def test_batch_size_changes_nothing(model):
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(40, (n,), generator=generator) for n in (7, 48, 20, 31, 2)]
    values = [perplexity(model, None, documents, batch_size=b).nll for b in (1, 2, 8)]
    assert max(values) - min(values) < 1e-6


def test_bos_documents_and_windows(model):
    text = "one two three four|five six|"
    tokenizer = Characters()
    apart = perplexity(model, tokenizer, text, separator="|")
    assert (apart.bos, apart.documents, apart.tokens) == ("document", 2, 18 + 8)
    assert perplexity(model, tokenizer, text, bos="auto").bos == "none"
    assert perplexity(model, Characters(adds_bos=True), text).bos == "document"
    windows = perplexity(model, tokenizer, text, bos="window", window=11)
    assert (windows.windows, windows.tokens) == (3, len(text))  # 10 characters and BOS each
    ids = torch.tensor(tokenizer("x" + text[:9], add_special_tokens=False)["input_ids"])
    by_hand = perplexity(model, None, torch.cat([torch.tensor([1]), ids[1:]]))
    assert perplexity(model, tokenizer, text[:9], bos="window").nll == pytest.approx(by_hand.nll, abs=1e-6)


def test_files_text_and_lists_agree(model, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some words to score", encoding="utf-8")
    tokenizer = Characters()
    from_text = perplexity(model, tokenizer, "some words to score")
    for data in (file, str(file), [file], ["some words to score"]):
        assert perplexity(model, tokenizer, data).nll == from_text.nll
    assert perplexity(model, tokenizer, file, max_tokens=5).tokens == 4


def test_learned_positions_and_padding():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=24, n_head=3, n_layer=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    documents = [torch.arange(9), torch.arange(32), torch.arange(3)]
    together = perplexity(model, None, documents, batch_size=3)
    alone = [perplexity(model, None, ids) for ids in documents]
    assert together.nll == pytest.approx(sum(a.nll * a.tokens for a in alone) / together.tokens, abs=1e-6)


def test_training_flags_return(model):
    model.train()
    model.model.layers[0].eval()
    perplexity(model, None, torch.arange(20))
    speed(model, prompt_tokens=4, new_tokens=2, rounds=1, warmup=0)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    model.eval()


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("", {}, "empty"),
        ("   \n ", {}, "empty"),
        ("x", {}, "too short"),
        ([], {}, "empty"),
        (torch.empty(0, dtype=torch.int64), {}, "no tokens"),
        (torch.tensor([1.0, 2.0]), {}, "integer"),
        (torch.tensor([1, 40]), {}, "id 40 is outside"),
        (torch.tensor([1, -1]), {}, "id -1 is outside"),
        ("missing/file.txt", {}, "cannot read missing/file.txt"),
        (Path("missing"), {}, "cannot read missing"),
        ("some text", {"window": 1}, "window"),
        ("some text", {"window": 49}, "context of 48"),
        ("some text", {"stride": 0}, "stride"),
        ("some text", {"window": 8, "stride": 9}, "stride"),
        ("some text", {"batch_size": 0}, "batch_size"),
        ("some text", {"bos": "maybe"}, "bos"),
        ("some text", {"max_tokens": 1}, "max_tokens"),
        (["text", 3], {}, "only"),
    ],
)
def test_bad_data(model, data, options, words):
    with pytest.raises(DataError, match=words):
        perplexity(model, Characters(), data, **options)


def test_foreign_tokenizer_and_missing_bos(model, tmp_path):
    with pytest.raises(DataError, match="tokenizer does not belong"):
        perplexity(model, Characters(shift=100), "some text")
    with pytest.raises(DataError, match="tokenizer: None"):
        perplexity(model, None, "some text")
    silent = Characters()
    silent.bos_token_id = None
    with pytest.raises(DataError, match="no bos_token_id"):
        perplexity(model, silent, "some text", bos="window")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        perplexity(model, Characters(), binary)


def test_overflow_is_infinite_not_an_error(model):
    class Certain(torch.nn.Module):
        """Puts logit 1000 on id 0."""

        config = SimpleNamespace(max_position_embeddings=16)

        def __init__(self) -> None:
            super().__init__()
            self.embeddings = torch.nn.Embedding(4, 1)

        def get_input_embeddings(self):
            return self.embeddings

        def forward(self, input_ids, use_cache):
            logits = torch.zeros(*input_ids.shape, 4)
            logits[..., 0] = 1000.0
            return SimpleNamespace(logits=logits)

    result = perplexity(Certain(), None, torch.ones(8, dtype=torch.int64))
    assert result.nll == pytest.approx(1000.0)
    assert math.isinf(result.perplexity)


def test_speed_counts_and_ratios(model):
    result = speed(model, prompt_tokens=16, new_tokens=4, batch_size=2, rounds=3, warmup=1, baseline=model)
    assert len(result.prefill.seconds) == len(result.decode.seconds) == 3
    assert result.prefill.p20 <= result.prefill.median <= result.prefill.p80
    assert result.prefill_tokens_per_s == pytest.approx(2 * 16 / result.prefill.median)
    assert result.decode_tokens_per_s == pytest.approx(2 * 4 / result.decode.median)
    assert result.kv_bytes_per_token == 2 * 2 * 2 * 6 * 4  # keys and values, layers, KV heads, head width, float32
    assert result.params == sum(p.numel() for p in model.parameters())
    assert result.weight_bytes == 4 * result.params
    assert result.baseline is not None and result.prefill_ratio > 0 and result.decode_ratio > 0
    assert {"threads", "dtype", "device", "torch", "transformers"} <= set(result.to_dict()["setting"])
    assert "the baseline" in str(result)


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch_size", "rounds"])
def test_speed_refuses_zero(model, name):
    with pytest.raises(PPNetError, match=name):
        speed(model, **{name: 0})


def test_speed_refuses_more_than_the_context(model):
    with pytest.raises(PPNetError, match="context of 48"):
        speed(model, prompt_tokens=40, new_tokens=9)
    with pytest.raises(PPNetError, match="warmup"):
        speed(model, prompt_tokens=4, new_tokens=4, warmup=-1)


def test_progress_waits_then_tells_the_time_left():
    stream = io.StringIO()
    with Progress(10, "work", stream) as progress:
        progress.advance(1)
        assert stream.getvalue() == ""
        progress.start -= 30
        progress.next_line -= 30
        progress.advance(4)
    assert stream.getvalue() == "work:  50 % (5/10), 30 s elapsed, about 30 s left\n"
    assert [duration(s) for s in (7, 200, 3900)] == ["7 s", "3 min 20 s", "1 h 05 min"]


@pytest.mark.skipif(not (SHARED / "models/stories260K").is_dir(), reason="needs ../shared")
def test_stories260k_has_its_known_nll():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = SHARED / "models/stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = SHARED / "data/tinystories/valid.txt"
    result = perplexity(model, tokenizer, text, separator="<|endoftext|>", max_tokens=40_000)
    assert result.nll == pytest.approx(1.30, abs=0.05)
