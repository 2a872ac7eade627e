"""Compiles CUDA sources for several architectures and says what became of them: `make cuda-check`, and CI.

Warnings, register spills and, in csrc/cuda, any use of local memory (an array that found no registers, a frame on the
stack: slow, but no spill to ptxas) are errors. A row per source and architecture: kernels, their registers and shared
memory, and how many of the instructions that the kernels are written for there are: 16-byte loads from global memory,
16-byte asynchronous copies, ldmatrix, tensor-core products; and accesses to local memory. Counted in the machine code
where a cuobjdump is found (on PATH or beside nvcc), else in PTX, which does not say what stays local. A source that
lacks what REQUIRED names for it fails. Everything nvcc printed is kept in the output folder.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FLAGS = ["-std=c++17", "-O3", "-Xptxas", "-v", "-Xptxas", "--warn-on-spills", "-Xptxas", "--warning-as-error"]
FLAGS += ["-Xcompiler", "-Wall,-Wextra", "-Werror", "all-warnings"]
FACTS = {  # name -> what it looks like in machine code, and in PTX
    "load 16 B": (
        r"\bLDG?\.E\S*\.128",
        r"\bld(\.global|\.volatile|\.nc|\.cs|\.L\w+(::\w+)*)*\.(v4\.[a-z]32|v2\.[a-z]64)",
    ),
    "async 16 B": (r"\bLDGSTS\.E\S*\.128", r"\bcp\.async\.c[ga]\.shared\.global\S* .*\b16\b"),
    "ldmatrix": (r"\bLDSM\b", r"\bldmatrix\b"),
    "mma": (r"\bHMMA\b", r"\bmma\.sync\b"),
    "local": (r"\b(LDL|STL)\b", r"\b(ld|st)\.local\b"),
}
WIDE, TENSOR = ("load 16 B",), ("async 16 B", "ldmatrix", "mma")
REQUIRED = {
    "gated_attention": TENSOR,
    "gated_attention_backward": TENSOR,
    "gated_attention_decode": (*WIDE, "mma"),
    "gated_mlp_fused": TENSOR,
    **dict.fromkeys(("gated_act", "gated_mlp_decode", "linear_decode", "linear_t_decode"), WIDE),
    **dict.fromkeys(("rms_norm", "rotary", "row_norms", "rows"), WIDE),
}


@dataclass(frozen=True)
class Compiled:
    source: Path
    arch: str
    kernels: int
    registers: list[int]
    shared: list[int]
    facts: dict[str, int]
    failed: str = ""


def cuobjdump_of(nvcc: str) -> str | None:
    beside = Path(nvcc).resolve().with_name("cuobjdump")
    return shutil.which("cuobjdump") or (str(beside) if beside.is_file() else None)


def compile_one(nvcc: str, cuobjdump: str | None, include: Path, out: Path, source: Path, arch: str) -> Compiled:
    kept = out / f"{source.stem}-{arch}"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    command = [nvcc, *FLAGS, f"-I{include}", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += ["--keep", "--keep-dir", str(kept), "-c", str(source), "-o", str(kept / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    (kept / "nvcc.txt").write_text(said)
    if done.returncode:
        return Compiled(source, arch, 0, [], [], {}, said)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", said)]
    if cuobjdump is not None:
        (cubin,) = kept.glob("*.cubin")
        text = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    else:
        text = "".join(path.read_text() for path in kept.glob("*.ptx"))
    facts = {name: len(re.findall(pattern[cuobjdump is None], text)) for name, pattern in FACTS.items()}
    wrong = [f"no {name}" for name in REQUIRED.get(source.stem, ()) if not facts[name]]
    frame = max((int(n) for n in re.findall(r"(\d+) bytes stack frame", said)), default=0)
    local = 0 if cuobjdump is None else facts["local"]
    if source.parent == include / "cuda" and (local or frame):
        wrong.append(f"{local} accesses to local memory and a frame of {frame} bytes; 0 are allowed")
    for path in kept.iterdir():
        if path.suffix not in (".txt", ".cubin"):
            path.unlink()
    return Compiled(source, arch, len(registers), registers, shared, facts, ", ".join(wrong))


def shown(numbers: list[int]) -> str:
    return f"{min(numbers)} .. {max(numbers)}" if numbers else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nvcc", required=True)
    parser.add_argument("--archs", required=True, help="as '80 90a'")
    parser.add_argument("--include", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, required=True)
    parser.add_argument("sources", type=Path, nargs="+")
    given = parser.parse_args()
    cuobjdump = cuobjdump_of(given.nvcc)
    print("instructions counted in", f"machine code by {cuobjdump}" if cuobjdump else "PTX: no cuobjdump was found")
    print(f"{'source':28}{'sm_':>5}{'kernels':>9}{'registers':>12}{'shared B':>14}", *(f"{name:>11}" for name in FACTS))
    work = [(source, arch) for source in given.sources for arch in given.archs.split()]
    failed = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for each in pool.map(lambda one: compile_one(given.nvcc, cuobjdump, given.include, given.out, *one), work):
            used = f"{each.kernels:9}{shown(each.registers):>12}{shown(each.shared):>14}"
            print(
                f"{each.source.name:28}{each.arch:>5}{used}",
                *(f"{count:11}" for count in each.facts.values()),
                flush=True,
            )
            if each.failed:
                failed += 1
                print(f"FAILED: {each.source} for sm_{each.arch}: {each.failed}", flush=True)
    print(f"{len(work) - failed} of {len(work)} compiled without warnings and spills")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
