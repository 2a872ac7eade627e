"""Finding the units of a decoder that no family knows: by what its modules do, proved before it is believed.

One token goes through the first layer, many times over in a batch. In row b one output feature of one projection is
NaN, and what is NaN afterwards shows where the feature goes: to a head of the queries, keys or values (which the
attention function gets), or to an input feature of the projection behind. The `Layout` that follows is believed only if
removing units of every layer then computes what masking them does (`ppnet.verify`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.errors import EquivalenceError, UnsupportedModelError
from ppnet.families import FAMILIES, structure_of
from ppnet.families.layout import TRACED, Layout, register_layout, to_dict
from ppnet.tracing import Seen, Watch, unknown
from ppnet.verify import verify_sites

# What configs and attentions call these numbers.
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
NEURONS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "inner_dim")
WIDTHS = ("head_dim", "head_size", "attention_head_size")


def discover(model: Any) -> Layout:
    """Finds the units of a dense decoder of an unknown type, and makes the type known to ppnet in this process.

    Afterwards `ppnet.wrap`, `ppnet.compact` and all the rest work on it. What was found is also noted in
    ``model.config.ppnet_traced``, from which `ppnet.load` knows it in other processes.

    Args:
        model: a causal language model of transformers, with its weights.

    Returns:
        Where its layers keep their projections.

    Raises:
        UnsupportedModelError: no such layout describes it, or it was not proved right; says why. Nothing has changed
            then.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    if model_type in FAMILIES:
        raise UnsupportedModelError(
            f"model: config.model_type {model_type!r} is known already; use the model as it is."
        )
    layout = trace(model)
    register_layout(model_type, layout, {})
    try:
        verify_sites(model, structure_of(model))
    except EquivalenceError as error:
        del FAMILIES[model_type]
        raise UnsupportedModelError(f"model: its units seemed to be found, but {error}") from error
    except BaseException:
        del FAMILIES[model_type]
        raise
    setattr(model.config, TRACED, to_dict(layout))
    return layout


# ---- from what is seen to names --------------------------------------------------------------------------------------


def trace(model: Any) -> Layout:
    """The layout of a decoder, from its first layer; not proved.

    Raises:
        UnsupportedModelError: none describes it; says why.
    """
    try:
        return _trace(model)
    except UnsupportedModelError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise unknown(f"its first layer does not run on one token ({error})") from error


def _trace(model: Any) -> Layout:
    if not getattr(model, "can_generate", lambda: False)():
        raise unknown(f"a {type(model).__name__} does not generate, and only causal language models are looked into")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise unknown("its weights are on the meta device; load them first")
    name, layers = _layers(model)
    watch = Watch(model, layers[0])
    seen = watch.run(1)
    if seen.attention is None:
        raise unknown(f"the attention of {name}.0 does not go through transformers' attention functions")
    block = next((path for path, module in layers[0].named_modules() if module is seen.attention), "")
    inside = {path for path in watch.linears if path.startswith(f"{block}.")}
    if not block or len(inside) == len(watch.linears):
        raise unknown(f"{name}.0 does not keep its attention in a module of its own")
    prefix = model.base_model_prefix if hasattr(model, model.base_model_prefix) else ""
    return Layout(
        layers=name.removeprefix(f"{prefix}."),
        attention=block,
        **_attention(model, watch, seen, block, inside),
        **_mlp(model, watch, [path for path in seen.inputs if path not in inside]),
    )


def _layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: the one list of as many layers, all of one class, as the config says."""
    count = getattr(model.config, "num_hidden_layers", None)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if len(found) != 1:
        raise unknown(f"{len(found)} lists of modules have num_hidden_layers={count} entries, not one")
    ((name, layers),) = found.items()
    if len({type(layer) for layer in layers}) > 1:
        raise unknown(f"the layers in {name} are of different classes")
    deep = next((f"{name}.0.{path}" for path, p in layers[0].named_parameters() if p.dim() > 2), None)
    if deep is not None:
        raise unknown(f"{deep} is no matrix, as experts and convolutions are not; only dense decoders are looked into")
    return name, layers


def _attention(model: Any, watch: Watch, seen: Seen, block: str, inside: set[str]) -> dict[str, Any]:
    """What of a layout is about the attention."""
    heads, kv_heads = seen.heads["q"].shape[1], seen.heads["k"].shape[1]
    width = seen.heads["q"].shape[2]
    if not seen.heads["q"].shape[2] == seen.heads["k"].shape[2] == seen.heads["v"].shape[2]:
        raise unknown(f"{block} has values of another width than its keys")
    reads, across, interleaved = {}, {}, False
    rest = [path for path in seen.inputs if path in inside]
    for path in list(rest):
        goes = [_roles(watch, row) for row in _rows(*watch.follow(path))]
        roles = [role for role, _ in goes]
        if not any(roles):
            continue
        rest.remove(path)
        name = path.removeprefix(f"{block}.")
        if len(set(roles)) == 1:
            reads[str(roles[0])] = name
        elif watch.outputs_of(path) == (heads + 2 * kv_heads) * width and None not in roles:
            reads["qkv"] = name
            interleaved = roles != sorted(roles, key=lambda role: "qkv".index(str(role)))
        else:
            raise unknown(f"what {path} makes goes to {sorted(set(map(str, roles)))}")
        for role, every in goes:
            if every and (heads if role == "q" else kv_heads) > 1:
                across[_norm(watch, seen, block, path)] = str(role)
    if set(reads) not in ({"qkv"}, {"q", "k", "v"}):
        raise unknown(f"of {block}, {sorted(reads) or 'none'} of q, k, v are made by linear modules")
    if len(rest) != 1 or watch.inputs_of(rest[0]) != heads * width:
        raise unknown(f"{block} has {len(rest)} linear modules behind its heads, not one over all of them")
    return {
        "head": _named(seen.attention, WIDTHS, width, f"the width of a head, {width},"),
        "reads": reads,
        "writes": rest[0].removeprefix(f"{block}."),
        "interleaved": interleaved,
        "across": across,
        "counts": _counts(model, watch, seen.attention, heads, kv_heads, width),
        "heads": _named(model.config, HEADS, heads, f"its {heads} heads"),
        "kv_heads": _named(model.config, KV_HEADS, kv_heads, "") if kv_heads != heads else _maybe(model.config, heads),
    }


def _rows(picked: list[int], seen: Seen) -> Iterator[dict[str, Tensor]]:
    """Per changed feature which heads are NaN then: role -> bool (H,)."""
    for row in range(len(picked)):
        yield {role: given[row].isnan().any(-1) for role, given in seen.heads.items()}


def _roles(watch: Watch, row: Mapping[str, Tensor]) -> tuple[str | None, bool]:
    """Which of q, k, v a feature goes to (None: neither), and whether to every head of it."""
    touched = [role for role, heads in row.items() if heads.any()]
    if len(touched) > 1:
        raise unknown(f"one feature of a projection goes to {' and '.join(touched)}")
    return (touched[0], bool(row[touched[0]].all())) if touched else (None, False)


def _norm(watch: Watch, seen: Seen, block: str, path: str) -> str:
    """The norm over all features that a projection makes, in the attention."""
    for name, x in seen.normed.items():
        if name.startswith(f"{block}.") and torch.equal(x, seen.outputs[path]):
            return name.removeprefix(f"{block}.")
    raise unknown(f"the heads that {path} makes are not independent, and no RMSNorm over all of them explains it")


def _named(owner: Any, names: tuple[str, ...], value: int, what: str) -> str:
    found = next((name for name in names if _number(owner, name) == value), None)
    if found is None:
        kind = type(owner).__name__
        raise unknown(f"{kind} says {what or value} under none of the names {', '.join(names)}")
    return found


def _maybe(config: Any, heads: int) -> str:
    """The entry for KV heads of a config that may have none, being of models with one for each head."""
    return next((name for name in KV_HEADS if _number(config, name) == heads), "")


def _number(owner: Any, name: str) -> int | None:
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class _Recorder:
    """A config that notes what is read of it."""

    def __init__(self, config: Any) -> None:
        self.__dict__.update(config=config, read=set())

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.config, name)


def _counts(model: Any, watch: Watch, attention: Any, heads: int, kv_heads: int, width: int) -> dict[str, str]:
    """The numbers of heads that the forward may read: of the attention's own attributes and of its config's entries."""
    found: dict[str, str] = {}
    for names, value, what in ((HEADS, heads, "heads"), (KV_HEADS, kv_heads, "kv_heads")):
        found |= {name: what for name in names if vars(attention).get(name) == value}
    for name in ("split_size", "all_head_size"):
        if vars(attention).get(name) == heads * width:
            found[name] = "features"
    config = getattr(attention, "config", None)
    if config is not None:
        attention.config = recorder = _Recorder(config)
        try:
            watch.run(1)
        finally:
            attention.config = config
        for names, what in ((HEADS, "heads"), (KV_HEADS, "kv_heads")):
            found |= {f"config.{name}": what for name in names if name in recorder.read}
    return found


def _mlp(model: Any, watch: Watch, paths: list[str]) -> dict[str, Any]:
    """What of a layout is about the MLP: of linear modules, in the order of their calls."""
    if len(paths) not in (2, 3):
        raise unknown(f"a layer has {len(paths)} linear modules beside its attention; a dense MLP has two or three")
    *makers, taker = paths
    neurons = watch.inputs_of(taker)
    holder = taker.rpartition(".")[0]
    if any(path.rpartition(".")[0] != holder for path in makers) or "." in holder:
        raise unknown(f"{', '.join(paths)} are not the modules of one MLP")
    for path in makers:
        picked, seen = watch.follow(path)
        touched = [row.isnan().nonzero().flatten().tolist() for row in seen.inputs[taker]]
        if touched != [[feature % neurons] for feature in picked]:
            raise unknown(f"the features of {path} do not enter {taker} one by one")
    names = {path: path.removeprefix(f"{holder}.") if holder else path for path in paths}
    made = {path: watch.outputs_of(path) for path in makers}
    if len(makers) == 2 and set(made.values()) == {neurons}:
        gates = [path for path in makers if not _doubles(watch, path, taker, slice(None))]
        if len(gates) != 1:
            raise unknown(f"it is not one of {' and '.join(makers)} that is a gate")
        (gate,) = gates
        makes = {"gate": names[gate], "up": names[next(path for path in makers if path != gate)]}
    elif len(makers) == 1 and made[makers[0]] == 2 * neurons:
        if not _doubles(watch, makers[0], taker, slice(neurons, None)):
            raise unknown(f"{makers[0]} does not make the gates first and then what they multiply")
        makes = {"gate_up": names[makers[0]]}
    elif len(makers) == 1 and made[makers[0]] == neurons:
        makes = {"up": names[makers[0]]}
    else:
        raise unknown(f"{made} features enter {neurons} of {taker}")
    return {
        "mlp": holder,
        "makes": makes,
        "takes": names[taker],
        "activation": "" if holder else _activation(watch, makers[0], taker),
        "neurons": _named(model.config, NEURONS, neurons, f"its {neurons} neurons"),
    }


def _doubles(watch: Watch, path: str, taker: str, part: slice) -> bool:
    """Whether what enters the output projection is twice as large if some of a projection's features are."""

    def change(made: Tensor) -> Tensor:
        made[:, part] *= 2
        return made

    before, after = watch.run(1).inputs[taker], watch.run(1, {path: change}).inputs[taker]
    return torch.allclose(after, 2 * before, rtol=1e-3, atol=1e-6 * float(before.abs().max()))


def _activation(watch: Watch, maker: str, taker: str) -> str:
    """The module between two projections that are a layer's own."""
    seen = watch.run(1)
    for name, module in watch.layer.named_children():
        if next(module.parameters(), None) is None:
            with suppress(Exception):  # not a function of one tensor
                if torch.equal(module(seen.outputs[maker]), seen.inputs[taker]):
                    return name
    raise unknown(f"no module of the layer makes what enters {taker} of what {maker} gives")
