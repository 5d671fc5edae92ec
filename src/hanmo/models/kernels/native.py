"""The native library: found, checked, and called through ctypes.

The package's build makes one library per instruction set (see ``setup.py``), where there is a compiler. Here the best
one that this machine runs is loaded; where there is none, every kernel computes with torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path

import torch
from torch import Tensor, nn

ABI = 1
LEVELS = {  # library: what the processor must have, by its names in /proc/cpuinfo; the best first
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni"},
    "avx2": {"avx2", "fma", "bmi2", "f16c"},
    "neon": {"asimddp"},
}


@functools.cache
def processor_flags() -> frozenset[str]:
    """Names of the processor's instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    fields = (line.partition(":") for line in lines)
    return frozenset(next((value.split() for name, _, value in fields if name.strip() in ("flags", "Features")), ()))


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library and the name of its instruction set; or None and the reason why there is none."""
    if os.environ.get("HANMO_NATIVE", "").strip() == "0":
        return None, "switched off by HANMO_NATIVE=0"
    built = {path.name.split(".")[0].removeprefix("_"): path for path in Path(__file__).parent.glob("_*.so")}
    if not built:
        return None, "it was not built; install a C++ compiler and install Hanmo again"
    reason = f"none of the libraries ({', '.join(sorted(built))}) runs on this processor ({platform.machine()})"
    for level, needed in LEVELS.items():
        if level not in built or not needed <= processor_flags():
            continue
        try:
            library = ctypes.CDLL(str(built[level]))
            version = library.hanmo_abi()
        except (OSError, AttributeError) as error:
            reason = f"{built[level].name} does not load ({error})"
            continue
        if version == ABI:
            return library, level
        reason = f"{built[level].name} was built from other sources; install Hanmo again"
    return None, reason


def library() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    return load()[0]


def usable(*tensors: Tensor | None) -> bool:
    """Whether the native kernels can compute with these tensors: float32, on the CPU, where the library is loaded.

    Tensors of other classes (parts of a sharded one, those of a traced network) are left to torch.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(type(tensor) in (Tensor, nn.Parameter) for tensor in given)
        and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in given)
        and load()[0] is not None
        and not torch.compiler.is_compiling()
    )


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Address of a contiguous tensor's values, for a call; null for None."""
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
