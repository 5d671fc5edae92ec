"""Which tokens begin a word: what whole-word masking must know of a corpus, one bit per token.

Words are those of :func:`hanmo.text.segment.segment`: Chinese by jieba, English by its letters, marks by themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import ModelError
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.text.segment import segment
from hanmo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from hanmo.data.corpus import Corpus
    from hanmo.data.tokens import TokenCorpus

CONTROL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def word_beginnings(tokenizer: Tokenizer, text: str) -> tuple[list[int], NDArray[np.bool_]]:
    """The ids of a text, and for each whether it begins a word.

    A token that has parts of several words joins them: they can only be hidden together. White space belongs to the
    word after it where a token holds both, and is a word by itself where a token holds nothing else.

    Raises:
        DataError: a lone surrogate.
        ResourceError: there are Han characters and the package ``jieba`` is not installed.
    """
    ids, offsets = tokenizer.encode_with_offsets(text)
    begins = np.ones(len(ids), dtype=bool)
    if not ids:
        return ids, begins
    starts, ends = np.array(offsets, dtype=np.int64).T
    word_at = words_at(text)
    places = np.arange(len(text) + 1)
    visible = word_at >= 0
    following = np.minimum.accumulate(np.where(visible, places, len(text))[::-1])[::-1]  # next visible character
    preceding = np.maximum.accumulate(np.where(visible, places, -1))
    holds = following[starts] < ends  # any part of a word
    first, last = word_at[following[starts]], word_at[preceding[np.maximum(ends - 1, 0)]]
    covered = np.maximum.accumulate(np.where(holds, last, -1))  # the last word that the tokens so far have a part of
    before = np.concatenate([[-1], covered[:-1]])
    begins[holds] = first[holds] > before[holds]
    return ids, begins


def words_at(text: str) -> NDArray[np.int64]:
    """The number of the word at each character and, for convenience, one place more; -1 is white space.

    >>> words_at("a bc").tolist()
    [0, -1, 1, 1, -1]
    """
    words = segment(text)
    starts, place = np.empty(len(words), dtype=np.int64), 0
    for number, word in enumerate(words):
        place = text.index(word, place)
        starts[number] = place
        place += len(word)
    sizes = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    number_at = np.full(len(text) + 1, -1, dtype=np.int64)
    numbers = np.repeat(np.arange(len(words)), sizes)
    inner = np.arange(len(numbers)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    number_at[np.repeat(starts, sizes) + inner] = numbers
    return number_at


class WordMarks:
    """One bit for each token of a split, memory-mapped: ``len(marks)``, ``marks[start:stop]`` as bool."""

    def __init__(self, bits: NDArray[np.uint8], count: int) -> None:
        self.bits, self.count = bits, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, span: slice) -> NDArray[np.bool_]:
        start, stop, _ = span.indices(self.count)
        first = start // 8
        found = np.unpackbits(self.bits[first : -(-stop // 8)]).astype(bool)
        return found[start - 8 * first : max(start, stop) - 8 * first]


def mark_words(corpus: Corpus, tokens: TokenCorpus, tokenizer: Tokenizer, split: str) -> WordMarks:
    """The marks of a split's tokens: those that lie beside them, else computed and written there.

    Documents are read piece by piece as they were tokenised; separators begin a word.

    Raises:
        ModelError: the tokens are not those of this tokenizer.
        ResourceError: there are Han characters and the package ``jieba`` is not installed.
    """
    count = tokens.num_tokens(split)
    path = tokens.folder / f"{split}.words.npy"
    if not path.is_file():
        write_marks(path, corpus, tokens, tokenizer, split)
    bits = np.load(path, mmap_mode="r", allow_pickle=False)
    if len(bits) != -(-count // 8):
        raise mismatch(path)
    return WordMarks(bits, count)


def write_marks(path: Path, corpus: Corpus, tokens: TokenCorpus, tokenizer: Tokenizer, split: str) -> None:
    """Compute the marks and write them as packed bits, whole or not at all."""
    from hanmo.data.tokens import BATCH_BYTES

    array, at = tokens.tokens(split), 0
    marks = np.ones(len(array), dtype=bool)
    total = corpus.num_bytes(split)
    with Progress(pick("finding words", "分词"), total, "bytes") as progress:
        for text, is_end in corpus.pieces(split, BATCH_BYTES):
            ids, begins = word_beginnings(tokenizer, text)
            if not np.array_equal(array[at : at + len(ids)], ids):
                raise mismatch(path)
            marks[at : at + len(ids)] = begins
            at += len(ids) + is_end
            progress.update(progress.done + len(text.encode("utf-8")))
    if at != len(array):
        raise mismatch(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("wb") as stream:
        np.save(stream, np.packbits(marks), allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(path)


def mismatch(path: Path) -> ModelError:
    """The error for marks of other tokens."""
    return ModelError(
        "the tokens beside these marks are not those of this corpus and tokenizer",
        where=str(path),
        fix=f"delete {path.parent}; it is written again when needed",
        zh=f"词首标记与分词数据不符，请删除 {path.parent}，需要时会重新生成",
    )


def with_mask(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with ``[CLS]``, ``[SEP]`` and ``[MASK]`` as further control tokens, as far as it lacks them.

    They get the ids after all others, so that the ids of texts stay the same.

    >>> from hanmo.text.training import train_char
    >>> with_mask(train_char(["床前明月光"])).mask_id
    12
    """
    definition = json.loads(tokenizer.to_json())
    names = {token_id: token for token, token_id in tokenizer.special_tokens.items()}
    roles = {
        role + "_token": names[number]
        for role in ("bos", "eos", "pad", "cls", "sep", "mask")
        if (number := getattr(tokenizer, role + "_id")) in names
    }
    missing = {role: token for role, token in CONTROL.items() if role not in roles}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition["added_tokens"] += [
        {"id": tokenizer.vocab_size + place, "content": token, **flags} for place, token in enumerate(missing.values())
    ]
    numbers = {token["content"]: token["id"] for token in definition["added_tokens"]}
    ends = {role: {**roles, **missing}[role] for role in ("cls_token", "sep_token")}
    if definition.get("post_processor") is None and all(token in numbers for token in ends.values()):
        definition["post_processor"] = template(ends["cls_token"], ends["sep_token"], numbers)
    text = json.dumps(definition, ensure_ascii=False, indent=1) + "\n"
    named: dict[str, Any] = {**roles, **missing}
    return Tokenizer.from_json(text, chat_template=tokenizer.chat_template, **named)


def template(cls: str, sep: str, numbers: Mapping[str, int]) -> dict[str, Any]:
    """The post-processor that puts these tokens round a text and round a pair, for other readers of the file."""

    def token(name: str, segment: int = 0) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": segment}}

    def sequence(name: str, segment: int = 0) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": segment}}

    single = [token(cls), sequence("A"), token(sep)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, sequence("B", 1), token(sep, 1)],
        "special_tokens": {name: {"id": name, "ids": [numbers[name]], "tokens": [name]} for name in (cls, sep)},
    }
