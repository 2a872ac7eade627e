"""One training step (forward, backward, clipping, AdamW) at a fixed keep fraction, against dense and dense times mask.

Run: make bench, or python -m pytest benchmarks/bench_step.py --benchmark-only. Every round draws a new mask and times
all variants one after the other, so that load on the machine hits them alike; ratios are medians of the rounds' ratios.
"dense" is the unwrapped model through the fastest of torch's own matrix products here (`ppnet.ops.linear`); "torch's
default" is the same model as it comes. The ideal is what the FLOPs say: s + (1 - s) / 24 of the gated matrices plus the
ungated rest, where the rest is the measured step of a model whose sites all keep one unit. Memory is the peak of what
torch allocates in a step: activations and gradients, beyond weights and optimizer state.
"""

import statistics
import time
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ppnet.extension as extension
from ppnet import PuppetConfig, compact, inspect, wrap
from ppnet.evaluate.memory import peak_bytes
from ppnet.gates.draw import Draw
from ppnet.ops import linear

WIDTH, LAYERS, HEADS, NEURONS, VOCABULARY = 512, 4, 8, 2048, 2048
BATCH, LENGTH = 8, 256
ROUNDS = 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(DEVICE).train()


class Step:
    """A model with its optimizer; `run` makes one step and returns its seconds."""

    def __init__(self, net):
        self.net = net
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=DEVICE)

    def run(self):
        start = time.perf_counter()
        loss = self.net(self.ids, labels=self.ids).loss
        if hasattr(self.net, "puppet"):
            loss = loss + self.net.puppet.penalty()
            self.net.puppet.clear()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def keep_mask(structure, keep):
    """A random mask that keeps exactly round(keep * units) units of every site, at least one: (U,) bool."""
    parts = []
    for site in structure.sites:
        part = torch.zeros(site.units, dtype=torch.bool)
        part[torch.randperm(site.units)[: max(1, round(keep * site.units))]] = True
        parts.append(part)
    return torch.cat(parts)


def draw_with(puppet, keep, u=0.5):
    """What `Puppet.draw` returns at lambda = 1, with a mask of the asked keep fraction."""
    rho = puppet.inclusion(u, puppet.importance(u, train=True))
    mask = keep_mask(puppet.structure, keep)
    puppet._lambdas.append(u / (1 - u))
    relaxed = mask.to(rho) + (rho - rho.detach())
    puppet.draws += 1
    return Draw(u, int(puppet.draws), mask, relaxed * puppet.out_amplitude(u), puppet._input(u))


def skipping(keep):
    """A wrapped model whose every pass keeps the asked fraction."""
    net = wrap(model(), PuppetConfig())
    net.puppet.draw = lambda: draw_with(net.puppet, keep)
    return Step(net)


def masking(keep):
    """Dense computation times the same gates, as published code does: unit outputs are multiplied by z."""
    # The hooks below keep every MLP on its class's forward.
    net = wrap(model(), PuppetConfig())
    puppet = net.puppet
    engine = net.__dict__["_ppnet_engine"]
    gates = {}

    def draw(module, args):
        drawn = draw_with(puppet, keep)
        for index, z in enumerate(drawn.gate.split([s.units for s in puppet.structure.sites])):
            gates[index] = z, drawn.input_scale

    engine.force_dense = True
    net.register_forward_pre_hook(draw)
    for index, site in enumerate(puppet.structure.sites):
        repeat = site.consumer.features_per_unit

        def consumer(module, args, index=index, repeat=repeat):
            return (args[0] * gates[index][0].repeat_interleave(repeat),)

        net.get_submodule(site.consumer.name).register_forward_pre_hook(consumer)
        if site.kind == "neuron":
            row = puppet.mlp_sites.index(index)
            net.get_submodule(site.block).register_forward_pre_hook(
                lambda module, args, row=row, index=index: (args[0] * gates[index][1][row],)
            )
    return Step(net)


def fastest_linears(net):
    """The same model with torch's fastest matrix products: the honest baseline."""
    for module in net.modules():
        if type(module) is torch.nn.Linear:
            module.forward = partial(linear_of, module)
    return net


def linear_of(module, x):
    return linear(x, module.weight, module.bias)


def smallest_model():
    """The model with one unit per site: what is left to train is the ungated rest."""
    net = model()
    return compact(net, inspect(net).smallest.params, scores="magnitude", check=False).train()


def peak_of(step):
    """Peak of one step beyond weights and optimizer state: activations and gradients."""
    return peak_bytes(step.run)


@pytest.fixture(scope="module", autouse=True)
def reuse_memory():
    """All variants are measured without the page faults of fresh buffers, which no variant can avoid."""
    if DEVICE == "cpu" and extension.available():
        extension.host().keep_freed_memory()


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 1.0])
def test_training_step(benchmark, keep):
    torch.manual_seed(1)
    steps = {
        "dense": Step(fastest_linears(model())),
        "default": Step(model()),
        "mask": masking(keep),
        "rest": Step(fastest_linears(smallest_model())),
    }
    gated = skipping(keep)
    times = {name: [] for name in [*steps, "gated"]}

    def other_variants():
        for name, step in steps.items():
            times[name].append(step.run())

    def run():
        times["gated"].append(gated.run())

    benchmark.pedantic(run, setup=other_variants, rounds=ROUNDS, warmup_rounds=1)

    def ratio_to(name):
        """Ours against a variant: median of the rounds after the warm-up."""
        return statistics.median(ours / other for ours, other in zip(times["gated"][1:], times[name][1:], strict=True))

    ratio = ratio_to("dense")
    shares = [rest / dense for rest, dense in zip(times["rest"][1:], times["dense"][1:], strict=True)]
    rest_share = statistics.median(shares)
    ideal = rest_share + (1 - rest_share) * (keep + (1 - keep) / 24)
    benchmark.extra_info |= {
        "keep": keep,
        "x dense": round(ratio, 3),
        "x torch's default": round(ratio_to("default"), 3),
        "x dense+mask": round(ratio_to("mask"), 3),
        "dense s": round(statistics.median(times["dense"][1:]), 4),
        "ungated rest, share of dense": round(rest_share, 3),
        "% of ideal": round(100 * ideal / ratio),
        "peak MB": round(peak_of(gated) / 2**20),
        "x dense peak": round(peak_of(gated) / peak_of(steps["default"]), 3),
        "tokens": BATCH * LENGTH,
        "width": WIDTH,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else extension.isa(),
        "torch": torch.__version__,
    }
