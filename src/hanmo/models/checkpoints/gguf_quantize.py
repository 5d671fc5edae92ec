"""Weights to the bytes of GGUF's quantised types.

F16, Q8_0, Q4_0 and Q5_0 are packed by the ``gguf`` package, whose bytes are those of llama.cpp. It has no quantisers
for the types with super-blocks; those are here. Both cut a row into blocks of 256 values and these into groups, and
store for each group a small integer that scales the codes of its values (Q4_K also an integer that is subtracted), and
for each block one half-precision factor of all its scales:

====  =====================  =================================================  ===============
type  groups of a block      a value is                                         bits per value
====  =====================  =================================================  ===============
Q4_K  8 of 32 values         ``d * scale * code - dmin * minimum``, code 0..15  4.5
Q6_K  16 of 16 values        ``d * scale * code``, code -32..31                 6.5625
====  =====================  =================================================  ===============

The codes of a group are found by trying step sizes around the one that spans its range: for each, the codes are
rounded, the best scale (and offset) for these codes follows from weighted least squares, and the step with the
smallest weighted error wins. Large values weigh more, since they decide most of what a matrix does. Groups are columns
of a ``[values, groups]`` matrix, so that every step is one vector operation over all groups of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST_HALF = 65504.0  # the largest half-precision number: weights and factors of blocks are stored so
SUPER_BLOCK = 256
CHUNK_VALUES = 1 << 17  # values handled at a time: what a processor keeps in its cache, temporaries included
TINY = 1e-30
NEAR = sorted((0.1 * index for index in range(-10, 11)), key=abs)  # so that among equals the plain choice wins
Q4_K_STEPS = tuple(15 + delta for delta in NEAR)  # how many steps of the code span the range of a group
Q6_K_STEPS = tuple(32 + delta for delta in NEAR)

Bytes = NDArray[np.uint8]


def quantize(values: Tensor, kind: str) -> Bytes:
    """Pack a matrix as one of GGUF's types.

    Args:
        values: ``[rows, columns]``, float32, finite and within plus and minus 65504; the columns must be a multiple of
            the type's block.
        kind: F32, F16, Q8_0, Q5_0, Q4_0, Q4_K or Q6_K.

    Returns:
        ``[rows, bytes]``.

    >>> quantize(torch.zeros(2, 256), "Q4_K").shape
    (2, 144)
    """
    if kind in SUPER_BLOCKS:
        rows = values.size(0)
        blocks, step = values.float().reshape(-1, SUPER_BLOCK), CHUNK_VALUES // SUPER_BLOCK
        chunks = [SUPER_BLOCKS[kind](blocks[start : start + step]) for start in range(0, len(blocks), step)]
        return torch.cat(chunks).reshape(rows, -1).numpy()
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize as pack

    packed: Bytes = pack(values.float().numpy(), GGMLQuantizationType[kind]).view(np.uint8)
    return packed


# Q4_K ----------------------------------------------------------------------------------------------------------------


def quantize_q4_k(blocks: Tensor) -> Tensor:
    """Blocks ``[n, 256]`` as Q4_K, uint8 ``[n, 144]``: d, dmin, 12 bytes of scales and minima, 128 of codes."""
    n = blocks.size(0)
    x = blocks.reshape(n * 8, 32).T.contiguous()  # one group per column
    weights = x.abs() + x.square().mean(0).sqrt()
    scale, minimum = fit_with_minimum(x, weights)
    d = (scale.view(n, 8).amax(1) / 63).half()
    dmin = (minimum.view(n, 8).amax(1) / 63).half()
    scales = to_levels(scale.view(n, 8), d, 63)
    minima = to_levels(minimum.view(n, 8), dmin, 63)
    step = (d.float()[:, None] * scales).view(-1)
    offset = (dmin.float()[:, None] * minima).view(-1)
    codes = ((x + offset) / torch.where(step > 0, step, 1.0)).round_().clamp_(0, 15)
    codes = torch.where(step > 0, codes, 0.0).to(torch.uint8).T.reshape(n, 4, 2, 32)
    factors = torch.stack([d, dmin], 1).view(torch.uint8)
    pairs = codes[:, :, 0] | codes[:, :, 1] << 4  # two groups share 32 bytes
    return torch.cat([factors, pack_six_bits(scales.to(torch.uint8), minima.to(torch.uint8)), pairs.flatten(1)], 1)


def fit_with_minimum(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The best ``scale`` and ``minimum`` of each column for ``x = scale * code - minimum``, code 0..15; both >= 0."""
    low = x.amin(0).clamp_max(0.0)
    span = x.amax(0) - low
    unit = (x - low) / span.clamp_min(TINY)
    total = weights.sum(0).clamp_min(TINY)
    mean = (weights * x).sum(0) / total
    centred = weights * (x - mean)
    variance = (centred * (x - mean)).sum(0)
    square = variance + total * mean.square()
    best = torch.full_like(span, torch.inf)
    scale, minimum = span / 15, -low
    for steps in Q4_K_STEPS:
        codes = (unit * steps).round_().clamp_(0, 15)
        weighted = weights * codes
        s1, s2, sx = weighted.sum(0), weighted.mul_(codes).sum(0), codes.mul_(centred).sum(0)
        spread = (s2 - s1.square() / total).clamp_min(TINY)
        slope = sx / spread
        intercept = mean - slope * s1 / total
        error = variance - slope * sx
        # A minimum cannot be negative: where the line would begin above zero it is drawn through zero instead.
        product = sx + mean * s1
        through_zero = product / s2.clamp_min(TINY)
        above = intercept > 0
        slope = torch.where(above, through_zero, slope)
        error = torch.where(above, square - through_zero * product, error)
        better = (error < best) & (slope > 0)
        best = torch.where(better, error, best)
        scale = torch.where(better, slope, scale)
        minimum = torch.where(better, -intercept.clamp_max(0.0), minimum)
    return scale, minimum


def to_levels(values: Tensor, factor: Tensor, levels: int) -> Tensor:
    """``values [n, groups]`` as whole numbers of a half-precision ``factor [n]``; 0 where the factor is 0."""
    factor = factor.float()[:, None]
    return torch.where(factor != 0, values / torch.where(factor != 0, factor, 1.0), 0.0).round_().clamp_(0, levels)


def pack_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits, uint8 ``[n, 8]`` each, in 12 bytes.

    The first four of each have a byte of their own; of the last four, the low four bits share a byte and the high two
    fill up the bytes of the first.
    """
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | minima[:, 4:] << 4
    return torch.cat([first, second, third], 1)


# Q6_K ----------------------------------------------------------------------------------------------------------------


def quantize_q6_k(blocks: Tensor) -> Tensor:
    """Blocks ``[n, 256]`` as Q6_K, uint8 ``[n, 210]``: 128 bytes of low bits, 64 of high bits, 16 scales, d."""
    n = blocks.size(0)
    x = blocks.reshape(n * 16, 16).T.contiguous()
    scale = fit_symmetric(x).view(n, 16)
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True)).squeeze(1)
    d = (largest / -128).half()  # the largest scale becomes -128, so that all of int8 is used
    factor = d.float()[:, None]
    scales = torch.where(factor != 0, scale / torch.where(factor != 0, factor, 1.0), 0.0).round_().clamp_(-128, 127)
    step = (factor * scales).view(-1)
    codes = (x / torch.where(step != 0, step, 1.0)).round_().clamp_(-32, 31)
    codes = torch.where(step != 0, codes, 0.0).add_(32).to(torch.uint8).T.reshape(n, 2, 4, 32)
    low = codes[:, :, :2] & 15 | codes[:, :, 2:] << 4  # quarters 0 and 2 share 32 bytes, and so do 1 and 3
    high = codes >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat(
        [low.flatten(1), high.flatten(1), scales.to(torch.int8).view(torch.uint8), d[:, None].view(torch.uint8)], 1
    )


def fit_symmetric(x: Tensor) -> Tensor:
    """The best ``scale`` of each column for ``x = scale * code``, code -32..31; its sign follows the largest value."""
    weights = x.square()
    product = weights * x
    largest = x.gather(0, x.abs().argmax(0, keepdim=True)).squeeze(0)
    safe = torch.where(largest.abs() > TINY, largest, 1.0)
    unit = x / safe
    best = torch.full_like(largest, -1.0)
    scale = torch.zeros_like(largest)
    for steps in Q6_K_STEPS:
        codes = (unit * -steps).round_().clamp_(-32, 31)
        sx = (product * codes).sum(0)
        s2 = codes.square_().mul_(weights).sum(0)
        gain = torch.where(s2 > 0, sx.square() / s2.clamp_min(TINY), 0.0)
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, sx / s2.clamp_min(TINY), scale)
    return torch.where(largest.abs() > TINY, scale, 0.0)


SUPER_BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {"Q4_K": quantize_q4_k, "Q6_K": quantize_q6_k}
