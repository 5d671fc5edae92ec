"""Positions and masks of the transformer: rotary angles and their rescalings, sinusoids, T5's buckets, masks.

Letters in names: B rows, T new positions, S all positions, H heads, N head size, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
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


def sinusoids(positions_BT: Tensor, size: int) -> Tensor:
    """Fixed position vectors ``[B, T, D]``: sines in the first half, cosines in the second (Vaswani et al. 2017)."""
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=positions_BT.device) / size
    angles_BTP = positions_BT.unsqueeze(-1).double() / 10_000.0**exponents
    return torch.cat((angles_BTP.sin(), angles_BTP.cos()[..., : size // 2]), dim=-1).float()


def key_distances(T: int, S: int, device: torch.device, start: int, places_BT: Tensor | None = None) -> Tensor:
    """How far each of S keys stands behind (negative: before) each of T queries, int64 ``[B or 1, T, S]``.

    Args:
        start: the key at which the first query stands.
        places_BT: the key at which each query stands, where rows differ.
    """
    if places_BT is None:
        places_BT = torch.arange(start, start + T, device=device).unsqueeze(0)
    return torch.arange(S, device=device) - places_BT.unsqueeze(-1)


def relative_buckets(distance: Tensor, config: TransformerConfig) -> Tensor:
    """T5's bucket of each distance between a query and a key, int64 of the same shape (Raffel et al. 2020).

    Half of the buckets hold one distance each, the others grow logarithmically up to ``relative_distance``.
    """
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


def runs(segments_BT: Tensor) -> Tensor:
    """Number of the run of equal segments that each position belongs to, int64 ``[B, T]``, from 0.

    >>> runs(torch.tensor([[1, 1, 2, 0, 0, 2]])).tolist()
    [[0, 0, 1, 2, 2, 3]]
    """
    return F.pad((segments_BT[:, 1:] != segments_BT[:, :-1]).long().cumsum(1), (1, 0))


def attention_mask(
    T: int,
    S: int,
    device: torch.device,
    *,
    causal: bool,
    start: int = 0,
    places_BT: Tensor | None = None,
    window: int | None = None,
    mask_BS: Tensor | None = None,
    segments_BT: Tensor | None = None,
) -> Tensor:
    """Which keys each position sees, bool ``[B or 1, T, S]``.

    Args:
        start, places_BT: where the queries stand, see :func:`key_distances`.
        window: causal: of the keys up to itself a query sees the last ``window``; else those at most so far away.
        mask_BS: False where a row is padded. Padding sees itself, so that its (unused) softmax stays finite.
        segments_BT: each query sees only its run of equal numbers.

    >>> attention_mask(3, 3, torch.device("cpu"), causal=True, segments_BT=torch.tensor([[1, 1, 2]])).int().tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    distance_BTS = key_distances(T, S, device, start, places_BT)
    seen = distance_BTS <= 0 if causal else torch.ones(1, T, S, dtype=torch.bool, device=device)
    if window is not None:
        seen = seen & (distance_BTS > -window if causal else distance_BTS.abs() <= window)
    if segments_BT is not None:
        runs_BT = runs(segments_BT)
        seen = seen & (runs_BT.unsqueeze(2) == runs_BT.unsqueeze(1))
    return seen if mask_BS is None else (seen & mask_BS.unsqueeze(1)) | (distance_BTS == 0)


@dataclass(frozen=True)
class View:
    """What the positions of a call see in the full or the sliding layers of a stack.

    Args:
        rotary: the cosines and sines of their positions.
        mask, window, segments_BT: see :func:`hanmo.models.kernels.attention.attention`.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    window: int | None = None
    segments_BT: Tensor | None = None
