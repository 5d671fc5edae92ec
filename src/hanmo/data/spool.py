"""The spool: all documents of a corpus in one temporary file, and 45 bytes about each in memory.

Deduplication, shares and tail splits need to know the whole corpus before the first document can be put in its place,
and the corpus must never be held in memory. So documents are first written one after the other, then copied to their
splits.
"""

from __future__ import annotations

import codecs
from array import array
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hanmo.data.readers import Document
from hanmo.text.language import LANGUAGES, identify

COPY_BLOCK = 1 << 22
LANGUAGE_NUMBER = {name: number for number, name in enumerate(LANGUAGES)}


@dataclass
class Table:
    """What is known about each document in the spool; arrays of one length.

    Attributes:
        starts, ends: bytes in the spool, int64.
        characters: int64.
        digests: uint64 ``[n, 2]``, BLAKE2b-128 of the normalised text.
        languages: index into LANGUAGES, uint8.
        files: index of the source, int32.
        lines: line of the source, int64.
        is_record: whether it must not be cut, bool.
    """

    starts: np.ndarray
    ends: np.ndarray
    characters: np.ndarray
    digests: np.ndarray
    languages: np.ndarray
    files: np.ndarray
    lines: np.ndarray
    is_record: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, kept: np.ndarray) -> Table:
        """The rows that a boolean array selects."""
        return Table(**{name: values[kept] for name, values in vars(self).items()})

    def duplicate_row(self, row: int) -> None:
        """Insert a copy of a row after it (a document is about to be cut in two)."""
        for name, values in vars(self).items():
            setattr(self, name, np.insert(values, row + 1, values[row], axis=0))


class Spool:
    """Writes documents to a file and keeps their table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = path.open("wb", buffering=COPY_BLOCK)
        self.sizes = array("q")
        self.characters = array("q")
        self.digests = bytearray()
        self.languages = bytearray()
        self.files = array("i")
        self.lines = array("q")
        self.is_record = bytearray()
        self.empty = 0
        self.hash = blake2b(digest_size=16)

    def add(self, document: Document, file: int) -> None:
        """Append a document, or what continues the one before; a blank document is only counted."""
        text = document.text
        if document.continued and self.sizes:
            data = text.encode("utf-8")
            self.hash.update(data)
            self.sizes[-1] += len(data)
            self.characters[-1] += len(text)
            self.file.write(data)
            return
        if not text or text.isspace():
            self.empty += 1
            return
        self.close_document()
        data = text.encode("utf-8")
        self.hash = blake2b(data, digest_size=16)
        self.sizes.append(len(data))
        self.characters.append(len(text))
        self.languages.append(LANGUAGE_NUMBER[identify(data)])
        self.files.append(file)
        self.lines.append(document.line)
        self.is_record.append(document.is_record)
        self.file.write(data)

    def close_document(self) -> None:
        """Note the digest of the document that was written last."""
        if self.sizes:
            self.digests += self.hash.digest()

    def finish(self) -> Table:
        """Close the file and return the table of its documents."""
        self.close_document()
        self.file.close()
        sizes = np.frombuffer(self.sizes, dtype=np.int64)
        ends = np.cumsum(sizes)
        return Table(
            starts=ends - sizes,
            ends=ends,
            characters=np.array(self.characters, dtype=np.int64),
            digests=np.frombuffer(bytes(self.digests), dtype="<u8").reshape(-1, 2),
            languages=np.frombuffer(bytes(self.languages), dtype=np.uint8),
            files=np.array(self.files, dtype=np.int32),
            lines=np.array(self.lines, dtype=np.int64),
            is_record=np.frombuffer(bytes(self.is_record), dtype=np.uint8).astype(bool),
        )


def cut_at(table: Table, spool: Path, character: int) -> int:
    """Make a document begin at a character of the corpus, and return its index.

    A text is cut in two there; a record is never cut: then it is the first document that begins at or after it.
    """
    ends = np.cumsum(table.characters)
    row = int(np.searchsorted(ends, character, side="right"))
    if row == len(table):
        return row
    inside = character - int(ends[row] - table.characters[row])
    if inside == 0:
        return row
    if table.is_record[row]:
        return row + 1
    offset, lines = measure(spool, int(table.starts[row]), inside)
    table.duplicate_row(row)
    table.ends[row] = table.starts[row + 1] = table.starts[row] + offset
    table.characters[row] = inside
    table.characters[row + 1] -= inside
    table.lines[row + 1] += lines
    return row + 1


def measure(path: Path, start: int, characters: int) -> tuple[int, int]:
    """Bytes and line ends in the first ``characters`` characters after byte ``start`` of a UTF-8 file."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    size = lines = 0
    with path.open("rb") as stream:
        stream.seek(start)
        while characters:
            text = decoder.decode(stream.read(COPY_BLOCK))[:characters]
            characters -= len(text)
            size += len(text.encode("utf-8"))
            lines += text.count("\n")
    return size, lines


def copy_ranges(source: BinaryIO, target: BinaryIO, starts: np.ndarray, ends: np.ndarray) -> None:
    """Append byte ranges of one file to another; ranges that touch are copied as one, large ones in blocks."""
    if not len(starts):
        return
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    first = np.concatenate([[0], breaks])
    last = np.concatenate([breaks, [len(starts)]]) - 1
    for start, end in zip(starts[first].tolist(), ends[last].tolist(), strict=True):
        source.seek(start)
        while start < end:
            block = source.read(min(COPY_BLOCK, end - start))
            if not block:
                raise OSError(f"{source.name} ends before byte {end}")
            target.write(block)
            start += len(block)
