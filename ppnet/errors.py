"""The errors ppnet raises on bad input. Each message names the argument, its value, what is allowed and what to do."""

from __future__ import annotations


class PPNetError(ValueError):
    """Base class: a request that ppnet cannot carry out as asked."""


class UnsupportedModelError(PPNetError):
    """The model's structure is unknown, already gated, already compacted, quantised, or wrapped by adapters."""


class SizeError(PPNetError):
    """The asked size cannot be met: above dense, or below one unit per layer plus what is never removed."""


class PlanError(PPNetError):
    """A plan does not fit the model it is applied to."""


class CheckpointError(PPNetError):
    """A checkpoint is missing, truncated, or was not written by ppnet."""


class DataError(PPNetError):
    """Text or token ids are empty, too short, or do not fit the model's vocabulary."""


class TrainingError(PPNetError, RuntimeError):
    """Training cannot go on: a loss or gradient is NaN or infinite."""


class EquivalenceError(PPNetError, RuntimeError):
    """A compacted model does not reproduce the masked model's logits.

    Attributes:
        distance: by how much they differ, of the largest logit; infinite where there are none to compare.
    """

    distance: float = float("inf")
