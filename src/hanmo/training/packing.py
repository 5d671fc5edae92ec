"""Packing: examples of different lengths share rows of one length, so that little is computed for nothing.

Best-fit decreasing (Johnson 1974; for training: Ding et al. 2024, "Fewer Truncations Improve Language Modeling"): the
examples are taken from the longest to the shortest, and each goes to the row where it leaves the least room. No example
is cut. A search tree over the rooms that occur would give O(n log n); a sorted list of them, of which there are at most
as many as a row has tokens, is faster for every context in use.

Where only three or four examples fit into a row (long dialogues), that leaves some per cent of the places empty. So the
rows that are not full are then taken apart, some at a time, and each is filled anew by the sum of lengths that comes
nearest to its room (Gupta and Ho 1999, "minimum bin slack"); the result stands where it needs fewer rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hanmo.language import pick
from hanmo.progress import human_count

ENOUGH = 0.995  # filled so far, a row is full
GROUP = 1024  # examples of rows that are not full, taken apart together


@dataclass(frozen=True)
class Packing:
    """Which examples lie in which row.

    Attributes:
        rows: indices of examples.
        capacity: tokens of a row.
        tokens: of all examples.
    """

    rows: list[list[int]]
    capacity: int
    tokens: int

    @property
    def waste(self) -> float:
        """The share of all places in the rows that stays empty."""
        return 1 - self.tokens / (len(self.rows) * self.capacity) if self.rows else 0.0

    def describe(self) -> str:
        """The result in a line, in the user's language."""
        examples = sum(map(len, self.rows))
        return pick(
            f"packing: {examples:,} examples ({human_count(self.tokens)} tokens) in {len(self.rows):,} rows of "
            f"{self.capacity:,} tokens; {self.waste:.1%} of the places stay empty",
            f"装箱：{examples:,} 个样本（{human_count(self.tokens)} 词元）装入 {len(self.rows):,} 行，每行 "
            f"{self.capacity:,} 词元，空置 {self.waste:.1%}",
        )


def pack(lengths: Sequence[int], capacity: int, seed: int = 0) -> Packing:
    """Put examples into as few rows as best-fit decreasing finds.

    Args:
        lengths: tokens of each example, from 1 to ``capacity``.
        capacity: tokens of a row.
        seed: decides which of equally long examples meet; everything else is determined by the lengths.

    Raises:
        ValueError: a length that no row holds.

    >>> sorted(sorted(row) for row in pack([3, 5, 2, 6], 8).rows)
    [[0, 1], [2, 3]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= capacity:
        raise ValueError(f"lengths from {sizes.min()} to {sizes.max()} do not fit rows of {capacity}")
    shuffled = np.random.default_rng([seed, 4]).permutation(len(sizes))
    order: list[int] = shuffled[np.argsort(-sizes[shuffled], kind="stable")].tolist()
    rows = best_fit(order, sizes.tolist(), capacity)
    return Packing(refill(rows, sizes.tolist(), capacity), capacity, int(sizes.sum()))


def best_fit(order: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """Each example, in order, into the row where it leaves the least room."""
    rows: list[list[int]] = []
    rooms: list[int] = []  # the different rooms of all rows that are not full, ascending
    rows_with: dict[int, list[int]] = {}  # rows of each room
    for index in order:
        size = sizes[index]
        place = bisect_left(rooms, size)
        if place < len(rooms):
            room = rooms[place]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[place], rows_with[room]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > size:
            if room - size not in rows_with:
                insort(rooms, room - size)
                rows_with[room - size] = []
            rows_with[room - size].append(row)
    return rows


def refill(rows: list[list[int]], sizes: list[int], capacity: int) -> list[list[int]]:
    """Take the rows that are not full apart, about ``GROUP`` examples at a time, and fill them better if possible."""
    kept: list[list[int]] = []
    groups: list[list[list[int]]] = [[]]
    count = 0
    for row in rows:
        if sum(sizes[index] for index in row) >= ENOUGH * capacity:
            kept.append(row)
            continue
        if count + len(row) > GROUP and groups[-1]:
            groups.append([])
            count = 0
        groups[-1].append(row)
        count += len(row)
    for group in groups:
        members = sorted((index for row in group for index in row), key=lambda index: -sizes[index])
        better = fill_rows(members, sizes, capacity)
        kept += better if len(better) < len(group) else group
    return kept


def fill_rows(members: list[int], sizes: list[int], capacity: int) -> list[list[int]]:
    """The longest example begins a row, and those whose lengths come nearest to its room join it, until none is left.

    Which sums the first k candidates reach is one bit each of a whole number; going back through these numbers tells
    who makes up the best sum.
    """
    rows = []
    while members:
        room = capacity - sizes[members[0]]
        candidates = [index for index in members[1:] if sizes[index] <= room]
        within, reached = (1 << (room + 1)) - 1, [1]
        for index in candidates:
            reached.append((reached[-1] | reached[-1] << sizes[index]) & within)
            if reached[-1] >> room:
                break
        row, total = [members[0]], reached[-1].bit_length() - 1
        for number in range(len(reached) - 1, 0, -1):
            if not reached[number - 1] >> total & 1:
                row.append(candidates[number - 1])
                total -= sizes[candidates[number - 1]]
        rows.append(row)
        taken = set(row)
        members = [index for index in members if index not in taken]
    return rows
