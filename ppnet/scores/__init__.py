"""Scores of units without training gates: one file per scorer, found by listing this folder.

To add a scorer, add a file with a function ``(statistics of a site, *, options) -> (U,)`` under
`@scorer("name", what it needs)`; see `ppnet.scores.statistics` for what it sees.
"""

import importlib
import pkgutil

from ppnet.scores.registry import SCORERS, Scorer, get_scorer, scorer
from ppnet.scores.result import Scores
from ppnet.scores.score import score, score_methods

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SCORERS", "Scorer", "Scores", "get_scorer", "score", "score_methods", "scorer"]
