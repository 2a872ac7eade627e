"""Builds ppnet._C and ppnet._host through CMake; the metadata is in pyproject.toml.

Environment: PPNET_CUDA=ON|OFF|AUTO, PPNET_CUDA_ARCHS (default: machine code for sm_80, which sm_86 and sm_89 run too,
and sm_90a; PTX of compute_80, which the driver compiles for any later GPU when that first uses it), PPNET_EXT=AUTO|OFF,
PPNET_SANITIZE=ON|OFF, PPNET_EMULATOR=ON|OFF (also ppnet/_emulated.so, for tests: the CUDA kernels on the CPU),
MAX_JOBS.
Without a C++ compiler the package is installed as pure Python; a compiler that fails is an error.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_dir() -> Path:
    """Folder of the torch that ppnet will run with.

    torch is neither imported nor a build requirement. Under pip's build isolation the user's site-packages are hidden,
    but the interpreter is the same, so sysconfig still names the environment that is being installed into.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    folders += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    for folder in folders:
        if (folder / "include" / "torch" / "csrc" / "stable").is_dir():
            return folder
    sys.exit(
        "ppnet: install torch first (pip install torch==2.13.0), then run this again. ppnet is compiled against the "
        f"torch it will run with; no torch >= 2.11 was found in {folders[-1].parent}"
    )


def torch_version(folder: Path) -> str:
    """Version string of the torch in `folder`, read from its version.py."""
    for line in (folder / "version.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split("=")[1].strip().strip("'\"")
    return "unknown"


def pybind11_include() -> str | None:
    if importlib.util.find_spec("pybind11") is None:
        return None
    import pybind11

    return pybind11.get_include()


def cmake_command() -> str | None:
    """A cmake that starts: a build environment may hold a launcher whose package is hidden from it."""
    beside = Path(sys.executable).with_name("cmake")
    for command in (shutil.which("cmake"), str(beside), "/usr/bin/cmake"):
        if command and shutil.which(command):
            done = subprocess.run([command, "--version"], capture_output=True)
            if done.returncode == 0:
                return command
    return None


def emulator_wanted() -> bool:
    return os.environ.get("PPNET_EMULATOR", "OFF").upper() == "ON"


def missing_tool() -> str | None:
    """What keeps the extension from being built here, or None."""
    if os.environ.get("PPNET_EXT", "AUTO").upper() == "OFF":
        return "PPNET_EXT=OFF"
    compiler = os.environ.get("CXX")
    if compiler:
        if shutil.which(compiler.split()[0]) is None:
            return f"the C++ compiler named by CXX, {compiler!r}, was not found"
    elif not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "no C++ compiler was found (c++, g++ or clang++ on PATH, or CXX)"
    if cmake_command() is None:
        return "cmake was not found (pip install cmake ninja)"
    if pybind11_include() is None:
        return "pybind11 was not found (pip install pybind11)"
    return None


class CMakeExtension(Extension):
    def __init__(self, name: str, file: str):
        super().__init__(name, sources=[])
        self.file = file


class CMakeBuild(build_ext):
    """Configures and builds once for all extensions, then copies each to where setuptools expects it."""

    def run(self) -> None:
        super().run()
        if (self.inplace or self.editable_mode) and not emulator_wanted():
            (ROOT / "ppnet" / "_emulated.so").unlink(missing_ok=True)  # the tests would find it out of date

    def build_extensions(self) -> None:
        sanitize = os.environ.get("PPNET_SANITIZE", "OFF").upper()
        suffix = "-sanitize" if sanitize == "ON" else ""
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        torch = torch_dir()
        cmake = cmake_command() or "cmake"
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DTORCH_DIR={torch}", f"-DTORCH_VERSION={torch_version(torch)}"]
        configure += [f"-DPYTHON_INCLUDE={sysconfig.get_path('include')}", f"-DPYBIND11_INCLUDE={pybind11_include()}"]
        configure += [f"-DPPNET_CUDA={os.environ.get('PPNET_CUDA', 'AUTO').upper()}"]
        configure += [f"-DPPNET_CUDA_ARCHS={os.environ.get('PPNET_CUDA_ARCHS', '80-real;90a-real;80-virtual')}"]
        configure += [f"-DPPNET_SANITIZE={sanitize}", f"-DPPNET_EMULATOR={'ON' if emulator_wanted() else 'OFF'}"]
        ninja = shutil.which("ninja")
        if ninja:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        env = dict(os.environ)
        if "CUDACXX" not in env and shutil.which("nvcc") is None:
            # CMake looks for nvcc on PATH and in CUDACXX only.
            for home in (env.get("CUDA_HOME"), "/usr/local/cuda"):
                if home and Path(home, "bin", "nvcc").is_file():
                    env["CUDACXX"] = str(Path(home, "bin", "nvcc"))
                    break
        # Another generator, compiler or build environment: a stale cache would stop CMake, and `--fresh` costs seconds.
        stale = subprocess.run(configure, env=env).returncode != 0
        if stale:
            subprocess.check_call([*configure, "--fresh"], env=env)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call([cmake, "--build", str(folder), "--parallel", jobs], env=env)
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            # Copy and rename: overwriting a library in place would crash a process that has it loaded.
            partial = target.with_suffix(".partial")
            shutil.copy2(folder / ext.file, partial)
            partial.replace(target)

    def get_ext_filename(self, fullname: str) -> str:
        file = {"_C": "_C.abi3.so", "_host": "_host" + sysconfig.get_config_var("EXT_SUFFIX")}
        file["_emulated"] = "_emulated.so"
        *package, name = fullname.split(".")
        return os.path.join(*package, file[name])


def extensions() -> list[Extension]:
    why = missing_tool()
    if why is None:
        built = [CMakeExtension("ppnet._C", "_C.abi3.so"), CMakeExtension("ppnet._host", "_host.so")]
        return built + [CMakeExtension("ppnet._emulated", "_emulated.so")] * emulator_wanted()
    print(f"ppnet: PURE PYTHON INSTALL, without the compiled kernels: {why}", file=sys.stderr, flush=True)
    return []


if not {"sdist", "egg_info"} & set(sys.argv):
    torch_dir()  # at the top, so that pip stops here and does not resolve (and download) some other torch first
setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
