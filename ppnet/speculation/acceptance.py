"""Which drafted tokens stay: by equality for greedy decoding, by the rule of Leviathan et al. 2023 for sampling.

The rule (arXiv 2211.17192, algorithm 1): a token x that was drawn from the draft's q stays with probability
min(1, p(x) / q(x)); the first that does not is drawn anew from max(0, p - q), normalised. Tokens are then distributed
as the target's p, whatever q is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Two logits closer than this, relative to the largest one's magnitude, may change places by rounding, where a pass of
# several tokens adds up in another order than passes of one.
TIES = {torch.float64: 2.0**-44, torch.float32: 2.0**-17, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@dataclass(frozen=True)
class Verdict:
    """What the target says of drafted tokens.

    Attributes:
        accepted: how many stay, from the first.
        next: the token after these; None: too close to call, look at it in a pass of its own.
        rejected: whether a drafted token was there in its place and did not stay.
    """

    accepted: int
    next: int | None
    rejected: bool


class Greedy:
    """The target's likeliest token, always.

    Args:
        tie: distance of two logits, relative to the largest, below which a verification is not believed; 0: it always
            is, as passes of several tokens compute each of them to the bit as passes of one do.
    """

    def __init__(self, tie: float = 0.0) -> None:
        self.tie = tie

    def propose(self, logits: Tensor) -> tuple[int, None]:
        """The draft's token from its logits ``(V,)``."""
        return int(logits.argmax()), None

    def judge(self, logits: Tensor, proposed: Sequence[int], drawn_from: Sequence[None]) -> Verdict:
        """Verdict on k proposed tokens from the target's logits ``(k + 1, V)``."""
        close = self.close(logits) if self.tie and proposed else [False] * len(logits)
        for place, token in enumerate(logits.argmax(-1).tolist()):
            if close[place]:
                return Verdict(place, None, False)
            if place == len(proposed) or token != proposed[place]:
                return Verdict(place, token, place < len(proposed))
        raise AssertionError("logits are of one position more than tokens were proposed")

    def close(self, logits: Tensor) -> list[bool]:
        """Of every position, whether its two largest logits may change places by rounding."""
        first, second = logits.topk(2, dim=-1).values.unbind(-1)
        return list((first - second <= self.tie * logits.abs().amax(-1)).tolist())


class Sampled:
    """Draws from the model's distribution, changed as `transformers` changes it: temperature, top-k, top-p.

    Args:
        generator: source of all draws; None: torch's global one.
    """

    def __init__(self, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None = None) -> None:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.generator = generator
        # In the order in which generate applies them.
        self.warpers = LogitsProcessorList()
        if temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(float(top_p)))

    def probabilities(self, logits: Tensor) -> Tensor:
        """``(N, V)`` of the changed distribution."""
        ids: Any = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)  # no warper here reads them
        return torch.softmax(self.warpers(ids, logits), dim=-1)

    def draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self.generator))

    def propose(self, logits: Tensor) -> tuple[int, Tensor]:
        """The draft's token from its logits ``(V,)``, and the distribution that it was drawn from ``(V,)``."""
        q = self.probabilities(logits[None])[0]
        return self.draw(q), q

    def judge(self, logits: Tensor, proposed: Sequence[int], drawn_from: Sequence[Tensor]) -> Verdict:
        """Verdict on k proposed tokens from the target's logits ``(k + 1, V)`` and the draft's distributions."""
        every = self.probabilities(logits)
        for place, (token, q) in enumerate(zip(proposed, drawn_from, strict=True)):
            p = every[place]
            if float(torch.rand((), generator=self.generator, device=p.device)) * float(q[token]) < float(p[token]):
                continue
            rest = (p - q).clamp(min=0)
            # p and q that are equal up to rounding leave nothing: then p itself is what is left.
            return Verdict(place, self.draw(rest if float(rest.sum()) > 0 else p), True)
        return Verdict(len(proposed), self.draw(every[-1]), False)
