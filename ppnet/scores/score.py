"""Scoring the units of a model: `ppnet.score`, and several methods in one pass: `ppnet.score_methods`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppnet.calibration import MAX_TOKENS, calibration_batches
from ppnet.checks import integer, number, renamed
from ppnet.errors import CheckpointError, PPNetError
from ppnet.scores.collect import Collector, Loss, as_dense
from ppnet.scores.probe import without_probes
from ppnet.scores.registry import Needs, Scorer, get_scorer
from ppnet.scores.result import Scores
from ppnet.units import Structure
from ppnet.wrap import structure_for


def score(
    model: nn.Module,
    data: Any = None,
    method: str = "mama",
    *,
    tokenizer: Any = None,
    length: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = MAX_TOKENS,
    seed: int = 0,
    column: str = "text",
    separator: str | None = None,
    bos: bool | None = None,
    loss: Loss | None = None,
    threshold: float | None = None,
    progress: bool = True,
    **options: Any,
) -> Scores:
    """Scores every unit of a model, in one pass over calibration data. The model is left as it was.

    Works on models with and without gates (with gates: on their dense pass). Nothing is wrapped: hooks look at what
    enters the output projections and at its gradient. Gradients of parameters are neither computed nor touched.
    Activation checkpointing is heeded.

    Memory: a forward pass with activations kept for backward, plus what enters each output projection once more;
    without gradients (``activation``, ``bias``) only the forward pass; ``magnitude`` and ``random`` run no data.
    ``obs``, and so ``mama`` unless ``weights={"obs": 0}``, also hold (F, F) numbers for the F features of every output
    projection: 0.5 GB a layer for 11,008 neurons, and 3 GB more while one site is scored.

    Args:
        model: a dense `PreTrainedModel` of a supported family.
        data: text, a file's name, chats, token ids, a dataset or batches (`ppnet.calibration.calibration_batches`);
            None for methods that need none.
        method: ``activation``, ``bias``, ``kl``, ``magnitude``, ``mama``, ``movement``, ``obs``, ``random``,
            ``reward`` or ``taylor``.
        tokenizer, length, batch_size, max_tokens, column, separator, bos: how data is read, as there.
        seed: which part of a long text is used, and what is drawn by ``random``, ``kl`` and ``obs`` (so by ``mama``).
        loss: (the model's output, batch) -> losses (B,), one per sequence; None: NLL of the labels, summed over tokens.
            Ready batches, too, are cut into batches of `batch_size` anew, which a loss across sequences depends on.
            Encoders (bert) have no such default: methods that need gradients need a loss. Their batches hold
            ``input_ids``, ``attention_mask`` where padded, and ``labels`` if the data does.
        threshold: a group of completions counts for ``reward`` if its best reward reaches this.
        progress: write progress to stderr when it takes longer than two seconds.
        **options: the method's own, e.g. ``sign="token"`` of taylor, ``weights={...}`` of mama; see `ppnet.scores`.

    Returns:
        Scores, for ``ppnet.plan(model, size, scores=...)``.

    Raises:
        PPNetError: an unknown method or option, a model without the logits that the loss needs, or an encoder without
            a loss.
        DataError: data that is missing, empty, or not the model's.
        UnsupportedModelError: as `ppnet.wrap`.
    """
    made = score_methods(
        model,
        data,
        {str(method): (method, options)},
        tokenizer=tokenizer,
        length=length,
        batch_size=batch_size,
        max_tokens=max_tokens,
        seed=seed,
        column=column,
        separator=separator,
        bos=bos,
        loss=loss,
        threshold=threshold,
        progress=progress,
    )
    return made[str(method)]


def score_methods(
    model: nn.Module,
    data: Any,
    methods: Iterable[str] | Mapping[str, str | tuple[str, Mapping[str, Any]]],
    *,
    tokenizer: Any = None,
    length: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = MAX_TOKENS,
    seed: int = 0,
    column: str = "text",
    separator: str | None = None,
    bos: bool | None = None,
    loss: Loss | None = None,
    threshold: float | None = None,
    progress: bool = True,
) -> dict[str, Scores]:
    """Several scores from one pass over the data, each equal to what `score` gives alone.

    Args:
        methods: names of methods, e.g. ``["mama", "taylor"]``; or any label -> a method, or -> (method, its options),
            e.g. ``{"mama": "mama", "paths": ("magnitude", {"form": "paths"})}``.
        others: as in `score`.

    Returns:
        label (the method's name where only names are given) -> Scores.

    Raises:
        as `score`, and PPNetError: `methods` of another form.
    """
    structure = structure_for(model)
    if threshold is not None:
        number("threshold", threshold, -math.inf)
    integer("seed", seed, 0)
    scorers: dict[str, tuple[Scorer, Mapping[str, Any]]] = {}
    needs: Needs = frozenset()
    for label, (method, options) in _labelled(methods).items():
        scorer = get_scorer(method)
        scorer.check(options)
        scorers[label] = scorer, {**options, **_given(scorer, options, structure)}
        needs |= scorer.needs(scorers[label][1])
    batches = []
    if needs:
        if data is None:
            names = ", ".join(name for name, (scorer, options) in scorers.items() if scorer.needs(options))
            raise PPNetError(
                f"data: None, but {names} need calibration data; give text, a file, token ids or a dataset."
            )
        batches = calibration_batches(
            model, data, tokenizer, length=length, batch_size=batch_size, max_tokens=max_tokens, seed=seed,
            column=column, separator=separator, bos=bos,
        )  # fmt: skip
    collector = Collector(model, structure, needs, seed=seed, loss=loss)
    made = {}
    with without_probes(model), as_dense(model):
        if needs:
            collector.run(batches, threshold=threshold, progress=progress)
        for name, (scorer, options) in scorers.items():
            with torch.no_grad():
                units = [value.detach().double().cpu() for value in scorer(collector.sites, options)]
            made[name] = Scores(
                {site.name: value for site, value in zip(structure.sites, units, strict=True)},
                method=scorer.name,
                model_type=structure.model_type,
                options=options,
                tokens=collector.predicted if scorer.needs(options) else 0,
                order=structure.order,
            )
    _check_finite(made)
    return made


def without_data(model: nn.Module, structure: Structure, method: str) -> list[Tensor]:
    """Scores of a method that needs no data, as `score` gives them but not checked to be finite.

    Returns:
        Of every site of the structure, in order: float64 (U,), on the CPU.
    """
    collector = Collector(model, structure, frozenset())
    with without_probes(model), as_dense(model), torch.no_grad():
        return [value.detach().double().cpu() for value in get_scorer(method)(collector.sites, {})]


def _labelled(methods: Any) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """label -> (method, its options).

    Raises:
        PPNetError: neither names nor a mapping of them, or none at all.
    """
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        raise PPNetError(
            f"methods: {methods!r:.80} must be a list of names, e.g. ['mama', 'taylor'], or map labels to (method, its "
            "options); for one method use ppnet.score."
        )
    named = methods if isinstance(methods, Mapping) else {str(method): method for method in methods}
    if not named:
        raise PPNetError("methods: none given; give at least one name, e.g. ['mama'].")
    found = {}
    for label, method in named.items():
        pair = (method, {}) if isinstance(method, str) else method
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Mapping):
            raise PPNetError(
                f"methods: {method!r:.80} must be a name or (name, options), e.g. ('magnitude', {{'form': 'paths'}})."
            )
        found[str(label)] = (pair[0], pair[1])
    return found


def _given(scorer: Scorer, options: Mapping[str, Any], structure: Structure) -> dict[str, Mapping[str, Any]]:
    """The options that are scores, read where they are files.

    Raises:
        PPNetError: no scores, or those of another kind of model.
    """
    found = {}
    for name in scorer.scores:
        value = options.get(name)
        if value is None:
            continue
        if isinstance(value, str | os.PathLike):
            try:
                value = Scores.load(value)
            except CheckpointError as error:
                raise renamed(error, name, "scores") from error
        if not isinstance(value, Mapping):
            raise PPNetError(
                f"{name}: a {type(value).__name__}; give ppnet.Scores, the name of a file of them, or a mapping of "
                "site name -> one number per unit."
            )
        made_for = getattr(value, "model_type", structure.model_type)
        if made_for != structure.model_type:
            raise PPNetError(
                f"{name}: scores were made for model_type {made_for!r}, the model is {structure.model_type!r}; give "
                "scores of this model."
            )
        if getattr(value, "order", structure.order) != structure.order:
            raise PPNetError(
                f"{name}: ppnet.sort_ has put the model's units into another order since these scores were made; give "
                "scores of this model."
            )
        found[name] = value
    return found


def _check_finite(made: Mapping[str, Scores]) -> None:
    for scores in made.values():
        for name, units in scores.items():
            if not torch.isfinite(units).all():
                raise PPNetError(
                    f"model: the {scores.method} scores of {name!r} are NaN or infinite for "
                    f"{int((~torch.isfinite(units)).sum())} of {len(units)} units; go back to a finite checkpoint."
                )
