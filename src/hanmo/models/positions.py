"""Positions and masks of the transformer: rotary angles and their rescalings, sinusoids, T5's buckets, masks.

Letters in names: B rows, T new positions, S all positions, H heads, N head size, D hidden size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hanmo.models.transformer import TransformerConfig


def rotary_frequencies(config: TransformerConfig, *, local: bool = False, long: bool = False) -> Tensor:
    """Angle per position of each rotated pair of head dimensions, float32 ``[N/2]``, rescaled as the model asks.

    Args:
        local: those of the sliding layers.
        long: LongRoPE's factors for sequences beyond the original context.
    """
    size = config.rotary_dim or config.head_dim
    theta = (config.rope_local_theta if local else None) or config.rope_theta
    frequencies: Tensor = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size)
    scaling = {} if local and config.rope_local_theta else config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "longrope":
        return frequencies / torch.tensor(scaling["long_factor" if long else "short_factor"], device="cpu")
    if kind in ("llama3", "yarn"):  # slow rotations are stretched, fast ones kept, those between are blended
        old, factor = scaling["original_max_position_embeddings"], float(scaling["factor"])
        if kind == "llama3":
            turns = old * frequencies / (2 * math.pi)
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            keep: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
        else:
            fast, slow = (scaling.get(name) or usual for name, usual in (("beta_fast", 32), ("beta_slow", 1)))
            ends = [size * math.log(old / (beta * 2 * math.pi)) / (2 * math.log(theta)) for beta in (fast, slow)]
            if scaling.get("truncate", True):
                ends = [math.floor(ends[0]), math.ceil(ends[1])]
            first, last = max(ends[0], 0), min(ends[1], size - 1)
            ramp = (torch.arange(size // 2, device="cpu") - first) / max(last - first, 0.001)
            keep = 1 - ramp.clamp(0, 1)
        return (1 - keep) * frequencies / factor + keep * frequencies
    return frequencies


def rotary_magnitude(config: TransformerConfig) -> float:
    """By what YaRN and LongRoPE multiply the rotated queries and keys."""
    scaling = config.rope_scaling or {}
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    kind, old = scaling.get("rope_type"), scaling.get("original_max_position_embeddings", 1)
    factor = float(scaling.get("factor") or config.max_position_embeddings / old)
    if factor <= 1 or kind not in ("yarn", "longrope"):
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(old))
    scales = [0.1 * (scaling.get(name) or 0) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim")]
    both = scaling.get("mscale") and scaling.get("mscale_all_dim")
    return scales[0] / scales[1] if both else 0.1 * math.log(factor) + 1


class Rotary(nn.Module):
    """Cosines and sines of rotary positions for the full or the sliding layers of a stack."""

    def __init__(self, config: TransformerConfig, *, local: bool) -> None:
        super().__init__()
        scaling = {} if local and config.rope_local_theta else config.rope_scaling or {}
        self.magnitude = rotary_magnitude(config) if scaling else 1.0
        self.original = scaling["original_max_position_embeddings"] if "long_factor" in scaling else None
        self.frequencies: Tensor
        self.long_frequencies: Tensor
        self.register_buffer("frequencies", rotary_frequencies(config, local=local), persistent=False)
        if self.original is not None:
            self.register_buffer("long_frequencies", rotary_frequencies(config, long=True), persistent=False)

    def forward(
        self, positions_BT: Tensor, dtype: torch.dtype, reach_B1: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, ``[B or 1, T, N]``; with ``reach_B1`` LongRoPE chooses by more positions than these."""
        frequencies = self.frequencies
        if self.original is not None:  # each row by itself, and without waiting for the device
            count_B1 = positions_BT.amax(1, keepdim=True) + 1
            count_B1 = count_B1 if reach_B1 is None else torch.maximum(count_B1, reach_B1)
            frequencies = torch.where((count_B1 > self.original).unsqueeze(-1), self.long_frequencies, frequencies)
        angles_BTN = (positions_BT.unsqueeze(-1).float() * frequencies).repeat(1, 1, 2)
        cos, sin = angles_BTN.cos(), angles_BTN.sin()
        if self.magnitude != 1:
            cos, sin = cos * self.magnitude, sin * self.magnitude
        return cos.to(dtype), sin.to(dtype)


def rotate(x_BTHN: Tensor, cos_BTN: Tensor, sin_BTN: Tensor) -> Tensor:
    """Rotate each pair (n, n + N/2) of every head by the angle of its position; what N does not cover is kept."""
    rotated = cos_BTN.size(-1)
    if rotated < x_BTHN.size(-1):
        part, rest = x_BTHN[..., :rotated], x_BTHN[..., rotated:]
        return torch.cat((rotate(part, cos_BTN, sin_BTN), rest), dim=-1)
    left, right = x_BTHN.chunk(2, dim=-1)
    turned = torch.cat((-right, left), dim=-1)
    return x_BTHN * cos_BTN.unsqueeze(2) + turned * sin_BTN.unsqueeze(2)


def sinusoids(positions_BT: Tensor, size: int) -> Tensor:
    """Fixed position vectors ``[B, T, D]``: sines in the first half, cosines in the second (Vaswani et al. 2017)."""
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions_BT.device) / size
    angles_BTP = positions_BT.unsqueeze(-1).double() / 10_000.0**exponents
    return torch.cat((angles_BTP.sin(), angles_BTP.cos()[..., : size // 2]), dim=-1).float()


def relative_buckets(T: int, S: int, config: TransformerConfig, device: torch.device) -> Tensor:
    """T5's bucket of the distance between each of the last T queries and S keys, int64 ``[T, S]`` (Raffel et al. 2020).

    Half of the buckets hold one distance each, the others grow logarithmically up to ``relative_distance``.
    """
    distance = torch.arange(S, device=device).unsqueeze(0) - torch.arange(S - T, S, device=device).unsqueeze(1)
    buckets, side = config.relative_buckets, torch.zeros_like(distance)
    if config.causal:
        distance = (-distance).clamp(min=0)
    else:
        buckets //= 2
        side = (distance > 0) * buckets
        distance = distance.abs()
    exact = buckets // 2
    log = torch.log(distance.clamp(min=1).float() / exact) / math.log(config.relative_distance / exact)
    far = (exact + (log * (buckets - exact)).long()).clamp(max=buckets - 1)
    return side + torch.where(distance < exact, distance, far)


def segment_positions(segments_BT: Tensor) -> Tensor:
    """Positions counted from the beginning of each run of equal numbers, int64 ``[B, T]``.

    >>> segment_positions(torch.tensor([[1, 1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 2, 0, 1, 0]]
    """
    places_T = torch.arange(segments_BT.size(1), device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return places_T - torch.where(begins_BT, places_T, 0).cummax(1).values


def attention_mask(
    T: int,
    start: int,
    mask_BS: Tensor | None,
    device: torch.device,
    *,
    causal: bool = True,
    window: int | None = None,
    explicit: bool = False,
) -> Tensor | None:
    """Which keys each new position may see, bool ``[B or 1, T, S]``; None where plain (causal) attention suffices.

    A padded position sees itself, so that its (unused) softmax stays finite.
    """
    S = start + T
    if window is not None and window >= S:
        window = None
    if mask_BS is None and window is None and not explicit and (not causal or start == 0 or T == 1):
        return None
    query = torch.arange(start, S, device=device).unsqueeze(1)
    key = torch.arange(S, device=device).unsqueeze(0)
    seen_TS = key <= query if causal else torch.ones(T, S, dtype=torch.bool, device=device)
    if window is not None:
        seen_TS = seen_TS & (key > query - window if causal else (key - query).abs() <= window)
    if mask_BS is None:
        return seen_TS.unsqueeze(0)
    return (seen_TS & mask_BS.unsqueeze(1)) | (key == query)
