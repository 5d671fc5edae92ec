"""What a decoder remembers between two calls: keys and values of what it has read, and the states of an encoder.

Letters in names: B rows, T new positions, S all positions, K key/value heads, N head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        self.places_BT: Tensor | None = None  # where the new positions stand, if not all rows stand at ``length``
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


class CachePool:
    """Keys and values of texts that come and go, each in a slot of its own from column 0 on:
    ``[layers, slots, K, columns, N]``.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, 0, config.num_kv_heads, 0, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.taken: set[int] = set()

    def take(self, columns: int) -> int:
        """A free slot of at least so many columns; the pool grows where it must."""
        if not self.taken:  # nothing to keep: as much as is needed, and not what some long text needed once
            self.resize(1, columns)
        slots, width = self.keys.size(1), self.keys.size(3)
        slot = next((slot for slot in range(slots) if slot not in self.taken), slots)
        if slot == slots or columns > width:
            self.resize(max(slots, 2 * slot if slot == slots else slots), max(columns, width))
        self.taken.add(slot)
        return slot

    def resize(self, slots: int, columns: int) -> None:
        """Change the size, keeping what is there as far as it fits."""
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            layers, _, heads, _, size = old.shape
            new = old.new_zeros((layers, slots, heads, columns, size))
            if self.taken:
                new[:, : old.size(1), :, : old.size(3)] = old
            setattr(self, name, new)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one slot to another."""
        for part in (self.keys, self.values):
            part[:, target, :, :length] = part[:, source, :, :length]

    def view(self, slots: Sequence[int], starts: Sequence[int], count: int) -> PoolView:
        """What the network sees when it reads ``count`` new positions of some texts, each from its own start on."""
        return PoolView(self, slots, starts, count)


class PoolView(KVCache):
    """Some slots of a pool as the cache of one call."""

    def __init__(self, pool: CachePool, slots: Sequence[int], starts: Sequence[int], count: int) -> None:
        device = pool.keys.device
        self.pool, self.length, self.reach_B1, self.source = pool, max(starts), None, {}
        self.max_length = pool.keys.size(3)
        self.places_BT = None
        if min(starts) != max(starts):
            self.places_BT = torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(count, device=device)
        following = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        self.rows: slice | Tensor = slice(slots[0], slots[0] + len(slots))  # a view, where slots lie side by side
        if not following:
            self.rows = torch.tensor(slots, device=device)
        self.slots_B1 = torch.tensor(slots, device=device).unsqueeze(1)

    def append(self, layer: int, keys_BTKN: Tensor, values_BTKN: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`KVCache.append`, each row at its own place."""
        stop = self.length + keys_BTKN.size(1)
        found = []
        for part, new_BTKN in ((self.pool.keys[layer], keys_BTKN), (self.pool.values[layer], values_BTKN)):
            if self.places_BT is not None:
                part[self.slots_B1, :, self.places_BT] = new_BTKN
            elif isinstance(self.rows, slice):
                part[self.rows, :, self.length : stop] = new_BTKN.transpose(1, 2)
            else:
                part[:, :, self.length : stop].index_copy_(0, self.rows, new_BTKN.transpose(1, 2))
            found.append(part[self.rows, :, :stop].transpose(1, 2))
        return found[0], found[1]


class StaticView(PoolView):
    """The same for one new position of each text, where slots and places are tensors whose contents change while
    nothing else does: what a CUDA graph needs. Every query looks at all columns through its mask."""

    def __init__(self, pool: CachePool, slots_B: Tensor, places_B: Tensor) -> None:
        self.pool, self.reach_B1, self.source = pool, None, {}
        self.max_length = pool.keys.size(3)
        self.length = self.max_length - 1  # so that the new position is the last column, for those who count
        self.rows, self.slots_B1, self.places_BT = slots_B, slots_B.unsqueeze(1), places_B.unsqueeze(1)


@dataclass
class Memory:
    """What a decoder attends to: the encoder's states ``[B, S, D]`` and, where rows are padded, a mask ``[B, S]``."""

    states_BSD: Tensor
    mask_BS: Tensor | None = None
