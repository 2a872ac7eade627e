"""What `speculate` takes and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.errors import DataError, PPNetError, UnsupportedModelError
from ppnet.evaluate.model_state import context_of, device_of, vocabulary_of
from ppnet.families import predicts_tokens
from ppnet.speculation.pace import LONGEST
from ppnet.units import ORDER

# Entries of a generation config that change which tokens `generate` gives, and what leaves them unchanged.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "stop_strings": (),
}
# Of those, what changes sampled tokens only.
NEUTRAL_SAMPLED: dict[str, tuple[Any, ...]] = {
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "top_h": (),
}


def stops(model: Any, eos_token_id: int | Sequence[int] | str | None) -> set[int]:
    if isinstance(eos_token_id, str):
        if eos_token_id != "model":
            raise PPNetError(f"eos_token_id: {eos_token_id!r} must be an id, several, 'model' (its own) or None.")
        eos_token_id = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    return {int(token) for token in ids}


def prompt_ids(model: nn.Module, input_ids: Tensor | Sequence[int], new: int) -> list[int]:
    """The prompt's ids. Raises DataError."""
    ids = torch.as_tensor(input_ids)
    if ids.dim() == 2 and len(ids) > 1:
        raise DataError(
            f"input_ids: {len(ids)} sequences; speculative decoding takes one, as each would accept another number of "
            "tokens. Call it for each, or decode all at once with model.generate(input_ids)."
        )
    if ids.dim() not in (1, 2) or ids.numel() == 0 or ids.is_floating_point():
        raise DataError(
            f"input_ids: got {tuple(ids.shape)} of {ids.dtype}; give int64 ids of shape (1, T) or (T,), T >= 1."
        )
    tokens = [int(token) for token in ids.flatten().tolist()]
    vocabulary, context = vocabulary_of(model), context_of(model)
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise DataError(f"input_ids: ids from {min(tokens)} to {max(tokens)}; the model's are in [0, {vocabulary}).")
    if context is not None and len(tokens) + new > context:
        raise DataError(
            f"max_new_tokens: {new} and the prompt's {len(tokens)} exceed the model's context of {context} tokens; ask "
            f"for at most {max(0, context - len(tokens))}, or shorten the prompt."
        )
    return tokens


def check_options(model: Any, new: int, temperature: float, top_k: int, top_p: float, draft_length: int | None) -> None:
    """Raises PPNetError, UnsupportedModelError."""
    if not predicts_tokens(model):
        raise UnsupportedModelError(
            f"model: a {type(model).__name__} has no head that predicts tokens; load it with AutoModelForCausalLM."
        )
    if new < 1:
        raise PPNetError(f"max_new_tokens: {new} must be at least 1.")
    if not temperature > 0:
        raise PPNetError(f"temperature: {temperature} must be above 0; do_sample=False is the limit of 0.")
    if top_k < 0 or not 0 < top_p <= 1:
        raise PPNetError(f"top_k, top_p: {top_k}, {top_p}; top_k must be at least 0 (all tokens), top_p in (0, 1].")
    if draft_length is not None and not 0 <= draft_length <= LONGEST:
        raise PPNetError(f"draft_length: {draft_length} must be 0 to {LONGEST}, or None to choose it by measuring.")


def check_config(model: Any, do_sample: bool) -> None:
    """Raises PPNetError where the generation config changes tokens in ways that are not applied here."""
    config = getattr(model, "generation_config", None)
    for name, neutral in (NEUTRAL | NEUTRAL_SAMPLED if do_sample else NEUTRAL).items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            raise PPNetError(
                f"model: its generation_config has {name}={value!r}, which speculate does not apply, so that its "
                f"output would not be generate's; set model.generation_config.{name} = None first."
            )


def check_pair(model: Any, small: Any) -> None:
    """Raises PPNetError."""
    if small is model:
        raise PPNetError(
            "draft_size: the model itself, whose size cannot be two at once; give ppnet.draft(model, size)."
        )
    shared = small.get_input_embeddings().weight is model.get_input_embeddings().weight
    if shared and getattr(small.config, ORDER, None) != getattr(model.config, ORDER, None):
        raise PPNetError(
            "draft_size: a draft that was made before ppnet.sort_ moved the model's units, so it keeps others now; "
            "make it anew: ppnet.draft(model, size)."
        )
    if vocabulary_of(small) != vocabulary_of(model) or device_of(small) != device_of(model):
        raise PPNetError(
            f"draft_size: a model of {vocabulary_of(small)} tokens on {device_of(small)}; the target has "
            f"{vocabulary_of(model)} on {device_of(model)}, and both must be the same."
        )
