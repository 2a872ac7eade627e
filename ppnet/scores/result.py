"""Scores of a model's units: what `ppnet.plan` ranks by. Saved as safetensors with its origin in the metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ppnet.checks import number
from ppnet.errors import CheckpointError, PPNetError
from ppnet.scores.combine import combined

FORMAT = "ppnet.scores/1"


class Scores(Mapping[str, Tensor]):
    """Site name (``layers.0.neuron``) -> float64 (U,), one score per unit; higher stays.

    Attributes:
        method: how they were made: the name of a scorer, ``movement`` of a training run, or a sum of such.
        options: the method's options that were given, as JSON can say them.
        model_type: `config.model_type` of the model.
        tokens: predicted tokens that they rest on (0: weights alone).
        order: the order that `ppnet.sort_` had put the model's units into; "" for none.
    """

    def __init__(
        self,
        units: Mapping[str, Tensor],
        *,
        method: str,
        model_type: str,
        options: Mapping[str, Any] | None = None,
        tokens: int = 0,
        order: str = "",
    ) -> None:
        self._units = {name: torch.as_tensor(value).detach().double().cpu().clone() for name, value in units.items()}
        self.method, self.model_type, self.tokens, self.order = method, model_type, tokens, order
        self.options = {name: _sayable(value) for name, value in (options or {}).items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._units[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._units)

    def __len__(self) -> int:
        return len(self._units)

    def __eq__(self, other: object) -> bool:
        """Whether these are the same numbers, made by the same method for the same kind of model."""
        if not isinstance(other, Scores):
            return NotImplemented
        same = self.method == other.method and self._shape() == other._shape()
        return same and all(torch.equal(units, other[name]) for name, units in self.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        units = sum(len(value) for value in self.values())
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return (
            f"Scores({self.method!r}{options}: {units:,} units of {len(self)} sites, {self.model_type}, "
            f"{self.tokens:,} tokens)"
        )

    @classmethod
    def combine(cls, scores: Sequence[Scores], weights: Sequence[float] | None = None, form: str = "ranks") -> Scores:
        """One score out of several of the same model.

        Args:
            scores: at least one.
            weights: a number >= 0 for each; None: 1.
            form: ``"ranks"``: the weighted sum of ranks within each kind of unit; ``"product"``: of powers of
                values >= 0.

        Raises:
            PPNetError: none, other sites or models, or a wrong number of weights.
        """
        if not isinstance(scores, Sequence) or not all(isinstance(one, Scores) for one in scores):
            raise PPNetError(f"scores: must be a list of ppnet.Scores, got {scores!r:.80}; put them into [...].")
        if not scores:
            raise PPNetError("scores: none given; give at least one ppnet.Scores.")
        weights = [1.0] * len(scores) if weights is None else weights
        if not isinstance(weights, Sequence) or len(weights) != len(scores) or isinstance(weights, str):
            raise PPNetError(f"weights: {weights!r} must be {len(scores)} numbers >= 0, not all 0.")
        weights = [number(f"weights[{place}]", weight) for place, weight in enumerate(weights)]
        if not any(weights):
            raise PPNetError(f"weights: {weights!r} must be {len(scores)} numbers >= 0, not all 0.")
        first = scores[0]
        for other in scores[1:]:
            if other._shape() != first._shape():
                raise PPNetError(f"scores: {other!r} and {first!r} are not of the same units; score one model.")
        names = list(first)
        parts = [[one[name] for name in names] for one in scores]
        units = combined(parts, weights, [name.rpartition(".")[2] for name in names], form)
        return cls(
            dict(zip(names, units, strict=True)),
            method="+".join(one.method for one in scores),
            model_type=first.model_type,
            options={"weights": weights, "form": form},
            tokens=max(one.tokens for one in scores),
            order=first.order,
        )

    def _shape(self) -> tuple[str, str, dict[str, int]]:
        return self.model_type, self.order, {name: len(value) for name, value in self.items()}

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file; it appears complete or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        about = {
            "format": FORMAT,
            "method": self.method,
            "model_type": self.model_type,
            "options": json.dumps(self.options),
            "tokens": str(self.tokens),
            "sites": json.dumps(list(self)),
            "order": self.order,
        }
        try:
            save_file({name: value.contiguous() for name, value in self.items()}, temporary, metadata=about)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Scores:
        """Reads a file that `save` wrote.

        Raises:
            CheckpointError: missing, truncated or foreign file.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise CheckpointError(
                        f"scores: {path} is not a file of scores (format {about.get('format')!r}, expected {FORMAT!r})."
                    )
                units = {name: file.get_tensor(name) for name in json.loads(about["sites"])}
            return cls(
                units,
                method=about["method"],
                model_type=about["model_type"],
                options=json.loads(about["options"]),
                tokens=int(about["tokens"]),
                order=about.get("order", ""),
            )
        except CheckpointError:
            raise
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"scores: cannot read {path}: {error}.") from error


def _sayable(value: Any) -> Any:
    """A value as JSON can hold it; scores among the options by their repr."""
    if isinstance(value, Scores):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(name): _sayable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(part) for part in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)[:80]
