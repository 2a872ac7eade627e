"""Model folders for tests of the report and the command line: a tiny Llama with a character tokenizer, and text."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ppnet.checkpoint import save
from ppnet.cli import main
from ppnet.gates import PuppetConfig
from ppnet.wrap import wrap

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,\n|"
TEXT = "the cat sat on the mat, and the dog sat on the log.\n"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with BOS 1 and EOS 2."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{c: 3 + i for i, c in enumerate(ALPHABET)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex("[\\s\\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def model() -> LlamaForCausalLM:
    """3 layers, 4 KV groups of 2 query heads, 44 neurons, 40 tokens of vocabulary, context 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=44, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def puppet() -> LlamaForCausalLM:
    """The tiny model with gates whose thresholds and amplitudes differ from layer to layer, as after training."""
    gated = wrap(model(), PuppetConfig())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        gated.puppet.theta.add_(0.3 * torch.randn(gated.puppet.theta.shape, generator=generator))
        gated.puppet.s_gate.add_(0.3 * torch.randn(gated.puppet.s_gate.shape, generator=generator))
        gated.puppet.s_out.add_(0.1 * torch.randn(gated.puppet.s_out.shape, generator=generator))
    return gated


def write_folders(root: Path) -> dict[str, Path]:
    """Folders ``dense`` and ``puppet`` with a tokenizer, and the file ``text``."""
    found = {"dense": root / "dense", "puppet": root / "puppet", "text": root / "text.txt"}
    save(model(), found["dense"], tokenizer())
    save(puppet(), found["puppet"], tokenizer())
    found["text"].write_text(TEXT * 20, encoding="utf-8")
    return found


def run_command(capsys, *arguments: object) -> tuple[int, str, str]:
    """Runs a command in this process: (exit code, stdout, stderr)."""
    capsys.readouterr()
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
