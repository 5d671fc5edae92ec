"""The native libraries: one per instruction set, from the same C++ sources. All else about the package stands in
pyproject.toml.

There is also the line that tells the lm-evaluation-harness of Hanmo's models (``hanmo.evaluation.harness_name``); it
goes where Python looks for packages.

There are two sets: kernels for training (``models/kernels``) and the engine that writes and reads texts
(``inference/native``). They are optional: without a compiler the package installs all the same and computes with torch
alone (`hanmo doctor` says what that costs).
"""

from __future__ import annotations

import copy
import platform
import sys
import sysconfig
import zipfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

AVX512, AVX2, NEON = ["-march=x86-64-v4", "-mavx512vnni"], ["-march=x86-64-v3"], ["-march=armv8.2-a+dotprod"]
KERNELS = {  # machine: library: compiler flags; what the machine runs is decided when the library is loaded
    "x86_64": {"avx512": AVX512, "avx2": AVX2},
    "aarch64": {"neon": NEON},
}
ENGINE = {
    "x86_64": {
        "avx512": [*AVX512, "-mprefer-vector-width=512"],
        "avxvnni": [*AVX2, "-mavxvnni"],
        "avx2": AVX2,
        "plain": [],
    },
    "aarch64": {"neon": NEON, "plain": []},
}
HARNESS = "hanmo_lm_eval.pth"
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
COMPILE = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
COMPILE += ["-Wno-maybe-uninitialized", "-Wno-ignored-attributes"]  # GCC 12 warns of its own headers
FAST = ["-ffast-math", "-fno-finite-math-only"]
EXACT = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]  # a row's result never depends on its company


class BuildExtensions(build_ext):
    """Objects of each library in a folder of their own: libraries are built at the same time, from the same sources."""

    def build_extension(self, ext: Extension) -> None:
        """Build one library."""
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp, ext.name))
        build_ext.build_extension(own, ext)


class EditableWheel(editable_wheel):
    """An editable installation takes no data files by itself; pip puts down what it finds in the archive, and removes
    it again with the rest."""

    def run(self) -> None:
        """Build the archive and add the line for the harness."""
        super().run()
        for archive in Path(self.dist_dir).glob("hanmo-*editable*.whl"):
            with zipfile.ZipFile(archive, "a") as opened:
                opened.write(HARNESS)


def extension(package: str, level: str, flags: list[str]) -> Extension:
    """One library. It is linked without OpenMP's runtime on purpose: it takes the one that torch has loaded, so that
    all share one team of threads."""
    folder = Path("src", *package.split("."), "src")
    return Extension(
        f"{package}._{level}",
        sources=sorted(str(path) for path in folder.glob("*.cpp")),
        depends=sorted(str(path) for path in folder.glob("*.h")),
        extra_compile_args=[*COMPILE, *flags],
        optional=True,
    )


modules = []
if sys.platform == "linux":
    modules += [
        extension("hanmo.models.kernels", level, [*FAST, *flags]) for level, flags in KERNELS.get(MACHINE, {}).items()
    ]
    engine = ENGINE.get(MACHINE, {"plain": []})
    modules += [extension("hanmo.inference.native", level, [*EXACT, *flags]) for level, flags in engine.items()]
packages, prefix = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("data"))
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildExtensions, "editable_wheel": EditableWheel},
    data_files=[(packages.relative_to(prefix).as_posix(), [HARNESS])] if packages.is_relative_to(prefix) else [],
)
