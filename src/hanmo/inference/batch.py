"""Rows that are decoded together over one key/value cache.

Rows are padded on the left, so that all of them write their next key and value into the same column of the cache. The
padding is masked and each row's positions are counted from its own first token, so a row sees exactly what it would see
alone. (Matrix products of different heights round differently in the last bits; nothing else tells a batch from single
rows.) Long prompts enter the cache in pieces, and rows that have finished leave it.

Letters in names: B rows, T new tokens, S columns (tokens so far, padding included), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hanmo.models.cache import KVCache, Memory
from hanmo.models.transformer import Transformer

PREFILL_TOKENS = 2048  # prompt tokens that pass the network at once: bounds the memory of activations and masks


def pad_left(prompts: Sequence[Sequence[int]], room: int, padding: int, device: torch.device) -> Tensor:
    """The histories of some rows, int64 ``[B, S]``: padded on the left, with ``room`` columns to be written."""
    longest = max(len(ids) for ids in prompts)
    history = [[padding] * (longest - len(ids)) + list(ids) + [0] * room for ids in prompts]
    return torch.tensor(history, dtype=torch.int64, device=device)


class Batch:
    """Token histories and cache of some rows.

    Args:
        model: the network.
        prompts: the ids of each row, none empty.
        room: tokens that will be appended at most.
        memory: what the encoder of an encoder-decoder made of each row's source.

    Attributes:
        history_BS: int64 ids of every column; padding is ``vocab_size``, an id that no token has.
    """

    def __init__(
        self, model: Transformer, prompts: Sequence[Sequence[int]], room: int, *, memory: Memory | None = None
    ) -> None:
        weight = model.output_weight
        longest = max(len(ids) for ids in prompts)
        columns = longest + room
        self.model, self.memory = model, memory
        self.prompt_columns = longest
        scaling = model.config.rope_scaling or {}
        self.switch: int | None = None  # positions after which LongRoPE takes its other factors
        if "long_factor" in scaling:
            self.switch = scaling["original_max_position_embeddings"]
        self.cache = KVCache(model.config, len(prompts), columns, weight.dtype, weight.device)
        self.history_BS = pad_left(prompts, room, model.config.vocab_size, weight.device)
        self._place([longest - len(ids) for ids in prompts])

    def _place(self, padding: list[int]) -> None:
        """Work out positions and mask from the number of padded columns of each row."""
        self.padding = padding
        column_S = torch.arange(self.history_BS.size(1), device=self.history_BS.device)
        offset_B1 = torch.tensor(padding, device=self.history_BS.device).unsqueeze(1)
        self.positions_BS = (column_S - offset_B1).clamp(min=0)
        self.visible_BS = column_S >= offset_B1 if any(padding) else None

    @property
    def tokens_BS(self) -> Tensor:
        """The ids of all columns filled so far."""
        return self.history_BS[:, : self.cache.length]

    def prefill(self) -> Tensor:
        """Read the prompts and return the logits of each row's first new token, float32 ``[B, V]``."""
        if self.switch:
            counts = [[self.prompt_columns - padding] for padding in self.padding]
            self.cache.reach_B1 = torch.tensor(counts, device=self.history_BS.device)
        piece = max(1, PREFILL_TOKENS // len(self.padding))
        for start in range(0, self.prompt_columns, piece):
            logits_BV = self._forward(start, min(start + piece, self.prompt_columns))
        return logits_BV

    def step(self, ids: Sequence[int]) -> Tensor:
        """Append one token to every row and return the logits of the next, float32 ``[B, V]``."""
        column = self.cache.length
        self.history_BS[:, column] = torch.tensor(ids, device=self.history_BS.device)
        if self.switch and self.switch + 1 in (column + 1 - padding for padding in self.padding):
            self.cache.length = 0  # all was rotated by the other factors: it is read again
            self.prompt_columns = column + 1
            return self.prefill()
        return self._forward(column, column + 1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows; a row named more than once is repeated."""
        order = torch.tensor(rows, device=self.history_BS.device)
        self.cache.select(order)
        self.memory = None if self.memory is None else self.memory.select(order)
        self.history_BS = self.history_BS[order]
        self._place([self.padding[row] for row in rows])

    def _forward(self, start: int, stop: int) -> Tensor:
        """Pass the columns ``start..stop-1`` through the network: logits after the last of them, ``[B, V]``."""
        ids_BT = self.history_BS[:, start:stop]
        mask_BS = None
        if self.visible_BS is not None:
            ids_BT = ids_BT.masked_fill(
                ~self.visible_BS[:, start:stop], 0
            )  # padding needs some embedding; it is masked
            mask_BS = self.visible_BS[:, :stop]
        positions_BT = self.positions_BS[:, start:stop]
        logits_B1V: Tensor = self.model(
            ids_BT,
            cache=self.cache,
            positions_BT=positions_BT,
            mask_BS=mask_BS,
            memory=self.memory,
            last_only=True,
        )
        return logits_B1V[:, 0]
