"""The tokenizer of Marian's translation models: ``source.spm``, ``target.spm`` and ``vocab.json``.

The pieces and scores of ``source.spm`` (a SentencePiece model, which is a protocol buffer) cut the text, ``vocab.json``
numbers the pieces of both languages. Both become one Unigram tokenizer of the ``tokenizers`` library; a piece that the
source does not know scores so low that it stands in for an unknown character only.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hanmo.errors import ModelError
from hanmo.folder import read_json
from hanmo.text.tokenizer import Tokenizer

FILES = ("source.spm", "target.spm", "vocab.json")
MAX_BYTES = 100_000_000
UNIGRAM = 1  # the kind of SentencePiece model that Marian's are
NORMAL, USER_DEFINED = 1, 4  # kinds of pieces that stand for text
FOREIGN = 1000.0  # how far below the worst piece of the source those of the target alone are


def is_marian_tokenizer(folder: Path) -> bool:
    """Whether a folder has Marian's files and no ``tokenizer.json``."""
    return not (folder / "tokenizer.json").exists() and all((folder / name).is_file() for name in FILES)


def load_marian_tokenizer(folder: Path) -> Tokenizer:
    """One tokenizer for source and target; the tokens ``>>xxx<<`` that choose a language are control tokens.

    Raises:
        ModelError: a file is damaged, too large, or of another kind of SentencePiece model.
    """
    path = folder / "source.spm"
    scores, charsmap = read_sentencepiece(path)
    ids = read_vocabulary(folder / "vocab.json")
    known = [scores[piece] for piece in ids if piece in scores]
    if not known:
        raise refused(path, "none of its pieces is in vocab.json")
    lowest = min(known) - FOREIGN
    control = [piece for piece in ids if piece in ("<unk>", "<pad>", "</s>", "<s>") or is_language(piece)]
    steps: list[dict[str, Any]] = [
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    if charsmap:
        text = base64.b64encode(charsmap).decode()
        steps.insert(0, {"type": "Precompiled", "precompiled_charsmap": text})
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[piece], "content": piece, **flags} for piece in sorted(control, key=ids.__getitem__)
        ],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [ids["</s>"]], "tokens": ["</s>"]}},
        },
        "decoder": space,
        "model": {
            "type": "Unigram",
            "unk_id": ids["<unk>"],
            "byte_fallback": False,
            "vocab": [[piece, scores.get(piece, lowest)] for piece in sorted(ids, key=ids.__getitem__)],
        },
    }
    try:
        return Tokenizer.from_json(json.dumps(definition), eos_token="</s>", pad_token="<pad>", source=str(path))
    except ModelError as error:
        raise refused(path, error.what) from None


def is_language(piece: str) -> bool:
    """Whether a piece chooses the language of the translation."""
    return piece.startswith(">>") and piece.endswith("<<")


def read_vocabulary(path: Path) -> dict[str, int]:
    """The pieces and their ids, which are 0, 1, 2, ...

    Raises:
        ModelError: they are not, or a control token that every translation needs is missing.
    """
    ids = read_json(path)
    if not isinstance(ids, dict) or sorted(id for id in ids.values() if type(id) is int) != list(range(len(ids))):
        raise refused(path, "the ids of its pieces are not 0, 1, 2, ...")
    for piece in ("</s>", "<unk>"):
        if piece not in ids:
            raise refused(path, f"the piece '{piece}' is missing")
    return ids


def read_sentencepiece(path: Path) -> tuple[dict[str, float], bytes]:
    """The pieces for text with their scores, and the table of the normaliser (empty where there is none).

    Raises:
        ModelError: the file is not a Unigram model of SentencePiece.
    """
    if path.stat().st_size > MAX_BYTES:
        raise refused(path, f"the file has more than {MAX_BYTES:,} bytes")
    scores: dict[str, float] = {}
    charsmap, kind = b"", UNIGRAM
    try:
        for number, value in fields(path.read_bytes()):
            if number == 1:
                piece: dict[int, Any] = {1: b"", 2: b"\0\0\0\0", 3: NORMAL} | dict(fields(value))
                if piece[3] in (NORMAL, USER_DEFINED):
                    scores[piece[1].decode()] = struct.unpack("<f", piece[2])[0]
            elif number == 2:
                kind = dict(fields(value)).get(3, UNIGRAM)
            elif number == 3:
                charsmap = dict(fields(value)).get(2, b"")
    except (ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise refused(path, f"not a SentencePiece model: {error}") from None
    if kind != UNIGRAM:
        raise refused(path, "a SentencePiece model of another kind than Unigram")
    if charsmap and (len(charsmap) < 4 or int.from_bytes(charsmap[:4], "little") > len(charsmap) - 4):
        raise refused(path, "the table of its normaliser is cut off")
    return scores, charsmap


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer message: numbers as integers, everything else as bytes.

    Raises:
        ValueError, IndexError: the bytes are none, or are cut off.
    """
    place = 0

    def varint() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 64, 7):
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number without end")

    while place < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind, -1) if kind != 2 else varint()
        if not 0 <= size <= len(data) - place:
            raise ValueError(f"a field of {size} bytes at byte {place}")
        yield key >> 3, data[place : place + size]
        place += size


def refused(path: Path, what: str) -> ModelError:
    """The error for a tokenizer that cannot be read, with the way round it."""
    return ModelError(
        f"this tokenizer of a Marian model cannot be read: {what}",
        where=str(path),
        fix="copy the file again; or write a tokenizer.json beside it where you trust the model, with transformers",
        zh=f"无法读取 Marian 模型的分词器（{what}）。请重新复制该文件，或用 transformers 转换出 tokenizer.json",
    )
