"""What the trainer asks of the processes that train together; here there is one, ``distributed.py`` has many.

Sharding and communication are applied from outside: neither the network nor an objective knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hanmo.training.checkpoint import TrainingState, save_checkpoint, verify_whole
from hanmo.training.objectives.base import Objective, Share
from hanmo.training.optimizer import orthogonalize

ValueT = TypeVar("ValueT")


class Processes:
    """One process, which does everything itself.

    Attributes:
        share: the part of every step that this process computes.
    """

    share = Share()
    restarted = False

    @property
    def main(self) -> bool:
        """Whether this process writes the files and talks to the user."""
        return self.share.rank == 0

    def prepare(self, model: nn.Module) -> None:
        """Give all processes the same weights, or each its shard of them."""

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of all processes; a parameter without one in any of them stays without."""

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Scale the gradients so that their norm is at most ``limit``; returns what it was."""
        return float(torch.nn.utils.clip_grad_norm_(list(parameters), limit))

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value added over all processes."""
        return dict(values)

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return flag

    def decide(self, value: float) -> float:
        """The first process's value, for all: clocks differ."""
        return value

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors from what may be shards; only the first process may use the result."""
        return dict(tensors)

    def scattered(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of whole tensors, laid out as in ``like``; names that it lacks are kept whole."""
        del like
        return dict(tensors)

    def adapt(self, objective: Objective[Any, Any]) -> Objective[Any, Any]:
        """The objective as these processes need it."""
        return objective

    def agree(self, what: str, value: str) -> None:
        """Make sure that all processes have the same value."""

    def same(self, value: ValueT) -> ValueT:
        """The first process's JSON value, for all."""
        return value

    def check_folder(self, folder: Path) -> None:
        """Make sure that all processes see the same folder."""

    def verify(self, folder: Path) -> dict[str, Any]:
        """:func:`hanmo.training.checkpoint.verify_whole`, together."""
        return verify_whole(folder)

    def first_main(self, action: Callable[[], Any], others: Callable[[], Any] | None = None) -> Any:
        """Let the first process prepare something on the disk, then the others read it."""
        del others
        return action()

    def orthogonalized(self, updates: list[Tensor]) -> list[Tensor]:
        """Muon's update of matrices of one shape."""
        return list(orthogonalize(torch.stack(updates)).unbind())

    def save(
        self, root: Path, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: TrainingState
    ) -> None:
        """Write a checkpoint."""
        whole, moments = self.gathered(model), self.gathered(optimizer)
        self.on_main(lambda: save_checkpoint(root, whole, moments, state))

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Let the first process act while the others wait; an error in it stops all of them."""
        return action()
