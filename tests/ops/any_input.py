"""Any input at an operator: valid arguments in every layout, then one thing or two wrong with them.

A case is an operator, its reference and its arguments; `attempt` runs it and judges: the result is the reference's, or
an error names the operator and an argument.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from accuracy import EPSILON, assert_as_accurate
from hypothesis import strategies as st
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_OR_FLOAT = FLOATING[:3]
OTHER_DTYPES = (*FLOATING, torch.int64, torch.int32, torch.bool, torch.complex64)
SPECIAL = torch.tensor([torch.nan, 0.0, -0.0, torch.inf, -torch.inf])
LAYOUTS = ("contiguous", "misaligned", "sliced", "stepped", "transposed", "expanded")
# What operators read in place where rows must be contiguous.
ROW_LAYOUTS = ("contiguous", "misaligned", "rows apart")
SIZES = st.sampled_from([0, 1, 2, 3, 7]) | st.integers(1, 70)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Case:
    """One call. Arguments are tensors, None, lists of them, or plain values."""

    operator: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: dict[str, Any]
    exact: Callable[[int], bool] = lambda output: False  # outputs that must be equal bit for bit
    magnitude: Callable[..., Any] | None = None  # of the sums, as the reference gives its results
    free_roundings: int = (
        0  # of the results in their dtype: for others on the way, that the reference may be spared by luck
    )
    rounds_between: bool = False  # what is between its products is rounded to the dtype, as in the reference
    underflows: bool = (
        False  # what underflows between its products may meet infinity: NaN, or infinity, according to it
    )
    is_torchs: bool = False  # torch's function but for the kernel: its errors, and whatever it does with meta tensors
    operators: tuple[str, ...] = ()  # others that may be named in an error: those it is composed of
    indices: dict[str, list[int]] = field(default_factory=dict)  # what the indices count, by argument


class Inputs:
    """Draws tensors: shapes and layouts from hypothesis, so that they shrink; values from a seed."""

    def __init__(self, data: st.DataObject):
        self.draw = data.draw
        self.generator = torch.Generator().manual_seed(self.draw(st.integers(0, 2**32 - 1)))
        self.special, self.infinite = self.flag(0.3), True

    def flag(self, likely: float = 0.5) -> bool:
        return self.draw(st.sampled_from([False] * round(10 - 10 * likely) + [True] * round(10 * likely)))

    def size(self, most: int = 70) -> int:
        return min(self.draw(SIZES), most)

    def pick(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def floating(self, shape: tuple[int, ...], dtype: torch.dtype, layouts: tuple[str, ...] = LAYOUTS) -> Tensor:
        t = torch.randn(shape, generator=self.generator) * self.pick([1.0, 1.0, 0.01, 3.0])
        if self.special:
            at = torch.rand(shape, generator=self.generator) < 0.05
            values = len(SPECIAL) if self.infinite else 3
            t = torch.where(at, SPECIAL[torch.randint(values, shape, generator=self.generator)], t)
        return place(t.to(dtype), self.pick(layouts))

    def maybe(self, shape: tuple[int, ...], dtype: torch.dtype, layouts: tuple[str, ...] = LAYOUTS) -> Tensor | None:
        return self.floating(shape, dtype, layouts) if self.flag() else None

    def index(self, k: int, n: int, unique: bool = False) -> Tensor:
        if unique or self.flag():
            idx = torch.randperm(n, generator=self.generator)[: min(k, n)]
        else:
            idx = torch.randint(max(n, 1), (k if n else 0,), generator=self.generator)
        if self.flag():
            idx = idx.sort().values
        return place(idx, self.pick(LAYOUTS[:4]))


def place(t: Tensor, layout: str) -> Tensor:
    """The values of `t` in another layout; what lies around them is not to be read: NaN, or an index out of range."""
    around = torch.nan if t.is_floating_point() else 2**40
    if t.dim() == 0 or layout == "contiguous":
        return t
    if layout == "misaligned":
        return t.new_full((t.numel() + 1,), around)[1:].view(t.shape).copy_(t)
    if layout in ("sliced", "rows apart"):
        view = t.new_full([n + 3 for n in t.shape], around)
        for axis, n in enumerate(t.shape):
            view = view.narrow(axis, 2 if axis == t.dim() - 1 else 1, n)
        return view.copy_(t)
    if layout == "stepped":
        return t.new_full((*t.shape[:-1], 2 * t.shape[-1]), around)[..., ::2].copy_(t)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    axis = t.dim() - 1 if t.shape[0] == 1 else 0  # expanded
    return t.narrow(axis, 0, 1).expand(t.shape) if t.numel() else t


# --- what can be wrong ------------------------------------------------------------------------------------------------


def leaves(arguments: dict[str, Any]) -> Iterator[tuple[str, int | None, Any]]:
    """(name, position in its list or None, value)."""
    for name, value in arguments.items():
        if isinstance(value, list):
            yield from ((name, i, entry) for i, entry in enumerate(value))
        else:
            yield name, None, value


def tensors(arguments: dict[str, Any]) -> list[Tensor]:
    return [value for _, _, value in leaves(arguments) if isinstance(value, Tensor)]


def spoil(case: Case, inputs: Inputs) -> None:
    """Changes one argument; the result may be valid."""
    lists = [name for name, value in case.arguments.items() if isinstance(value, list)]
    if lists and inputs.flag(0.1):
        name = inputs.pick(lists)
        values = case.arguments[name]
        case.arguments[name] = values[:-1] if inputs.flag() else [*values, *values[:1]]
        return
    found = [leaf for leaf in leaves(case.arguments) if leaf[2] is not None]
    if not found:
        return
    name, at, value = inputs.pick(found)
    if isinstance(value, Tensor):
        changed = spoil_tensor(case, inputs, name, at, value)
    elif isinstance(value, str):
        changed = inputs.pick(["swish", "", "SiLU"])
    elif isinstance(value, bool):
        changed = not value
    elif isinstance(value, int):
        changed = inputs.pick([-(2**40), -2, -1, 0, 1, 2, value + 1, max(0, value - 1)])
    else:
        changed = inputs.pick([2.0 if inputs.special else 0.0, -1.0, 1e30])  # BLAS: 0 times anything is 0
    if at is None:
        case.arguments[name] = changed
    else:
        case.arguments[name] = [changed if i == at else entry for i, entry in enumerate(case.arguments[name])]


def spoil_tensor(case: Case, inputs: Inputs, name: str, at: int | None, t: Tensor) -> Tensor:
    kinds = ["dtype", "more", "fewer", "axis", "no axis", "turned", "meta", "layout"]
    kind = inputs.pick(kinds + (["index"] * 8 if name in case.indices else []))
    axis = inputs.draw(st.integers(0, max(0, t.dim() - 1)))
    if kind == "index" and t.numel() and t.device.type == "cpu":
        n = case.indices[name][at or 0]
        bad = t.clone()
        where = inputs.draw(st.integers(0, t.numel() - 1))
        bad.view(-1)[where] = inputs.pick([n, n + 1, -1, -n, 2**31, 2**40, -(2**63), int(bad.view(-1)[0])])
        return bad
    if kind == "dtype":
        return t.to(inputs.pick(OTHER_DTYPES))
    if kind == "more" and t.dim():
        return torch.cat([t, t.narrow(axis, 0, 1)], axis) if t.shape[axis] else t.new_zeros([n or 1 for n in t.shape])
    if kind == "fewer" and t.dim() and t.shape[axis]:
        return t.narrow(axis, 1, t.shape[axis] - 1)
    if kind == "axis":
        return t.unsqueeze(axis)
    if kind == "no axis" and t.dim() and t.shape[axis]:
        return t.select(axis, 0)
    if kind == "turned" and t.dim():
        return t.transpose(0, -1)
    if kind == "meta":
        return t.to("meta")
    return place(t, inputs.pick(LAYOUTS)) if t.device.type == "cpu" else t


# --- the judgement ----------------------------------------------------------------------------------------------------


def attempt(case: Case, spoiled: bool) -> None:
    """Runs the operator. A valid call must succeed; any call gives the reference's result or a useful error."""
    odd = any(t.device.type != "cpu" or not t.is_floating_point() or t.dim() == 0 for t in tensors(case.arguments))
    if case.is_torchs and (odd or case.arguments["weight"].dim() != 2):  # torch takes some of these in some dtypes
        return
    before = [t.clone() for t in tensors(case.arguments) if t.device.type == "cpu"]
    try:
        ours = flat(case.call(**case.arguments))
    except (RuntimeError, ValueError) as error:  # NotImplementedError is a RuntimeError
        assert spoiled, error
        assert_useful(case, str(error))
        return
    if any(t.device.type != "cpu" for t in ours):
        assert all(t.device.type == "meta" for t in [*ours, *tensors(case.arguments)])
        return  # shapes of fake results are opcheck's business
    for t, was in zip((t for t in tensors(case.arguments) if t.device.type == "cpu"), before, strict=True):
        assert torch.equal(bits(t), bits(was)), "an argument was written to"
    own = flat(case.reference(**case.arguments))
    assert len(ours) == len(own)
    exact = magnitude = [None] * len(own)
    if not all(case.exact(i) for i in range(len(own))):
        widened = {name: map_tensors(value, torch.Tensor.double) for name, value in case.arguments.items()}
        exact = flat(case.reference(**widened))
        if case.magnitude is not None:
            sizes = {name: map_tensors(value, lambda t: t.double().abs()) for name, value in case.arguments.items()}
            magnitude = flat(case.magnitude(**sizes))
    for i, (o, r) in enumerate(zip(ours, own, strict=True)):
        assert o.shape == r.shape and o.dtype == r.dtype, (i, o.shape, r.shape, o.dtype, r.dtype)
        size = magnitude[i]
        if size is not None:
            # Where terms are equal, as in expanded tensors, every rounding of their sum goes the same way.
            coarser = EPSILON.get(o.dtype, 0) / EPSILON[torch.float32]
            size = 8 * size * (coarser if case.rounds_between else 1) + case.free_roundings * coarser * exact[i].abs()
        assert_same(o, r, None if case.exact(i) else exact[i], size, case.underflows)


def assert_useful(case: Case, message: str) -> None:
    if case.is_torchs:
        with pytest.raises(RuntimeError) as error:
            case.reference(**case.arguments)
        assert message == str(error.value)
        return
    assert any(name in message for name in (case.operator, *case.operators)), f"names no operator: {message}"
    assert any(re.search(rf"\b{name}\b", message) for name in case.arguments), f"names no argument: {message}"


def assert_same(ours: Tensor, own: Tensor, exact: Tensor | None, magnitude: Tensor | None, underflows: bool) -> None:
    """Equal where exactness is due, else as near to float64 as torch's own; NaN and infinity in the same places."""
    if exact is None:
        torch.testing.assert_close(ours, own, rtol=0, atol=0, equal_nan=True)
        return
    kinds = [kind(ours), kind(own), kind(exact.to(ours.dtype))]
    if underflows:
        kinds = [(k != 0).int() for k in kinds]
    # What overflows on the way in one of the references need not in the other.
    assert ((kinds[0] == kinds[1]) | (kinds[0] == kinds[2])).all(), (ours, own, exact)
    finite = (kinds[0] == 0) & (kinds[1] == 0) & exact.isfinite()
    if magnitude is not None:
        finite &= magnitude.isfinite()
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours[finite], exact[finite], rtol=1e-11, atol=1e-11)
    elif finite.any():
        size = None if magnitude is None else magnitude[finite]
        assert_as_accurate(ours[finite], own[finite], exact[finite], size)


def kind(t: Tensor) -> Tensor:
    """0 finite, 1 NaN, 2 infinity, -2 its negative."""
    return t.isnan().int() + 2 * (t == torch.inf).int() - 2 * (t == -torch.inf).int()


def bits(t: Tensor) -> Tensor:
    return t if t.dtype == torch.bool else torch.view_as_real(t).nan_to_num(7) if t.is_complex() else t.nan_to_num(7)


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else [t for part in result for t in flat(part)]


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list):
        return [map_tensors(entry, change) for entry in value]
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value
