"""From files to typed records: :func:`read_records`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from hanmo.data.settings import DataSettings
from hanmo.data.sources import Source, find_sources
from hanmo.data.tasks.dialogues import CHECKED, CONVERSATION, read_dialogues
from hanmo.data.tasks.files import RecordFile, Unusable, open_records
from hanmo.data.tasks.formats import stem_of
from hanmo.data.tasks.labelled import ROLES as LABELLED
from hanmo.data.tasks.labelled import read_labelled
from hanmo.data.tasks.named import check_roles
from hanmo.data.tasks.pairs import ROLES as PAIR
from hanmo.data.tasks.pairs import read_aligned, read_pairs
from hanmo.data.tasks.preferences import ROLES as PREFERENCE
from hanmo.data.tasks.preferences import read_preferences
from hanmo.data.tasks.problems import ROLES as PROBLEM
from hanmo.data.tasks.problems import read_problems
from hanmo.data.tasks.questions import ROLES as QUESTION
from hanmo.data.tasks.questions import read_questions
from hanmo.data.tasks.report import FileReport, RecordsReport, TaskProblems, spread_of
from hanmo.data.tasks.roles import ROLES as PROPOSITION
from hanmo.data.tasks.roles import read_propositions
from hanmo.data.tasks.schemes import spans_of
from hanmo.data.tasks.similar import ROLES as SIMILAR
from hanmo.data.tasks.similar import read_similar
from hanmo.data.tasks.tagged import ROLES as TAGGED
from hanmo.data.tasks.tagged import read_tagged
from hanmo.data.tasks.types import (
    Dialogue,
    Labelled,
    Pair,
    Preference,
    Problem,
    Prompted,
    Proposition,
    QuestionAnswer,
    Record,
    Similar,
    Tagged,
)
from hanmo.data.tasks.writing import ROLES as PROMPTED
from hanmo.data.tasks.writing import read_prompts
from hanmo.errors import DataError, UsageError, nearest
from hanmo.language import pick

T = TypeVar("T", bound=Record)
KINDS: dict[str, tuple[str, ...]] = {
    "labelled": LABELLED.all,
    "tagged": (*TAGGED.all, "text", "spans"),
    "pair": PAIR.all,
    "dialogue": tuple(dict.fromkeys((*CONVERSATION.all, *CHECKED.all))),
    "preference": PREFERENCE.all,
    "question_answer": QUESTION.all,
    "similar": SIMILAR.all,
    "roles": PROPOSITION,
    "problem": PROBLEM,
    "prompted": PROMPTED.all,
}
LINE_SUFFIXES = frozenset("txt md html htm rst log license readme".split())  # noqa: SIM905
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z]{2,4})?|src|tgt|trg|source|target|document|summary")


@dataclass
class Records(Sequence[T], Generic[T]):
    """The records of some files, in their order, and what reading them has shown."""

    kind: str
    records: list[T]
    report: RecordsReport

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[T]:
        return iter(self.records)


def read_records(
    kind: str,
    paths: Iterable[str | Path] | str | Path,
    *,
    fields: Mapping[str, str] | None = None,
    encoding: str = "auto",
    skip_bad: bool = True,
    label_separator: str | None = None,
    relabel: Mapping[str, str] | None = None,
    relabel_all: bool = True,
) -> Records[Any]:
    """Read the records of one kind from files, folders or globs.

    Args:
        kind: ``labelled``, ``tagged``, ``pair``, ``dialogue``, ``preference``, ``question_answer``, ``similar``,
            ``roles``, ``problem``, ``prompted``.
        paths: of any format that holds such records; it is told from the content. Two files of plain lines are the two
            sides of pairs, aligned line by line: the first is the source.
        fields: role -> key, column name, or column number from 1 (of TMX and aligned files: language), where the
            usual names do not say it.
        encoding: codec name, or ``"auto"``.
        skip_bad: count and list a few bad records; False: the first one is an error. More than 5 % are one always.
        label_separator: for ``labelled``: what stands between several labels in one cell.
        relabel: for ``tagged``: new names for types of spans; ``{"OTH": "O"}`` takes one away.
        relabel_all: refuse a type that is to be renamed and does not occur; False where :func:`check_relabel` is called
            later for several reports.

    Raises:
        DataError: a file is missing, damaged, not of this kind, or has too many bad records; it names file and line.
        UsageError: an unknown kind, role or encoding.

    Example::

        records = read_records("labelled", "sms.tsv")
        print(records.report.describe())
        records[0].text, records[0].labels, records[0].where
    """
    if kind not in KINDS:
        hint = nearest(kind, KINDS)
        raise UsageError(f"unknown kind of records '{kind}'", fix=hint, zh=f"未知的记录种类 '{kind}'：{hint}")
    if (label_separator and kind != "labelled") or (relabel and kind != "tagged"):
        option, kinds = ("label_separator", "labelled") if label_separator else ("relabel", "tagged")
        raise UsageError(f"{option} is for records of the kind {kinds}", zh=f"{option} 只用于 {kinds} 记录")
    fields = dict(fields or {})
    check_roles(fields, KINDS[kind])
    DataSettings(encoding=encoding).check()
    sources = find_sources([paths] if isinstance(paths, (str, Path)) else paths).sources
    report = RecordsReport(kind, problems=TaskProblems(skip_bad))
    readers: dict[str, Callable[[RecordFile], Iterator[Record]]] = {
        "labelled": partial(read_labelled, separator=label_separator),
        "tagged": partial(read_tagged, relabel=relabel or {}),
        "pair": read_pairs,
        "dialogue": read_dialogues,
        "preference": read_preferences,
        "question_answer": read_questions,
        "similar": read_similar,
        "roles": read_propositions,
        "problem": read_problems,
        "prompted": read_prompts,
    }
    records: list[Record] = []
    for source, other in units(kind, sources, fields):
        if other is not None:
            read_two(source, other, encoding, report, records)
        else:
            read_one(source, readers[kind], fields, encoding, report, records)
    if not records:
        raise nothing(kind, sources, report)
    if relabel_all:
        check_relabel(relabel or {}, [report])
    measure(records, report)
    return Records(kind, records, report)


def read_one(
    source: Source,
    reader: Callable[[RecordFile], Iterator[Record]],
    fields: Mapping[str, str],
    encoding: str,
    report: RecordsReport,
    records: list[Record],
) -> None:
    """Read one file and add its records."""
    try:
        with open_records(source, encoding, report.problems, fields) as file:
            report.files.append(file.report)
            if not source.named and file.format == "lines" and file.suffix in ("", *LINE_SUFFIXES):
                raise Unusable(pick("a text, not records", "是文本，不是记录"))
            for record in reader(file):
                file.report.records += 1
                records.append(record)
            file.finish()
    except Unusable as reason:
        if report.files and report.files[-1].name == source.name:
            report.files.pop()
        report.files.append(FileReport(source.name, skipped=str(reason)))


def read_two(source: Source, target: Source, encoding: str, report: RecordsReport, records: list[Record]) -> None:
    """Read two aligned files and add their pairs."""
    with ExitStack() as stack:
        left, right = (
            stack.enter_context(open_records(item, encoding, report.problems, {})) for item in (source, target)
        )
        report.files += [left.report, right.report]
        for record in read_aligned(left, right):
            left.report.records += 1
            right.report.records += 1
            records.append(record)
        left.finish()
        right.finish()
        right.report.records = 0  # its lines are the targets of the records of the other


def units(kind: str, sources: list[Source], fields: Mapping[str, str]) -> Iterator[tuple[Source, Source | None]]:
    """The files one by one, or two aligned ones together.

    Files belong together if they are all that was given, or if their names differ only in a last part that looks like
    a language: ``train.en`` and ``train.zh``.
    """
    waiting: dict[str, list[Source]] = {}
    for source in sources if kind == "pair" else []:
        if is_side(source):
            waiting.setdefault(str(source.path.with_name(stem_of(source.path))), []).append(source)
    together = {id(item): sides for sides in waiting.values() if len(sides) == 2 for item in sides}
    plain = [source for source in sources if source.path.name.lower().removesuffix(".gz").endswith(".txt")]
    if kind == "pair" and len(sources) == 2 == len(plain) and all(map(has_lines, plain)):
        together = {id(item): plain for item in plain}
    done: set[int] = set()
    for source in sources:
        sides = together.get(id(source))
        if sides is None:
            yield source, None
        elif id(source) not in done:
            done.update(map(id, sides))
            yield ordered(sides[0], sides[1], fields)


def side_name(source: Source) -> str:
    """The last part of the name: ``train.en.gz`` -> ``en``."""
    name = source.path.name.removesuffix(".gz")
    return name.rpartition(".")[2] if "." in name else ""


def is_side(source: Source) -> bool:
    """Whether the name ends like one side of aligned files."""
    name = side_name(source)
    return bool(LANGUAGE_CODE.fullmatch(name)) and name not in ("tsv", "csv", "txt", "tmx", "tab", "md", "xml", "gz")


def has_lines(source: Source) -> bool:
    """Whether a file holds plain lines rather than records."""
    try:
        with open_records(source, "auto", TaskProblems(), {}) as file:
            return file.format == "lines"
    except (Unusable, DataError):
        return False


def ordered(one: Source, other: Source, fields: Mapping[str, str]) -> tuple[Source, Source]:
    """The two sides, the source first: as the user says, by their names, or in the order given."""
    sides = (side_name(one), side_name(other))
    for role, side in fields.items():
        if side not in sides:
            hint = nearest(side, sides)
            raise DataError(
                f"neither {one.name} nor {other.name} ends in '.{side}', which was named for {role}",
                where=one.name,
                fix=hint,
                zh=f"{one.name} 与 {other.name} 都不以 '.{side}' 结尾。{hint}",
            )
    target_first = (
        fields.get("source") == sides[1]
        or fields.get("target") == sides[0]
        or (not fields and sides[1] in ("src", "source", "document"))
    )
    return (other, one) if target_first else (one, other)


def nothing(kind: str, sources: list[Source], report: RecordsReport) -> DataError:
    """The error for files without any record."""
    if any(file.bad for file in report.files):
        first = report.problems.first[0]
        return report.problems.stop(
            first["where"].rpartition(":")[0], report.problems.count, report.problems.count, first
        )
    skipped = "; ".join(f"{file.name}: {file.skipped}" for file in report.files if file.skipped)
    return DataError(
        f"no records of the kind {kind} were found" + (f" ({skipped})" if skipped else ""),
        where=", ".join(source.name for source in sources[:3]),
        fix="name a file with records: jsonl, csv, tsv, ...",
        zh=f"没有找到 {kind} 记录"
        + (f"（{skipped}）" if skipped else "")
        + "。请指定含记录的文件（jsonl、csv、tsv 等）",
    )


def check_relabel(relabel: Mapping[str, str], reports: Sequence[RecordsReport]) -> None:
    """Refuse to rename what does not occur in any file: it is misspelt.

    Raises:
        DataError: naming it.
    """
    for old in relabel:
        known = sorted({name for report in reports for file in report.files for name in file.kinds})
        if old not in known:
            raise DataError(
                f"the type '{old}', which is to be renamed, does not occur",
                where=reports[0].files[0].name,
                fix=nearest(old, known),
                zh=f"要改名的类型 '{old}' 没有出现。{nearest(old, known)}",
            )


def measure(records: Sequence[Record], report: RecordsReport) -> None:
    """Note the lengths of the records and how often each label occurs."""
    lengths: dict[str, list[int]] = {}
    plain = {file.name for file in report.files if file.scheme.startswith("plain")}
    for record in records:
        for name, length in lengths_of(record):
            lengths.setdefault(name, []).append(length)
        if isinstance(record, Labelled):
            report.labels.update(record.labels)
        elif isinstance(record, Tagged):
            spans = [] if record.file in plain else spans_of(record.tags)
            report.labels.update(record.tags if record.file in plain else [kind for _, _, kind in spans])
        elif isinstance(record, Proposition):
            report.labels.update(role for _, _, role in record.arguments)
    report.lengths = {name: spread_of(values) for name, values in lengths.items()}


def lengths_of(record: Record) -> tuple[tuple[str, int], ...]:
    """What is measured of a record (a key of ``LENGTH_NAMES``), and how long it is."""
    if isinstance(record, Labelled):
        return (("text", len(record.text)),)
    if isinstance(record, (Tagged, Proposition)):
        return (("tokens", len(record.tokens)),)
    if isinstance(record, Pair):
        return ("source", len(record.source)), ("target", len(record.target))
    if isinstance(record, Dialogue):
        characters = sum(len(item["content"]) for item in record.messages)
        return ("messages", len(record.messages)), ("dialogue", characters)
    if isinstance(record, Preference):
        prompt = sum(len(item["content"]) for item in record.prompt)
        return ("prompt", prompt), ("chosen", len(record.chosen)), ("rejected", len(record.rejected))
    if isinstance(record, QuestionAnswer):
        return ("context", len(record.context)), ("question", len(record.question))
    if isinstance(record, Similar):
        return ("anchor", len(record.anchor)), ("positive", len(record.positive))
    if isinstance(record, Problem):
        return ("prompt", len(record.prompt)), ("reference", len(record.reference))
    if isinstance(record, Prompted):
        return ("prompt", len(record.prompt)), ("reference", len(record.reference))
    return ()
