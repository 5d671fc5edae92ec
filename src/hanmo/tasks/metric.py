"""Metrics as sums over records, so that every number gets its interval in the same way.

A metric says for each record a few numbers (was it right, how many spans were found, how many n-grams matched), and how
measures follow from the sums of these numbers over many records. Then the bootstrap over records (Efron and Tibshirani
1993) is a product of matrices, and two systems are compared on the same draws, whatever the task is.

Letters in names: N records, K numbers of a record.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from hanmo.data.tasks.types import Record

R = TypeVar("R", bound=Record)
A = TypeVar("A")
Floats = NDArray[np.float64]


class Metric(ABC, Generic[R, A]):
    """What is measured of a task's answers.

    Attributes:
        primary: the measure by which systems are compared.
        lower: measures of which less is better; of all others more is.
        compared: further measures of which differences between systems are told.

    A metric with a method ``wins(first_NK, second_NK)`` says of each record whether the first answer is the better one
    (1), the second (0) or neither (0.5), ``[N]``; win rates follow from it.
    """

    primary: str
    lower: frozenset[str] = frozenset()
    compared: tuple[str, ...] = ()

    @abstractmethod
    def statistics(self, records: Sequence[R], answers: Sequence[A]) -> Floats:
        """Numbers of each record, ``[N, K]``; K may depend on the records, never on the answers."""

    @abstractmethod
    def measures(self, sums: Floats) -> dict[str, Floats]:
        """What follows from sums over records, ``[..., K]`` to ``[...]`` each; NaN where nothing does."""

    def signature(self) -> Mapping[str, Any]:
        """What has to be the same for two numbers to be comparable: variant, tokens, version."""
        return {}

    def details(self, records: Sequence[R], answers: Sequence[A]) -> dict[str, Any]:
        """More about these answers than numbers with intervals: a table of confusions, measures by label."""
        del records, answers
        return {}


def ratio(above: Any, below: Any) -> Floats:
    """A quotient of arrays; 0 where the divisor is.

    >>> ratio(np.array([1.0, 1.0]), np.array([2.0, 0.0]))
    array([0.5, 0. ])
    """
    below = np.asarray(below, dtype=np.float64)
    quotient: Floats = np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)
    return quotient
