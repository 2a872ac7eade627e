"""Redistribution: what removed units gave to a sub-layer's output is taken over by the units that stay.

Before removal a sub-layer gives y = W a + b for the features a of all its units; afterwards the kept features a_K are
all there is. The output projection is refitted, W_K + D for W_K, so that its output stays close to y on calibration
data. Inspired by the "redistribution" of MAMA pruning (arXiv 2505.14052), whose published code does nothing; the
methods and all formulas are ours:

    least_squares   D = argmin sum |y - b - (W_K + D) a_K|^2 + ridge * mean(diag G) * |D|^2 = R (G + ridge * ... I)^-1
                    with G = sum a_K a_K^T and R = sum (y - b - W_K a_K) a_K^T over the tokens
    nearest         every removed feature p goes to the kept feature k it is most like: D = W_P C,
                    C_pk = <a_p, a_k> / <a_k, a_k> at k = argmax |<a_p, a_k>| / |a_k|, else 0
    mean            the form that the paper describes: D = W_P C with C_pk = 1 / (kept units), feature j of a removed
                    unit going to feature j of every kept unit

Where the projection has a bias, the sums are taken around the means and the bias takes what is left of the mean.

y is what the dense model's sub-layer gives (of gated models: that of their pass at lambda = 0), and a_K are the
features of the small model's, with the amplitudes of its gates folded in. So for a plan of gates, W_K is the projection
times the amplitudes, and what removed units gave is what they gave when nothing was gated. In sequence (the default),
a_K is what the small model computes behind its own refitted layers, and y also has what these still fail to give.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.errors import DataError, PPNetError
from ppnet.families import structure_of
from ppnet.layerwise import Tap, Trace, also_called, capture, decoder_layer, hooked, stream
from ppnet.plan import Plan
from ppnet.units import Leaf, Site, Structure, leaf_module

METHODS = ("least_squares", "nearest", "mean", "none")
RIDGE = 0.1
Batches = Sequence[Mapping[str, Tensor]]


# ---- sums over tokens ------------------------------------------------------------------------------------------------


@dataclass
class Moments:
    """Sums over tokens of one site, in float64; products within a batch are in float32 (float64 for float64 models).

    Attributes:
        tokens: number of tokens.
        gram: sum a_K a_K^T, ``(k, k)`` for k kept features.
        cross: sum r a_K^T, ``(D, k)``, with r = y - b - W_K a_K: what the small model misses.
        inputs, missing: sum a_K ``(k,)`` and sum r ``(D,)``.
        energy, error: sum |y - b|^2 and sum |r|^2.
        removed: sum a_P a_K^T, ``(p, k)``, and sum a_P ``(p,)``: for `nearest` only.
    """

    tokens: int = 0
    gram: Any = 0.0
    cross: Any = 0.0
    inputs: Any = 0.0
    missing: Any = 0.0
    energy: float = 0.0
    error: float = 0.0
    removed: Any = 0.0
    removed_inputs: Any = 0.0

    def add(self, kept: Tensor, output: Tensor, folded: Tensor, removed: Tensor | None = None) -> None:
        """Adds tokens.

        Args:
            kept: features of kept units, ``(N, k)``.
            output: what the dense projection gives without its bias, ``(N, D)``.
            folded: W_K ``(D, k)``.
            removed: features of removed units, ``(N, p)``.
        """
        a = kept.to(folded.dtype)
        y = output.to(folded.dtype)
        r = y - a @ folded.T
        self.tokens += len(a)
        self.gram = self.gram + (a.T @ a).double()
        self.cross = self.cross + (r.T @ a).double()
        self.inputs = self.inputs + a.sum(0, dtype=torch.float64)
        self.missing = self.missing + r.sum(0, dtype=torch.float64)
        self.energy += float(y.square().sum(dtype=torch.float64))
        self.error += float(r.square().sum(dtype=torch.float64))
        if removed is not None:
            p = removed.to(folded.dtype)
            self.removed = self.removed + (p.T @ a).double()
            self.removed_inputs = self.removed_inputs + p.sum(0, dtype=torch.float64)

    def centred(self) -> Moments:
        """The same sums around the means."""
        n = self.tokens
        return Moments(
            tokens=n,
            gram=self.gram - torch.outer(self.inputs, self.inputs) / n,
            cross=self.cross - torch.outer(self.missing, self.inputs) / n,
            removed=self.removed
            if isinstance(self.removed, float)
            else self.removed - torch.outer(self.removed_inputs, self.inputs) / n,
        )

    def error_after(self, change: Tensor, bias: Tensor | None) -> float:
        """Sum |r - D a_K - d|^2 for a change D of the projection and d of its bias."""
        left = self.error - 2 * float((change * self.cross).sum()) + float(((change @ self.gram) * change).sum())
        if bias is not None:
            left += self.tokens * float(bias @ bias) - 2 * float(bias @ (self.missing - change @ self.inputs))
        return max(left, 0.0)


# ---- the change of a projection --------------------------------------------------------------------------------------


def least_squares(moments: Moments, ridge: float, name: str = "") -> Tensor:
    """D = cross (gram + ridge * mean(diag gram) * I)^-1, float64 ``(D, k)``; the smallest D where that is singular."""
    gram, cross = moments.gram, moments.cross
    penalty = ridge * gram.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(gram + penalty * torch.eye(len(gram), dtype=gram.dtype).to(gram))
    if ridge > 0 and not failed:
        return torch.cholesky_solve(cross.T, factor).T
    if ridge > 0 and gram.any():
        warnings.warn(
            f"redistribute: the features of {name or 'a site'} are too dependent for ridge={ridge:g}; the smallest "
            "solution is taken. Give more calibration data, or a larger ridge.",
            stacklevel=2,
        )
    # Products within a batch are in float32, so directions weaker than its rounding are noise.
    return cross @ torch.linalg.pinv(gram, rtol=len(gram) * torch.finfo(torch.float32).eps, hermitian=True)


def _nearest(moments: Moments, removed_weight: Tensor) -> Tensor:
    norms = moments.gram.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    best = (moments.removed.abs() / norms.sqrt()).argmax(dim=1, keepdim=True)
    shares = torch.zeros_like(moments.removed)
    shares.scatter_(1, best, moments.removed.gather(1, best) / norms[best.squeeze(1), None])
    return removed_weight.double() @ shares


def _mean(site: Site, kept: Tensor, removed: Tensor, removed_weight: Tensor) -> Tensor:
    width = site.consumer.features_per_unit
    total = removed_weight.double().view(len(removed_weight), len(removed), width).sum(1)
    return (total / len(kept)).repeat(1, len(kept))


# ---- one projection --------------------------------------------------------------------------------------------------


def _matrix(weight: Tensor, leaf: Leaf) -> Tensor:
    """A consumer's weight as ``(out, in)``; its own inverse."""
    return weight if leaf.weight_dim == 1 else weight.T


class Projection:
    """The output projection of one site, from dense to refitted."""

    def __init__(self, model: nn.Module, small: nn.Module, site: Site, kept: Sequence[int], scale: Tensor | None):
        self.site = site
        self.dense, self.small = leaf_module(model, site.consumer), leaf_module(small, site.consumer)
        self.kept = torch.tensor(kept)
        self.removed = torch.tensor(sorted(set(range(site.units)) - set(kept)), dtype=torch.int64)
        weight = _matrix(self.dense.weight.detach(), site.consumer)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        self.folded = wide[:, self.features(self.kept)]
        if scale is not None:
            owners = site.consumer.owners(self.kept).to(scale.device)
            self.folded = self.folded * scale.detach()[owners].to(self.folded)
        self.removed_weight = wide[:, self.features(self.removed)]
        self.moments = Moments()

    def features(self, units: Tensor) -> Tensor:
        return self.site.consumer.features(units).to(self.dense.weight.device)

    def add(self, dense: Tensor | None, small: Tensor, output: Tensor, real: Tensor, method: str) -> None:
        """Adds the tokens of one batch that are `real`: both models' features, of which `nearest` alone asks for the
        dense one's, and what the projection should give."""
        # Some layers flatten (B, T) before their MLP.
        real = real.reshape(output.shape[:-1])
        output = output[real].to(self.folded.dtype)
        if self.dense.bias is not None:
            output = output - self.dense.bias.to(output)
        removed = None
        if method == "nearest" and dense is not None:
            removed = dense[real][:, self.features(self.removed)]
        self.moments.add(small[real], output, self.folded, removed)

    def refit(self, method: str, ridge: float) -> dict[str, float]:
        """Writes the new weight and bias into the small model, rounded once; the relative errors before and after."""
        moments = self.moments
        if not torch.isfinite(moments.gram).all() or not torch.isfinite(moments.cross).all():
            raise DataError(
                f"redistribute: the activations of {self.site.name} hold NaN or infinities on the calibration data; "
                "check the model and the data, or compute in float32."
            )
        around = moments if self.dense.bias is None else moments.centred()
        if method == "least_squares":
            change = least_squares(around, ridge, self.site.name)
        elif method == "nearest":
            change = _nearest(around, self.removed_weight)
        else:
            change = _mean(self.site, self.kept, self.removed, self.removed_weight)
        shift = None
        if self.dense.bias is not None:
            shift = (moments.missing - change @ moments.inputs) / moments.tokens
        with torch.no_grad():
            self.small.weight.copy_(_matrix(self.folded.double() + change, self.site.consumer))
            if shift is not None:
                self.small.bias.copy_(self.dense.bias.double() + shift)
        energy = max(moments.energy, torch.finfo(torch.float64).tiny)
        return {"before": moments.error / energy, "after": moments.error_after(change, shift) / energy}


# ---- all projections, layer by layer ---------------------------------------------------------------------------------


def _in_one_pass(model: nn.Module, small: nn.Module, sites: Sequence[Projection], index: int, traces: Sequence[Trace],
                 method: str) -> None:  # fmt: skip
    """Adds all tokens of a layer's sites: both models' sub-layers get the inputs that the dense one's have."""
    taps = [(Tap(), Tap()) for _ in sites]
    with ExitStack() as hooks:
        for projection, (dense, own) in zip(sites, taps, strict=True):
            block = projection.site.block
            hooks.enter_context(also_called(model.get_submodule(block), small.get_submodule(block)))
            fed = projection.small if projection.site.holds_consumer else small.get_submodule(block)
            hooks.enter_context(hooked((projection.dense, dense), (fed, own)))
        layer = decoder_layer(model, sites[0].site)
        for trace in traces:
            trace.calls[index].run_until(layer, trace.dense)
            for projection, (dense, own) in zip(sites, taps, strict=True):
                site = projection.site
                features = own.input if site.holds_consumer else site.entering(small, own.output)
                projection.add(dense.input, features, dense.output, trace.real, method)


@dataclass
class DenseLayer:
    """What the dense model's layer gave for one batch.

    Attributes:
        inputs: what entered each site's consumer, ``(B, T, features)``; None where no method asks for it.
        outputs: what each site's consumer gave, ``(B, T, D)``.
        hidden: what the layer gave, ``(B, T, D)``.
    """

    inputs: list[Tensor | None]
    outputs: list[Tensor]
    hidden: Tensor


def _dense_layer(model: nn.Module, layer: Sequence[Site], index: int, trace: Trace, method: str) -> DenseLayer:
    taps = [Tap() for _ in layer]
    with hooked(*((leaf_module(model, site.consumer), tap) for site, tap in zip(layer, taps, strict=True))):
        hidden = trace.calls[index].run(decoder_layer(model, layer[0]), trace.dense)
    inputs = [tap.input if method == "nearest" else None for tap in taps]
    return DenseLayer(inputs, [tap.output for tap in taps], hidden)


def _in_sequence(model: nn.Module, small: nn.Module, projection: Projection, layer: Sequence[Site], index: int,
                 traces: Sequence[Trace], dense: Sequence[DenseLayer], method: str) -> None:  # fmt: skip
    """Adds all tokens of one site: each model's sub-layer gets its own model's inputs.

    The small model's residual stream is off by what its sub-layers before have failed to give. That is added to what
    the projection should give, so that the stream is right again afterwards (with a norm after the sum: what enters
    that is).
    """
    number = layer.index(projection.site)
    before = layer[:number]
    earlier, end = [Tap() for _ in before], Tap(stop=True)
    wide = projection.folded.dtype
    pairs = [(leaf_module(small, site.consumer), tap) for site, tap in zip(before, earlier, strict=True)]
    with hooked(*pairs, (leaf_module(small, projection.site.consumer), end)):
        for trace, whole in zip(traces, dense, strict=True):
            trace.calls[index].run_until(decoder_layer(small, projection.site), trace.small)
            now = stream(model, before, trace.dense.to(wide), whole.outputs[:number])
            own = stream(small, before, trace.small.to(wide), [tap.output for tap in earlier])
            output = whole.outputs[number]
            output = output + (now - own).view_as(output)
            projection.add(whole.inputs[number], end.input, output, trace.real, method)


def _advance(model: nn.Module, small: nn.Module, layer: Sequence[Site], index: int, traces: Sequence[Trace],
             dense: Sequence[DenseLayer] | None, sequential: bool) -> None:  # fmt: skip
    """Moves all hidden states through a layer, which the dense model may have gone through already."""
    for number, trace in enumerate(traces):
        whole = _dense_layer(model, layer, index, trace, "") if dense is None else dense[number]
        if number == 0:
            trace.check(whole.hidden, stream(model, layer, trace.dense, whole.outputs) if sequential else None, index)
        trace.dense = whole.hidden
        if sequential:
            trace.small = trace.calls[index].run(decoder_layer(small, layer[0]), trace.small)


@torch.no_grad()
def redistribute(
    model: nn.Module,
    small: nn.Module,
    structure: Structure,
    plan: Plan,
    scales: Sequence[tuple[Tensor | None, Tensor | None]],
    batches: Batches,
    *,
    method: str = "least_squares",
    ridge: float = RIDGE,
    sequential: bool = True,
) -> dict[str, Any]:
    """Refits the output projections of a compacted model, in place.

    The data goes through both models' layers one by one (`ppnet.layerwise`): held at a time are the hidden states of
    all tokens, of both, in sequence also the dense sub-layers' outputs of one layer (and, for `nearest`, inputs), and
    the sums of one layer: for each of its sites ``k^2 + D k`` numbers in float64 for k kept features and width D.

    Args:
        model: the dense model, in evaluation mode and bypassing its gates, if any (but not their amplitudes at u = 0).
        small: what `ppnet.compact` makes of it, in evaluation mode.
        structure, plan: the sites, and the kept units.
        scales: per site the amplitudes folded into `small`: (per unit ``(U,)`` or None, unused).
        batches: ``input_ids`` and, where padded, ``attention_mask``; padding does not count.
        method: one of `METHODS`.
        ridge: see the module; 0 takes the smallest of the best solutions.
        sequential: each model's sub-layers get their own model's inputs, the small model's layers before being refitted
            already; what is then missing in its residual stream is made up for, too, so least squares refits every
            projection from the first removal on, also where nothing is removed. Else all sub-layers get the dense
            model's inputs, and only what is removed is made up for.

    Returns:
        What was done, for `Plan.extra`: the settings, the number of tokens, and per refitted site the squared error of
        the projection's output relative to the dense one's, ``{"before": ..., "after": ...}``.

    Raises:
        DataError: no tokens, ids outside of the vocabulary, or activations that are not finite.
        UnsupportedModelError: layers that cannot be run one by one.
    """
    check_options(method, ridge)
    layers: dict[int, list[Site]] = {}
    for site in structure_of(model).sites:
        layers.setdefault(site.layer, []).append(site)
    traces = capture(model, [decoder_layer(model, sites[0]) for sites in layers.values()], batches)
    tokens = sum(int(trace.real.sum()) for trace in traces)
    if tokens == 0:
        raise DataError("redistribute: holds no tokens that are not padding; give calibration text or token ids.")
    widest = max(len(plan.kept[site.name]) * site.consumer.features_per_unit for site in structure.sites)
    if tokens < widest and method == "least_squares":
        warnings.warn(
            f"redistribute: {tokens:,} tokens for projections of up to {widest:,} features; what is refitted to so few "
            "may be worse on other text. Give more calibration data, several times as many tokens as features.",
            stacklevel=4,
        )
    scale_of = {site.name: scale for site, (scale, _) in zip(structure.sites, scales, strict=True)}
    errors, started = {}, False
    for index, layer in enumerate(layers.values()):
        chosen = []
        for site in layer:
            kept = plan.kept.get(site.name)
            if kept is None:  # of a kind that the model was not gated in
                continue
            started = started or len(kept) < site.units
            if len(kept) < site.units or (started and sequential and method == "least_squares"):
                chosen.append(Projection(model, small, site, kept, scale_of[site.name]))
        if chosen and not sequential:
            _in_one_pass(model, small, chosen, index, traces, method)
        dense = None
        if chosen and sequential:
            dense = [_dense_layer(model, layer, index, trace, method) for trace in traces]
        for projection in chosen:
            if dense is not None:
                _in_sequence(model, small, projection, layer, index, traces, dense, method)
            errors[projection.site.name] = projection.refit(method, ridge)
        if index + 1 < len(layers):
            _advance(model, small, layer, index, traces, dense, sequential)
    return {"method": method, "ridge": ridge, "sequential": sequential, "tokens": tokens, "errors": errors}


def check_options(method: str, ridge: float) -> None:
    """Raises PPNetError for an unknown method or a ridge that is negative or not finite."""
    if method not in METHODS:
        raise PPNetError(f"redistribution: {method!r} is not known; use one of {', '.join(METHODS)}.")
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < float("inf"):
        raise PPNetError(f"ridge: {ridge!r} must be a finite number >= 0, as a share of the mean squared feature.")
