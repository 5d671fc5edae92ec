"""Conversations for instruction tuning, in all the usual layouts.

==================  ==============================================================================
messages            ``{"messages": [{"role": "user", "content": ...}, ...]}`` (OpenAI)
sharegpt            ``{"conversations": [{"from": "human", "value": ...}, ...], "system": ...}``
alpaca              ``{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[q, a]]}``
prompt, completion  ``{"prompt": ..., "completion": ...}``, texts or lists of messages
turns without role  ``{"messages": [{"message": ...}, ...]}`` (KdConv) or lists of strings: user and assistant by turns
IFEval              ``{"prompt": ..., "instruction_id_list": [...], "kwargs": [{...}]}``, without any answer
==================  ==============================================================================

Every layout may say what can be checked of an answer: ``"checks": [{"id": "keywords:existence", "keywords": ["雪"]}]``.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.named import Column, Roles, Row, ambiguous, named_rows, names
from hanmo.data.tasks.types import Check, Dialogue, Message
from hanmo.language import pick
from hanmo.text.normalize import SURROGATE

CHECKS = "checks instruction_id_list 检查"
ANSWER = "output response completion answer reply target 回答 答案 输出 回复"
CONVERSATION = Roles(
    ("messages",),
    ("system", "checks", "kwargs"),
    (
        names(
            messages="messages conversations conversation dialogue dialog turns 对话",
            system="system system_prompt 系统",
            checks=CHECKS,
            kwargs="kwargs",
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
CHECKED = Roles(  # what can be checked needs no answer to compare with
    ("instruction",),
    (*INSTRUCTION.all[1:], "checks", "kwargs"),
    ({**INSTRUCTION.layouts[0], **names(checks=CHECKS, kwargs="kwargs")},),
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
    for row, value in conversations(file):
        try:
            messages = value if isinstance(value, tuple) else messages_of(value, file)
            system = row.values.get("system")
            if isinstance(system, str) and system and (not messages or messages[0]["role"] != "system"):
                messages = (message("system", system), *messages)
            checks = checks_of(row.values)
            check_dialogue(messages, file, bool(checks))
        except BadMessages as error:
            file.bad(row.line, str(error), row.raw, EXPECTED)
            continue
        yield Dialogue(messages, checks, file=file.name, line=row.line)


def conversations(file: RecordFile) -> Iterator[tuple[Row, Any]]:
    """Record and conversation: a list as it stands in the file, or a tuple of messages."""
    if file.format in ("csv", "tsv"):
        yield from instructions(file)
        return
    first = [value for _, value in file.sample_objects(100)] if file.format not in ("lines", "fasttext", "tmx") else []
    if first and all(isinstance(value, list) for value in first):  # each record is itself a list of turns
        file.report.taken["messages"] = pick("each record is a list of turns", "每条记录是一个轮次列表")
        for line, value in file.objects():
            yield Row(line, {}, value), value
        return
    keys = {str(key).lower() for value in first if isinstance(value, dict) for key in value}
    known = {name for layout in CONVERSATION.layouts for name in layout["messages"]}
    if "messages" in file.fields or (keys & known and "instruction" not in file.fields):
        for row in named_rows(file, CONVERSATION, None):
            yield row, row.values["messages"]
    else:
        yield from instructions(file, CHECKED if "checks" in file.fields or keys & set(CHECKS.split()) else INSTRUCTION)


def instructions(file: RecordFile, roles: Roles = INSTRUCTION) -> Iterator[tuple[Row, Any]]:
    """The conversations of records with an instruction and an answer (see :func:`conversations`)."""
    for row in named_rows(file, roles, looks):
        try:
            messages = from_instruction(row.values, file)
        except BadMessages as error:
            file.bad(row.line, str(error), row.raw, '{"instruction": "...", "input": "", "output": "..."}')
            continue
        yield row, messages


def from_instruction(values: dict[str, Any], file: RecordFile) -> tuple[Message, ...]:
    """The messages of one record in the layout of Alpaca, or of a prompt and its completion.

    Raises:
        BadMessages: a part is not text.
    """
    prompt, answer = values["instruction"], values.get("output")
    said = [] if answer is None and values.get("checks") else [("assistant", answer)]
    if isinstance(prompt, list) or isinstance(answer, list):
        parts = [
            messages_of(part, file) if isinstance(part, list) else (message(role, part),)
            for role, part in [("user", prompt), *said]
        ]
        return tuple(item for part in parts for item in part)
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
    return (*messages, message("user", question), *(message(role, part) for role, part in said))


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


def checks_of(values: dict[str, Any]) -> tuple[Check, ...]:
    """What can be checked of an answer: names with their arguments beside them (IFEval), or inside.

    Raises:
        BadMessages: there is something else.
    """
    given, arguments = values.get("checks"), values.get("kwargs")
    if isinstance(given, str) and given.strip():  # the cell of a table
        with contextlib.suppress(ValueError):
            given = json.loads(given)
    items = [given] if isinstance(given, (str, dict)) and given else given or []
    items = items if isinstance(items, list) else [items]
    beside = arguments if isinstance(arguments, list) and arguments else [{}] * len(items)
    checks: list[Check] = []
    for item, more in zip(items, beside, strict=False):
        own = {"id": item} if isinstance(item, str) else item
        if not isinstance(own, dict) or not isinstance(own.get("id"), str) or not isinstance(more or {}, dict):
            break
        checks.append({str(key): value for key, value in {**(more or {}), **own}.items() if value is not None})
    if not len(items) == len(beside) == len(checks):
        raise BadMessages(
            pick(
                'the checks are not a list like [{"id": "keywords:existence", "keywords": ["snow"]}]',
                '检查项不是 [{"id": "keywords:existence", "keywords": ["雪"]}] 这样的列表',
            )
        )
    return tuple(checks)


def check_dialogue(messages: tuple[Message, ...], file: RecordFile, checked: bool = False) -> None:
    """Refuse a conversation from which nothing can be learnt; note what is unusual.

    Args:
        checked: answers can be checked, so that none has to be there.

    Raises:
        BadMessages: the assistant says nothing, or the system speaks in the middle.
    """
    roles = [item["role"] for item in messages]
    if "assistant" not in roles and not checked:
        raise BadMessages(pick("the assistant says nothing", "没有助手的消息"))
    if checked and "user" not in roles:
        raise BadMessages(pick("the user says nothing", "没有用户的消息"))
    if "system" in roles[1:]:
        raise BadMessages(pick("the system speaks after the beginning", "system 消息不在开头"))
    if roles[-1] != "assistant" and not checked:
        file.report.notes[pick("a dialogue does not end with the assistant", "对话不以助手的消息结束")] += 1
    talk = [role for role in roles if role != "system"]
    if talk and talk[0] == "assistant":
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
