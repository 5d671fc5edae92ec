"""Counting the n-grams of a stream of documents, with numpy alone: sort, compare neighbours, look up.

The stream is kept as one array of small integers. The n-grams of each order are counted in one table of sorted keys,
``prefix_row * vocab_size + last_word``; for the next order every position of the stream then remembers the row of the
n-gram that ends there. Chunks bound the working space, and runs of sorted keys are merged, so beside the stream the
memory is that of the distinct n-grams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hanmo.errors import DataError

Ints = NDArray[Any]
Marks = NDArray[np.bool_]

CHUNK_TOKENS = 1 << 22


@dataclass
class Counts:
    """The n-grams of one order: sorted keys, occurrences, and the row (one order below) without the first word."""

    keys: Ints
    occurrences: Ints
    suffixes: Ints


def check_ids(ids: Ints, vocab_size: int, offset: int = 0) -> None:
    """Refuse what is not a one-dimensional array of ids of the vocabulary; ``offset`` tokens came before it."""
    check_shape(ids)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        at = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise DataError(
            f"id {int(ids[at])} at position {offset + at} is not in the vocabulary of {vocab_size} ids",
            why="the text was encoded with another tokenizer than the model's",
            fix="encode the text with the model's own tokenizer",
            zh=f"位置 {offset + at} 的编号 {int(ids[at])} 不在词表（{vocab_size} 个）中，请用模型自带的分词器编码",
        )


def check_shape(ids: Ints) -> None:
    """Refuse what is not a one-dimensional array of integers."""
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise DataError(f"expected a one-dimensional array of integer ids, got shape {ids.shape} of {ids.dtype}")


def lay_out(ids: Ints, bos_id: int, eos_id: int) -> tuple[Ints, Marks]:
    """Put ``bos_id`` before each document of a flat stream; return the stream and where those document starts are."""
    first = np.append(0, np.flatnonzero(ids[:-1] == eos_id) + 1) if ids.size else np.zeros(0, dtype=np.int64)
    stream = np.insert(ids, first, bos_id)
    starts = np.zeros(stream.size, dtype=bool)
    starts[first + np.arange(first.size)] = True
    return stream, starts


def read_documents(
    documents: Iterable[ArrayLike], vocab_size: int, bos_id: int, eos_id: int, chunk_tokens: int
) -> tuple[Ints, Marks]:
    """Join the documents into one laid-out stream of the smallest integer type, a chunk at a time."""
    dtype = np.min_scalar_type(vocab_size - 1)
    end = np.array([eos_id], dtype=dtype)
    streams: list[Ints] = []
    marks: list[Marks] = []
    pending: list[Ints] = []
    size = total = 0

    def flush() -> None:
        ids = np.concatenate(pending)
        check_ids(ids, vocab_size, total)
        ids = ids.astype(dtype, copy=False)
        if bos_id != eos_id and (ids == bos_id).any():
            raise DataError(
                f"a document contains the document start, id {bos_id}",
                why="the model puts it before each document itself",
                fix="encode the documents without it",
            )
        stream, starts = lay_out(ids, bos_id, eos_id)
        streams.append(stream)
        marks.append(starts)
        pending.clear()

    for document in documents:
        ids = np.asarray(document)
        if ids.size == 0:
            ids = end
        check_shape(ids)
        pending += [ids] if ids[-1] == eos_id else [ids, end]
        size += ids.size + int(ids[-1] != eos_id)
        if size >= chunk_tokens:
            flush()
            total, size = total + size, 0
    if pending:
        flush()
    if not streams:
        raise DataError("there are no documents to count n-grams in", zh="没有可供统计的文档")
    return np.concatenate(streams), np.concatenate(marks)


def contexts_of(rows: Ints, starts: Marks) -> tuple[Ints, Ints]:
    """Positions whose (n-1)-token context was seen, and the context's row; ``rows`` are those of (n-1)-grams by end."""
    valid = rows[:-1] >= 0
    valid &= ~starts[1:]
    at = np.flatnonzero(valid)
    return at + 1, rows[at].astype(np.int64, copy=False)


def find_rows(keys: Ints, wanted: Ints) -> Ints:
    """The rows of ``wanted`` in the sorted ``keys``, -1 where absent.

    Asking in sorted order walks the table once from front to back: some ten times faster than at random.
    """
    if not keys.size:
        return np.full(wanted.size, -1, dtype=np.int64)
    order = np.argsort(wanted)
    sorted_wanted = wanted[order]
    rows = np.searchsorted(keys, sorted_wanted)
    rows[rows == keys.size] = 0
    rows[keys[rows] != sorted_wanted] = -1
    found = np.empty_like(rows)
    found[order] = rows
    return found


def count_ngrams(ids: Ints, starts: Marks, order: int, vocab_size: int, chunk_tokens: int) -> Iterator[Counts]:
    """Count the n-grams of each order, lowest first, as rows that the next order uses as prefixes."""
    occurrences = np.bincount(ids[~starts], minlength=vocab_size)
    yield Counts(np.arange(vocab_size), occurrences, np.zeros(vocab_size, dtype=np.int64))
    row_type = np.int32 if ids.size < 2**31 else np.int64
    rows = ids.astype(row_type)  # of the n-gram that ends at each position
    chunks = [(begin, min(begin + chunk_tokens, ids.size)) for begin in range(0, ids.size, chunk_tokens)]

    def ngrams(begin: int, end: int) -> tuple[Ints, Ints]:
        left = max(0, begin - 1)
        at, prefixes = contexts_of(rows[left:end], starts[left:end])
        at += left
        prefixes *= vocab_size
        prefixes += ids[at]
        return at, prefixes

    for n in range(2, order + 1):
        keys = _distinct(ngrams(*chunk)[1] for chunk in chunks)
        counts = Counts(keys, np.zeros(keys.size, dtype=row_type), np.zeros(keys.size, dtype=row_type))
        longer = np.full(ids.size if n < order else 0, -1, dtype=row_type)
        for chunk in chunks:
            at, wanted = ngrams(*chunk)
            by_key = np.argsort(wanted)
            wanted, at = wanted[by_key], at[by_key]
            first = _first_of_runs(wanted)
            found = np.searchsorted(keys, wanted[first])
            lengths = np.diff(np.append(first, wanted.size))
            counts.occurrences[found] += lengths.astype(row_type)
            counts.suffixes[found] = rows[at[first]]
            if n < order:
                longer[at] = np.repeat(found, lengths)
        yield counts
        rows = longer


def _first_of_runs(ordered: Ints) -> Ints:
    """Where each distinct value of a sorted array begins."""
    if not ordered.size:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _distinct(chunks: Iterable[Ints]) -> Ints:
    """The sorted distinct values of all chunks.

    Runs are merged when the last has grown to half the one before, so every value is sorted O(log chunks) times.
    """
    runs: list[Ints] = []

    def merge() -> None:
        both = np.concatenate([runs.pop(), runs.pop()])
        both.sort()
        runs.append(both[_first_of_runs(both)])

    for chunk in chunks:
        chunk.sort()
        runs.append(chunk[_first_of_runs(chunk)])
        while len(runs) > 1 and 2 * runs[-1].size >= runs[-2].size:
            merge()
    while len(runs) > 1:
        merge()
    return runs[0]
