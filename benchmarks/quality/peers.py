"""Other libraries' ways to remove MLP neurons and layers, as they are meant to be called.

Both import lazily: pip install torch-pruning==1.6.1 optipfair==0.4.2. Grouped-query attention is left whole by both.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

Batches = Sequence[dict[str, Tensor]]


def torch_pruning_mlp(model: nn.Module, batches: Batches, removed: float, importance: str) -> nn.Module:
    """Torch-Pruning (Fang et al. 2023): dependency groups of every MLP, the lowest group importance removed.

    Args:
        importance: ``"magnitude"`` (GroupMagnitudeImportance, p=2) or ``"taylor"`` (GroupTaylorImportance, from the
            gradients of the NLL summed over all batches).
    """
    import torch_pruning as tp

    model = copy.deepcopy(model)
    model.config.use_cache = False
    example = {"input_ids": batches[0]["input_ids"][:1, :16]}
    if importance == "taylor":
        measure = tp.importance.GroupTaylorImportance()
        for batch in batches:
            model(**batch).loss.backward()
    else:
        measure = tp.importance.GroupMagnitudeImportance(p=2)
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs=example, forward_fn=lambda model, inputs: model(**inputs).logits
    )
    for layer in model.model.layers:
        up, neurons = layer.mlp.up_proj, layer.mlp.up_proj.out_features
        scores = measure(graph.get_pruning_group(up, tp.prune_linear_out_channels, idxs=list(range(neurons))))
        chosen = scores.argsort()[: round(removed * neurons)].tolist()
        graph.get_pruning_group(up, tp.prune_linear_out_channels, idxs=chosen).prune()
    model.zero_grad(set_to_none=True)
    return model


@contextlib.contextmanager
def quietly() -> Any:
    """optipfair sets up the root logger and prints a bar per layer."""
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def optipfair_mlp(model: nn.Module, batches: Batches, removed: float, method: str) -> nn.Module:
    """optipfair's neurons of gated MLPs: ``MAW``, ``VOW``, ``PON``, ``L2``, or ``MAW data`` (with activations)."""
    with quietly():
        import optipfair

        name, _, driven = method.partition(" ")
        data = [{name: batch[name] for name in ("input_ids",)} for batch in batches] if driven else None
        return optipfair.prune_model(
            copy.deepcopy(model), pruning_type="MLP_GLU", neuron_selection_method=name,
            pruning_percentage=100 * removed, dataloader=data, show_progress=False,
        )  # fmt: skip


def optipfair_depth(model: nn.Module, batches: Batches, layers: int) -> nn.Module:
    """optipfair's depth pruning: the layers that change their input's direction least (its cosine importance)."""
    with quietly():
        import optipfair

        data = [{"input_ids": batch["input_ids"]} for batch in batches]
        scores = optipfair.analyze_layer_importance(copy.deepcopy(model), data, show_progress=False)
        chosen = sorted(sorted(scores, key=lambda index: scores[index])[:layers])
        return optipfair.prune_model(
            copy.deepcopy(model), pruning_type="DEPTH", layer_indices=chosen, layer_selection_method="custom",
            show_progress=False,
        )  # fmt: skip
