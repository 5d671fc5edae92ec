"""What a decoder remembers between two calls: keys and values of what it has read, and the states of an encoder.

Letters in names: B rows, T new positions, S all positions, K key/value heads, N head size, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hanmo.errors import ModelError

if TYPE_CHECKING:
    from hanmo.models.transformer import TransformerConfig


class KVCache:
    """Keys and values of every layer for positions already processed, preallocated: ``[B, K, max_length, N]``.

    Args:
        config: the model's shape.
        batch_size: number of rows that decode together.
        max_length: positions to make room for.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.reach_B1: Tensor | None = None  # positions that rows will come to at least, where LongRoPE must know
        self.source: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys and values of an encoder's states
        self.max_length = max_length
        self.length = 0

    def append(self, layer: int, keys_BTKN: Tensor, values_BTKN: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of one layer and return all of its keys and values, ``[B, S, K, N]``."""
        stop = self.length + keys_BTKN.size(1)
        if stop > self.max_length:
            raise ModelError(
                f"the cache holds {self.max_length} positions, {stop} were needed",
                zh=f"缓存只能容纳 {self.max_length} 个位置，需要 {stop} 个",
            )
        self.keys[layer, :, :, self.length : stop] = keys_BTKN.transpose(1, 2)
        self.values[layer, :, :, self.length : stop] = values_BTKN.transpose(1, 2)
        keys_BSKN, values_BSKN = (part[layer, :, :, :stop].transpose(1, 2) for part in (self.keys, self.values))
        return keys_BSKN, values_BSKN

    def select(self, rows: Tensor) -> None:
        """Keep only (or repeat) the given batch rows, an index tensor."""
        keys, values = self.keys[:, rows, :, : self.length], self.values[:, rows, :, : self.length]
        shape = (self.keys.size(0), len(rows), *self.keys.shape[2:])
        self.keys, self.values = self.keys.new_zeros(shape), self.values.new_zeros(shape)
        self.keys[..., : self.length, :], self.values[..., : self.length, :] = keys, values
        self.reach_B1 = None if self.reach_B1 is None else self.reach_B1[rows]
        self.source = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.source.items()}


@dataclass
class Memory:
    """What a decoder attends to: the encoder's states ``[B, S, D]`` and, where rows are padded, a mask ``[B, S]``."""

    states_BSD: Tensor
    mask_BS: Tensor | None = None

    def select(self, rows: Tensor) -> Memory:
        """Only (or repeatedly) the given rows."""
        return Memory(self.states_BSD[rows], None if self.mask_BS is None else self.mask_BS[rows])
