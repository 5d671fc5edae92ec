"""Bootstrap confidence intervals, by resampling whole documents (Efron and Tibshirani 1993, chapter 13).

Tokens of one document depend on one another, so documents, not tokens, are drawn with replacement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 1000
MIN_UNITS = 5  # fewer documents, blocks or pairs say nothing of their own spread
CONFIDENCE = 0.95
DRAWS_AT_ONCE = 1 << 20  # bounds the memory of the vectorised draws


@dataclass(frozen=True)
class Interval:
    """A percentile interval: with ``confidence`` the quantity lies between ``low`` and ``high``."""

    low: float
    high: float
    confidence: float = CONFIDENCE

    def __str__(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"


def bootstrap_sums(values_NK: NDArray[Any], *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Sums over N units drawn with replacement from N units, for each resample: float64 [resamples, K].

    The K columns are drawn together, so ratios and differences of them are those of the same resampled units.

    >>> bootstrap_sums(np.array([[1.0, 10.0], [2.0, 20.0]]), resamples=1000).shape
    (1000, 2)
    """
    values_NK = np.asarray(values_NK, dtype=np.float64)
    num_units = len(values_NK)
    generator = np.random.default_rng(seed)
    sums = np.empty((resamples, values_NK.shape[1]))
    rows = max(1, DRAWS_AT_ONCE // num_units)
    for begin in range(0, resamples, rows):
        drawn = generator.integers(num_units, size=(min(rows, resamples - begin), num_units))
        for column, values in enumerate(values_NK.T):
            sums[begin : begin + rows, column] = values[drawn].sum(axis=1)
    return sums


def percentile_interval(samples: Floats, confidence: float = CONFIDENCE) -> Interval:
    """The interval that leaves an equal share of the bootstrap ``samples`` on either side."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Interval(float(low), float(high), confidence)
