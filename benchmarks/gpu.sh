#!/usr/bin/env bash
# What needs a GPU, in groups of steps: benchmarks/gpu.sh [--commit HASH] [build] [tests] [operators] [models] [sanitizer]
#   build      the extension and the emulated kernels, in place, for this GPU
#   tests      the GPU tests
#   operators  every operator against the machine (ppnet bench --device cuda --quick), gather and scatter first
#   models     training steps, compact() and generation of whole models (benchmarks/bench_gpu.py)
#   sanitizer  memcheck, racecheck and initcheck of small shapes of every kernel
# Without names all of them, in this order; the others need what build made. A first launch comes before each run.
# Needs nothing but this repository, nvcc and a Python with torch, cmake, ninja, pybind11, pytest, pytest-xdist,
# hypothesis, matplotlib and ppnet's dependencies; no network.
#   --commit HASH    what results are said to be of, where there is no .git (it is remembered in build/commit)
#   OUT              folder for log.txt, operators/ and models.json (default build/gpu)
#   PYTHON           interpreter (default python3)
#   SECONDS_LIMIT    for all steps together (default 570)
#   PPNET_CUDA_ARCHS default: this GPU's
# A step that fails does not stop the others; the last line says which did, and the exit status is their number.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
limit=${SECONDS_LIMIT:-570}
mkdir -p "$out" build
out=$(cd "$out" && pwd) || exit 2
log=$out/log.txt
failed=()

say() {
  echo "$*" | tee -a "$log"
}

die() {
  say "gpu.sh: $1"
  exit "${2:-1}"
}

if [ "${1:-}" = --commit ]; then
  [ -n "${2:-}" ] || die "--commit needs a hash" 2
  echo "$2" >build/commit
  shift 2
fi
for group in "$@"; do
  case $group in
  build | tests | operators | models | sanitizer) ;;
  *) die "unknown group '$group'; known are build, tests, operators, models and sanitizer" 2 ;;
  esac
done
[ $# -gt 0 ] || set -- build tests operators models sanitizer

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ') || capability=
[[ $capability =~ ^[0-9]+$ ]] || die "no NVIDIA GPU was found here (nvidia-smi): nothing was run of: $*"
[ "$capability" = 90 ] && capability=90a # with wgmma and TMA
export PPNET_CUDA=ON PPNET_EMULATOR=ON PPNET_CUDA_ARCHS="${PPNET_CUDA_ARCHS:-$capability-real}"
export MAX_JOBS="${MAX_JOBS:-$(nproc)}" PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export python log

# step NAME SECONDS COMMAND...: into the log too, never beyond what is left of the whole.
step() {
  local name=$1 seconds=$2 left=$((limit - SECONDS)) start=$SECONDS status=0
  shift 2
  if [ "$left" -lt 5 ]; then
    say "== $name: not run, no time is left of $limit s"
    failed+=("$name")
    return 1
  fi
  say "== $name"
  timeout -k 10 $((seconds < left ? seconds : left)) "$@" 2>&1 | tee -a "$log" || status=$?
  [ "$status" -ne 124 ] || say "== $name: stopped at its limit"
  say "== $name: exit $status after $((SECONDS - start)) s"
  [ "$status" -eq 0 ] || failed+=("$name")
  return "$status"
}

setting() {
  git rev-parse HEAD 2>/dev/null || cat build/commit 2>/dev/null || echo "commit unknown: give --commit HASH"
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total --format=csv
  nvcc --version 2>/dev/null | tail -n 1
  "$python" -c "import sys, torch, transformers; print(sys.version, torch.__version__, transformers.__version__)"
}

first_launch() {
  "$python" - <<'PY'
import sys

import torch
from ppnet.extension import build_info
from ppnet.ops import gather_rows

info = build_info()
print(info)
if info["cuda"] != "ok":
    sys.exit(f"the kernels cannot run here: {info['cuda']}; {info['reason']} (run the group build on this machine first)")
src, idx = torch.arange(12.0, device="cuda").view(4, 3), torch.tensor([2, 0], device="cuda")
assert torch.equal(gather_rows([src], [idx], [None], [0])[0], src[idx])
print("a first launch works")
PY
}

# In processes beside each other, each with one thread. What compares the emulator with silicon must not be skipped.
gpu_tests() {
  local status=0 said
  said=$(mktemp)
  OMP_NUM_THREADS=1 "$python" -m pytest -q -o cache_dir=build/pytest-gpu -n 8 -m gpu tests/ops tests/cuda 2>&1 |
    tee "$said" || status=$?
  if grep -q '^SKIPPED.*test_prim_on_gpu' "$said"; then
    echo "gpu.sh: test_prim_on_gpu.py was skipped: nothing compares the emulator with this GPU"
    status=1
  fi
  rm -f "$said"
  return "$status"
}

# One process: what failed because of another test's broken context passes here.
gpu_tests_again() {
  "$python" -m pytest -q -o cache_dir=build/pytest-gpu -m gpu --lf --lfnf=none tests/ops tests/cuda
}

operators() {
  local names
  names=$("$python" - <<'PY'
import ppnet.roofline.cases
from ppnet.roofline.case import OPERATORS

wanted = ["gather_rows", "scatter_rows", "gated_act", "gated_mlp_decode", "gated_attention_decode"]
print(",".join(sorted(OPERATORS, key=lambda name: wanted.index(name) if name in wanted else len(wanted))))
PY
  ) || return 1
  "$python" -m ppnet bench --device cuda --quick --force --operators "$names" --out "$1"
}
export -f setting first_launch gpu_tests gpu_tests_again operators

# Small shapes: the checkers make a launch some hundred times slower. torch's allocator would hide from them where a
# tensor ends and what was freed.
sanitizer() {
  local tool=$1 checker
  shift
  checker=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  if [ -z "$checker" ]; then
    say "== $tool: not run, there is no compute-sanitizer here"
    failed+=("$tool")
    return 1
  fi
  step "$tool" 150 "$checker" --tool "$tool" --error-exitcode 1 "$@"
}

run_group() {
  case $1 in
  tests)
    step gpu_tests 180 bash -o pipefail -c gpu_tests || step gpu_tests_again 90 bash -c gpu_tests_again
    ;;
  operators)
    step operators 300 bash -c 'operators "$1"' operators "$out/operators"
    ;;
  models)
    step models 300 "$python" benchmarks/bench_gpu.py --out "$out/models.json"
    ;;
  sanitizer)
    # torch asks the driver for functions it does not have; such answers are no errors of ours, which are checked.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitizer memcheck --report-api-errors no "$python" tests/ops/every_kernel.py
    sanitizer racecheck "$python" tests/ops/every_kernel.py bfloat16
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitizer initcheck "$python" tests/ops/every_kernel.py
    ;;
  esac
}

step setting 60 bash -c setting
groups=()
for group in "$@"; do
  if [ "$group" = build ]; then
    step build 270 "$python" setup.py -q build_ext --inplace || die "nothing can run without the build"
  else
    groups+=("$group")
  fi
done
step first_launch 60 bash -c first_launch || die "nothing can run: failed are ${failed[*]}"
for group in ${groups[@]+"${groups[@]}"}; do
  run_group "$group"
done

say "== ${#failed[@]} steps failed: ${failed[*]:-none} ($SECONDS s)"
exit "${#failed[@]}"
