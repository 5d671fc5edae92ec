"""The native library: found, checked, and called through ctypes.

The package's build makes one library per instruction set (see ``setup.py``), where there is a compiler. Here the best
one that this machine runs is loaded; where there is none, every kernel computes with torch. ``HANMO_NATIVE`` is 0 for
none at all, or the name of an instruction set for one that is not the best.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hanmo.errors import ModelError

ABI = 2
LEVELS = {  # library: what the processor must have, by its names in /proc/cpuinfo; the best first
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd", "avx512_vnni"},
    "avx2": {"avx2", "fma", "bmi2", "f16c"},
    "neon": {"asimddp"},
}
ARGUMENTS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int32, "f": ctypes.c_float}


@functools.cache
def processor_flags() -> frozenset[str]:
    """Names of the processor's instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    fields = (line.partition(":") for line in lines)
    return frozenset(next((value.split() for name, _, value in fields if name.strip() in ("flags", "Features")), ()))


def open_best(folder: Path, levels: Mapping[str, Set[str]], abi: int) -> tuple[ctypes.CDLL | None, str]:
    """The best library of a folder that this machine runs.

    Args:
        levels: by the name of a library what the processor must have; the best first.
        abi: what ``hanmo_abi`` of the library must return.

    Returns:
        the library and the name of its instruction set; or None and the reason why there is none.
    """
    wanted = os.environ.get("HANMO_NATIVE", "").strip().lower()
    if wanted == "0":
        return None, "switched off by HANMO_NATIVE=0"
    built = {path.name.split(".")[0].removeprefix("_"): path for path in folder.glob("_*.so")}
    if not built:
        return None, "it was not built; install a C++ compiler and install Hanmo again"
    reason = f"none of the libraries ({', '.join(sorted(built))}) runs on this processor ({platform.machine()})"
    for level, needed in levels.items():
        if level not in built or not needed <= processor_flags() or wanted not in ("", level):
            continue
        try:
            library = ctypes.CDLL(str(built[level]))
            version = library.hanmo_abi()
        except (OSError, AttributeError) as error:
            reason = f"{built[level].name} does not load ({error})"
            continue
        if version == abi:
            return library, level
        reason = f"{built[level].name} was built from other sources; install Hanmo again"
    return None, reason


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library and the name of its instruction set; or None and the reason why there is none."""
    return open_best(Path(__file__).parent, LEVELS, ABI)


def library() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    return load()[0]


@functools.cache
def kernel(name: str, arguments: str, result: str = "") -> Callable[..., Any]:
    """A function of the library, ``hanmo_<name>``; its arguments and its result by the letters of ``ARGUMENTS``:
    p(ointer), l(ong), i(nteger), f(loat)."""
    function: Any = getattr(library(), f"hanmo_{name}")
    function.argtypes = [ARGUMENTS[letter] for letter in arguments]
    function.restype = ARGUMENTS[result] if result else None
    return function  # type: ignore[no-any-return]


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether these are float32 tensors on the CPU that are computed with as they stand: not while torch compiles or
    transforms a function, and no tensors of other classes (parts of a sharded one, those of a traced network)."""
    return (
        not torch.compiler.is_compiling()  # first: the compiler must not look into the rest
        and all(tensor is None or type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        and all(tensor is None or (tensor.dtype == torch.float32 and tensor.device.type == "cpu") for tensor in tensors)
        and not torch._C._are_functorch_transforms_active()
    )


def usable(*tensors: Tensor | None) -> bool:
    """Whether the native kernels can compute with these tensors; everything else is left to torch."""
    return ordinary(*tensors) and load()[0] is not None


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the backward pass of a ``torch.autograd.Function`` that cannot be differentiated itself.

    (``torch.autograd.function.once_differentiable`` takes what it gives for constants where only the inputs of the
    forward pass vary: gradients of gradients would be wrong, without a word.)
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise ModelError(
                "the network's gradients have no gradients of their own",
                why="its kernels compute first derivatives only",
                fix="leave create_graph=True out",
                zh="网络的梯度不能再求导（内核只计算一阶导数）；请去掉 create_graph=True",
            )
        return backward(ctx, *gradients)

    return checked


def call(name: str, letters: str, *arguments: Any, result: str = "") -> Any:
    """Call ``hanmo_<name>`` with arguments of these letters; see :func:`kernel`. For p(ointer) a contiguous tensor, an
    address or None; tensors live as long as the call."""
    assert all(value.is_contiguous() for value in arguments if isinstance(value, Tensor))
    values = (value.data_ptr() if isinstance(value, Tensor) else value for value in arguments)
    return kernel(name, letters, result)(*values)
