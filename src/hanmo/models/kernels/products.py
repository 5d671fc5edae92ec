"""Matrix products in float32, and the linear layer of the networks.

On processors of AMD, torch's own products (MKL) reach less than half of what the machine can do; oneDNN, which torch
carries as well, reaches nearly all of it, except where the sum runs over the rows of both operands (the gradient of a
weight): for that one there is a native kernel (``src/transpose.cpp``). Which way is taken depends only on the machine,
the shapes and the strides, never on a timing, so that a resumed training computes the same bits. On Intel's processors
MKL is at the peak, and on everything else torch knows best: there all of this is plain torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanmo.errors import UsageError
from hanmo.models.kernels import native

PRECISIONS = ("fp32", "int8")
SMALLEST_PRODUCT = 1 << 22  # multiplications; below, torch's own call costs less than choosing another
FEWEST_ROWS = 8  # below (generating a token), reading the weight takes the time and torch does that as fast


@functools.cache
def onednn_is_best() -> bool:
    """Whether this machine's float32 products go through oneDNN: x86 with AVX-512, not Intel's, and the call works."""
    if "avx512f" not in native.processor_flags() or not torch._C._has_mkldnn:
        return False
    try:
        if "GenuineIntel" in Path("/proc/cpuinfo").read_text():
            return False
        a = torch.arange(12.0).view(3, 4)
        return torch.equal(_onednn(a, a[:2], a[0, :2].contiguous()), a @ a[:2].T + a[0, :2])
    except (OSError, AttributeError, RuntimeError):
        return False


def _onednn(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")
    return product


def _rows(x_MK: Tensor) -> bool:
    """Whether the values of a row are adjacent in memory, and rows do not overlap."""
    return x_MK.stride(1) == 1 and x_MK.stride(0) >= x_MK.shape[1]


def _regular(x_MK: Tensor) -> Tensor:
    """The same values, with adjacent values in the rows or in the columns."""
    return x_MK if _rows(x_MK) or _rows(x_MK.t()) else x_MK.contiguous()


def matmul(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of two matrices, [M, N], without a gradient. ``out`` receives it where given.

    The operands may be transposed or cut out of larger ones: none is copied that has adjacent values in its rows or
    in its columns. Raises what torch raises where the shapes do not fit.
    """
    with torch.no_grad():
        if a_MK.dim() != 2 or b_KN.dim() != 2 or a_MK.shape[1] != b_KN.shape[0]:
            return torch.mm(a_MK, b_KN)  # torch says what does not fit
        (rows, inner), columns = a_MK.shape, b_KN.shape[1]
        small = rows * inner * columns < SMALLEST_PRODUCT or min(rows, columns) < FEWEST_ROWS
        if small or not native.ordinary(a_MK, b_KN) or not onednn_is_best():
            return torch.mm(a_MK, b_KN, out=out) if out is not None else torch.mm(a_MK, b_KN)
        a_MK, b_KN = _regular(a_MK), _regular(b_KN)
        if _rows(a_MK.t()) and not _rows(a_MK) and _rows(b_KN) and native.load()[1] == "avx512":
            return _transposed(a_MK.t(), b_KN, out)
        product = _onednn(a_MK, b_KN.t())
        return product if out is None else out.copy_(product)


def _transposed(a_MN: Tensor, b_MK: Tensor, out: Tensor | None) -> Tensor:
    """a.T @ b, [N, K], by the native kernel; both have adjacent values in their rows."""
    (depth, rows), columns = a_MN.shape, b_MK.shape[1]
    own = out is not None and out.is_contiguous() and out.shape == (rows, columns) and native.usable(out)
    result = out if out is not None and own else torch.empty(rows, columns)
    sizes = (depth, rows, columns, a_MN.stride(0), b_MK.stride(0))
    native.call("transposed_product", "ppplllll", a_MN.data_ptr(), b_MK.data_ptr(), result, *sizes)
    return result if out is None or own else out.copy_(result)


def applies(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> bool:
    """Whether a linear layer's product is worth a call of its own: float32 on the CPU, not small (that is looked at
    first: it must cost nothing when a token is generated), and not being compiled or cast by torch itself."""
    if x.numel() * len(weight_NK) < SMALLEST_PRODUCT or x.numel() < FEWEST_ROWS * x.shape[-1]:
        return False
    return (
        x.shape[-1] == weight_NK.shape[1]
        and min(weight_NK.shape) >= FEWEST_ROWS
        and native.ordinary(x, weight_NK, bias_N)
        and not torch.is_autocast_enabled("cpu")
    )


def flat(x: Tensor) -> Tensor:
    """The rows of x, [M, K], copied only where its values lie irregularly."""
    return _regular(x.reshape(-1, x.shape[-1]))


class Products(NamedTuple):
    """How a linear layer computes: x @ weight.T + bias, g @ weight and g.T @ x, for rows of x and of the gradient g."""

    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    to_input: Callable[[Tensor, Tensor], Tensor]
    to_weight: Callable[[Tensor, Tensor], Tensor]


class LinearFunction(torch.autograd.Function):
    """A linear layer by some :class:`Products`, whose gradients have none of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, products: Products) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if wants_weight else None, weight_NK if wants_x else None)
        ctx.products = products
        return products.forward(flat(x), weight_NK, bias_N).view(*x.shape[:-1], weight_NK.shape[0])

    @staticmethod
    @native.first_derivative
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_NK = ctx.saved_tensors
        g_MN, d_x = flat(gradient), None
        if weight_NK is not None:
            d_x = ctx.products.to_input(g_MN, weight_NK).view(*gradient.shape[:-1], weight_NK.shape[1])
        d_weight = None if x is None else ctx.products.to_weight(g_MN, flat(x))
        return d_x, d_weight, g_MN.sum(0) if ctx.needs_input_grad[2] else None, None


FLOAT32 = Products(
    lambda x_MK, weight_NK, bias_N: _onednn(x_MK, _regular(weight_NK), bias_N),
    matmul,
    lambda g_MN, x_MK: matmul(g_MN.t(), x_MK),
)


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x [..., K]: `torch.nn.functional.linear`, faster where this machine allows.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4)).shape
    torch.Size([2, 4])
    """
    if not applies(x, weight_NK, bias_N) or not onednn_is_best():
        return F.linear(x, weight_NK, bias_N)
    return LinearFunction.apply(x, weight_NK, bias_N, FLOAT32)  # type: ignore[no-untyped-call, no-any-return]


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by :func:`linear`; its parameters and state dict are the same.

    ``precision`` "int8" (see :mod:`hanmo.models.kernels.int8`) holds while it trains on a CPU; everything else,
    evaluation included, is float32.
    """

    precision: str = "fp32"

    def forward(self, input: Tensor) -> Tensor:
        if self.precision == "int8" and self.training:
            from hanmo.models.kernels.int8 import int8_linear  # it needs this module

            return int8_linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def set_precision(module: nn.Module, precision: str) -> int:
    """Sets the precision of every :class:`Linear` inside a module; returns how many there are.

    Raises:
        UsageError: for a precision that is none of ``PRECISIONS``.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"there is no precision {precision!r} for matrix products",
            why="a linear layer computes in float32, or in training with 8-bit integers",
            fix=f"choose one of {', '.join(PRECISIONS)}",
            zh=f"矩阵乘法没有 {precision!r} 这种精度；请从 {'、'.join(PRECISIONS)} 中选择",
        )
    found = [part for part in module.modules() if isinstance(part, Linear)]
    for part in found:
        part.precision = precision
    return len(found)
