"""From chat messages to token ids, through the model's own template.

The control tokens of a prompt must come from the template, never from the text of a message: a user who writes
``<|im_end|>`` must not be able to end his turn and speak as the system. The template is a program that may cut, trim
and compare the texts, so they cannot simply be encoded apart. Instead, before it runs, every character in a message
with which a control token begins or ends is replaced by a stand-in, a private-use character that occurs nowhere else.
In the result, a control token is one that the template wrote; then the stand-ins turn back into what they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hanmo.errors import DataError, ModelError
from hanmo.text.template import render_template
from hanmo.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")

# The template of the models that Hanmo trains: ChatML, each message between <|im_start|> and <|im_end|>.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def render_chat(
    tokenizer: Tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool = True
) -> list[int]:
    """Ids of a conversation in the form the model was trained on.

    Args:
        tokenizer: its ``chat_template`` is used.
        messages: each has a ``role`` (system, user, assistant or tool) and a ``content``; further texts such as
            ``name`` are passed to the template.
        add_generation_prompt: end with the beginning of an answer.

    Returns:
        What ``transformers``' ``apply_chat_template`` gives, except that control tokens written in a message are text.

    Raises:
        DataError: a message is malformed (its index is named), or the template refuses the conversation.
        ModelError: there is no template, or it fails.
    """
    rendered, stand_ins = render_marked(tokenizer, messages, add_generation_prompt)
    if not tokenizer.special_tokens:
        return tokenizer.encode(rendered)  # and there are no stand-ins
    return encode_marked(tokenizer, control_pattern(tokenizer.special_tokens), rendered, stand_ins)


def render_text(tokenizer: Tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """A conversation as text, for programs that want no ids: what a message says can no longer be told from markup.

    Raises:
        DataError, ModelError: as :func:`render_chat`.
    """
    marked, stand_ins = render_marked(tokenizer, messages, add_generation_prompt)
    return marked.translate({ord(twin): chr(point) for point, twin in stand_ins.items()})


def encode_marked(tokenizer: Tokenizer, control: re.Pattern[str], marked: str, stand_ins: dict[int, str]) -> list[int]:
    """Ids of a rendered text (or a part of it) in which stand-ins hide what looks like markup in the messages.

    Args:
        control: :func:`control_pattern` of the tokenizer's control tokens, of which there is at least one.
    """
    originals = {ord(twin): chr(point) for point, twin in stand_ins.items()}
    text = marked.translate(originals)
    if len(control.findall(text)) == len(control.findall(marked)):
        return tokenizer.encode(text, special=True)  # no message looks like a control token
    ids: list[int] = []
    at = 0
    for match in control.finditer(marked):
        ids += tokenizer.encode(marked[at : match.start()].translate(originals))
        ids.append(tokenizer.special_tokens[match[0]])
        at = match.end()
    return ids + tokenizer.encode(marked[at:].translate(originals))


def control_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, the longest first. They are literals, so the time is linear."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def render_marked(
    tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool
) -> tuple[str, dict[int, str]]:
    """The rendered conversation with stand-ins in the texts, and the stand-in of each character."""
    template = tokenizer.chat_template
    if not template:
        raise ModelError(
            "this model has no chat template, so it was not made for conversations",
            fix="let it continue a text instead: hanmo generate",
            zh="该模型没有对话模板，不是对话模型。请改用 hanmo generate 续写文本",
        )
    check_messages(messages)
    texts = [value for message in messages for key, value in message.items() if key != "role"]
    stand_ins = choose_stand_ins(tokenizer.special_tokens, [template, *texts])
    marked = [
        {key: value if key == "role" else value.translate(stand_ins) for key, value in message.items()}
        for message in messages
    ]
    names = {index: token for token, index in tokenizer.special_tokens.items()}
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    values: dict[str, Any] = {name: names.get(-1 if index is None else index, "") for name, index in roles.items()}
    values.update(add_generation_prompt=add_generation_prompt, tools=None, documents=None)
    return render_template(template, marked, values, stand_ins), stand_ins


def choose_stand_ins(tokens: Iterable[str], texts: list[str]) -> dict[int, str]:
    """For the first and last character of every control token, a private-use character that no text contains."""
    edges = sorted({ord(character) for token in map(str.strip, tokens) for character in token[:1] + token[-1:]})
    taken = set().union(*texts)
    free = (chr(point) for point in range(0x10FFFD, 0x0FFFFF, -1) if chr(point) not in taken)
    return dict(zip(edges, free, strict=False))


def check_messages(messages: list[dict[str, str]]) -> None:
    """Refuse what is not a conversation.

    Raises:
        DataError: naming the message by its index.
    """

    def refuse(index: int, what: str, zh: str) -> DataError:
        fix = "a message is {'role': 'user', 'content': '...'} with the role " + ", ".join(ROLES)
        return DataError(what, where=f"messages[{index}]", fix=fix, zh=zh)

    if not isinstance(messages, list) or not messages:
        raise DataError("there are no messages", fix="give at least one", zh="没有任何消息")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise refuse(index, "a message must be an object", "消息必须是一个对象")
        if message.get("role") not in ROLES:
            raise refuse(index, f"the role {message.get('role')!r} is not known", f"未知角色 {message.get('role')!r}")
        if not isinstance(message.get("content"), str):
            kind = type(message.get("content")).__name__
            raise refuse(index, f"the content must be text, not {kind}", f"content 必须是文本，而不是 {kind}")
        for key, value in message.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise refuse(index, f"the value of {key!r} must be text", f"{key!r} 的值必须是文本")
            try:
                value.encode()
            except UnicodeEncodeError as error:
                what = f"character {error.start} of {key!r} is a lone surrogate"
                raise refuse(index, what, f"{key!r} 的第 {error.start} 个字符是孤立的代理码元") from None
