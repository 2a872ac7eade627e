"""Where the layers of dense decoders keep their projections, as data: a `Layout` is all that such a family needs.

Its names, with the widths of a model, travel with compacted models as ``config.ppnet_layout``, from which the one
modelling file of all these families (`ppnet.shipped.modeling_ppnet_decoder`) knows what to cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.errors import CheckpointError, UnsupportedModelError
from ppnet.families.base import FAMILIES, Family, consecutive, decoder_layers, linear_leaf, no_attributes, register
from ppnet.units import Leaf, Site

SHIPPED = "decoder"
# The entry of a config that says where `ppnet.discover` found the units of a type that ppnet does not know.
TRACED = "ppnet_traced"


@dataclass(frozen=True)
class Layout:
    """Names within a decoder. Those of modules are relative to what holds them.

    Attributes:
        layers: of the list of layers, in the bare model.
        attention: of the attention, in a layer. head: its attribute with the width of a head.
        reads: role -> its projections: ``q``, ``k``, ``v``, or fused ``qkv``. writes: its output projection.
        interleaved: the rows of a fused ``qkv`` are [q, k, v] head by head, not all of q, then k, then v.
        counts: dotted attributes of the attention that its forward reads -> what they are: ``heads``, ``kv_heads`` or
            the ``features`` of all heads; ``config.<name>`` for entries of its config.
        across: norms over all heads at once, in the attention -> ``q`` or ``k``.
        mlp: of the MLP, in a layer; empty: its projections are the layer's own.
        makes: role -> projections of the MLP: ``gate`` and ``up``, ``up``, or fused ``gate_up``. takes: the one that
            takes their product.
        activation: of the activation, where `mlp` is empty.
        post_norms: names of the norms that are taken of a sub-layer's input plus its output (attention, MLP), in a
            layer; empty: none (a norm of the output alone does not count).
        heads, kv_heads, neurons: the config entries that say how many there are; empty: as many KV heads as heads.
        head_stated: whether the stock class takes the width of a head from ``config.head_dim``, so that it can have
            fewer heads.
        refuse: config -> why models like that cannot be taken, or None.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    head: str = "head_dim"
    reads: Mapping[str, str] = field(default_factory=lambda: {"q": "q_proj", "k": "k_proj", "v": "v_proj"})
    writes: str = "o_proj"
    interleaved: bool = False
    counts: Mapping[str, str] = field(default_factory=dict)
    across: Mapping[str, str] = field(default_factory=dict)
    mlp: str = "mlp"
    makes: Mapping[str, str] = field(default_factory=lambda: {"gate": "gate_proj", "up": "up_proj"})
    takes: str = "down_proj"
    activation: str = ""
    post_norms: Callable[[Any], tuple[str, str]] = lambda config: ("", "")
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    neurons: str = "intermediate_size"
    head_stated: bool = True
    refuse: Callable[[Any], str | None] = lambda config: None


LayoutOf = Callable[[Any], Layout]


@dataclass(frozen=True)
class Heads:
    """The heads of one attention: `groups` KV heads of `queries` query heads each, all of `width` features."""

    groups: int
    queries: int
    width: int

    @classmethod
    def of(cls, layout: Layout, name: str, attention: Any) -> Heads:
        """Reads them off an attention, dense or compacted.

        Raises:
            UnsupportedModelError: KV heads with unequal numbers of query heads.
        """
        width = int(getattr(attention, layout.head))
        heads = _inputs(attention.get_submodule(layout.writes)) // width
        fused = layout.reads.get("qkv")
        if fused:
            groups = (_outputs(attention.get_submodule(fused)) // width - heads) // 2
        else:
            groups = _outputs(attention.get_submodule(layout.reads["k"])) // width
        queries, remainder = divmod(heads, groups)
        if remainder or (layout.interleaved and queries > 1):
            raise UnsupportedModelError(
                f"model: {name} has {heads} query heads for {groups} KV heads; KV groups need the same number of query "
                f"heads each{', here one' if layout.interleaved else ''}."
            )
        return cls(groups, queries, width)

    def features(self, role: str) -> Tensor:
        """Index table ``(groups, r)`` of the features of one role, counted from its own first one."""
        return consecutive(self.groups, self.width * (self.queries if role == "q" else 1))

    def fused(self, interleaved: bool) -> tuple[Tensor, tuple[int, ...]]:
        """Index table of a fused q|k|v ``(groups, r)`` with the features of a unit in this order, and its blocks."""
        if interleaved:
            return consecutive(self.groups, 3 * self.width), ()
        parts, start = [], 0
        for role in ("q", "k", "v"):
            parts.append(self.features(role) + start)
            start += parts[-1].numel()
        return torch.cat(parts, dim=1), tuple(part.shape[1] for part in parts)


def _outputs(module: Any) -> int:
    return int(module.out_features if hasattr(module, "out_features") else module.nf)


def _inputs(module: Any) -> int:
    return int(module.in_features if hasattr(module, "in_features") else module.nx)


# ---- sites -----------------------------------------------------------------------------------------------------------


def layers_name(layout: Layout, model: Any) -> str:
    """Dotted name of the list of layers, of a model with a head or of a bare one."""
    prefix = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
    return f"{prefix}.{layout.layers}".lstrip(".")


def sites_of(layout_of: LayoutOf, model: Any) -> tuple[Site, ...]:
    """Two sites per layer: KV groups of the attention and neurons of the MLP.

    Raises:
        UnsupportedModelError: a config that the family refuses, KV groups of unequal size, modules that are not linear.
    """
    layout = layout_of(model.config)
    reason = layout.refuse(model.config)
    if reason:
        raise UnsupportedModelError(f"model: {reason}")
    decoder = layers_name(layout, model)
    found: list[Site] = []
    for layer, module in enumerate(decoder_layers(model, decoder)):
        found += _layer_sites(layout, model, layer, f"{decoder}.{layer}", module)
    return tuple(found)


def _layer_sites(layout: Layout, model: Any, layer: int, name: str, module: Any) -> Iterator[Site]:
    after_attention, after_mlp = (f"{name}.{norm}" if norm else "" for norm in layout.post_norms(model.config))
    block = f"{name}.{layout.attention}"
    attention = module.get_submodule(layout.attention)
    heads = Heads.of(layout, block, attention)
    yield Site(
        layer=layer,
        kind="kv_group",
        block=block,
        units=heads.groups,
        producers=tuple(_attention_leaves(layout, model, block, heads)),
        consumer=linear_leaf(model, f"{block}.{layout.writes}", "out", heads.features("q")),
        attributes=partial(_counts, dict(layout.counts), heads, _eps(layout, attention)),
        norm=after_attention,
        across=tuple(
            Leaf(f"{block}.{norm}", heads.features(role), 0, f"{role}_norm") for norm, role in layout.across.items()
        ),
    )
    holder = f"{name}.{layout.mlp}".rstrip(".")
    takes = f"{holder}.{layout.takes}"
    neurons = _inputs(model.get_submodule(takes))
    each = consecutive(neurons, 1)
    up = layout.makes.get("up", "")
    yield Site(
        layer=layer,
        kind="neuron",
        block=holder if layout.mlp else f"{holder}.{up}",
        units=neurons,
        producers=tuple(_mlp_leaves(layout, model, holder, each)),
        consumer=linear_leaf(model, takes, "out", each),
        attributes=no_attributes,
        norm=after_mlp,
        activation=f"{holder}.{layout.activation}" if layout.activation else "",
    )


def _attention_leaves(layout: Layout, model: nn.Module, block: str, heads: Heads) -> Iterator[Leaf]:
    for role, name in layout.reads.items():
        if role == "qkv":
            index, blocks = heads.fused(layout.interleaved)
            yield linear_leaf(model, f"{block}.{name}", role, index, blocks)
        else:
            yield linear_leaf(model, f"{block}.{name}", role, heads.features(role))


def _mlp_leaves(layout: Layout, model: nn.Module, block: str, each: Tensor) -> Iterator[Leaf]:
    for role, name in layout.makes.items():
        if role == "gate_up":
            both = torch.cat([each, each + len(each)], dim=1)
            yield linear_leaf(model, f"{block}.{name}", role, both, blocks=(1, 1))
        else:
            yield linear_leaf(model, f"{block}.{name}", role, each)


def _eps(layout: Layout, attention: Any) -> Mapping[str, float]:
    """Of the norms across heads: their mean square is of the kept features only, so what is added to it changes."""
    return {f"{norm}.variance_epsilon": attention.get_submodule(norm).variance_epsilon for norm in layout.across}


def _counts(counts: Mapping[str, str], heads: Heads, eps: Mapping[str, float], kept: int) -> Mapping[str, int | float]:
    numbers = {"heads": kept * heads.queries, "kv_heads": kept, "features": kept * heads.queries * heads.width}
    found: dict[str, int | float] = {name: numbers[what] for name, what in counts.items()}
    return found | {name: value * heads.groups / kept for name, value in eps.items()}


# ---- configs ---------------------------------------------------------------------------------------------------------


def per_layer_keys(layout_of: LayoutOf, site: Site, kept: int, config: Any) -> Mapping[str, int]:
    """The config entries that say how many units of a site are kept."""
    layout = layout_of(config)
    if site.kind == "neuron":
        return {layout.neurons: kept}
    queries = site.consumer.features_per_unit // _width(site)
    return {layout.heads: kept * queries, **({layout.kv_heads: kept} if layout.kv_heads else {})}


def _width(site: Site) -> int:
    """Of one head."""
    leaf = site.producer("k")
    return 0 if leaf is None else int(leaf.parts["k"].shape[1])


def stock_expressible(layout_of: LayoutOf, site: Site, config: Any) -> bool:
    """Whether the stock class can hold fewer units of this kind, when every layer has equally many.

    One that takes the width of a head from the number of heads cannot; nor one whose norms go across the heads, as it
    takes their eps from the config.
    """
    layout = layout_of(config)
    return site.kind == "neuron" or (layout.head_stated and not layout.across)


def shipped_entries(layout_of: LayoutOf, model: Any) -> Mapping[str, Any]:
    """What the shipped class of a model reads of its layout, as JSON: ``config.ppnet_layout``."""
    layout = layout_of(model.config)
    first = next(iter(decoder_layers(model, layers_name(layout, model))))
    heads = Heads.of(layout, layout.attention, first.get_submodule(layout.attention))
    mlp = f"{layout.mlp}." if layout.mlp else ""
    attention = f"{layout.attention}."
    of_role = {"q": ["heads"], "k": ["kv_heads"], "v": ["kv_heads"], "qkv": ["heads", "kv_heads", "kv_heads"]}
    outputs = {f"{attention}{name}": of_role[role] for role, name in layout.reads.items()}
    outputs |= {f"{mlp}{name}": ["neurons"] * (1 + (role == "gate_up")) for role, name in layout.makes.items()}
    of_norm = {"q": "heads", "k": "kv_heads"}
    return {
        "head_dim": heads.width,  # some classes would take it for their rotary embedding from the number of heads
        "ppnet_layout": {
            "layers": layout.layers,
            "queries_per_kv_head": heads.queries,
            "entries": {"heads": layout.heads, "neurons": layout.neurons},
            "outputs": outputs,
            "inputs": {f"{attention}{layout.writes}": "heads", f"{mlp}{layout.takes}": "neurons"},
            "attributes": {f"{attention}{name}": what for name, what in layout.counts.items()},
            "norms": {f"{attention}{name}": of_norm[role] for name, role in layout.across.items()},
        },
    }


def register_layout(
    model_type: str,
    layout: Layout | LayoutOf,
    tiny: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> Family:
    """Registers a dense decoder whose layers are laid out like this.

    Args:
        layout: of all models of the type, or a function of their config.
        tiny: the config of a tiny random model, for tests.
        variants: further entries of that config, by a name, which change where units are or what must hold for them.
    """
    layout_of = (lambda config: layout) if isinstance(layout, Layout) else layout
    return register(
        Family(
            name=model_type,
            model_types=(model_type,),
            sites=partial(sites_of, layout_of),
            tiny_configs=lambda model_type: dict(tiny),
            per_layer_keys=partial(per_layer_keys, layout_of),
            stock_expressible=partial(stock_expressible, layout_of),
            parts=partial(shipped_entries, layout_of),
            shipped=SHIPPED,
            variants=dict(variants or {}),
        )
    )


# ---- types that are not registered by name ---------------------------------------------------------------------------


def to_dict(layout: Layout) -> dict[str, Any]:
    """A layout as JSON: what differs from Llama's."""
    usual = Layout()
    values = {each.name: getattr(layout, each.name) for each in fields(Layout)}
    return {name: value for name, value in values.items() if not callable(value) and value != getattr(usual, name)}


def register_traced(config: Mapping[str, Any]) -> None:
    """Makes the type of a config known whose layout `ppnet.discover` has noted in it.

    Raises:
        CheckpointError: what is noted there is no layout.
    """
    model_type = str(config.get("model_type")).removeprefix("ppnet_")
    if TRACED not in config or model_type in FAMILIES:
        return
    try:
        layout = Layout(**config[TRACED])
    except TypeError as error:
        raise CheckpointError(f"path: {TRACED} of config.json is damaged: {error}.") from error
    register_layout(model_type, layout, {})
