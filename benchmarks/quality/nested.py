"""Nested training without gates, the baselines of elastic models: the first units of every layer, no order learned.

MatFormer (Devvrit et al. 2023, arXiv 2310.07707) trains one of four widths per step, drawn uniformly, here of heads and
neurons alike. The sandwich rule (Yu & Huang 2019, arXiv 1903.05134) trains the dense model, one random width and the
smallest in every step; the narrow ones learn from the dense one's logits.
"""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

import ppnet
from ppnet.plan import Plan
from ppnet.train.objective import distillation_loss, shift_labels
from ppnet.wrap import engine_of

MATFORMER = (1.0, 0.5, 0.25, 0.125)


def first_units(model: nn.Module, fraction: float) -> Plan:
    """The plan of the first units of every site, at a fraction of the gated FLOPs, the same share of every layer."""
    return ppnet.plan(model, fraction, metric="flops", of="gated", scores="position")


class NestedTrainer(Trainer):
    """Trains prefixes of one model; which ones, the seed decides.

    Args:
        rule: ``"matformer"`` or ``"sandwich"``.
        smallest: fraction of the gated FLOPs of the narrowest.
    """

    def __init__(self, *args: Any, rule: str, smallest: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rule, self.smallest = rule, smallest
        self.random = random.Random(self.args.seed)
        self.plans: dict[float, Plan] = {}

    def at(self, fraction: float) -> Plan:
        if fraction not in self.plans:
            self.plans[fraction] = first_units(self.model, fraction)
        return self.plans[fraction]

    def forward(self, model: nn.Module, inputs: dict[str, Any], fraction: float) -> Any:
        engine_of(self.model).fix(self.at(fraction))
        return model(**inputs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self.rule == "matformer":
            return self.forward(model, inputs, self.random.choice(MATFORMER)).loss
        dense = self.forward(model, inputs, 1.0)
        targets, loss = shift_labels(inputs["labels"]), dense.loss
        # Rounded, so that few plans are made.
        for fraction in (round(self.random.uniform(self.smallest, 1.0), 2), self.smallest):
            logits = self.forward(model, inputs, fraction).logits
            total, count = distillation_loss(logits, dense.logits.detach(), targets)
            loss = loss + total / count
        return loss / 3
