"""An objective as several processes need it: the trainer and the objective know nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from hanmo.training.objectives.base import WHOLE, Batch, Objective, Share


class Guide(Protocol):
    """What an adapted objective asks of the processes."""

    def upcoming(self, batches: Iterator[Batch], spare: Callable[[], Batch]) -> Iterator[tuple[Batch, bool, bool]]: ...

    def begin_backward(self, last: bool) -> None: ...


class Adapted(Objective[nn.Module, Batch]):
    """Tells the processes which micro-batch is the last of a step, and lets those that they add count nothing."""

    def __init__(self, inner: Objective[Any, Any], guide: Guide) -> None:
        self.inner, self.guide, self.unit = inner, guide, inner.unit
        self.idle: Batch | None = None  # a batch that another process counts

    @property
    def micro_batch(self) -> int:
        """Size of a micro-batch of the objective."""
        return self.inner.micro_batch

    @micro_batch.setter
    def micro_batch(self, size: int) -> None:
        self.inner.micro_batch = size

    def micro_batches(self, step: int, share: Share = WHOLE) -> Iterator[Batch]:
        def spare() -> Batch:
            first: Batch = next(self.inner.micro_batches(step, Share(0, share.count)))
            return first

        for batch, counts, last in self.guide.upcoming(self.inner.micro_batches(step, share), spare):
            self.guide.begin_backward(last)
            self.idle = None if counts else batch
            yield batch

    def validation_batches(self, limit: int | None = None, share: Share = WHOLE) -> Iterator[Batch]:
        def spare() -> Batch:
            first: Batch = next(self.inner.validation_batches(limit, Share(0, share.count)))
            return first

        for batch, counts, _ in self.guide.upcoming(self.inner.validation_batches(limit, share), spare):
            self.idle = None if counts else batch
            yield batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = self.inner.loss(model, batch)
        return loss * 0.0 if batch is self.idle else loss

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
        measures = self.inner.measure(model, batch)
        return {} if batch is self.idle else measures

    def step_weight(self, step: int) -> float:
        return self.inner.step_weight(step)

    def tokens_in(self, step: int) -> int:
        return self.inner.tokens_in(step)

    def begin_validation(self) -> None:
        self.inner.begin_validation()

    def end_validation(self) -> None:
        self.inner.end_validation()

    def origin(self, step: int) -> str:
        return self.inner.origin(step)

    def state_tensors(self) -> dict[str, Tensor]:
        return self.inner.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.inner.load_state_tensors(tensors)
