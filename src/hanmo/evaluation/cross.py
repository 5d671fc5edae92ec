"""What a system that learns reaches on records without others to learn from: it learns the other folds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.data.tasks.splits import digest_of
from hanmo.data.tasks.types import Record
from hanmo.errors import DataError
from hanmo.evaluation.leaks import question_of
from hanmo.tasks.base import System

FOLDS = 5


def folds_of(records: Sequence[Record], folds: int = FOLDS) -> NDArray[np.int64]:
    """The fold of each record, ``[N]``: it follows from a hash of the question, so that equal ones stand in one fold.

    Raises:
        DataError: all records ask the same.
    """
    keys_N = [digest_of(question_of(record)) for record in records]
    places = {key: place for place, key in enumerate(sorted(set(keys_N)))}
    if len(places) < 2:
        raise DataError(
            "all records ask the same, and nothing else can be learned from",
            fix="give training data with --train",
            zh="所有记录的问题都相同，无从学习；请用 --train 给出训练数据",
        )
    return np.array([places[key] % min(folds, len(places)) for key in keys_N], dtype=np.int64)


class CrossFitted(System[Any, Any]):
    """A system that answers each fold of the records after it has learned the others.

    Args:
        system: one that learns, or one that ``make`` makes.
        folds: how many.
        make: the system that answers a fold, given its number and the records of the others; default: a copy of
            ``system`` that learns them.

    Raises:
        DataError: in :meth:`answer`, all records ask the same.
    """

    def __init__(
        self,
        system: System[Any, Any],
        folds: int = FOLDS,
        make: Callable[[int, list[Any]], System[Any, Any]] | None = None,
    ) -> None:
        self.system, self.folds, self.name, self.kind = system, folds, system.name, system.kind
        self.make = make or self.taught

    def taught(self, fold: int, others: list[Any]) -> System[Any, Any]:
        """A copy that has learned the other folds."""
        del fold
        learner = copy.deepcopy(self.system)
        learner.fit(others)
        return learner

    def answer(self, records: Sequence[Record]) -> list[Any]:
        """Answers of as many systems as there are folds."""
        folds_N = folds_of(records, self.folds)
        answers: list[Any] = [None] * len(records)
        for fold in np.unique(folds_N):
            others = [record for record, own in zip(records, folds_N, strict=True) if own != fold]
            learner = self.make(int(fold), others)
            here = np.flatnonzero(folds_N == fold)
            found = learner.answer([records[int(place)] for place in here])
            for place, answer in zip(here, found, strict=True):
                answers[place] = answer
        return answers

    def signature(self) -> Mapping[str, Any]:
        """The number of folds."""
        return {**self.system.signature(), "folds": self.folds}
