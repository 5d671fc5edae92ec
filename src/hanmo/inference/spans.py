"""Long inputs in overlapping windows, and what their pieces say together: labels of words, answers in a text.

Letters in names: W words or windows, T tokens, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """The best span of a context for a question.

    Attributes:
        text: the span, ``context[start:end]``; empty where the context is.
        start, end: characters of the context.
        score: the logit of its first token plus that of its last.
        no_answer_score: the same sum at the first token of the input, by which networks trained on SQuAD 2 say that the
            context holds no answer (Rajpurkar et al. 2018); the lowest of all windows.
        probability: that of its two ends, among all tokens of its window.
    """

    text: str
    start: int
    end: int
    score: float
    no_answer_score: float
    probability: float

    @property
    def answerable(self) -> bool:
        """Whether the span scores higher than no answer; means nothing in a network not trained to say so."""
        return self.score > self.no_answer_score


@dataclass(frozen=True)
class Span:
    """Tokens ``first`` to ``last`` of a window, with the scores of :class:`Answer`."""

    first: int
    last: int
    score: float
    no_answer_score: float
    probability: float


def word_windows(sizes: Sequence[int], room: int, overlap: int) -> list[tuple[int, int]]:
    """Cover words of so many tokens each by windows of at most ``room`` tokens that share about ``overlap``.

    >>> word_windows([1, 1, 3, 1, 1, 1], 5, 2)
    [(0, 3), (2, 5), (3, 6)]
    """
    spans: list[tuple[int, int]] = []
    start = 0
    while True:
        end, used = start, 0
        while end < len(sizes) and (used + sizes[end] <= room or end == start):
            used += sizes[end]
            end += 1
        spans.append((start, end))
        if end >= len(sizes):
            return spans
        back, shared = end, 0
        while back > start + 1 and shared < overlap:
            back -= 1
            shared += sizes[back]
        while back < end and sum(sizes[back : end + 1]) > room:  # the next window must reach one word further
            back += 1
        start = back


def stitch(spans: Sequence[tuple[int, int]], pieces_WL: Sequence[Tensor], length: int) -> Tensor:
    """The scores of all words, ``[length, L]``: each taken from the window in which it stands farthest from a cut."""
    result = pieces_WL[0].new_zeros(length, pieces_WL[0].size(1))
    margins = torch.full((length,), -1)
    for (start, end), piece_WL in zip(spans, pieces_WL, strict=True):
        place = torch.arange(start, end)
        left = place - start if start else torch.full_like(place, length)
        right = end - 1 - place if end < length else torch.full_like(place, length)
        margin = torch.minimum(left, right)
        better = margin > margins[start:end]
        margins[start:end][better] = margin[better]
        result[start:end][better] = piece_WL[better]
    return result


def best_span(scores_T2: Tensor, first: int, count: int, longest: int) -> Span:
    """The best span of at most ``longest`` tokens among ``count`` tokens from ``first`` on, of one window's scores.

    ``first`` and ``last`` of the result count from ``first``.
    """
    no_answer = float(scores_T2[0].sum())
    start_C, end_C = scores_T2[first : first + count].unbind(1)
    best, place, width = float("-inf"), 0, 1
    for more in range(min(longest, count)):
        sums = start_C[: count - more] + end_C[more:]
        value, index = sums.max(0)
        if float(value) > best:
            best, place, width = float(value), int(index), more + 1
    # The first token counts as a candidate; the question and the other control tokens do not.
    start_p = torch.cat((scores_T2[:1, 0], start_C)).softmax(0)[1 + place]
    end_p = torch.cat((scores_T2[:1, 1], end_C)).softmax(0)[place + width]
    return Span(place, place + width - 1, best, no_answer, float(start_p * end_p))
