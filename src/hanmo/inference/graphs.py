"""The next token of some texts on a GPU, recorded once and replayed: one launch instead of hundreds.

A small network's step takes longer to launch, kernel by kernel, than to compute. A CUDA graph holds all launches of a
step; it reads and writes the same memory every time, so the inputs are copied into place before it is replayed. There
is one graph per number of texts (1, 2, 4 ...), filled up with texts in a slot that nobody reads.

Letters in names: B texts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hanmo.models.cache import CachePool, StaticView
from hanmo.models.transformer import Transformer

WARM_UP = 3  # steps before recording: libraries choose their kernels in the first ones


class RecordedStep:
    """One step of so many texts, over the pool as it is now.

    Args:
        spare: a slot of the pool that belongs to no text.
    """

    def __init__(self, model: Transformer, pool: CachePool, count: int, spare: int) -> None:
        device = pool.keys.device
        self.model, self.pool, self.spare = model, pool, spare
        self.ids_B = torch.zeros(count, dtype=torch.int64, device=device)
        self.slots_B = torch.full_like(self.ids_B, spare)
        self.places_B = torch.zeros_like(self.ids_B)
        self.hidden_BD: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def compute(self) -> Tensor:
        """The step itself: hidden states ``[B, D]``."""
        view = StaticView(self.pool, self.slots_B, self.places_B)
        places_B1 = self.places_B.unsqueeze(1)
        return self.model.hidden(self.ids_B.unsqueeze(1), cache=view, positions_BT=places_B1)[:, 0]

    def record(self) -> None:
        """Record the step."""
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden_BD = self.compute()

    def run(self, ids: Sequence[int], slots: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Hidden states of the texts, ``[B, D]``; they are overwritten by the next step."""
        more = len(self.ids_B) - len(ids)
        inputs = torch.tensor([[*ids, *[0] * more], [*slots, *[self.spare] * more], [*starts, *[0] * more]])
        for place, values_B in zip((self.ids_B, self.slots_B, self.places_B), inputs, strict=True):
            place.copy_(values_B)
        if self.graph is None:
            return self.compute()[: len(ids)]
        self.graph.replay()
        assert self.hidden_BD is not None
        return self.hidden_BD[: len(ids)]


class Graphs:
    """The recorded steps of a network, by number of texts; recorded anew where the pool has moved.

    Args:
        record: whether to record; else every step is computed as it would be recorded.
    """

    def __init__(self, model: Transformer, pool: CachePool, *, record: bool) -> None:
        self.model, self.pool, self.record = model, pool, record
        self.steps: dict[int, RecordedStep] = {}
        self.address = 0  # of the pool's memory, in the steps
        self.spare: int | None = None

    def run(self, ids: Sequence[int], slots: Sequence[int], starts: Sequence[int]) -> Tensor:
        """One new token of each text: hidden states ``[B, D]``."""
        if self.spare is None:
            self.spare = self.pool.take(self.pool.keys.size(3))
        if self.pool.keys.data_ptr() != self.address:
            self.steps.clear()
            self.address = self.pool.keys.data_ptr()
        count = 1 << (len(ids) - 1).bit_length()
        step = self.steps.get(count)
        if step is None:
            step = self.steps[count] = RecordedStep(self.model, self.pool, count, self.spare)
            if self.record:
                step.record()
        return step.run(ids, slots, starts)
