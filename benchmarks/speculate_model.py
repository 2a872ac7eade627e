"""The model of `bench_speculate.py`: a small Llama trained on TinyStories with gates, and the same function made wide.

A model that trains here in minutes decodes at the speed of Python, not of memory: 4 MB of weights stay in the caches.
`widen` therefore gives every hidden dimension, head and neuron `factor` copies (Net2Net, Chen et al. 2016, arXiv
1511.05641): factor² times the weights, the same logits, and at every size the same predictions. What a draft of it
proposes and what is accepted are the trained model's own; the time is that of a model of factor² times its parameters.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

import ppnet
from ppnet import PuppetConfig, demo
from ppnet.train import PuppetTrainer, default_arguments, param_groups, text_blocks

SHARED = Path(__file__).resolve().parents[2] / "shared"
STORIES = SHARED / "data" / "tinystories"
SEPARATOR = "<|endoftext|>"
WIDTH, NEURONS, LAYERS, HEADS, LENGTH, BATCH = 128, 512, 4, 8, 256, 8
DENSE_STEPS, GATE_STEPS = 800, 800
# Drafts of a tenth to a half, judged by what the whole model predicts: small sizes get most passes, all of them learn
# from the model's own dense pass alone.
GATES = PuppetConfig(prefix_fraction=1.0, lambda_distribution="log_size", smallest_size=0.08, distill=1.0)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K", model_max_length=10**9)


def stories(name: str) -> list[str]:
    return [story.strip() for story in (STORIES / name).read_text().split(SEPARATOR) if story.strip()]


def trained(folder: Path) -> Any:
    """The gated model, sorted; trained first if the folder is not there (about 15 minutes of one core)."""
    if not (folder / "config.json").exists():
        words = tokenizer()
        blocks = text_blocks(STORIES / "train.txt", words, LENGTH, separator=SEPARATOR, bos=True, progress=False)
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(words), hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=2 * LENGTH,
            tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        ))  # fmt: skip
        phase(model, blocks, DENSE_STEPS, 2e-3, Trainer)
        scores = ppnet.score(model.eval(), blocks.ids[:96].long(), method="mama", progress=False)
        ppnet.wrap(model, copy.deepcopy(GATES), scores=scores)
        phase(model, blocks, GATE_STEPS, 1e-3, PuppetTrainer)
        ppnet.save(ppnet.sort_(model.eval()), folder, words)
    return ppnet.load(folder).eval()


def phase(model: Any, blocks: Any, steps: int, rate: float, kind: Any) -> None:
    """Warm-up, then a cosine to a tenth; logs the loss."""
    optimizer = torch.optim.AdamW(param_groups(model.train(), rate, 0.05), betas=(0.9, 0.95), fused=True)
    schedule = LambdaLR(optimizer, demo.schedule(demo.Recipe(steps=steps, warmup=steps // 40), 0))
    with tempfile.TemporaryDirectory() as log:
        arguments = default_arguments(
            log, per_device_train_batch_size=BATCH, max_steps=steps, save_strategy="no", logging_steps=100,
            disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        kind(model=model, args=arguments, train_dataset=blocks, optimizers=(optimizer, schedule)).train()


def widen(model: Any, factor: int, dtype: torch.dtype) -> Any:
    """A gated Llama of the same function with `factor` copies of every hidden dimension, head and neuron.

    Copies of a unit follow one another, so a sorted model stays sorted; a plan in multiples of `factor` keeps all
    copies of a unit or none, and is then the same function as the plan of the model itself.
    """
    config = copy.deepcopy(model.config)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, name, factor * getattr(config, name))
    options = PuppetConfig.from_dict(config.ppnet)
    del config.ppnet
    wide = LlamaForCausalLM(config).to(dtype).eval()
    scores = {site.name: torch.zeros(factor * site.units) for site in model.puppet.structure.sites}
    ppnet.wrap(wide, options, scores=scores)
    state = wide.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            state[name].copy_(widened(name, tensor.double(), state[name].shape, factor, config.head_dim))
    return wide


def widened(name: str, tensor: Tensor, shape: torch.Size, factor: int, head: int) -> Tensor:
    """One tensor with copies along every dimension that the wide model has more of."""
    for dim, (own, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if own == wanted:
            continue
        # Heads are copied whole: the rows of q, k and v, and the columns of o, are those of heads.
        heads = ("q_proj", "k_proj", "v_proj").count(name.split(".")[-2]) if dim == 0 else name.count("o_proj")
        parts = tensor.unflatten(dim, (-1, head if heads else 1))
        tensor = parts.repeat_interleave(factor, dim).flatten(dim, dim + 1)
    summed = "proj.weight" in name  # over the copies of its inputs
    return tensor / factor if summed or name == "model.norm.weight" else tensor
