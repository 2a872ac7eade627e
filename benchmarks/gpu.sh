#!/usr/bin/env bash
# One call for a GPU machine: build, first launch, memory checks, tests, benchmarks; needs nothing but this repository and
# a Python with torch, cmake, ninja, pybind11, pytest, hypothesis, pytest-benchmark and ppnet's dependencies, and nvcc.
# OUT=<folder for results> (default build/gpu), PYTHON=<interpreter>, PPNET_CUDA_ARCHS (default 90a-real), SECONDS_LIMIT.
# A step that fails does not stop the others; the last lines say which did, and the exit status is their number.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
limit=${SECONDS_LIMIT:-480}
mkdir -p "$out"
export PPNET_CUDA=ON PPNET_CUDA_ARCHS="${PPNET_CUDA_ARCHS:-90a-real}" MAX_JOBS="${MAX_JOBS:-$(nproc)}" PYTHONUNBUFFERED=1
failed=()

# step NAME SECONDS COMMAND...: into $out/NAME.txt too, never beyond what is left of the whole.
step() {
  local name=$1 seconds=$2 left=$((limit - SECONDS)) start=$SECONDS status=0
  shift 2
  echo "== $name"
  timeout $((seconds < left ? seconds : left > 1 ? left : 1)) "$@" 2>&1 | tee "$out/$name.txt" || status=$?
  echo "== $name: exit $status after $((SECONDS - start)) s" | tee -a "$out/$name.txt"
  [ "$status" -eq 0 ] || failed+=("$name")
  return "$status"
}

setting() {
  git rev-parse HEAD 2>/dev/null
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
  nvcc --version 2>/dev/null | tail -1
  "$python" -c "import sys, torch, transformers; print(sys.version, torch.__version__, transformers.__version__)"
}

first_launch() {
  "$python" - <<'PY'
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
}
export python
export -f setting first_launch

step setting 60 bash -c setting
step build 240 "$python" setup.py -q build_ext --inplace &&
  step first_launch 60 bash -c first_launch || { echo "== nothing can run: ${failed[*]}"; exit 1; }

step gpu_tests 150 "$python" -m pytest -q -p no:cacheprovider -n 8 -m gpu tests/ops tests/cuda ||
  step gpu_tests_again 150 "$python" -m pytest -q -p no:cacheprovider -m gpu --lf tests/ops tests/cuda
# Small shapes of every kernel: the checkers make a launch some hundred times slower.
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
for tool in memcheck racecheck initcheck; do
  if [ -n "$sanitizer" ]; then
    step "$tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" tests/ops/every_kernel.py
  else
    echo "== no compute-sanitizer: $tool was not run"
    failed+=("$tool")
  fi
done
step operators 150 "$python" -m ppnet bench --device cuda --quick --out "$out/operators"
step tests 120 "$python" -m pytest -q -p no:cacheprovider -n 12 tests/ops tests/test_accelerate.py tests/test_skip.py

echo "== ${#failed[@]} steps failed: ${failed[*]:-none} ($SECONDS s)"
exit "${#failed[@]}"
