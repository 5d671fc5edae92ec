"""Entities from a language model that is asked to list them: ``type: text``, one a line, or JSON.

What it writes is found again in the text, in order, where tokens begin and end; what does not stand there, or has a
type that is not known, is no answer. A long sentence is asked about in pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hanmo.data.tasks.schemes import spans_of
from hanmo.data.tasks.types import Tagged
from hanmo.errors import UsageError
from hanmo.tasks.base import Form, System
from hanmo.tasks.prompts import Prompt, Speaker, choose_shots, mark_of, mostly_chinese
from hanmo.text.normalize import SURROGATE

MOST_TYPES = 32
PIECE = 128  # tokens that are asked about at once
LONGEST_ANSWER = 256  # tokens of the model
LINE = re.compile(r"[\s\-*•\d.)]*[\"'“]?([^\s:：\"'”]{1,64})[\"'”]?\s*[:：]\s*(.+)")
QUOTES = " \t\"'“”‘’「」『』`.,，。;；、"
TYPE_KEYS = ("type", "label", "entity_type", "类型", "标签")
TEXT_KEYS = ("text", "entity", "name", "span", "value", "实体", "文本")
Mention = tuple[str, str]  # type, text


class PromptedSpans(System[Tagged, tuple[str, ...]]):
    """A language model that is asked to list the entities of a text.

    Args:
        model: a language model, local or remote.
        train: records from which the types are known, and the worked examples.
        form: how many examples, the instruction, and types that no record tells.

    Raises:
        UsageError: no types of spans are known, or too many to ask for.
    """

    def __init__(self, model: Any, train: Sequence[Tagged], form: Form) -> None:
        self.speaker, self.name = Speaker(model), model.name
        self.kind = self.speaker.kind
        self.types = sorted({*form.labels, *(kind for record in train for _, _, kind in spans_of(record.tags))} - {""})
        tags = {tag for record in train for tag in record.tags}
        if not 1 <= len(self.types) <= MOST_TYPES or any(tag != "O" and tag[1:2] != "-" for tag in tags):
            raise UsageError(
                f"a language model is asked for 1 to {MOST_TYPES} types of spans, such as entities; these records have "
                f"{len(self.types)}",
                fix="give records with tags such as B-LOC and O: --train FILE; for parts of speech and words use a "
                "CRF or a network",
                zh=f"语言模型只能用于抽取 1 到 {MOST_TYPES} 类片段（如命名实体），现有 {len(self.types)} 类；"
                "请用 --train 给出带 B-LOC、O 等标签的记录；词性标注与分词请用 CRF 或神经网络",
            )
        chinese = mostly_chinese([record.text for record in train[:200]] or self.types)
        listed = "、".join(self.types) if chinese else ", ".join(self.types)
        self.none = "无" if chinese else "none"
        own = (
            f"请按原文顺序列出文本中的实体，每行一个，写成“类型: 原文”；没有实体就只写“{self.none}”。类型：{listed}。"
            if chinese
            else "List the entities in the text, in their order, one on each line as 'type: text', copied exactly. If "
            f"there are none, write '{self.none}'. Types: {listed}."
        )
        self.instruction = form.instruction or own
        self.field, self.lead = ("文本：", "实体：") if chinese else ("Text: ", "Entities:")
        self.shots = tuple(
            (self.field + piece.text, self.listed(piece))
            for piece in (part_of(record, 0, PIECE) for record in choose_shots(train, form.shots, form.seed))
        )

    def listed(self, record: Tagged) -> str:
        """The right answer about a record."""
        lines = [f"{kind}: {part_of(record, start, end).text}" for start, end, kind in spans_of(record.tags) if kind]
        return "\n".join(lines) or self.none

    def prompt(self, record: Tagged) -> Prompt:
        """The question about a record."""
        return Prompt(self.instruction, self.field + record.text, self.shots, self.lead)

    def pieces(self, record: Tagged) -> Iterator[Tagged]:
        """A record in pieces that the context holds together with their answers."""
        room, start, size = self.speaker.model.context_length, 0, PIECE
        while start < len(record.tokens):
            piece = part_of(record, start, start + size)
            if room and size > 1 and self.speaker.size(self.prompt(piece)) > room - min(LONGEST_ANSWER, room // 2):
                size = size // 2
                continue
            yield piece
            start += size

    def answer(self, records: Sequence[Tagged]) -> list[tuple[str, ...]]:
        """The tags of what the model lists, as far as it stands in the text."""
        clean = [replace(record, tokens=tuple(SURROGATE.sub("\ufffd", t) for t in record.tokens)) for record in records]
        pieces = [list(self.pieces(record)) for record in clean]
        asked = [piece for parts in pieces for piece in parts]
        written = iter(self.speaker.write([self.prompt(piece) for piece in asked], max_new_tokens=LONGEST_ANSWER))
        return [
            tuple(tag for piece in parts for tag in locate(piece, mentions(next(written), self.types)))
            for parts in pieces
        ]

    def signature(self) -> Mapping[str, Any]:
        """The prompt and its examples."""
        return mark_of(Prompt(self.instruction, "", self.shots, self.lead), len(self.shots))


def part_of(record: Tagged, start: int, end: int) -> Tagged:
    """Some tokens of a record."""
    spaces = None if record.spaces is None else record.spaces[start:end]
    return replace(record, tokens=record.tokens[start:end], tags=record.tags[start:end], spaces=spaces)


def mentions(answer: str, types: Sequence[str]) -> list[Mention]:
    """What a model says that there is: types with their known spelling, and texts.

    >>> mentions("LOC: Tampa Bay\\n- per: 'Ann'\\nnone of the others", ["LOC", "PER"])
    [('LOC', 'Tampa Bay'), ('PER', 'Ann')]
    >>> mentions('```json\\n[{"type": "LOC", "text": "Tampa"}, {"PER": ["Ann"]}]\\n```', ["LOC", "PER"])
    [('LOC', 'Tampa'), ('PER', 'Ann')]
    """
    known = {kind.casefold(): kind for kind in types}
    given = list(in_json(answer)) or [
        (match[1], text) for line in answer.splitlines() if (match := LINE.match(line)) for text in [match[2]]
    ]
    cleaned = ((kind.strip(QUOTES).casefold(), text.strip(QUOTES)) for kind, text in given)
    return [(known[kind], text) for kind, text in cleaned if kind in known and text]


def in_json(answer: str) -> Iterator[Mention]:
    """Types and texts in the first JSON value of an answer; nothing where there is none."""
    starts = [place for place in (answer.find("["), answer.find("{")) if place >= 0]
    if not starts:
        return
    try:
        value, _ = json.JSONDecoder().raw_decode(answer[min(starts) :])
    except (ValueError, RecursionError):
        return
    for item in value if isinstance(value, list) else [value]:
        yield from in_object(item)


def in_object(item: Any) -> Iterator[Mention]:
    """Types and texts in ``{"type": ..., "text": ...}``, in ``{type: text or texts}``, or in a list of two strings."""
    if isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item):
        yield item[0], item[1]
    if not isinstance(item, dict):
        return
    kind = next((item[key] for key in TYPE_KEYS if isinstance(item.get(key), str)), None)
    text = next((item[key] for key in TEXT_KEYS if isinstance(item.get(key), str)), None)
    if kind is not None and text is not None:
        yield kind, text
        return
    for key, value in item.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str):
                yield str(key), one
            elif isinstance(one, dict):
                yield from in_object(one)


def locate(record: Tagged, found: Iterable[Mention]) -> tuple[str, ...]:
    """The tags of a record whose entities are these, each at its first free place after the one before.

    An entity that does not stand after the one before is looked for from the beginning; case counts only where both
    spellings occur. Entities begin and end where tokens do.

    >>> locate(Tagged(("Ann", "met", "New", "York", "Ann"), ()), [("LOC", "New York"), ("PER", "Ann"), ("PER", "Ann")])
    ('B-PER', 'O', 'B-LOC', 'I-LOC', 'B-PER')
    """
    text, begins, ends, at = record.text, dict[int, int](), dict[int, int](), 0
    for place, token in enumerate(record.tokens):
        start = text.find(token, at)
        if start < 0:  # white space at the end, which a text does not keep
            break
        begins[start], ends[start + len(token)] = place, place
        at = start + len(token)
    tags, after = ["O"] * len(record.tokens), 0
    for kind, wanted in found:
        first = find_free(text, wanted, after, begins, ends, tags) or find_free(text, wanted, 0, begins, ends, tags)
        if first is None:
            continue
        start, end = first
        tags[begins[start] : ends[end] + 1] = [f"B-{kind}", *[f"I-{kind}"] * (ends[end] - begins[start])]
        after = end
    return tuple(tags)


def find_free(
    text: str, wanted: str, after: int, begins: Mapping[int, int], ends: Mapping[int, int], tags: Sequence[str]
) -> tuple[int, int] | None:
    """The characters of the first place where some text stands as whole tokens without a tag."""
    for flags in (re.NOFLAG, re.IGNORECASE):
        for match in re.compile(re.escape(wanted), flags).finditer(text, after):
            start, end = match.span()
            if start in begins and end in ends and set(tags[begins[start] : ends[end] + 1]) == {"O"}:
                return start, end
    return None
