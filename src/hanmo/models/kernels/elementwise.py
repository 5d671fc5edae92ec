"""What a network computes beside its products: norms, rotary positions, activations.

Each is one pass over memory in a native kernel, forwards and backwards, for float32 on the CPU; elsewhere, and for
shapes that only broadcasting explains, it is the plain expression in torch. Both give the same values up to rounding.
The native gradients have no derivatives of their own: differentiating them raises an error.

Layer norm is not here: torch's own is one fused pass already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from hanmo.models.heads import activation as plain_activation
from hanmo.models.kernels import native

ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}  # those of the native kernel, by its numbers


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether torch would record an operation on these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def rows_per_block(rows: int) -> int:
    """How many rows are summed at once in the gradient of a weight; by their number alone, never by that of threads."""
    return max(16, -(-rows // 64))


def parts_for(rows: int, weight: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Room for the sums of all blocks and for their total, if the weight's gradient is wanted."""
    if not wanted:
        return None, None
    blocks = -(-rows // rows_per_block(rows))
    return weight.new_empty(blocks, weight.numel()), torch.empty_like(weight)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` over the last dimension (Zhang and Sennrich 2019).

    Args:
        x: ``[..., D]``.
        weight: ``[D]``; None: no scale.
        offset: 1.0 where the stored weight is the difference from one (Gemma).

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), None, 0.0)
    tensor([[0.8485, 1.1314]])
    """
    if not native.usable(x, weight) or not norm_fits(x, weight):
        return plain_rms_norm(x, weight, eps, offset)
    scale = x.new_full((x.size(-1),), 1.0 - offset) if weight is None else weight
    if differentiable(x, weight):
        return Normed.apply(x, scale, eps, offset)  # type: ignore[no-untyped-call, no-any-return]
    return run_norm(x.contiguous(), scale.contiguous(), eps, offset)[0]


def plain_rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """The same in torch; with an offset in float32: near one, bfloat16 would lose most of a weight around zero."""
    size = (x.size(-1),)
    if not offset or weight is None:
        return F.rms_norm(x, size, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), size, weight.to(wide) + offset, eps).type_as(x)


def norm_fits(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernel may trust the shapes."""
    return x.dim() > 0 and x.numel() > 0 and (weight is None or weight.shape == x.shape[-1:])


def run_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The norm and, for each row, 1 / root mean square."""
    size, rows = x.size(-1), x.numel() // x.size(-1)
    out, inverse_M = torch.empty_like(x), x.new_empty(rows)
    native.call("rms_norm", "ppffllpp", x, weight, offset, eps, rows, size, out, inverse_M)
    return out, inverse_M


class Normed(Function):
    """``rms_norm``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, inverse_M = run_norm(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, inverse_M)
        ctx.offset = offset
        return out

    @staticmethod
    @native.first_derivative
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_M = ctx.saved_tensors
        rows, d_x = len(inverse_M), torch.empty_like(x)
        parts, d_weight = parts_for(rows, weight, ctx.needs_input_grad[1])
        given, sizes = (gradient.contiguous(), x, weight, ctx.offset), (rows, x.size(-1), rows_per_block(rows))
        native.call("rms_norm_backward", "pppfplllppp", *given, inverse_M, *sizes, d_x, parts, d_weight)
        return d_x, d_weight, None, None


def rotate(x_BTHN: Tensor, cos_BTN: Tensor, sin_BTN: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): turn each pair (n, n + R/2) of every head by the angle of its position.

    Args:
        x_BTHN: queries or keys.
        cos_BTN, sin_BTN: ``[B or 1, T, R]``; what the R <= N dimensions do not cover is kept. They get no gradient.
    """
    if not native.usable(x_BTHN, cos_BTN, sin_BTN) or not rotation_fits(x_BTHN, cos_BTN, sin_BTN):
        return plain_rotate(x_BTHN, cos_BTN, sin_BTN)
    if differentiable(x_BTHN):
        return Rotated.apply(x_BTHN, cos_BTN, sin_BTN)  # type: ignore[no-untyped-call, no-any-return]
    return run_rotate(x_BTHN, cos_BTN.contiguous(), sin_BTN.contiguous(), back=False)


def plain_rotate(x_BTHN: Tensor, cos_BTN: Tensor, sin_BTN: Tensor) -> Tensor:
    """The same in torch."""
    R = cos_BTN.size(-1)
    part, rest = x_BTHN[..., :R], x_BTHN[..., R:]
    left, right = part.chunk(2, dim=-1)
    turned = part * cos_BTN.unsqueeze(2) + torch.cat((-right, left), dim=-1) * sin_BTN.unsqueeze(2)
    return torch.cat((turned, rest), dim=-1) if rest.size(-1) else turned


def rotation_fits(x_BTHN: Tensor, cos_BTN: Tensor, sin_BTN: Tensor) -> bool:
    """Whether the kernel may trust the shapes, and cos and sin need no gradient."""
    if x_BTHN.dim() != 4 or cos_BTN.dim() != 3 or cos_BTN.shape != sin_BTN.shape or not x_BTHN.numel():
        return False
    (B, T, _, N), (rows, count, R) = x_BTHN.shape, cos_BTN.shape
    same = rows in (1, B) and count == T and 0 < R <= N and R % 2 == 0
    return same and not differentiable(cos_BTN, sin_BTN)


def rotation_sizes(x_BTHN: Tensor, cos_BTN: Tensor) -> tuple[int, int, int, int, int]:
    """Tokens, heads, size of a head, rotated dimensions, and after how many tokens the angles repeat."""
    B, T, H, N = x_BTHN.shape
    return B * T, H, N, cos_BTN.size(-1), cos_BTN.size(0) * T


def run_rotate(x_BTHN: Tensor, cos_BTN: Tensor, sin_BTN: Tensor, *, back: bool) -> Tensor:
    x_BTHN = x_BTHN.contiguous()
    out_BTHN = torch.empty_like(x_BTHN)
    given = (x_BTHN, cos_BTN, sin_BTN)
    native.call("rotate", "ppplllllip", *given, *rotation_sizes(x_BTHN, cos_BTN), int(back), out_BTHN)
    return out_BTHN


class Rotated(Function):
    """``rotate``."""

    @staticmethod
    def forward(ctx: Any, x_BTHN: Tensor, cos_BTN: Tensor, sin_BTN: Tensor) -> Tensor:
        cos_BTN, sin_BTN = cos_BTN.contiguous(), sin_BTN.contiguous()
        ctx.save_for_backward(cos_BTN, sin_BTN)
        return run_rotate(x_BTHN, cos_BTN, sin_BTN, back=False)

    @staticmethod
    @native.first_derivative
    def backward(ctx: Any, gradient_BTHN: Tensor) -> tuple[Tensor, None, None]:
        return run_rotate(gradient_BTHN, *ctx.saved_tensors, back=True), None, None


def norm_rotate(
    x_BTHN: Tensor, weight_N: Tensor | None, eps: float, cos_BTN: Tensor, sin_BTN: Tensor, offset: float = 0.0
) -> Tensor:
    """RMS norm of each head, then rotary positions (the QK-norm of Qwen 3 and Gemma 3), in one pass.

    Arguments as in :func:`rms_norm` and :func:`rotate`.
    """
    fits = rotation_fits(x_BTHN, cos_BTN, sin_BTN) and norm_fits(x_BTHN, weight_N)
    if not native.usable(x_BTHN, weight_N, cos_BTN, sin_BTN) or not fits:
        return plain_rotate(plain_rms_norm(x_BTHN, weight_N, eps, offset), cos_BTN, sin_BTN)
    scale_N = x_BTHN.new_full((x_BTHN.size(-1),), 1.0 - offset) if weight_N is None else weight_N
    if differentiable(x_BTHN, weight_N):
        return NormedRotated.apply(x_BTHN, scale_N, eps, cos_BTN, sin_BTN, offset)  # type: ignore[no-untyped-call, no-any-return]
    tensors = [tensor.contiguous() for tensor in (x_BTHN, scale_N, cos_BTN, sin_BTN)]
    return run_norm_rotate(tensors, eps, offset)[0]


def run_norm_rotate(given: list[Tensor], eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The result and, for each head, 1 / root mean square; given are x, weight, cos and sin, all contiguous."""
    x_BTHN, weight_N, cos_BTN, sin_BTN = given
    out_BTHN, inverse_BTH = torch.empty_like(x_BTHN), x_BTHN.new_empty(x_BTHN.shape[:3])
    sizes = rotation_sizes(x_BTHN, cos_BTN)
    native.call(
        *("norm_rotate", "ppffpplllllpp", x_BTHN, weight_N, offset, eps),
        *(cos_BTN, sin_BTN, *sizes, out_BTHN, inverse_BTH),
    )
    return out_BTHN, inverse_BTH


class NormedRotated(Function):
    """``norm_rotate``."""

    @staticmethod
    def forward(
        ctx: Any, x_BTHN: Tensor, weight_N: Tensor, eps: float, cos_BTN: Tensor, sin_BTN: Tensor, offset: float
    ) -> Tensor:
        given = [tensor.contiguous() for tensor in (x_BTHN, weight_N, cos_BTN, sin_BTN)]
        out_BTHN, inverse_BTH = run_norm_rotate(given, eps, offset)
        ctx.save_for_backward(*given, inverse_BTH)
        ctx.offset = offset
        return out_BTHN

    @staticmethod
    @native.first_derivative
    def backward(ctx: Any, gradient_BTHN: Tensor) -> tuple[Tensor | None, ...]:
        x_BTHN, weight_N, cos_BTN, sin_BTN, inverse_BTH = ctx.saved_tensors
        tokens = x_BTHN.size(0) * x_BTHN.size(1)
        d_x = torch.empty_like(x_BTHN)
        parts, d_weight = parts_for(tokens, weight_N, ctx.needs_input_grad[1])
        given = (gradient_BTHN.contiguous(), x_BTHN, weight_N, ctx.offset, inverse_BTH, cos_BTN, sin_BTN)
        sizes = (*rotation_sizes(x_BTHN, cos_BTN), rows_per_block(tokens))
        native.call("norm_rotate_backward", "pppfpppllllllppp", *given, *sizes, d_x, parts, d_weight)
        return d_x, d_weight, None, None, None, None


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of that name, one of :data:`hanmo.models.heads.ACTIVATIONS`.

    Raises:
        ModelError: none of that name.
    """
    if activation not in ACTIVATIONS or not native.usable(x):
        return plain_activation(activation)(x)
    if differentiable(x):
        return Activated.apply(x, None, ACTIVATIONS[activation])  # type: ignore[no-untyped-call, no-any-return]
    return run_activate(x.contiguous(), None, ACTIVATIONS[activation])


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up``: a gated feed-forward's middle (Shazeer 2020), of any shape.

    Raises:
        ModelError: no activation of that name.
    """
    if activation not in ACTIVATIONS or not native.usable(gate, up) or gate.shape != up.shape:
        return plain_activation(activation)(gate) * up
    if differentiable(gate, up):
        return Activated.apply(gate, up, ACTIVATIONS[activation])  # type: ignore[no-untyped-call, no-any-return]
    return run_activate(gate.contiguous(), up.contiguous(), ACTIVATIONS[activation])


def run_activate(gate: Tensor, up: Tensor | None, number: int) -> Tensor:
    out = torch.empty_like(gate)
    native.call("activate", "ipppl", number, gate, up, out, gate.numel())
    return out


class Activated(Function):
    """``activate``, or ``gated`` where there is an ``up``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, number: int) -> Tensor:
        gate, up = gate.contiguous(), None if up is None else up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.number = number
        return run_activate(gate, up, number)

    @staticmethod
    @native.first_derivative
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), None if up is None else torch.empty_like(up)
        tensors = (gradient.contiguous(), gate, up, d_gate, d_up)
        native.call("activate_backward", "ipppppl", ctx.number, *tensors, gate.numel())
        return d_gate, d_up, None
