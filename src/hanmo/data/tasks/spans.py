"""Texts with spans marked by characters, made into tokens with tags.

``{"text": ..., "spans": [{"start": 0, "end": 2, "label": "PER"}]}``, doccano's ``"label": [[0, 2, "PER"]]``, and
CLUENER's ``"label": {"name": {"叶老桂": [[9, 11]]}}``, whose ends are the last character of the span.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.named import look_up
from hanmo.data.tasks.types import Tagged
from hanmo.language import pick
from hanmo.text.normalize import SURROGATE

Span = tuple[int, int, str]  # first character, end (exclusive), label
SPAN_KEYS = ("spans", "entities", "entity_list", "label", "labels", "annotations", "实体")
STARTS = ("start", "start_offset", "begin", "start_idx")
ENDS = ("end", "end_offset", "end_idx")
LABELS = ("label", "type", "entity_type", "tag", "category")
SURFACES = ("text", "entity", "word", "mention")
# Chinese characters stand alone; other letters and digits make words; all else stands alone
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(rf"[{HAN}]|[^\W_{HAN}]+|[^\s]")


class BadSpans(Exception):
    """Why the spans of a record cannot be used."""


def read_spans(file: RecordFile) -> Iterator[Tagged]:
    """The sentences of objects with a text and spans, in IOB2."""
    text_key = file.fields.get("text", "text")
    expected = (
        '{"tokens": ["...", "..."], "tags": ["B-PER", "O"]} or '
        '{"text": "...", "spans": [{"start": 0, "end": 2, "label": "..."}]}'
    )
    noted = False
    for line, value in file.objects():
        text = look_up(value, text_key) if isinstance(value, dict) else None
        key = span_key(value, file.fields) if isinstance(value, dict) else None
        if not isinstance(text, str) or not text.strip() or key is None:
            file.bad(line, pick("the record has no text or no spans", "记录没有文本或片段"), value, expected)
            continue
        if not noted:
            file.report.taken.update(text=f"'{text_key}'", spans=f"'{key}'")
            noted = True
        try:
            spans, inclusive = spans_in(value[key] if key in value else look_up(value, key), text)
            tokens, tags, spaces = tag_text(text, spans)
        except BadSpans as error:
            file.bad(line, str(error), value, expected)
            continue
        if inclusive:
            file.report.notes[pick("the ends of spans are their last characters", "片段的终点为其最后一个字符")] += 1
        yield Tagged(tokens, tags, spaces, file=file.name, line=line)


def span_key(value: Mapping[str, Any], fields: Mapping[str, str]) -> str | None:
    """The key of the spans in a record."""
    if "spans" in fields:
        return fields["spans"] if look_up(value, fields["spans"]) is not None else None
    return next((key for key in SPAN_KEYS if isinstance(value.get(key), (list, dict))), None)


def spans_in(value: Any, text: str) -> tuple[list[Span], bool]:
    """The spans of a record in order, and whether it counted their ends inclusively.

    Raises:
        BadSpans: they are not spans, lie outside the text, overlap, or are not where they say.
    """
    found: list[tuple[int, int, str, str | None]] = []  # with the text of the span, where the record has it
    closed = isinstance(value, dict)  # CLUENER: the last character counts in
    if isinstance(value, dict):
        for label, surfaces in value.items():
            for surface, places in surfaces.items() if isinstance(surfaces, dict) else [("", None)]:
                listed = places if isinstance(places, list) else [None]
                found += [span_of(place, str(label), surface) for place in listed]
    else:
        found = [span_of(item, None, None) for item in value]
    inclusive = False
    spans = []
    for start, end, label, surface in found:
        if surface is not None and (closed or text[start:end] != surface) and text[start : end + 1] == surface:
            end, inclusive = end + 1, True
        if not 0 <= start < end <= len(text):
            what = f"{start} - {end}"
            raise BadSpans(pick(f"the span {what} is not inside the text", f"片段 {what} 不在文本之内"))
        if surface is not None and text[start:end] != surface:
            there = text[start:end]
            raise BadSpans(
                pick(
                    f"'{surface}' is not at {start}; there is '{there}'",
                    f"'{surface}' 不在 {start} 处（那里是 '{there}'）",
                )
            )
        spans.append((start, end, label))
    spans = sorted(set(spans))
    for one, other in pairwise(spans):
        if other[0] < one[1]:
            shown = f"'{text[one[0] : one[1]]}', '{text[other[0] : other[1]]}'"
            raise BadSpans(pick(f"spans overlap: {shown}", f"片段重叠：{shown}"))
    return spans, inclusive


def span_of(item: Any, label: str | None, surface: str | None) -> tuple[int, int, str, str | None]:
    """Start, end, label and text of one span.

    Raises:
        BadSpans: it is none.
    """
    start: Any = None
    end: Any = None
    if isinstance(item, dict):
        start = next((item[key] for key in STARTS if key in item), None)
        end = next((item[key] for key in ENDS if key in item), None)
        label = next((str(item[key]) for key in LABELS if key in item), None)
        surface = next((item[key] for key in SURFACES if isinstance(item.get(key), str)), None)
    elif isinstance(item, list) and len(item) == (3 if label is None else 2):
        start, end = item[:2]
        label = str(item[2]) if label is None else label
    is_number = all(isinstance(place, int) and not isinstance(place, bool) for place in (start, end))
    if not is_number or not label:
        raise BadSpans(
            pick(f"not a span with start, end and label: {item}", f"不是含 start、end、label 的片段：{item}")
        )
    return start, end, label, surface


def tag_text(text: str, spans: list[Span]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[bool, ...]]:
    """Tokens, IOB2 tags, and whether white space follows each token; tokens are cut where spans begin or end.

    Raises:
        BadSpans: a span holds white space only.

    >>> tag_text("浙商 Bank A", [(0, 7, "ORG")])
    (('浙', '商', 'Bank', 'A'), ('B-ORG', 'I-ORG', 'I-ORG', 'O'), (False, True, True, False))
    """
    tokens: list[str] = []
    tags: list[str] = []
    spaces: list[bool] = []
    at = 0
    for start, end, label in [*spans, (len(text), len(text), "")]:
        for begin, stop, kind in ((at, start, ""), (start, end, label)):
            first = True
            for match in TOKEN.finditer(text, begin, stop):
                tokens.append(SURROGATE.sub("\ufffd", match[0]))
                tags.append(f"{'B' if first else 'I'}-{kind}" if kind else "O")
                spaces.append(text[match.end() : match.end() + 1].isspace())
                first = False
            if kind and first:
                raise BadSpans(pick(f"the span {start} - {end} is blank", f"片段 {start} - {end} 为空白"))
        at = end
    return tuple(tokens), tuple(tags), tuple(spaces)
