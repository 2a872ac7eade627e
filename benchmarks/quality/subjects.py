"""What the studies measure: trained models with calibration data, a held-out metric and a way to heal."""

from __future__ import annotations

import functools
import random
import time
from pathlib import Path

import sentences
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer
from transformers.trainer_callback import PrinterCallback, TrainerCallback

import ppnet
from ppnet.evaluate import perplexity
from ppnet.train import default_arguments, text_blocks

SHARED = Path(__file__).resolve().parents[3] / "shared"
TINYSTORIES = SHARED / "data" / "tinystories"
SEPARATOR = "<|endoftext|>"


class Progress(TrainerCallback):
    """One line per log."""

    def __init__(self, name):
        self.name, self.start = name, time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            seconds = time.perf_counter() - self.start
            print(f"{self.name}: step {state.global_step} of {state.max_steps}, loss {float(logs['loss']):.4f}, "
                  f"{seconds:.0f} s", flush=True)  # fmt: skip


def train(model, data, folder, name, *, steps, rate, batch, seed=0, kind=Trainer, logs=20, **arguments):
    """Trains every weight (and gate) on the NLL of the data; returns the seconds."""
    options = {"save_strategy": "no", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
    trainer = kind(
        model=model, train_dataset=data, callbacks=[Progress(name)] if logs else [],
        args=default_arguments(
            folder, learning_rate=rate, per_device_train_batch_size=batch, max_steps=steps, seed=seed,
            logging_steps=max(1, steps // (logs or 1)), **(options | arguments),
        ),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or its forward stays under autocast
    return time.perf_counter() - start


# ---- language models of TinyStories ----------------------------------------------------------------------------------


@functools.cache
def stories(name):
    return [story.strip() for story in (TINYSTORIES / name).read_text().split(SEPARATOR) if story.strip()]


def stories_tokenizer():
    return AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K", model_max_length=10**9)


def train_stories_model(folder):
    """A Llama of 5.1 M parameters, trained on 4.1 M tokens of TinyStories: 2.5 epochs of the text that is here."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    tokenizer = stories_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=832, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    blocks = text_blocks(TINYSTORIES / "train.txt", tokenizer, 256, separator=SEPARATOR, bos=True)
    log = folder.with_name(f"{folder.name}-log")
    train(model, blocks, log, folder.name, steps=1000, rate=2e-3, batch=16, bf16=True)
    ppnet.save(model.eval(), folder, tokenizer)


def pretrained(name, models):
    """A trained model of TinyStories: ``"stories260K"``, or ``"stories5m"`` out of the folder `models`."""
    if name == "stories5m":
        train_stories_model(models / name)
    folder = SHARED / "models" / name if name == "stories260K" else models / name
    return AutoModelForCausalLM.from_pretrained(folder).eval()


class Stories:
    """A language model of TinyStories; NLL in nats per token of held-out stories, each from its beginning.

    Args:
        folder: of the dense model.
        calibration_blocks, length: tokens of calibration data.
        held_out: number of stories that the NLL is taken of.
        heal_steps, heal_batch, heal_length, heal_rate: of healing by the dense model's answers (`ppnet.heal`).
        gate_steps: optimizer steps of gate training, of as many tokens each as healing has.
    """

    metric, lower_is_better, language_model, loss, without, score_batch = "NLL", True, True, None, (), 8

    def __init__(self, folder, *, calibration_blocks=96, length=256, held_out=60, heal_steps=60, heal_batch=8,
                 heal_length=256, heal_rate=1e-3, heal_bf16=False, gate_steps=120):  # fmt: skip
        recipe = {name: value for name, value in locals().items() if name not in ("self", "folder")}
        self.__dict__.update(recipe)
        self.recipe = {"metric": self.metric, "lower_is_better": self.lower_is_better, **recipe}
        self.tokenizer = stories_tokenizer()
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def blocks(self, seed, count, length):
        """Blocks of training stories in random order: int64 (count, length)."""
        order = list(stories("train.txt"))
        random.Random(seed).shuffle(order)
        ids = []
        for story in order:
            ids += [self.tokenizer.bos_token_id, *self.tokenizer(story, add_special_tokens=False)["input_ids"]]
            if len(ids) >= count * length:
                return torch.tensor(ids[: count * length]).view(count, length)
        raise ValueError(f"count: {count} blocks of {length} tokens are more than there is text.")

    def calibration(self, seed):
        blocks = self.blocks(seed, self.calibration_blocks, self.length)
        return [{"input_ids": ids, "labels": ids} for ids in blocks.split(self.score_batch)]

    def measure(self, model):
        text = stories("valid.txt")[: self.held_out]
        return perplexity(model, self.tokenizer, text, bos="document", batch_size=16, progress=False).nll

    def training_blocks(self, seed, steps):
        """What a phase of so many steps sees."""
        return self.blocks(1000 + seed, steps * self.heal_batch, self.heal_length)

    def heal(self, small, seed):
        ppnet.heal(
            small, self.model, self.training_blocks(seed, self.heal_steps), steps=self.heal_steps,
            learning_rate=self.heal_rate, batch_size=self.heal_batch, seed=seed, progress=False,
            arguments={"bf16": self.heal_bf16},
        )  # fmt: skip
        return small.eval()


# ---- sentence embeddings ---------------------------------------------------------------------------------------------


class MiniLM:
    """all-MiniLM-L6-v2; Spearman correlation on STS-b dev, higher is better. All data is sentences of WikiText-2.

    Healing is by the dense model's last hidden states, which are what is pooled. Scores of predicted tokens (kl) do not
    apply: the model has no head that predicts any; scores that need a loss get `sentences.sentence_loss`.

    Args:
        calibration_sentences: sentences of calibration data; `sentence_loss` sees `score_batch` of them at a time.
        heal_steps, heal_batch, heal_rate, heal_bf16: of healing.
    """

    metric, lower_is_better, language_model, without, score_batch = "Spearman", False, False, ("kl",), 64
    loss = staticmethod(sentences.sentence_loss)

    def __init__(self, *, calibration_sentences=512, heal_steps=15, heal_batch=32, heal_rate=3e-4,
                 heal_bf16=True):  # fmt: skip
        recipe = {name: value for name, value in locals().items() if name != "self"}
        self.__dict__.update(recipe)
        self.recipe = {"metric": self.metric, "lower_is_better": self.lower_is_better, **recipe}
        self.model, self.tokenizer = sentences.load_minilm()
        self.pairs = sentences.sts_pairs()

    def calibration(self, seed):
        chosen = sentences.calibration_sentences(seed, self.calibration_sentences)
        pairs = sorted(zip(chosen[::2], chosen[1::2], strict=True), key=lambda pair: max(map(len, pair)))
        return ppnet.calibration_batches(  # equal lengths meet: little padding
            self.model, [sentence for pair in pairs for sentence in pair], self.tokenizer,
            batch_size=self.score_batch, max_tokens=None,
        )  # fmt: skip

    def measure(self, model):
        # 1.7 times faster than float32 here; the dense model's correlation moves by 0.0001.
        with torch.autocast("cpu", torch.bfloat16):
            return sentences.spearman(model, self.tokenizer, self.pairs)

    def heal(self, small, seed):
        count = self.heal_steps * self.heal_batch
        ppnet.heal(
            small, self.model, sentences.calibration_sentences(1000 + seed, count), tokenizer=self.tokenizer,
            steps=self.heal_steps, learning_rate=self.heal_rate, batch_size=self.heal_batch, seed=seed, hidden=1.0,
            hidden_layers=(-1,), weight=1.0, progress=False,
            arguments={"bf16": self.heal_bf16, "train_sampling_strategy": "group_by_length"},
        )  # fmt: skip
        return small.eval()


def stories260k(folder):
    return Stories(SHARED / "models" / "stories260K")


def stories5m(folder):
    train_stories_model(folder / "stories5m")
    return Stories(folder / "stories5m", heal_steps=20, heal_length=128, heal_rate=3e-4, heal_bf16=True, gate_steps=60)


def minilm(folder):
    return MiniLM()


SUBJECTS = {"stories260K": stories260k, "stories5M": stories5m, "MiniLM": minilm}
