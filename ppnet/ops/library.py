"""What the operators' definitions share: the library of schemas, the autocast rule, the refusal to differentiate.

Schemas are defined in Python, not in C++, so that the operators exist, trace and differentiate without the extension.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Sequence, Sized
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

import ppnet.extension  # noqa: F401  registers the compiled kernels

LIBRARY = torch.library.Library("ppnet", "FRAGMENT")

P = ParamSpec("P")
R = TypeVar("R")


def define(schema: str) -> None:
    """Defines ``ppnet::<schema>``."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def explain_types(function: Callable[P, R]) -> Callable[P, R]:
    """`explain` for the errors of an operator that takes long enough for one more Python call not to matter."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            explain(error, function, dict(zip(inspect.signature(function).parameters, args, strict=False)) | kwargs)
            raise

    return call


def explain(error: Exception, operator: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """RuntimeError if what failed had an argument that is no tensor, or no list, and should be one; it is named.

    Only failed calls are looked at, so that others cost nothing. By itself a failure says little: the dispatcher takes
    None for an undefined tensor, and numpy arrays come as far as their first attribute.
    """
    hints = typing.get_type_hints(operator)
    for name, value in arguments.items():
        misfit = _unlike(name, value, hints.get(name))
        if misfit is not None:
            raise RuntimeError(f"{operator.__name__}: {misfit}") from error


def _unlike(name: str, value: Any, hint: Any) -> str | None:
    options = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    wanted, optional = options[0], types.NoneType in options
    if optional and value is None:
        return None
    if typing.get_origin(wanted) is Sequence:
        if isinstance(value, (list, tuple)):
            entries = ((f"{name}[{i}]", entry) for i, entry in enumerate(value))
            return next((text for entry in entries if (text := _unlike(*entry, typing.get_args(wanted)[0]))), None)
    elif wanted is not Tensor or isinstance(value, Tensor):
        return None
    found = "None" if value is None else f"of type {type(value).__module__}.{type(value).__qualname__}"
    expected = "a tensor" if wanted is Tensor else "a list"
    return f"{name} is {found.replace('builtins.', '')}; it must be {expected}{' or None' if optional else ''}"


def same_device(operator: str, **arguments: Tensor | Sequence[Tensor] | None) -> None:
    """RuntimeError unless all tensors are on one device.

    Fake kernels call it: one meta tensor among others brings a call to them, and they would answer with a tensor of
    another device that nobody has written to.
    """
    devices: dict[str, str] = {}
    for name, value in arguments.items():
        for i, t in enumerate([value] if isinstance(value, Tensor) else value or ()):
            devices.setdefault(str(t.device), name if isinstance(value, Tensor) else f"{name}[{i}]")
    if len(devices) > 1:
        found = ", ".join(f"{name} is on {device}" for device, name in devices.items())
        raise RuntimeError(f"{operator}: all tensors of a call must be on one device, but {found}")


def same_lengths(operator: str, **lists: Sized) -> None:
    """RuntimeError unless every list has one entry per tensor of the first one."""
    (first, entries), *others = lists.items()
    for name, other in others:
        if len(other) != len(entries):
            raise RuntimeError(
                f"{operator}: {name} has {len(other)} entries, but {first} has {len(entries)}; every list needs one"
                " entry per tensor"
            )


def follow_autocast(name: str, keep: Collection[int] = ()) -> None:
    """Under autocast the operator computes in the autocast dtype, as `torch.nn.functional.linear` does.

    Args:
        name: the operator's name.
        keep: positions of arguments that stay as they are (gates, which are float32 always).
    """
    operator = getattr(torch.ops.ppnet, name).default

    def rule(device: str) -> Callable[..., Any]:
        def cast(position: int, value: Any, dtype: torch.dtype) -> Any:
            if isinstance(value, (list, tuple)):
                return [cast(position, entry, dtype) for entry in value]
            plain = not isinstance(value, Tensor) or position in keep
            if plain or not value.is_floating_point() or value.dtype == torch.float64:
                return value
            return value.to(dtype)

        def run(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return operator(*(cast(position, value, dtype) for position, value in enumerate(args)))

        return run

    LIBRARY.impl(name, rule("cpu"), "AutocastCPU")
    LIBRARY.impl(name, rule("cuda"), "AutocastCUDA")


def refuse_gradient(name: str, instead: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError where a gradient would be recorded through an operator that has none.

    Called before the operator: a rule registered for it would cost every call a detour through Python.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{name}: not differentiable, it is for generation; use {instead}, or torch.no_grad()")
