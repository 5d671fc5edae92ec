"""FastText's vectors of character n-grams, from which a word that was never seen gets a vector.

Bojanowski et al., "Enriching Word Vectors with Subword Information" (TACL 2017). A word between angle brackets is cut
into its n-grams; the 32-bit FNV-1a hash of an n-gram's UTF-8 bytes (each byte taken as a signed number, as the authors'
program does), modulo the number of buckets, is its row in the table. The vector of an unseen word is the mean of its
rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hanmo.text.language import identify

Floats = NDArray[np.float32]

FNV_OFFSET, FNV_PRIME = 2166136261, 16777619
MAX_BUCKETS = 2_000_000  # the usual number; more than the n-grams of any corpus need
MIN_BUCKETS = 1024
LENGTHS = (3, 6)  # of n-grams, the usual ones
CHINESE_LENGTHS = (1, 3)  # a character is a morpheme, and with its brackets most words have four characters
LONGEST_WORD = 256  # characters; longer "words" are no words, and their n-grams say nothing


def fnv_hash(data: bytes) -> int:
    """32-bit FNV-1a with signed bytes.

    >>> fnv_hash(b"<ab"), fnv_hash("中".encode())
    (1218209508, 3930512628)
    """
    value = FNV_OFFSET
    for byte in data:
        value ^= byte if byte < 0x80 else byte | 0xFFFFFF00
        value = value * FNV_PRIME & 0xFFFFFFFF
    return value


def ngrams(word: str, shortest: int, longest: int) -> Iterator[str]:
    """The character n-grams of ``<word>``; the brackets alone are none.

    >>> list(ngrams("中国", 1, 2))
    ['<中', '中', '中国', '国', '国>']
    """
    text = f"<{word}>"
    for begin in range(len(text)):
        for end in range(begin + shortest, min(begin + longest, len(text)) + 1):
            if end > begin + 1 or 0 < begin < len(text) - 1:
                yield text[begin:end]


def choose_lengths(words: Iterable[str]) -> tuple[int, int]:
    """The lengths of n-grams that suit a vocabulary: short ones where most of it is Chinese."""
    return CHINESE_LENGTHS if identify(" ".join(words)) == "zh" else LENGTHS


def choose_buckets(words: Iterable[str], lengths: tuple[int, int]) -> int:
    """A power of two of at least twice the distinct n-grams, so that few of them share a row."""
    distinct = len({gram for word in words for gram in ngrams(word, *lengths)})
    return min(MAX_BUCKETS, max(MIN_BUCKETS, 1 << (2 * distinct - 1).bit_length()))


@dataclass
class Subwords:
    """The table of n-gram vectors, float32 [buckets, D], and the lengths of the n-grams."""

    table: Floats
    shortest: int
    longest: int

    def rows(self, word: str) -> list[int]:
        """The rows of a word's n-grams; none for a text that is too long to be a word."""
        if len(word) > LONGEST_WORD:
            return []
        grams = ngrams(word, self.shortest, self.longest)
        return [fnv_hash(gram.encode("utf-8", "replace")) % len(self.table) for gram in grams]

    def vector(self, word: str) -> Floats | None:
        """The mean of the n-gram vectors, float32 [D]; None for a word that is shorter than every n-gram."""
        rows = self.rows(word)
        if not rows:
            return None
        mean: Floats = np.add.reduce(self.table[rows]) / np.float32(len(rows))
        return mean
