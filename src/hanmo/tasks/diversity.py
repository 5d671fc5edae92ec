"""How varied generated texts are, how much they repeat themselves, and how much they copy from the training text.

============  ==========================================================================================================
distinct-n    different n-grams over all n-grams of all texts (Li et al. 2016, *A Diversity-Promoting Objective
              Function for Neural Conversation Models*); falls with the amount of text, so compare equal amounts
self-BLEU     BLEU of each text with the others as its references, averaged (Zhu et al. 2018, *Texygen*); through
              sacreBLEU; low is varied
repetition    n-grams of a text that stood earlier in the same text (Welleck et al. 2020, *Neural Text Generation with
              Unlikelihood Training*: seq-rep-n)
copying       n-grams that stand in the training text word for word, and the longest stretch that does
============  ==========================================================================================================

A unit is a Chinese character or a word (``units``), so that texts in both languages can be measured alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import UsageError, missing_package
from hanmo.language import pick

# A character of Chinese or Japanese script by itself, else a word with its apostrophe, else a sign that is no space.
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\U00020000-\U0003ffff"
UNIT = re.compile(rf"[{HAN}]|(?:(?![{HAN}_])\w)+(?:['’](?:(?![{HAN}_])\w)+)*|[^\w\s]|_")
SELF_BLEU_TEXTS = 200  # texts scored; a mean over more changes the second digit seldom
SELF_BLEU_REFERENCES = 50  # others that each is compared with


def units(text: str) -> list[str]:
    """Cut a text into what is counted: Chinese characters, words in small letters, punctuation marks.

    >>> units("春眠不觉晓, don't STOP!")
    ['春', '眠', '不', '觉', '晓', ',', "don't", 'stop', '!']
    """
    return UNIT.findall(unicodedata.normalize("NFC", text).lower())


def number(texts: Sequence[Sequence[str]], known: dict[str, int] | None = None) -> list[NDArray[np.int64]]:
    """The units as numbers, the same unit the same number everywhere; ``known`` is added to."""
    table = known if known is not None else {}
    return [np.array([table.setdefault(unit, len(table)) for unit in text], dtype=np.int64) for text in texts]


def check_order(n: int) -> None:
    if n < 1:
        raise UsageError(
            f"n-grams need an n of 1 or more, not {n}",
            fix="2, 3 and 4 are usual",
            zh=f"n 元组的 n 须不小于 1，现在是 {n}；常用 2、3、4",
        )


def grams(codes: NDArray[np.int64], n: int, size: int) -> NDArray[np.int64]:
    """Every n-gram of a row of numbers below ``size`` as one number; equal n-grams, and only those, get equal numbers.

    Returns:
        int64, ``(len(codes) - n + 1,)``, at least 0 long. The numbers are exact: where ``size ** n`` is beyond int64,
        they are numbered anew after each step, so they may be compared within one call only.
    """
    count = max(0, len(codes) - n + 1)
    result = codes[:count].copy()
    span = size
    for step in range(1, n):
        if span > 2**62 // max(size, 1):
            found, result = np.unique(result, return_inverse=True)
            span = len(found)
        result = result * size + codes[step : step + count]
        span *= size
    return result


def joined(rows: Sequence[NDArray[np.int64]], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The n-grams of all rows, numbered together, none across two rows, and the row of each."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    together = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    size = int(together.max(initial=0)) + 1
    row_of = np.repeat(np.arange(len(rows)), lengths)
    every = grams(together, n, size)
    inside = row_of[: len(every)] == row_of[n - 1 :][: len(every)]
    return every[inside], row_of[: len(every)][inside]


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Distinct-n of the texts together; 0.0 where no text has n units.

    >>> distinct([["a", "b", "a", "b"], ["a", "c"]], 2)
    0.75
    """
    check_order(n)
    found, _ = joined(number(texts), n)
    return len(np.unique(found)) / len(found) if len(found) else 0.0


def repetition(texts: Sequence[Sequence[str]], n: int = 4) -> NDArray[np.float64]:
    """For each text, the share of its n-grams that stood earlier in the same text (seq-rep-n).

    Returns:
        float64, one number per text from 0.0 to below 1.0; 0.0 for a text shorter than n.

    >>> repetition([["la", "la", "la", "la"], ["a", "b"]], 1).tolist()
    [0.75, 0.0]
    """
    check_order(n)
    found, row_of = joined(number(texts), n)
    total = np.bincount(row_of, minlength=len(texts))
    codes = np.unique(found, return_inverse=True)[1]
    pairs = np.unique(np.stack([row_of, codes]), axis=1)[0] if len(found) else row_of
    different = np.bincount(pairs, minlength=len(texts))
    return 1.0 - np.where(total > 0, different / np.maximum(total, 1), 1.0)


@dataclass(frozen=True)
class SelfBleu:
    """Self-BLEU with what is needed to reproduce it.

    Args:
        score: the mean of ``scores``, 0 to 100.
        scores: of each text scored, float64; what a bootstrap draws from.
        signature: sacreBLEU's own, with the number of references and the seed.
    """

    score: float
    scores: NDArray[np.float64]
    signature: str


def self_bleu(
    texts: Sequence[str],
    language: str = "en",
    *,
    sample: int = SELF_BLEU_TEXTS,
    references: int = SELF_BLEU_REFERENCES,
    seed: int = 1234,
) -> SelfBleu:
    """BLEU-4 of each text against the others (sentence BLEU, exponential smoothing, effective order).

    Args:
        texts: at least two.
        language: ``zh`` cuts Chinese into characters (sacreBLEU's ``zh``), all else its ``13a``.
        sample: texts that are scored, drawn without replacement where there are more.
        references: other texts that each is compared with, drawn likewise. More references make a higher score, so
            the number belongs to the result and stands in its signature.

    Raises:
        UsageError: fewer than two texts.
        ResourceError: sacreBLEU is not installed.
    """
    if len(texts) < 2 or sample < 1 or references < 1:
        raise UsageError(
            f"self-BLEU compares a text with others, and there are {len(texts)}",
            fix="generate two texts or more; sample and references are 1 or more",
            zh=f"self-BLEU 要与其他文本比较，现在只有 {len(texts)} 篇；请至少生成两篇（sample 与 references 不小于 1）",
        )
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise missing_package("sacrebleu", "metrics", pick("self-BLEU", "计算 self-BLEU")) from error
    metric = BLEU(tokenize="zh" if language == "zh" else "13a", effective_order=True)
    draw = np.random.default_rng(seed)
    chosen = range(len(texts))
    if len(texts) > sample:
        chosen = np.sort(draw.choice(len(texts), sample, replace=False)).tolist()
    scores = []
    for place in chosen:
        others = np.delete(np.arange(len(texts)), place)
        if len(others) > references:
            others = draw.choice(others, references, replace=False)
        scores.append(metric.sentence_score(texts[place], [texts[int(other)] for other in others]).score)
    compared = min(references, len(texts) - 1)
    signature = f"{metric.get_signature()}|self:{compared}of{len(texts) - 1}|texts:{len(scores)}|seed:{seed}"
    return SelfBleu(float(np.mean(scores)), np.array(scores, dtype=np.float64), signature)


@dataclass(frozen=True)
class Copying:
    """What texts share with the training text, word for word.

    Args:
        share: of each text, the n-grams that stand in the training text, 0.0 to 1.0, float64.
        longest: of each text, the length of its longest stretch found there, in units, int64.
        stretch: the longest stretch of all, as its units; the first of several equal ones.
    """

    share: NDArray[np.float64]
    longest: NDArray[np.int64]
    stretch: tuple[str, ...]


class Training:
    """The training text, made ready to be searched: a suffix array over its units.

    Any stretch of any length is then found by binary search; one array serves n-grams of every n. Building it takes
    O(u log² u) steps and 40 bytes for each of the u units (numpy alone: prefix doubling, Manber and Myers 1990); for
    a text of many millions of units, give a sample of its documents and say so.

    Args:
        texts: the documents, as units; no stretch is found across two of them.
    """

    def __init__(self, texts: Iterable[Sequence[str]]) -> None:
        self.table: dict[str, int] = {}
        rows = number(list(texts), self.table)
        border = len(self.table)  # one number for all borders: no text holds it
        pieces = [piece for row in rows for piece in (row, np.array([border], dtype=np.int64))]
        self.codes = np.concatenate([np.zeros(0, dtype=np.int64), *pieces])
        self.order = suffix_array(self.codes)

    def copied(self, texts: Sequence[Sequence[str]], n: int = 5) -> Copying:
        """Compare texts with the training text.

        Args:
            texts: as units, cut in the same way as the training text.
            n: the n-grams counted in ``share``.
        """
        check_order(n)
        coded = [np.array([self.table.get(unit, -1) for unit in text], dtype=np.int64) for text in texts]
        lengths = self.matches(coded)
        shares, longest = [], []
        best: tuple[str, ...] = ()
        for text, found in zip(texts, lengths, strict=True):
            starts = found[: max(0, len(text) - n + 1)]
            shares.append(float(np.mean(starts >= n)) if len(starts) else 0.0)
            longest.append(int(found.max(initial=0)))
            if longest[-1] > len(best):
                begin = int(found.argmax())
                best = tuple(text[begin : begin + longest[-1]])
        return Copying(np.array(shares, dtype=np.float64), np.array(longest, dtype=np.int64), best)

    def matches(self, rows: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """For every place of every row, how long a stretch from there on stands in the training text.

        All places are searched at once: each holds the range of the suffix array whose suffixes begin with the
        stretch so far, and narrows it by one unit per round, until its range is empty.
        """
        bounds = np.cumsum([0, *(len(row) for row in rows)])
        codes = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
        ends = np.repeat(bounds[1:], [len(row) for row in rows])
        length = np.zeros(len(codes), dtype=np.int64)
        alive = np.arange(len(codes))
        low = np.zeros(len(codes), dtype=np.int64)
        high = np.full(len(codes), len(self.order), dtype=np.int64)
        while len(alive):
            depth = length[alive[0]]  # the same for all that are alive
            alive = alive[(alive + depth < ends[alive])]
            wanted = codes[alive + depth]
            left = self.narrow(low[alive], high[alive], depth, wanted, False)
            right = self.narrow(low[alive], high[alive], depth, wanted, True)
            found = (left < right) & (wanted >= 0)
            low[alive], high[alive] = left, right
            alive = alive[found]
            length[alive] += 1
        return [length[bounds[i] : bounds[i + 1]] for i in range(len(rows))]

    def narrow(
        self, low: NDArray[np.int64], high: NDArray[np.int64], depth: int, wanted: NDArray[np.int64], after: bool
    ) -> NDArray[np.int64]:
        """Binary search in each range for where ``wanted`` stands at ``depth``: first place, or the one after."""
        low, high = low.copy(), high.copy()
        while True:
            active = low < high
            if not active.any():
                return low
            middle = (low + high) // 2
            place = self.order[np.minimum(middle, len(self.order) - 1)] + depth
            unit = np.where(place < len(self.codes), self.codes[np.minimum(place, len(self.codes) - 1)], -1)
            before = (unit <= wanted) if after else (unit < wanted)
            low = np.where(active & before, middle + 1, low)
            high = np.where(active & ~before, middle, high)


def suffix_array(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places of a row of numbers in the order of the suffixes that begin there.

    >>> suffix_array(np.array([1, 0, 2, 0, 2, 0])).tolist()  # b a n a n a
    [5, 3, 1, 0, 4, 2]
    """
    size = len(codes)
    if size == 0:
        return np.zeros(0, dtype=np.int64)
    rank = np.unique(codes, return_inverse=True)[1].astype(np.int64)
    order = np.argsort(rank, kind="stable").astype(np.int64)
    step = 1
    while step < size and int(rank[order[-1]]) < size - 1:
        later = np.zeros(size, dtype=np.int64)
        later[:-step] = rank[step:] + 1
        key = rank * (size + 1) + later
        order = np.argsort(key, kind="stable").astype(np.int64)
        ordered = key[order]
        rank = np.empty(size, dtype=np.int64)
        rank[order] = np.concatenate([[0], np.cumsum(ordered[1:] != ordered[:-1])])
        step *= 2
    return order
