"""Plans given by hand, and an independent masked model, shared by the compaction and checkpoint tests."""

import copy
import random

import torch
from torch import nn

from ppnet.cost import cost_model
from ppnet.families import structure_of
from ppnet.plan import Plan, make_plan


def plan_of(model: nn.Module, kept) -> Plan:
    """A plan given by hand: site -> kept units."""
    structure, costs = structure_of(model), cost_model(model, structure_of(model))
    sets = [kept(site) for site in structure.sites]
    counts = [len(units) for units in sets]
    return make_plan(structure, sets, cost=costs.total(counts), dense_cost=costs.dense, source="test")


def random_plan(model: nn.Module, seed: int = 0) -> Plan:
    """Different random units, and different widths, in every site."""
    source = random.Random(seed)
    return plan_of(model, lambda site: source.sample(range(site.units), source.randint(1, max(1, site.units - 1))))


def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """The masked model in another way than ppnet's: a dense copy whose consumers ignore dropped units' features."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for site in structure_of(model).sites:
            dropped = [unit for unit in range(site.units) if unit not in plan.kept[site.name]]
            columns = site.consumer.index[dropped].flatten()
            reference.get_submodule(site.consumer.name).weight.index_fill_(site.consumer.weight_dim, columns, 0.0)
            for norm in site.across:  # dropped units are zeros for a norm over all units
                leaf = site.producer(norm.role.removesuffix("_norm"))
                module = reference.get_submodule(leaf.name)
                module.weight.index_fill_(leaf.weight_dim, leaf.index[dropped].flatten(), 0.0)
                if module.bias is not None:
                    module.bias.index_fill_(0, leaf.index[dropped].flatten(), 0.0)
    return reference


def batch(vocabulary: int = 96) -> dict[str, torch.Tensor]:
    """Two sequences, the second padded on the left."""
    ids = torch.randint(3, vocabulary, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the tokens that are not padding."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    expected, found = expected.detach().float(), found.detach().float()
    return float((expected - found).abs().max() / expected.abs().max())
