"""From a checked request to work for the model: prompts as ids, room in the context, and the pieces of the answer."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hanmo.serving.problems import ApiError
from hanmo.serving.schema import MAX_SEQUENCES, ChatRequest, CompletionRequest, SamplingFields

if TYPE_CHECKING:
    from hanmo.inference.language_model import LanguageModel

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


@dataclass
class Piece:
    """A part of one choice: new text, new tokens, and at the end the reason for it."""

    choice: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


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
        logprobs: each choice ends with the log-probabilities of its tokens.
    """

    prompts: list[Prompt]
    n: int
    options: dict[str, Any]
    echo: bool = False
    logprobs: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; the choices of a prompt share it."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    def run(self, model: LanguageModel) -> Iterator[Piece]:
        """Generate all choices, piece by piece; called in a worker thread.

        The choices of a prompt are written together, one prompt after the other. All of it is streamed, also for an
        answer given at once, so that a client who leaves stops the work at the next token.
        """
        for index, prompt in enumerate(self.prompts):
            first = index * self.n
            if self.echo:
                yield from (Piece(first + choice, prompt.text) for choice in range(self.n))
            generated: list[list[int]] = [[] for _ in range(self.n)]
            for piece in self.continuations(model, prompt):
                generated[piece.choice] += piece.ids
                if piece.finish_reason is not None and self.logprobs:
                    piece.logprobs = score(model, prompt, generated[piece.choice], self.echo)
                piece.choice += first
                yield piece

    def continuations(self, model: LanguageModel, prompt: Prompt) -> Iterator[Piece]:
        """The pieces of a prompt's choices, numbered from 0; they may alternate."""
        if prompt.limit == 0:
            yield from (Piece(choice, finish_reason="length") for choice in range(self.n))
            return
        for chunk in model.stream(prompt.ids, n=self.n, max_new_tokens=prompt.limit, **self.options):
            yield Piece(chunk.choice, chunk.text, list(chunk.ids), chunk.finish_reason)


def plan_completion(model: LanguageModel, request: CompletionRequest) -> Plan:
    """Plan ``/v1/completions``; tokenises, so call it off the event loop.

    Raises:
        ApiError: an id out of the vocabulary, a prompt that leaves no room, too many sequences.
    """
    if len(request.prompt) * request.n > MAX_SEQUENCES:
        raise ApiError(f"{len(request.prompt)} prompts times n = {request.n} is more than {MAX_SEQUENCES}", param="n")
    if request.logprobs is not None and request.stream:
        raise ApiError("'logprobs' is not supported together with 'stream'", param="logprobs")
    if request.logprobs:
        raise ApiError(
            "only 'logprobs': 0 is supported: the tokens of the text, without alternatives to them",
            param="logprobs",
            code="unsupported_parameter",
        )
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
    return Plan(prompts, request.n, options(request), request.echo, request.logprobs is not None)


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
    if len(wanted) > 1:
        raise ApiError("'max_tokens' and 'max_completion_tokens' differ; give one of them", param="max_tokens")
    ids = model.chat_ids([message.model_dump() for message in request.messages])
    limit = min([room(model, ids, 1, "messages"), *wanted])
    return Plan([Prompt(ids, len(ids), "", limit)], request.n, options(request))


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


def check_ids(ids: list[int], vocab_size: int) -> None:
    """Refuse ids that no token has."""
    for position, id in enumerate(ids):
        if not 0 <= id < vocab_size:
            raise ApiError(
                f"the token id {id} at position {position} is outside the vocabulary (0 to {vocab_size - 1})",
                param="prompt",
                code="invalid_value",
            )


def score(model: LanguageModel, prompt: Prompt, generated: list[int], echo: bool) -> dict[str, Any]:
    """Log-probabilities in OpenAI's form for the generated tokens, and for the prompt too with ``echo``.

    They are those of the model itself, before temperature and the other processors. The very first token a model reads
    has no context and therefore ``None``. A token that is a part of a character is written as ``bytes:\\x..``.
    """
    ids = prompt.ids + generated
    if model.reads_source:
        written = model.answer_logprobs(prompt.ids, generated).tolist()
        values: list[float | None] = [*([None] * len(prompt.ids)), *written]
    else:
        values = [None, *(float(value) for value in model.logprobs(ids)[1:])]
    start = prompt.hidden if echo else len(prompt.ids)
    offsets, length = [], 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for id in ids[start:]:
        offsets.append(length)
        length += len(decoder.decode(model.tokenizer.token_bytes(id)))
    names = [token_name(model, id) for id in ids[start:]]
    return {"tokens": names, "token_logprobs": values[start:], "top_logprobs": None, "text_offset": offsets}


def token_name(model: LanguageModel, id: int) -> str:
    """How a token is written in an answer."""
    piece = model.tokenizer.token_bytes(id)
    try:
        return piece.decode("utf-8") or model.tokenizer.decode([id], skip_special=False)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
