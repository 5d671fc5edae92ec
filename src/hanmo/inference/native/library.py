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

ABI = 4
LEVELS = {
    "avx512": native.LEVELS["avx512"],
    "avxvnni": native.LEVELS["avx2"] | {"avx_vnni"},
    "avx2": native.LEVELS["avx2"],
    "neon": native.LEVELS["neon"],
    "plain": set[str](),
}
COMPLAINTS = (  # by number, as in src/api.cpp
    ("", ""),
    ("the sizes or numbers of the network are impossible", "网络的尺寸或参数不可能"),
    ("there is no weight of that name", "没有这个名称的权重"),
    ("a weight has another size than the network's shape asks for", "权重的尺寸与网络形状不符"),
    ("there is not enough memory", "内存不足"),
    ("weights are missing", "缺少权重"),
    ("a count is impossible", "数量不可能"),
    ("a token is outside the vocabulary", "词元编号超出词表"),
    ("a position is outside the context", "位置超出上下文"),
    ("a page is outside the cache", "页号超出缓存"),
    ("the tokens of a text are not in the order of their positions", "文本的词元没有按位置排列"),
    ("an address is missing", "缺少地址"),
    ("a weight is infinite or not a number", "权重中有无穷大或非数值"),
    ("an address is not aligned to the numbers it holds", "地址未按数值大小对齐"),
    ("a page that is written belongs to two places", "被写入的页属于两处"),
    ("there is no adapter of that number", "没有这个编号的适配器"),
    ("a token belongs to a segment that the network does not have", "词元所属的段在网络中不存在"),
    ("the file of the weights was cut off while it was in use", "权重文件在使用中被截短"),
)
OUT_OF_MEMORY, LOST = 4, 17


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
            COMPLAINTS[code][0],
            where="native engine",
            fix="a shorter context, fewer texts at a time, or a smaller model",
            zh="内存不足，请缩短上下文、减少同时处理的文本，或换用更小的模型",
        )
    if code == LOST:
        raise ModelError(
            COMPLAINTS[code][0],
            where="native engine",
            why="it is read where it lies on the disk, and somebody wrote over it",
            fix="copy the model again and load it anew; to replace a model, move the new one into its place",
            zh="权重文件在使用中被截短（它直接从磁盘读取）。请重新复制并加载模型；更新模型时，请把新文件整体移动到原位置",
        )
    if code:
        what, zh = COMPLAINTS[code]
        raise ModelError(what, where=f"native engine ({name})", zh=zh)


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
