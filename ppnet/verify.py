"""Whether the units that were found in a model are its units: removing some must be the same as masking them.

A table of names can be wrong in ways that no shape shows: rows of queries that belong to another KV head, a norm that
looks at all heads, a forward that reads a number of heads from elsewhere. What a wrong table computes differs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from torch import nn

from ppnet.compact import amplitudes, cut_copy
from ppnet.cost import cost_model
from ppnet.equivalence import check_equivalent
from ppnet.errors import EquivalenceError, UnsupportedModelError
from ppnet.kept import kept_parts
from ppnet.plan import Plan, make_plan
from ppnet.units import Site, Structure
from ppnet.wrap import structure_for


def verify_sites(model: nn.Module, structure: Structure | None = None) -> float:
    """Compares a model without some of its units with the model in which these are masked, on random tokens.

    Half of the units of every site go, drawn at random, and then the other half. Costs two copies of the model without
    these, one after the other, and a few passes over three sequences of 24 tokens.

    Args:
        model: a dense or gated model, with its weights.
        structure: what to verify; None: what its family says.

    Returns:
        The largest difference of logits, relative to the largest logit.

    Raises:
        EquivalenceError: they differ by more than rounding (`ppnet.equivalence`); names the first site that does so
            alone, or says that the sites do so together.
        UnsupportedModelError: an unknown family, or a model without its weights.
    """
    structure = structure_for(model) if structure is None else structure
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise UnsupportedModelError(f"model: {empty} is on the meta device; load the weights first.")
    source = random.Random(0)
    halves = {site.name: source.sample(range(site.units), site.units // 2) for site in structure.sites}
    worst = 0.0
    for keeps in (lambda site: halves[site.name], lambda site: set(range(site.units)) - set(halves[site.name])):
        try:
            worst = max(worst, _difference(model, structure, keeps))
        except EquivalenceError as error:
            raise EquivalenceError(f"model: {_blame(model, structure, keeps)} ({error})") from error
    return worst


def _difference(model: nn.Module, structure: Structure, keeps: Callable[[Site], Sequence[int] | set[int]]) -> float:
    """Raises EquivalenceError where the smaller model does not run or computes something else."""
    plan = _plan(model, structure, keeps)
    parts = kept_parts(model, structure, plan, amplitudes(model, structure, plan))
    try:
        small = cut_copy(model, structure, plan, parts)
        return check_equivalent(model, small, structure, plan)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, EquivalenceError):
            raise
        raise EquivalenceError(f"without these units the model does not run: {error}") from error


def _plan(model: nn.Module, structure: Structure, keeps: Callable[[Site], Sequence[int] | set[int]]) -> Plan:
    sets = [sorted(keeps(site)) or [0] for site in structure.sites]  # at least one unit of every site stays
    costs = cost_model(model, structure)
    cost = costs.total([len(kept) for kept in sets])
    return make_plan(structure, sets, cost=cost, dense_cost=costs.dense, source="verify")


def _blame(model: nn.Module, structure: Structure, keeps: Callable[[Site], Sequence[int] | set[int]]) -> str:
    """The site that is wrong, in words."""
    for site in structure.sites:

        def alone(other: Site, wrong: str = site.name) -> Sequence[int] | set[int]:
            return keeps(other) if other.name == wrong else range(other.units)

        try:
            _difference(model, structure, alone)
        except EquivalenceError:
            return (
                f"removing units of {site.name} ({site.block}) is not the same as masking them, so they are not what "
                f"the family {structure.family!r} says"
            )
    return f"removing units of several sites at once is not the same as masking them (family {structure.family!r})"
