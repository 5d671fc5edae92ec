"""Conversations for instruction tuning, in all the usual layouts.

==================  ==============================================================================
messages            ``{"messages": [{"role": "user", "content": ...}, ...]}`` (OpenAI)
sharegpt            ``{"conversations": [{"from": "human", "value": ...}, ...], "system": ...}``
alpaca              ``{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[q, a]]}``
prompt, completion  ``{"prompt": ..., "completion": ...}``, texts or lists of messages
turns without role  ``{"messages": [{"message": ...}, ...]}`` (KdConv) or lists of strings: user and assistant by turns
==================  ==============================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.named import Column, Roles, ambiguous, named_rows, names
from hanmo.data.tasks.types import Dialogue, Message
from hanmo.language import pick
from hanmo.text.normalize import SURROGATE

ANSWER = "output response completion answer reply target 回答 答案 输出 回复"
CONVERSATION = Roles(
    ("messages",),
    ("system",),
    (
        names(
            messages="messages conversations conversation dialogue dialog turns 对话",
            system="system system_prompt 系统",
        ),
    ),
)
INSTRUCTION = Roles(
    ("instruction", "output"),
    ("input", "system", "history"),
    (
        names(
            instruction="instruction prompt query question 指令 问题 提问",
            input="input 输入",
            output=ANSWER,
            system="system system_prompt 系统",
            history="history 历史",
        ),
        names(instruction="input", output=ANSWER, system="system system_prompt 系统", history="history"),
    ),
)
ROLE_NAMES = {
    **dict.fromkeys(("user", "human", "prompter", "question", "client", "customer", "用户", "问"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "bot", "model", "ai", "chatgpt", "answer", "agent", "助手", "答"), "assistant"
    ),
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker"), ("content", "value", "message", "text")
EXPECTED = '{"role": "user", "content": "..."}'


class BadMessages(Exception):
    """Why a conversation cannot be used."""


def read_dialogues(file: RecordFile) -> Iterator[Dialogue]:
    """The conversations of a file.

    Raises:
        DataError: it cannot be told which key or column is what.
    """
    for line, raw, system, value in conversations(file):
        try:
            messages = value if isinstance(value, tuple) else messages_of(value, file)
            if system and (not messages or messages[0]["role"] != "system"):
                messages = (message("system", system), *messages)
            check_dialogue(messages, file)
        except BadMessages as error:
            file.bad(line, str(error), raw, EXPECTED)
            continue
        yield Dialogue(messages, file=file.name, line=line)


def conversations(file: RecordFile) -> Iterator[tuple[int, Any, str, Any]]:
    """Line, record, system message and conversation: a list as it stands in the file, or a tuple of messages."""
    if file.format in ("csv", "tsv"):
        yield from instructions(file)
        return
    first = [value for _, value in file.sample_objects(100)] if file.format not in ("lines", "fasttext", "tmx") else []
    if first and all(isinstance(value, list) for value in first):  # each record is itself a list of turns
        file.report.taken["messages"] = pick("each record is a list of turns", "每条记录是一个轮次列表")
        for line, value in file.objects():
            yield line, value, "", value
        return
    keys = {str(key).lower() for value in first if isinstance(value, dict) for key in value}
    known = {name for layout in CONVERSATION.layouts for name in layout["messages"]}
    if "messages" in file.fields or (keys & known and "instruction" not in file.fields):
        for row in named_rows(file, CONVERSATION, None):
            system = row.values.get("system")
            yield row.line, row.raw, system if isinstance(system, str) else "", row.values["messages"]
    else:
        yield from instructions(file)


def instructions(file: RecordFile) -> Iterator[tuple[int, Any, str, Any]]:
    """The conversations of records with an instruction and an answer (see :func:`conversations`)."""
    for row in named_rows(file, INSTRUCTION, looks):
        values = row.values
        try:
            messages = from_instruction(values, file)
        except BadMessages as error:
            file.bad(row.line, str(error), row.raw, '{"instruction": "...", "input": "", "output": "..."}')
            continue
        system = values.get("system")
        yield row.line, row.raw, system if isinstance(system, str) else "", messages


def from_instruction(values: dict[str, Any], file: RecordFile) -> tuple[Message, ...]:
    """The messages of one record in the layout of Alpaca, or of a prompt and its completion.

    Raises:
        BadMessages: a part is not text.
    """
    prompt, answer = values["instruction"], values["output"]
    if isinstance(prompt, list) or isinstance(answer, list):
        parts = [
            messages_of(part, file) if isinstance(part, list) else (message(role, part),)
            for role, part in (("user", prompt), ("assistant", answer))
        ]
        return parts[0] + parts[1]
    messages: list[Message] = []
    history = values.get("history")
    for turn in history if isinstance(history, list) else []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadMessages(pick("a turn of the history is not [question, answer]", "history 的一轮不是 [问, 答]"))
        messages += [message("user", turn[0]), message("assistant", turn[1])]
    more = values.get("input")
    if more is not None and not isinstance(more, str):
        raise BadMessages(pick("the input is not text", "input 不是文本"))
    question = content_of(prompt)
    if more and more.strip():
        question = f"{question}\n{more}" if question.strip() else more
    return (*messages, message("user", question), message("assistant", answer))


def messages_of(value: Any, file: RecordFile) -> tuple[Message, ...]:
    """The messages in a list of objects or strings, or of one object.

    Raises:
        BadMessages: an unknown role, a message without text, or nothing like that.
    """
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not turns:
        raise BadMessages(pick("there are no messages", "没有消息"))
    messages = []
    for number, turn in enumerate(turns):
        by_turns = ("user", "assistant")[number % 2]
        if isinstance(turn, str):
            messages.append(message(by_turns, turn))
            continue
        if not isinstance(turn, dict):
            raise BadMessages(pick("a message is not an object", "消息不是对象"))
        content = next((turn[key] for key in CONTENT_KEYS if turn.get(key) is not None), None)
        named = next((turn[key] for key in ROLE_KEYS if turn.get(key) is not None), None)
        if turn.get("tool_calls") or str(named).lower() == "function_call":
            raise BadMessages(pick("a message calls a tool, which is not supported", "消息调用了工具，暂不支持"))
        role = by_turns if named is None else ROLE_NAMES.get(str(named).strip().lower())
        if role is None:
            raise BadMessages(pick(f"unknown role '{named}'", f"未知角色 '{named}'"))
        if number == 0 and named is None:
            file.report.taken["roles"] = pick("user and assistant by turns", "用户与助手轮流")
        messages.append(message(role, content))
    return tuple(messages)


def message(role: str, content: Any) -> Message:
    """A message.

    Raises:
        BadMessages: the content is not text, or blank.
    """
    text = content_of(content)
    if not text.strip():
        raise BadMessages(pick(f"the message of the {role} is empty", f"{role} 的消息为空"))
    return {"role": role, "content": text}


def content_of(content: Any) -> str:
    """The text of a message, which may be in several parts ``{"type": "text", "text": ...}``.

    Raises:
        BadMessages: it is not text.
    """
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadMessages(pick("the content of a message is not text", "消息内容不是文本"))
    return SURROGATE.sub("\ufffd", content)


def check_dialogue(messages: tuple[Message, ...], file: RecordFile) -> None:
    """Refuse a conversation from which nothing can be learnt; note what is unusual.

    Raises:
        BadMessages: the assistant says nothing, or the system speaks in the middle.
    """
    roles = [item["role"] for item in messages]
    if "assistant" not in roles:
        raise BadMessages(pick("the assistant says nothing", "没有助手的消息"))
    if "system" in roles[1:]:
        raise BadMessages(pick("the system speaks after the beginning", "system 消息不在开头"))
    if roles[-1] != "assistant":
        file.report.notes[pick("a dialogue does not end with the assistant", "对话不以助手的消息结束")] += 1
    talk = [role for role in roles if role != "system"]
    if talk[0] == "assistant":
        file.report.notes[pick("a dialogue begins with the assistant", "对话以助手的消息开始")] += 1
    if any(one == other != "tool" for one, other in pairwise(talk)):
        file.report.notes[pick("a dialogue in which one side speaks twice in a row", "对话中一方连续发言")] += 1


def looks(file: RecordFile, columns: list[Column], given: dict[str, int]) -> dict[str, tuple[int, str]]:
    """Prompt and answer of a table of two columns without header.

    Raises:
        DataError: it has not two columns.
    """
    rest = [column.number for column in columns if column.number not in given.values()]
    open_roles = [role for role in INSTRUCTION.required if role not in given]
    if len(columns) != 2 or len(rest) != len(open_roles):
        raise ambiguous(file, columns, INSTRUCTION.required)
    reason = pick("in this order", "按列的先后")
    found = {role: (number, pick("as named", "按指定")) for role, number in given.items()}
    return {**found, **{role: (number, reason) for role, number in zip(open_roles, rest, strict=True)}}


TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")


def transcript(text: str) -> tuple[Message, ...]:
    """The messages of a transcript with ``\\n\\nHuman:`` and ``\\n\\nAssistant:`` (Anthropic's hh-rlhf).

    Raises:
        BadMessages: it is none, or a message is empty.

    >>> [m["role"] for m in transcript("\\n\\nHuman: Hi\\n\\nAssistant: Hello!")]
    ['user', 'assistant']
    """
    before, *parts = TRANSCRIPT.split(text)
    if before.strip() or not parts:
        raise BadMessages(pick("not a transcript with Human: and Assistant:", "不是 Human:、Assistant: 对话文本"))
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(message(roles[role], said.strip()) for role, said in zip(parts[::2], parts[1::2], strict=True))
