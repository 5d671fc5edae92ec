"""The engine's library: found, and called with its complaints turned into errors."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import ModelError, ResourceError
from hanmo.models.kernels import native

ABI = 2
LEVELS = {
    "avx512": native.LEVELS["avx512"],
    "avxvnni": native.LEVELS["avx2"] | {"avx_vnni"},
    "avx2": native.LEVELS["avx2"],
    "neon": native.LEVELS["neon"],
    "plain": set[str](),
}
COMPLAINTS = (  # by number, as in src/api.cpp
    "",
    "the sizes of the network are impossible",
    "there is no weight of that name",
    "a weight has another size than the network's shape asks for",
    "there is not enough memory",
    "weights are missing",
    "a count is impossible",
    "a token is outside the vocabulary",
    "a position is outside the context",
    "a page is outside the cache",
    "the tokens of a text are not in the order of their positions",
    "an address is missing",
    "a token belongs to a segment that the network does not have",
)
OUT_OF_MEMORY = 4


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library and the name of its instruction set; or None and the reason why there is none."""
    return native.open_best(Path(__file__).parent, LEVELS, ABI)


def call(name: str, *arguments: Any) -> None:
    """Call ``hanmo_<name>``: whole numbers are passed as 64 bits, arrays and tensors by address.

    Raises:
        ModelError: the library refuses; nothing was computed.
        ResourceError: there is not enough memory.
    """
    library, reason = load()
    if library is None:
        raise ResourceError(f"the native engine is not there: {reason}", zh=f"没有本地推理引擎：{reason}")
    code = getattr(library, f"hanmo_{name}")(*(converted(value) for value in arguments))
    if code == OUT_OF_MEMORY:
        raise ResourceError(
            COMPLAINTS[code], where="native engine", fix="a shorter context, fewer texts at a time, or a smaller model"
        )
    if code:
        raise ModelError(COMPLAINTS[code], where=f"native engine ({name})")


def converted(value: Any) -> Any:
    """An argument as ctypes wants it."""
    if isinstance(value, bool | int):
        return ctypes.c_int64(int(value))
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(address(value)) if value is None or isinstance(value, Tensor | np.ndarray) else value


def address(values: Tensor | NDArray[Any] | None) -> int | None:
    """Where the values of an array lie; None where there are none."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        assert values.is_contiguous()
        return values.data_ptr() if values.numel() else None
    assert values.flags.c_contiguous
    return int(values.ctypes.data) if values.size else None
