"""What a client may send: strict JSON, known fields, bounded numbers. Nothing is ignored.

A field of OpenAI's API that this server does not have is accepted only with the value that means "not used"; anything
else is an error that names the field, because an answer that silently left it out would be a wrong answer.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hanmo.serving.problems import ApiError

MAX_BODY_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_PROMPTS = 64
MAX_CHOICES = 16
MAX_SEQUENCES = 64  # prompts times n
MAX_STOPS = 16
MAX_STOP_CHARS = 64
MAX_MESSAGES = 1024
MAX_TOKENS = 1_000_000
MAX_INPUTS = 256  # texts of one request for a task
MAX_INPUT_CHARS = 200_000  # of one of them
MAX_LABELS = 64
MAX_LABEL_CHARS = 100
MAX_EXAMPLES = 64
MAX_INSTRUCTION_CHARS = 10_000
MAX_SEED = 2**62  # choice i is drawn with seed + i, which must stay a 64-bit number

# Fields of OpenAI's API that are not offered here, with the value that asks for nothing.
UNUSED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}

Request = TypeVar("Request", bound="Strict")


def as_stops(value: object) -> object:
    """One stop string is a list of one."""
    return [value] if isinstance(value, str) else value


def as_prompts(value: object) -> list[str | list[int]]:
    """A text, several texts, the ids of one prompt, or the ids of several, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        texts = all(type(item) is str for item in value)
        ids = all(type(item) is list and all(type(id) is int for id in item) for item in value)
        if texts or ids:
            return value
    raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists, and not empty")


def as_text(value: object) -> object:
    """The content of a message: a text, or a list of text parts joined in order."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) != {"type", "text"}:
            raise ValueError("only text parts are understood: {'type': 'text', 'text': '...'}")
        if not isinstance(part["text"], str):
            raise ValueError("the 'text' of a part must be a string")
        texts.append(part["text"])
    return "".join(texts)


def as_role(value: object) -> object:
    """``developer`` is what newer OpenAI models call ``system``."""
    return "system" if value == "developer" else value


def as_inputs(value: object) -> list[Any]:
    """A text, an object of texts, or several of these, as a list of objects; a bare text has the name ``text``."""
    items = value if isinstance(value, list) and value else [value]
    objects = [{"text": item} if isinstance(item, str) else item for item in items]
    for number, item in enumerate(objects):
        if not isinstance(item, dict) or not all(isinstance(text, str) for text in item.values()):
            raise ValueError(
                "must be a text, an object of texts such as {'text': '...'}, or a list of these; not empty"
            )
        place = f"[{number}]" if isinstance(value, list) else ""
        if not item.get("text", "").strip():
            raise ValueError(f"must not have an empty text{f' (in {place})' if place else ''}")
        longest = max(map(len, item.values()))
        if longest > MAX_INPUT_CHARS:
            raise ValueError(f"{place} has {longest} characters; at most {MAX_INPUT_CHARS} are read".strip())
    return objects


StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(as_stops),
]
Prompts = Annotated[list[Any], Field(max_length=MAX_PROMPTS), AfterValidator(list), BeforeValidator(as_prompts)]


class Strict(BaseModel):
    """No unknown keys, no conversion of types, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Fields(Strict):
    """Fields of all routes."""

    model: str = Field(max_length=256)
    user: str | None = Field(None, max_length=512)  # names the end user to an operator; never affects the answer


class StreamOptions(Strict):
    """How usage is told in a stream; ``continuous_usage_stats`` (as in vLLM) puts it into every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(Fields):
    """Fields of the routes that write. Defaults are OpenAI's; those after ``seed`` are extensions and neutral."""

    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopStrings = Field(default_factory=list)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    top_k: int = Field(0, ge=0, le=1_000_000)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    no_repeat_ngram_size: int = Field(0, ge=0, le=1000)
    ignore_eos: bool = False


class CompletionRequest(SamplingFields):
    """The body of ``POST /v1/completions``."""

    prompt: Prompts
    max_tokens: int = Field(16, ge=0, le=MAX_TOKENS)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)


class TokenizeRequest(Strict):
    """The body of ``POST /tokenize``, as vLLM has it."""

    model: str | None = Field(None, max_length=256)
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """The body of ``POST /detokenize``."""

    model: str | None = Field(None, max_length=256)
    tokens: list[int]


class Message(Strict):
    """One turn of a conversation."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(as_role)]
    content: Annotated[str, BeforeValidator(as_text)]


class ChatRequest(SamplingFields):
    """The body of ``POST /v1/chat/completions``; without a limit the answer may fill the context."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class TaskRequest(Fields):
    """The body of ``POST /v1/tasks/TASK``; all but ``input`` is for language models, which are asked.

    Attributes:
        input: texts, or objects of texts, as :attr:`hanmo.tasks.base.Task.inputs` names them.
        labels: what may be answered: labels of texts, types of spans.
        examples: records with right answers, as in a jsonl file.
        shots: how many of the examples are shown; default all.
        seed: which.
        instruction: what the model is told, instead of the task's own words.
        settings: of this task alone, such as the form of a poem.
    """

    input: Annotated[list[dict[str, str]], Field(max_length=MAX_INPUTS), BeforeValidator(as_inputs)]
    labels: list[Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)]] = Field([], max_length=MAX_LABELS)
    examples: list[dict[str, Any]] = Field([], max_length=MAX_EXAMPLES)
    shots: int | None = Field(None, ge=0, le=MAX_EXAMPLES)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    instruction: str | None = Field(None, min_length=1, max_length=MAX_INSTRUCTION_CHARS)
    settings: dict[str, str | int | float | bool] = Field({}, max_length=16)


def parse_request(body: bytes, kind: type[Request]) -> Request:
    """Turn a body into a request.

    Raises:
        ApiError: not JSON, or not a request; the message names the field.
    """
    value = parse_json(body)
    if not isinstance(value, dict):
        raise ApiError("the body must be a JSON object")
    fields = {name: item for name, item in value.items() if item is not None}  # null means "not given", as at OpenAI
    for name in [name for name in fields if name in UNUSED and name not in kind.model_fields]:
        if fields.pop(name) not in UNUSED[name]:
            raise ApiError(
                f"'{name}' is not supported by this server; leave it out", param=name, code="unsupported_parameter"
            )
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise describe(error, kind) from None
    if isinstance(request, SamplingFields) and request.stream_options is not None and not request.stream:
        raise ApiError("'stream_options' needs 'stream': true", param="stream_options")
    return request


def parse_json(body: bytes) -> Any:
    """Parse strict JSON: UTF-8, no duplicate keys, no NaN, no lone surrogates, at most 32 levels deep.

    Raises:
        ApiError: the body is anything else.
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except RecursionError:
        raise ApiError(f"the JSON is nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not valid UTF-8 (byte {error.start})") from None
    except ValueError as error:  # also numbers with too many digits
        raise ApiError(f"the body is not valid JSON: {error}") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for item in level:
            if isinstance(item, str):
                refuse_surrogates(item)
            elif isinstance(item, list):
                children.extend(item)
            elif isinstance(item, dict):
                children.extend(item)  # keys are texts too
                children.extend(item.values())
        if not children:
            return value
        level = children
    raise ApiError(f"the JSON is nested deeper than {MAX_DEPTH} levels")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing one that says the same thing twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ApiError(f"the key '{key}' stands twice in one object", param=key)
        result[key] = value
    return result


def refuse_constant(name: str) -> None:
    """``NaN`` and ``Infinity`` are no JSON, though Python's parser would take them."""
    raise ApiError(f"{name} is not a JSON number")


def refuse_surrogates(text: str) -> None:
    """Half of a surrogate pair, written as an escape, is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise ApiError(f"a text contains the lone surrogate {escape}, which is not a character") from None


def describe(error: ValidationError, kind: type[Strict]) -> ApiError:
    """Say what is wrong with a request: which field, what is expected, what was given.

    Of several mistakes the first is told; an unknown field goes before, because a misspelt name is also a missing one.
    """
    mistakes = error.errors(include_url=False)
    first = next((mistake for mistake in mistakes if mistake["type"] == "extra_forbidden"), mistakes[0])
    parts = [part for part in first["loc"] if isinstance(part, int) or not part.startswith(("function-", "list["))]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    if first["type"] == "extra_forbidden":
        known = known_fields(kind, parts)
        close = get_close_matches(str(parts[-1]), known, n=1, cutoff=0.6)
        hint = f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(sorted(known))
        return ApiError(f"unknown field '{param}'; {hint}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(f"the field '{param}' is missing", param=param, code="missing_required_parameter")
    expected = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = first["input"]
    shown = f" (given: {given!r:.80})" if isinstance(given, (bool, int, float, str)) else ""
    return ApiError(f"'{param}' {expected}{shown}", param=param, code="invalid_value")


def known_fields(kind: type[Strict], path: list[int | str]) -> list[str]:
    """The fields that may stand where ``path`` points."""
    if "messages" in path[:-1]:
        return list(Message.model_fields)
    if "stream_options" in path[:-1]:
        return list(StreamOptions.model_fields)
    return list(kind.model_fields)
