"""Pairs of texts for translation and summarisation: jsonl, JSON, parquet, csv, tsv, TMX, two aligned files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.named import Column, Roles, ambiguous, as_text, named_rows, names
from hanmo.data.tasks.tmx import read_tmx
from hanmo.data.tasks.types import Pair
from hanmo.errors import DataError
from hanmo.language import pick

ENGLISH, CHINESE = "en eng english en_us en-us 英文 英语", "zh cmn chinese zh_cn zh-cn cn 中文 汉语"
SUMMARY = "summary highlights tldr tl;dr headline abstract title target 摘要 标题"
ROLES = Roles(
    ("source", "target"),
    (),
    (
        names(source="source src source_text 源 源文 原文", target="target tgt trg target_text 目标 译文"),
        names(source=ENGLISH, target=CHINESE),
        names(
            source="document article text content body dialogue passage 正文 文章 内容 原文",
            target=SUMMARY,
        ),
        names(source="abstract 摘要", target="title headline 标题"),
        names(source="input", target="output target"),
    ),
)
LANGUAGE_LAYOUT = ROLES.layouts[1]
SOURCE_SUFFIXES = frozenset(["src", "source"])


def read_pairs(file: RecordFile) -> Iterator[Pair]:
    """The pairs of a file.

    A list in the place of the target holds further texts that are as good (several summaries of one article); a list
    in the place of the source holds its sentences.

    Raises:
        DataError: it cannot be told which column, key or language is source and which target.
    """
    if file.format == "tmx":
        yield from read_tmx(file)
        return
    if file.format == "lines":
        file.refuse(
            pick("the file has plain lines, one side of pairs only", "文件是纯文本行，只有一侧"),
            "name both sides: train.en train.zh; or write jsonl, or tsv with two columns",
            "请同时给出两侧文件（train.en train.zh），或改为 jsonl、两列 tsv",
            why=f"it begins with: {file.preview.strip()[:60]!r}",
        )
    roles = ordered_roles(file)
    for row in named_rows(file, roles, looks):
        targets = row.values["target"]
        listed = [as_text(item) for item in targets] if isinstance(targets, list) else [as_text(targets)]
        record = pair(file, row.line, as_text(row.values["source"]), listed, row.raw)
        if record is not None:
            yield record


def pair(file: RecordFile, line: int, source: str | None, targets: list[str | None], raw: Any) -> Pair | None:
    """One record; None if a side is empty."""
    texts = [target for target in targets if target]
    if not source or not texts:
        side = pick("target", "目标") if source else pick("source", "源")
        file.bad(line, pick(f"the {side} is empty", f"{side}文本为空"), raw, pick("two texts", "两段文本"))
        return None
    if len(texts) > 1:
        file.report.notes[pick("several targets; the first is learnt", "有多个目标文本，学习第一个")] += 1
    return Pair(source, texts[0], tuple(texts[1:]), file=file.name, line=line)


def ordered_roles(file: RecordFile) -> Roles:
    """The roles; where the keys are languages, the one that comes first in the file is the source.

    Pairs inside ``"translation": {"en": ..., "zh": ...}`` are found too.
    """
    if file.format in ("csv", "tsv"):
        keys = [cell.strip().lower() for cell in file.preview.partition("\n")[0].replace(",", "\t").split("\t")]
        inner = ""
    elif file.format in ("lines", "fasttext"):
        return ROLES
    else:
        first = [value for _, value in file.sample_objects(1) if isinstance(value, dict)]
        record = first[0] if first else {}
        nested = record.get("translation")
        inner = "translation." if isinstance(nested, dict) else ""
        keys = [str(key) for key in (nested if isinstance(nested, dict) else record)]
    lowered = [key.lower() for key in keys]
    sides = [next((lowered.index(n) for n in LANGUAGE_LAYOUT[role] if n in lowered), None) for role in ROLES.required]
    if sides[0] is None or sides[1] is None:
        return ROLES
    ordered = sorted(place for place in sides if place is not None)
    chosen = {role: f"{inner}{keys[place]}" for role, place in zip(ROLES.required, ordered, strict=True)}
    if inner:
        file.fields = {**chosen, **file.fields}
        return ROLES
    layout = {role: (name.lower(),) for role, name in chosen.items()}
    return Roles(ROLES.required, (), (ROLES.layouts[0], layout, *ROLES.layouts[2:]))


def looks(file: RecordFile, columns: list[Column], given: dict[str, int]) -> dict[str, tuple[int, str]]:
    """Source and target of a table without header: its two columns of texts, in this order.

    Raises:
        DataError: there are not exactly two, leaving out numbers and what is the same in all records.
    """
    found = {role: (number, pick("as named", "按指定")) for role, number in given.items()}
    rest = [column for column in columns if column.number not in given.values()]
    if len(columns) > 2:
        rest = [column for column in rest if not column.same_in_all and not column.numeric]
    open_roles = [role for role in ("source", "target") if role not in found]
    if len(rest) != len(open_roles):
        raise ambiguous(file, columns, ("source", "target"))
    reason = pick("the texts, in their order", "按列的先后")
    found.update({role: (column.number, reason) for role, column in zip(open_roles, rest, strict=True)})
    return found


def read_aligned(source: RecordFile, target: RecordFile) -> Iterator[Pair]:
    """The pairs of two files that say the same line for line; the record's place is that of the source.

    Raises:
        DataError: one file has more lines.
    """
    aligned = pick("with", "对齐于")
    source.report.taken["source"] = pick("every line", "每一行")
    source.report.taken["target"] = f"{aligned} {target.name}"
    for left, right in zip_longest(source.lines(), target.lines()):
        if left is None or right is None:
            raise uneven(source, target, left or right)
        (line, text), (_, translation) = left, right
        if not text.strip() and not translation.strip():
            continue
        if source.damaged(line, text) or target.damaged(line, translation):
            continue
        record = pair(source, line, as_text(text), [as_text(translation)], [text, translation])
        if record is not None:
            yield record


def uneven(source: RecordFile, target: RecordFile, extra: tuple[int, str]) -> DataError:
    """The error for aligned files of different lengths."""
    line, text = extra
    shown = " ".join(text.split())[:60]
    return DataError(
        f"the files {source.name} and {target.name} are not aligned: only one of them has a line {line}: {shown}",
        where=f"{source.name}:{line}",
        why="line n of one file must be the translation of line n of the other",
        fix="remove the blank or broken lines that only one file has, or write both sides into one tsv file",
        zh=f"{source.name} 与 {target.name} 没有逐行对齐：只有其中一个有第 {line} 行（{shown}）。"
        "请删去单边多出的行，或把两边写进同一个 tsv 文件",
    )
