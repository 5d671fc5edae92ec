"""The native kernels: one shared library per instruction set, all from the same C++ sources. Everything else about the
package stands in pyproject.toml.

They are optional: without a compiler the package installs all the same and computes with torch alone (`hanmo doctor`
says what that costs).
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("src/hanmo/models/kernels")
LEVELS = {  # library: compiler flags; what the machine runs is decided when the library is loaded
    "x86_64": {
        "avx512": ["-march=x86-64-v4", "-mavx512vnni"],
        "avx2": ["-march=x86-64-v3"],
    },
    "aarch64": {"neon": ["-march=armv8.2-a+dotprod"]},
}
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
COMPILE = ["-std=c++17", "-O3", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
COMPILE += ["-Wall", "-Wno-maybe-uninitialized", "-Wno-psabi"]  # GCC 12 warns of its own headers


def extension(level: str, flags: list[str]) -> Extension:
    """One library. It is linked without OpenMP's runtime on purpose: it takes the one that torch has loaded, so that
    both share one team of threads."""
    return Extension(
        f"hanmo.models.kernels._{level}",
        sources=sorted(str(path) for path in (FOLDER / "src").glob("*.cpp")),
        depends=sorted(str(path) for path in (FOLDER / "src").glob("*.h")),
        extra_compile_args=[*COMPILE, *flags],
        optional=True,
    )


libraries = LEVELS.get(MACHINE, {}) if sys.platform == "linux" else {}
setup(ext_modules=[extension(level, flags) for level, flags in libraries.items()])
