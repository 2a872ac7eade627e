"""Without the compiled extension: one warning, and the same training and compaction on the torch reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from helpers import tiny, token_ids

import ppnet

SCRIPT = """
import sys, warnings
sys.modules["ppnet._C"] = None
sys.modules["ppnet._host"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import ppnet
ours = [str(w.message) for w in caught if "ppnet" in str(w.message)]
assert len(ours) == 1, ours
assert not ppnet.build_info()["extension"] and ppnet.build_info()["reason"]
print(ours[0])
import torch
sys.path.insert(0, sys.argv[1])
from test_pure_torch import trained
torch.save(trained(), sys.argv[2])
"""


def trained():
    """Gradients of two gated training passes, and the logits of the compacted result."""
    model = ppnet.wrap(tiny("qwen3"), ppnet.PuppetConfig(dense_fraction=0.0, prefix_fraction=0.0)).train()
    ids = token_ids()
    for _ in range(2):
        (model(ids, labels=ids).loss + model.puppet.penalty()).backward()
        model.puppet.clear()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logits = ppnet.compact(model.eval(), 0.5)(ids).logits
    return {**gradients, "logits": logits}


def test_reference_path_gives_the_compiled_result_and_warns_once(tmp_path):
    out = tmp_path / "pure.pt"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout
    pure, compiled = torch.load(out), trained()
    assert pure.keys() == compiled.keys()
    for name, want in compiled.items():
        # The gather is the same to the bit; sums in the row dot are ordered differently.
        assert torch.allclose(pure[name], want, rtol=1e-4, atol=1e-6 * float(want.abs().max()) + 1e-9), name
