"""How texts become rows of tokens for a network that reads: what is cut, windows of long texts, the tokens of words.

Training and inference must agree on this exactly, so both take it from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hanmo.text.tokenizer import Tokenizer

UNBOUNDED = 4096  # tokens of one row where a network has no limit of its own
OVERLAP = 128  # tokens that two windows of a long input share, at most half of one


def padding_id(tokenizer: Tokenizer) -> int:
    """The id that fills rows up, and stands for a word or text without tokens."""
    return next(id for id in (tokenizer.pad_id, tokenizer.eos_id, 0) if id is not None)


def shorten(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens of one text or of a pair are kept: the longer of a pair is cut first.

    >>> shorten([9, 3], 8), shorten([9, 9], 7)
    ([5, 3], [3, 4])
    """
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    small, large = sorted(lengths)
    large = min(large, max(small, room - small))
    if small + large > room:
        small, large = room // 2, room - room // 2
    return [large, small] if lengths[0] > lengths[1] else [small, large]


def windows(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Cover ``range(length)`` by windows of at most ``size``, each sharing ``overlap`` with the one before.

    >>> windows(10, 6, 2), windows(0, 6, 2)
    ([(0, 6), (4, 10)], [(0, 0)])
    """
    spans = [(0, min(size, length))]
    while spans[-1][1] < length:
        start = spans[-1][1] - overlap
        spans.append((start, min(start + size, length)))
    return spans


def spaced_words(words: Sequence[str]) -> list[bool]:
    """Whether a space stands before each word of a list: not before the first, nor before a Han character.

    >>> spaced_words(["the", "moon", "明月"])
    [False, True, False]
    """
    return [index > 0 and not "\u3400" <= word[:1] <= "\u9fff" for index, word in enumerate(words)]


def word_pieces(tokenizer: Tokenizer, words: Sequence[str], spaced: Sequence[bool]) -> list[list[int]]:
    """The ids of each word, every word encoded by itself; none is empty.

    Args:
        tokenizer: one that joins spaces to words gets the space before a word.
        words: any strings.
        spaced: whether a space stands before each.

    Raises:
        DataError: a lone surrogate.
    """
    prefixed = tokenizer.is_byte_level
    pieces = tokenizer.encode_batch(
        [f" {word}" if prefixed and space else word for word, space in zip(words, spaced, strict=True)]
    )
    return [piece or [padding_id(tokenizer)] for piece in pieces]
