"""Measuring a model: quality (`perplexity`), what its gates are unsure of (`ensemble`), speed (`speed`), and tasks of
lm-evaluation-harness (`lm_eval`)."""

from ppnet.evaluate.ensemble import Coverage, Ensemble, MaskPrediction, ensemble
from ppnet.evaluate.harness import TaskResult, lm_eval
from ppnet.evaluate.interval import Spread
from ppnet.evaluate.perplexity import Perplexity, perplexity
from ppnet.evaluate.reliability import Prediction, Reliability
from ppnet.evaluate.speed import Speed, fitting_workload, speed

__all__ = [
    "Coverage",
    "Ensemble",
    "MaskPrediction",
    "Perplexity",
    "Prediction",
    "Reliability",
    "Speed",
    "Spread",
    "TaskResult",
    "ensemble",
    "fitting_workload",
    "lm_eval",
    "perplexity",
    "speed",
]
