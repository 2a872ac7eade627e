"""Runs of the study "elastic": anchors, and gate training by its options, one lever at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One way to train gates.

    Attributes:
        regime: ``"scratch"`` (the dense model's tokens in all) or ``"retrofit"`` (from the dense model on).
        options: of `ppnet.PuppetConfig`.
        dense_share: of the steps, before the gates are attached (scratch).
        scores: the method whose scores are the importance; None: the config's.
        gate_lr: None: the recipe's.
        trains: ``"all"``, ``"gates"`` alone, or ``"lora"``: gates and low-rank changes of the gated matrices.
        lr: times the recipe's rate (retrofit).
        micro_batches: per step, with masks of their own.
    """

    regime: str
    options: dict[str, Any] = field(default_factory=dict)
    dense_share: float = 0.6
    scores: str | None = None
    gate_lr: float | None = None
    trains: str = "all"
    lr: float = 1.0
    micro_batches: int = 1


def retrofit(scores: str | None = None, lr: float = 1.0, trains: str = "all", **options: Any) -> Variant:
    return Variant("retrofit", options, scores=scores, lr=lr, trains=trains)


def scratch(dense_share: float, scores: str | None = None, **options: Any) -> Variant:
    return Variant("scratch", options, dense_share, scores=scores)


ANCHORS: dict[str, Any] = {
    "dense": ("run_dense",),
    "alone": ("run_alone",),
    "longer": ("run_longer",),
    "paper": Variant("scratch", {"preset": "paper", "gate_gradient": "exact"}, 0.0, gate_lr=3e-3),
    "matformer": ("run_nested", "matformer"),
    "sandwich": ("run_nested", "sandwich"),
    "wanda": ("run_masks",),
    "sparsegpt": ("run_masks",),
    **{method: ("run_cut", method, False) for method in ("magnitude", "activation", "mama")},
    **{f"{method} healed": ("run_cut", method, True) for method in ("magnitude", "activation", "mama")},
}
DRAWS = {"prefix_fraction": 0.0}
PREFIX = {"prefix_fraction": 1.0, "prefix_warmup": 0.0}
RISING = {"prefix_fraction": 1.0, "prefix_warmup": 0.5}
LOG = {"lambda_distribution": "log_size"}
VARIANTS: dict[str, Any] = {
    # What a unit's importance is.
    "retrofit": retrofit(**DRAWS),
    "retrofit mama": retrofit("mama", **DRAWS),
    "retrofit activation": retrofit("activation", **DRAWS),
    # How masks and sizes are drawn. "retrofit prefix" is what the rows below change one thing of.
    "retrofit prefix": retrofit("mama", **PREFIX),
    "retrofit prefix scale-free": retrofit(**PREFIX),
    "retrofit prefix row norm": retrofit(**PREFIX, importance="row_norm"),
    "retrofit prefix half": retrofit("mama", prefix_fraction=0.5, prefix_warmup=0.0),
    "retrofit prefix rising": retrofit("mama", **RISING),
    "retrofit prefix rising from 0.4": retrofit("mama", **RISING, smallest_size=0.4),
    "retrofit prefix log": retrofit("mama", **PREFIX, **LOG),
    "retrofit prefix dense 0.1": retrofit("mama", **PREFIX, dense_fraction=0.1),
    "retrofit prefix warm-up": retrofit("mama", **PREFIX, lambda_warmup=40),
    "retrofit prefix micro 4": replace(retrofit("mama", **PREFIX), micro_batches=4),
    # How sizes are shared out over layers.
    "retrofit shared": retrofit("mama", **DRAWS, hierarchy="shared"),
    "retrofit prefix shared": retrofit("mama", **PREFIX, hierarchy="shared"),
    "retrofit prefix shared log": retrofit("mama", **PREFIX, hierarchy="shared", **LOG),
    "retrofit prefix pooled": retrofit("mama", **PREFIX, hierarchy="pooled"),
    "retrofit prefix even": replace(retrofit("mama", **PREFIX, hierarchy="shared"), gate_lr=1e-12),
    # How many passes a step has.
    "retrofit prefix sandwich 1": retrofit("mama", **PREFIX, sandwich=1),
    "retrofit prefix sandwich 2": retrofit("mama", **PREFIX, sandwich=2),
    "retrofit prefix log sandwich 3": retrofit("mama", **PREFIX, **LOG, sandwich=3),
    # What the gated passes learn from, and how fast.
    "retrofit prefix distill 0": retrofit("mama", **PREFIX, distill=0.0),
    "retrofit prefix distill 1": retrofit("mama", **PREFIX, distill=1.0),
    "retrofit prefix lr x2": retrofit("mama", lr=2.0, **PREFIX),
    "retrofit prefix gate lr 0.01": replace(retrofit("mama", **PREFIX), gate_lr=0.01),
    "retrofit prefix gates decay": retrofit("mama", **PREFIX, decay_gates=True),
    "retrofit prefix no penalty": retrofit("mama", **PREFIX, penalty=0.0),
    "retrofit prefix penalty x4": retrofit("mama", **PREFIX, penalty=2.0),
    "retrofit prefix no amplitudes": retrofit("mama", **PREFIX, amplitudes=False),
    "retrofit prefix exact": retrofit("mama", **PREFIX, gate_gradient="exact"),
    "retrofit prefix cold": retrofit("mama", **PREFIX, temperature=0.25),
    # What learns.
    "retrofit gates alone": retrofit("mama", trains="gates", **PREFIX),
    "retrofit lora": retrofit("mama", trains="lora", **PREFIX),
    # What is done to every size by itself, after the gates.
    "retrofit prefix redistributed": ("run_deployed", "retrofit prefix", 0.0, True),
    "retrofit prefix healed": ("run_deployed", "retrofit prefix", 1.0),
    "retrofit prefix healed 1/4": ("run_deployed", "retrofit prefix", 0.25),
    "retrofit prefix rising healed": ("run_deployed", "retrofit prefix rising", 1.0),
    "retrofit prefix sandwich 2 healed": ("run_deployed", "retrofit prefix sandwich 2", 1.0),
    # From scratch.
    "scratch": scratch(0.6, **DRAWS),
    "scratch rising": scratch(0.6, "mama", **RISING),
    "scratch prefix": scratch(0.6, "mama", **PREFIX),
    "scratch prefix 0.8": scratch(0.8, "mama", **PREFIX),
    "scratch prefix 0.8 sandwich 2": scratch(0.8, "mama", **PREFIX, sandwich=2),
}
RUNS = ANCHORS | VARIANTS
