"""Readers: from files of any kind to clean documents that know their file and line."""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from hanmo.data import records
from hanmo.data.encodings import PROBE, TextStream, binary_kind, readable_name
from hanmo.data.problems import MARKED_BYTE, Problems
from hanmo.data.sections import cut_sections, section_bytes
from hanmo.data.settings import DataSettings
from hanmo.data.sources import HashingFile, Source, file_digest, find_sources
from hanmo.errors import DataError
from hanmo.language import pick
from hanmo.text.normalize import normalize

TABLES = {"csv", "tsv"}
SOURCE_SUFFIXES = """
    py pyi pyx c h cc cpp cxx hpp hh cu java kt scala js jsx ts tsx mjs vue go rs rb php pl pm lua r jl
    swift m mm cs fs hs ml clj ex exs erl dart sh bash zsh ps1 bat sql css scss less html htm xml yaml
    yml toml ini cfg cmake mk proto ipynb asm s f f90 v vhd sol zig nim tcl el lisp vim dockerfile
    makefile
""".split()  # noqa: SIM905
FORMATS = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "tab": "tsv",
    "parquet": "parquet",
    **dict.fromkeys(SOURCE_SUFFIXES, "source"),
}
FEW_FILES = 20  # with fewer source files than that, long ones are cut like texts
LARGEST_SOURCE = 1 << 20  # bytes; a larger source file is data rather than a program, and is cut
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(slots=True)
class Document:
    """One text, and where it is from.

    Attributes:
        text: normalised text.
        file: name of the file.
        line: line it begins on, from 1 (in parquet: row).
        continued: it goes on where the document before it ended (only when files are read whole, in pieces).
        is_record: one record of a file, which is never cut.
    """

    text: str
    file: str
    line: int
    continued: bool = False
    is_record: bool = False


def format_of(path: Path) -> str:
    """The format that a file's name announces; ``text`` where it announces none."""
    name = path.name.lower().removesuffix(".gz")
    return FORMATS.get(name.rpartition(".")[2], "text")


class Reader:
    """Reads the files of a corpus one after the other, and notes what it learns in each :class:`Source`.

    Args:
        sources: all files of the corpus; how they are cut depends on how much there is.
        settings: encoding, text field, normalisation, what to do with bad records.
        whole: give each text file in contiguous pieces (``continued``) rather than cut into sections.
        on_read: called with the number of bytes (as they lie on the disk) read since the last call.

    Example::

        reader = Reader(find_sources(["books/"]).sources, DataSettings())
        texts = [document.text for document in reader.documents()]
    """

    def __init__(
        self,
        sources: list[Source],
        settings: DataSettings,
        *,
        whole: bool = False,
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        self.sources = sources
        self.settings = settings
        self.whole = whole
        self.on_read = on_read
        self.problems = Problems(settings.skip_bad)
        self.section_bytes = section_bytes(sum(source.size for source in sources))
        self.few_files = len(sources) < FEW_FILES
        self.cut_files = 0
        self.clean = partial(normalize, half_width=settings.half_width, simplify=settings.simplify)

    def documents(self) -> Iterator[Document]:
        """The documents of all files, in order.

        Raises:
            DataError: a record or file cannot be read and is not to be skipped.
        """
        for source in self.sources:
            yield from self.read(source)

    def read(self, source: Source) -> Iterator[Document]:
        """The documents of one file; afterwards ``source`` knows its format, encoding and digest."""
        try:
            file = HashingFile(source.path, self.on_read)
        except OSError as error:
            raise DataError(f"the file cannot be read: {error.strerror}", where=source.name) from error
        with file:
            buffered = io.BufferedReader(file, 1 << 20)
            is_gzip = buffered.peek(2)[:2] == GZIP_MAGIC
            stream = cast("BinaryIO", gzip.GzipFile(fileobj=buffered)) if is_gzip else buffered
            try:
                yield from self.read_stream(source, stream)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self.problems.bad(
                    source.name,
                    pick("the gzip file is damaged or cut off", "gzip 文件损坏或不完整") + f" ({error})",
                    expected=pick("a whole gzip file", "完整的 gzip 文件"),
                )
            source.digest = file_digest(source.path, PROBE) if source.skipped else file.finish()

    def read_stream(self, source: Source, raw: BinaryIO) -> Iterator[Document]:
        """The documents of an open file whose compression is undone."""
        source.format = format_of(source.path)
        if source.format == "parquet":
            with tempfile.TemporaryFile() as copy:
                seekable: Any = source.path
                if isinstance(raw, gzip.GzipFile):
                    shutil.copyfileobj(raw, copy)
                    seekable = copy
                texts = records.parquet_texts(
                    seekable, self.settings.text_field, source.name, partial(setattr, source, "field")
                )
                yield from self.from_records(source, texts, partial(self.bad, source))
            return
        stream = TextStream(raw, self.settings.encoding)
        source.encoding = stream.encoding
        if not stream.head:
            self.skip(source, "empty", "the file is empty")
        elif not stream.encoding:
            kind = binary_kind(stream.head)
            self.skip(source, f"binary ({kind})" if kind else "binary", "the file is binary, not text")
        else:
            preview = stream.preview()
            if source.format == "json":
                source.format = records.json_kind(preview)
                if (
                    source.format == "text"
                    and (source.named or self.settings.text_field)
                    and preview.lstrip()[:1] in "[{"
                ):
                    self.refuse_json(source, preview)
                if source.format == "text" and preview.lstrip()[:1] == "[":
                    source.field = "none found; read as it stands"
            if source.format in ("text", "source"):
                yield from self.from_text(source, stream)
            else:
                yield from self.from_stream_records(source, stream, preview)
            source.encoding = stream.encoding

    def refuse_json(self, source: Source, preview: str) -> None:
        """A JSON file that was named (or for which a field was) but has no records with text is a mistake to tell."""
        raise DataError(
            "this JSON file is not an array of records with text",
            where=source.name,
            why='expected [{"text": "..."}, ...]; it begins with ' + " ".join(preview[:60].split()),
            fix="write one record per line into a .jsonl file, or the text into a .txt file",
            zh='这个 JSON 文件不是含文本的记录数组（应为 [{"text": "..."}, ...]）。'
            "请改为每行一条记录的 .jsonl，或 .txt 文本",
        )

    def skip(self, source: Source, reason: str, what: str) -> None:
        """Pass over a file found in a folder; refuse one that was named.

        Raises:
            DataError: the user named this very file.
        """
        if source.named:
            raise DataError(
                f"{what}" + (f" ({reason})" if reason not in what else ""),
                where=source.name,
                why="expected txt, md, source code, jsonl, json, csv, tsv or parquet, plain or as .gz",
                fix="convert it to text first, or leave it out" if "binary" in reason else "leave it out",
                zh=("这是二进制文件，不是文本；请先转换为文本，或不要列出它" if "binary" in reason else "文件是空的"),
            )
        source.skipped = reason

    def bad(self, source: Source, line: int, what: str, record: str, expected: str) -> None:
        """Note a bad record of ``source``."""
        self.problems.bad(f"{source.name}:{line}", what, record, expected=expected)

    def bad_bytes(self, source: Source, stream: TextStream, line: int, record: str) -> None:
        """Note a line or record with bytes that its encoding does not have."""
        found = MARKED_BYTE.search(record)
        run = record[found.start() : found.start() + 8] if found else ""
        shown = " ".join(f"0x{ord(mark) - 0xDC00:02X}" for mark in MARKED_BYTE.findall(run))
        name = readable_name(stream.encoding)
        self.problems.bad(
            f"{source.name}:{line}",
            pick(f"invalid {name}: the byte{'s' if ' ' in shown else ''} {shown}", f"不是有效的 {name}：字节 {shown}"),
            record,
            expected=pick(f"text in {name}", f"{name} 文本")
            + (
                pick(", which the rest of the file is", "，与文件其余部分相同")
                if stream.guessing
                else pick(", as --encoding says", "，即 --encoding 所指定")
            ),
            fix=pick(
                "if the file is in another encoding, say --encoding latin-1 (or big5, cp1252, ...)",
                "若文件为其他编码，请用 --encoding latin-1（或 big5、cp1252 等）",
            ),
        )

    def from_stream_records(self, source: Source, stream: TextStream, preview: str) -> Iterator[Document]:
        """The documents of a jsonl, json, csv or tsv file."""
        tell = partial(setattr, source, "field")
        # text that could not be decoded makes broken JSON or csv; the bytes are then the thing to tell

        def bad(line: int, what: str, record: str, expected: str) -> None:
            if stream.bad and MARKED_BYTE.search(record):
                self.bad_bytes(source, stream, line, record)
            else:
                self.bad(source, line, what, record, expected)

        named = self.settings.text_field
        if source.format in TABLES:
            delimiter = records.delimiter_of(preview, source.format)
            quoting = records.is_quoted(delimiter, preview, stream.complete)
            rows = records.table_rows(stream.lines(), delimiter, quoting, bad)
            texts = records.table_texts(rows, named, source.name, bad, tell)
        else:
            values = (
                records.json_array(stream.pieces(), bad)
                if source.format == "json"
                else records.jsonl(stream.lines(), bad)
            )
            texts = records.object_texts(values, named, source.name, bad, tell)
        yield from self.from_records(source, self.decodable(source, stream, texts), bad)

    def decodable(self, source: Source, stream: TextStream, texts: records.Records) -> records.Records:
        """The texts without those that hold undecodable bytes."""
        for line, text in texts:
            if stream.bad and isinstance(text, str) and MARKED_BYTE.search(text):
                self.bad_bytes(source, stream, line, text)
            else:
                yield line, text

    def from_records(self, source: Source, texts: records.Records, bad: records.Bad) -> Iterator[Document]:
        """One document for each text of a file with records."""
        for line, value in texts:
            text = value if isinstance(value, str) else records.value_text(value)
            if text is None:
                bad(line, "the text field does not hold text", str(value), "a string or a list of strings")
            else:
                yield Document(self.clean(text), source.name, line, is_record=True)

    def from_text(self, source: Source, stream: TextStream) -> Iterator[Document]:
        """The documents of a text file: one, or sections of a long one, or contiguous pieces if read ``whole``."""
        pieces = self.clean_pieces(source, stream)
        if self.whole:
            for number, (line, text) in enumerate(pieces):
                yield Document(text, source.name, line, continued=number > 0)
            return
        sections = 0
        for line, text in self.sections(source, pieces):
            sections += 1
            yield Document(text, source.name, line)
        self.cut_files += sections > 1

    def clean_pieces(self, source: Source, stream: TextStream) -> Iterator[tuple[int, str]]:
        """Line and normalised text of each piece of a text file, without lines that cannot be decoded."""
        line = 1
        for piece in stream.pieces():
            start = line
            line += piece.count("\n")
            if stream.bad and MARKED_BYTE.search(piece):
                kept = []
                for number, text in enumerate(split_lines(piece), start):
                    if MARKED_BYTE.search(text):
                        self.bad_bytes(source, stream, number, text)
                    else:
                        kept.append(text)
                piece = "".join(kept)
            text = self.clean(piece)
            if text:
                yield start, text

    def sections(self, source: Source, pieces: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """Cut a text into sections; what a piece leaves over goes in front of the next, so the cuts are seamless."""
        is_source = source.format == "source" and not self.few_files
        limit = LARGEST_SOURCE if is_source else 2 * self.section_bytes
        carry, carry_line = "", 1
        cutting = False
        for line, text in pieces:
            if carry:
                text, line = carry + text, carry_line
            size_in_bytes = len(text.encode("utf-8"))
            cutting = cutting or size_in_bytes > limit
            if not cutting:
                carry, carry_line = text, line
                continue
            *whole, carry = cut_sections(text, max(1, self.section_bytes * len(text) // size_in_bytes))
            for section in whole:
                yield line, section
                line += section.count("\n")
            carry_line = line
        if carry:
            yield carry_line, carry


def split_lines(text: str) -> list[str]:
    """The lines of a text with their ends; only ``\\n`` ends a line (``str.splitlines`` knows many more)."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def read_documents(paths: Iterable[str | Path], settings: DataSettings | None = None) -> Iterator[Document]:
    """Stream the documents under ``paths``: files, folders or globs of any supported format.

    Raises:
        DataError: a path does not exist, or a record cannot be read and is not to be skipped.
    """
    yield from Reader(find_sources(paths).sources, settings or DataSettings()).documents()
