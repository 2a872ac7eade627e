"""Model folders of any size, written without building the model; and compacting one in a process of its own.

``python tests/large_folders.py FOLDER GIGABYTES`` writes one, to try things on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ppnet.shards import Shards

MIB = 1 << 20


def write_llama(folder: Path, layers: int, width: int, shard: str) -> int:
    """A bfloat16 Llama with 4 times the width in neurons and 64-wide heads in groups of 4; returns its bytes."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 256, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, state_dict={})
    noise = (0.02 * torch.randn(16 * MIB + 8191, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    shards = Shards(model.state_dict(), shard)
    drawn = 0

    def blocks(name: str) -> Iterator[Tensor]:
        nonlocal drawn
        left = prod(shards.tensors[name].shape)
        while left:
            drawn += 1
            size = min(left, 16 * MIB)
            start = drawn * 997 % 8191
            yield noise[start : start + size]
            left -= size

    shards.write(folder, blocks, model.num_parameters())
    return shards.total_bytes


SCRIPT = """
import json, sys, time
import torch, ppnet
from ppnet.streaming import compact_folder
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
options = json.loads(sys.argv[3])
torch.set_num_threads(options.pop("threads", 1))
before, start = status("VmRSS"), time.perf_counter()
made = compact_folder(sys.argv[1], sys.argv[2], **options)
seconds = time.perf_counter() - start
print(json.dumps({"before": before, "peak": status("VmHWM"), "seconds": seconds, "bytes": made.bytes,
                  "read": made.bytes_read}))
"""


def compact_apart(source: Path, out: Path, **options: Any) -> dict[str, float]:
    """`compact_folder` in a fresh process: bytes resident before and at the peak, written, read, and seconds."""
    arguments = [sys.executable, "-c", SCRIPT, str(source), str(out), json.dumps(options)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    # 15 matrices of width ** 2 parameters a layer: 4 * 3 of the MLP, 2.5 of attention.
    count = round(float(sys.argv[2]) * 1e9 / (2 * 14.5 * 2048**2))
    print(f"{write_llama(Path(sys.argv[1]), count, 2048, '1GB'):,} bytes")
