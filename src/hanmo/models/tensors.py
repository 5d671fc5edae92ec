"""Tensors given by a file, compared with those a network has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hanmo.errors import ModelError


def check_shapes(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse names and shapes that are not those of a network.

    Raises:
        ModelError: a tensor is missing, unexpected, or of the wrong shape; the message names it.
    """
    missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing:
        raise ModelError(
            f"{len(missing)} tensors are missing, the first is '{missing[0]}' {expected[missing[0]]}",
            zh=f"缺少 {len(missing)} 个张量，第一个是 '{missing[0]}' {expected[missing[0]]}",
        )
    if extra:
        raise ModelError(
            f"{len(extra)} tensors do not belong to this architecture, the first is '{extra[0]}'",
            zh=f"有 {len(extra)} 个张量不属于该结构，第一个是 '{extra[0]}'",
        )
    for name, shape in given.items():
        if tuple(shape) != expected[name]:
            raise ModelError(
                f"the tensor '{name}' has shape {tuple(shape)}, expected {expected[name]}",
                zh=f"张量 '{name}' 的形状是 {tuple(shape)}，应为 {expected[name]}",
            )


def check_tensors(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of a network.

    Raises:
        ModelError: one is missing, unexpected, of the wrong shape, or holds NaN; the message names it.
    """
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in given.items()})
    for name, tensor in given.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(
                f"the tensor '{name}' is stored as {kind}, which is not a weight type",
                fix="export the model in float32, float16 or bfloat16",
                zh=f"张量 '{name}' 的类型 {kind} 不是权重类型",
            )
        if not tensor.sum().isfinite() and not tensor.isfinite().all():  # the sum is cheap but may overflow
            raise ModelError(f"the tensor '{name}' holds NaN or infinite values", zh=f"张量 '{name}' 含有 NaN 或无穷大")
