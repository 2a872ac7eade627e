"""Tiny training runs for the tests of ppnet.train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from transformers.utils import logging

import ppnet
from ppnet.train import PuppetTrainer, TextBlocks, default_arguments

logging.disable_progress_bar()
LENGTH = 12
MARKER = 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """Models this small are faster on one thread, above all where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def blocks(count: int = 24, marked: int | None = None) -> TextBlocks:
    ids = torch.randint(3, 96, (count, LENGTH), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    if marked is not None:
        ids[marked, 3] = MARKER
    return TextBlocks(ids.reshape(-1), LENGTH)


def wrapped(**options: Any) -> Any:
    return ppnet.wrap(tiny("llama"), ppnet.PuppetConfig(**{"lambda_warmup": 3, **options}))


def arguments(folder: Path, **overrides: Any) -> Any:
    values = {"max_steps": 6, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 2, "use_cpu": True}
    return default_arguments(folder, **{**values, "disable_tqdm": True, **overrides})


def trainer(model: Any, folder: Path, data: Any = None, kind: Any = PuppetTrainer, **overrides: Any) -> Any:
    callbacks = overrides.pop("callbacks", None)
    return kind(model, arguments(folder, **overrides), train_dataset=data or blocks(), callbacks=callbacks)
