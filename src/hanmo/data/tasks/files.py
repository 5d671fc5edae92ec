"""A file of records: its compression, encoding and format are found out, and its rows come with their lines."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, BinaryIO, cast

from hanmo.data import records
from hanmo.data.encodings import TextStream, binary_kind, readable_name
from hanmo.data.problems import MARKED_BYTE
from hanmo.data.readers import GZIP_MAGIC
from hanmo.data.sources import HashingFile, Source
from hanmo.data.tasks.formats import FORMAT_NAMES, array_in_object, sniff
from hanmo.data.tasks.report import EARLY_BAD, MOST_BAD, FileReport, TaskProblems, begins, shown_record
from hanmo.errors import DataError, missing_package
from hanmo.language import pick

PARQUET_MAGIC = b"PAR1"
MOST_MISSES = 20


class Unusable(Exception):
    """A file found in a folder that holds no records; its reason is reported and it is passed over."""


class RecordFile:
    """An open file of records.

    Args:
        source: the file.
        raw: its bytes, decompressed.
        encoding: a codec name, or ``"auto"``.
        problems: where bad records are noted.
        fields: which column or key is what, as the user said.

    Attributes:
        format: one of ``FORMAT_NAMES``, from the content first and the name second.
        preview: the beginning of the text.
        report: what is told about this file.
    """

    def __init__(
        self, source: Source, raw: Any, encoding: str, problems: TaskProblems, fields: Mapping[str, str]
    ) -> None:
        self.source, self.name = source, source.name
        self.problems, self.fields = problems, fields
        self.report = FileReport(source.name)
        self.raw = raw
        self.seen = 0  # records met so far, good and bad; a sample of them is read before the first is used
        self.skipped_lines = 0  # before the array of records, where that stands inside an object
        self.skipped_characters = 0
        self.on_piece: Callable[[str], None] | None = None  # for those who need the raw text too
        self.sampled: Iterator[tuple[int, Any]] | None = None
        name = source.path.name.lower().removesuffix(".gz")
        self.suffix = name.rpartition(".")[2] if "." in name else ""
        self.preview = ""
        if raw.peek(4)[:4] == PARQUET_MAGIC:
            self.format = "parquet"
        else:
            self.stream = TextStream(cast("BinaryIO", raw), encoding)
            self.report.encoding = self.stream.encoding
            self.refuse_unreadable()
            self.preview = self.stream.preview()
            if not self.preview.strip():
                self.refuse_empty()
            self.format = sniff(self.preview, self.suffix)
            if self.format == "json-object":
                self.find_array()
        self.report.format = FORMAT_NAMES[self.format]

    def refuse_unreadable(self) -> None:
        """Refuse a file that is empty or binary.

        Raises:
            DataError: the user named this very file.
            Unusable: it was found in a folder.
        """
        if not self.stream.head.strip():
            self.refuse_empty()
        if not self.stream.encoding:
            kind = binary_kind(self.stream.head)
            what = pick("the file is binary, not text", "这是二进制文件，不是文本") + (f" ({kind})" if kind else "")
            self.refuse(what, "convert it to jsonl, csv or tsv first", "请先转换为 jsonl、csv 或 tsv")

    def refuse_empty(self) -> None:
        """Refuse a file without content."""
        self.refuse(pick("the file is empty", "文件是空的"), "leave it out", "请不要列出它")

    def refuse(self, what: str, fix: str, zh_fix: str, *, why: str = "") -> None:
        """Pass over a file found in a folder, refuse one that was named."""
        if not self.source.named:
            raise Unusable(what)
        raise DataError(what, where=self.name, why=why, fix=fix, zh=f"{what}。{zh_fix}")

    # ---- problems

    def bad(self, line: int, what: str, raw: Any, expected: str, fix: str = "") -> None:
        """Note a bad record; where nearly all are bad, the file is not what it was taken for.

        Raises:
            DataError: bad records stop the reading, or there are too many.
        """
        before = len(self.problems.first)
        self.problems.bad(f"{self.name}:{line}", what, shown_record(raw), expected=expected, fix=fix)
        if not self.report.bad:
            self.first_bad = (
                self.problems.first[-1]
                if len(self.problems.first) > before
                else {"where": f"{self.name}:{line}", "what": what, "record": begins(raw)}
            )
        self.report.bad += 1
        if self.report.bad >= EARLY_BAD and self.report.bad > max(self.report.records, self.seen / 2):
            raise self.too_many()

    def too_many(self) -> DataError:
        """The error for more bad records than a few."""
        total = max(self.seen, self.report.bad + self.report.records)
        return self.problems.stop(self.name, self.report.bad, total, self.first_bad)

    def finish(self) -> None:
        """Refuse the file if too many of its records were bad.

        Raises:
            DataError: more than one and more than 5 % were bad, or no record was good.
        """
        bad, good = self.report.bad, self.report.records
        if bad and (not good or bad > max(1, MOST_BAD * (bad + good))):
            raise self.too_many()

    def error(self, line: int, what: str, raw: Any, expected: str, fix: str, zh: str) -> DataError:
        """The error for a file that cannot be used at all: place, beginning of the record, what was expected, a fix."""
        shown = begins(raw)
        return DataError(
            f"{what}: {shown}" if shown else what,
            where=f"{self.name}:{line}",
            why=f"expected {expected}",
            fix=fix,
            zh=f"{zh}：{shown}（应为：{expected}）。{fix}" if shown else f"{zh}（应为：{expected}）。{fix}",
        )

    def damaged(self, line: int, text: str) -> bool:
        """Whether the text holds bytes that its encoding does not have; that is noted as a bad record."""
        found = MARKED_BYTE.search(text) if self.stream.bad else None
        if found is None:
            return False
        run = text[found.start() : found.start() + 8]
        shown = " ".join(f"0x{ord(mark) - 0xDC00:02X}" for mark in MARKED_BYTE.findall(run))
        name = readable_name(self.stream.encoding)
        self.bad(
            line,
            pick(f"invalid {name}: the bytes {shown}", f"不是有效的 {name}：字节 {shown}"),
            text,
            pick(f"text in {name}", f"{name} 文本"),
            pick("name the encoding: --encoding big5 (or cp1252, ...)", "请指定编码：--encoding big5（或 cp1252 等）"),
        )
        return True

    def broken(self, line: int, what: str, record: str, expected: str) -> None:
        """Stop at damage after which nothing more can be read: what is lost is more than a record."""
        if not (self.format != "parquet" and self.damaged(line, record)):
            raise self.error(line, what, record, expected, "copy or write the file again", what)

    def bad_row(self, line: int, what: str, record: str, expected: str) -> None:
        """Note a line or row that is not JSON or csv; an unclosed quote has swallowed the rest of the file."""
        if "unexpected end of data" in what:
            self.broken(line, what, record, expected)
        else:
            self.seen += 1
            if not self.damaged(line, record):
                self.bad(line, what, record, expected)

    # ---- rows

    def lines(self) -> Iterator[tuple[int, str]]:
        """Number and text of each line; undecodable bytes are marked (see :meth:`damaged`)."""
        return self.stream.lines()

    def objects(self) -> Iterator[tuple[int, Any]]:
        """The values of a JSON or parquet file, each with the line it begins on."""
        values = self.sampled if self.sampled is not None else self.read_objects()
        self.sampled = None
        return values

    def sample_objects(self, count: int) -> list[tuple[int, Any]]:
        """The first values, which :meth:`objects` will give all the same."""
        values = self.objects()
        first = list(islice(values, count))
        self.sampled = chain(first, values)
        return first

    def read_objects(self) -> Iterator[tuple[int, Any]]:
        """The values, from the file."""
        if self.format == "parquet":
            yield from self.parquet_rows()
            return
        if self.format == "jsonl":
            rows = records.jsonl(self.stream.lines(), self.bad_row)
        else:
            rows = records.json_array(self.pieces(), self.broken)
        for line, value in rows:
            line += self.skipped_lines
            self.seen += 1
            if not (self.stream.bad and self.damaged(line, shown_record(value))):
                yield line, value

    def pieces(self) -> Iterator[str]:
        """The text in pieces, from the array on where that stands inside an object."""
        left = self.skipped_characters
        for piece in self.stream.pieces():
            cut = min(left, len(piece))
            left -= cut
            if cut < len(piece):
                if self.on_piece:
                    self.on_piece(piece[cut:])
                yield piece[cut:]

    def find_array(self) -> None:
        """Find the array of records inside the JSON object that this file is.

        Raises:
            DataError: there is none in its beginning.
            Unusable: so too, and the file was found in a folder.
        """
        found = array_in_object(self.preview)
        if found is None:
            self.refuse(
                pick(
                    "this JSON file is an object without an array of records", "这个 JSON 文件是对象，其中没有记录数组"
                )
                + f": {begins(self.preview[:200])}",
                "write one record per line into a .jsonl file",
                "请改为每行一条记录的 .jsonl",
                why='expected [{...}, ...] or {"data": [{...}, ...]}',
            )
            return
        key, at = found
        self.report.taken[pick("records", "记录")] = pick(f"the array '{key}'", f"数组 '{key}'")
        self.skipped_characters = at
        self.skipped_lines = self.preview.count("\n", 0, at)

    def table(self) -> Iterator[tuple[int, list[str]]]:
        """The rows of a csv or tsv file; a quoted field may hold line ends."""
        delimiter = records.delimiter_of(self.preview, self.format)
        quoting = records.is_quoted(delimiter, self.preview, self.stream.complete)
        for line, row in records.table_rows(self.stream.lines(), delimiter, quoting, self.bad_row):
            self.seen += 1
            if not (self.stream.bad and self.damaged(line, "\t".join(row))):
                yield line, row

    def parquet_rows(self) -> Iterator[tuple[int, Any]]:
        """The rows of a parquet file, as objects.

        Raises:
            DataError: it is damaged, or compressed (its end has to be read first).
            ResourceError: the package ``pyarrow`` is not installed.
        """
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise missing_package("pyarrow", "parquet", pick("reading parquet files", "读取 parquet 文件")) from None
        try:
            row = 0
            for batch in pyarrow.parquet.ParquetFile(self.source.path).iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    row += 1
                    yield row, value
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"not a readable parquet file: {error}",
                where=self.name,
                fix="copy the file again; parquet files are read as they are, not inside .gz",
                zh="parquet 文件损坏或不完整（不支持 .gz 压缩的 parquet），请重新复制",
            ) from error


class LineFinder:
    """Finds the lines of texts inside the JSON value that is being read, in the order of the file."""

    def __init__(self, file: RecordFile) -> None:
        self.text = ""  # what was read and is not yet passed
        self.at = 0  # the place in it up to which texts were found
        self.line = file.skipped_lines + 1  # of that place
        self.misses = 0
        file.on_piece = self.seen

    def seen(self, piece: str) -> None:
        """Remember a piece of the file."""
        if self.misses < MOST_MISSES:
            self.text, self.at = self.text[self.at :] + piece, 0

    def find(self, value: str, line: int) -> int:
        """The line at or after ``line`` on which this string stands; ``line`` where it cannot be found."""
        while self.line < line and (end := self.text.find("\n", self.at)) >= 0:
            self.at, self.line = end + 1, self.line + 1
        for ascii_only in (False, True):
            found = self.text.find(json.dumps(value, ensure_ascii=ascii_only), self.at)
            if found >= 0:
                self.line += self.text.count("\n", self.at, found)
                self.at = found + 1
                return self.line
        self.misses += 1  # written with other escapes: searching in vain would take long
        if self.misses == MOST_MISSES:
            self.text, self.at = "", 0
        return line


@contextmanager
def open_records(
    source: Source, encoding: str, problems: TaskProblems, fields: Mapping[str, str]
) -> Iterator[RecordFile]:
    """Open a file, plain or gzip; its digest is known afterwards.

    Raises:
        DataError: it cannot be read, is empty, binary, or a damaged gzip file.
        Unusable: it was found in a folder and is no text.
    """
    try:
        hashing = HashingFile(source.path)
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror}", where=source.name, zh=f"无法读取文件（{error.strerror}）"
        ) from error
    with hashing:
        buffered: Any = io.BufferedReader(hashing, 1 << 20)
        try:
            if buffered.peek(2)[:2] == GZIP_MAGIC:
                buffered = io.BufferedReader(gzip.GzipFile(fileobj=buffered), 1 << 20)
            file = RecordFile(source, buffered, encoding, problems, fields)
            yield file
            file.report.digest = hashing.finish()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"the gzip file is damaged or cut off ({error})",
                where=source.name,
                why="a part of its records is lost",
                fix="copy the file again",
                zh=f"gzip 文件损坏或不完整（{error}），请重新复制",
            ) from error
