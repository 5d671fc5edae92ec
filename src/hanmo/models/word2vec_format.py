"""The files in which word vectors travel: word2vec's text and binary formats, and GloVe's text without a header.

- **text**: a line ``V D``, then V lines of a word and D numbers, separated by single spaces.
- **binary**: the same first line; then V times the word, a space, and D little-endian float32 numbers. The program of
  Mikolov et al. ends each entry with a line end, gensim does not; both are read.
- **GloVe**: the text format without its first line.

Any of them may be gzipped. Which one a file is in is told from its content, never from its name. A file that does not
hold what it announces is refused before memory is taken for it: what a header claims is checked against the size of the
file, and arrays grow only with what was really read.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import DataError, ResourceError, UsageError
from hanmo.folder import atomic_file

Floats = NDArray[np.float32]

GZIP_MAGIC = b"\x1f\x8b"
GZIP_RATIO = 1032  # deflate cannot shrink anything further than this
MAX_SIZE = 1 << 16  # dimensions; no word vectors have more
MAX_WORD = 1 << 12  # bytes of one word
MAX_LINE = MAX_WORD + 32 * MAX_SIZE
BLOCK = 4096  # rows that are put together into one array at a time
FIX = "a word2vec file (text or binary) or a GloVe text file is expected"
FIX_ZH = "应为 word2vec 文件（文本或二进制）或 GloVe 文本文件"


class Rows:
    """Words and rows as they come in; refuses duplicates and numbers that are not finite."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.words: dict[str, int] = {}  # word -> its row
        self.blocks: list[Floats] = []
        self.block = np.empty((BLOCK, size), dtype=np.float32)

    def add(self, raw: bytes, values: Floats, where: str) -> None:
        """Take one word and its vector."""
        try:
            word = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise bad(where, "the word is not valid UTF-8", "词不是有效的 UTF-8") from None
        if not word:
            raise bad(where, "there is no word before the numbers", "数字前没有词")
        if not np.isfinite(values).all():
            raise bad(where, f"the vector of '{word}' has a number that is not finite", f"'{word}' 的向量含非有限数")
        row = len(self.words)
        if self.words.setdefault(word, row) != row:
            first = self.words[word] + 1
            raise bad(
                where,
                f"the word '{word}' comes twice, first as entry {first}",
                f"词 '{word}' 重复，首次为第 {first} 项",
            )
        at = row % BLOCK
        self.block[at] = values
        if at == BLOCK - 1:
            self.blocks.append(self.block)
            self.block = np.empty((BLOCK, self.size), dtype=np.float32)

    def finish(self) -> tuple[list[str], Floats]:
        """All words, and their vectors [V, D]."""
        if not self.words:
            raise bad(str(self.path), "the file holds no vectors", "文件中没有向量")
        return list(self.words), np.concatenate([*self.blocks, self.block[: len(self.words) % BLOCK]])


def bad(where: str, what: str, zh: str) -> DataError:
    """The error for a file that is not what it should be."""
    return DataError(what, where=where, fix=FIX, zh=f"{zh}；{FIX_ZH}")


def read_word2vec(path: str | Path) -> tuple[list[str], Floats]:
    """Words and vectors, float32 [V, D], of a word2vec or GloVe file.

    Raises:
        DataError: no such file, or one that is damaged or of another kind; with file and line (in binary: entry).
        ResourceError: the vectors do not fit in memory.
    """
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            is_gzip = file.read(2) == GZIP_MAGIC
            file.seek(0)
            limit = os.fstat(file.fileno()).st_size * (GZIP_RATIO if is_gzip else 1)
            stream = cast("BinaryIO", gzip.GzipFile(fileobj=file)) if is_gzip else file
            return read_stream(path, io.BufferedReader(cast("io.RawIOBase", stream), 1 << 20), limit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise bad(str(path), f"the gzip file is damaged or cut off ({error})", "gzip 文件损坏或不完整") from None
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror}", where=str(path), zh=f"无法读取文件：{error.strerror}"
        ) from None
    except MemoryError:
        raise ResourceError("the vectors do not fit in memory", where=str(path), zh="内存放不下这些向量") from None


def read_stream(path: Path, stream: io.BufferedReader, limit: int) -> tuple[list[str], Floats]:
    """Tell the format from the first lines and read; ``limit`` is the most bytes that the stream can hold."""
    first = stream.readline(MAX_LINE)
    header = parse_header(first)
    if header is None:
        fields = first.rstrip(b" \r\n").split(b" ")
        if len(fields) < 3 or parse_numbers(fields[1:]) is None:
            raise bad(
                f"{path}:1", "neither 'words dimensions' nor a word and its numbers", "既不是表头，也不是词与数字"
            )
        return read_text(path, stream, len(fields) - 1, None, first)
    num_words, size = header
    # the least that an entry takes: one byte of a word, a space, and two bytes (text) for each number
    if not (num_words > 0 and 0 < size <= MAX_SIZE and num_words * (2 + 2 * size) <= limit + 1):
        raise bad(
            f"{path}:1",
            f"the header announces {num_words} words of {size} dimensions; the file cannot hold them",
            f"表头声称有 {num_words} 个词、{size} 维，文件装不下",
        )
    begin = stream.tell()
    line = stream.readline(MAX_WORD + 32 * size)
    stream.seek(begin)
    if looks_like_text(line):
        return read_text(path, stream, size, num_words, b"")
    if num_words * (2 + 4 * size) > limit + 1:
        raise bad(
            f"{path}:1",
            f"cut off: the header announces {num_words} words of {size} dimensions",
            f"文件不完整：表头声称有 {num_words} 个词、{size} 维",
        )
    return read_binary(path, stream, size, num_words)


def parse_header(line: bytes) -> tuple[int, int] | None:
    """``V, D`` where the line is two whole numbers."""
    fields = line.split()
    if len(fields) != 2 or not all(field.isdigit() and len(field) <= 18 for field in fields):
        return None
    return int(fields[0]), int(fields[1])


def looks_like_text(line: bytes) -> bool:
    """Whether most of what follows the first word are numbers in writing; in a binary entry that never happens."""
    fields = line.rstrip(b" \r\n").split(b" ")[1:]
    return 2 * sum(parse_numbers([field]) is not None for field in fields) > len(fields)


def parse_numbers(fields: list[bytes]) -> Floats | None:
    """The numbers of a line, float32; None where one is not a number."""
    try:
        with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, which is refused later
            return np.array([float(field) for field in fields], dtype=np.float64).astype(np.float32)
    except ValueError:
        return None


def read_text(path: Path, stream: BinaryIO, size: int, num_words: int | None, first: bytes) -> tuple[list[str], Floats]:
    """The lines of a text file; ``first`` is a line that was read already, ``num_words`` what the header announced."""
    rows = Rows(path, size)
    number = 1 if num_words is None else 2
    line = first or stream.readline(MAX_LINE)
    while line:
        where = f"{path}:{number}"
        if len(rows.words) == num_words and line.strip():
            raise bad(where, f"more lines than the {num_words} that the header announces", "行数多于表头所述")
        if not line.strip():  # blank lines can only end a file
            if stream.read(MAX_LINE).strip():
                raise bad(where, "an empty line between vectors", "向量之间有空行")
            break
        fields = line.rstrip(b" \r\n").split(b" ")
        if len(fields) != size + 1:
            raise bad(
                where,
                f"{len(fields) - 1} numbers follow the word, {size} are expected",
                f"词后有 {len(fields) - 1} 个数字，应为 {size} 个（词中不能有空格）",
            )
        values = parse_numbers(fields[1:])
        if values is None:
            raise bad(where, "a value is not a number (a word cannot hold a space)", "有值不是数字（词中不能有空格）")
        rows.add(fields[0], values, where)
        line = stream.readline(MAX_LINE)
        number += 1
    if num_words is not None and len(rows.words) < num_words:
        raise bad(
            f"{path}:{number}",
            f"cut off: {len(rows.words)} of the {num_words} words that the header announces",
            f"文件不完整：只有 {len(rows.words)} 个词，表头声称 {num_words} 个",
        )
    return rows.finish()


def read_binary(path: Path, stream: io.BufferedReader, size: int, num_words: int) -> tuple[list[str], Floats]:
    """The entries of a binary file."""
    rows = Rows(path, size)
    for entry in range(1, num_words + 1):
        where = f"{path}: entry {entry}"
        word = bytearray()
        while (letter := stream.read(1)) not in (b" ", b""):
            if letter != b"\n" or word:  # the line end of the entry before
                word += letter
            if len(word) > MAX_WORD:
                raise bad(where, f"a word of more than {MAX_WORD} bytes", f"词超过 {MAX_WORD} 字节")
        data = stream.read(4 * size)
        if len(data) < 4 * size:
            raise bad(
                where, f"cut off: the header announces {num_words} words", f"文件不完整：表头声称 {num_words} 个词"
            )
        rows.add(bytes(word), np.frombuffer(data, dtype="<f4"), where)
    if stream.read(4096).strip(b"\n"):
        raise bad(str(path), f"data after the {num_words} announced words", f"{num_words} 个词之后还有数据")
    return rows.finish()


def write_word2vec(path: str | Path, words: list[str], vectors: Floats, *, binary: bool = False) -> None:
    """Write words and vectors in word2vec's text or binary format, gzipped where the name ends in ``.gz``.

    The numbers of the text are the shortest that give the same float32 back.

    Raises:
        UsageError: a word with whitespace, which the format cannot hold.
        ResourceError: the disk is full or cannot be written; an older file is intact.
    """
    for word in words:
        encoded = word.encode("utf-8", "replace")
        if not word or any(map(str.isspace, word)) or len(encoded) > MAX_WORD or encoded.decode() != word:
            raise UsageError(
                f"the word {word!r} cannot stand in a word2vec file",
                why="it is empty, too long, not valid text, or holds whitespace",
                fix="save a model folder instead",
                zh=f"词 {word!r} 为空、过长、含空白或不是有效文本，无法写入 word2vec 文件；请改存为模型文件夹",
            )
    with replacing(Path(path)) as stream:
        stream.write(f"{len(words)} {vectors.shape[1]}\n".encode())
        for word, row in zip(words, vectors, strict=True):
            numbers = row.astype("<f4").tobytes() if binary else " ".join(row.astype("U32").tolist()).encode()
            stream.write(word.encode() + b" " + numbers + b"\n")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content takes the place of ``path`` when the block ends, and leaves no trace when it fails."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as stream:
                yield cast("BinaryIO", stream)
        else:
            yield file
