"""Guesses of the next tokens, which the network then confirms or corrects: several tokens in the time of one.

A guess is read together with the token it follows. Each place of it is decided exactly as without a guess, by the same
settings and the same draws; guesses that were not taken are forgotten. So the text is the same with and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from hanmo.inference.networks import Network, Piece

GRAM = 3  # tokens that must have occurred before in the same order
MOST = 8  # tokens of a guess
PAUSE = 16  # tokens without a guess after several that were wrong
HOPELESS = 0.15  # share of right tokens, below which guesses pause


class Guesser(Protocol):
    """Guesses the next tokens of one text."""

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """At most ``most`` tokens that may follow; ``ids`` is the text so far, which only grows from call to call."""
        ...

    def learn(self, guessed: int, right: int) -> None:
        """How many tokens of the last guess were right."""
        ...

    def release(self) -> None:
        """The text is finished."""
        ...


class PromptLookup:
    """Guesses that what followed the last tokens before follows them again (Saxena 2023; Yang et al. 2023).

    Answers quote their prompts: summaries, corrections, code, answers to questions about a passage. Where they do not,
    few guesses are made: their number grows with those that were right, and pauses where none is.
    """

    def __init__(self) -> None:
        self.places: dict[tuple[int, ...], int] = {}  # the last tokens: the place after them
        self.known = 0  # of the text, tokens whose places are noted
        self.length = 4
        self.share = 0.5  # of guessed tokens that were right, lately
        self.pause = 0

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """What stands after the last place where the last tokens occurred."""
        for end in range(max(self.known, GRAM), len(ids)):  # the last tokens themselves come with the next call
            self.places[tuple(ids[end - GRAM : end])] = end
        self.known = len(ids)
        if self.pause:
            self.pause -= 1
            return []
        place = self.places.get(tuple(ids[-GRAM:]))
        return [] if place is None else list(ids[place : place + min(self.length, most)])

    def learn(self, guessed: int, right: int) -> None:
        """Guess more where guesses are right."""
        if not guessed:
            return
        self.share += 0.25 * (right / guessed - self.share)
        self.length = min(MOST, self.length + 2) if right == guessed else max(2, right + 1)
        if self.share < HOPELESS:
            self.pause, self.share = PAUSE, 2 * HOPELESS

    def release(self) -> None:
        """Nothing is held."""


class DraftModel:
    """Guesses what a smaller network of the same vocabulary would write (Leviathan et al. 2023; Chen et al. 2023).

    Args:
        network: the smaller network.
        size: tokens from here on are not guessed.
    """

    def __init__(self, network: Network, size: int) -> None:
        self.network, self.size = network, size
        self.text: Any = None
        self.length = 4

    def guess(self, ids: Sequence[int], most: int) -> list[int]:
        """The most probable tokens one after the other."""
        if self.text is None:
            self.text, _ = self.network.open(ids, most + 1, None)
        if self.network.room(len(ids)) <= 1:
            return []
        most = min(most, self.length, self.network.room(len(ids)) - 1)
        self.text.trim(min(self.text.length, len(ids) - 1))
        unread, found = list(ids[self.text.length :]), list[int]()
        while len(found) < most:
            while len(unread) > self.network.piece:
                self.network.read([Piece(self.text, unread[: self.network.piece], 0)])
                del unread[: self.network.piece]
            logits_1V = self.network.read([Piece(self.text, unread)])[:, : self.size]
            found.append(int(logits_1V.argmax()))
            unread = found[-1:]
        return found

    def learn(self, guessed: int, right: int) -> None:
        """Guess more where guesses are right."""
        if guessed:
            self.length = min(MOST, self.length + 1) if right == guessed else max(1, self.length - 1)

    def release(self) -> None:
        """Give the smaller network's text back."""
        if self.text is not None:
            self.text.release()
            self.text = None
