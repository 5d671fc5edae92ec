"""A dictionary learnt from pairs of sentences: IBM Model 1 (Brown et al. 1993), by expectation maximization.

The model says that every target word is the translation of one source word, or of none, wherever the two stand. Then
each round shares every target word out among the source words of its sentence, in proportion to what the last round
believes, and believes the sums. One round is a few passes over arrays with an entry for each pair of words that meet
in a sentence, so tens of thousands of sentences take seconds.

Letters in names: S source words of the vocabulary (0 is none), T target words, C pairs of them that ever meet,
M meetings in sentences.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import DataError
from hanmo.language import pick
from hanmo.settings import notice

ROUNDS = 8
MOST_WORDS = 80  # of a sentence; the meetings of longer ones would grow with the square, and say little
MOST_MEETINGS = 25_000_000  # about 1.5 GB while learning
NONE = ""  # the source word of target words that translate nothing

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class LexicalTable:
    """Which words translate a word, and how probably.

    Args:
        rounds: of expectation maximization.

    Attributes:
        best: of each source word its likeliest translation.

    >>> pairs = [("das haus", "the house"), ("das buch", "the book"), ("ein buch", "a book")]
    >>> LexicalTable().fit([(source.split(), target.split()) for source, target in pairs]).best["buch"]
    'book'
    """

    def __init__(self, rounds: int = ROUNDS) -> None:
        self.rounds = rounds
        self.best: dict[str, str] = {}
        self.source: list[str] = []
        self.target: list[str] = []
        self.source_C = self.target_C = np.zeros(0, dtype=np.int64)
        self.probability_C = np.zeros(0)

    def fit(self, pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> LexicalTable:
        """Learn from pairs of sentences, each a list of words.

        Raises:
            DataError: there is no pair with words on both sides.
        """
        kept = [(source, target) for source, target in pairs if source and target]
        usable = [(source[:MOST_WORDS], target[:MOST_WORDS]) for source, target in kept]
        usable = within_memory(usable)
        if not usable:
            raise DataError(
                "there are no pairs of sentences with words on both sides",
                fix="give pairs of texts and their translations",
                zh="没有两侧都含词的句对，请给出原文与译文",
            )
        source_number, target_number = {NONE: 0}, dict[str, int]()
        meetings = [numbered(source, target, source_number, target_number) for source, target in usable]
        self.source, self.target = list(source_number), list(target_number)
        lengths_N = np.array([len(source) for source, _ in meetings])
        position_M = np.repeat(
            np.arange(sum(len(target) for _, target in meetings)),
            np.repeat(lengths_N, [len(target) for _, target in meetings]),
        )  # which word of all target sentences a meeting explains
        width = len(self.target)
        keys_M = np.concatenate([(source[None, :] * width + target[:, None]).ravel() for source, target in meetings])
        keys_C, pair_M = np.unique(keys_M, return_inverse=True)
        del keys_M
        self.source_C, self.target_C = np.divmod(keys_C, width)
        self.probability_C = self.learn(pair_M.astype(np.int32), position_M.astype(np.int32))
        self.best = self.choose()
        return self

    def learn(self, pair_M: NDArray[np.int32], position_M: NDArray[np.int32]) -> Floats:
        """The probability of each pair's target word given its source word, ``[C]``, after all rounds."""
        probability_C = np.full(len(self.source_C), 1.0)
        for _ in range(self.rounds):
            share_M = probability_C[pair_M]
            share_M /= np.bincount(position_M, share_M)[position_M]
            count_C = np.bincount(pair_M, share_M, minlength=len(self.source_C))
            probability_C = count_C / np.bincount(self.source_C, count_C)[self.source_C]
        return probability_C

    def choose(self) -> dict[str, str]:
        """The likeliest target word of each source word; of two the one that is met first."""
        order_C = np.lexsort((self.target_C, -self.probability_C, self.source_C))
        sources_C = self.source_C[order_C]
        first = np.flatnonzero(np.diff(sources_C, prepend=-1))
        chosen = order_C[first]
        return {
            self.source[s]: self.target[t]
            for s, t in zip(self.source_C[chosen].tolist(), self.target_C[chosen].tolist(), strict=True)
            if s
        }

    def translations(self, word: str, n: int = 5) -> list[tuple[str, float]]:
        """The likeliest translations of a source word with their probabilities; none of a word that was never seen."""
        if word not in self.best:
            return []
        rows = np.flatnonzero(self.source_C == self.source.index(word))
        likely = rows[np.argsort(-self.probability_C[rows], kind="stable")][:n]
        return [(self.target[self.target_C[row]], float(self.probability_C[row])) for row in likely.tolist()]


def numbered(
    source: Sequence[str], target: Sequence[str], source_number: dict[str, int], target_number: dict[str, int]
) -> tuple[Ints, Ints]:
    """The numbers of the words of a pair, the source's with none before them; new words get the next numbers."""
    return (
        np.array([0, *(source_number.setdefault(word, len(source_number)) for word in source)], dtype=np.int64),
        np.array([target_number.setdefault(word, len(target_number)) for word in target], dtype=np.int64),
    )


def within_memory(
    pairs: list[tuple[Sequence[str], Sequence[str]]],
) -> list[tuple[Sequence[str], Sequence[str]]]:
    """All pairs, or as many, evenly spread, as memory bears."""
    meetings = sum((1 + len(source)) * len(target) for source, target in pairs)
    if meetings <= MOST_MEETINGS:
        return pairs
    step = -(-meetings // MOST_MEETINGS)
    notice(
        pick(
            f"the dictionary is learnt from every {step}th of the {len(pairs):,} pairs, for memory",
            f"为节省内存，词典只从 {len(pairs):,} 个句对中每 {step} 个取 1 个学习",
        )
    )
    return pairs[::step]
