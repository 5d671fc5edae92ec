"""What is asked of an endpoint: the sampling settings under the API's names, and the bodies of requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from hanmo.errors import UsageError
from hanmo.inference.language_model import Prompt, is_prompt
from hanmo.inference.sampling import Sampling, real_number, whole_number

API_OPTIONS: dict[str, Any] = {  # options of the API, with the value that asks for nothing
    "top_p": 1.0,
    "n": 1,
    "seed": None,
    "stop": [],
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
EXTENSIONS: dict[str, Any] = {  # options beyond the API, likewise
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "ignore_eos": False,
}
TAKES_EXTENSIONS = {  # what a server calls itself in its model list, and the extensions it has
    "hanmo": frozenset(EXTENSIONS),
    "vllm": frozenset({"top_k", "min_p", "repetition_penalty", "ignore_eos"}),
    "sglang": frozenset({"top_k", "min_p", "repetition_penalty", "ignore_eos"}),
    "llamacpp": frozenset({"top_k", "min_p", "ignore_eos"}),
}
NARROW_THE_DRAW = ("top_p", "top_k", "min_p")  # mean nothing where the most probable token is taken


@dataclass
class RemoteSampling(Sampling):
    """The sampling settings, and those that only the API has.

    Attributes:
        frequency_penalty: makes tokens less likely the more often they were written; -2 to 2, 0 is off.
        presence_penalty: makes tokens less likely once they were written; -2 to 2, 0 is off.
        logprobs: give the log-probability of each new token and of so many alternatives to it; None gives none.
    """

    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        real_number("frequency_penalty", self.frequency_penalty, -2, 2, "0 is off")
        real_number("presence_penalty", self.presence_penalty, -2, 2, "0 is off")
        if self.logprobs is not None:
            whole_number("logprobs", self.logprobs, 0, 20, "0 gives the written tokens alone")


def sampling_of(options: Mapping[str, Any]) -> RemoteSampling:
    """Checked settings from keyword options.

    Raises:
        UsageError: an unknown name or a bad value.
    """
    return cast(RemoteSampling, RemoteSampling.from_options(options))


def option_fields(sampling: RemoteSampling, extensions: Callable[[], Collection[str]], where: str) -> dict[str, Any]:
    """The options that are not at the value that asks for nothing, under the names of the API.

    Args:
        extensions: gives the options beyond the API that the endpoint takes; called only where one is used.
        where: the model's name, for errors.

    Raises:
        UsageError: an option beyond the API that the endpoint is not known to take.
    """
    fields: dict[str, Any] = {"temperature": 0.0 if sampling.greedy else sampling.temperature}
    for name, off in {**API_OPTIONS, **EXTENSIONS}.items():
        value = getattr(sampling, name)
        if value == off or (sampling.greedy and name in NARROW_THE_DRAW):
            continue
        if name in EXTENSIONS and name not in extensions():
            raise UsageError(
                f"the API has no option '{name}', and this endpoint is not known to take it",
                where=where,
                why="a server that ignores it would answer as if it had not been given",
                fix=f"leave it out (it is off at {off}); from Python, extensions=['{name}'] sends it all the same",
                zh=f"接口标准没有选项 '{name}'，该服务也未表明支持它；若被忽略，结果就是错的。请不要设置"
                f"（关闭值为 {off}），或在 Python 中用 extensions=['{name}'] 强制发送",
            )
        fields[name] = value
    return fields


def text_query(prompt: Prompt, sampling: RemoteSampling) -> dict[str, Any]:
    """What ``/completions`` needs besides the common options."""
    text = prompt if isinstance(prompt, str) else [int(id) for id in prompt]
    query = {"prompt": text, "max_tokens": sampling.max_new_tokens}
    return query if sampling.logprobs is None else {**query, "logprobs": sampling.logprobs}


def chat_query(messages: list[dict[str, str]], sampling: RemoteSampling, limit: str) -> dict[str, Any]:
    """What ``/chat/completions`` needs besides the common options; ``limit`` is its name for ``max_new_tokens``."""
    query = {"messages": messages, limit: sampling.max_new_tokens}
    return query if sampling.logprobs is None else {**query, "logprobs": True, "top_logprobs": sampling.logprobs}


def as_message(prompt: Prompt, where: str) -> list[dict[str, str]]:
    """A prompt as the one message of a conversation.

    Raises:
        UsageError: it is a list of token ids.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    raise UsageError(
        "this endpoint answers messages, and a list of token ids is not one",
        where=where,
        fix="give the prompt as a text",
        zh="该接口只接受消息，不接受词元编号。请以文本给出提示",
    )


def check_prompt(prompt: object) -> None:
    """Refuse what is neither a text nor a list of ids."""
    if not is_prompt(prompt):
        raise UsageError(
            f"a prompt is a text or a list of ids, not {type(prompt).__name__}", zh="提示应为文本或编号列表"
        )


def check_messages(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Refuse what is not a conversation, before it is sent."""
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UsageError(
                f"message {place} is not {{'role': ..., 'content': ...}} with two texts",
                zh=f"第 {place} 条消息应为 {{'role': ..., 'content': ...}}，且两者都是文本",
            )
    if not messages:
        raise UsageError(
            "the conversation is empty", fix="give at least one message", zh="对话为空，请至少给出一条消息"
        )
    return messages
