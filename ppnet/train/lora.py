"""Low-rank adapters (PEFT) for healing: attached, trained, merged. PEFT is imported on first use."""

from __future__ import annotations

from typing import Any

from ppnet.errors import PPNetError
from ppnet.families import is_decoder


def with_lora(model: Any, lora: int | Any) -> Any:
    """The model with adapters on all its linear modules except the head; only they learn.

    Args:
        model: a `PreTrainedModel`; layers of different widths are fine.
        lora: the rank, or a PEFT ``LoraConfig``.

    Raises:
        PPNetError: PEFT is missing, the rank is not an integer >= 1, or adapters are attached already.
    """
    try:
        import peft
    except ImportError as error:
        raise PPNetError("lora: needs PEFT; pip install ppnet[lora], or leave it out to train all weights.") from error
    if hasattr(model, "peft_config"):
        raise PPNetError("model: PEFT adapters are attached already; merge them first (model.merge_and_unload()).")
    if isinstance(lora, int) and not isinstance(lora, bool):
        if lora < 1:
            raise PPNetError(f"lora: the rank must be at least 1, got {lora}.")
        lora = peft.LoraConfig(
            r=lora, lora_alpha=2 * lora, target_modules="all-linear", fan_in_fan_out=_stores_inputs_first(model),
            task_type="CAUSAL_LM" if is_decoder(model) else "FEATURE_EXTRACTION",
        )  # fmt: skip
    elif not isinstance(lora, peft.LoraConfig):
        raise PPNetError(f"lora: {lora!r} is neither a rank nor a peft.LoraConfig.")
    return peft.get_peft_model(model, lora)


def _stores_inputs_first(model: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def merge_lora(adapted: Any, model: Any) -> None:
    """Adds trained adapters to the weights of `model` and takes every trace of them off.

    Args:
        adapted: what `with_lora` returned for `model`.
    """
    merged = adapted.merge_and_unload()
    if merged is not model:
        raise PPNetError(f"lora: merging gave another {type(merged).__name__} than the one the adapters were put on.")
    # PEFT leaves these behind, and a model that has them counts as one with adapters.
    for name in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(name, None)
