"""The answers of OpenAI-compatible servers, read with distrust: choices, token counts, log-probabilities, streams.

Servers differ in what they leave out and in their words for the end of a text; what is here becomes the same
:class:`~hanmo.inference.language_model.Completion` and :class:`~hanmo.inference.engine.Chunk` whatever they say.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hanmo.inference.endpoint import CONNECTION, Problem
from hanmo.inference.engine import Chunk, FinishReason
from hanmo.inference.language_model import Completion

CUT_SHORT = frozenset({"length", "max_tokens", "model_length", "max_output_tokens"})
FAILED = frozenset({"error", "abort", "insufficient_system_resource"})


@dataclass(frozen=True)
class TokenLogprob:
    """A token as the server writes it, and its log-probability in nats (None where nothing stands before it).

    Attributes:
        alternatives: the log-probabilities of the most probable tokens at this place, where asked for and given.
        offset: where the token begins in the text, where given.
    """

    token: str
    logprob: float | None
    alternatives: dict[str, float] = field(default_factory=dict)
    offset: int | None = None


@dataclass
class RemoteCompletion(Completion):
    """A completion with what only endpoints tell.

    Attributes:
        logprobs: of the new tokens, by the server's names for them, where they were asked for.
        reported_reason: the server's own word for the end; "content_filter" means that something was held back.
    """

    logprobs: list[TokenLogprob] | None = None  # type: ignore[assignment]
    reported_reason: str = ""


def bad_reply(what: str) -> Problem:
    """The problem of an answer that has another form than the API's."""
    return Problem(f"the answer {what}", retry=False)


def finish_reason(word: Any) -> FinishReason:
    """Our word for the end of a text; whatever is not about length has ended by itself.

    Raises:
        Problem: the server says that it failed.
    """
    if not isinstance(word, str):
        return "stop"
    if word in FAILED:
        raise Problem(f"the server broke the answer off ({word})", status=500)
    return "length" if word in CUT_SHORT else "stop"


def choices_of(reply: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """The n choices of an answer, in order.

    Raises:
        Problem: there are others than 0 to n-1; some servers give one choice, however many were asked for.
    """
    found = reply.get("choices")
    if not isinstance(found, list) or not found or not all(isinstance(choice, dict) for choice in found):
        raise bad_reply("has no choices")
    choices = {}
    for place, choice in enumerate(found):
        number = choice.get("index", place)
        choices[number if type(number) is int else place] = choice
    if choices.keys() != set(range(n)):
        raise bad_reply(f"has {len(found)} choices instead of {n}; ask for one at a time")
    return [choices[number] for number in range(n)]


def text_of(choice: dict[str, Any], *parts: str) -> str:
    """The text of a choice: ``text`` of a completion, ``content`` of a message or of its next part; null is no text.

    Raises:
        Problem: it is something else than a text.
    """
    inner = next((choice[part] for part in parts if isinstance(choice.get(part), dict)), None)
    text = choice.get("text") if inner is None else inner.get("content")
    if text is None and inner is not None:
        text = inner.get("refusal")  # what the public API writes in place of an answer
    if text is None:
        return ""
    if not isinstance(text, str):
        raise bad_reply("has a text that is not a string")
    return text


def whole_characters(text: str) -> str:
    """Join surrogate pairs; half a pair, which JSON can write and no encoding can, becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def completion_of(choice: dict[str, Any], prompt_tokens: int, index: int, number: int, logprobs: bool) -> Completion:
    """One choice of an answer given at once.

    Raises:
        Problem: it has another form, or lacks the log-probabilities that were asked for.
    """
    if "text" not in choice and not isinstance(choice.get("message"), dict):
        raise bad_reply("has a choice with neither text nor message")
    reason = choice.get("finish_reason")
    scores = logprobs_of(choice)
    if logprobs and scores is None:
        raise bad_reply("has no log-probabilities, although they were asked for; this endpoint does not offer them")
    return RemoteCompletion(
        text=whole_characters(text_of(choice, "message")),
        ids=[],
        finish_reason=finish_reason(reason),
        prompt_tokens=prompt_tokens,
        index=index,
        choice=number,
        logprobs=scores,
        reported_reason=reason[:80] if isinstance(reason, str) else "",
    )


def token_counts(reply: dict[str, Any]) -> tuple[int, int] | None:
    """Prompt and completion tokens, or None where the answer does not count them."""
    usage = reply.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if type(prompt) is int and type(completion) is int and 0 <= prompt < 1 << 40 and 0 <= completion < 1 << 40:
        return prompt, completion
    return None


def logprobs_of(choice: dict[str, Any]) -> list[TokenLogprob] | None:
    """The log-probabilities of a choice, in the form of either route; None where there are none.

    Raises:
        Problem: they are not numbers, or lists of different lengths.
    """
    given = choice.get("logprobs")
    if not isinstance(given, dict):
        return None
    try:
        if isinstance(given.get("content"), list):
            return [
                TokenLogprob(str(item["token"]), checked(item["logprob"]), alternatives_of(item.get("top_logprobs")))
                for item in given["content"]
            ]
        tokens, values = given["tokens"], given["token_logprobs"]
        tops = given.get("top_logprobs") or [None] * len(tokens)
        offsets = given.get("text_offset") or [None] * len(tokens)
        return [
            TokenLogprob(str(token), checked(value), alternatives_of(top), offset if type(offset) is int else None)
            for token, value, top, offset in zip(tokens, values, tops, offsets, strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise bad_reply("has log-probabilities of another form than the API's") from None


def alternatives_of(top: Any) -> dict[str, float]:
    """The alternatives at one place: ``{token: value}``, or a list of ``{"token", "logprob"}``."""
    if not top:
        return {}
    pairs = top.items() if isinstance(top, dict) else [(item["token"], item["logprob"]) for item in top]
    return {str(token): value for token, given in pairs if (value := checked(given)) is not None}


def checked(value: Any) -> float | None:
    """A log-probability: a number up to 0 (or a rounding error above), or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value <= 1e-3:
        raise ValueError
    return min(float(value), 0.0)


class Streamed:
    """Reads one stream; the ends of the choices are told when all of it has arrived.

    Args:
        n: how many choices were asked for.

    Attributes:
        begun: whether something arrived, after which nothing may be asked again.
        usage: the token counts, which come last.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.begun = False
        self.usage: Any = None
        self.reasons: dict[int, FinishReason] = {}
        self._decoders = [codecs.getincrementaldecoder("utf-16-le")("replace") for _ in range(n)]
        self._seen: set[int] = set()

    def read(self, events: Iterator[dict[str, Any] | None]) -> Iterator[Chunk]:
        """The chunks with text.

        Raises:
            Problem: the stream ends before the text does, has choices nobody asked for, or tells an error.
        """
        done = False
        try:
            for event in events:
                self.begun = True
                done = event is None
                if event is None:
                    break
                yield from self._event(event)
        except Problem:
            if len(self.reasons) < self.n:  # else only ``[DONE]`` or the counts are missing: the text is all there
                raise
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()  # now, not when the garbage is collected: the connection is free again
        if len(self.reasons) == self.n or (done and len(self._seen) == self.n):
            return  # a choice without a reason ends with ``[DONE]``
        if done:
            raise bad_reply(f"has {len(self._seen)} choices instead of {self.n}; ask for one at a time")
        raise Problem("the stream broke off before the text was complete", code=CONNECTION, retry=False)

    def _event(self, event: dict[str, Any]) -> Iterator[Chunk]:
        self.usage = event.get("usage") or self.usage
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            number = choice.get("index", 0) if isinstance(choice, dict) else None
            if type(number) is not int or not 0 <= number < self.n:
                raise bad_reply("has a choice that was not asked for")
            self._seen.add(number)
            text = text_of(choice, "delta", "message").encode("utf-16-le", "surrogatepass")
            if whole := self._decoders[number].decode(text):  # a pair may be cut in two like anything else
                yield Chunk(whole, [], None, 0, 0, number)
            if choice.get("finish_reason") is not None:
                self.reasons[number] = finish_reason(choice["finish_reason"])

    def last_chunks(self, prompt_tokens: int) -> Iterator[Chunk]:
        """The last chunk of each choice, with its reason."""
        for number, decoder in enumerate(self._decoders):
            reason = self.reasons.get(number, "stop")
            yield Chunk(decoder.decode(b"", True), [], reason, prompt_tokens, 0, number)
