"""Tasks of lm-evaluation-harness (EleutherAI's `lm_eval`): dense and compacted models, gated ones at any size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ppnet.errors import DataError, PPNetError
from ppnet.families import check_decoder
from ppnet.modes import evaluating


@dataclass(frozen=True)
class TaskResult:
    """What the harness says of one task.

    Attributes:
        task, version: its name, and the version that its file gives.
        samples: documents that were scored.
        metrics: name -> value, as the task defines them (``acc``, ``acc_norm``, ``word_perplexity``, ...).
        stderr: name -> standard error, of the metrics that have one.
        higher_is_better: name -> whether, of the metrics that say so.
    """

    task: str
    version: str
    samples: int
    metrics: dict[str, float]
    stderr: dict[str, float]
    higher_is_better: dict[str, bool]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:.4f}{self._error(name)}" for name, value in self.metrics.items())
        return f"{self.task} (version {self.version}, {self.samples:,} samples): {values}"

    def _error(self, name: str) -> str:
        return f" ± {self.stderr[name]:.4f}" if name in self.stderr else ""


def lm_eval(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    bootstrap_iters: int = 0,
    seed: int = 0,
) -> list[TaskResult]:
    """Runs tasks of lm-evaluation-harness on a model, on its device and in its dtype.

    Args:
        model: a causal language model; a gated one is evaluated at the size that `ppnet.resize` has set.
        tokenizer: its Hugging Face tokenizer.
        tasks: names of tasks or groups.
        include_path: a folder of task files (YAML), which are then the only ones: nothing is fetched but what they
            name. Paths in their ``data_files`` are relative to the working directory. None: the harness's own tasks,
            whose data come from the Hugging Face hub.
        num_fewshot: examples before each question; None: what the task says.
        limit: score only the first so many documents of a task, or (below 1) that share; for trying out.
        batch_size: requests per pass.
        max_length: most tokens of a request; None: the model's context.
        bootstrap_iters: draws for standard errors (closed forms where there are any); 0: no standard errors.
        seed: of the few-shot examples.

    Returns:
        One `TaskResult` per task, in the harness's order.

    Raises:
        PPNetError: the harness is not installed (``pip install 'ppnet[eval]'``).
        DataError: an unknown task, or no such folder.
        UnsupportedModelError: the model is an encoder.
    """
    check_decoder(model, "likelihoods of answers")
    wanted = [tasks] if isinstance(tasks, str) else list(tasks)
    evaluator, language_model, manager = _harness(include_path)
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown or not wanted:
        where = "the harness's own tasks" if include_path is None else f"the task files in {include_path}"
        some = ", ".join(sorted(manager.all_tasks)[:8]) or "none"
        raise DataError(f"tasks: {unknown or wanted} not among {where} (there are {some}); name tasks of these.")
    with evaluating(model):
        found = evaluator.simple_evaluate(
            model=language_model(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, backend="causal"
            ),
            tasks=wanted,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=bootstrap_iters,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return [_result(name, found) for name in found["results"]]


def _harness(include_path: str | os.PathLike[str] | None) -> tuple[Any, Any, Any]:
    """The harness's evaluator, its class for Hugging Face models, and its tasks. Raises PPNetError, DataError."""
    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(f"include_path: {include_path} is not a folder; name one that holds task files (YAML).")
    try:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise PPNetError(
            f"tasks: lm-evaluation-harness is not installed ({error}); run: pip install 'ppnet[eval]'"
        ) from error
    folder = None if include_path is None else str(include_path)
    return evaluator, HFLM, TaskManager(include_path=folder, include_defaults=folder is None)


def _result(name: str, found: dict[str, Any]) -> TaskResult:
    """The harness keys values by ``metric,filter``; the filter is named where it is not the default."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in found["results"][name].items():
        metric, comma, kind = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        of_error = metric.endswith("_stderr")
        label = metric.removesuffix("_stderr") + ("" if kind == "none" else f" ({kind})")
        (errors if of_error else metrics)[label] = float(value)
    return TaskResult(
        task=name,
        version=str(found.get("versions", {}).get(name, "")),
        samples=int(found.get("n-samples", {}).get(name, {}).get("effective", 0)),
        metrics=metrics,
        stderr=errors,
        higher_is_better={
            metric: better
            for metric, better in found.get("higher_is_better", {}).get(name, {}).items()
            if better is not None
        },
    )
