"""Counting the n-grams of documents as they stream by, with numpy alone: sort, compare neighbours, look up.

Documents are read once and not kept. A chunk of them is laid out as one stream of ids, and its n-grams of every order
are counted in tables of sorted keys, ``prefix_row * vocab_size + last_word``, where ``prefix_row`` is the row of the
prefix one order below. Two such sets of tables merge without sorting, because merging keeps the rows of each in their
order. The memory is that of the distinct n-grams and of one chunk.
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

CHUNK_TOKENS = 1 << 20


@dataclass
class Counts:
    """The n-grams of one order: sorted keys, and how often each occurs."""

    keys: Ints
    occurrences: Ints


@dataclass
class Chunk:
    """A laid-out piece of the stream; its first ``left`` entries were counted before and only give context."""

    ids: Ints
    starts: Marks
    left: int


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
        raise DataError(
            f"expected a one-dimensional array of integer ids, got shape {ids.shape} of {ids.dtype}",
            zh=f"需要一维整数编号数组，得到的是形状为 {ids.shape} 的 {ids.dtype}",
        )


def lay_out(ids: Ints, bos_id: int, eos_id: int, *, inside: bool = False) -> tuple[Ints, Marks]:
    """Put ``bos_id`` before each document of a flat stream; return the stream and where those document starts are.

    ``inside`` says that the stream begins within a document.
    """
    first = np.flatnonzero(ids[:-1] == eos_id) + 1
    if ids.size and not inside:
        first = np.append(0, first)
    stream = np.insert(ids, first, bos_id)
    starts = np.zeros(stream.size, dtype=bool)
    starts[first + np.arange(first.size)] = True
    return stream, starts


def read_chunks(
    documents: Iterable[ArrayLike], order: int, vocab_size: int, bos_id: int, eos_id: int, chunk_tokens: int
) -> Iterator[Chunk]:
    """The documents as one laid-out stream of the smallest integer type, about ``chunk_tokens`` at a time."""
    dtype = np.min_scalar_type(vocab_size - 1)
    tail, tail_starts = np.zeros(0, dtype=dtype), np.zeros(0, dtype=bool)
    inside = False
    total = 0
    for ids in _pieces(documents, np.array([eos_id], dtype=dtype), chunk_tokens):
        check_ids(ids, vocab_size, total)
        ids = ids.astype(dtype, copy=False)
        if bos_id != eos_id and (ids == bos_id).any():
            raise DataError(
                f"a document contains the document start, id {bos_id}",
                why="the model puts it before each document itself",
                fix="encode the documents without it",
                zh=f"文档中含有文档起始符（编号 {bos_id}），模型会自行添加它；编码文档时请不要加入",
            )
        stream, starts = lay_out(ids, bos_id, eos_id, inside=inside)
        stream, starts = np.concatenate([tail, stream]), np.concatenate([tail_starts, starts])
        yield Chunk(stream, starts, tail.size)
        keep = max(0, stream.size - (order - 1))
        tail, tail_starts = stream[keep:].copy(), starts[keep:].copy()
        inside = bool(ids[-1] != eos_id)
        total += ids.size
    if not total:
        raise DataError("there are no documents to count n-grams in", zh="没有可供统计的文档")


def _pieces(documents: Iterable[ArrayLike], end: Ints, chunk_tokens: int) -> Iterator[Ints]:
    """The documents, each with its end, joined and cut into arrays of about ``chunk_tokens`` ids."""
    pending: list[Ints] = []
    size = 0
    for document in documents:
        ids = np.asarray(document)
        check_shape(ids)
        if not ids.size:
            ids = end
        ended = bool(ids[-1] == end[0])
        while size + ids.size > chunk_tokens:  # a document may be as long as a whole corpus
            cut = max(0, chunk_tokens - size)
            yield np.concatenate([*pending, ids[:cut]])
            pending, size, ids = [], 0, ids[cut:]
        pending += [ids] if ended else [ids, end]
        size += ids.size + int(not ended)
    if pending:
        yield np.concatenate(pending)


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


def suffix_rows(keys: Ints, lower_keys: Ints, lower_suffixes: Ints | None, vocab_size: int) -> Ints:
    """For each n-gram the row, one order below, of the n-gram without its first word.

    The suffix of ``w1 .. wn`` is the suffix of its prefix with ``wn`` behind it; without ``lower_suffixes`` the
    n-grams are bigrams.
    """
    prefixes, words = np.divmod(keys, vocab_size)
    if lower_suffixes is None:
        return _narrow(words)
    return _narrow(find_rows(lower_keys, lower_suffixes[prefixes].astype(np.int64) * vocab_size + words))


def count_ngrams(chunks: Iterable[Chunk], order: int, vocab_size: int) -> list[Counts]:
    """Count the n-grams of each order, lowest first; the unigrams are the whole vocabulary.

    A chunk's tables are merged into the ones before when they have grown to half their size, so every n-gram is merged
    O(log chunks) times.
    """
    runs: list[list[Counts]] = []
    for chunk in chunks:
        runs.append(_count_chunk(chunk, order, vocab_size))
        while len(runs) > 1 and 2 * _size(runs[-1]) >= _size(runs[-2]):
            runs.append(_merge(runs.pop(), runs.pop(), vocab_size))
    while len(runs) > 1:
        runs.append(_merge(runs.pop(), runs.pop(), vocab_size))
    return runs[0]


def _size(run: list[Counts]) -> int:
    """N-grams of two words or more: the unigrams are always the vocabulary."""
    return sum(counts.keys.size for counts in run[1:])


def _count_chunk(chunk: Chunk, order: int, vocab_size: int) -> list[Counts]:
    """The n-grams of one chunk; those that end in its left context are there as prefixes, 0 times."""
    ids, starts, left = chunk.ids, chunk.starts, chunk.left
    run = [Counts(np.arange(vocab_size), np.bincount(ids[left:][~starts[left:]], minlength=vocab_size))]
    rows = ids.astype(np.int64)  # of the n-gram that ends at each position
    for n in range(2, order + 1):
        at, keys = contexts_of(rows, starts)
        keys *= vocab_size
        keys += ids[at]
        by_key = np.argsort(keys)
        keys, at = keys[by_key], at[by_key]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        lengths = np.diff(first, append=keys.size)
        own_rows = np.repeat(np.arange(first.size), lengths)
        before = np.bincount(own_rows[at < left], minlength=first.size)
        run.append(Counts(keys[first], _narrow(lengths - before)))
        if n < order:
            rows = np.full(ids.size, -1)
            rows[at] = own_rows
    return run


def _merge(one: list[Counts], other: list[Counts], vocab_size: int) -> list[Counts]:
    """The n-grams of both; the two lists are emptied on the way, to free their memory."""
    merged = [Counts(one[0].keys, one[0].occurrences + other[0].occurrences)]
    rows_one = rows_other = one[0].keys
    one.reverse()
    other.reverse()
    for run in (one, other):
        run.pop()
    while one:
        a, b = one.pop(), other.pop()
        keys, added = _renumber(a.keys, rows_one, vocab_size), _renumber(b.keys, rows_other, vocab_size)
        near = np.searchsorted(keys, added)
        is_new = np.append(keys, -1)[near] != added
        places = near[is_new]
        rows_one = np.arange(keys.size) + np.cumsum(np.bincount(places, minlength=keys.size + 1))[:-1]
        rows_other = np.empty(added.size, dtype=np.int64)
        rows_other[is_new] = places + np.arange(places.size)
        rows_other[~is_new] = rows_one[near[~is_new]]
        occurrences = np.zeros(keys.size + places.size, dtype=np.int64)
        occurrences[rows_one] = a.occurrences
        occurrences[rows_other] += b.occurrences
        merged.append(Counts(np.insert(keys, places, added[is_new]), _narrow(occurrences)))
    return merged


def _renumber(keys: Ints, rows: Ints, vocab_size: int) -> Ints:
    """Keys whose prefixes have moved to ``rows``; their order is kept."""
    prefixes = keys // vocab_size
    moved: Ints = keys + (rows[prefixes] - prefixes) * vocab_size
    return moved


def _narrow(numbers: Ints) -> Ints:
    """The numbers in 32 bits where they fit."""
    return numbers.astype(np.int32) if int(numbers.max(initial=0)) < 2**31 else numbers
