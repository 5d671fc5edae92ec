"""What the trainer asks of an objective, and how examples become the batches of a step.

An objective answers four questions: which micro-batches make up step ``k``, what they weigh (tokens, examples or pairs
that count), what a micro-batch costs (the *sum* over what counts, so that any split of a batch gives the same
gradient), and what the model scores on held-out data. Batches are a function of the seed and the step alone, so that
resumption needs no data cursor, and any number of processes can divide a step among themselves; what a model carries
from step to step goes into the checkpoint.

Letters in names: B examples of a micro-batch, T tokens.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from hanmo.errors import DataError

IGNORED = -1  # the target of a position that does not count


@dataclass
class Batch:
    """Token ids ``[B, T]`` and the target of each position ``[B, T]`` (negative: does not count).

    ``weight`` is how much counts in this batch: the number that its summed loss is to be divided by.
    """

    ids: Tensor
    targets: Tensor
    weight: float

    def to(self, device: torch.device) -> None:
        """Bring all tensors to a device."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                setattr(self, item.name, value.to(device, non_blocking=True))


@dataclass(frozen=True)
class Share:
    """Which part of every step and of the validation data a process computes: each ``count``-th micro-batch.

    The micro-batches themselves do not depend on the number of processes, so that it changes sums only by rounding.
    """

    rank: int = 0
    count: int = 1

    def of(self, number: int) -> range:
        """Indices of this process's micro-batches among ``number``."""
        return range(self.rank, number, self.count)


WHOLE = Share()

BatchT = TypeVar("BatchT", bound=Batch)
ModelT = TypeVar("ModelT")
ExampleT = TypeVar("ExampleT")


class Objective(ABC, Generic[ModelT, BatchT]):
    """What the trainer asks of an objective, for models of one kind.

    Attributes:
        unit: what the weight of a batch counts: "token", "example" or "pair".
        micro_batch: size of a micro-batch; the trainer halves it when memory runs out.
        divisible: whether several processes can compute the micro-batches of a step.
    """

    unit = "token"
    divisible = True
    micro_batch: int

    @abstractmethod
    def micro_batches(self, step: int, share: Share = WHOLE) -> Iterator[BatchT]:
        """This process's part of the batch of one step, in pieces."""

    @abstractmethod
    def step_weight(self, step: int) -> float:
        """What counts in one step, over all processes."""

    @abstractmethod
    def loss(self, model: ModelT, batch: BatchT) -> Tensor:
        """Summed loss of a micro-batch in nats."""

    @abstractmethod
    def validation_batches(self, limit: int | None = None, share: Share = WHOLE) -> Iterator[BatchT]:
        """This process's part of the held-out data, or of about ``limit`` tokens spread evenly over it."""

    def tokens_in(self, step: int) -> int:
        """Tokens that a step reads; by default those that count."""
        return round(self.step_weight(step))

    def measure(self, model: ModelT, batch: BatchT) -> dict[str, tuple[float, float]]:
        """Sum and weight of every measure on a held-out batch; their ratio over all batches is reported."""
        return {"loss": (float(self.loss(model, batch)), batch.weight)}

    def begin_validation(self) -> None:
        """Called before the held-out batches are measured, in order."""

    def end_validation(self) -> None:
        """Called after them."""

    def origin(self, step: int) -> str:
        """Where the data of a step is from, for an error message."""
        return f"step {step}"

    def state_tensors(self) -> dict[str, Tensor]:
        """What is carried from one step to the next, by name."""
        return {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_tensors` gave."""


class Order:
    """Which examples make up which step: all of them in every epoch, in a new random order each time.

    A step may reach into the next epoch, so every step has the same size.

    >>> order = Order(5, 2, seed=0)
    >>> sorted(int(i) for step in range(5) for i in order.step(step)) == sorted([*range(5)] * 2)
    True
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.epochs: dict[int, np.ndarray] = {}

    def epoch(self, number: int) -> np.ndarray:
        """The order of one epoch."""
        if number not in self.epochs:
            self.epochs = {key: value for key, value in self.epochs.items() if key >= number - 1}
            self.epochs[number] = np.random.default_rng([self.seed, number]).permutation(self.examples)
        return self.epochs[number]

    def step(self, step: int) -> list[int]:
        """Indices of the examples of a step."""
        first = step * self.batch_size
        places = (divmod(sample, self.examples) for sample in range(first, first + self.batch_size))
        return [int(self.epoch(epoch)[index]) for epoch, index in places]


@dataclass(frozen=True)
class Pick(Generic[ExampleT]):
    """An example at its place in the training: the noise that an objective adds to it is a function of ``key``."""

    example: ExampleT
    key: tuple[int, ...]


class ExampleObjective(Objective[ModelT, BatchT], Generic[ModelT, BatchT, ExampleT]):
    """An objective over separate examples, such as the sentences of a task.

    Args:
        train, validation: the examples.
        batch_size: examples per optimizer step; at most all of them.
        micro_batch: examples per forward pass; changes memory, not the gradient.
        seed: decides the order.

    Raises:
        DataError: there are no examples to train on, or none to validate on.
    """

    unit = "example"

    def __init__(
        self,
        train: Sequence[ExampleT],
        validation: Sequence[ExampleT],
        *,
        batch_size: int,
        micro_batch: int,
        seed: int,
    ) -> None:
        for name, zh, examples in (("training", "训练", train), ("validation", "验证", validation)):
            if not len(examples):
                raise DataError(f"there is no {name} example", fix="add records", zh=f"没有{zh}样本，请补充数据")
        self.train, self.validation = train, validation
        self.batch_size, self.micro_batch = min(batch_size, len(train)), micro_batch
        self.seed = seed
        self.order = Order(len(train), self.batch_size, seed)

    @abstractmethod
    def collate(self, picks: list[Pick[ExampleT]]) -> BatchT:
        """Examples to one padded batch."""

    @abstractmethod
    def length(self, example: ExampleT) -> int:
        """Tokens of an example."""

    def weight(self, example: ExampleT) -> float:  # noqa: ARG002 - objectives that count tokens need it
        """How much of an example counts; the weight of a batch is the sum of those of its examples."""
        return 1.0

    def name(self, example: ExampleT) -> str:
        """Where an example is from, for an error message: its file and line."""
        return str(getattr(example, "where", ""))

    def pieces(self, step: int) -> list[list[int]]:
        """The examples of each micro-batch of a step. Neighbours in length share one, so that little is padded."""
        indices = sorted(self.order.step(step), key=lambda index: self.length(self.train[index]))
        return [indices[at : at + self.micro_batch] for at in range(0, len(indices), self.micro_batch)]

    def micro_batches(self, step: int, share: Share = WHOLE) -> Iterator[BatchT]:
        pieces = self.pieces(step)
        for number in share.of(len(pieces)):
            first = number * self.micro_batch  # the key must not change when memory halves the micro-batch
            yield self.collate(
                [Pick(self.train[index], (self.seed, step, first + row)) for row, index in enumerate(pieces[number])]
            )

    def step_weight(self, step: int) -> float:
        return sum(self.weight(self.train[index]) for index in self.order.step(step))

    def tokens_in(self, step: int) -> int:
        return sum(self.length(self.train[index]) for index in self.order.step(step))

    def validation_batches(self, limit: int | None = None, share: Share = WHOLE) -> Iterator[BatchT]:
        lengths = [self.length(example) for example in self.validation]
        count = len(lengths)
        if limit is not None and (total := sum(lengths)) > limit:
            count = max(1, count * limit // total)
        chosen = sorted({round(place) for place in np.linspace(0, len(lengths) - 1, count)}, key=lengths.__getitem__)
        pieces = [chosen[at : at + self.micro_batch] for at in range(0, len(chosen), self.micro_batch)]
        for number in share.of(len(pieces)):
            yield self.collate([Pick(self.validation[index], (self.seed, index)) for index in pieces[number]])

    def origin(self, step: int) -> str:
        names = [name for index in self.order.step(step) if (name := self.name(self.train[index]))]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more if names else f"step {step}"


def padded(rows: Sequence[Sequence[int]], fill: int, multiple: int = 1) -> Tensor:
    """Rows of ids as one int64 tensor ``[B, T]``, filled up on the right.

    >>> padded([[1, 2, 3], [4]], 0).tolist()
    [[1, 2, 3], [4, 0, 0]]
    """
    width = max(1, max(map(len, rows)))
    table = np.full((len(rows), -(-width // multiple) * multiple), fill, dtype=np.int64)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(table)


def padding_segments(rows: Sequence[Sequence[Any]], width: int) -> Tensor | None:
    """Segments of padded rows, int64 ``[B, width]``: 1 for tokens, 0 for padding; None where nothing is padded."""
    lengths = np.array([len(row) for row in rows])
    if (lengths == width).all():
        return None
    return torch.from_numpy((np.arange(width)[None] < lengths[:, None]).astype(np.int64))
