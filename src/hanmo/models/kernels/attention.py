"""Attention: queries look keys up and take a mean of the values, weighted by the softmax of the scores.

On the CPU in float32 a native kernel computes it (``src/attention.cpp``); everywhere else torch does
(``torch_attention.py``). Both take the layout that the projections give, ``[batch, position, head, head size]``.

Letters in names: B rows, T queries, S keys, H heads, K key/value heads, N head size.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.models.kernels import native
from hanmo.models.kernels.torch_attention import by_torch

UNLIMITED = 1 << 40  # positions that a query without a window sees
LARGEST_HEAD = 256  # that the native kernel's blocks are made for


def attention(
    q_BTHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    segments_BT: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The mean of the values that each query sees, weighted by the softmax of its scores, ``[B, T, H, N]``.

    Args:
        q_BTHN: queries; H query heads share K key/value heads in groups of H / K neighbours.
        k_BSKN: keys.
        v_BSKN: values.
        causal: query t sees keys s <= t only; then T must equal S.
        scale: factor of the scores, by default 1/sqrt(N).
        window: causal: of the keys up to itself a query sees the last ``window``; else those at most so far away.
        segments_BT: int, number of the text that each position belongs to, where rows hold several (and padding): a
            query sees only its run of equal numbers, and work is done only there. T must equal S.
        mask: what each query sees where the three before cannot say it: bool, or an additive bias, ``[B or 1, H or 1, T
            or 1, S]``. They are left out then.
        softcap: scores are squeezed into (-softcap, softcap) by tanh.
        dropout: probability of leaving a weight out (for training).

    Raises:
        ModelError: the shapes do not fit together.

    >>> x = torch.ones(1, 3, 2, 8)
    >>> attention(x, x, x, causal=True).shape
    torch.Size([1, 3, 2, 8])
    """
    check(q_BTHN, k_BSKN, v_BSKN, causal=causal, window=window, segments_BT=segments_BT)
    assert mask is None or not (causal or window is not None or segments_BT is not None)
    scale = q_BTHN.size(3) ** -0.5 if scale is None else scale
    if mask is None and softcap is None and dropout == 0 and native_shapes(q_BTHN, k_BSKN, v_BSKN, segments_BT):
        before, after = sight(causal, window)
        segments_BT = None if segments_BT is None else segments_BT.to(torch.int64).contiguous()
        if torch.is_grad_enabled() and (q_BTHN.requires_grad or k_BSKN.requires_grad or v_BSKN.requires_grad):
            y_BTHN: Tensor = NativeAttention.apply(q_BTHN, k_BSKN, v_BSKN, segments_BT, scale, before, after)  # type: ignore[no-untyped-call]
            return y_BTHN
        return forward(q_BTHN, k_BSKN, v_BSKN, segments_BT, scale, before, after, differentiable=False)[0]
    how: dict[str, Any] = {"causal": causal, "window": window, "segments_BT": segments_BT, "mask": mask}
    return by_torch(q_BTHN, k_BSKN, v_BSKN, **how, scale=scale, softcap=softcap, dropout=dropout)


def native_shapes(q_BTHN: Tensor, k_BSKN: Tensor, v_BSKN: Tensor, segments_BT: Tensor | None) -> bool:
    """Whether the native kernel can compute with these."""
    N = q_BTHN.size(3)
    return (
        native.usable(q_BTHN, k_BSKN, v_BSKN)
        and N % 8 == 0
        and N <= LARGEST_HEAD
        and q_BTHN.numel() > 0
        and k_BSKN.numel() > 0
        and (segments_BT is None or segments_BT.device.type == "cpu")
    )


def check(
    q_BTHN: Tensor, k_BSKN: Tensor, v_BSKN: Tensor, *, causal: bool, window: int | None, segments_BT: Tensor | None
) -> None:
    """Raise ModelError where the arguments of :func:`attention` do not fit together."""
    q, k, v = tuple(q_BTHN.shape), tuple(k_BSKN.shape), tuple(v_BSKN.shape)
    if len(q) != 4 or len(k) != 4 or k != v or q[0] != k[0] or q[3] != k[3] or k[2] == 0 or q[2] % k[2]:
        raise ModelError(
            f"attention cannot be computed for queries {q}, keys {k} and values {v}",
            why="they must be [batch, position, head, head size], with as many query heads as key heads or a multiple",
            zh=f"查询 {q}、键 {k}、值 {v} 的形状不匹配，无法计算注意力",
        )
    if (causal or segments_BT is not None) and q[1] != k[1]:
        raise ModelError(
            f"causal or segmented attention of {q[1]} queries to {k[1]} keys",
            why="both must be the same positions",
            zh=f"因果或分段注意力要求查询与键的位置数相同，而此处为 {q[1]} 与 {k[1]}",
        )
    if window is not None and window < causal:
        raise ModelError(
            f"an attention window of {window} positions shows a query nothing",
            fix="set sliding_window to 1 or more, or leave it out",
            zh=f"注意力窗口 {window} 无效；请设为 1 或更大，或去掉该设置",
        )
    if segments_BT is not None and tuple(segments_BT.shape) != q[:2]:
        raise ModelError(
            f"segments are {tuple(segments_BT.shape)}, but the queries are {q[0]} rows of {q[1]} positions",
            zh=f"分段编号的形状为 {tuple(segments_BT.shape)}，而查询为 {q[0]} 行、每行 {q[1]} 个位置",
        )


class Rows(ctypes.Structure):
    """A tensor ``[B, T, heads, N]`` whose last two dimensions are contiguous; strides are in floats."""

    _fields_ = (("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("position", ctypes.c_int64))


class Problem(ctypes.Structure):
    """The arguments of a native call, as ``src/attention_blocks.h`` declares them."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "T", "S", "H", "K", "N", "before", "after")),
        ("segments", ctypes.c_void_p),
        *((name, Rows) for name in ("q", "k", "v", "grad")),
        ("scale", ctypes.c_float),
    )


def sight(causal: bool, window: int | None) -> tuple[int, int]:
    """How many positions before and after its own a query sees."""
    if window is None:
        return UNLIMITED, 0 if causal else UNLIMITED
    return (window - 1, 0) if causal else (window, window)


def aligned(x_BTHN: Tensor) -> Tensor:
    """The tensor itself where the native kernel can read it, else a contiguous copy."""
    _, _, H, N = x_BTHN.shape
    _, _, head, place = x_BTHN.stride()
    return x_BTHN if place == 1 and (head == N or H == 1) else x_BTHN.contiguous()


def rows(x_BTHN: Tensor) -> Rows:
    """Where an aligned tensor lies."""
    return Rows(x_BTHN.data_ptr(), x_BTHN.stride(0), x_BTHN.stride(1))


def describe(
    q_BTHN: Tensor, k_BSKN: Tensor, v_BSKN: Tensor, segments_BT: Tensor | None, scale: float, before: int, after: int
) -> Problem:
    """The arguments of a native call but for the gradient of its result."""
    B, T, H, N = q_BTHN.shape
    return Problem(
        *(B, T, k_BSKN.size(1), H, k_BSKN.size(2), N, before, after),
        None if segments_BT is None else segments_BT.data_ptr(),
        *(rows(x) for x in (q_BTHN, k_BSKN, v_BSKN)),
        Rows(),
        scale,
    )


def forward(
    q_BTHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    segments_BT: Tensor | None,
    scale: float,
    before: int,
    after: int,
    *,
    differentiable: bool,
) -> tuple[Tensor, Tensor | None]:
    """The result, ``[B, T, H, N]``, and for the way back log2 of the sum of each query's powers, ``[B, H, T]``."""
    B, T, H, N = q_BTHN.shape
    q_BTHN, k_BSKN, v_BSKN = aligned(q_BTHN), aligned(k_BSKN), aligned(v_BSKN)  # held here while the kernel reads
    y_BTHN = q_BTHN.new_empty(B, T, H, N)
    normalizer_BHT = q_BTHN.new_empty(B, H, T) if differentiable else None
    problem = describe(q_BTHN, k_BSKN, v_BSKN, segments_BT, scale, before, after)
    native.call("attention_forward", "ppp", ctypes.byref(problem), y_BTHN, normalizer_BHT)
    return y_BTHN, normalizer_BHT


class NativeAttention(torch.autograd.Function):
    """The native kernel with its gradients; the weights are not kept but computed again on the way back."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHN: Tensor, k_BSKN: Tensor, v_BSKN: Tensor, segments_BT: Tensor | None, *how: Any
    ) -> Tensor:
        y_BTHN, normalizer_BHT = forward(q_BTHN, k_BSKN, v_BSKN, segments_BT, *how, differentiable=True)
        ctx.save_for_backward(q_BTHN, k_BSKN, v_BSKN, segments_BT, y_BTHN, normalizer_BHT)
        ctx.how = how
        return y_BTHN

    @staticmethod
    @native.first_derivative
    def backward(ctx: Any, grad_BTHN: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHN, k_BSKN, v_BSKN, segments_BT, y_BTHN, normalizer_BHT = ctx.saved_tensors
        q_BTHN, k_BSKN, v_BSKN, grad_BTHN = map(aligned, (q_BTHN, k_BSKN, v_BSKN, grad_BTHN))
        problem = describe(q_BTHN, k_BSKN, v_BSKN, segments_BT, *ctx.how)
        problem.grad = rows(grad_BTHN)
        gradients = tuple(
            x.new_empty(x.shape) if wanted else None
            for x, wanted in zip((q_BTHN, k_BSKN, v_BSKN), ctx.needs_input_grad, strict=False)
        )
        native.call("attention_backward", "p" * 6, ctypes.byref(problem), y_BTHN, normalizer_BHT, *gradients)
        return *gradients, *(None,) * (1 + len(ctx.how))
