"""Objectives: how a dataset becomes batches, and a batch becomes a token-weighted loss.

An objective answers four questions for the trainer: which micro-batches make up step ``k``, how many tokens count in
them, what a micro-batch costs (the *sum* over its tokens, so that any split of a batch gives the same gradient), and
what the model scores on held-out data. Batches are a function of the seed and the step alone, so resumption needs no
data cursor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hanmo.errors import DataError
from hanmo.models.transformer import Transformer


class Tokens(Protocol):
    """A long sequence of token ids, in memory or memory-mapped."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice) -> np.ndarray: ...


@dataclass
class Batch:
    """Token ids ``[B, T]`` and, one position ahead, their targets ``[B, T]`` (negative: does not count)."""

    ids: Tensor
    targets: Tensor

    @property
    def num_tokens(self) -> int:
        """Targets that count."""
        return int((self.targets >= 0).sum())


class CausalLanguageModeling:
    """Predict every next token of a corpus of packed documents.

    Each epoch cuts the corpus into windows at a new random offset and visits them in a new random order.

    Args:
        train, validation: token ids, documents end to end, each closed by its separator.
        context: tokens per window, T.
        batch_size: windows per optimizer step.
        micro_batch: windows per forward pass; changes memory, not the gradient.
        seed: decides offsets and order.

    Raises:
        DataError: a split is shorter than one window.
    """

    def __init__(
        self, train: Tokens, validation: Tokens, *, context: int, batch_size: int, micro_batch: int, seed: int
    ) -> None:
        for name, split in (("training", train), ("validation", validation)):
            if len(split) < context + 1:
                raise DataError(
                    f"the {name} split has {len(split)} tokens, one window needs {context + 1}",
                    fix=f"add text, or train with --context {max(8, (len(split) - 1) // 2)}",
                    zh=f"{name} 部分只有 {len(split)} 个词元，不足一个窗口（{context + 1}）；增加文本或减小 --context",
                )
        self.train, self.validation = train, validation
        self.context, self.batch_size, self.micro_batch, self.seed = context, batch_size, micro_batch, seed
        # one window fewer than fit, so that every offset below the context leaves room
        self.windows = max(1, (len(train) - 1) // context - 1)
        self.epoch = -1
        self.order = np.empty(0, dtype=np.int64)
        self.offset = 0

    def window_start(self, sample: int) -> int:
        """Where the ``sample``-th window of the whole training begins."""
        epoch, index = divmod(sample, self.windows)
        if epoch != self.epoch:
            generator = np.random.default_rng([self.seed, epoch])
            room = len(self.train) - 1 - self.windows * self.context
            self.offset = int(generator.integers(0, min(room, self.context) + 1))
            self.order = generator.permutation(self.windows)
            self.epoch = epoch
        return self.offset + int(self.order[index]) * self.context

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The batch of one step, in pieces of ``micro_batch`` windows."""
        first = step * self.batch_size
        for start in range(first, first + self.batch_size, self.micro_batch):
            stop = min(start + self.micro_batch, first + self.batch_size)
            yield self.windows_at(self.train, [self.window_start(sample) for sample in range(start, stop)])

    def windows_at(self, tokens: Tokens, starts: list[int]) -> Batch:
        """Windows of ``context`` tokens and their targets."""
        rows = np.stack([tokens[start : start + self.context + 1] for start in starts]).astype(np.int64)
        block = torch.from_numpy(rows)
        return Batch(block[:, :-1], block[:, 1:])

    def tokens_per_step(self) -> int:
        """Tokens that count in one step."""
        return self.batch_size * self.context

    def loss(self, model: Transformer, batch: Batch) -> Tensor:
        """Summed negative log-likelihood in nats."""
        return model.loss(batch.ids, batch.targets)

    @torch.no_grad()
    def validate(self, model: Transformer, device: torch.device, max_tokens: int | None = None) -> float:
        """Mean loss in nats per token over the validation split, cut into windows that do not overlap.

        Args:
            max_tokens: score only so many tokens, spread evenly over the split; default all of it.
        """
        count = (len(self.validation) - 1) // self.context
        chosen = count if max_tokens is None else max(1, min(count, max_tokens // self.context))
        starts = [int(i) * self.context for i in np.linspace(0, count - 1, chosen).round()]
        total, tokens, rows = 0.0, 0, max(1, 8192 // self.context)
        for first in range(0, chosen, rows):
            batch = self.windows_at(self.validation, starts[first : first + rows])
            total += float(model.loss(batch.ids.to(device), batch.targets.to(device)))
            tokens += batch.ids.numel()
        return total / tokens
