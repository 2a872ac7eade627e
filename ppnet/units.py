"""The vocabulary of the package: leaves, sites and the structure of a model.

A *unit* is the smallest thing that can be removed. The units of one kind in one sub-layer form a *site*. A site is
fully described by its *leaves*: the linear modules whose rows (output features) or columns (input features) belong to a
unit. Everything else (masking, gathering, costs, importance, compaction) is derived from these index tables, so a model
family only has to name tensors (`ppnet.families`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

KINDS = ("kv_group", "neuron")
# The entry of a model's config that `ppnet.sort_` leaves; absent where units are in the order they were made in.
ORDER = "ppnet_order"
_READ = "_ppnet_read"
# What the outputs of a fused producer are, in the order in which `Leaf.index` holds them side by side.
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclass(frozen=True, eq=False)
class Leaf:
    """One linear module of a site.

    Attributes:
        name: dotted name of the module from the model's root, e.g. ``model.layers.0.mlp.up_proj``.
        index: int64 ``(U, r)``; the ``r`` output features (producer) or input features (consumer) of unit ``u``.
        weight_dim: the axis of ``weight`` that is indexed: 0 or 1. ``nn.Linear`` stores (out, in), ``Conv1D``
            (in, out).
        role: what the leaf does, in the field's words: ``q``, ``k``, ``v``, ``qkv``, ``gate``, ``up``, ``gate_up``
            (producers), ``out`` (the consumer), or ``q_norm``, ``k_norm`` (`Site.across`).
        blocks: widths of the blocks that `index` holds side by side: ``(r,)``, or ``(Dh, Dh, Dh)`` for a fused q|k|v in
            which all of q comes first. Where the features of a unit lie together, that is one block, also if fused.
    """

    name: str
    index: Tensor
    weight_dim: int
    role: str
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.blocks:
            object.__setattr__(self, "blocks", (self.index.shape[1],))

    @property
    def features_per_unit(self) -> int:
        return int(self.index.shape[1])

    @property
    def parts(self) -> dict[str, Tensor]:
        """What a unit's features do: role -> ``(U, part of r)``; one role, or those of a fused producer."""
        roles = FUSED.get(self.role, (self.role,))
        fused = len(self.blocks) == len(roles)
        widths = list(self.blocks) if fused else [self.features_per_unit // len(roles)] * len(roles)
        return dict(zip(roles, self.index.split(widths, dim=1), strict=True))

    @cached_property
    def consecutive(self) -> bool:
        """Whether the features are the units' one after the other, in blocks of equal width: the first units' features
        are then a view of a tensor, ``(K * r,)`` or, of a fused producer, ``(blocks, K * r / blocks)``."""
        units, per_unit = self.index.shape
        everything = self.features(torch.arange(units))
        return len(set(self.blocks)) == 1 and torch.equal(everything, torch.arange(units * per_unit))

    def features(self, units: Tensor) -> Tensor:
        """Feature indices of the given units: int64 ``(K,)`` -> int64 ``(K * r,)``, in the leaf's own order.

        A fused producer (q, k and v in one matrix) keeps its blocks: all q features, then all k, then all v. `index`
        stores the blocks side by side, so column blocks of equal meaning are laid out one after the other.
        """
        picked = self.index.index_select(0, units)
        if len(self.blocks) == 1:
            return picked.reshape(-1)
        return torch.cat([part.reshape(-1) for part in picked.split(list(self.blocks), dim=1)])

    def owners(self, units: Tensor) -> Tensor:
        """Which unit each feature of `features(units)` belongs to: int64 ``(K * r,)``."""
        return torch.cat([units.repeat_interleave(width) for width in self.blocks])


@dataclass(frozen=True, eq=False)
class Site:
    """The units of one kind in one sub-layer.

    Attributes:
        layer: index of the layer.
        kind: ``kv_group`` (one KV head with its query heads; under MHA a head) or ``neuron``.
        block: dotted name of the sub-layer module, a child of the layer: its forward input is what the producers read,
            and it holds the consumer, or what it returns is what enters the consumer.
        units: U, the dense number of units.
        producers: leaves whose output features belong to units.
        consumer: the leaf whose input features belong to units.
        attributes: kept units K -> the attributes of `block` that say its width, dotted where a child has them;
            ``config.<name>`` for an entry of the config that the forward reads.
        norm: post-norm families: dotted name of the norm that is taken of the sub-layer's input plus the consumer's
            output. Empty: the consumer's output is what is added to the residual stream.
        activation: where `block` does not hold the consumer: dotted name of the module that what it returns goes
            through before it enters the consumer; empty: none.
        across: norms over the features of all units at once (of all queries, of all keys), as leaves whose `weight` is
            one number per feature. Units that are removed no longer count in their mean square.
    """

    layer: int
    kind: str
    block: str
    units: int
    producers: tuple[Leaf, ...]
    consumer: Leaf
    attributes: Callable[[int], Mapping[str, int | float]]
    norm: str = ""
    activation: str = ""
    across: tuple[Leaf, ...] = ()

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return (*self.producers, self.consumer)

    @property
    def output(self) -> str:
        """The module whose output is what the units give to the residual stream."""
        return self.block if self.holds_consumer and not self.norm else self.consumer.name

    @property
    def holds_consumer(self) -> bool:
        """Whether the consumer is inside of `block`."""
        return self.consumer.name.startswith(f"{self.block}.")

    def leaf(self, role: str) -> Leaf | None:
        """The leaf of just this role."""
        return next((leaf for leaf in self.leaves if leaf.role == role), None)

    def producer(self, role: str) -> Leaf | None:
        """The producer, fused or not, that makes queries (``q``), gates (``gate``) and so on."""
        return next((leaf for leaf in self.producers if role in leaf.parts), None)

    def entering(self, model: nn.Module, output: Tensor) -> Tensor:
        """What enters a consumer that is outside of `block`, from what the block returned."""
        return model.get_submodule(self.activation)(output) if self.activation else output

    def set_attributes(self, model: nn.Module, kept: int) -> None:
        """Tells the modules of a model that the site has `kept` units."""
        own: dict[str, int | float] = {}
        for name, value in self.attributes(kept).items():
            if name.startswith("config."):
                own[name.removeprefix("config.")] = value
                continue
            owner, _, attribute = f"{self.block}.{name}".rpartition(".")
            setattr(model.get_submodule(owner), attribute, value)
        if own:
            from ppnet.shipped.modeling_ppnet_decoder import LayerConfig

            block, shared = cast(Any, model.get_submodule(self.block)), cast(Any, model).config
            block.config = shared if kept == self.units else LayerConfig(shared, own)


@dataclass(frozen=True, eq=False)
class Structure:
    """What was found in a model: its family, its sites (layer by layer, attention before MLP), its widths.

    Attributes:
        order: which order `ppnet.sort_` put the units into, "" for none: plans and scores of another name other units.
    """

    family: str
    model_type: str
    layers: int
    width: int
    vocabulary: int
    sites: tuple[Site, ...]
    order: str = ""

    @property
    def total_units(self) -> int:
        return sum(site.units for site in self.sites)

    def offsets(self) -> list[int]:
        """Start of each site in the flat vector over all units, plus the total: length ``len(sites) + 1``."""
        starts = [0]
        for site in self.sites:
            starts.append(starts[-1] + site.units)
        return starts


def leaf_module(model: nn.Module, leaf: Leaf) -> nn.Linear | Conv1D:
    """The module that a leaf names; families make leaves of these two classes only."""
    return cast("nn.Linear | Conv1D", model.get_submodule(leaf.name))


def leaf_tensor(model: nn.Module, leaf: Leaf, name: str = "weight") -> Tensor | None:
    """A leaf's weight or bias (None if it has no bias), read from its file where the model has none: `reading`."""
    read = model.__dict__.get(_READ)
    own: Tensor | None = getattr(leaf_module(model, leaf), name)
    return own if own is None or read is None else read(f"{leaf.name}.{name}")


def leaf_weight(model: nn.Module, leaf: Leaf) -> Tensor:
    return cast(Tensor, leaf_tensor(model, leaf))


@contextmanager
def reading(model: nn.Module, read: Callable[[str], Tensor]) -> Iterator[None]:
    """Inside, `leaf_tensor` of a model without weights (on the meta device) gives ``read(name)``: one at a time."""
    model.__dict__[_READ] = read
    try:
        yield
    finally:
        del model.__dict__[_READ]
