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
