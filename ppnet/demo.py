"""`make demo`: the main job on text that every machine has, the source files of Python's standard library.

A small Llama is trained densely; then gates are trained for the rest of the tokens, starting from that model. The same
model trained to the end without gates is the honest anchor. The elastic model is resized, compacted, checked, timed and
reported.
"""

from __future__ import annotations

import copy
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppnet import PuppetConfig, compact, evaluate, resize, save, wrap
from ppnet.plan import Plan
from ppnet.size import plan as plan_size

# The paper's perplexity ratios to its own dense pass at fractions of the gated FLOPs (arXiv 2606.28251).
PAPER_RATIOS = {0.6: 1.067, 0.4: 1.121, 0.3: 1.164, 0.2: 1.198, 0.1: 1.29}
FRACTIONS = (1.0, *PAPER_RATIOS)


@dataclass(frozen=True)
class Recipe:
    """Sizes of the demo: tokens per step = batch * length."""

    vocabulary: int = 1024
    width: int = 128
    neurons: int = 512
    layers: int = 4
    heads: int = 8
    length: int = 128
    batch: int = 8
    steps: int = 600
    dense_steps: int = 360
    warmup: int = 20
    lr: float = 1.5e-3
    gate_lr: float = 0.1
    files: int | None = None
    valid_tokens: int = 32_768
    report_tokens: int = 8_192
    draws: int = 4
    seed: int = 0


FAST = Recipe(
    vocabulary=512, width=64, neurons=256, layers=2, steps=20, dense_steps=12, warmup=3, files=36, valid_tokens=4_096,
    report_tokens=1_024, draws=1,
)  # fmt: skip


def library_text(files: int | None = None) -> tuple[list[str], list[str]]:
    """The standard library's top-level modules and a few packages: (training texts, held-out texts: every twelfth).

    Args:
        files: use only the first so many files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.glob("*.py")) if not path.name.startswith("_")]
    paths += sorted((root / "asyncio").glob("*.py")) + sorted((root / "email").glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths[:files]]
    held_out = [index % 12 == 5 for index in range(len(texts))]
    return (
        [text for text, out in zip(texts, held_out, strict=True) if not out],
        [text for text, out in zip(texts, held_out, strict=True) if out],
    )


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer trained on `texts`, as a `PreTrainedTokenizerFast`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def new_model(recipe: Recipe) -> nn.Module:
    """A randomly initialised Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.neurons,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.width // recipe.heads,
        max_position_embeddings=2 * recipe.length,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def schedule(recipe: Recipe, start: int) -> Callable[[int], float]:
    """Warm-up, then cosine over all steps of the recipe, beginning at step `start`: one schedule for both phases."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / recipe.warmup)
        return warm * (0.1 + 0.45 * (1.0 + math.cos(math.pi * (start + step) / recipe.steps)))

    return factor


def train(model: nn.Module, blocks: Any, recipe: Recipe, folder: Path, start: int, stop: int, what: str) -> float:
    """Trains from step `start` to `stop` of the recipe's schedule.

    Returns:
        Seconds.
    """
    from ppnet.train import PuppetTrainer, default_arguments, param_groups

    say(f"{what}: {stop - start} steps of {recipe.batch * recipe.length:,} tokens")
    arguments = default_arguments(
        folder,
        learning_rate=recipe.lr,
        per_device_train_batch_size=recipe.batch,
        max_steps=stop - start,
        save_strategy="no",
        logging_steps=max(1, (stop - start) // 5),
        use_cpu=True,
        disable_tqdm=not sys.stderr.isatty(),
        data_seed=1000 * recipe.seed + start,
    )
    optimizer = torch.optim.AdamW(param_groups(model, recipe.lr, recipe.gate_lr), betas=(0.9, 0.95), fused=True)
    factor = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(recipe, start))
    trainer = PuppetTrainer(model=model, args=arguments, train_dataset=blocks, optimizers=(optimizer, factor))
    began = time.perf_counter()
    trainer.train()
    return time.perf_counter() - began


def say(text: str) -> None:
    print(f"[ppnet demo] {text}", file=sys.stderr, flush=True)


def perplexity_of(model: nn.Module, ids: Tensor, recipe: Recipe) -> float:
    return evaluate.perplexity(model, None, ids, window=recipe.length, batch_size=32, progress=False).perplexity


def quality_table(model: nn.Module, anchor: float, ids: Tensor, recipe: Recipe) -> list[dict[str, Any]]:
    """Perplexity at fractions of the gated FLOPs, and its ratios to the ungated model and to lambda = 0."""
    rows: list[dict[str, Any]] = []
    dense = perplexity_of(model, ids, recipe)
    for fraction in FRACTIONS:
        with resize(model, fraction, metric="flops", of="gated") as resized:
            assert resized.plan is not None
            value = dense if fraction == 1.0 else perplexity_of(model, ids, recipe)
            kept = resized.plan.cost
        rows.append(
            {
                "gated FLOPs": fraction,
                "params": kept.params,
                "perplexity": value,
                "/ ungated": value / anchor,
                "/ own dense": value / dense,
                "paper / own dense": PAPER_RATIOS.get(fraction, 1.0),
            }
        )
    return rows


def compact_all(model: nn.Module, tokenizer: Any, output: Path) -> list[dict[str, Any]]:
    """Compacts to several sizes (each checked against the masked model), saves them and times one against dense."""
    rows = []
    dense = compact(model, 1.0)
    for size in (0.75, 0.5, 0.3):
        plan: Plan = plan_size(model, size)
        small = compact(model, plan)
        folder = output / f"compact-{size:g}"
        save(small, folder, tokenizer)
        timing = evaluate.speed(small, baseline=dense, prompt_tokens=128, new_tokens=24, rounds=5, progress=False)
        rows.append(
            {
                "params asked": round(size * plan.dense_cost.params),
                "params": plan.cost.params,
                "prefill x dense": timing.prefill_ratio,
                "decode x dense": timing.decode_ratio,
                "folder": folder.name,
            }
        )
        say(f"compacted to {plan.cost.params:,} parameters ({size:g} of dense): logits checked, saved to {folder}")
    return rows


def run(output: str | Path, *, fast: bool = False) -> dict[str, Any]:
    """Runs the demo.

    Args:
        output: folder of the puppet, the compacted models and the report.
        fast: a few steps only: shows that everything works, not how well.

    Returns:
        JSON-able tables and figures; also written to the report.
    """
    from ppnet.reporting import report
    from ppnet.train import text_blocks

    recipe = FAST if fast else Recipe()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    train_text, valid_text = library_text(recipe.files)
    say(f"training a byte-level BPE on {sum(map(len, train_text)):,} characters of Python's standard library")
    tokenizer = train_tokenizer(train_text, recipe.vocabulary)
    blocks = text_blocks(train_text, tokenizer, recipe.length, progress=False)
    valid = text_blocks(valid_text, tokenizer, recipe.length, max_tokens=recipe.valid_tokens, progress=False).ids.long()

    model = new_model(recipe)
    seconds = {"dense phase": train(model, blocks, recipe, output / "log", 0, recipe.dense_steps, "dense phase")}
    elastic = copy.deepcopy(model)
    seconds["ungated to the end"] = train(
        model, blocks, recipe, output / "log", recipe.dense_steps, recipe.steps, "the same model without gates (anchor)"
    )
    anchor = perplexity_of(model, valid, recipe)
    say(f"ungated model: perplexity {anchor:.2f} on {valid.numel():,} held-out tokens")

    wrap(elastic, PuppetConfig(seed=recipe.seed))
    seconds["gate phase"] = train(
        elastic, blocks, recipe, output / "log", recipe.dense_steps, recipe.steps, "gate phase"
    )
    elastic.eval()
    quality = quality_table(elastic, anchor, valid, recipe)
    save(elastic, output / "puppet", tokenizer)
    compacted = compact_all(elastic, tokenizer, output)
    say("report: perplexity, mask draws and speed at 10 sizes")
    report(
        elastic,
        None,
        valid[: recipe.report_tokens],
        output / "report",
        metric="flops",
        draws=recipe.draws,
        window=recipe.length,
        batch_size=32,
        speed_options={"prompt_tokens": 128, "new_tokens": 16, "batch_size": 1, "rounds": 3, "warmup": 1},
        dense_anchor=perplexity_of(model, valid[: recipe.report_tokens], recipe),
        extra_tables={"Elastic, ungated and the paper": quality, "Compacted models": compacted},
        title="Llama on Python's standard library",
    )
    return {
        "ungated_perplexity": anchor,
        "dense_over_ungated": quality[0]["/ ungated"],
        "quality": quality,
        "compacted": compacted,
        "training_seconds": seconds,
        "seconds": time.perf_counter() - began,
        "report": str(output / "report" / "report.html"),
    }
