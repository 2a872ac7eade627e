"""Measuring a model: quality (`perplexity`) and speed (`speed`)."""

from ppnet.evaluate.perplexity import Perplexity, perplexity
from ppnet.evaluate.speed import Speed, fitting_workload, speed

__all__ = ["Perplexity", "Speed", "fitting_workload", "perplexity", "speed"]
