"""The blocks of GGUF's quantised types, taken over as they are: no weight is rounded again.

Letters in names: N outputs, G groups of 32 inputs, S super-blocks of 256, B bytes of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hanmo.inference.native.layout import GROUP, Quantized


def halves(raw: Tensor) -> Tensor:
    """Two bytes each as float16."""
    return raw.contiguous().view(torch.float16).squeeze(-1)


def from_gguf(kind: str, raw_NGB: Tensor) -> Quantized:
    """The blocks of GGUF's "Q4_0", "Q4_1" or "Q8_0", uint8 ``[N, G, bytes]``, without any loss."""
    scales = halves(raw_NGB[..., :2])
    if kind == "Q8_0":
        return Quantized("int8", raw_NGB[..., 2:] ^ 128, scales)  # signed to offset bytes
    start = 4 if kind == "Q4_1" else 2
    both = raw_NGB[..., start:]
    integers = torch.cat([both & 15, both >> 4], dim=-1)
    return (
        Quantized("int4-minimum", integers, scales, halves(raw_NGB[..., 2:4]))
        if kind == "Q4_1"
        else Quantized("int4", integers, scales)
    )


def from_q4_k(raw_NSB: Tensor) -> Quantized:
    """The super-blocks of GGUF's "Q4_K", uint8 ``[N, S, 144]``: 256 weights in 8 groups, whose scales and minima are
    6-bit multiples of the super-block's. The products are rounded to half precision."""
    N, S, _ = raw_NSB.shape
    d, least = halves(raw_NSB[..., 0:2]).float(), halves(raw_NSB[..., 2:4]).float()
    packed = raw_NSB[..., 4:16]
    low, middle, high = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scale = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=-1).float()
    minimum = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=-1).float()
    both = raw_NSB[..., 16:].view(N, S, 4, GROUP)  # 32 bytes hold two groups
    integers = torch.stack([both & 15, both >> 4], dim=3).reshape(N, S * 8, GROUP)
    scales = (d.unsqueeze(-1) * scale).half().flatten(1)
    minima = (-least.unsqueeze(-1) * minimum).half().flatten(1)
    return Quantized("int4-minimum", integers, scales, minima)
