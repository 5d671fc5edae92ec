"""Predicates with their arguments, a record for each: jsonl of sentences with frames, or of one frame a line.

Ends are inclusive, as in all common releases of such data:

- ``{"tokens": [...], "frames": [{"predicate": 3, "roleset": "sell.01", "args": [["ARG1", 0, 2]]}]}``
- ``{"tokens": [...], "predicate": 3, "args": [{"role": "ARG1", "start": 0, "end": 2}]}``
- ``{"tokens": [...], "tags": ["B-ARG1", "I-ARG1", "I-ARG1", "B-V"]}``: the predicate is the V
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, TypeGuard

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.formats import JSON_FORMATS
from hanmo.data.tasks.named import Roles, named_rows, names
from hanmo.data.tasks.schemes import SPAN_TAG, spans_of
from hanmo.data.tasks.types import Proposition
from hanmo.language import pick
from hanmo.text.normalize import SURROGATE

TOKENS = "tokens words 词 分词"
PREDICATES = "predicate verb pred predicate_index 谓词"
ARGUMENTS = "args arguments roles spans 论元"
SENSES = "roleset sense frame lemma 义项"
FRAMES = Roles(
    ("tokens", "frames"), (), (names(tokens=TOKENS, frames="frames propositions props srl predicates verbs 谓词论元"),)
)
SINGLE = Roles(
    ("tokens", "predicate", "arguments"),
    ("sense",),
    (names(tokens=TOKENS, predicate=PREDICATES, arguments=ARGUMENTS, sense=SENSES),),
)
TAGGED = Roles(("tokens", "tags"), ("sense",), (names(tokens=TOKENS, tags="tags bio srl_tags 标签", sense=SENSES),))
ROLES = tuple(dict.fromkeys((*FRAMES.all, *SINGLE.all, *TAGGED.all)))
EXPECTED = '{"tokens": ["..."], "frames": [{"predicate": 1, "args": [["ARG0", 0, 0]]}]}'
VERB = "V"  # the role of a predicate itself


class BadFrame(Exception):
    """Why a frame cannot be used."""


def read_propositions(file: RecordFile) -> Iterator[Proposition]:
    """The predicates of a file, sentence by sentence; a sentence with a frame that cannot be is a bad record.

    Raises:
        DataError: it cannot be told which key is what.
    """
    if file.format not in JSON_FORMATS and file.format != "parquet":
        file.refuse(
            pick("semantic roles are read from jsonl", "语义角色数据须为 jsonl"),
            "write one sentence a line: " + EXPECTED,
            "请写成每行一句的 jsonl",
            why=f"expected {EXPECTED}",
        )
    idle = 0
    for row in named_rows(file, layout_of(file), None):
        try:
            tokens = tokens_of(row.values["tokens"])
            frames = frames_of(row.values)
            found = [proposition(tokens, frame) for frame in frames]
        except BadFrame as error:
            file.bad(row.line, str(error), row.raw, EXPECTED)
            continue
        idle += not found
        for predicate, arguments, sense in found:
            yield Proposition(tokens, predicate, arguments, sense, file=file.name, line=row.line)
    if idle:
        file.report.notes[pick("a sentence without predicate was passed over", "略过没有谓词的句子")] += idle


def layout_of(file: RecordFile) -> Roles:
    """Which of the three layouts the objects have: that of the first object that has one."""
    wanted = set(file.fields)
    for _, value in file.sample_objects(100):
        keys = {str(key).lower() for key in value} if isinstance(value, dict) else set()
        for layout in (FRAMES, SINGLE, TAGGED):
            usual = layout.layouts[0]
            if all(role in wanted or keys & set(usual[role]) for role in layout.required):
                return layout
    return FRAMES


def tokens_of(value: Any) -> tuple[str, ...]:
    """The tokens of a sentence.

    Raises:
        BadFrame: they are no list of words.
    """
    if not isinstance(value, list) or not value or not all(isinstance(token, str) and token for token in value):
        raise BadFrame(pick("tokens is not a list of words", "tokens 不是词的列表"))
    return tuple(SURROGATE.sub("\ufffd", token) for token in value)


def frames_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The frames of a sentence in whatever layout, with the keys of this module.

    Raises:
        BadFrame: it has none of the layouts.
    """
    if "frames" in values:
        frames = values["frames"]
        if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
            raise BadFrame(pick("frames is not a list of objects", "frames 不是对象列表"))
        return [
            {
                "predicate": value_of(frame, PREDICATES),
                "arguments": value_of(frame, ARGUMENTS),
                "sense": value_of(frame, SENSES),
            }
            for frame in frames
        ]
    if "tags" not in values:
        return [dict(values)]
    tags = values["tags"]
    if not isinstance(tags, list) or not all(isinstance(tag, str) and SPAN_TAG.fullmatch(tag) for tag in tags):
        raise BadFrame(pick("the tags are not B-ROLE, I-ROLE and O", "标签应为 B-角色、I-角色与 O"))
    if len(tags) != len(values["tokens"]):
        count = len(values["tokens"])
        raise BadFrame(pick(f"{count} tokens and {len(tags)} tags", f"{count} 个词，{len(tags)} 个标签"))
    spans = spans_of(tags)
    verbs = [start for start, _, role in spans if role == VERB]
    if len(verbs) > 1:
        raise BadFrame(pick("there are several predicates (V) in one row of tags", "一行标签中有多个谓词（V）"))
    arguments = [[role, start, end - 1] for start, end, role in spans if role != VERB]
    return [{"predicate": verbs[0], "arguments": arguments, "sense": values.get("sense")}] if verbs else []


def value_of(frame: Mapping[str, Any], usual: str) -> Any:
    """The value of the first usual name that a frame has."""
    return next((frame[name] for name in usual.split() if name in frame), None)


def proposition(tokens: tuple[str, ...], frame: Mapping[str, Any]) -> tuple[int, tuple[tuple[int, int, str], ...], str]:
    """Place, arguments and sense of a predicate.

    Raises:
        BadFrame: places outside the sentence, arguments that overlap each other or the predicate, a role without name.
    """
    place, given, sense = frame.get("predicate"), frame.get("arguments"), frame.get("sense")
    if not is_place(place) or not 0 <= place < len(tokens):
        raise BadFrame(
            pick(
                f"the predicate {place!r} is no place in a sentence of {len(tokens)} tokens",
                f"谓词位置 {place!r} 不在句中（共 {len(tokens)} 个词）",
            )
        )
    if not isinstance(given, list):
        raise BadFrame(pick("the arguments are not a list", "论元不是列表"))
    arguments = sorted(span for span in (argument(item, len(tokens)) for item in given) if span[2] != VERB)
    for first, second in pairwise(sorted([*arguments, (place, place + 1, VERB)])):
        if first[1] > second[0]:
            raise BadFrame(
                pick(
                    f"{first[2]} and {second[2]} overlap at token {second[0]}",
                    f"{first[2]} 与 {second[2]} 在第 {second[0]} 个词处重叠",
                )
            )
    return place, tuple(arguments), sense if isinstance(sense, str) else ""


def argument(item: Any, length: int) -> tuple[int, int, str]:
    """First token, end (exclusive) and role of an argument.

    Raises:
        BadFrame: it is none.
    """
    if isinstance(item, dict):
        item = [value_of(item, "role label type 角色"), value_of(item, "start first"), value_of(item, "end last")]
    if not isinstance(item, list) or len(item) != 3:
        raise BadFrame(pick(f"not an argument: {item!r}", f"不是论元：{item!r}"))
    role, first, last = item
    if not isinstance(role, str) or not role.strip() or SURROGATE.search(role):
        raise BadFrame(pick(f"an argument without role: {item!r}", f"论元缺少角色：{item!r}"))
    if not is_place(first) or not is_place(last) or not 0 <= first <= last < length:
        raise BadFrame(
            pick(
                f"the argument {item!r} is no span of a sentence of {length} tokens",
                f"论元 {item!r} 不是句中的片段（共 {length} 个词）",
            )
        )
    return first, last + 1, role.strip()


def is_place(value: Any) -> TypeGuard[int]:
    """Whether this is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
