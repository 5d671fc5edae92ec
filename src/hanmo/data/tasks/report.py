"""What reading records has shown: formats, columns, counts, lengths, and the records that cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hanmo.data.encodings import readable_name
from hanmo.data.problems import LISTED, Problems, excerpt
from hanmo.errors import DataError
from hanmo.language import pick

MOST_BAD = 0.05  # share of bad records above which a file is taken for something else than it was read as
EARLY_BAD = 200  # with so many bad records, more of them than good ones, a large file is not read to its end
LISTED_LABELS = 12
LENGTH_NAMES = {
    "text": ("characters of the text", "文本字符数"),
    "tokens": ("tokens", "词数"),
    "source": ("characters of the source", "源文本字符数"),
    "target": ("characters of the target", "目标文本字符数"),
    "messages": ("messages", "消息数"),
    "dialogue": ("characters of the dialogue", "对话字符数"),
    "prompt": ("characters of the prompt", "提示字符数"),
    "chosen": ("characters of the chosen answer", "优选回答字符数"),
    "rejected": ("characters of the rejected answer", "劣选回答字符数"),
    "reference": ("characters of the reference", "参考答案字符数"),
    "context": ("characters of the context", "上下文字符数"),
    "question": ("characters of the question", "问题字符数"),
    "anchor": ("characters of the anchor", "锚文本字符数"),
    "positive": ("characters of the positive", "正例字符数"),
}


def shown_record(raw: Any) -> str:
    """A record as one line of text: JSON for objects, cells with bars between them for rows."""
    if isinstance(raw, str):
        return raw
    if isinstance(raw, list) and all(isinstance(cell, str) for cell in raw):
        return " | ".join(raw)
    return json.dumps(raw, ensure_ascii=False, default=str)


class TaskProblems(Problems):
    """The bad records of a reading; a few are counted and listed, too many stop it."""

    def __init__(self, skip_bad: bool = True) -> None:
        super().__init__(skip_bad)
        self.expected: dict[str, tuple[str, str]] = {}  # of the listed ones, by place: what was expected, and the fix

    def bad(self, where: str, what: str, record: str = "", *, expected: str, fix: str = "") -> None:
        """Note a bad record; see :meth:`Problems.bad`."""
        super().bad(where, what, record, expected=expected, fix=fix)
        if self.count <= LISTED:
            self.expected.setdefault(where, (expected, fix))

    def stop(self, name: str, bad: int, total: int, first: dict[str, str]) -> DataError:
        """The error for a file with too many bad records."""
        expected, fix = self.expected.get(first["where"], ("", ""))
        shown = f": {first['record']}" if first["record"] else ""
        return DataError(
            f"{bad:,} of {total:,} records of {name} cannot be used; the first one: {first['what']}{shown}",
            where=first["where"],
            why=f"expected {expected}" if expected else "",
            fix=fix or "if the file is right, say which column or key is what: --fields NAME=COLUMN",
            zh=f"{name} 的 {total:,} 条记录中有 {bad:,} 条无法使用；第一条：{first['what']}{shown}"
            + (f"（应为：{expected}）" if expected else "")
            + f"。{fix or '若文件无误，请用 --fields 名称=列 指定各列（键）的含义'}",
        )


@dataclass
class FileReport:
    """One file: how it was read and what it gave.

    Attributes:
        format: as sniffed, in words.
        taken: for each role (text, label, ...) the key or column it was taken from, and why.
        scheme: of tags, as detected, and what it was made into.
        notes: what was repaired, passed over or assumed, and how often.
        kinds: how often each type of span (or plain tag) stands in the file, before any is renamed.
        skipped: why a file found in a folder was not read.
    """

    name: str
    format: str = ""
    encoding: str = ""
    taken: dict[str, str] = field(default_factory=dict)
    scheme: str = ""
    records: int = 0
    bad: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    skipped: str = ""

    def describe(self) -> str:
        """A few lines of text."""
        if self.skipped:
            return f"{self.name}: " + pick(f"left out, {self.skipped}", f"未读取：{self.skipped}")
        head = ", ".join(filter(None, [self.format, readable_name(self.encoding)]))
        counted = pick(f"{self.records:,} records", f"{self.records:,} 条记录")
        if self.bad:
            counted += pick(f", {self.bad:,} bad ones left out", f"，另有 {self.bad:,} 条无法使用")
        lines = [f"{self.name}: {head}; {counted}"]
        lines += [f"  {role}: {source}" for role, source in self.taken.items()]
        if self.scheme:
            lines.append(f"  {pick('scheme', '标签体系')}: {self.scheme}")
        lines += [f"  {count:,} x {note}" for note, count in self.notes.items()]
        return "\n".join(lines)


@dataclass
class RecordsReport:
    """What a reading gave.

    Attributes:
        lengths: for each part of a record (a key of ``LENGTH_NAMES``) the smallest length, median, 95th percentile and
            largest.
        labels: how often each label occurs (for labels and tags of spans: each span once).
    """

    kind: str
    files: list[FileReport] = field(default_factory=list)
    problems: TaskProblems = field(default_factory=TaskProblems)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)

    @property
    def records(self) -> int:
        """How many records could be used."""
        return sum(file.records for file in self.files)

    def describe(self) -> str:
        """The report as text, in the user's language."""
        lines = [file.describe() for file in self.files]
        for key, spread in self.lengths.items():
            name = pick(*LENGTH_NAMES[key])
            lines.append(
                pick(
                    f"{name}: {spread['min']:,} to {spread['max']:,}, median {spread['median']:,}, "
                    f"95 % up to {spread['p95']:,}",
                    f"{name}：{spread['min']:,} 至 {spread['max']:,}，中位数 {spread['median']:,}，"
                    f"95% 不超过 {spread['p95']:,}",
                )
            )
        if self.labels:
            top = ", ".join(f"{label} {count:,}" for label, count in self.labels.most_common(LISTED_LABELS))
            more = ", ..." if len(self.labels) > LISTED_LABELS else ""
            lines.append(pick(f"{len(self.labels)} labels: ", f"{len(self.labels)} 种标签：") + top + more)
        if self.problems.count:
            lines.append(pick(f"{self.problems.count:,} bad records:", f"{self.problems.count:,} 条记录无法使用："))
            lines += [
                f"  {item['where']}: {item['what']}" + (f": {item['record']}" if item["record"] else "")
                for item in self.problems.first
            ]
            if self.problems.count > len(self.problems.first):
                lines.append("  ...")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for a run's files."""
        return {
            "kind": self.kind,
            "records": self.records,
            "files": [{**vars(file), "notes": dict(file.notes), "kinds": dict(file.kinds)} for file in self.files],
            "bad": {"count": self.problems.count, "first": self.problems.first},
            "lengths": self.lengths,
            "labels": dict(self.labels.most_common()),
        }


def spread_of(lengths: Sequence[int]) -> dict[str, int]:
    """Smallest, median, 95th percentile and largest.

    >>> spread_of([3, 1, 2])
    {'min': 1, 'median': 2, 'p95': 3, 'max': 3}
    """
    ordered = np.sort(np.asarray(lengths, dtype=np.int64))
    places = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: int(ordered[round(share * (len(ordered) - 1))]) for name, share in places.items()}


def begins(raw: Any) -> str:
    """The beginning of a record, for an error."""
    return excerpt(shown_record(raw))
