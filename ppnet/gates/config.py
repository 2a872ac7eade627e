"""Options of a puppet: the gates' form, how masks and lambda are drawn, how gate gradients are estimated."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

from ppnet.errors import PPNetError
from ppnet.units import KINDS

_CHOICES: dict[str, tuple[str, ...]] = {
    "hierarchy": ("independent", "pooled", "shared"),
    "gate_gradient": ("sampled", "exact"),
    "lambda_distribution": ("exponential", "uniform_u", "uniform_size", "log_size"),
    "normalise_scores": ("site", "kind"),
}
# The importance that `ppnet.wrap(model, config, scores=...)` fixes; all others are read off the weights.
SCORES = "scores"
# annotation -> (what is accepted, what it is stored as, in words)
_TYPES: dict[str, tuple[type, type, str]] = {
    "int": (Integral, int, "an integer"),
    "float": (Real, float, "a finite number"),
    "bool": (bool, bool, "True or False"),
    "str": (str, str, "a string"),
}


@dataclass
class PuppetConfig:
    """What `ppnet.wrap` attaches. The defaults suit pretrained models; ``preset="paper"`` is the published form.

    Args:
        preset: ``"default"`` or ``"paper"``. The paper's form fixes importance to the row norm, trains the first
            control point of every amplitude spline, lets the penalty shape the weights through the norm, decays gates
            like weights and gives them the weights' learning rate. Explicit arguments win over the preset.
        kinds: which units are gated: ``"kv_group"`` (one KV head with its query heads; heads under MHA), ``"neuron"``.
        importance: name of a registered importance (`ppnet.gates.importance`): ``"scale_free"`` or ``"row_norm"``; or
            ``"scores"``: fixed numbers, the ranks of the ``scores`` that `ppnet.wrap` is given.
        train_importance: whether gradients flow from the gates into the weights through the importance; False for
            ``"scores"``, which have nothing to train.
        normalise_scores: what scores are ranked within: ``"site"`` (every layer's units for themselves) or ``"kind"``
            (all layers together, so that a layer whose scores are low starts to close sooner).
        temperature: T of the inclusion probability and of the first control point, c_0 = -1/T.
        control_points: n, control points of every spline.
        degree: degree of the clamped B-splines.
        amplitudes: whether the amplitude terms f^gate, f^out, f^in are trained.
        pin_dense: whether amplitudes are exactly 1 at lambda = 0, so that the dense pass is the model itself.
        hierarchy: ``"independent"`` threshold splines per layer and kind; ``"pooled"``: each kind's layers share a
            mean spline from which they deviate by a learned, half-normally shrunk scale; or ``"shared"``: one spline
            per kind, so that importances that are alike in all layers close all layers alike.
        pooled_scale: scale of the half-normal hyperprior of the pooled deviations.
        gate_gradient: straight-through gradient of dropped units: ``"sampled"`` (unbiased, on a random fraction of the
            tokens) or ``"exact"`` (all tokens).
        sampled_fraction: the fraction of tokens (neurons) or sequences (KV groups) that ``"sampled"`` uses.
        dense_fraction: probability that a training pass is dense (lambda = 0); none is where all weights are frozen.
        lambda_distribution: ``"exponential"``: lambda ~ Exp(lambda_rate); ``"uniform_u"``: u = lambda / (lambda + 1)
            uniform on [0, u_max]; ``"uniform_size"``: the lambda at which the gates now keep a fraction of the gated
            FLOPs that is uniform on [smallest_size, 1], so that every size is trained however the gates stand;
            ``"log_size"``: the same with the logarithm of that fraction uniform, which gives small sizes more passes.
        lambda_rate: rate (inverse mean) of the exponential distribution.
        u_max: upper end of u in all but ``"exponential"``.
        smallest_size: lower end of the fractions of ``"uniform_size"`` and ``"log_size"``.
        prefix_fraction: probability that a gated pass keeps, instead of a Bernoulli draw, the units that
            `ppnet.plan` would keep at the drawn size: a prefix of the gates' order (DESIGN section 2), as deployed.
        prefix_warmup: optimizer steps (1 or more), or a share of the trainer's (below 1), over which that probability
            rises linearly from 0: draws find the order, then prefixes train it. A loop of your own sets
            `Puppet.total_steps` for the share, or has prefixes from the start.
        sandwich: 0: every micro-batch is one pass. n > 0: a dense pass and n gated ones, which learn from the dense
            one's logits (`distill`); their sizes come from n equally likely parts of `lambda_distribution`, one from
            each (after the sandwich rule of Yu & Huang 2019, arXiv 1903.05134). `dense_fraction` is unused then.
        lambda_warmup: optimizer steps over which drawn lambdas are scaled up linearly from 0.
        penalty: weight of the cost penalty lambda * rho_bar(lambda).
        distill: weight in [0, 1] of in-place distillation: gated passes learn from the model's own dense pass.
        distill_temperature: temperature of that distillation.
        gate_lr: learning rate of the gates; None: the weights' learning rate (the paper's form). Gate logits have to
            travel several units in a phase whatever the weights' rate is, so the default is absolute.
        decay_gates: whether weight decay applies to gate parameters.
        align: kept units per neuron site are computed in multiples of this (the extra ones have gate 0: exact).
        seed: seed of the counter-based draws of lambda, masks and token samples.

    Raises:
        PPNetError: a value of another type, or outside what is allowed.
    """

    preset: str = "default"
    kinds: tuple[str, ...] = KINDS
    importance: str | None = None
    train_importance: bool | None = None
    normalise_scores: str = "site"
    temperature: float = 0.5
    control_points: int = 10
    degree: int = 3
    amplitudes: bool = True
    pin_dense: bool | None = None
    hierarchy: str = "independent"
    pooled_scale: float = 1.0
    gate_gradient: str = "sampled"
    sampled_fraction: float = 0.125
    dense_fraction: float = 1.0 / 3.0
    lambda_distribution: str | None = None
    lambda_rate: float | None = None
    u_max: float = 0.9
    smallest_size: float = 0.05
    lambda_warmup: int = 0
    prefix_fraction: float | None = None
    prefix_warmup: float | None = None
    sandwich: int = 0
    penalty: float | None = None
    distill: float | None = None
    distill_temperature: float = 1.0
    gate_lr: float | None = None
    decay_gates: bool | None = None
    align: int = 8
    seed: int = 0

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {
            "importance": "scale_free",
            "train_importance": False,
            "pin_dense": True,
            "lambda_distribution": "uniform_size",
            "lambda_rate": 0.5,
            "prefix_fraction": 1.0,
            "prefix_warmup": 0.5,
            "penalty": 0.5,
            "distill": 0.5,
            "gate_lr": 0.03,
            "decay_gates": False,
        },
        "paper": {
            "importance": "row_norm",
            "train_importance": True,
            "pin_dense": False,
            "lambda_distribution": "exponential",
            "lambda_rate": 0.3,
            "prefix_fraction": 0.0,
            "prefix_warmup": 0.0,
            "penalty": 1.0,
            "distill": 0.0,
            "decay_gates": True,
        },
    }

    def __post_init__(self) -> None:
        self._check_types()
        if self.preset not in self.PRESETS:
            raise PPNetError(f"preset: {self.preset!r} is not known; use one of {', '.join(self.PRESETS)}.")
        # What was said, before the preset fills the rest in: scores replace an importance that nobody chose.
        self._said = frozenset(name for name in ("importance", "train_importance") if getattr(self, name) is not None)
        if self.importance == SCORES:
            if self.train_importance:
                raise PPNetError(
                    "train_importance: True, but importance='scores' is a fixed number per unit, which has nothing to "
                    "train; leave train_importance out."
                )
            self.train_importance = False
        for name, value in self.PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise PPNetError(f"kinds: {self.kinds!r} must name at least one of {KINDS}.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise PPNetError(f"{name}: {getattr(self, name)!r} is not known; use one of {', '.join(allowed)}.")
        self._check_range("temperature", self.temperature > 0, "> 0")
        self._check_range("degree", self.degree >= 1, ">= 1")
        self._check_range("control_points", self.control_points > self.degree, f"> degree ({self.degree})")
        self._check_range("sampled_fraction", 0 < self.sampled_fraction <= 1, "in (0, 1]")
        self._check_range("dense_fraction", 0 <= self.dense_fraction < 1, "in [0, 1)")
        self._check_range("lambda_rate", self.lambda_rate is not None and self.lambda_rate > 0, "> 0")
        self._check_range("u_max", 0 < self.u_max < 1, "in (0, 1)")
        self._check_range("smallest_size", 0 < self.smallest_size < 1, "in (0, 1)")
        self._check_range("distill", self.distill is not None and 0 <= self.distill <= 1, "in [0, 1]")
        self._check_range("distill_temperature", self.distill_temperature > 0, "> 0")
        self._check_range("pooled_scale", self.pooled_scale > 0, "> 0")
        self._check_range("penalty", self.penalty is not None and self.penalty >= 0, ">= 0")
        prefixes = self.prefix_fraction
        self._check_range("prefix_fraction", prefixes is not None and 0 <= prefixes <= 1, "in [0, 1]")
        self._check_range("prefix_warmup", self.prefix_warmup is not None and self.prefix_warmup >= 0, ">= 0")
        self._check_range("sandwich", self.sandwich >= 0, ">= 0")
        self._check_range("lambda_warmup", self.lambda_warmup >= 0, ">= 0")
        self._check_range("gate_lr", self.gate_lr is None or self.gate_lr >= 0, ">= 0")
        self._check_range("align", self.align >= 1, ">= 1")

    def _check_types(self) -> None:
        for field in fields(self):
            value, (annotation, _, none) = getattr(self, field.name), str(field.type).partition(" | ")
            if annotation not in _TYPES or (value is None and none):
                continue
            accepted, stored, words = _TYPES[annotation]
            wrong = not isinstance(value, accepted) or (isinstance(value, bool) and accepted is not bool)
            if wrong or (stored is float and not math.isfinite(value)):
                raise PPNetError(f"{field.name}: {value!r} must be {words}{' or None' if none else ''}.")
            setattr(self, field.name, stored(value))
        if not isinstance(self.kinds, list | tuple):
            raise PPNetError(f"kinds: {self.kinds!r} is a {type(self.kinds).__name__}; give a tuple, e.g. ('neuron',).")
        self.kinds = tuple(self.kinds)

    def _check_range(self, name: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise PPNetError(f"{name}: {getattr(self, name)!r} must be {allowed}.")

    def with_scores(self) -> PuppetConfig:
        """These options with ``importance="scores"``.

        Raises:
            PPNetError: another importance was chosen, or one that trains.
        """
        if self.importance == SCORES:
            return self
        if "importance" in self._said:
            raise PPNetError(
                f"scores: are an importance of their own, and config has importance={self.importance!r}; leave one of "
                "the two out, or say importance='scores'."
            )
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if "train_importance" not in self._said:
            values["train_importance"] = None  # the preset's, for an importance that is read off the weights
        return PuppetConfig(**{**values, "importance": SCORES})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kinds": list(self.kinds)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PuppetConfig:
        """Inverse of `to_dict`.

        Raises:
            PPNetError: an unknown option (written by a newer ppnet).
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise PPNetError(f"config: unknown options {unknown}; they may come from a newer ppnet.")
        return cls(**data)
