"""``ppnet speculate FOLDER --draft 0.2 --prompt TEXT``: generation with a small size of the model as its draft."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ppnet.cli.common import (
    Device,
    Dtype,
    Json,
    Metric,
    MultipleOf,
    Of,
    Ranking,
    Tokenizer,
    check_ranking,
    load_model,
    load_tokenizer,
    parse_multiple_of,
    parse_size,
    quiet_stdout,
    show,
    table,
)
from ppnet.cli.measure import Threads, set_threads
from ppnet.errors import DataError


def speculate(
    folder: Annotated[
        Path, typer.Argument(help="A Hugging Face model folder: dense, or with gates.", show_default=False)
    ],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    draft: Annotated[str, typer.Option(help="Size of the draft: a fraction (0.2) or an absolute number.")] = "0.2",
    new: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Sample; default: the likeliest tokens.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="With --sample: of the likeliest so many; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="With --sample: of the likeliest with this probability in all.")] = 1.0,
    length: Annotated[int | None, typer.Option(help="Drafted tokens per round; default: by measuring.")] = None,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    metric: Metric = "params",
    of: Of = "model",
    multiple_of: MultipleOf = None,
    scores: Ranking = None,
    accelerate: Annotated[bool, typer.Option(help="Put ppnet's decode kernels under the model.")] = True,
    compare: Annotated[bool, typer.Option("--compare", help="Let the model generate alone, too, and time it.")] = False,
    tokenizer: Tokenizer = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Generate text with a small size of the model as its own draft: same output, fewer passes, one set of weights.

    Example:  ppnet speculate puppet --draft 0.2 --prompt "Once upon a time" --compare
    """
    import torch

    from ppnet.accelerate import accelerate as put_on
    from ppnet.speculation import draft as make_draft
    from ppnet.speculation import speculate as run
    from ppnet.units import ORDER
    from ppnet.wrap import is_wrapped

    set_threads(threads)
    with quiet_stdout():
        words = load_tokenizer(tokenizer or folder)
        model = load_model(folder, device, dtype)
        if is_wrapped(model) or not getattr(model.config, ORDER, None):
            check_ranking(model, scores)
        ids = words(prompt, return_tensors="pt").input_ids
        if ids.numel() == 0:
            raise DataError(f"prompt: {prompt!r} has no tokens; give some text.")
        if accelerate:
            put_on(model)
        size = parse_size(draft)
        small = make_draft(model, size, metric=metric, of=of, multiple_of=parse_multiple_of(multiple_of), scores=scores)
        source = torch.Generator(model.device).manual_seed(seed)
        found = run(
            model, small, ids, max_new_tokens=new, do_sample=sample, temperature=temperature, top_k=top_k, top_p=top_p,
            draft_length=length, generator=source,
        )  # fmt: skip
        result = {"model": folder, "draft": size, "text": words.decode(found.sequences[0], skip_special_tokens=True)}
        result |= found.to_dict()
        if compare:
            result |= _alone(model, found, ids.to(model.device), new, sample)
    rows = [
        ["tokens", f"{found.new_tokens:,}"],
        ["tokens per s", f"{found.tokens_per_s:,.1f}"],
        *([["the model alone", f"{result['alone_tokens_per_s']:,.1f}"]] if compare else []),
        *([["the same tokens", "yes" if result["same_as_alone"] else "no"]] if compare and not sample else []),
        ["acceptance", f"{found.acceptance:.3f}"],
        ["tokens per verification", f"{found.tokens_per_verification:.2f}"],
        ["bytes of weights", f"{found.memory.weights:,}"],
        ["of which the draft reads", f"{found.memory.draft_weights:,}"],
        ["bytes that only the draft has", f"{found.memory.draft_own + found.memory.draft_cache:,}"],
    ]
    show(result, json, result["text"], table(f"{folder}, draft of size {draft}", ["", ""], rows))


def _alone(model: Any, found: Any, ids: Any, new: int, sample: bool) -> dict[str, Any]:
    """The same number of tokens by `generate`, after one that warms up, and whether greedy ones are the same."""
    # Models that were saved after training say use_cache: false.
    options = {"do_sample": False, "pad_token_id": 0, "use_cache": True}
    model.generate(ids, max_new_tokens=2, **options)
    start = time.perf_counter()
    first = model.generate(ids, max_new_tokens=1, **options)
    middle = time.perf_counter()
    whole = model.generate(ids, max_new_tokens=new, **options)
    seconds = time.perf_counter() - middle - (middle - start)
    tokens = whole.shape[1] - first.shape[1]
    same = None if sample else bool(whole.shape == found.sequences.shape and (whole == found.sequences).all())
    return {"alone_tokens_per_s": tokens / max(seconds, 1e-9), "same_as_alone": same}


def add_to(app: typer.Typer) -> None:
    app.command()(speculate)
