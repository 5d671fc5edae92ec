"""Answers of which one is preferred, for DPO and its relatives.

``prompt``, ``chosen`` and ``rejected`` as texts or lists of messages (which may repeat the prompt), sharegpt's
``conversations`` with a chosen and a rejected message, and transcripts without prompt (hh-rlhf).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hanmo.data.tasks.dialogues import BadMessages, content_of, message, messages_of, transcript
from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.named import Roles, Row, named_rows, names
from hanmo.data.tasks.types import Message, Preference
from hanmo.language import pick

CHOSEN = "chosen chosen_response response_chosen preferred accepted answer_chosen better 优选 好回答"
REJECTED = "rejected rejected_response response_rejected dispreferred answer_rejected worse 拒绝 差回答"
ROLES = Roles(
    ("chosen", "rejected"),
    ("prompt", "input", "system"),
    (
        names(
            chosen=CHOSEN,
            rejected=REJECTED,
            prompt="prompt conversations messages instruction question query 提示 指令 问题",
            input="input 输入",
            system="system system_prompt 系统",
        ),
    ),
)
EXPECTED = '{"prompt": "...", "chosen": "...", "rejected": "..."}'


def read_preferences(file: RecordFile) -> Iterator[Preference]:
    """The preferences of a file.

    Raises:
        DataError: it cannot be told which key or column is what.
    """
    for row in named_rows(file, ROLES, None):
        try:
            record = preference(file, row)
        except BadMessages as error:
            file.bad(row.line, str(error), row.raw, EXPECTED)
            continue
        yield record


def preference(file: RecordFile, row: Row) -> Preference:
    """One record.

    Raises:
        BadMessages: a part is missing, the answers are equal, or more than an answer differs.
    """
    values = row.values
    sides = [answer_messages(values[role], values.get("prompt") is None, file) for role in ("chosen", "rejected")]
    shared = 0
    while shared < min(len(side) for side in sides) - 1 and sides[0][shared] == sides[1][shared]:
        shared += 1
    prompt = prompt_messages(values, file)
    repeated = sides[0][:shared]
    if repeated and prompt and repeated[-1] != prompt[-1]:
        raise BadMessages(pick("the messages before the answers are not the prompt", "回答之前的消息与 prompt 不同"))
    # the longer one: a prompt alone may leave out the system message, or all turns but the last
    prompt = max(prompt, repeated, key=len)
    system = values.get("system")
    if isinstance(system, str) and system.strip() and (not prompt or prompt[0]["role"] != "system"):
        prompt = (message("system", system), *prompt)
    if not prompt or prompt[-1]["role"] == "assistant" or not any(item["role"] == "user" for item in prompt):
        raise BadMessages(pick("there is no prompt that ends with the user", "没有以用户消息结束的 prompt"))
    answers = []
    for side, name in zip(sides, ("chosen", "rejected"), strict=True):
        rest = side[shared:]
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            what = pick(f"'{name}' is not one answer of the assistant", f"'{name}' 不是助手的一条回答")
            raise BadMessages(what)
        answers.append(rest[0]["content"])
    if answers[0].strip() == answers[1].strip():
        raise BadMessages(pick("chosen and rejected are the same", "chosen 与 rejected 相同"))
    return Preference(prompt, answers[0], answers[1], file=file.name, line=row.line)


def answer_messages(value: Any, alone: bool, file: RecordFile) -> tuple[Message, ...]:
    """The messages of one side; a text is an answer, or (``alone``, without a prompt beside it) a transcript.

    Raises:
        BadMessages: it is neither.
    """
    if isinstance(value, (list, dict)):
        return messages_of(value, file)
    return transcript(content_of(value)) if alone else (message("assistant", value),)


def prompt_messages(values: dict[str, Any], file: RecordFile) -> tuple[Message, ...]:
    """The messages of the prompt, if the record has one of its own.

    Raises:
        BadMessages: it is not text and no messages.
    """
    prompt, more = values.get("prompt"), values.get("input")
    if prompt is None:
        return ()
    if isinstance(prompt, (list, dict)):
        return messages_of(prompt, file)
    text = content_of(prompt)
    if text.startswith("\n\nHuman:"):
        return transcript(text.removesuffix("\n\nAssistant:"))
    if isinstance(more, str) and more.strip():
        text = f"{text}\n{more}" if text.strip() else more
    return (message("user", text),)
