"""Linear layers that train with products of 8-bit integers (SwitchBack: Wortsman et al., 2023, "Stable and
low-precision training for large-scale vision-language models", https://arxiv.org/abs/2304.13013).

Weights, activations and gradients stay in float32. For a product, each row of the left operand and each column of the
right one is divided by its largest magnitude / 127 and rounded to integers; the sums are exact, and both scales
multiply the result:

- forward: rows of x, rows of the weight (one scale per output);
- gradient of x: rows of the output's gradient, columns of the weight (one scale per input);
- gradient of the weight, where the sum runs over the many rows of a batch: a scale per column for every 256 rows.

Values that are infinite or not a number make their row or column of the result not a number. The weight is quantised
anew for every product: that takes 2 % of its time at 4,096 rows, and a kept copy could be out of date.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hanmo.models.kernels import native
from hanmo.models.kernels.products import LinearFunction, Products, applies, linear, matmul

PANEL = 64  # columns of a panel in the packed format (src/int8.h)
LONGEST_SUM = 65_536  # more products of two bytes could overflow 32 bits
BLOCK_ROWS = 256  # rows that share a scale in the gradient of the weight (src/int8_gradient.cpp)
SMALLEST = 1e-30  # a row without a larger magnitude counts as zero


def reason_against() -> str | None:
    """Why int8 would not make training faster on this machine; None where it does."""
    library, level = native.load()
    if library is None:
        return f"the native kernels are missing ({level})"
    return None if level == "avx512" else f"the processor has no products of 8-bit integers at speed ({level})"


class Packed(NamedTuple):
    """A right operand [N, K], quantised and packed as ``src/int8.h`` says."""

    values: Tensor  # int8, [N padded * K padded]
    start: Tensor  # int32, [N padded]
    scales: Tensor  # float32, [N padded]
    size: tuple[int, int]  # (N, K)


def _pack(weight_NK: Tensor, *, transposed: bool) -> Packed:
    weight_NK = weight_NK.contiguous()
    rows, columns = weight_NK.shape
    size = (columns, rows) if transposed else (rows, columns)
    padded, steps = -(-size[0] // PANEL) * PANEL, -(-size[1] // 4)
    values = torch.empty(padded * steps * 4, dtype=torch.int8)
    packed = Packed(values, torch.empty(padded, dtype=torch.int32), torch.empty(padded), size)
    native.call(
        "int8_pack_columns" if transposed else "int8_pack_rows", "ppppll", weight_NK, *packed[:3], rows, columns
    )
    return packed


def pack_rows(weight_NK: Tensor) -> Packed:
    """The right operand of x @ weight.T: one scale per row of the weight."""
    return _pack(weight_NK, transposed=False)


def pack_columns(weight_NK: Tensor) -> Packed:
    """The right operand of g @ weight: one scale per column of the weight."""
    return _pack(weight_NK, transposed=True)


def product(x_MK: Tensor, packed: Packed, bias_N: Tensor | None = None) -> Tensor:
    """x @ (the packed matrix).T + bias, [M, N]; x is quantised row by row."""
    x_MK, (columns, inner) = x_MK.contiguous(), packed.size
    assert x_MK.numel() > 0 and x_MK.shape[1] == inner and (bias_N is None or bias_N.shape == (columns,))
    out_MN = torch.empty(x_MK.shape[0], columns)
    bias = None if bias_N is None else bias_N.contiguous()
    native.call("int8_product", "pppppplll", x_MK, *packed[:3], bias, out_MN, len(x_MK), columns, inner)
    return out_MN


def transposed_product(g_MN: Tensor, x_MK: Tensor) -> Tensor:
    """g.T @ x, [N, K], both quantised by columns within blocks of rows."""
    assert len(g_MN) == len(x_MK) > 0
    g_MN, x_MK = g_MN.contiguous(), x_MK.contiguous()
    sizes = (*g_MN.shape, x_MK.shape[1])
    work = torch.empty(native.call("int8_transposed_product_bytes", "lll", *sizes, result="l"), dtype=torch.uint8)
    out_NK = torch.empty(g_MN.shape[1], x_MK.shape[1])
    native.call("int8_transposed_product", "pppplll", g_MN, x_MK, out_NK, work, *sizes)
    return out_NK


def quantize(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Integers between -127 and 127 (as float32) and the scales along a dimension, as the kernels compute them."""
    largest = x.abs().amax(dim, keepdim=True)
    scale = torch.where(largest < SMALLEST, 0.0, largest / 127.0)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    factor = torch.where((largest >= SMALLEST) & largest.isfinite(), 127.0 / largest, 0.0)
    return torch.where(factor > 0, (x * factor).round(), 0.0), scale


def _product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, *, transposed: bool) -> Tensor:
    """x @ weight.T + bias, or x @ weight."""
    if native.usable(x_MK, weight_NK, bias_N):
        return product(x_MK, _pack(weight_NK, transposed=transposed), bias_N)
    x_q, x_scale = quantize(x_MK, 1)
    weight_q, weight_scale = quantize(weight_NK, 0 if transposed else 1)
    sums_MN = matmul(x_q, weight_q if transposed else weight_q.t())
    y_MN = sums_MN * weight_scale.view(1, -1) * x_scale
    return y_MN if bias_N is None else y_MN + bias_N


def _weight_gradient(g_MN: Tensor, x_MK: Tensor) -> Tensor:
    if native.usable(g_MN, x_MK):
        return transposed_product(g_MN, x_MK)
    out_NK = g_MN.new_zeros(g_MN.shape[1], x_MK.shape[1])
    for first in range(0, len(g_MN), BLOCK_ROWS):
        (g_q, g_scale), (x_q, x_scale) = (quantize(rows[first : first + BLOCK_ROWS], 0) for rows in (g_MN, x_MK))
        out_NK += matmul(g_q.t(), x_q) * x_scale * g_scale.view(-1, 1)
    return out_NK


INT8 = Products(
    lambda x_MK, weight_NK, bias_N: _product(x_MK, weight_NK, bias_N, transposed=False),
    lambda g_MN, weight_NK: _product(g_MN, weight_NK, None, transposed=True),
    _weight_gradient,
)


def int8_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x [..., K] with 8-bit integers, forwards and for both gradients. What is not float32 on
    the CPU, small (``products.SMALLEST_PRODUCT``) or longer than ``LONGEST_SUM`` is computed in float32."""
    if not applies(x, weight_NK, bias_N) or max(weight_NK.shape) > LONGEST_SUM:
        return linear(x, weight_NK, bias_N)
    return LinearFunction.apply(x, weight_NK, bias_N, INT8)  # type: ignore[no-untyped-call, no-any-return]
