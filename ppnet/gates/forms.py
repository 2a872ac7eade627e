"""Parameters of the gates and their closed forms (DESIGN section 2).

All units of all sites live in one flat vector, so that thresholds, inclusion probabilities, masks and penalties of the
whole model are a handful of vector operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ppnet.cost import CostModel, cost_model
from ppnet.gates.config import SCORES, PuppetConfig
from ppnet.gates.importance import DEPENDS_ON_LAMBDA, get_importance
from ppnet.gates.spline import basis
from ppnet.units import Structure


class Gates(nn.Module):
    """Parameters of a model's gates and their closed forms: S sites, U units, D model width, n control points.

    Parameters (float32, whatever the model's dtype):
        theta ``(S, n - 1)``: increments of the threshold splines before softplus, when ``hierarchy="independent"``.
        theta_kind ``(kinds, n - 1)``, eta ``(S, n - 1)``, log_sigma ``(kinds,)``: theta = theta_kind + sigma * eta,
            when ``hierarchy="pooled"`` (non-centred, so that the posterior mode exists); theta_kind alone when
            ``hierarchy="shared"``.
        s_gate, s_out ``(U,)``, s_in ``(M, D)``: amplitude exponents per unit, and per input dimension of the M MLPs.
        u_gate, u_out ``(S, n)``, u_in ``(M, n)``: control points of the amplitudes' splines.
    Buffers:
        given_importance ``(U,)`` float32: the fixed importance of every unit, when ``importance="scores"``.
    """

    theta: nn.Parameter
    theta_kind: nn.Parameter
    eta: nn.Parameter
    log_sigma: nn.Parameter
    s_gate: nn.Parameter
    s_out: nn.Parameter
    s_in: nn.Parameter
    u_gate: nn.Parameter
    u_out: nn.Parameter
    u_in: nn.Parameter
    site_of_unit: Tensor
    kind_of_site: Tensor
    flops_share: Tensor
    given_importance: Tensor

    def __init__(self, model: nn.Module, structure: Structure, config: PuppetConfig) -> None:
        super().__init__()
        if config.importance != SCORES:
            get_importance(str(config.importance))  # an unknown name stops here, before the model is touched
        # In __dict__, so that the model does not become a submodule of its own submodule.
        self.__dict__["root"] = model
        self.config = config
        self.structure = structure
        device = next(model.parameters()).device
        if device.type == "meta":  # a model without weights can be planned for: its gates have numbers
            device = torch.device("cpu")
        sites, units, n = len(structure.sites), structure.total_units, config.control_points
        kinds = sorted({site.kind for site in structure.sites})
        site_of_unit = torch.repeat_interleave(torch.arange(sites), torch.tensor([s.units for s in structure.sites]))
        kind_of_site = torch.tensor([kinds.index(site.kind) for site in structure.sites])
        flops = [float(cost.flops * site.units) for cost, site in zip(self.costs.unit, structure.sites, strict=True)]
        flops_share = torch.tensor([share / sum(flops) for share in flops])
        self.register_buffer("site_of_unit", site_of_unit.to(device), persistent=False)
        self.register_buffer("kind_of_site", kind_of_site.to(device), persistent=False)
        self.register_buffer("flops_share", flops_share.to(device), persistent=False)
        if config.importance == SCORES:
            self.register_buffer("given_importance", torch.ones(units, device=device))  # `ppnet.wrap` fills it in
        self.mlp_sites = [index for index, site in enumerate(structure.sites) if site.kind == "neuron"]

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device))

        if config.hierarchy == "pooled":
            self.theta_kind = parameter(len(kinds), n - 1)
            self.eta = parameter(sites, n - 1)
            self.log_sigma = nn.Parameter(torch.full((len(kinds),), math.log(0.1), device=device))
        elif config.hierarchy == "shared":
            self.theta_kind = parameter(len(kinds), n - 1)
        else:
            self.theta = parameter(sites, n - 1)
        if config.amplitudes:
            self.s_gate, self.s_out = parameter(units), parameter(units)
            self.s_in = parameter(len(self.mlp_sites), structure.width)
            line = torch.linspace(0.0, 1.0, n, device=device)
            self.u_gate = nn.Parameter(line.repeat(sites, 1))
            self.u_out = nn.Parameter(line.repeat(sites, 1))
            self.u_in = nn.Parameter(line.repeat(len(self.mlp_sites), 1))

    @property
    def root(self) -> nn.Module:
        """The model that the gates belong to."""
        model: nn.Module = self.__dict__["root"]
        return model

    @property
    def costs(self) -> CostModel:
        """What the model costs as it is stored now: its dtype may have changed since it was wrapped."""
        return cost_model(self.root, self.structure)

    def per_unit(self) -> list[Tensor]:
        """The parameters and buffers that hold one number per unit, ``(U,)``: what `ppnet.sort_` moves with them."""
        tensors = [getattr(self, name, None) for name in ("s_gate", "s_out", "given_importance")]
        return [tensor for tensor in tensors if tensor is not None]

    # ---- closed forms -------------------------------------------------------------------------------------------

    def control_points(self) -> Tensor:
        """Threshold control points ``(S, n)``: c_0 = -1/T, c_k = c_{k-1} + softplus(theta_k); increasing."""
        if self.config.hierarchy == "pooled":
            theta = self.theta_kind[self.kind_of_site] + self.log_sigma.exp()[self.kind_of_site, None] * self.eta
        elif self.config.hierarchy == "shared":
            theta = self.theta_kind[self.kind_of_site]
        else:
            theta = self.theta
        first = theta.new_full((theta.shape[0], 1), -1.0 / self.config.temperature)
        return torch.cat([first, first + nn.functional.softplus(theta).cumsum(dim=1)], dim=1)

    def _basis(self, u: float) -> Tensor:
        return basis(u, self.config.control_points, self.config.degree).to(self.flops_share)

    def threshold(self, u: float) -> Tensor:
        """tau(lambda) of every site at u = lambda / (lambda + 1): ``(S,)``, non-decreasing in u."""
        return self.control_points() @ self._basis(u)

    def _amplitude_position(self, control_points: Tensor, u: float) -> Tensor:
        """Amplitude splines at u: ``(rows,)``. Pinned splines start at 0, so amplitudes are 1 at lambda = 0."""
        row = self._basis(u)
        if self.config.pin_dense:
            row = torch.cat([row.new_zeros(1), row[1:]])
        return control_points @ row

    def gate_amplitude(self, u: float) -> Tensor:
        """f^gate of every unit: ``(U,)``."""
        if not self.config.amplitudes:
            return torch.ones_like(self.site_of_unit, dtype=self.flops_share.dtype)
        return torch.exp(self.s_gate * self._amplitude_position(self.u_gate, u)[self.site_of_unit])

    def out_amplitude(self, u: float) -> Tensor:
        """f^out of every unit: ``(U,)``."""
        if not self.config.amplitudes:
            return torch.ones_like(self.site_of_unit, dtype=self.flops_share.dtype)
        return torch.exp(self.s_out * self._amplitude_position(self.u_out, u)[self.site_of_unit])

    def in_amplitude(self, u: float) -> Tensor | None:
        """f^in of every MLP and input dimension: ``(M, D)``; None when amplitudes are off."""
        if not self.config.amplitudes:
            return None
        return torch.exp(self.s_in * self._amplitude_position(self.u_in, u)[:, None])

    def importance(self, u: float, train: bool = False) -> Tensor:
        """Importance of every unit: ``(U,)``; differentiable when `train` and the config says so."""
        if self.config.importance == SCORES:
            return self.given_importance
        train = train and bool(self.config.train_importance)
        with torch.set_grad_enabled(train and torch.is_grad_enabled()):
            return self._importances([u])[0]

    def _importances(self, positions: Sequence[float]) -> list[Tensor]:
        """Importance at every u: site by site, so that weights that are read from files are read once."""
        function = get_importance(str(self.config.importance))
        in_amplitudes = [self.in_amplitude(u) for u in positions]
        parts: list[list[Tensor]] = [[] for _ in positions]
        for index, site in enumerate(self.structure.sites):
            for found, in_amplitude in zip(parts, in_amplitudes, strict=True):
                scale = None
                if in_amplitude is not None and site.kind == "neuron":
                    scale = in_amplitude[self.mlp_sites.index(index)]
                found.append(function(self.root, site, scale))
        return [torch.cat(found) for found in parts]

    @torch.no_grad()
    def importance_curve(self, nodes: int = 17) -> Callable[[float], Tensor]:
        """Importance as a function of u without reading the weights again: exact where it does not depend on lambda,
        linear between `nodes` values of u where it does (it then varies as smoothly as f^in)."""
        if not (self.config.amplitudes and self.config.importance in DEPENDS_ON_LAMBDA):
            constant = self.importance(0.0)
            return lambda u: constant
        table = torch.stack(self._importances([i / (nodes - 1) for i in range(nodes)]))

        def interpolate(u: float) -> Tensor:
            left = min(int(u * (nodes - 1)), nodes - 2)
            return torch.lerp(table[left], table[left + 1], u * (nodes - 1) - left)

        return interpolate

    def inclusion(self, u: float, importance: Tensor | None = None) -> Tensor:
        """rho of every unit at u: sigmoid((f^gate * importance - tau) / T): ``(U,)`` in (0, 1)."""
        if importance is None:
            importance = self.importance(u)
        margin = self.gate_amplitude(u) * importance - self.threshold(u)[self.site_of_unit]
        return torch.sigmoid(margin / self.config.temperature)

    def mean_inclusion(self, rho: Tensor) -> Tensor:
        """rho_bar: mean inclusion probability weighted by the FLOPs of each site: scalar."""
        counts = torch.bincount(self.site_of_unit, minlength=len(self.structure.sites)).to(rho)
        means = rho.new_zeros(len(counts)).index_add(0, self.site_of_unit, rho) / counts
        return (means * self.flops_share).sum()

    def prior(self) -> Tensor:
        """-log prior of the pooled deviations, up to a constant: eta ~ N(0, 1), sigma half-normal; 0 if independent."""
        if self.config.hierarchy != "pooled":
            return self.flops_share.new_zeros(())
        sigma = self.log_sigma.exp()
        return 0.5 * self.eta.square().sum() + 0.5 * (sigma / self.config.pooled_scale).square().sum()

    @property
    def dense_is_plain(self) -> bool:
        """Whether the model at lambda = 0 is the plain model: amplitudes are exactly 1 there, or there are none."""
        return bool(self.config.pin_dense) or not self.config.amplitudes

    # ---- sizes ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scales(self, u: float) -> list[tuple[Tensor | None, Tensor | None]]:
        """Per site (f^out ``(units,)``, f^in ``(D,)``) at u; None where the factor is 1."""
        offsets = self.structure.offsets()
        if not self.config.amplitudes or (u == 0.0 and self.config.pin_dense):
            return [(None, None)] * len(self.structure.sites)
        out, inputs = self.out_amplitude(u), self.in_amplitude(u)
        assert inputs is not None
        return [
            (out[offsets[i] : offsets[i + 1]], inputs[self.mlp_sites.index(i)] if i in self.mlp_sites else None)
            for i in range(len(self.structure.sites))
        ]

    @torch.no_grad()
    def order_key(self, points: int = 256, importance: Callable[[float], Tensor] | None = None) -> Tensor:
        """How far up the cost axis each unit stays: float64 ``(U,)``, higher = stays longer.

        In [0, 1] it is the largest u at which rho >= 1/2 (interpolated on a grid). Units that stay at u = 1 get
        1 + their margin there; units that are out everywhere get their (negative) margin at u = 0.

        Args:
            points: of the grid.
            importance: the `importance_curve`, where the caller has it.
        """
        importance = importance or self.importance_curve()
        # On the gates' device, and moved once: training asks for the order at every prefix mask.
        upper = self._margin(1.0, importance)
        key = torch.where(upper > 0, 1.0 + upper, torch.nan)
        for step in range(points - 1, -1, -1):
            u = step / points
            margin = self._margin(u, importance)
            closing = u + margin / (margin - upper) / points
            key = torch.where(key.isnan() & (margin > 0), closing, key)
            upper = margin
        return torch.where(key.isnan(), upper, key).cpu()

    def _margin(self, u: float, importance: Callable[[float], Tensor]) -> Tensor:
        """f^gate * importance - tau at u: float64 ``(U,)``; a unit is kept where it is positive."""
        return (self.gate_amplitude(u) * importance(u) - self.threshold(u)[self.site_of_unit]).double()
