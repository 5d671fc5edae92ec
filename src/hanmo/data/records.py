"""Records from jsonl, json arrays, csv, tsv and parquet, and the field that holds their text.

Every function here streams: it holds one record (and the block it was read from), never the file. Where a record cannot
be read it calls ``bad(line, what, record, expected)``, which raises or counts.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hanmo.errors import DataError, missing_package, nearest
from hanmo.language import pick

Bad = Callable[[int, str, str, str], None]
MISSING = object()
Records = Iterator[tuple[int, Any]]

# names under which texts are usually found, best first
TEXT_NAMES = """
    text content body document article passage paragraphs sentence context story abstract review comment message
    文本 正文 内容 全文 句子 段落 摘要 评论 文章
""".split()  # noqa: SIM905
SAMPLE_RECORDS = 100
QUOTED_ROWS = 200  # that say whether a whole column is quoted
LARGEST_FIELD = 1 << 28  # characters in one csv field; more means that a quote is missing
NAME_LIKE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}(?<!\.)(?: [A-Za-z0-9_-]{1,20})?")
QUOTED_FIELD = re.compile(r'(?:^|\t)"(?:[^"]|"")*"(?=\t|\r?$)', re.MULTILINE)
OPENED_FIELD = re.compile(r'(?:^|\t)"', re.MULTILINE)


def value_text(value: Any) -> str | None:
    """The text of a field: a string, or a list of strings (one line each); null is an empty text; else None."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        try:
            return "\n".join(value)
        except TypeError:  # an item is not a string
            return None
    return "" if value is None else None


def find_field(samples: list[dict[str, Any]]) -> tuple[str, str] | None:
    """Find the field that holds the text among records: ``(name, reason)``, or None if no field is text.

    >>> find_field([{"id": "1", "Text": "Hello"}]), find_field([{"id": "1", "verse": "Tyger Tyger, burning bright"}])
    (('Text', 'by its name'), ('verse', 'the longest text of the fields id, verse'))
    """
    lengths: dict[str, int] = {}
    nested = 0
    for record in samples:
        for key, value in record.items():
            text = value_text(value)
            if text is not None:
                lengths[key] = lengths.get(key, 0) + len(text)
            elif isinstance(value, (list, dict)):
                nested += len(str(value))
    by_name = {key.strip().lower(): key for key in reversed(lengths) if lengths[key]}
    for name in TEXT_NAMES:
        if name in by_name:
            return by_name[name], "by its name"
    best = max(lengths, key=lambda key: lengths[key], default=None)
    if best is None or lengths[best] <= nested / 10:  # the texts are inside nested records, such as dialogues
        return None
    return best, f"the longest text of the fields {', '.join(lengths)}"


def jsonl(lines: Iterable[tuple[int, str]], bad: Bad) -> Records:
    """The value on each line; blank lines are passed over."""
    for number, line in lines:
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad(
                number,
                pick("not valid JSON", "不是有效的 JSON") + f" ({getattr(error, 'msg', error)})",
                line,
                pick("one JSON object per line, such as", "每行一个 JSON 对象，例如") + ' {"text": "..."}',
            )
            continue
        yield number, value


SEPARATORS = re.compile(r"[\s,]*")


def json_array(pieces: Iterable[str], bad: Bad) -> Records:
    """The elements of one JSON array, each with the line it begins on; only the part being read is held."""
    source = iter(pieces)
    decoder = json.JSONDecoder()
    expected = "a JSON array of objects, closed with ]"
    text, line = next(source, "").lstrip("\ufeff"), 1
    at = text.find("[") + 1
    line += text.count("\n", 0, at)
    while True:
        separator = SEPARATORS.match(text, at)
        end = separator.end() if separator else at
        line += text.count("\n", at, end)
        at = end
        if at == len(text):
            text, at = next(source, ""), 0
            if not text:
                bad(
                    line, pick("the array is not closed; the file is cut off", "数组没有结束，文件不完整"), "", expected
                )
                return
            continue
        if text[at] == "]":
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            position = getattr(error, "pos", at)
            unfinished = str(error).startswith("Unterminated string") or position >= len(text) - 16
            # read at least as much again, so that a huge element is parsed few times
            more = read_more(source, len(text) - at) if unfinished else ""
            if more:
                text, at = text[at:] + more, 0
                continue
            place = line + text.count("\n", at, position)
            reason = pick("not valid JSON; the rest of the file cannot be read", "不是有效的 JSON，其后的内容无法读取")
            reason += f" ({getattr(error, 'msg', error)})"
            bad(place, reason, text[max(at, position - 30) : position + 50], expected)
            return
        yield line, value
        line += text.count("\n", at, end)
        at = end


def read_more(source: Iterator[str], wanted: int) -> str:
    """At least ``wanted`` more characters, or what is left."""
    parts: list[str] = []
    for piece in source:
        parts.append(piece)
        wanted -= len(piece)
        if wanted <= 0:
            break
    return "".join(parts)


def json_kind(preview: str) -> str:
    """What a ``.json`` file holds, from its beginning: ``"json"`` (an array of records), ``"jsonl"``, or ``"text"``.

    Any other JSON (a configuration, an array of numbers) is read as the source text it is.
    """
    begin = preview.lstrip()
    if begin.startswith("{"):
        first, _, rest = begin.partition("\n")
        try:
            json.loads(first)
        except ValueError:
            return "text"
        return "jsonl" if rest.lstrip().startswith("{") else "text"
    if not re.match(r'\[\s*["{]', begin):
        return "text"
    samples: list[Any] = []
    for _, value in json_array([begin], lambda *_: None):  # the end of the sample is cut off: not an error
        samples.append(value)
        if len(samples) == SAMPLE_RECORDS:
            break
    return "json" if not samples or has_text(samples) else "text"


def has_text(values: list[Any]) -> bool:
    """Whether these values are texts or records with a text."""
    objects = [value for value in values if isinstance(value, dict)]
    return any(isinstance(value, str) for value in values) or find_field(objects) is not None


def object_texts(records: Records, named: str | None, where: str, bad: Bad, tell: Callable[[str], None]) -> Records:
    """The text of each JSON record: of the ``named`` field, or of the one found in the first records.

    Args:
        records: line and value; a value that is a string is a text by itself.
        named: the field the user named.
        where: the file, for errors.
        bad: notes a bad record.
        tell: receives the field and why it was taken.

    Raises:
        DataError: the first records have no such field, or no field with text.
    """
    first: list[tuple[int, Any]] = []
    for entry in records:
        first.append(entry)
        if len(first) == SAMPLE_RECORDS:
            break
    objects = [value for _, value in first if isinstance(value, dict)]
    field, reason = choose_field(objects, named, where) if objects else ("", "each record is a string")
    tell(f"{field} ({reason})" if field else reason)
    expected = f"a JSON object with the text in '{field}'" if field else "a JSON string"
    for entries in (first, records):
        for line, value in entries:
            if isinstance(value, dict) and field:
                text = value_text(value.get(field, MISSING))
            else:
                text = value if isinstance(value, str) else None
            if text is None:
                shown = json.dumps(value, ensure_ascii=False)
                missing = pick(f"the record has no text in '{field}'", f"记录的 '{field}' 字段没有文本")
                bad(line, missing if field else pick("not a text", "不是文本"), shown, expected)
            else:
                yield line, text


def choose_field(objects: list[dict[str, Any]], named: str | None, where: str) -> tuple[str, str]:
    """The text field of these records and why.

    Raises:
        DataError: none of them has the named field, or no field holds text.
    """
    names = list(dict.fromkeys(key for value in objects for key in value))
    if named is not None:
        if named not in names:
            raise no_field(named, names, where)
        return named, "named by --text-field"
    found = find_field(objects)
    if found is None:
        raise DataError(
            f"no field of these records holds text; they have: {', '.join(names) or 'no fields'}",
            where=where,
            why="expected a field with a string or a list of strings, such as 'text'",
            fix="write the text into a field 'text', or name the field with --text-field",
            zh=f"这些记录没有文本字段（现有字段：{', '.join(names) or '无'}）。"
            "请把正文写入字段 'text'，或用 --text-field 指定",
        )
    return found


def no_field(named: str, names: list[str], where: str) -> DataError:
    """The error for a ``--text-field`` that the records do not have."""
    return DataError(
        f"the records have no field '{named}'",
        where=where,
        why=f"they have: {', '.join(names)}",
        fix=nearest(named, names),
        zh=f"记录中没有字段 '{named}'（现有：{', '.join(names)}）。{nearest(named, names)}",
    )


def delimiter_of(preview: str, suffix: str) -> str:
    """The character between the columns: tab for tsv; for csv the most frequent of ``, ; tab`` in the first line."""
    if suffix == "tsv":
        return "\t"
    line = re.sub(r'"(?:[^"]|"")*"', "", preview[:100_000]).partition("\n")[0]
    return max(",;\t", key=line.count)


def is_quoted(delimiter: str, preview: str, complete: bool) -> bool:
    """Whether quotation marks enclose fields.

    Many tsv files are written without any quoting, where a quotation mark is only a character of the text, also where a
    whole cell stands between two. With tabs, quoting is on only if every field of the preview that opens with a
    quotation mark also closes with one (the last may be cut off), and some field needs it (it holds a tab, line end or
    doubled quotation mark) or a whole column has it.

    >>> tab = chr(9)
    >>> is_quoted(tab, f'"Hi!"{tab}x', True), is_quoted(tab, f'"a ""b"" c"{tab}x', True)
    (False, True)
    """
    if delimiter != "\t":
        return True
    quoted = QUOTED_FIELD.findall(preview)
    if not quoted or len(OPENED_FIELD.findall(preview)) - len(quoted) > (0 if complete else 1):
        return False
    if any(re.search(r'[\t\n]|""', field.strip("\t\r\n")[1:-1]) for field in quoted):
        return True
    rows = [line.rstrip("\r").split("\t") for line in preview.split("\n")[:QUOTED_ROWS] if line.strip()]
    columns = zip(*rows[1 : len(rows) - (not complete)], strict=False)  # the first row may be a header without quotes
    return any(all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in column) for column in columns)


def table_rows(
    lines: Iterable[tuple[int, str]], delimiter: str, quoting: bool, bad: Bad
) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv or tsv file, each with the line it begins on; a quoted field may hold line ends."""
    csv.field_size_limit(LARGEST_FIELD)
    reader = csv.reader(
        (line + "\n" for _, line in lines),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE,
        strict=True,
    )
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            bad(
                start,
                pick("not a valid row", "不是有效的一行") + f" ({error})",
                "",
                pick(
                    "a quoted field to be closed, and a quote inside it to be doubled",
                    "引号须成对，字段内的引号须写两次",
                ),
            )
            continue
        if row:
            yield start, row


def table_texts(
    rows: Iterator[tuple[int, list[str]]], named: str | None, where: str, bad: Bad, tell: Callable[[str], None]
) -> Records:
    """The text column of a table. The first row is the header if it names things rather than holding them.

    Raises:
        DataError: there is no column of that name or number.
    """
    first: list[tuple[int, list[str]]] = []
    for entry in rows:
        first.append(entry)
        if len(first) == SAMPLE_RECORDS:
            break
    if not first:
        return
    names = [cell.strip() for cell in first[0][1]]
    width = len(names)
    header = is_header(names) or named in names
    sample = [dict(enumerate(row)) for _, row in first[header:] if len(row) == width]
    if named is not None and named not in names:
        if not named.isdigit() or not 1 <= int(named) <= width:
            raise no_field(named, names if header else [str(number + 1) for number in range(width)], where)
        column, reason = int(named) - 1, "named by --text-field"
    elif named is not None:
        column, reason = names.index(named), "named by --text-field"
    else:
        column, reason = find_column(sample, names if header else [str(number + 1) for number in range(width)])
    label = names[column] if header else str(column + 1)
    tell(f"column {label} ({reason}{'' if header else '; no header'})")
    for entries in (first[header:], rows):
        for line, row in entries:
            if len(row) == width:
                yield line, row[column]
            else:
                bad(
                    line,
                    pick(f"the row has {len(row)} columns", f"该行有 {len(row)} 列"),
                    ", ".join(row),
                    pick(f"{width} columns, as in the first row", f"{width} 列，与首行相同"),
                )


def find_column(sample: list[dict[int, str]], names: list[str]) -> tuple[int, str]:
    """The column with the text, by name or by length, and why."""
    records: list[dict[str, Any]] = [{f"{names[i]}\0{i}": cell for i, cell in row.items()} for row in sample]
    lowered = [name.lower() for name in names]
    for name in TEXT_NAMES:
        if name in lowered:
            return lowered.index(name), "by its name"
    found = find_field(records)
    column = int(found[0].rpartition("\0")[2]) if found else 0
    return column, "the only column" if len(names) == 1 else f"the longest text of the columns {', '.join(names)}"


def is_header(names: list[str]) -> bool:
    """Whether a first row looks like column names: a usual name for texts, or nothing but short distinct names."""
    if any(name.lower() in TEXT_NAMES for name in names):
        return True
    given = [name for name in names if name]  # tools leave the name of an index column empty
    return len(names) > 1 and len(set(given)) == len(given) > 0 and all(NAME_LIKE.fullmatch(name) for name in given)


def parquet_texts(path: Any, named: str | None, where: str, tell: Callable[[str], None]) -> Records:
    """The text column of a parquet file, with row numbers (from 1) for lines.

    Raises:
        DataError: not a parquet file, or no such column.
        ResourceError: the package ``pyarrow`` is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_package("pyarrow", "parquet", pick("reading parquet files", "读取 parquet 文件")) from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = list(table.schema_arrow.names)
        if named is not None and named not in names:
            raise no_field(named, names, where)
        sample = next(table.iter_batches(batch_size=SAMPLE_RECORDS), None)
        objects: list[dict[str, Any]] = sample.to_pylist() if sample is not None else []
        if not objects:
            return
        field, reason = choose_field(objects, named, where)
        tell(f"{field} ({reason})")
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield row, value
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"not a readable parquet file: {error}",
            where=where,
            fix="copy the file again; it may be cut off",
            zh="parquet 文件损坏或不完整，请重新复制",
        ) from error
