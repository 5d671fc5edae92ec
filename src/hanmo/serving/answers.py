"""The shapes of answers: OpenAI's objects for a completion and for a chat, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterable
from typing import Any

from hanmo.serving.generation import Piece, Plan, ScoredToken


class Usage:
    """Counts tokens while they come.

    Args:
        plan: gives the number of prompt tokens.
        at_end: one more chunk without choices tells the total (``stream_options.include_usage``).
        always: every chunk tells the count so far (``stream_options.continuous_usage_stats``).
    """

    def __init__(self, plan: Plan, *, at_end: bool = False, always: bool = False) -> None:
        self.prompt_tokens = plan.prompt_tokens
        self.completion_tokens = 0
        self.at_end = at_end
        self.always = always

    def count(self, piece: Piece) -> None:
        """Count the tokens of a piece."""
        self.completion_tokens += len(piece.ids)

    def total(self) -> dict[str, int]:
        """OpenAI's ``usage``."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def add_to(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Add the count to a chunk, or the null that stands for "later", or nothing."""
        if self.always:
            chunk["usage"] = self.total()
        elif self.at_end:
            chunk["usage"] = None
        return chunk


async def collect(pieces: AsyncIterable[Piece]) -> list[Piece]:
    """Join the pieces of each choice."""
    choices: dict[int, Piece] = {}
    async for piece in pieces:
        choice = choices.setdefault(piece.choice, Piece(piece.choice))
        choice.text += piece.text
        choice.ids += piece.ids
        choice.finish_reason = piece.finish_reason
        if piece.scores is not None:
            choice.scores = [*(choice.scores or []), *piece.scores]
    return [choices[number] for number in sorted(choices)]


class Format:
    """What both kinds of answers have in common: an id, a time, a model."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, plan: Plan) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.plan = plan

    def frame(self, kind: str = "") -> dict[str, Any]:
        """The fields around the choices."""
        return {"id": self.id, "object": kind or self.chunk_object, "created": self.created, "model": self.model}

    def whole(self, choices: list[Piece]) -> dict[str, Any]:
        """The answer given at once."""
        usage = Usage(self.plan)
        for choice in choices:
            usage.count(choice)
        return {
            **self.frame(self.whole_object),
            "choices": [self.choice(piece) for piece in choices],
            "usage": usage.total(),
        }

    def choice(self, piece: Piece) -> dict[str, Any]:
        """One whole choice."""
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The chunks that tell a piece; a token that completes no character yet tells nothing."""
        raise NotImplementedError


class CompletionFormat(Format):
    """``/v1/completions``: text."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": None if piece.scores is None else self.logprobs(piece.scores),
            "finish_reason": piece.finish_reason,
        }

    def logprobs(self, tokens: list[ScoredToken]) -> dict[str, Any]:
        """OpenAI's older form: lists side by side."""
        top = [None if token.logprob is None else {name: value for name, _, value in token.top} for token in tokens]
        return {
            "tokens": [token.name for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": top if self.plan.logprobs else None,
            "text_offset": [token.offset for token in tokens],
        }

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        if not piece.text and piece.finish_reason is None and not piece.scores:
            return []
        return [{**self.frame(), "choices": [self.choice(piece)]}]


class ChatFormat(Format):
    """``/v1/chat/completions``: a message; in a stream first its role, then its text, then the reason for its end."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.choice,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self.logprobs(piece.scores),
            "finish_reason": piece.finish_reason,
        }

    def opening(self) -> list[dict[str, Any]]:
        return [self.chunk(index, {"role": "assistant", "content": ""}) for index in range(self.plan.n)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        more = piece.text or piece.scores
        text = [self.chunk(piece.choice, {"content": piece.text}, scores=piece.scores)] if more else []
        end = [self.chunk(piece.choice, {}, piece.finish_reason)] if piece.finish_reason is not None else []
        return text + end

    def logprobs(self, tokens: list[ScoredToken] | None) -> dict[str, Any] | None:
        """OpenAI's newer form: an object for each token."""
        if tokens is None:
            return None
        content = [
            {
                "token": token.name,
                "logprob": token.logprob,
                "bytes": list(token.piece),
                "top_logprobs": [
                    {"token": name, "logprob": value, "bytes": list(piece)} for name, piece, value in token.top
                ],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def chunk(
        self,
        index: int,
        delta: dict[str, str],
        finish_reason: str | None = None,
        scores: list[ScoredToken] | None = None,
    ) -> dict[str, Any]:
        """One chunk with one choice."""
        logprobs = self.logprobs(scores)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self.frame(), "choices": [choice]}
