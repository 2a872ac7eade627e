"""Speculative decoding with one set of weights: the draft is a small size of the target (`draft`, `speculate`)."""

from ppnet.speculation.decoding import Speculation, speculate
from ppnet.speculation.drafts import Memory, draft
from ppnet.speculation.pace import expected_speedup, expected_tokens

__all__ = ["Memory", "Speculation", "draft", "expected_speedup", "expected_tokens", "speculate"]
