#!/usr/bin/env bash
# One call for a GPU machine: build, check that the kernels can launch, memory checks, tests, benchmarks.
# OUT=<folder for results> (default build/gpu), PYTHON=<interpreter with torch, cmake, ninja, pybind11>.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
mkdir -p "$out"
export PPNET_CUDA=ON PPNET_CUDA_ARCHS="${PPNET_CUDA_ARCHS:-90a-real}" MAX_JOBS="${MAX_JOBS:-$(nproc)}"

$python setup.py build_ext --inplace
$python - <<'PY' | tee "$out/build_info.txt"
import torch
from ppnet.extension import build_info
from ppnet.ops import gather_rows

info = build_info()
print(info)
assert info["cuda"] == "ok", info["cuda"]
src, idx = torch.arange(12.0, device="cuda").view(4, 3), torch.tensor([2, 0], device="cuda")
assert torch.equal(gather_rows([src], [idx], [None], [0])[0], src[idx])
print("a first launch works")
PY

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    "$sanitizer" --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -p no:cacheprovider tests/ops -m gpu -k "7-172 or 172-7" | tee "$out/$tool.txt"
  done
else
  echo "no compute-sanitizer: memory checks skipped" | tee "$out/memcheck.txt"
fi
$python -m pytest -q tests -m "gpu or not gpu" | tee "$out/pytest.txt"
$python -m pytest benchmarks --benchmark-only --benchmark-json="$out/benchmark.json" | tee "$out/benchmark.txt"
