"""What a system that learns reaches on records without others to learn from: it learns the other folds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hanmo.data.tasks.splits import digest_of
from hanmo.data.tasks.types import Record
from hanmo.errors import DataError
from hanmo.evaluation.leaks import question_of
from hanmo.tasks.base import System

FOLDS = 5


class CrossFitted(System[Any, Any]):
    """A system that answers each fold of the records after it has learned the others.

    Records that ask the same stand in the same fold, which follows from a hash of the question.

    Args:
        system: one that learns.
        folds: how many.

    Raises:
        DataError: in :meth:`answer`, all records ask the same.
    """

    def __init__(self, system: System[Any, Any], folds: int = FOLDS) -> None:
        self.system, self.folds, self.name, self.kind = system, folds, system.name, system.kind

    def answer(self, records: Sequence[Record]) -> list[Any]:
        """Answers of as many systems as there are folds."""
        keys_N = [digest_of(question_of(record)) for record in records]
        places = {key: place for place, key in enumerate(sorted(set(keys_N)))}
        if len(places) < 2:
            raise DataError(
                "all records ask the same, and nothing else can be learned from",
                fix="give training data with --train",
                zh="所有记录的问题都相同，无从学习；请用 --train 给出训练数据",
            )
        folds_N = np.array([places[key] % min(self.folds, len(places)) for key in keys_N])
        answers: list[Any] = [None] * len(records)
        for fold in np.unique(folds_N):
            learner = copy.deepcopy(self.system)
            learner.fit([record for record, own in zip(records, folds_N, strict=True) if own != fold])
            here = np.flatnonzero(folds_N == fold)
            found = learner.answer([records[int(place)] for place in here])
            for place, answer in zip(here, found, strict=True):
                answers[place] = answer
        return answers

    def signature(self) -> Mapping[str, Any]:
        """The number of folds."""
        return {**self.system.signature(), "folds": self.folds}
