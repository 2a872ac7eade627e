"""ppnet: from a Hugging Face model to any size. Gates, training that skips, exact sizes, compact().

The functions that share a name with their module (`wrap`, `plan`, `compact`, `inspect`) are imported here, once, after
the modules, so that `ppnet.plan(...)` is always the function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ppnet.accelerate import accelerate, decelerate
from ppnet.checkpoint import load, save
from ppnet.compact import compact
from ppnet.discover import discover
from ppnet.extension import build_info
from ppnet.gates.config import PuppetConfig
from ppnet.inspect import inspect
from ppnet.plan import Plan
from ppnet.shipped import register
from ppnet.size import plan, resize, size_curve
from ppnet.sort import sort_
from ppnet.wrap import unwrap, wrap

if TYPE_CHECKING:
    from ppnet import evaluate
    from ppnet import scores as scores
    from ppnet.calibration import calibration_batches
    from ppnet.reporting import report
    from ppnet.scores.result import Scores
    from ppnet.scores.score import score, score_methods
    from ppnet.speculation import draft, speculate
    from ppnet.streaming import compact_folder
    from ppnet.train import DistillationTrainer, PuppetCallback, PuppetTrainer, PuppetTrainerMixin, heal

__version__ = "0.1.0"

# Loaded on first use: they import transformers' trainer, or plotting.
_LAZY = {
    "PuppetTrainer": "ppnet.train",
    "PuppetTrainerMixin": "ppnet.train",
    "PuppetCallback": "ppnet.train",
    "DistillationTrainer": "ppnet.train",
    "calibration_batches": "ppnet.calibration",
    "compact_folder": "ppnet.streaming",
    "draft": "ppnet.speculation",
    "heal": "ppnet.train",
    "report": "ppnet.reporting",
    "evaluate": "ppnet.evaluate",
    "Scores": "ppnet.scores",
    "score": "ppnet.scores",
    "score_methods": "ppnet.scores",
    "scores": "ppnet.scores",
    "speculate": "ppnet.speculation",
}

__all__ = [
    "DistillationTrainer",
    "Plan",
    "PuppetCallback",
    "PuppetConfig",
    "PuppetTrainer",
    "PuppetTrainerMixin",
    "Scores",
    "accelerate",
    "build_info",
    "calibration_batches",
    "compact",
    "compact_folder",
    "decelerate",
    "discover",
    "draft",
    "evaluate",
    "heal",
    "inspect",
    "load",
    "plan",
    "register",
    "report",
    "resize",
    "save",
    "score",
    "score_methods",
    "scores",
    "size_curve",
    "sort_",
    "speculate",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ppnet' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"ppnet.{name}" else getattr(module, name)
    globals()[name] = value
    return value


# Compacted checkpoints then load through plain AutoModelForCausalLM, without trust_remote_code.
register()
