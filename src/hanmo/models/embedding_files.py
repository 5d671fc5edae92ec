"""The files of a folder with word vectors: read without trust, and without taking memory for what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import ModelError

CONFIG, WEIGHTS, VOCABULARY = "config.json", "model.safetensors", "vocabulary.txt"
TYPES = {"F32": "<f4", "I64": "<i8"}  # of the tensors that such a folder has


def fit_together(config: dict[str, Any], tensors: dict[str, NDArray[Any]], num_words: int) -> bool:
    """Whether the tensors ``vectors`` [V, D], ``counts`` [V] and ``ngrams`` [buckets, D] are those of ``config``.

    The last two need not be there.
    """
    size, lengths = config.get("size"), config.get("subword_lengths")
    if not (type(size) is int and isinstance(config.get("method"), str) and isinstance(config.get("training"), dict)):
        return False
    if ("ngrams" in tensors) != (lengths is not None) or (lengths is not None and not is_lengths(lengths)):
        return False
    buckets = len(tensors["ngrams"]) if lengths else 0
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        "vectors": (np.float32, (num_words, size)),
        "counts": (np.int64, (num_words,)),
        "ngrams": (np.float32, (buckets, size)),
    }
    return "vectors" in tensors and all(
        (tensors[name].dtype, tensors[name].shape) == (np.dtype(dtype), shape)
        for name, (dtype, shape) in expected.items()
        if name in tensors
    )


def is_lengths(value: Any) -> bool:
    """Whether a value of ``config.json`` is the shortest and the longest length of n-grams."""
    whole = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    return whole and bool(1 <= value[0] <= value[1])


def read_vocabulary(path: Path) -> list[str]:
    """The words of ``vocabulary.txt``.

    Raises:
        ModelError: missing, not UTF-8, or with an empty or repeated word.
    """
    try:
        words = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise ModelError(
            "the file is missing",
            where=str(path),
            fix="copy or train the model again",
            zh="文件缺失。请重新复制或重新训练",
        ) from None
    except UnicodeDecodeError as error:
        raise ModelError(
            f"not valid UTF-8 at byte {error.start}", where=str(path), zh=f"第 {error.start} 字节处不是有效的 UTF-8"
        ) from None
    seen: set[str] = set()
    for line, word in enumerate(words, start=1):
        if not word or word in seen:
            raise ModelError(
                f"the word '{word}' comes twice" if word else "an empty line",
                where=f"{path}:{line}",
                fix="copy or train the model again",
                zh=f"词 '{word}' 重复" if word else "空行",
            )
        seen.add(word)
    return words


def map_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """The float32 and int64 tensors of a safetensors file, memory-mapped and read-only.

    Raises:
        ModelError: missing, or not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # checks the header against the file
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the file is missing or damaged: {error}",
            where=str(path),
            fix="copy or train the model again",
            zh="文件缺失或损坏。请重新复制或重新训练",
        ) from None
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {
        name: np.memmap(path, TYPES[entry["dtype"]], "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in TYPES and 0 not in entry["shape"]
    }
