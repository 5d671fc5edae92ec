r"""N-gram models as ARPA files, the text format that KenLM, SRILM and others read and write.

The choices:

- **Separators**: an ARPA file has two words, ``<s>`` and ``</s>``. A model with one separator id is written with both:
  that id becomes ``</s>``, and ``<s>`` is listed after all other words. A model that is read always has two ids; those
  of a file that Hanmo wrote are the ids it was written from, with ``<s>`` (and ``<unk>``, see below) behind them.
- **<unk>** is a word like any other, as in KenLM: if the vocabulary has it, its n-grams are used. If not, it is given
  log10 probability -100, in what is written and in what is read, which is what KenLM takes where the file lacks it.
- **Words** are bytes between spaces, so a token that is a space or a line end, or has one inside, is written as
  ``<|U+0020|>``, ``<|U+000A|>`` and so on (:func:`arpa_word`); so is the ``<`` of what would be misread otherwise.
- **Scores**: what is read scores as KenLM scores the file: a missing backoff weight is 0, -99 is just a number, and
  n-grams may lack their suffixes. Where prefixes are missing too, which KenLM refuses, they are added with the
  probability that backing off gives them and a backoff weight of 0; no score changes.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, cast

import numpy as np

from hanmo.errors import ModelError, ResourceError
from hanmo.folder import atomic_file
from hanmo.models.ngram import Floats, NGramModel, Table
from hanmo.models.ngram_counts import Ints, find_rows

LN10 = math.log(10)
LOG10_ZERO = -99.0  # SRILM's log10 of a probability of zero
LOG10_ABSENT = -100.0  # KenLM's log10 probability of <unk> where a file has none
UNKNOWN = "<unk>", "<UNK>"  # KenLM takes both for the unknown word

MAX_LINE = 1 << 20  # bytes
MAX_HEADER_LINES = 1000  # before \data\; the format allows remarks there
DEFLATE_RATIO = 1032  # the most that zlib can expand a byte to
ENTRY_BYTES = 100  # of memory for each n-gram that is read, at the peak
LINES_AT_ONCE = 1 << 16

HIDDEN = re.compile("[\\s\x00-\x1f\x7f-\x9f\ud800-\udfff]|<(?=\\|U\\+)")
SHOWN = re.compile(r"<\|U\+((?:10|0?[0-9A-F])?[0-9A-F]{4})?\|>")


def arpa_word(word: str) -> str:
    r"""How a word is written in an ARPA file: itself, if it is not empty and has no whitespace or control character.

    >>> arpa_word("明月"), arpa_word("New York"), arpa_word("\n")
    ('明月', 'New<|U+0020|>York', '<|U+000A|>')
    """
    return HIDDEN.sub(lambda match: f"<|U+{ord(match[0]):04X}|>", word) or "<|U+|>"


def plain_word(word: str) -> str:
    """The word that :func:`arpa_word` wrote.

    >>> plain_word("New<|U+0020|>York")
    'New York'
    """
    return SHOWN.sub(lambda match: chr(int(match[1], 16)) if match[1] else "", word)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_arpa(model: NGramModel, path: str | Path, words: Sequence[str]) -> None:
    r"""Write a model as an ARPA file, gzipped if the name ends in ``.gz``; completely or not at all.

    Every id of the vocabulary is listed, so KenLM gives each the probability that the model gives it. A model of order
    1 gets an empty section of 2-grams, without which KenLM does not load it.

    Args:
        model: any n-gram model.
        path: where to.
        words: the word of each id, [vocab_size]; those of the separators are not looked at.

    Raises:
        ModelError: not one word for each id, or two ids with the same word.
        ResourceError: the disk is full or cannot be written; an older file at ``path`` is intact.

    >>> import tempfile
    >>> model = NGramModel.train([[1, 2, 0], [1, 0]], order=3, vocab_size=4, bos_id=0, eos_id=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_arpa(model, Path(folder) / "lm.arpa", ["", "床", "前", "<unk>"])
    ...     again, words = read_arpa(Path(folder) / "lm.arpa")
    >>> words
    ['</s>', '床', '前', '<unk>', '<s>']
    >>> bool(np.allclose(again.logprobs([1, 2, 3, 0]), model.logprobs([1, 2, 3, 0])))
    True
    """
    path = Path(path)
    names = _names(model, words)
    first_names = names.copy()
    extra = []
    if model.bos_id == model.eos_id:
        first_names[model.bos_id] = "<s>"
        backoff = float(model.tables[0].backoffs[model.bos_id]) / LN10 if model.order > 1 else 0.0
        extra.append(f"{LOG10_ZERO:g}\t<s>\t{backoff:.8g}\n")
    if not set(UNKNOWN) & set(names):
        extra.append(f"{LOG10_ABSENT:g}\t<unk>\t0\n")
    sizes = [table.keys.size for table in model.tables]
    sizes = [sizes[0] + len(extra), *sizes[1:], *([] if model.order > 1 else [0])]
    with atomic_file(path) as temporary, temporary.open("wb") as raw:
        packed = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix == ".gz" else None
        stream: IO[bytes] = cast(IO[bytes], packed) if packed else raw
        counts = "".join(f"ngram {n}={size}\n" for n, size in enumerate(sizes, start=1))
        stream.write(f"\\data\\\n{counts}".encode())
        for n in range(1, len(sizes) + 1):
            stream.write(f"\n\\{n}-grams:\n".encode())
            if n <= model.order:
                for lines in _lines_of(model, n, names if n == 1 else first_names, names):
                    stream.write(lines.encode())
            if n == 1:
                stream.write("".join(extra).encode())
        stream.write(b"\n\\end\\\n")
        if packed:
            packed.close()


def _names(model: NGramModel, words: Sequence[str]) -> list[str]:
    """The words as they stand in the file; ``</s>`` for a separator that is both."""
    if len(words) != model.vocab_size:
        raise ModelError(
            f"{len(words)} words for an n-gram model of {model.vocab_size} ids",
            fix="give the word of each id, in the order of the ids",
            zh=f"模型有 {model.vocab_size} 个编号，却给出了 {len(words)} 个词；请按编号顺序逐一给出",
        )
    names = [arpa_word(word) for word in words]
    reserved = {"<s>", "</s>"} | ({"<UNK>"} if "<unk>" in names else set())
    names = [f"<|U+003C|>{name[1:]}" if name in reserved else name for name in names]
    names[model.bos_id], names[model.eos_id] = "<s>", "</s>"
    if len(set(names)) < len(names):
        seen: dict[str, int] = {}
        for index, name in enumerate(names):
            if seen.setdefault(name, index) != index:
                raise ModelError(
                    f"the ids {seen[name]} and {index} have the same word, '{name}'",
                    why="an ARPA file knows n-grams by their words",
                    fix="give every id a word of its own",
                    zh=f"编号 {seen[name]} 和 {index} 的词相同（'{name}'）；ARPA 文件要求每个编号的词各不相同",
                )
    return names


def _lines_of(model: NGramModel, n: int, first_names: list[str], names: list[str]) -> Iterator[str]:
    """The lines of all n-grams, some at a time."""
    first_word, word = np.array(first_names, dtype=object), np.array(names, dtype=object)
    table = model.tables[n - 1]
    for begin in range(0, table.keys.size, LINES_AT_ONCE):
        some = slice(begin, begin + LINES_AT_ONCE)
        columns = []
        rows = np.arange(table.keys.size)[some]
        for lower in reversed(model.tables[:n]):
            rows, last = np.divmod(lower.keys[rows], model.vocab_size)
            columns.append(last)
        grams = np.stack([first_word[columns.pop()], *(word[column] for column in reversed(columns))], axis=1)
        logs = _log10(table.logprobs[some])
        if n < model.order:
            backoffs = _log10(table.backoffs[some])
            if n == 1 and model.bos_id == model.eos_id and begin <= model.eos_id < begin + LINES_AT_ONCE:
                backoffs[model.eos_id - begin] = 0.0  # it is that of <s>; nothing follows </s>
            entries = zip(logs, grams.tolist(), backoffs, strict=True)
            yield "".join([f"{log:.8g}\t{' '.join(gram)}\t{backoff:.8g}\n" for log, gram, backoff in entries])
        else:
            yield "".join([f"{log:.8g}\t{' '.join(g)}\n" for log, g in zip(logs, grams.tolist(), strict=True)])


def _log10(logs: Floats) -> list[float]:
    """Natural logarithms as decimal ones, with ARPA's number for that of zero."""
    found: list[float] = np.where(np.isneginf(logs), LOG10_ZERO, logs / LN10 + 0.0).tolist()
    return found


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass
class Section:
    """The n-grams of one order as the file lists them: ids [rows, n], log10 values [rows], line numbers [rows]."""

    ids: Ints
    logs: Floats
    backoffs: Floats
    places: Ints


class Lines:
    """The lines of a file, each with its number; none is longer than :data:`MAX_LINE`."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path, self.stream, self.number = path, stream, 0

    def __iter__(self) -> Iterator[bytes]:
        while line := self.stream.readline(MAX_LINE):
            self.number += 1
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                self.fail(f"a line longer than {MAX_LINE:,} bytes", "该行过长")
            yield line

    def fail(self, what: str, zh: str, line: int | None = None) -> NoReturn:
        """Raise the error for this line, or for the one given."""
        raise ModelError(
            f"not a sound ARPA file: {what}",
            where=f"{self.path}:{line or max(1, self.number)}",
            why="nothing was loaded",
            fix="copy the file again or have its program write it again",
            zh=f"ARPA 文件有误：{zh}。未加载任何内容，请重新复制或重新生成该文件",
        )


def read_arpa(path: str | Path) -> tuple[NGramModel, list[str]]:
    r"""Read an ARPA file, gzipped or not, of any program.

    The ids are the places of the words in the section of 1-grams; an ``<unk>`` that is missing there comes last.
    Numbers are log10 in the file and natural logarithms in the model. ``<s>`` is never predicted, whatever its number.

    Returns:
        The model, and the word of each id, [vocab_size].

    Raises:
        ModelError: the file is missing, truncated or not a sound ARPA file; the message gives the line. Nothing is
            taken on trust: numbers of n-grams that the file is too small for are refused before anything is read.
        ResourceError: the model does not fit into the memory.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            size = os.fstat(raw.fileno()).st_size * (DEFLATE_RATIO if packed else 1)
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if packed else raw
            return _read(Lines(path, stream), size)
    except (OSError, EOFError, zlib.error) as error:
        raise ModelError(
            f"the ARPA file cannot be read: {error}",
            where=str(path),
            why="the file is missing, truncated or altered; nothing was loaded",
            fix="copy the file again",
            zh="ARPA 文件缺失、被截断或被改动，未加载任何内容。请重新复制该文件",
        ) from None


def _read(lines: Lines, size: int) -> tuple[NGramModel, list[str]]:
    """The model in a file of at most ``size`` bytes of text."""
    reader = iter(lines)
    counts, header = _read_counts(lines, reader, size)
    ids: dict[bytes, int] = {}
    sections: list[Section] = []
    for n, count in enumerate(counts, start=1):
        if header != f"\\{n}-grams:".encode():
            lines.fail(f"expected \\{n}-grams:", f"此处应为 \\{n}-grams:")
        section, header = _read_section(lines, reader, n, count, ids)
        if n == len(counts) and (wrong := np.flatnonzero(section.backoffs)).size:
            lines.fail("a backoff weight in the highest order", "最高阶不应有回退权重", int(section.places[wrong[0]]))
        if n == 1:
            _add_specials(lines, ids, section)
        sections.append(section)
    if header != b"\\end\\":
        lines.fail("expected \\end\\", "此处应为 \\end\\")
    while lines.stream.read(MAX_LINE):
        pass  # gzip has its checksum at the end
    words = [plain_word(word.decode()) for word in ids]
    bos_id, eos_id = ids[b"<s>"], ids[b"</s>"]
    sections[0].logs[bos_id] = -math.inf
    return NGramModel(len(ids), bos_id, eos_id, _tables(lines, sections, len(ids), bos_id, eos_id), []), words


def _read_counts(lines: Lines, reader: Iterator[bytes], size: int) -> tuple[list[int], bytes]:
    """The numbers of n-grams that the head of the file gives, and the line after it."""
    for line in reader:
        if line.strip() == b"\\data\\":
            break
        if lines.number == MAX_HEADER_LINES:
            lines.fail(f"no \\data\\ in the first {MAX_HEADER_LINES} lines", f"前 {MAX_HEADER_LINES} 行中没有 \\data\\")
    else:
        lines.fail("no \\data\\", "没有 \\data\\")
    counts: list[int] = []
    for line in reader:
        text = line.strip()
        if text.startswith(b"\\"):
            break
        if not text:
            continue
        match = re.fullmatch(rb"ngram\s+(\d{1,3})\s*=\s*(\d{1,18})", text)
        if not match or int(match[1]) != len(counts) + 1:
            lines.fail(f"expected ngram {len(counts) + 1}=<number>", f"此处应为 ngram {len(counts) + 1}=<数目>")
        counts.append(int(match[2]))
        # A line has at least one character for each number and word, and as many blanks and line ends.
        if sum(count * 2 * (n + 1) for n, count in enumerate(counts, start=1)) > size + 2:
            lines.fail(
                f"it announces {counts[-1]:,} {len(counts)}-grams, more than the file has room for",
                f"声称有 {counts[-1]:,} 个 {len(counts)}-gram，超出文件大小所能容纳",
            )
    else:
        lines.fail("it ends after the head", "文件在开头部分之后中断")
    if not counts or not counts[0]:
        lines.fail("it announces no 1-grams", "没有 1-gram")
    _check_memory(lines.path, sum(counts) * ENTRY_BYTES)
    return counts, text


def _check_memory(path: Path, needed: int) -> None:
    """Refuse a model that does not fit; small ones pass at once, as asking takes the import of torch."""
    if needed < 1 << 28:
        return
    from hanmo.models.device import available_memory

    if needed > (available := available_memory()):
        raise ResourceError(
            f"the n-gram model needs about {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free",
            where=str(path),
            fix="prune the model or use a machine with more memory",
            zh=f"该 n-gram 模型约需 {needed / 1e9:.1f} GB 内存，现仅余 {available / 1e9:.1f} GB；"
            "请裁剪模型或换用内存更大的机器",
        )


def _read_section(
    lines: Lines, reader: Iterator[bytes], n: int, count: int, ids: dict[bytes, int]
) -> tuple[Section, bytes]:
    """The n-grams of one order and the line that ends them; 1-grams are given ids."""
    words, logs, backoffs, places = array("i"), array("d"), array("d"), array("q")
    for line in reader:
        fields = line.split()
        if not fields:
            continue
        if fields[0][:1] == b"\\":
            break
        if len(logs) == count:
            lines.fail(f"more {n}-grams than the {count:,} announced", f"{n}-gram 多于声称的 {count:,} 个")
        if not n < len(fields) < n + 3:
            lines.fail(f"{len(fields)} fields in the line of a {n}-gram", f"{n}-gram 一行有 {len(fields)} 个字段")
        try:
            logs.append(float(fields[0]))
            backoffs.append(float(fields[n + 1]) if len(fields) > n + 1 else 0.0)
        except ValueError:
            lines.fail("not a number", "数值无法识别")
        if n == 1:
            _add_word(lines, ids, fields[1])
        try:
            words.extend([ids[word] for word in fields[1 : n + 1]])
        except KeyError as error:
            word = error.args[0].decode(errors="replace")
            lines.fail(f"'{word}' is not among the 1-grams", f"1-gram 中没有 '{word}'")
        places.append(lines.number)
    else:
        lines.fail("it ends without \\end\\: the file is truncated", "没有 \\end\\，文件被截断")
    if len(logs) < count:
        lines.fail(
            f"{count:,} {n}-grams announced, {len(logs):,} found", f"应有 {count:,} 个 {n}-gram，实有 {len(logs):,} 个"
        )
    section = Section(
        np.array(words, dtype=np.int32).reshape(-1, n), np.array(logs), np.array(backoffs), np.array(places)
    )
    for what, zh, wrong in (
        ("a log10 probability above 0", "对数概率大于 0", ~(section.logs <= 0)),
        ("a backoff weight that is no number", "回退权重不是数值", ~(section.backoffs < math.inf)),
    ):
        if wrong.any():
            lines.fail(what, zh, int(section.places[np.argmax(wrong)]))
    return section, line.strip()


def _add_word(lines: Lines, ids: dict[bytes, int], word: bytes) -> None:
    """Give a 1-gram the next id."""
    try:
        text = word.decode()
    except UnicodeDecodeError:
        lines.fail("the word is not UTF-8", "该词不是 UTF-8 编码")
    if word in ids:
        lines.fail(f"the 1-gram '{text}' twice", f"1-gram '{text}' 重复")
    ids[word] = len(ids)


def _add_specials(lines: Lines, ids: dict[bytes, int], unigrams: Section) -> None:
    """Refuse a vocabulary without separators; add an unknown word that is missing."""
    for word in ("<s>", "</s>"):
        if word.encode() not in ids:
            lines.fail(f"no {word} among the 1-grams", f"1-gram 中没有 {word}")
    if not any(word.encode() in ids for word in UNKNOWN):
        ids[b"<unk>"] = len(ids)
        unigrams.logs = np.append(unigrams.logs, LOG10_ABSENT)
        unigrams.backoffs = np.append(unigrams.backoffs, 0.0)


def _tables(lines: Lines, sections: list[Section], vocab_size: int, bos_id: int, eos_id: int) -> list[Table]:
    """Tables in which every n-gram has its prefix, lowest order first."""
    unigrams, *longer = sections
    tables = [Table(np.arange(vocab_size), unigrams.logs * LN10, unigrams.backoffs * LN10 if longer else np.zeros(0))]
    prefixes = [section.ids[:, 0].astype(np.int64) for section in longer]  # rows of what stands before the last word
    while longer:
        n = len(tables) + 1
        wanted = [rows * vocab_size + section.ids[:, n - 1] for rows, section in zip(prefixes, longer, strict=True)]
        section = longer.pop(0)
        order = np.argsort(wanted[0], kind="stable")
        keys = wanted.pop(0)[order]
        if (twice := order[1:][keys[1:] == keys[:-1]]).size:
            lines.fail(f"the same {n}-gram twice", f"{n}-gram 重复", int(section.places[twice].min()))
        logprobs, backoffs = section.logs[order] * LN10, section.backoffs[order] * LN10
        prefixes = [find_rows(keys, some) for some in wanted]
        if any((rows < 0).any() for rows in prefixes):
            absent, index = np.unique(
                np.concatenate([some[rows < 0] for some, rows in zip(wanted, prefixes, strict=True)]), return_index=True
            )
            grams = np.concatenate([s.ids[rows < 0, :n] for s, rows in zip(longer, prefixes, strict=True)])[index]
            places = np.searchsorted(keys, absent)
            lower = NGramModel(vocab_size, bos_id, eos_id, tables, [])
            estimates = _backed_off(lower, grams) + tables[-1].backoffs[absent // vocab_size]
            keys = np.insert(keys, places, absent)
            logprobs = np.insert(logprobs, places, estimates)
            backoffs = np.insert(backoffs, places, 0.0)
            prefixes = [find_rows(keys, some) for some in wanted]
        tables.append(Table(keys, logprobs, backoffs if longer else np.zeros(0)))
    return tables


def _backed_off(lower: NGramModel, grams: Ints) -> Floats:
    """Log P(last word | the words before it but the first) for n-grams of one word more than the model's order.

    They are scored end to end as one stream: the model does not look back beyond the n-gram.
    """
    n = grams.shape[1]
    return lower._score(grams.ravel(), np.zeros(grams.size, dtype=bool))[n - 1 :: n]
