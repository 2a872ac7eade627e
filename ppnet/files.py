"""Writing files so that nothing half-written is ever found under a final name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Writes text to a temporary name in the same folder, flushes it to disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path` that takes its name when the block ends without an error.

    An existing folder of that name stays until the new one is complete; on error (a full disk, an interrupt) the new
    one is removed and the old one is untouched. If `path` is a link, the folder it points to is replaced.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    work.chmod(0o755)
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            work.rename(path)
            shutil.rmtree(old)
        else:
            work.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_files(output: Path, contents: dict[str, bytes]) -> None:
    """Writes files into a folder, each complete before it has its name; other files of the folder are left alone."""
    output = Path(output)
    fresh = not output.exists()
    with atomic_directory(output if fresh else output / ".new") as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    if not fresh:
        for name in contents:
            os.replace(output / ".new" / name, output / name)
        (output / ".new").rmdir()
