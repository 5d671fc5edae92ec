"""From floats to 8 or 4 bits.

Letters in names: N outputs, K inputs, G groups of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hanmo.inference.native.layout import GROUP, OFFSETS, WIDE, Matrix, Quantized

CUTS = (0.0, 0.025, 0.05, 0.075, 0.1, 0.125)  # shares of a group's range
EVEN_RANGES = tuple((cut, cut) for cut in CUTS)
UNEVEN_RANGES = tuple((low, high) for cut in CUTS for low, high in dict.fromkeys([(cut, cut), (cut, 0.0), (0.0, cut)]))


def groups_of(weights_NK: Tensor) -> Tensor:
    """float32 ``[N, G, 32]``, filled up with zeros."""
    N, K = weights_NK.shape
    G = -(-K // GROUP)
    return torch.nn.functional.pad(weights_NK.float(), (0, G * GROUP - K)).view(N, G, GROUP)


def quantize_int8(weights_NK: Tensor) -> Quantized:
    """To the nearest of 255 levels; the largest magnitude of a group is 127."""
    groups = groups_of(weights_NK)
    scales = (torch.maximum(groups.amax(-1), -groups.amin(-1)) / 127).half()
    factor = torch.where(scales > 0, 1 / scales.float(), 0).unsqueeze(-1)
    integers = (groups * factor).round_().clamp_(-127, 127).add_(OFFSETS["int8"])
    return Quantized("int8", integers.to(torch.uint8), scales, inputs=weights_NK.size(1))


def quantize_int8_wide(weights_NK: Tensor) -> Quantized:
    """As :func:`quantize_int8`, with one scale for four groups: faster products, for networks that need no more."""
    groups = groups_of(weights_NK)
    N, G, _ = groups.shape
    largest_NG = torch.nn.functional.pad(torch.maximum(groups.amax(-1), -groups.amin(-1)), (0, -G % WIDE))
    scales = (largest_NG.view(N, -1, WIDE).amax(-1) / 127).half()
    factor = torch.where(scales > 0, 1 / scales.float(), 0).repeat_interleave(WIDE, 1)[:, :G].unsqueeze(-1)
    integers = (groups * factor).round_().clamp_(-127, 127).add_(OFFSETS["int8-wide"])
    return Quantized("int8-wide", integers.to(torch.uint8), scales, inputs=weights_NK.size(1))


def quantize_int4(
    weights_NK: Tensor,
    importance_K: Tensor | None = None,
    *,
    ranges: Sequence[tuple[float, float]] = EVEN_RANGES,
) -> Quantized:
    """16 levels with a minimum per group, fitted so that the squared error is least.

    Starts from several ranges (the whole one and narrower ones, which give up the outermost values) and improves each
    by turns: the nearest integers for a scale and minimum, the best scale and minimum for these integers.

    Args:
        importance_K: mean squared activation of each input, which weighs its error; None: all alike.
        ranges: to start from: the share of the whole range that is cut off below, and above. ``UNEVEN_RANGES`` gives
            about 5 % less error in nearly three times the time.
    """
    groups = groups_of(weights_NK)
    N, G, _ = groups.shape
    weight = torch.ones(1, G, GROUP) if importance_K is None else groups_of(importance_K.view(1, -1)) + 1e-8
    low, high = groups.amin(-1), groups.amax(-1)
    best = torch.full((N, G), float("inf"))
    result = [torch.zeros(N, G), torch.zeros(N, G), torch.zeros(N, G, GROUP)]
    total = weight.sum(-1)
    for below, above in ranges:
        scale, minimum = (high - low) * (1 - below - above) / 15, low + (high - low) * below
        for _ in range(2):
            q = ((groups - minimum.unsqueeze(-1)) / scale.clamp_min(1e-12).unsqueeze(-1)).round_().clamp_(0, 15)
            mean_q, mean_w = (q * weight).sum(-1) / total, (groups * weight).sum(-1) / total
            covariance = (q * groups * weight).sum(-1) / total - mean_q * mean_w
            variance = (q * q * weight).sum(-1) / total - mean_q * mean_q
            fitted = covariance / variance.clamp_min(1e-12)
            usable = (variance > 1e-9) & (fitted > 0)
            scale = torch.where(usable, fitted, scale)
            minimum = torch.where(usable, mean_w - fitted * mean_q, minimum)
        scale, minimum = scale.half().float(), minimum.half().float()
        q = ((groups - minimum.unsqueeze(-1)) / scale.clamp_min(1e-12).unsqueeze(-1)).round_().clamp_(0, 15)
        error = ((q * scale.unsqueeze(-1) + minimum.unsqueeze(-1) - groups).square() * weight).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        for old, new in zip(result, (scale, minimum), strict=False):
            old[better] = new[better]
        result[2][better] = q[better]
    return Quantized("int4-minimum", result[2].to(torch.uint8), result[0].half(), result[1].half(), weights_NK.size(1))


def alike(parts: Sequence[Matrix]) -> list[Matrix]:
    """Matrices that are to be joined, brought to one kind: the widest among them, so that none loses its precision.

    GGUF files mix kinds (queries in Q4_K beside values in Q6_K). Exact are 4 bits without a minimum in either of the
    other kinds, and everything in float32. 4 bits with a minimum are rounded to 8 bits, whose steps are about a tenth
    of theirs: that adds less than one percent to the squared error which their own rounding has made.
    """
    if any(isinstance(part, Tensor) for part in parts):
        dtypes = {part.dtype for part in parts if isinstance(part, Tensor)}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return [(part if isinstance(part, Tensor) else part.dequantize()).to(dtype) for part in parts]
    kinds = {part.kind for part in parts if isinstance(part, Quantized)}
    widest = next(kind for kind in ("int8", "int4-minimum", "int4") if kind in kinds)
    return [widened(part, widest) for part in parts if isinstance(part, Quantized)]


def widened(matrix: Quantized, kind: str) -> Quantized:
    """A matrix in the same or a wider kind, as :func:`alike` says."""
    if matrix.kind == kind:
        return matrix
    if matrix.kind == "int4" and kind == "int8":
        integers = matrix.integers_NGI + (OFFSETS["int8"] - OFFSETS["int4"])
        return Quantized("int8", integers, matrix.scales_NG, inputs=matrix.inputs)
    if matrix.kind == "int4" and kind == "int4-minimum":
        minima = -OFFSETS["int4"] * matrix.scales_NG
        return Quantized("int4-minimum", matrix.integers_NGI, matrix.scales_NG, minima, matrix.inputs)
    return quantize_int8(matrix.dequantize())
