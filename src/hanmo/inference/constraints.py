"""Constraints on what is written (:class:`hanmo.inference.sampling.Constraint`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hanmo.errors import UsageError

if TYPE_CHECKING:
    from hanmo.inference.language_model import LanguageModel


class OneOf:
    """The answer is one of some texts, whatever tokens it is written in; then it ends.

    Args:
        model: whose tokens.
        texts: what may be answered, not empty.

    >>> model.generate("The sky is", constraint=OneOf(model, [" blue", " green"]))[0].text      # doctest: +SKIP
    ' blue'

    Raises:
        UsageError: no texts, an empty one, or a model that has no token to end with.
    """

    def __init__(self, model: LanguageModel, texts: Sequence[str]) -> None:
        if not texts or not all(texts):
            raise UsageError("give at least one text, and none that is empty", zh="请给出至少一个非空的文本")
        if not model.eos_ids:
            raise UsageError(
                "this model has no token that ends a text",
                fix="use a model with an end-of-sequence token",
                zh="该模型没有结束符号，请换用有结束符号的模型",
            )
        size = model.engine.vocabulary.size
        self.ends = sorted(id for id in model.eos_ids if id < size)
        self.piece = model.tokenizer.token_bytes
        self.answers = [text.encode() for text in texts]
        special = set(model.tokenizer.special_tokens.values())
        self.inside: dict[bytes, list[int]] = {}  # tokens by their bytes, those only that can be a part of an answer
        for id in range(size):
            piece = b"" if id in special else self.piece(id)
            if piece and any(piece in answer for answer in self.answers):
                self.inside.setdefault(piece, []).append(id)

    def allowed(self, ids: Sequence[int]) -> list[int]:
        """Every token that leads on to one of the texts; after a whole one also the end."""
        written = b"".join(self.piece(id) for id in ids)
        rests = {answer[len(written) :] for answer in self.answers if answer.startswith(written)}
        found = self.ends if b"" in rests else []
        pieces = {rest[:size] for rest in rests for size in range(1, len(rest) + 1)}
        return [*found, *(id for piece in pieces for id in self.inside.get(piece, []))]


class Verses:
    """A Chinese poem: so many lines of so many characters each, couplets on lines of their own, marks between.

    Whatever the tokens are, one character, several, or a part of one, those may follow that lead on to such a poem and
    to no other text; at its end it ends. Characters are those of the block U+4E00 to U+9FFF.

    Args:
        model: whose tokens.
        lines: of the poem, an even number.
        length: characters of a line.

    >>> model.generate("《春雨》", constraint=Verses(model, 2, 5))[0].text      # doctest: +SKIP
    '好雨知時節，當春乃發生。'

    Raises:
        UsageError: the model has not the tokens for it.
    """

    def __init__(self, model: LanguageModel, lines: int, length: int) -> None:
        han = ("\u4e00".encode(), "\u9fff".encode())
        couplet = [*[han] * length, literal("，"), *[han] * length, literal("。"), literal("\n")]
        self.slots = (couplet * (lines // 2))[:-1]  # the first and the last character that may stand at each place
        size = model.engine.vocabulary.size
        self.ends = sorted(id for id in model.eos_ids if id < size)
        self.piece = model.tokenizer.token_bytes
        control = {*model.tokenizer.special_tokens.values(), *model.eos_ids, *model.forbidden_ids}
        every = ((id, self.piece(id)) for id in range(size) if id not in control)
        self.usable = [
            (id, piece) for id, piece in every if piece and all(byte >= 0x80 or byte == 10 for byte in piece)
        ]
        self.known: dict[tuple[int, bytes], list[int]] = {}
        if not self.following(0, b""):
            raise UsageError(
                "this model has no tokens for Chinese characters",
                where=model.name,
                fix="take a model that knows Chinese, or leave the form free",
                zh="该模型没有汉字词元，请换用懂中文的模型，或不强制体裁",
            )

    def allowed(self, ids: Sequence[int]) -> list[int]:
        """Every token that leads on; after the last mark the end, or nothing where a model has no end."""
        found = self.walk(0, b"".join(self.piece(id) for id in ids))
        if found is None:
            return []
        place, rest = found
        return self.ends if place == len(self.slots) else self.following(place, rest)

    def following(self, place: int, rest: bytes) -> list[int]:
        """The tokens after ``place`` whole characters and the first bytes of another one."""
        key = (place, rest)
        if key not in self.known:
            self.known[key] = [id for id, piece in self.usable if self.walk(place, rest + piece) is not None]
        return self.known[key]

    def walk(self, place: int, text: bytes) -> tuple[int, bytes] | None:
        """How many characters stand after a text that begins at a place, and the bytes of the one that is not whole;
        None where the text does not fit."""
        at = 0
        while at < len(text):
            if place == len(self.slots):
                return None
            low, high = self.slots[place]
            part = text[at : at + len(low)]
            size = len(part)
            if not low[:size] <= part <= high[:size] or any(byte & 0xC0 != 0x80 for byte in part[1:]):
                return None
            if size < len(low):
                return place, part
            at, place = at + size, place + 1
        return place, b""


def literal(sign: str) -> tuple[bytes, bytes]:
    """A place where only one character may stand."""
    return sign.encode(), sign.encode()
