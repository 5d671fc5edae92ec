"""The corpus that every machine has: the sources of Python's own standard library (PSF licence)."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "idle_test", "lib2to3"})


def stdlib_paths() -> list[str]:
    """The ``.py`` files of the running Python's standard library that are UTF-8 text, sorted; about 30 MB with tests.

    Some systems install Python without its tests; then it is about 10 MB. A few test files are wrong on purpose (bad
    encodings, null bytes) and are left out.
    """
    files: list[Path] = []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return [str(path) for path in sorted(files) if is_text(path)]


def is_text(path: Path) -> bool:
    """Whether a source file has text that decodes."""
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return bool(data.strip()) and b"\x00" not in data
