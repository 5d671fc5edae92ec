"""Next-token prediction over a corpus: packed documents for transformers, long streams for recurrent networks.

Letters in names: B windows or streams, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hanmo.errors import DataError
from hanmo.models.recurrent import RecurrentModel, State
from hanmo.models.transformer import Transformer
from hanmo.training.objectives.base import WHOLE, Batch, Objective, Share

VALIDATION_TOKENS = 8192  # tokens that pass the network at once when a validation split is scored


class Tokens(Protocol):
    """A long sequence of token ids, in memory or memory-mapped."""

    def __len__(self) -> int: ...

    def __getitem__(self, span: slice) -> np.ndarray: ...


@dataclass
class PackedBatch(Batch):
    """Windows that hold several documents; ``segments`` ``[B, T]`` numbers them, so that none sees another."""

    segments: Tensor | None = None


def segments_of(ids_BT: np.ndarray, separator: int) -> np.ndarray:
    """The number of the document, from 1, that each position of a window belongs to.

    The separator that closes a document is the target of its last token; as an input it begins the next document, as
    it does when the model writes a text from the beginning.

    >>> segments_of(np.array([[5, 0, 6, 7, 0, 8]]), 0).tolist()
    [[1, 2, 2, 2, 3, 3]]
    """
    numbers: np.ndarray = 1 + np.cumsum(ids_BT == separator, axis=1)
    return numbers


class CausalLanguageModeling(Objective[Transformer, PackedBatch]):
    """Predict every next token of a corpus of documents that are packed end to end, without a gap.

    Each epoch cuts the corpus into windows at a new random offset and visits them in a new random order. A document
    sees only itself: what stands before it in its window is another text.

    Args:
        train, validation: token ids, documents end to end, each closed by its separator.
        context: tokens per window, T.
        batch_size: windows per optimizer step.
        micro_batch: windows per forward pass; changes memory, not the gradient.
        seed: decides offsets and order.
        separator: the token that closes a document; None: the windows are one text.

    Raises:
        DataError: a split is shorter than one window.
    """

    def __init__(
        self,
        train: Tokens,
        validation: Tokens,
        *,
        context: int,
        batch_size: int,
        micro_batch: int,
        seed: int,
        separator: int | None = None,
    ) -> None:
        for name, split in (("training", train), ("validation", validation)):
            if len(split) < context + 1:
                raise DataError(
                    f"the {name} split has {len(split)} tokens, one window needs {context + 1}",
                    fix=f"add text, or train with --context {max(8, (len(split) - 1) // 2)}",
                    zh=f"{name} 部分只有 {len(split)} 个词元，不足一个窗口（{context + 1}）；增加文本或减小 --context",
                )
        self.train, self.validation, self.separator = train, validation, separator
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

    def micro_batches(self, step: int, share: Share = WHOLE) -> Iterator[PackedBatch]:
        first, stop = step * self.batch_size, (step + 1) * self.batch_size
        starts = range(first, stop, self.micro_batch)
        for number in share.of(len(starts)):
            samples = range(starts[number], min(starts[number] + self.micro_batch, stop))
            yield self.windows_at(self.train, [self.window_start(sample) for sample in samples])

    def windows_at(self, tokens: Tokens, starts: list[int]) -> PackedBatch:
        """Windows of ``context`` tokens and their targets."""
        rows = np.stack([tokens[start : start + self.context + 1] for start in starts]).astype(np.int64)
        segments = None
        if self.separator is not None and (rows[:, 1:-1] == self.separator).any():
            segments = torch.from_numpy(segments_of(rows[:, :-1], self.separator))
        block = torch.from_numpy(rows)
        return PackedBatch(block[:, :-1], block[:, 1:], len(starts) * self.context, segments)

    def step_weight(self, step: int) -> float:  # noqa: ARG002 - every step has the same size
        return self.batch_size * self.context

    def loss(self, model: Transformer, batch: PackedBatch) -> Tensor:
        return model.loss(batch.ids, batch.targets, segments_BT=batch.segments)

    def validation_batches(self, limit: int | None = None, share: Share = WHOLE) -> Iterator[PackedBatch]:
        """Windows of the validation split that do not overlap."""
        count = (len(self.validation) - 1) // self.context
        chosen = count if limit is None else max(1, min(count, limit // self.context))
        starts = [int(i) * self.context for i in np.linspace(0, count - 1, chosen).round()]
        rows = max(1, VALIDATION_TOKENS // self.context)
        for number in share.of(-(-chosen // rows)):
            yield self.windows_at(self.validation, starts[number * rows : (number + 1) * rows])

    def origin(self, step: int) -> str:
        starts = [self.window_start(sample) for sample in range(step * self.batch_size, (step + 1) * self.batch_size)]
        return f"windows of {self.context} tokens at " + ", ".join(f"{start:,}" for start in sorted(starts)[:6])


@dataclass
class StreamBatch(Batch):
    """Neighbouring rows of the streams, and where they begin among all ``[batch_size]`` of them."""

    first: int = 0


class TruncatedBackpropagation(Objective[RecurrentModel, StreamBatch]):
    """Predict every next token of a corpus that is read as a few long streams (Mikolov et al. 2010; Zaremba et al.
    2014).

    Each epoch cuts the corpus into ``batch_size`` streams of equal length, at a new random offset, and reads them side
    by side from their beginnings, ``context`` tokens a step. The state goes on from step to step, the gradient ends at
    the first token of the step.

    Args:
        train, validation: token ids, documents or sentences end to end, each closed by its separator.
        context: tokens per step and stream, T.
        batch_size: streams.
        micro_batch: streams per forward pass; without dropout it changes memory, not the gradient.
        start_id: the separator, which the validation split begins after.
        seed: decides the offsets.

    Raises:
        DataError: the training split has no step for every stream, or the validation split is empty.
    """

    divisible = False  # every step goes on with the state that the one before left

    def __init__(
        self,
        train: Tokens,
        validation: Tokens,
        *,
        context: int,
        batch_size: int,
        micro_batch: int,
        start_id: int,
        seed: int,
    ) -> None:
        self.steps_per_epoch = (len(train) - 1) // (context * batch_size)
        if self.steps_per_epoch < 1:
            raise DataError(
                f"the training split has {len(train)} tokens, one step needs {context * batch_size + 1}",
                fix="add text, or give a smaller --batch-size or --context",
                zh=f"训练部分只有 {len(train)} 个词元，不足一步（{context * batch_size + 1}）；"
                "请增加文本，或减小 --batch-size、--context",
            )
        if not len(validation):
            raise DataError("the validation split is empty", fix="add text to it", zh="验证部分为空，请补充文本")
        self.train, self.validation, self.start_id = train, validation, start_id
        self.context, self.batch_size, self.micro_batch, self.seed = context, batch_size, micro_batch, seed
        self.state: State | None = None
        self.training_state: State | None = None  # of the streams, while the validation split is read

    def stream_start(self, stream: int, step: int) -> int:
        """Where the tokens of a stream begin that are read at a step of the whole training."""
        epoch, index = divmod(step, self.steps_per_epoch)
        length = self.steps_per_epoch * self.context
        room = len(self.train) - 1 - length * self.batch_size
        offset = int(np.random.default_rng([self.seed, epoch]).integers(0, room + 1))
        return offset + stream * length + index * self.context

    def micro_batches(self, step: int, share: Share = WHOLE) -> Iterator[StreamBatch]:
        """The batch of one step, in pieces of ``micro_batch`` streams; at the start of an epoch the state is new."""
        if step % self.steps_per_epoch == 0:
            self.state = None
        firsts = range(0, self.batch_size, self.micro_batch)
        for number in share.of(len(firsts)):
            first, stop = firsts[number], min(firsts[number] + self.micro_batch, self.batch_size)
            starts = [self.stream_start(stream, step) for stream in range(first, stop)]
            rows = np.stack([self.train[start : start + self.context + 1] for start in starts]).astype(np.int64)
            block = torch.from_numpy(rows)
            yield StreamBatch(block[:, :-1], block[:, 1:], (stop - first) * self.context, first)

    def step_weight(self, step: int) -> float:  # noqa: ARG002 - every step has the same size
        return self.batch_size * self.context

    def loss(self, model: RecurrentModel, batch: StreamBatch) -> Tensor:
        """Summed negative log-likelihood in nats; the state of the batch's streams goes on."""
        if self.state is None:
            self.state = model.initial_state(len(batch.ids) if batch.first < 0 else self.batch_size)
        rows = slice(None) if batch.first < 0 else slice(batch.first, batch.first + len(batch.ids))
        before = tuple(part[:, rows].clone() for part in self.state)
        loss, after = model.stream_loss(batch.ids, batch.targets, before)
        for whole, part in zip(self.state, after, strict=True):
            whole[:, rows] = part.detach()
        return loss

    def begin_validation(self) -> None:
        self.training_state, self.state = self.state, None

    def end_validation(self) -> None:
        self.state, self.training_state = self.training_state, None

    def validation_batches(self, limit: int | None = None, share: Share = WHOLE) -> Iterator[StreamBatch]:
        """The validation split, or the first ``limit`` tokens of it, read as one stream from its beginning.

        A stream cannot be divided: with several processes, the first reads it.
        """
        stop = len(self.validation) if limit is None else min(limit, len(self.validation))
        last = self.start_id
        for begin in range(0, stop if share.rank == 0 else 0, VALIDATION_TOKENS):
            targets = self.validation[begin : min(begin + VALIDATION_TOKENS, stop)].astype(np.int64)
            ids = np.concatenate([[last], targets[:-1]])
            last = int(targets[-1])
            block = torch.from_numpy(np.stack([ids, targets]))
            yield StreamBatch(block[:1], block[1:], len(targets), -1)

    def origin(self, step: int) -> str:
        return f"streams of {self.context} tokens at {self.stream_start(0, step):,} and so on"

    def state_tensors(self) -> dict[str, Tensor]:
        """The state of all streams; nothing at the start of an epoch."""
        return {str(index): part for index, part in enumerate(self.state or ())}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_tensors` gave."""
        self.state = tuple(tensors[str(index)].clone() for index in range(len(tensors))) or None
