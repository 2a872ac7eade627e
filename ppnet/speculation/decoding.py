"""Speculative decoding: a draft proposes tokens, its target verifies all of them in one pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.evaluate.model_state import device_of
from ppnet.families import FAMILIES, check_decoder
from ppnet.modes import evaluating
from ppnet.ops.linear_decode import DTYPES, MOST_TOKENS, has_kernels
from ppnet.plan import Plan
from ppnet.size import Size, refuse_options
from ppnet.speculation.acceptance import TIES, Greedy, Sampled, Verdict
from ppnet.speculation.arguments import check_config, check_options, check_pair, prompt_ids, stops
from ppnet.speculation.drafts import Memory, draft, memory
from ppnet.speculation.pace import Pace
from ppnet.wrap import engine_of, is_accelerated, is_wrapped

PACE = "_ppnet_pace"
# Neurons, and features of the model's width, that whole vectors of any instruction set hold in half precision: of
# neurons several rows at a time.
WHOLE, VECTOR = 64, 32
# Tokens of a prompt that an accelerated draft reads through the decode operators.
SHORT = 8 * MOST_TOKENS


@dataclass(frozen=True)
class Speculation:
    """What `speculate` generated, and how.

    Attributes:
        sequences: ``(1, T + N)`` int64: the prompt and the new tokens, as `generate` returns them.
        new_tokens: N.
        verifications: passes of the target after the prompt's.
        proposed, accepted: drafted tokens, and how many of them stayed.
        rejected: rounds in which one did not; what follows it in a round was never judged.
        rechecked: rounds whose logits were too close for a pass of several tokens, and were computed in one of their
            own (greedy, without the decode operators).
        lengths: drafted tokens of every round.
        seconds: wall time: of all, of the target's reading the prompt, of drafting (the draft's reading of the prompt
            included), of verifying.
        memory: bytes (`Memory`).
    """

    sequences: Tensor
    new_tokens: int
    verifications: int
    proposed: int
    accepted: int
    rejected: int
    rechecked: int
    lengths: tuple[int, ...]
    seconds: float
    prompt_seconds: float
    draft_seconds: float
    verify_seconds: float
    memory: Memory

    @property
    def acceptance(self) -> float:
        """Probability that a drafted token stays, given that all before it did: Leviathan's alpha."""
        return self.accepted / max(1, self.accepted + self.rejected)

    @property
    def tokens_per_verification(self) -> float:
        """New tokens per pass of the target, the first one not counted, which the prompt's pass gives."""
        return (self.new_tokens - 1) / max(1, self.verifications)

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second after the first."""
        return (self.new_tokens - 1) / max(self.seconds - self.prompt_seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: everything, with the ratios."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("sequences", "memory")},
            "sequences": self.sequences.tolist(),
            "memory": vars(self.memory),
            "acceptance": self.acceptance,
            "tokens_per_verification": self.tokens_per_verification,
            "tokens_per_s": self.tokens_per_s,
        }

    def __str__(self) -> str:
        own, extra = self.memory.weights, self.memory.draft_own + self.memory.draft_cache
        return (
            f"{self.new_tokens} tokens at {self.tokens_per_s:,.1f} per s, {self.tokens_per_verification:.2f} per "
            f"verification, acceptance {self.acceptance:.3f} ({self.accepted} of {self.proposed} proposed), draft: "
            f"{extra:,} bytes beside the {own:,} of weights"
        )


def speculate(
    model: nn.Module,
    draft_size: Size | Plan | nn.Module,
    input_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | str | None = "model",
    draft_length: int | None = None,
    generator: torch.Generator | None = None,
    **draft_options: Any,
) -> Speculation:
    """Generates with a small size of a model as its draft: the model's own output, in fewer of its passes.

    The draft proposes tokens, the model verifies them in one pass (Leviathan et al. 2023, arXiv 2211.17192). Greedy
    output is that of ``model.generate(input_ids, do_sample=False)``: of an accelerated model to the bit, as the decode
    operators compute every token of a pass as if it were alone (in half precision, if the width is a multiple of 32 and
    layers have multiples of 64 neurons). Elsewhere tokens whose logits are closer than rounding are computed anew in a
    pass of their own; in half precision keys and values that were rounded in another order can still change one where
    logits are nearly level. Sampled tokens have the model's distribution, whatever the draft is.

    Args:
        model: a causal language model: with gates, at any size, or dense.
        draft_size: what `draft` takes, or the draft itself, which remembers its costs and acceptance from call to
            call. Making one takes longer than a few tokens, so make it once.
        input_ids: ``(1, T)`` or ``(T,)``, T >= 1, without padding. One sequence: of several, each would accept another
            number of tokens.
        max_new_tokens: N at most.
        do_sample: whether to sample; the next three, as in `transformers`, then apply to model and draft alike. The
            generation config's own are not read.
        top_k: 0: all tokens (`generate` takes 50 unless told otherwise).
        eos_token_id: where to stop, one or several; ``"model"``: ``model.generation_config``'s; None: nowhere.
        draft_length: tokens per round, at most 7. None: by measured costs and acceptance, anew in every round. With
            a number, a generator's seed decides what is sampled; without, the times measured do as well.
        generator: source of sampling.
        draft_options: of `draft`, with a size.

    Returns:
        Speculation

    Raises:
        UnsupportedModelError: an encoder, or a model without a head. Also as `draft`.
        DataError: no tokens, several sequences, ids outside the vocabulary, or more tokens than the model's context.
        PPNetError: a value that is not allowed; a generation config that changes tokens in other ways than these.
    """
    check_decoder(model, "tokens to generate")
    check_options(model, max_new_tokens, temperature, top_k, top_p, draft_length)
    check_config(model, do_sample)
    prompt = prompt_ids(model, input_ids, max_new_tokens)
    if isinstance(draft_size, nn.Module):
        refuse_options("draft_size is already a model", **draft_options)
        small = draft_size
    else:
        small = draft(model, draft_size, **draft_options)
    check_pair(model, small)
    pace = small.__dict__.setdefault(PACE, Pace()) if draft_length is None else Pace(draft_length)
    rule = Sampled(temperature, top_k, top_p, generator) if do_sample else Greedy(_tie(model))
    with evaluating(model, small):
        return _Decoding(model, small, prompt, stops(model, eos_token_id), rule, pace).run(max_new_tokens)


class _Reader:
    """A model with its cache of the sequence's first tokens."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import DynamicCache

        # Without the model's config: layers of a sliding window then keep all tokens, so that some can be taken back.
        self.model, self.cache, self.seen = model, DynamicCache(), 0

    def read(self, tokens: Sequence[int], logits: int) -> Tensor:
        """Reads the sequence's next tokens; logits of the last so many, ``(logits, V)``, float32 or float64."""
        ids = torch.tensor([tokens], device=device_of(self.model))
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=logits).logits[0]
        self.seen += len(tokens)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def keep(self, tokens: int) -> None:
        """Forgets all but the first so many tokens."""
        if self.seen > tokens:
            self.cache.crop(tokens - self.seen)
            self.seen = tokens

    def cache_bytes(self) -> int:
        layers: list[Any] = self.cache.layers
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))


class _Decoding:
    """One call: the sequence so far, both models' caches, and counts."""

    def __init__(
        self, model: nn.Module, small: nn.Module, prompt: list[int], stops: set[int], rule: Any, pace: Pace
    ) -> None:
        self.target, self.draft = _Reader(model), _Reader(small)
        self.tokens, self.prompt, self.stops = list(prompt), len(prompt), stops
        self.rule, self.pace = rule, pace
        self.lengths: list[int] = []
        self.accepted = self.rejected = self.rechecked = self.passes = 0
        self.prompt_seconds = self.draft_seconds = self.verify_seconds = 0.0

    def run(self, most: int) -> Speculation:
        start = time.perf_counter()
        first = self.rule.judge(self.target.read(self.tokens, 1), [], [])
        self.prompt_seconds = time.perf_counter() - start
        self.add([first.next], most)
        while not self.done(most):
            self.round(most)
        new = len(self.tokens) - self.prompt
        memory_now = memory(self.target.model, self.draft.model)
        return Speculation(
            sequences=torch.tensor([self.tokens], device=device_of(self.target.model)),
            new_tokens=new,
            verifications=self.passes,
            proposed=sum(self.lengths),
            accepted=self.accepted,
            rejected=self.rejected,
            rechecked=self.rechecked,
            lengths=tuple(self.lengths),
            seconds=time.perf_counter() - start,
            prompt_seconds=self.prompt_seconds,
            draft_seconds=self.draft_seconds,
            verify_seconds=self.verify_seconds,
            memory=replace(memory_now, cache=self.target.cache_bytes(), draft_cache=self.draft.cache_bytes()),
        )

    def done(self, most: int) -> bool:
        return len(self.tokens) - self.prompt >= most or self.tokens[-1] in self.stops

    def add(self, tokens: list[Any], most: int) -> None:
        """Appends new tokens up to the first that ends the sequence."""
        for token in tokens:
            if not self.done(most) or len(self.tokens) == self.prompt:
                self.tokens.append(token)

    def round(self, most: int) -> None:
        """Drafts, verifies, and takes back what did not stay."""
        left = self.prompt + most - len(self.tokens)
        if self.draft.seen == 0 and self.pace.length(left - 1):
            # The draft reads the prompt once; that says nothing of the cost of a token.
            start = time.perf_counter()
            self.read_prompt()
            self.draft_seconds += time.perf_counter() - start
        start = time.perf_counter()
        proposed, drawn_from = self.propose(self.pace.length(left - 1))
        middle = time.perf_counter()
        before = len(self.tokens)
        verdict: Verdict = self.rule.judge(
            self.target.read([self.tokens[-1], *proposed], len(proposed) + 1), proposed, drawn_from
        )
        self.passes += 1
        end = time.perf_counter()
        stay = proposed[: verdict.accepted]
        self.target.keep(before + len(stay))
        self.draft.keep(before + len(stay))
        following = verdict.next
        if following is None:
            following = self.recheck([*self.tokens, *stay])
        self.add([*stay, following], most)
        self.lengths.append(len(proposed))
        self.accepted += verdict.accepted
        self.rejected += verdict.rejected
        self.draft_seconds += middle - start
        self.verify_seconds += time.perf_counter() - middle
        self.pace.observe(len(proposed), verdict.accepted, verdict.rejected, middle - start, end - middle)

    def read_prompt(self) -> None:
        """The draft reads what is there but for the last token, a short prompt a few tokens at a time.

        Passes of many tokens want their kept weights gathered, which takes longer than some through the operators.
        """
        unread = self.tokens[:-1]
        step = MOST_TOKENS if is_accelerated(self.draft.model) and len(unread) <= SHORT else len(unread)
        for start in range(0, len(unread), step):
            self.draft.read(unread[start : start + step], 1)

    def propose(self, length: int) -> tuple[list[int], list[Any]]:
        """Up to `length` tokens of the draft, and the distributions that they were drawn from."""
        proposed: list[int] = []
        drawn_from: list[Any] = []
        unread = self.tokens[self.draft.seen :] if length else []
        while len(proposed) < length:
            token, q = self.rule.propose(self.draft.read(unread, 1)[0])
            proposed.append(token)
            drawn_from.append(q)
            if token in self.stops:
                break
            unread = [token]
        return proposed, drawn_from

    def recheck(self, tokens: list[int]) -> int:
        """The token after these, by a pass of one token as `generate` makes it."""
        self.target.keep(len(tokens) - 1)
        self.passes += 1
        self.rechecked += 1
        verdict: Verdict = self.rule.judge(self.target.read(tokens[-1:], 1), [], [])
        if verdict.next is None:
            raise AssertionError("a pass of one token is always believed")
        return verdict.next


def _tie(model: nn.Module) -> float:
    """How close logits must be for a verification not to be believed."""
    weight: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    exact = is_accelerated(model) and weight.dtype in DTYPES and has_kernels(weight)
    if exact and weight.dtype != torch.float32:
        # What fills no whole vector is added up in an order that depends on the number of tokens.
        fixed = engine_of(model).fixed if is_wrapped(model) else None
        kept = {} if fixed is None else fixed.kept  # of the kinds that are gated
        sites = FAMILIES[str(model.config.model_type).removeprefix("ppnet_")].sites(model)  # type: ignore[union-attr]
        counts = [len(kept.get(site.name, range(site.units))) for site in sites if site.kind == "neuron"]
        exact = weight.shape[1] % VECTOR == 0 and all(count % WHOLE == 0 for count in counts)
    return 0.0 if exact else TIES[weight.dtype]
