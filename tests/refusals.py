"""Calls that must fail: with which message, and without a trace left in the model."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers import tiny

import ppnet
from ppnet.wrap import engine_of


def fingerprint(model):
    """All that a failed call could have left behind: weights, hooks, patched forwards, attributes, config, size."""
    modules = {
        name: (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            sorted(key for key in module.__dict__ if key == "forward" or key.startswith("_ppnet")),
            sorted((key, value) for key, value in module.__dict__.items() if isinstance(value, int)),
        )
        for name, module in model.named_modules()
    }
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(vars(model.config))
    return modules, config, engine_of(model).fixed if "_ppnet_engine" in model.__dict__ else None


@contextmanager
def refused(model, error, message):
    """The block raises `error` with `message` and leaves the model as it was."""
    before = fingerprint(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        yield
    assert fingerprint(model) == before
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def gated():
    return ppnet.wrap(tiny("llama"))
