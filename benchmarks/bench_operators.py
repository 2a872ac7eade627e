"""Every operator at every case of ppnet/roofline/cases, beside its baselines, against the ceilings of the same rounds.

Run: make bench, or python -m pytest benchmarks/bench_operators.py --benchmark-only -k gather_rows. The columns in
extra_info come from paired rounds of all providers (`ppnet.roofline.measure`); the row's own times are ours, once more.
"""

import pytest
import torch

import ppnet.roofline.cases  # noqa: F401  registers the operators
from ppnet.roofline import Machine, measure
from ppnet.roofline.case import OPERATORS
from ppnet.roofline.timing import off_the_default_stream

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [case for name in sorted(OPERATORS) for case in OPERATORS[name]("full", DEVICE)]


@pytest.fixture(scope="session")
def machine():
    return Machine(DEVICE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}: {case.label}")
def test_operator(benchmark, case, machine):
    with torch.no_grad(), off_the_default_stream(DEVICE):
        row = measure(case, machine)
        providers = case.setup()
        ours = next(iter(providers.values()))

        def timed():
            ours()
            machine.now()  # waits for a GPU

        benchmark.pedantic(timed, rounds=row.rounds, iterations=row.calls, warmup_rounds=1)
    benchmark.extra_info |= {
        "rate": round(row.rate, 1),
        "unit": "GFLOP/s" if row.bound == "matmul" else "GB/s",
        "bound": row.bound,
        "ceiling": round(row.ceiling.median, 1),
        "% of ideal": round(100 * row.share.median),
        "x dense": row.faster.get("dense"),
        "x dense+mask": row.faster.get("dense+mask"),
        "x": row.faster,
        "best baseline": row.best,
        "keep": row.keep,
        "shape": row.shape,
        "machine": {kind: round(figure.value.median, 1) for kind, figure in machine.ceilings.items()},
        **{key: machine.setting[key] for key in ("device", "processor", "isa", "torch", "threads", "pages")},
    }
