"""Measuring a model: quality (`perplexity`), what its gates are unsure of (`ensemble`) and speed (`speed`)."""

from ppnet.evaluate.ensemble import Coverage, Ensemble, MaskPrediction, ensemble
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
    "ensemble",
    "fitting_workload",
    "perplexity",
    "speed",
]
