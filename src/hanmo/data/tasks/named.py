"""Which key or column is what: as the user says, by the usual names, or by what stands in it.

Tables may have a header or none; JSON objects have keys. All come out as one :class:`Row` per record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from hanmo.data.records import is_header
from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.formats import JSON_FORMATS
from hanmo.errors import DataError, UsageError, nearest
from hanmo.language import pick
from hanmo.text.normalize import SURROGATE

SAMPLE = 1000  # records that decide which column is what
BOILERPLATE = 8  # characters that all cells of a column begin with, such as a licence
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Roles:
    """What a kind of record is made of.

    Attributes:
        required: roles that every record must have.
        optional: roles that it may have.
        layouts: for each usual way of naming, best first: role -> usual names, best first.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    layouts: tuple[Mapping[str, tuple[str, ...]], ...]

    @property
    def all(self) -> tuple[str, ...]:
        """All roles."""
        return self.required + self.optional


@dataclass(slots=True)
class Row:
    """One record as it stands in the file: the values by role, and the whole for messages."""

    line: int
    values: dict[str, Any]
    raw: Any


def names(**roles: str) -> dict[str, tuple[str, ...]]:
    """A layout, its names separated by blanks."""
    return {role: tuple(usual.split()) for role, usual in roles.items()}


def check_roles(fields: Mapping[str, str], known: Sequence[str]) -> None:
    """Refuse a role that this kind of record does not have.

    Raises:
        UsageError: naming the nearest known one.
    """
    for role in fields:
        if role not in known:
            hint = nearest(role, known)
            raise UsageError(
                f"these records have no '{role}'", where=f"fields {role}", fix=hint, zh=f"此类记录没有 '{role}'：{hint}"
            )


class Column:
    """One column of a table without header, as far as it was looked at."""

    def __init__(self, number: int, cells: Sequence[str]) -> None:
        self.number = number  # from 1
        self.cells = cells
        self.values = set(cells)
        self.mean_length = sum(map(len, cells)) / max(1, len(cells))

    @property
    def same_in_all(self) -> bool:
        """Whether all cells are equal or begin with the same phrase, as licences do."""
        if len(self.cells) < 2:
            return False
        low, high = min(self.values), max(self.values)
        return len(self.values) == 1 or (low[:BOILERPLATE] == high[:BOILERPLATE] and len(low) > BOILERPLATE)

    @property
    def numeric(self) -> bool:
        """Whether all cells are numbers."""
        return all(NUMBER.fullmatch(cell.strip()) for cell in self.cells)

    @property
    def counts_up(self) -> bool:
        """Whether the cells are whole numbers that all differ, as numbers of records do."""
        return len(self.cells) > 1 and len(self.values) == len(self.cells) and all(map(str.isdigit, self.cells))

    def describe(self) -> str:
        """Its number and first cell."""
        cell = " ".join(self.cells[0].split()) if self.cells else ""
        return f"{self.number}: '{cell[:24]}{'...' if len(cell) > 24 else ''}' ({len(self.values)} different)"


Looks = Callable[[RecordFile, list[Column], dict[str, int]], dict[str, tuple[int, str]]]


def named_rows(file: RecordFile, roles: Roles, looks: Looks | None) -> Iterator[Row]:
    """The records of a JSON, parquet, csv or tsv file with their values by role; optional ones may be missing.

    Args:
        looks: for tables without header: from the columns and those the user named to role -> (number, reason).

    Raises:
        DataError: it cannot be told which key or column is what.
    """
    if file.format in JSON_FORMATS or file.format == "parquet":
        yield from object_rows(file, roles)
    elif file.format in ("csv", "tsv"):
        yield from table_rows(file, roles, looks)
    else:
        file.refuse(
            pick("the file holds no records", "文件中没有记录") + f" ({file.preview.strip()[:60]!r})",
            "write jsonl, or tsv with one record per line",
            "请改为 jsonl，或每行一条记录的 tsv",
            why="expected jsonl, a JSON array, csv or tsv",
        )


def look_up(value: Mapping[str, Any], key: str) -> Any:
    """The value of a key; ``a.b`` is the key ``b`` of the object in ``a``. None where there is none."""
    if key in value or "." not in key:
        return value.get(key)
    outer, _, inner = key.partition(".")
    nested = value.get(outer)
    return look_up(nested, inner) if isinstance(nested, dict) else None


def object_rows(file: RecordFile, roles: Roles) -> Iterator[Row]:
    """The rows of JSON objects (see :func:`named_rows`)."""
    entries = file.objects()
    first = list(islice(entries, SAMPLE))
    objects = [value for _, value in first if isinstance(value, dict)]
    known = list(dict.fromkeys(key for value in objects for key in value))
    if not first:
        return
    if not objects:
        raise no_roles(file, first[0][0], first[0][1], roles.required, [])
    for role, key in file.fields.items():
        if not any(look_up(value, key) is not None for value in objects):
            raise no_name(file, role, key, known, first[0])
    chosen = choose_names(known, roles, file.fields)
    if chosen is None:
        raise no_roles(file, first[0][0], first[0][1], missing_roles(known, roles, file.fields), known)
    file.report.taken.update({role: f"'{key}' ({reason})" for role, (key, reason) in chosen.items()})
    keys = {role: key for role, (key, _) in chosen.items()}
    for line, value in chain(first, entries):
        values = {role: look_up(value, key) for role, key in keys.items()} if isinstance(value, dict) else {}
        lost = [role for role in roles.required if values.get(role) is None]
        if lost:
            missing = ", ".join(f"'{keys[role]}'" for role in lost)
            what = pick(f"the record has no {missing}", f"记录没有 {missing}")
            file.bad(line, what, value, pick("an object with ", "一个对象，含 ") + ", ".join(keys.values()))
            continue
        yield Row(line, values, value)


def choose_names(known: Sequence[str], roles: Roles, given: Mapping[str, str]) -> dict[str, tuple[str, str]] | None:
    """For each role the key and why it was taken, by the first layout that has all required ones.

    >>> roles = Roles(("text", "label"), (), (names(text="text sentence", label="label"),))
    >>> choose_names(["id", "Sentence", "label"], roles, {"text": "id"})
    {'text': ('id', 'as named'), 'label': ('label', 'by its name')}
    """
    by_name = {name.strip().lower(): name for name in reversed(known)}
    for layout in roles.layouts:
        chosen = {role: (name, pick("as named", "按指定")) for role, name in given.items()}
        used = set(given.values())
        for role in roles.all:
            found = next((by_name[n] for n in layout.get(role, ()) if n in by_name and by_name[n] not in used), None)
            if role not in chosen and found is not None:
                chosen[role] = (found, pick("by its name", "按名称"))
                used.add(found)
        if all(role in chosen for role in roles.required):
            return {role: chosen[role] for role in roles.all if role in chosen}
    return None


def missing_roles(known: Sequence[str], roles: Roles, given: Mapping[str, str]) -> list[str]:
    """The required roles that the fewest-missing layout leaves open."""
    lowered = {name.strip().lower() for name in known}
    open_roles = [
        [role for role in roles.required if role not in given and not lowered.intersection(layout.get(role, ()))]
        for layout in roles.layouts
    ]
    return min(open_roles, key=len) or list(roles.required)


def table_rows(file: RecordFile, roles: Roles, looks: Looks | None) -> Iterator[Row]:
    """The rows of a table (see :func:`named_rows`)."""
    rows = file.table()
    first = list(islice(rows, SAMPLE))
    if not first:
        return
    cells = [cell.strip() for cell in first[0][1]]
    header, chosen = read_header(file, cells, first, roles)
    if chosen is None:
        chosen = look_at(file, first[header:], len(cells), roles, looks, cells if header else None)
    width = len(cells)
    labels = {role: f"'{cells[i]}'" if header else str(i + 1) for role, (i, _) in chosen.items()}
    column = pick("column ", "列 ")
    file.report.taken.update({role: f"{column}{labels[role]} ({why})" for role, (_, why) in chosen.items()})
    file.report.format += "" if header else pick(" without header", "（无表头）")
    for line, row in chain(first[header:], rows):
        if len(row) == width:
            yield Row(line, {role: row[index] for role, (index, _) in chosen.items()}, row)
        else:
            what = pick(f"the row has {len(row)} columns", f"该行有 {len(row)} 列")
            file.bad(line, what, row, pick(f"{width} columns, as in the first row", f"{width} 列，与首行相同"))


def read_header(
    file: RecordFile, cells: list[str], first: list[tuple[int, list[str]]], roles: Roles
) -> tuple[bool, dict[str, tuple[int, str]] | None]:
    """Whether the first row names the columns, and then which column has which role.

    It does if its cells are usual names for all required roles, or names the user gave; or if they look like names and
    never stand below (in a csv file, which commonly has a header).
    """
    named = any(name in cells for name in file.fields.values())
    numbers = {
        role: int(name) - 1
        for role, name in file.fields.items()
        if name not in cells and name.isdigit() and 1 <= int(name) <= len(cells)
    }
    given = {role: cells[numbers[role]] if role in numbers else name for role, name in file.fields.items()}
    if all(name in cells for name in given.values()):
        usable = choose_names([cell for cell in cells if cell], roles, given)
        if usable is not None and (named or len(usable) > len(given)):
            return True, {
                role: (numbers.get(role, cells.index(name)), reason) for role, (name, reason) in usable.items()
            }
    below = [set(column) for column in zip(*(row for _, row in first[1:] if len(row) == len(cells)), strict=True)]
    recurs = any(cell in column for cell, column in zip(cells, below, strict=False))
    usual = {name for layout in roles.layouts for role in layout.values() for name in role}
    looks_named = file.format == "csv" or any(cell.lower() in usual for cell in cells)
    return named or (looks_named and is_header(cells) and len(first) > 1 and not recurs), None


def look_at(
    file: RecordFile,
    sample: list[tuple[int, list[str]]],
    width: int,
    roles: Roles,
    looks: Looks | None,
    header: list[str] | None,
) -> dict[str, tuple[int, str]]:
    """Tell the columns by what stands in them: role -> (index from 0, reason).

    Raises:
        DataError: the user named a column that is not there, or it cannot be told.
    """
    if not sample:
        raise no_roles(file, 1, header or [], roles.required, header or [])
    given: dict[str, int] = {}
    for role, name in file.fields.items():
        if header and name in header:
            given[role] = header.index(name) + 1
        elif name.isdigit() and 1 <= int(name) <= width:
            given[role] = int(name)
        else:
            raise no_name(file, role, name, header or [str(number + 1) for number in range(width)], sample[0])
    if all(role in given for role in roles.required):
        found = {role: (number, pick("as named", "按指定")) for role, number in given.items()}
    else:
        whole = [row for _, row in sample if len(row) == width] or [row for _, row in sample]
        columns = [Column(i + 1, [row[i] if i < len(row) else "" for row in whole]) for i in range(width)]
        if looks is None:
            raise ambiguous(file, columns, roles.required)
        found = looks(file, columns, given)
    return {role: (number - 1, reason) for role, (number, reason) in found.items()}


def ambiguous(file: RecordFile, columns: list[Column], roles: Sequence[str]) -> DataError:
    """The error for a table whose columns cannot be told apart."""
    wanted = ", ".join(roles)
    example = " ".join(f"--fields {role}={number}" for number, role in enumerate(roles, start=1))
    listed = "; ".join(column.describe() for column in columns)
    return DataError(
        f"it is not clear which columns hold {wanted}; the columns are {listed}",
        where=f"{file.name}:1",
        why="there is no header with usual names, and more than one column would do, or none",
        fix=f"say which: {example}",
        zh=f"无法确定哪一列是 {wanted}；各列：{listed}。请指定，例如 {example}",
    )


def no_roles(file: RecordFile, line: int, raw: Any, missing: Sequence[str], known: Sequence[str]) -> DataError:
    """The error for records in which no key has a usual name."""
    wanted, have = ", ".join(missing), ", ".join(known) or pick("no keys", "没有键")
    example = " ".join(f"--fields {role}=NAME" for role in missing)
    return file.error(
        line,
        f"the records have nothing that is called like {wanted} (they have: {have})",
        raw,
        pick(f"keys or columns for {wanted}", f"含 {wanted} 的键或列"),
        pick(f"say which one it is: {example}", f"请指定：{example}"),
        f"记录中找不到 {wanted}（现有：{have}）",
    )


def no_name(file: RecordFile, role: str, name: str, known: Sequence[str], first: tuple[int, Any]) -> DataError:
    """The error for a key or column named by the user that the records do not have."""
    return file.error(
        first[0],
        f"the records have no '{name}', which was named for {role}",
        first[1],
        pick("one of ", "其中之一：") + ", ".join(known),
        nearest(name, known),
        f"记录中没有为 {role} 指定的 '{name}'",
    )


def as_text(value: Any) -> str | None:
    """The text of a value: a string, a number, a list of strings (one line each); else None. Ends are trimmed.

    Half of a surrogate pair, which no file can hold, becomes U+FFFD.
    """
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = "\n".join(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return SURROGATE.sub("\ufffd", value).strip() if isinstance(value, str) else None
