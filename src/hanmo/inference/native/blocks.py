"""The blocks of GGUF's types as matrices of the native engine.

What becomes of each type ("exact": every weight is the number that llama.cpp computes with, but for the rounding of its
own arithmetic):

- Q4_0, Q4_1, Q8_0: the same integers and scales; exact.
- Q5_0, IQ4_NL: the integers fit into 8 bits; exact. So does Q3_K, whose integers are multiplied by the scales of their
  groups; only the product 128 becomes 127.
- Q4_K, IQ4_XS: the same integers; the scale of a group is a product in llama.cpp (of 11 and 6 bits), rounded to half
  precision here.
- Q2_K, Q5_1, Q5_K, Q6_K: to the nearest in 8 bits. Their groups have 16 weights or a minimum beside 5 bits, which no
  kind of ours has; the step of 8 bits is several times finer than theirs.
- F16, F32: as they are; BF16 becomes half precision, or 32 bits where a weight is beyond its range.

Letters in names: N outputs, G groups of 32 inputs, S super-blocks of 256, B bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hanmo.inference.native.layout import GROUP, Matrix, Quantized
from hanmo.inference.native.quantize import quantize_int8

CHUNK = 1 << 19  # bytes that are read at a time: what is made of them stays in the cache of the processor
NIBBLES = 0x0F0F0F0F0F0F0F0F
LARGEST_HALF = 65504.0
IQ4_LEVELS = np.array(  # ggml's kvalues_iq4nl, as offset bytes
    [128 + level for level in (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)], np.uint8
)


def from_rows(kind: str, rows: range, size: int, read: Callable[[range], Tensor]) -> Matrix:
    """A matrix of GGUF, a part at a time, so that it is in memory only in the form that comes out.

    Args:
        kind: the name of its type in :mod:`hanmo.models.checkpoints.gguf_header`.
        rows: which of its tensor's.
        size: bytes of a row.
        read: gives rows as bytes, uint8 ``[rows, size]``.
    """
    if kind in FLOATS:
        return FLOATS[kind](read(rows))
    block, convert = READERS[kind]
    step = max(1, CHUNK // size)
    pieces = [rows[start : start + step] for start in range(0, len(rows), step)]
    first = convert(read(pieces[0]).view(len(pieces[0]), -1, block))
    if len(pieces) == 1:
        return first
    whole = first.joined([first], lambda tensors: tensors[0].new_empty(len(rows), *tensors[0].shape[1:]))
    start = 0
    for piece in pieces:
        part = convert(read(piece).view(len(piece), -1, block)) if start else first
        for tensor, values in zip(whole.tensors, part.tensors, strict=True):
            tensor[start : start + len(piece)] = values
        start += len(piece)
    return whole


def halves(raw: Tensor) -> Tensor:
    """Two bytes each as float16."""
    return raw.contiguous().view(torch.float16).squeeze(-1)


def floats32(raw_NB: Tensor) -> Tensor:
    """F32."""
    return raw_NB.view(torch.float32)


def floats16(raw_NB: Tensor) -> Tensor:
    """F16."""
    return raw_NB.view(torch.float16)


def brain_floats(raw_NB: Tensor) -> Tensor:
    """BF16. (Half precision has more digits; only weights below 6e-5, its smallest normal number, lose some.)"""
    values = raw_NB.view(torch.bfloat16)
    fits = bool(values.abs().amax() <= LARGEST_HALF)  # also false where one is no number
    return values.half() if fits else values.float()


def low_and_high(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high 4 bits of bytes ``[..., B]``, eight bytes at a time."""
    words = raw.contiguous().view(torch.int64)
    return (words & NIBBLES).view(torch.uint8), (words >> 4 & NIBBLES).view(torch.uint8)


def nibbles(raw: Tensor) -> Tensor:
    """``[..., 16]`` bytes as ``[..., 32]`` numbers of 4 bits: all low halves, then all high ones."""
    return torch.cat(low_and_high(raw), dim=-1)


def bits(raw: Tensor, count: int) -> Tensor:
    """Bytes as numbers of ``count`` bits, the lowest first, in a new dimension at the end."""
    shifts = torch.arange(0, 8, count, dtype=torch.uint8)
    return (raw.unsqueeze(-1) >> shifts) & ((1 << count) - 1)


# Blocks of 32 -------------------------------------------------------------------------------------------------------


def q8_0(raw_NGB: Tensor) -> Quantized:
    """Scale, 32 signed bytes."""
    return Quantized("int8", raw_NGB[..., 2:] ^ 128, halves(raw_NGB[..., :2]))  # signed to offset bytes


def q4_0(raw_NGB: Tensor) -> Quantized:
    """Scale, 32 integers of 4 bits."""
    return Quantized("int4", nibbles(raw_NGB[..., 2:]), halves(raw_NGB[..., :2]))


def q4_1(raw_NGB: Tensor) -> Quantized:
    """Scale, minimum, 32 integers of 4 bits."""
    integers = nibbles(raw_NGB[..., 4:])
    return Quantized("int4-minimum", integers, halves(raw_NGB[..., :2]), halves(raw_NGB[..., 2:4]))


def five_bits(raw_NGB: Tensor) -> Tensor:
    """Integers ``[N, G, 32]`` of 5 bits: 4 bytes with the highest bit of each, 16 with the other four."""
    return nibbles(raw_NGB[..., 4:]) | bits(raw_NGB[..., :4], 1).flatten(-2) << 4


def q5_0(raw_NGB: Tensor) -> Quantized:
    """Scale, 32 integers of 5 bits from -16 on."""
    return Quantized("int8", five_bits(raw_NGB[..., 2:]) + (128 - 16), halves(raw_NGB[..., :2]))


def q5_1(raw_NGB: Tensor) -> Quantized:
    """Scale, minimum, 32 integers of 5 bits."""
    scales, minima = halves(raw_NGB[..., :2]).float(), halves(raw_NGB[..., 2:4]).float()
    return nearest(five_bits(raw_NGB[..., 4:]), scales, minima)


def iq4_levels(integers: Tensor) -> Tensor:
    """Offset bytes of IQ4's 16 levels."""
    return torch.from_numpy(np.take(IQ4_LEVELS, integers.numpy()))


def iq4_nl(raw_NGB: Tensor) -> Quantized:
    """Scale, 32 numbers of 16 uneven levels."""
    return Quantized("int8", iq4_levels(nibbles(raw_NGB[..., 2:])), halves(raw_NGB[..., :2]))


# Super-blocks of 256 ------------------------------------------------------------------------------------------------


def sixes(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima, 6 bits each, in 12 bytes of a super-block."""
    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=-1)
    minima = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=-1)
    return scales, minima


def scales_and_minima(raw_NSB: Tensor) -> tuple[Tensor, Tensor]:
    """Of the groups of Q4_K and Q5_K, float32 ``[N, G]``: 6-bit multiples of the super-block's."""
    d, least = halves(raw_NSB[..., 0:2]).float(), halves(raw_NSB[..., 2:4]).float()
    scales, minima = sixes(raw_NSB[..., 4:16])
    return (d.unsqueeze(-1) * scales).flatten(1), (-least.unsqueeze(-1) * minima).flatten(1)


def pairs(raw_NSB: Tensor) -> Tensor:
    """Integers ``[N, G, 32]`` of 4 bits: 32 bytes hold two groups, the first in their low halves."""
    N, S, _ = raw_NSB.shape
    return torch.stack(low_and_high(raw_NSB.reshape(N, S, 4, GROUP)), dim=3).view(N, S * 8, GROUP)


def q4_k(raw_NSB: Tensor) -> Quantized:
    """Scale, minimum, 12 bytes of scales and minima, 128 of integers."""
    scales, minima = scales_and_minima(raw_NSB)
    return Quantized("int4-minimum", pairs(raw_NSB[..., 16:]), scales.half(), minima.half())


def q5_k(raw_NSB: Tensor) -> Quantized:
    """As Q4_K, with 32 bytes of highest bits: bit g of byte i is that of weight i of group g."""
    N, S, _ = raw_NSB.shape
    scales, minima = scales_and_minima(raw_NSB)
    highest = bits(raw_NSB[..., 16:48], 1).transpose(-1, -2).reshape(N, S * 8, GROUP)
    return nearest(pairs(raw_NSB[..., 48:]) | highest << 4, scales, minima)


def q6_k(raw_NSB: Tensor) -> Quantized:
    """128 bytes of low halves, 64 of two higher bits, 16 signed scales of 16 weights, the scale of all."""
    N, S, _ = raw_NSB.shape
    low = bits(raw_NSB[..., :128].view(N, S, 2, 64), 4)  # in each half of 128 weights: the first 64, the last 64
    high = bits(raw_NSB[..., 128:192].view(N, S, 2, 32), 2)  # the four quarters
    integers = low.transpose(-1, -2).reshape(N, S, 256) | high.transpose(-1, -2).reshape(N, S, 256) << 4
    scales = raw_NSB[..., 192:208].view(torch.int8) * halves(raw_NSB[..., 208:210]).float().unsqueeze(-1)
    return nearest(integers.view(N, S * 16, 16), scales.flatten(1), -32 * scales.flatten(1))


def q2_k(raw_NSB: Tensor) -> Quantized:
    """16 bytes of a scale and a minimum for 16 weights each, 64 of integers of 2 bits, scale and minimum of all."""
    N, S, _ = raw_NSB.shape
    quarters = bits(raw_NSB[..., 16:80].view(N, S, 2, 32), 2)
    integers = quarters.transpose(-1, -2).reshape(N, S * 16, 16)
    d, least = halves(raw_NSB[..., 80:82]).float(), halves(raw_NSB[..., 82:84]).float()
    scales, minima = d.unsqueeze(-1) * (raw_NSB[..., :16] & 15), -least.unsqueeze(-1) * (raw_NSB[..., :16] >> 4)
    return nearest(integers, scales.flatten(1), minima.flatten(1))


def q3_k(raw_NSB: Tensor) -> Quantized:
    """32 bytes of highest bits, 64 of two lower ones, 12 of scales of 16 weights (6 bits, from -32 on), the scale of
    all. A weight is that scale times the product of two small integers, which fits into 8 bits."""
    N, S, _ = raw_NSB.shape
    lower = bits(raw_NSB[..., 32:96].view(N, S, 2, 32), 2).transpose(-1, -2).reshape(N, S, 16, 16)
    highest = bits(raw_NSB[..., :32], 1).transpose(-1, -2).reshape(N, S, 16, 16)
    packed = raw_NSB[..., 96:108]
    low = bits(packed[..., :8], 4).transpose(-1, -2).flatten(-2)
    scales = low | bits(packed[..., 8:], 2).transpose(-1, -2).flatten(-2) << 4
    integers = (lower | highest << 2).short() - 4
    products = (integers * (scales.short() - 32).unsqueeze(-1)).clamp_max_(127)
    d = halves(raw_NSB[..., 108:110])
    return Quantized(
        "int8",
        (products + 128).to(torch.uint8).view(N, S * 8, GROUP),
        d.unsqueeze(-1).expand(N, S, 8).reshape(N, S * 8),
    )


def iq4_xs(raw_NSB: Tensor) -> Quantized:
    """Scale, 2 bytes of the two higher and 4 of the four lower bits of 8 scales (from -32 on), 128 of integers."""
    N, S, _ = raw_NSB.shape
    scales = bits(raw_NSB[..., 4:8], 4).flatten(-2) | bits(raw_NSB[..., 2:4], 2).flatten(-2) << 4
    products = halves(raw_NSB[..., :2]).float().unsqueeze(-1) * (scales.float() - 32)
    integers = nibbles(raw_NSB[..., 8:].reshape(N, S * 8, 16))
    return Quantized("int8", iq4_levels(integers), products.half().flatten(1))


def nearest(integers_NGI: Tensor, scales_NG: Tensor, minima_NG: Tensor) -> Quantized:
    """The 8-bit matrix nearest to ``scale * integer + minimum``, in groups of any size.

    Args:
        integers_NGI: ``[N, groups, size]``.
        scales_NG, minima_NG: float32 ``[N, groups]``.
    """
    weights = torch.addcmul(minima_NG.unsqueeze(-1), integers_NGI.float(), scales_NG.unsqueeze(-1))
    return quantize_int8(weights.flatten(1))


FLOATS: dict[str, Callable[[Tensor], Tensor]] = {"F32": floats32, "F16": floats16, "BF16": brain_floats}
READERS: dict[str, tuple[int, Callable[[Tensor], Quantized]]] = {  # bytes of a block, and what reads it
    "Q4_0": (18, q4_0),
    "Q4_1": (20, q4_1),
    "Q5_0": (22, q5_0),
    "Q5_1": (24, q5_1),
    "Q8_0": (34, q8_0),
    "IQ4_NL": (18, iq4_nl),
    "Q2_K": (84, q2_k),
    "Q3_K": (110, q3_k),
    "Q4_K": (144, q4_k),
    "Q5_K": (176, q5_k),
    "Q6_K": (210, q6_k),
    "IQ4_XS": (136, iq4_xs),
}
