"""`model.puppet`: the gates of a model, what training draws from them, and their place in the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ppnet.gates.config import PuppetConfig
from ppnet.gates.draw import GATED, Choice, Draw, Stratum, choose, draw_masks, generator
from ppnet.gates.forms import Gates
from ppnet.gates.importance import DEPENDS_ON_LAMBDA
from ppnet.gates.prefix import prefix_mask
from ppnet.gates.solve import bracket
from ppnet.plan import Plan, make_plan
from ppnet.units import Structure, leaf_module

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

# Grid of the order in training, where it is read at every prefix mask.
_TRAINING_POINTS = 64


class Puppet(Gates):
    """Gates in use; its parameters are those of `Gates`.

    Attributes:
        progress, total_steps: optimizer steps made, and in all (None: not known), which trainers set and warm-ups read.

    Buffers:
        draws ``()`` int64: training draws made so far; with `config.seed` it determines every random choice.
    """

    draws: Tensor

    def __init__(self, model: nn.Module, structure: Structure, config: PuppetConfig) -> None:
        super().__init__(model, structure, config)
        self.progress = 0
        self.total_steps: int | None = None
        self.last_lambda = 0.0
        self._lambdas: list[float] = []
        self._stratum: Stratum | None = None
        self._tokens = 1_000_000
        self._draw_count: int | None = None
        self._read: tuple[int | None, Tensor] | None = None
        self._solved: tuple[tuple[int, float], float] | None = None
        self._unit_costs: Tensor | None = None
        self._modules_read: list[nn.Linear | Conv1D] | None = None
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=self.flops_share.device))

    # ---- training ------------------------------------------------------------------------------------------------

    def draw(self) -> Draw:
        """Draws lambda and the masks of one training pass and counts it. At lambda = 0 nothing is masked."""
        number = self._next_draw()
        source = generator(self.config.seed, number)
        choice = self._choose(source)
        self._solved = None
        self._draw_count = number + 1
        drawn = self._draw_at(choice, source, number)
        self.draws.fill_(self._draw_count)
        self.last_lambda = choice.lambda_
        self._lambdas.append(choice.lambda_)
        return drawn

    def next_lambda(self) -> float:
        """lambda that the coming draw will use: draws depend on the seed and their number alone."""
        source = generator(self.config.seed, self._next_draw())
        return self._choose(source).lambda_

    def _choose(self, source: torch.Generator) -> Choice:
        # With frozen weights a dense pass teaches nothing, and its loss has no gradient.
        learns = any(p.requires_grad for name, p in self.root.named_parameters() if not name.startswith("puppet."))
        stratum = self._stratum or (None if learns else GATED)
        return choose(self.config, self.progress, source, self._u_at, stratum, self.total_steps)

    @contextmanager
    def drawing(self, stratum: Stratum) -> Iterator[None]:
        """Training passes inside are gated, at sizes out of `stratum`."""
        before, self._stratum = self._stratum, stratum
        try:
            yield
        finally:
            self._stratum = before

    @torch.no_grad()
    def _u_at(self, fraction: float) -> float:
        """u in (0, u_max] at which the expected fraction of the gated FLOPs is `fraction`.

        Solved once per draw: `next_lambda` and the draw that follows it ask for the same.
        """
        asked = (self._next_draw(), fraction)
        if self._solved is None or self._solved[0] != asked:
            importance = self.importance_curve(nodes=5)

            def kept(u: float) -> float:
                return float(self.mean_inclusion(self.inclusion(u, importance(u))))

            self._solved = (asked, bracket(kept, fraction, self.config.u_max, steps=16)[1])
        return self._solved[1]

    def _next_draw(self) -> int:
        if self._draw_count is None:
            self._draw_count = int(self.draws)
        return self._draw_count

    def _draw_at(self, choice: Choice, source: torch.Generator, number: int) -> Draw:
        u = choice.lambda_ / (1.0 + choice.lambda_)
        if choice.lambda_ == 0.0:
            return Draw(u, number, None, None if self.config.pin_dense else self.out_amplitude(0.0), self._input(0.0))
        rho = self.inclusion(u, self._training_importance(u))
        if choice.prefix:
            fraction = choice.fraction
            mask = self._prefix_mask(float(self.mean_inclusion(rho.detach())) if fraction is None else fraction)
        else:
            mask = draw_masks(rho.detach().cpu(), self.structure, source)
        relaxed = mask.to(rho) + (rho - rho.detach())
        return Draw(u, number, mask, relaxed * self.out_amplitude(u), self._input(u))

    @torch.no_grad()
    def _prefix_mask(self, fraction: float) -> Tensor:
        if self._unit_costs is None:
            counts = torch.tensor([site.units for site in self.structure.sites])
            self._unit_costs = (self.flops_share.cpu().double() / counts).repeat_interleave(counts)
        return prefix_mask(self.order_key(_TRAINING_POINTS), self._unit_costs, fraction, self.structure.offsets())

    def _training_importance(self, u: float) -> Tensor:
        """Importance in a training pass: with its graph where it trains; else read once per draw (and its penalty)."""
        if self.config.train_importance or (self.config.amplitudes and self.config.importance in DEPENDS_ON_LAMBDA):
            return self.importance(u, train=True)
        if self._read is None or self._read[0] != self._draw_count:
            self._read = (self._draw_count, self.importance(u))
        return self._read[1]

    def _input(self, u: float) -> Tensor | None:
        return None if u == 0.0 and self.config.pin_dense else self.in_amplitude(u)

    def penalty(self) -> Tensor:
        """Cost penalty of the draws since `clear`, in closed form: a scalar.

        Mean of lambda * rho_bar(lambda), plus the hyperprior per training token; differentiable in the gates (and in
        the weights, if importance trains).
        """
        total = self.prior() / self._tokens
        for lambda_ in self._lambdas:
            if lambda_ > 0.0:
                u = lambda_ / (1.0 + lambda_)
                rho_bar = self.mean_inclusion(self.inclusion(u, self._training_importance(u)))
                total = total + float(self.config.penalty or 0.0) * lambda_ * rho_bar / len(self._lambdas)
        return total

    def clear(self) -> None:
        """Forgets the draws that `penalty` averages over."""
        self._lambdas.clear()

    def set_tokens(self, tokens: int) -> None:
        """Number of training tokens: the log prior counts once against the sum of that many token losses."""
        self._tokens = max(1, int(tokens))

    def metrics(self) -> dict[str, float]:
        """lambda of the last draw and, at lambda = 1, the expected gated FLOPs and keep fraction per kind."""
        with torch.no_grad():
            rho = self.inclusion(0.5)
            result = {"lambda": self.last_lambda, "gated_flops_at_1": float(self.mean_inclusion(rho))}
            for kind in sorted({site.kind for site in self.structure.sites}):
                of_kind = torch.tensor([site.kind == kind for site in self.structure.sites])
                result[f"keep_{kind}_at_1"] = float(rho[of_kind.to(rho.device)[self.site_of_unit]].mean())
        return result

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Forwards inside are dense: lambda = 0, no draw, whatever size is set."""
        engine = self.root.__dict__["_ppnet_engine"]
        before = engine.force_dense
        engine.force_dense = True
        try:
            yield
        finally:
            engine.force_dense = before

    # ---- sizes ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def draw_plan(self, u: float, seed: int) -> Plan:
        """One Bernoulli draw of all masks at u, as a plan (its size varies from draw to draw)."""
        rho = self.inclusion(u).cpu()
        mask = draw_masks(rho, self.structure, generator(self.config.seed, seed, "plan"))
        offsets = self.structure.offsets()
        kept = [mask[start:stop].nonzero().flatten().tolist() for start, stop in pairwise(offsets)]
        costs = self.costs
        return make_plan(
            self.structure,
            kept,
            cost=costs.total([len(units) for units in kept]),
            dense_cost=costs.dense,
            u=u,
            source="gates (one mask draw)",
        )

    # ---- module behaviour ----------------------------------------------------------------------------------------

    def weight_versions(self) -> tuple[tuple[int, int], ...]:
        """Identity and in-place version of all that a fixed size is gathered from: equal only while nothing changed."""
        # Modules are looked up once: a forward at a fixed size asks for the versions every time.
        if self._modules_read is None:
            leaves = [leaf for site in self.structure.sites for leaf in site.leaves]
            self._modules_read = [leaf_module(self.root, leaf) for leaf in leaves]
        tensors: list[Tensor] = list(self._parameters.values())  # type: ignore[arg-type]
        for module in self._modules_read:
            tensors += [module.weight] if module.bias is None else [module.weight, module.bias]
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> Puppet:
        """Gates follow the model's device but stay float32: thresholds and exponents do not survive bfloat16."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        self.root.__dict__["_ppnet_engine"].stale = True
        super()._apply(keep_dtype, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._draw_count = self._solved = None
        self.root.__dict__["_ppnet_engine"].stale = True

    def extra_repr(self) -> str:
        return f"sites={len(self.structure.sites)}, units={self.structure.total_units}, preset={self.config.preset!r}"
