"""Objectives: how a dataset becomes batches, and a batch becomes a token-weighted loss.

An objective answers four questions for the trainer: which micro-batches make up step ``k``, how many tokens count in
them, what a micro-batch costs (the *sum* over its tokens, so that any split of a batch gives the same gradient), and
what the model scores on held-out data. Batches and the noise of dropout are a function of the seed and the step alone,
so resumption needs no data cursor; what a model carries from step to step goes into the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from hanmo.errors import DataError
from hanmo.models.recurrent import RecurrentModel, State
from hanmo.models.transformer import Transformer

VALIDATION_TOKENS = 8192  # tokens that pass the network at once when a validation split is scored


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


BatchT = TypeVar("BatchT", bound=Batch)
ModelT = TypeVar("ModelT", contravariant=True)


class Objective(Protocol[ModelT, BatchT]):
    """What the trainer asks of an objective, for models of one kind."""

    def micro_batches(self, step: int) -> Iterator[BatchT]:
        """The batch of one step, in pieces."""

    def tokens_per_step(self) -> int:
        """Tokens that count in one step."""

    def loss(self, model: ModelT, batch: BatchT) -> Tensor:
        """Summed loss of a micro-batch in nats."""

    def validate(self, model: ModelT, device: torch.device, max_tokens: int | None = None) -> float:
        """Mean loss in nats per token on held-out data, or on about ``max_tokens`` of it."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What is carried from one step to the next, by name."""

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_tensors` gave."""


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
        total, tokens, rows = 0.0, 0, max(1, VALIDATION_TOKENS // self.context)
        for first in range(0, chosen, rows):
            batch = self.windows_at(self.validation, starts[first : first + rows])
            total += float(model.loss(batch.ids.to(device), batch.targets.to(device)))
            tokens += batch.ids.numel()
        return total / tokens

    def state_tensors(self) -> dict[str, Tensor]:
        """Windows stand alone: nothing is carried."""
        return {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is carried."""


@dataclass
class StreamBatch(Batch):
    """Neighbouring rows of the streams, and where they begin among all ``[batch_size]`` of them."""

    first: int


class TruncatedBackpropagation:
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
        seed: decides the offsets and the noise of dropout.

    Raises:
        DataError: the training split has no step for every stream, or the validation split is empty.
    """

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

    def stream_start(self, stream: int, step: int) -> int:
        """Where the tokens of a stream begin that are read at a step of the whole training."""
        epoch, index = divmod(step, self.steps_per_epoch)
        length = self.steps_per_epoch * self.context
        room = len(self.train) - 1 - length * self.batch_size
        offset = int(np.random.default_rng([self.seed, epoch]).integers(0, room + 1))
        return offset + stream * length + index * self.context

    def micro_batches(self, step: int) -> Iterator[StreamBatch]:
        """The batch of one step, in pieces of ``micro_batch`` streams; at the start of an epoch the state is new."""
        if step % self.steps_per_epoch == 0:
            self.state = None
        torch.manual_seed(int(np.random.default_rng([self.seed, step, 1]).integers(1 << 62)))
        for first in range(0, self.batch_size, self.micro_batch):
            stop = min(first + self.micro_batch, self.batch_size)
            starts = [self.stream_start(stream, step) for stream in range(first, stop)]
            rows = np.stack([self.train[start : start + self.context + 1] for start in starts]).astype(np.int64)
            block = torch.from_numpy(rows)
            yield StreamBatch(block[:, :-1], block[:, 1:], first)

    def tokens_per_step(self) -> int:
        """Tokens that count in one step."""
        return self.batch_size * self.context

    def loss(self, model: RecurrentModel, batch: StreamBatch) -> Tensor:
        """Summed negative log-likelihood in nats; the state of the batch's streams goes on."""
        if self.state is None:
            self.state = model.initial_state(self.batch_size)
        rows = slice(batch.first, batch.first + len(batch.ids))
        before = tuple(part[:, rows].clone() for part in self.state)
        loss, after = model.stream_loss(batch.ids, batch.targets, before)
        for whole, part in zip(self.state, after, strict=True):
            whole[:, rows] = part.detach()
        return loss

    @torch.no_grad()
    def validate(self, model: RecurrentModel, device: torch.device, max_tokens: int | None = None) -> float:
        """Mean loss in nats per token over the validation split, read as one stream from its beginning.

        Args:
            max_tokens: score only the first so many tokens; default all.
        """
        stop = len(self.validation) if max_tokens is None else min(max_tokens, len(self.validation))
        state: State | None = None
        total, last = 0.0, self.start_id
        for begin in range(0, stop, VALIDATION_TOKENS):
            targets = self.validation[begin : min(begin + VALIDATION_TOKENS, stop)].astype(np.int64)
            ids = np.concatenate([[last], targets[:-1]])
            last = int(targets[-1])
            block = torch.from_numpy(np.stack([ids, targets])).to(device)
            loss, state = model.stream_loss(block[:1], block[1:], state)
            total += float(loss)
        return total / stop

    def state_tensors(self) -> dict[str, Tensor]:
        """The state of all streams; nothing at the start of an epoch."""
        return {str(index): part for index, part in enumerate(self.state or ())}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_tensors` gave."""
        self.state = tuple(tensors[str(index)].clone() for index in range(len(tensors))) or None
