"""The digit-completion task: the prompt "a,b:m,n" asks for the next n numbers of a, b, ... modulo m, between commas.

    "7,0:9,3" -> "2,4,6"    (step (0 - 7) mod 9 = 2)

The prompts are those of ../shared/data/rl or, without it, the same thousand by rule, in an order of a fixed seed.
"""

import json
import random
import re

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import ppnet

MODULUS, MOST = 9, 9
MAX_NEW_TOKENS = 2 * MOST  # digits, commas and the end
VOCABULARY = {token: number for number, token in enumerate(["<pad>", "<end>", *"0123456789,:"])}
FORM = re.compile(rf"\d,\d:{MODULUS},\d")
IGNORED = -100


def answer(prompt):
    """The right completion."""
    first, second, modulus, count = map(int, re.split("[,:]", prompt))
    return ",".join(str((second + (second - first) * step) % modulus) for step in range(1, count + 1))


def exact(prompt, completion):
    return float(completion == answer(prompt))


def share(prompt, completion):
    """Right numbers in their places, over the numbers there are or should be: the reward that is trained."""
    right, given = (text.split(",") if text else [] for text in (answer(prompt), completion))
    if not right and not given:
        return 1.0
    return sum(a == b for a, b in zip(right, given, strict=False)) / max(len(right), len(given))


def share_reward(prompts, completions, **kwargs):
    """`share` as trl calls it."""
    return [share(*pair) for pair in zip(prompts, completions, strict=True)]


def generated():
    """All prompts with a = 0..9 and every step, 800 to train and 200 to test."""
    everything = [f"{a},{(a + d) % MODULUS}:{MODULUS},{n}" for a in range(10) for d in range(10) for n in range(10)]
    random.Random(0).shuffle(everything)
    return everything[:800], everything[800:]


def read(path):
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            prompt = json.loads(line)["prompt"]
            found = FORM.fullmatch(prompt)
        except (ValueError, KeyError, TypeError):
            found = None
        if found is None:
            raise ValueError(
                f'{path}:{number}: {line[:60]!r} is not {{"prompt": "a,b:{MODULUS},n"}} with digits a, b, n'
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path}: is empty")
    return prompts


def load_prompts(folder):
    """Prompts to train on, prompts to test on, and where they are from. No test prompt is trained on: the files have
    29 in both, since a step of 0 and one of 9 give the same prompt.

    Raises:
        ValueError: a file that is not of this task, or only one of the two.
    """
    files = [folder / f"digit_completion_{split}.jsonl" for split in ("train", "test")]
    there = [path.exists() for path in files]
    if any(there) and not all(there):
        raise ValueError(f"{files[there.index(False)]}: is missing, but the other split is there; give both or none")
    train, test = (read(path) for path in files) if all(there) else generated()
    return sorted(set(train) - set(test), key=train.index), test, "files" if all(there) else "generated"


def character_tokenizer():
    """One token per character, without merges."""
    tokenizer = Tokenizer(models.BPE(VOCABULARY, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def sequences(tokenizer, prompts, completions):
    """Token ids of prompts with their completions; only the completions and their ends have labels."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        question = tokenizer(prompt)["input_ids"]
        reply = (
            [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id] if completion else [tokenizer.eos_token_id]
        )
        rows.append({"input_ids": question + reply, "labels": [IGNORED] * len(question) + reply})
    return rows


@torch.no_grad()
def completions_of(model, tokenizer, prompts):
    """Greedy completions, as text."""
    was_training = model.training
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = model.eval().generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    model.train(was_training)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def rewards_of(model, tokenizer, prompts):
    """Means over greedy completions: exactly right, and share of right numbers."""
    pairs = list(zip(prompts, completions_of(model, tokenizer, prompts), strict=True))
    return {reward.__name__: sum(reward(*pair) for pair in pairs) / len(pairs) for reward in (exact, share)}


@torch.no_grad()
def divergence(dense, small, rows):
    """KL(dense || small) in nats per token of the completions in `rows` (`sequences` of the dense model's own)."""
    total = count = 0.0
    for batch in ppnet.calibration_batches(dense, rows, batch_size=256, max_tokens=None):
        counted = batch.pop("labels")[:, 1:] != IGNORED
        theirs, own = (F.log_softmax(m(**batch, use_cache=False).logits[:, :-1][counted], -1) for m in (dense, small))
        total += float((theirs.exp() * (theirs - own)).sum())
        count += len(own)
    return total / count
