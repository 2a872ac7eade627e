"""Shared by the tests of encoders: a tiny BERT, sentences of different lengths, a loss."""

from __future__ import annotations

from typing import Any

import torch
from helpers import randomised, token_ids
from scoring import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from ppnet.families import FAMILIES

ROWS = [row[:length] for row, length in zip(token_ids(batch=4, length=12), (12, 5, 9, 2), strict=True)]


def bare(**changes: Any) -> Any:
    """A BertModel with a pooler, in evaluation mode."""
    torch.manual_seed(0)
    return randomised(BertModel(BertConfig(**{**FAMILIES["bert"].tiny_configs("bert"), **changes}))).eval()


def pooled_loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """A fixed direction of the mean hidden state: (B,)."""
    hidden = output.last_hidden_state
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None].to(hidden)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return mean @ torch.linspace(-1, 2, hidden.shape[-1], dtype=hidden.dtype)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of ten words that puts <s> before and </s> behind a sentence."""
    tokenizer: Any = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", cls_token="<s>", sep_token="</s>")


def hidden(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state
