"""Attention where rows hold several texts, none of which sees another.

Letters in names: B rows, T positions, H query heads, K key/value heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FLEX_BLOCK = 128  # positions of one tile of FlexAttention; shorter rows have no tile to skip


def segment_mask(segments_BT: Tensor, *, causal: bool, window: int | None) -> Tensor:
    """Which position sees which, bool ``[B, 1, T, T]``: those of its own text, up to itself, within the window.

    >>> segment_mask(torch.tensor([[1, 1, 2]]), causal=True, window=None).int().tolist()
    [[[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]]
    """
    seen_BTT = segments_BT.unsqueeze(2) == segments_BT.unsqueeze(1)
    places_T = torch.arange(segments_BT.size(1), device=segments_BT.device)
    back_TT = places_T.unsqueeze(1) - places_T.unsqueeze(0)
    if causal:
        seen_BTT = seen_BTT & (back_TT >= 0)
    if window is not None:
        seen_BTT = seen_BTT & (back_TT < window if causal else back_TT.abs() <= window)
    return seen_BTT.unsqueeze(1)


def flex_pays(device: torch.device, length: int, dropout: float) -> bool:
    """Whether FlexAttention (Dong et al. 2024) is the better way: on GPUs, with more than a few tiles, no dropout."""
    return device.type == "cuda" and length >= 4 * FLEX_BLOCK and dropout == 0


def packed_attention(
    q_BHTN: Tensor,
    k_BKTN: Tensor,
    v_BKTN: Tensor,
    segments_BT: Tensor,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    flex: bool | None = None,
) -> Tensor:
    """Attention within each text of packed or padded rows, ``[B, H, T, N]``.

    FlexAttention skips the tiles between different texts; elsewhere a mask of all pairs does the same.

    Args:
        segments_BT: number of the text of each position; those of padding see each other.
        causal: only earlier positions are seen.
        window: keys that a position sees up to itself, or on each side where not causal; None: all.
        scale: of the scores; None: 1/sqrt(N).
        flex: whether to use FlexAttention; None: as :func:`flex_pays` says.
    """
    if flex is None:
        flex = flex_pays(q_BHTN.device, q_BHTN.size(2), dropout)
    grouped = q_BHTN.size(1) != k_BKTN.size(1)
    if not flex:
        mask = segment_mask(segments_BT, causal=causal, window=window)
        return F.scaled_dot_product_attention(
            q_BHTN, k_BKTN, v_BKTN, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )
    tiles = tile_plan(segments_BT, causal, window)
    result: Tensor = flex_function(q_BHTN.device)(
        q_BHTN, k_BKTN, v_BKTN, block_mask=tiles, scale=scale, enable_gqa=grouped
    )
    return result


@dataclass
class Plans:
    """FlexAttention's plans of the tiles to compute, of the latest batch only, whose layers share them."""

    segments: Tensor | None = None
    made: dict[tuple[bool, int | None], Any] = field(default_factory=dict)


plans = Plans()


def tile_plan(segments_BT: Tensor, causal: bool, window: int | None) -> Any:
    """The plan for a batch, made once for all layers of a kind."""
    from torch.nn.attention.flex_attention import create_block_mask

    if plans.segments is not segments_BT:
        plans.segments, plans.made = segments_BT, {}
    if (causal, window) not in plans.made:

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
            back = query - key
            inside = segments_BT[row, query] == segments_BT[row, key]
            if causal:
                inside = inside & (back >= 0)
            if window is not None:
                inside = inside & (back < window if causal else back.abs() <= window)
            return inside

        B, T = segments_BT.shape
        plans.made[causal, window] = create_block_mask(seen, B, None, T, T, device=segments_BT.device)
    return plans.made[causal, window]


compiled: dict[str, Callable[..., Tensor]] = {}


def flex_function(device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention, compiled on GPUs (uncompiled it computes all pairs)."""
    from torch.nn.attention.flex_attention import flex_attention

    if device.type != "cuda":
        return flex_attention
    if device.type not in compiled:
        compiled[device.type] = torch.compile(flex_attention, dynamic=False)
    return compiled[device.type]
