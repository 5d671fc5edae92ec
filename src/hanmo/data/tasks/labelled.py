"""Texts with labels: jsonl, JSON arrays, parquet, csv, tsv with or without header, fastText."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.named import Column, Roles, Row, ambiguous, as_text, named_rows, names
from hanmo.data.tasks.types import Labelled
from hanmo.errors import DataError
from hanmo.language import pick

LABEL = """
    label labels category categories class classes target intent sentiment polarity topic tag tags label_name gold_label
    gold y label_desc star stars rating 标签 类别 分类 类目 意图 情感 标注
"""
TEXT = """
    text sentence content review comment message utterance query question title body document article sms tweet abstract
    description input 文本 句子 内容 正文 评论 标题 摘要 问题
"""
ROLES = Roles(
    ("text", "label"),
    ("pair",),
    (
        names(text="sentence1 句子1", label=LABEL, pair="sentence2 句子2"),
        names(text="text_a text1 文本1", label=LABEL, pair="text_b text2 文本2"),
        names(text="premise 前提", label=LABEL, pair="hypothesis 假设"),
        names(text="question1 q1", label=LABEL, pair="question2 q2"),
        names(text=TEXT, label=LABEL, pair="pair text_pair sentence_pair"),
    ),
)
LONGEST_LABEL = 60  # characters, on average; longer ones are texts
ENOUGH = 100  # records from which it can be told whether a column holds labels
MOST_LABELS = 0.5  # of the number of records
FASTTEXT = re.compile(r"((?:__label__\S+\s+)*__label__\S+)(?:\s+(.*))?", re.DOTALL)


def read_labelled(file: RecordFile, separator: str | None = None) -> Iterator[Labelled]:
    """The texts of a file with their labels.

    Args:
        separator: what stands between several labels in one cell or string.

    Raises:
        DataError: it cannot be told what is text and what is label, or the labels are no labels.
    """
    seen: set[str] = set()
    total = 0
    rows = fasttext_rows(file) if file.format == "fasttext" else named_rows(file, ROLES, looks)
    for row in rows:
        record = labelled(file, row, separator)
        if record is None:
            continue
        total += 1
        seen.update(record.labels)
        if total == ENOUGH * 10:
            refuse_texts_as_labels(file, row, seen, total, separator)
        yield record
    if total >= ENOUGH:
        refuse_texts_as_labels(file, row, seen, total, separator)


def labelled(file: RecordFile, row: Row, separator: str | None) -> Labelled | None:
    """One record; None if it is bad."""
    text = as_text(row.values["text"])
    if not text:
        file.bad(row.line, pick("the text is empty", "文本为空"), row.raw, pick("a text", "一段文本"))
        return None
    labels = labels_of(row.values["label"], separator)
    if labels is None:
        file.bad(
            row.line,
            pick("the label is empty or not a label", "标签为空或不是标签"),
            row.raw,
            pick("a word or a number, or a list of them", "词或数字，或其列表"),
        )
        return None
    pair = row.values.get("pair")
    if pair is not None:
        pair = as_text(pair)
        if not pair:
            file.bad(row.line, pick("the second text is empty", "第二段文本为空"), row.raw, pick("a text", "一段文本"))
            return None
    return Labelled(text, labels, pair, file=file.name, line=row.line)


def labels_of(value: Any, separator: str | None) -> tuple[str, ...] | None:
    """The labels in a value, each once; None if it is none.

    >>> labels_of("sport, news", ","), labels_of(3, None), labels_of([], None), labels_of(" ", None)
    (('sport', 'news'), ('3',), (), None)
    """
    if isinstance(value, list):
        single = [labels_of(item, None) for item in value]
        if any(item is None for item in single):
            return None
        return tuple(dict.fromkeys(label for item in single if item for label in item))
    if isinstance(value, bool):
        value = json.dumps(value)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    text = as_text(value)
    if not text:
        return () if separator and text == "" else None
    parts = [part.strip() for part in text.split(separator)] if separator else [text]
    return tuple(dict.fromkeys(part for part in parts if part))


def refuse_texts_as_labels(file: RecordFile, row: Row, seen: set[str], total: int, separator: str | None) -> None:
    """Refuse labels that nearly all differ: they are texts, or numbers of records.

    Raises:
        DataError: they are, and the user did not name them.
    """
    if "label" in file.fields or separator or len(seen) <= MOST_LABELS * total:
        return
    raise DataError(
        f"what was taken for the label has {len(seen):,} different values in {total:,} records, such as "
        f"'{min(seen)[:40]}'",
        where=f"{file.name}:{row.line}",
        why=f"labels recur; taken was {file.report.taken.get('label', '')}",
        fix="say which column or key it is: --fields label=NAME; or, if one cell holds several labels, what stands "
        "between them: --label-separator ,",
        zh=f"被当作标签的列在 {total:,} 条记录中有 {len(seen):,} 个不同的值（如 '{min(seen)[:40]}'），不像标签。"
        "请用 --fields label=列名 指定；若一格中有多个标签，请用 --label-separator 指定分隔符",
    )


def looks(file: RecordFile, columns: list[Column], given: dict[str, int]) -> dict[str, tuple[int, str]]:
    """Text and label of a table without header: the longest column, and the one with few different short values.

    Raises:
        DataError: more than one column, or none, could hold the labels.
    """
    as_named = pick("as named", "按指定")
    found = {role: (number, as_named) for role, number in given.items()}
    rest = [column for column in columns if column.number not in given.values()]
    if "text" not in found:
        varied = [column for column in rest if len(column.values) > 1] or rest
        texts = [column for column in varied if not column.numeric] or varied
        if not texts:
            raise ambiguous(file, columns, ("text", "label"))
        text = max(texts, key=lambda column: column.mean_length)
        found["text"] = (text.number, pick("the longest texts", "文本最长"))
        rest.remove(text)
    if "label" not in found:
        label = label_column(rest)
        if label is None:
            raise ambiguous(file, columns, ("text", "label"))
        found["label"] = (
            label.number,
            pick(f"{len(label.values)} different values", f"{len(label.values)} 个不同的值"),
        )
    return found


def label_column(columns: Sequence[Column]) -> Column | None:
    """The one column that can hold labels, or None."""
    short = [column for column in columns if column.mean_length <= LONGEST_LABEL]
    if len(short) == 1:
        return short[0]
    varied = [column for column in short if len(column.values) > 1 and not column.counts_up]
    recurring = [column for column in varied if len(column.values) <= MOST_LABELS * len(column.cells)]
    for candidates in (recurring, varied):
        if candidates:
            return candidates[0] if len(candidates) == 1 else None
    return None


def fasttext_rows(file: RecordFile) -> Iterator[Row]:
    """The rows of a fastText file: ``__label__spam __label__advert Win a prize!``."""
    file.report.taken.update(label="__label__...", text=pick("the rest of the line", "行的其余部分"))
    for line, text in file.lines():
        if not text.strip() or file.damaged(line, text):
            continue
        found = FASTTEXT.fullmatch(text.strip())
        if found is None or not found[2]:
            what = pick("the line has no label or no text", "该行没有标签或没有文本")
            file.bad(line, what, text, "__label__NAME text")
            continue
        labels = [label.removeprefix("__label__") for label in found[1].split()]
        yield Row(line, {"text": found[2], "label": labels}, text)
