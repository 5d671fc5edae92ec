"""Spans with a type, found and true: how many agree, as sums over records.

Letters in names: N records, L types.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from hanmo.tasks.metric import Floats, ratio

Span = tuple[int, int, str]  # first token, end (exclusive), type
HEAD = 3  # numbers of a record before those of its types


def span_numbers(true: Sequence[Collection[Span]], found: Sequence[Collection[Span]], types: Sequence[str]) -> Floats:
    """Of each record the spans in common, found, true; then the same three for each type, ``[N, 3 + 3 L]``.

    A span of a type that is none of ``types`` counts among those found, and in no column of a type.
    """
    number = {kind: place for place, kind in enumerate(types)}
    head_N3, types_N3L = np.zeros((len(true), HEAD)), np.zeros((len(true), 3, len(number)))
    for row, (right, given) in enumerate(zip(true, found, strict=True)):
        right, given = set(right), set(given)
        for column, spans in enumerate((right & given, given, right)):
            head_N3[row, column] = len(spans)
            for _, _, kind in spans:
                if kind in number:
                    types_N3L[row, column, number[kind]] += 1
    return np.concatenate([head_N3, types_N3L.reshape(len(true), -1)], axis=1)


def span_measures(sums: Floats) -> dict[str, Floats]:
    """Precision, recall and F1 of whole spans from sums of :func:`span_numbers`; 0 where there is nothing to divide by.

    >>> {name: float(value) for name, value in span_measures(np.array([1.0, 2.0, 4.0])).items()}
    {'precision': 0.5, 'recall': 0.25, 'f1': 0.3333333333333333}
    """
    common, found, true = sums[..., 0], sums[..., 1], sums[..., 2]
    return {
        "precision": ratio(common, found),
        "recall": ratio(common, true),
        "f1": ratio(2 * common, found + true),
    }


def type_table(sums: Floats, types: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Precision, recall, F1 and the number of true ones for each type, from three numbers a type (``[3 L]``)."""
    counts_3L = np.asarray(sums).reshape(3, len(types))
    columns = span_measures(counts_3L.T)
    return {
        kind: {**{name: float(values[place]) for name, values in columns.items()}, "n": int(counts_3L[2, place])}
        for place, kind in enumerate(types)
    }
