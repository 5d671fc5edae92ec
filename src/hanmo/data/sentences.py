"""Word-level corpora in the format of the Penn Treebank language-modelling files (Mikolov et al. 2010).

One sentence per line, its words separated by spaces, in UTF-8. Nothing is cleaned, divided or left out: the words of
the file are the tokens, in any language. The end of each line is a token of its own, ``<eos>``, also of a blank line.

Spaces are ASCII white space and the ideographic space U+3000; any other character can be part of a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hanmo.errors import DataError
from hanmo.folder import atomic_folder, read_manifest
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.settings import notice
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import END_OF_SENTENCE, UNKNOWN_WORD, split_words

KIND = "words"
LONGEST_LINE = 1 << 24  # bytes; beyond, the file has no lines, and one "sentence" would fill the memory
CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class Sentence:
    """The words of one line, and the place of the line for messages: ``file:line``."""

    words: list[str]
    file: str
    line: int

    @property
    def origin(self) -> str:
        """``file:line``."""
        return f"{self.file}:{self.line}"


def read_sentences(paths: Iterable[str | Path]) -> Iterator[Sentence]:
    """The lines of the files in order; one line is held at a time.

    Raises:
        DataError: a file is missing or not UTF-8, a line is longer than 16 MB, or a word is ``<eos>``; the message
            names file and line.
    """
    for path in paths:
        try:
            with Path(path).open("rb") as stream:
                line = 0
                while raw := stream.readline(LONGEST_LINE + 1):
                    line += 1
                    yield Sentence(words_of(raw, str(path), line), str(path), line)
        except OSError as error:
            raise DataError(
                f"the file cannot be read: {error.strerror}",
                where=str(path),
                fix="give a text file with one sentence per line",
                zh=f"无法读取文件（{error.strerror}）。请给出每行一句的文本文件",
            ) from error


def words_of(raw: bytes, file: str, line: int) -> list[str]:
    """The words of one line.

    Raises:
        DataError: see :func:`read_sentences`.
    """
    where = f"{file}:{line}"
    if len(raw) > LONGEST_LINE:
        raise DataError(
            f"the line has more than {LONGEST_LINE >> 20} MB",
            where=where,
            why="in this format every line is a sentence",
            fix="put one sentence on each line",
            zh=f"这一行超过 {LONGEST_LINE >> 20} MB；此格式要求每行一句",
        )
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"invalid UTF-8: the byte 0x{raw[error.start]:02X} at position {error.start} of the line",
            where=where,
            fix="convert the file to UTF-8, for example with iconv",
            zh=f"不是有效的 UTF-8（本行第 {error.start} 字节为 0x{raw[error.start]:02X}）。请先把文件转换为 UTF-8",
        ) from None
    words = split_words(text)
    if END_OF_SENTENCE in words:
        raise DataError(
            f"the line holds the word {END_OF_SENTENCE}",
            where=where,
            why="it stands for the end of a line and is added to each",
            fix=f"remove {END_OF_SENTENCE} from the file",
            zh=f"这一行含有 {END_OF_SENTENCE}；它表示行尾，会自动添加。请从文件中删去",
        )
    return words


class WordCorpus:
    """The token ids of the files of a word-level corpus, memory-mapped.

    Attributes:
        vocab_size, eos_id: of the tokenizer; every sentence ends with ``eos_id``.
        report: for each split its ``sentences``, ``tokens`` (ends of sentences included), ``unknown`` (tokens that are
            ``<unk>``), ``blank`` lines and ``bytes`` (UTF-8 of the words, with one byte for each space and line end).
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.report: dict[str, dict[str, int]] = manifest["report"]

    def tokens(self, split: str) -> np.ndarray:
        """The ids of a split, uint16 or uint32; empty where there is no such file."""
        path = self.folder / f"{split}.bin"
        dtype = np.dtype(self.manifest["dtype"])
        if not path.exists() or not path.stat().st_size:
            return np.empty(0, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r")

    def document_spans(self, split: str) -> np.ndarray:
        """Where each sentence begins and the last one ends, int64 ``[n+1]``; each includes its final ``eos_id``."""
        ends: np.ndarray = np.flatnonzero(self.tokens(split) == self.eos_id) + 1
        return np.concatenate([np.zeros(1, dtype=np.int64), ends])


def tokenize_sentences(files: Mapping[str, Iterable[str | Path]], tokenizer: Tokenizer, target: Path) -> WordCorpus:
    """Write the ids of every split to ``target``, completely or not at all.

    Args:
        files: the files of each split (``train``, ``validation``, ``test``).
        tokenizer: from :func:`hanmo.text.training.train_words`.
        target: folder for ``<split>.bin`` and the manifest.

    Raises:
        DataError: as :func:`read_sentences`; a split without words; a word that the vocabulary lacks, where it has no
            ``<unk>`` either.
        ResourceError: the disk is full.
    """
    assert tokenizer.eos_id is not None
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    manifest: dict[str, Any] = {
        "kind": KIND,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": dtype.str,
        "report": {},
    }
    digest = hashlib.sha256()
    with atomic_folder(target, manifest) as folder:
        for split, paths in files.items():
            counts = dict.fromkeys(("sentences", "tokens", "unknown", "blank", "bytes"), 0)
            with (folder / f"{split}.bin").open("wb") as stream:
                for ids in encoded_chunks(read_sentences(paths), tokenizer, counts, split):
                    data = ids.astype(dtype).tobytes()
                    digest.update(data)
                    stream.write(data)
            if counts["tokens"] == counts["blank"]:
                raise DataError(
                    f"the {split} file has no words",
                    where=", ".join(map(str, paths)),
                    fix="give a text file with one sentence per line",
                    zh="文件中没有词。请给出每行一句的文本文件",
                )
            digest.update(split.encode())
            manifest["report"][split] = counts
        manifest["corpus"] = digest.hexdigest()
    return WordCorpus(target, read_manifest(target))


def encoded_chunks(
    sentences: Iterable[Sentence], tokenizer: Tokenizer, counts: dict[str, int], split: str
) -> Iterator[np.ndarray]:
    """The ids of the sentences, about a million at a time; ``counts`` are kept up to date.

    Raises:
        DataError: a word is not in the vocabulary, which has no ``<unk>`` either.
    """
    vocabulary = tokenizer.words
    unknown, eos = vocabulary.get(UNKNOWN_WORD), tokenizer.eos_id
    ids: list[int] = []
    with Progress(pick(f"reading {split}", f"读取 {split}"), unit="tokens") as progress:
        for sentence in sentences:
            for word in sentence.words:
                number = vocabulary.get(word, unknown)
                if number is None:
                    raise unseen_word(word, sentence.origin)
                counts["unknown"] += number == unknown
                counts["bytes"] += len(word.encode()) + 1
                ids.append(number)
            ids.append(eos)  # type: ignore[arg-type]
            counts["sentences"] += 1
            counts["tokens"] += len(sentence.words) + 1
            counts["blank"] += not sentence.words
            counts["bytes"] += not sentence.words
            if len(ids) >= CHUNK_TOKENS:
                yield np.array(ids)
                progress.update(counts["tokens"])
                ids = []
        progress.done = counts["tokens"]
    if counts["blank"]:
        notice(
            pick(
                f"{split}: {counts['blank']:,} blank lines count as {END_OF_SENTENCE} each, as is usual",
                f"{split}：{counts['blank']:,} 个空行各计为一个 {END_OF_SENTENCE}（惯例）",
            )
        )
    if ids:
        yield np.array(ids)


def unseen_word(word: str, where: str) -> DataError:
    """The error for a word that a closed vocabulary lacks."""
    shown = word if len(word) <= 40 else word[:40] + "..."
    return DataError(
        f"the word '{shown}' does not occur in the training text, and the vocabulary has no {UNKNOWN_WORD}",
        where=where,
        why=f"a closed vocabulary gives it no probability; where {UNKNOWN_WORD} occurs in the training text, it stands "
        "for all other words",
        fix=f"replace rare words by {UNKNOWN_WORD} in the training file, or give a --vocab-size, which does that",
        zh=f"词 '{shown}' 未在训练文本中出现，且词表没有 {UNKNOWN_WORD}。"
        f"请把训练文件中的罕见词换成 {UNKNOWN_WORD}，或用 --vocab-size 限制词表（自动替换）",
    )
