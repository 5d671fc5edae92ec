"""Attention by torch, on any device and in any type: what :mod:`hanmo.models.kernels.attention` falls back to.

Rows that hold several texts are the hard case, since a mask of all pairs costs the square of the row. On GPUs
FlexAttention (Dong et al. 2024) skips the tiles between texts; on the CPU each text is computed by itself where that is
less work; else there is the mask.

Letters in names: B rows, T queries, S keys, H heads, K key/value heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.models.positions import attention_mask, runs

FLEX_BLOCK = 128  # positions of one tile of FlexAttention; shorter rows have no tile to skip
CALL_PAIRS = 1 << 12  # pairs of positions whose attention takes as long as a call of its own


def by_torch(
    q_BTHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    segments_BT: Tensor | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention, ``[B, T, H, N]``; arguments as in :func:`hanmo.models.kernels.attention.attention`."""
    given, T, S, device = (q_BTHN, k_BSKN, v_BSKN), q_BTHN.size(1), k_BSKN.size(1), q_BTHN.device
    how: dict[str, Any] = {"scale": scale, "softcap": softcap, "dropout": dropout}
    if segments_BT is not None and not torch.compiler.is_compiling():
        if flex_pays(device, T, dropout):
            return by_tiles(*given, segments_BT, causal=causal, window=window, scale=scale, softcap=softcap)
        if device.type == "cpu" and (lengths := text_lengths(segments_BT)):
            return by_texts(*given, lengths, causal=causal, window=window, **how)
    if window is not None or segments_BT is not None:
        mask = attention_mask(T, S, device, causal=causal, window=window, segments_BT=segments_BT).unsqueeze(1)
        causal = False
    return dense(*given, mask, causal=causal, **how)


def dense(
    q_BTHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention to all keys that ``mask`` or ``causal`` shows."""
    q_BHTN, k_BKSN, v_BKSN = q_BTHN.transpose(1, 2), k_BSKN.transpose(1, 2), v_BSKN.transpose(1, 2)
    groups = q_BTHN.size(2) // k_BSKN.size(2)
    if softcap is None:
        y_BHTN = F.scaled_dot_product_attention(
            *(q_BHTN, k_BKSN, v_BKSN, mask, dropout, causal), scale=scale, enable_gqa=groups > 1
        )
        return y_BHTN.transpose(1, 2)
    k_BHSN, v_BHSN = k_BKSN.repeat_interleave(groups, 1), v_BKSN.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(q_BHTN @ k_BHSN.transpose(2, 3) * scale / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = F.dropout(scores.softmax(-1, dtype=exact).to(q_BTHN.dtype), dropout)
    return (weights @ v_BHSN).transpose(1, 2)


def text_lengths(segments_BT: Tensor) -> list[list[int]]:
    """The lengths of each row's texts, where computing each by itself is less work than all pairs of the rows."""
    if segments_BT.size(1) ** 2 < 4 * CALL_PAIRS:  # too short for any division to pay
        return []
    rows = [torch.unique_consecutive(row_T, return_counts=True)[1].tolist() for row_T in segments_BT]
    work = sum(length * length + CALL_PAIRS for row in rows for length in row)
    return rows if work < segments_BT.numel() * segments_BT.size(1) else []


def by_texts(
    q_BTHN: Tensor,
    k_BTKN: Tensor,
    v_BTKN: Tensor,
    lengths: list[list[int]],
    *,
    causal: bool,
    window: int | None,
    **how: Any,
) -> Tensor:
    """Attention of each text by itself: the square of its length, not of its row's."""
    rows = []
    for row, sizes in enumerate(lengths):
        texts = zip(*(torch.split(x[row : row + 1], sizes, 1) for x in (q_BTHN, k_BTKN, v_BTKN)), strict=True)
        rows.append(torch.cat([by_torch(*text, causal=causal, window=window, **how) for text in texts], 1))
    return torch.cat(rows)


def flex_pays(device: torch.device, length: int, dropout: float) -> bool:
    """Whether FlexAttention is the better way: on GPUs, with more than a few tiles, no dropout."""
    return device.type == "cuda" and length >= 4 * FLEX_BLOCK and dropout == 0


def by_tiles(
    q_BTHN: Tensor,
    k_BTKN: Tensor,
    v_BTKN: Tensor,
    segments_BT: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention by FlexAttention."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    y_BHTN: Tensor = flex_function(q_BTHN.device)(
        *(x.transpose(1, 2) for x in (q_BTHN, k_BTKN, v_BTKN)),
        score_mod=None if softcap is None else capped,
        block_mask=tile_plan(segments_BT, causal, window),
        scale=scale,
        enable_gqa=q_BTHN.size(2) != k_BTKN.size(2),
    )
    return y_BHTN.transpose(1, 2)


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
        runs_BT = runs(segments_BT)

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
            back = query - key
            inside = runs_BT[row, query] == runs_BT[row, key]
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
