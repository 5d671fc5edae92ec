"""From a checked request to work for the model: prompts as ids, room in the context, and the pieces of the answer."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hanmo.serving.problems import ApiError
from hanmo.serving.schema import MAX_SEQUENCES, ChatRequest, CompletionRequest, SamplingFields

if TYPE_CHECKING:
    from hanmo.inference.engine import TokenLogprobs
    from hanmo.inference.language_model import LanguageModel

TOGETHER = 8  # choices of one request that are written at the same time, at least those of one prompt; others wait too

OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "seed",
    "stop",
    "ignore_eos",
)


@dataclass(frozen=True)
class ScoredToken:
    """A token of an answer with its log-probability, the model's own: before temperature and the other processors.

    Attributes:
        name: how the token is written in an answer; a part of a character is ``bytes:\\x..``.
        piece: its bytes.
        logprob: nats; None for the very first token a model reads, which has no context.
        top: the most probable tokens at this place: name, bytes, log-probability.
        offset: characters of the choice before it.
    """

    name: str
    piece: bytes
    logprob: float | None
    top: list[tuple[str, bytes, float]]
    offset: int


@dataclass
class Piece:
    """A part of one choice: new text, new tokens, and at the end the reason for it."""

    choice: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    scores: list[ScoredToken] | None = None


@dataclass
class Prompt:
    """What the model reads.

    Attributes:
        ids: all tokens, those that a text starts after included.
        hidden: how many of the first ids do not come from the client (a beginning-of-sequence token).
        text: the prompt as ``echo`` gives it back.
        limit: tokens that may be generated: what was asked, at most what the context still holds.
    """

    ids: list[int]
    hidden: int
    text: str
    limit: int


@dataclass
class Plan:
    """What the model has to do for one request.

    Attributes:
        prompts: each is continued ``n`` times.
        n: choices per prompt; choice c of the answer belongs to prompt ``c // n``.
        options: options of :meth:`LanguageModel.stream`.
        echo: each choice begins with its prompt.
        logprobs: give the log-probability of each token and of so many alternatives to it; None gives none.
    """

    prompts: list[Prompt]
    n: int
    options: dict[str, Any]
    echo: bool = False
    logprobs: int | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; the choices of a prompt share it."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    def run(self, model: LanguageModel) -> Iterator[Piece]:
        """Generate all choices, piece by piece; called in a worker thread.

        Several prompts are continued together. All of it is streamed, also for an answer given at once, so that a
        client who leaves stops the work at the next token.
        """
        scorers = [Scorer(model) for _ in range(len(self.prompts) * self.n)]
        if self.echo:
            for index, prompt in enumerate(self.prompts):
                scores = None if self.logprobs is None else model.prompt_logprobs(prompt.ids, self.logprobs)
                for choice in range(index * self.n, (index + 1) * self.n):
                    piece = Piece(choice, prompt.text)
                    if scores is not None:
                        piece.scores = scorers[choice].score(prompt.ids[prompt.hidden :], scores[prompt.hidden :])
                    yield piece
        numbers = [index for index, prompt in enumerate(self.prompts) if prompt.limit]
        for index in set(range(len(self.prompts))) - set(numbers):
            yield from (Piece(index * self.n + choice, finish_reason="length") for choice in range(self.n))
        together = max(1, TOGETHER // self.n)
        for first in range(0, len(numbers), together):
            yield from self.continuations(model, numbers[first : first + together], scorers)

    def continuations(self, model: LanguageModel, numbers: list[int], scorers: list[Scorer]) -> Iterator[Piece]:
        """The pieces of some prompts' choices; they alternate."""
        prompts = [self.prompts[number] for number in numbers]
        limit = max(prompt.limit for prompt in prompts)  # beyond this only the context ends a text
        options = {**self.options, "n": self.n, "max_new_tokens": limit, "logprobs": self.logprobs}
        for chunk in model.stream([prompt.ids for prompt in prompts], **options):
            choice = numbers[chunk.index] * self.n + chunk.choice
            scores = None if chunk.logprobs is None else scorers[choice].score(chunk.ids, chunk.logprobs)
            yield Piece(choice, chunk.text, list(chunk.ids), chunk.finish_reason, scores)


class Scorer:
    """Writes the tokens of one choice down with their log-probabilities, in the order in which they come."""

    def __init__(self, model: LanguageModel) -> None:
        self.tokenizer = model.tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.length = 0

    def score(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> list[ScoredToken]:
        """The next tokens."""
        return [self.token(id, given) for id, given in zip(ids, logprobs, strict=True)]

    def token(self, id: int, given: TokenLogprobs | None) -> ScoredToken:
        """The next token."""
        offset, piece = self.length, self.tokenizer.token_bytes(id)
        self.length += len(self.decoder.decode(piece))
        if given is None:
            return ScoredToken(self.name(id), piece, None, [], offset)
        top = [(self.name(other), self.tokenizer.token_bytes(other), value) for other, value in given.top]
        return ScoredToken(self.name(id), piece, given.logprob, top, offset)

    def name(self, id: int) -> str:
        """How a token is written in an answer."""
        piece = self.tokenizer.token_bytes(id)
        try:
            return piece.decode("utf-8") or self.tokenizer.decode([id], skip_special=False)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def plan_completion(model: LanguageModel, request: CompletionRequest) -> Plan:
    """Plan ``/v1/completions``; tokenises, so call it off the event loop.

    Raises:
        ApiError: an id out of the vocabulary, a prompt that leaves no room, too many sequences.
    """
    if len(request.prompt) * request.n > MAX_SEQUENCES:
        raise ApiError(f"{len(request.prompt)} prompts times n = {request.n} is more than {MAX_SEQUENCES}", param="n")
    least = 1 if request.max_tokens else 0
    prompts = []
    for prompt in request.prompt:
        ids, hidden = prompt_ids(model, prompt)
        text = (
            ""
            if not request.echo
            else prompt
            if isinstance(prompt, str)
            else model.tokenizer.decode(prompt, skip_special=False)
        )
        prompts.append(Prompt(ids, hidden, text, min(request.max_tokens, room(model, ids, least, "prompt"))))
    return Plan(prompts, request.n, options(request), request.echo, request.logprobs)


def plan_chat(model: LanguageModel, request: ChatRequest) -> Plan:
    """Plan ``/v1/chat/completions``; renders the chat template, so call it off the event loop.

    Raises:
        ApiError: the model has no chat template, or the conversation leaves no room.
    """
    if not model.tokenizer.chat_template:
        raise ApiError(
            "this model has no chat template, it only continues text; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    wanted = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    if len(wanted) > 1:
        raise ApiError("'max_tokens' and 'max_completion_tokens' differ; give one of them", param="max_tokens")
    ids = model.chat_ids([message.model_dump() for message in request.messages])
    limit = min([room(model, ids, 1, "messages"), *wanted])
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return Plan([Prompt(ids, len(ids), "", limit)], request.n, options(request), logprobs=logprobs)


def options(request: SamplingFields) -> dict[str, Any]:
    """The options of the engine that are fields of the request."""
    return {name: getattr(request, name) for name in OPTIONS}


def prompt_ids(model: LanguageModel, prompt: str | list[int]) -> tuple[list[int], int]:
    """The ids the model reads for a prompt, and how many of the first were added here.

    A text is read after the model's prefix, ids are read as they are; an empty prompt is the start of a text.

    Raises:
        ApiError: an id that no token has, or nothing to start from.
    """
    if isinstance(prompt, str):
        prefix = list(model.prompt_prefix)
        ids = prefix + model.tokenizer.encode(prompt) + list(model.prompt_suffix)
    else:
        check_ids(prompt, model.tokenizer.vocab_size)
        prefix, ids = [], prompt
    if ids:
        return ids, len(prefix)
    if model.start_id is None:
        raise ApiError("the prompt is empty and this model has no token to start from", param="prompt")
    return [model.start_id], 1


def room(model: LanguageModel, ids: list[int], least: int, param: str) -> int:
    """How many tokens the context holds after ``ids``.

    Raises:
        ApiError: fewer than ``least``.
    """
    left = model.room(len(ids))
    if left < least:
        raise ApiError(
            f"the context of this model holds {model.context_length} tokens; the prompt has {len(ids)}"
            + (" and at least one must be left for the answer" if least else ""),
            param=param,
            code="context_length_exceeded",
        )
    return left


def check_ids(ids: list[int], vocab_size: int, param: str = "prompt") -> None:
    """Refuse ids that no token has."""
    for position, id in enumerate(ids):
        if not 0 <= id < vocab_size:
            raise ApiError(
                f"the token id {id} at position {position} is outside the vocabulary (0 to {vocab_size - 1})",
                param=param,
                code="invalid_value",
            )
