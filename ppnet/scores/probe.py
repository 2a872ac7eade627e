"""Looking into a pass through the model: what enters the consumers, and its gradient. No gate parameter, no weight
gradient: a node that passes its input on hands (x, dx) to a sink in the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ppnet.errors import UnsupportedModelError
from ppnet.families import structure_of
from ppnet.scores.statistics import Affine
from ppnet.units import Site, Structure
from ppnet.wrap import is_wrapped

Sink = Callable[[int, Tensor, Tensor], None]
Watch = Callable[[int, Tensor], None]


class _Gate(torch.autograd.Function):
    """x -> x. Its backward shows x (B, T, F) and dx to a sink; `anchor` makes the graph begin here if x has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, sink: Sink, index: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink, ctx.index = sink, index
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(ctx.index, x.detach(), dx)
        return dx, None, None, None


class ProbeHook:
    """The hook of a probe on one consumer. It does not keep its probe alive; a copy, pickled or not, does nothing."""

    def __init__(self, probe: Probe | None = None, number: int = 0) -> None:
        self._probe = None if probe is None else weakref.ref(probe)
        self._number = number

    @property
    def probe(self) -> Probe | None:
        return None if self._probe is None else self._probe()

    def __reduce__(self) -> tuple[type[ProbeHook], tuple[()]]:
        return ProbeHook, ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        probe = self.probe
        return None if probe is None or not probe.active else probe.enter(self._number, args)


class Probe:
    """Hooks on the consumers of some sites, until `remove`. Copies of the model have none that do anything.

    Args:
        model: the model that holds the consumers, under any wrapper of its forward.
        sites: where to look.
        sink: called in the backward pass with (number of the site, x, dx).
        watch: called in the forward pass with (number of the site, x).

        run: the state of the training that it looks into, where an exception of that may leave the hooks behind.

    Attributes:
        active: nothing is done while False.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        sink: Sink | None = None,
        watch: Watch | None = None,
        run: Any = None,
    ) -> None:
        self.sink, self.watch, self.run = sink, watch, run
        self.active = True
        self._sequences = 0  # of the pass, as the attention before was given them
        self._anchors: dict[torch.device, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        try:
            for number, site in enumerate(sites):
                consumer = model.get_submodule(site.consumer.name)
                self._handles.append(consumer.register_forward_pre_hook(ProbeHook(self, number)))
        except BaseException:
            self.remove()
            raise

    def anchors(self) -> list[Tensor]:
        """A leaf per device that every gate of the passes so far depends on. They get no gradient: to differentiate a
        loss with respect to them runs the sinks, and computes nothing that these do not need."""
        return list(self._anchors.values())

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def enter(self, number: int, args: tuple[Any, ...]) -> Any:
        """What a consumer's hook does with the arguments of its call."""
        x = args[0]
        flat = x.dim() == 2 and self._sequences > 0
        if flat:  # some layers flatten (B, T) before their MLP
            x = x.unflatten(0, (self._sequences, -1))
        elif x.dim() == 3:
            self._sequences = len(x)
        if self.watch is not None:
            self.watch(number, x)
        if self.sink is None or not torch.is_grad_enabled():
            return None
        anchor = self._anchors.get(x.device)
        if anchor is None:
            anchor = self._anchors[x.device] = torch.zeros(1, device=x.device, requires_grad=True)
        gated = _Gate.apply(x, anchor, self.sink, number)
        return (gated.flatten(0, 1) if flat else gated, *args[1:])


def remove_probes(model: nn.Module, unless: Callable[[Probe], bool] = lambda probe: False) -> None:
    """Takes off what probes have left on a model, above all those of a training that was interrupted.

    Args:
        unless: probes that stay.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, ProbeHook) and (hook.probe is None or not unless(hook.probe)):
                del module._forward_pre_hooks[key]


@contextmanager
def without_probes(model: nn.Module) -> Iterator[None]:
    """Probes that are on the model already see nothing of what happens inside."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    probes = {id(hook.probe): hook.probe for hook in hooks if isinstance(hook, ProbeHook) and hook.probe is not None}
    flags = [(probe, probe.active) for probe in probes.values()]
    try:
        for probe, _ in flags:
            probe.active = False
        yield
    finally:
        for probe, active in flags:
            probe.active = active


def probe_target(model: Any) -> tuple[nn.Module, Structure]:
    """The module below which the sites' names lead to modules, and its structure: also with PEFT adapters attached.

    Raises:
        UnsupportedModelError: as `ppnet.families.structure_of`, or gates that are being trained.
    """
    if is_wrapped(model):
        raise UnsupportedModelError(
            f"model: this {type(model).__name__} carries gates, whose own training decides what stays; collect "
            "movement on the model without gates (ppnet.unwrap)."
        )
    if not hasattr(model, "peft_config"):
        return model, structure_of(model)
    host = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        bare = type(host)(host.config)  # the same model without adapters: names and widths
    return host, structure_of(bare)


def input_norms(model: Any, structure: Structure, device: torch.device) -> dict[str, Affine]:
    """The norm that feeds each sub-layer, found by watching one pass over two tokens: block name -> its gain and shift.

    A module counts as the norm if a sub-layer's input is its very output and it has a parameter of the model's width
    only. Its gain is read off what it does to the signs (1, -1, 1, ...) and their negative, so it does not matter how
    its formula spells it. Sub-layers without one are left out.
    """
    last: dict[int, tuple[nn.Module, Tensor]] = {}
    found: dict[str, nn.Module] = {}
    blocks = {site.block for site in structure.sites}
    handles: list[RemovableHandle] = []

    def made(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            last[id(output)] = (module, output)

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("hidden_states")
            maker = last.get(id(x))
            if maker is not None:
                found[name] = maker[0]

        return hook

    try:
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if own and all(p.shape == (structure.width,) for p in own) and not any(module.children()):
                handles.append(module.register_forward_hook(made))
            if name in blocks:
                handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True))
        # With gradients on, no operator stands in for several modules at once.
        with torch.enable_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _affine(module, structure.width) for name, module in found.items()}


@torch.no_grad()
def _affine(norm: nn.Module, width: int) -> Affine:
    weight = next(norm.parameters())
    signs = torch.ones(width, dtype=weight.dtype, device=weight.device)
    signs[1::2] = -1
    up, down = (norm(sign[None, None]).flatten().to(torch.float64 if weight.device.type != "mps" else torch.float32)
                for sign in (signs, -signs))  # fmt: skip
    return Affine(gain=(up - down) / 2 * signs.to(up), shift=(up + down) / 2)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Parameters need no gradient inside, so that no gradient of them is computed and nothing is kept for one."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
