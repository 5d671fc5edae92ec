"""Splits: which documents train, validate and test.

``hash``: the side of a document follows from its text and the seed alone. The same text always stands on the same side,
so copies can never leak, and a corpus that grows keeps every document where it was while the shares stay the same.
``tail``: the end of the text is held out, as benchmarks such as tinyshakespeare do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hanmo.data.settings import DataSettings
from hanmo.errors import DataError
from hanmo.language import pick
from hanmo.progress import human_bytes

SPLITS = ("train", "validation", "test")

DEFAULT_SHARE = 0.01
LARGEST_DEFAULT = 0.05
ENOUGH_BYTES = 200_000
ENOUGH_DOCUMENTS = 30
MINIMUM_BYTES = 1000


@dataclass(frozen=True)
class Shares:
    """Shares of validation and test, and the reason for those that were computed."""

    validation: float
    test: float
    reason: str = ""


def choose_shares(settings: DataSettings, total_bytes: int, documents: int) -> Shares:
    """The shares the user gave, or computed ones: 1 %, up to 5 % where that would be too little to measure with."""
    wanted = max(
        DEFAULT_SHARE, ENOUGH_BYTES / total_bytes, ENOUGH_DOCUMENTS / documents if settings.split == "hash" else 0
    )
    default = round(min(LARGEST_DEFAULT, wanted), 4)
    given = (settings.validation_share, settings.test_share)
    if given[0] is not None and given[1] is not None:
        return Shares(given[0], given[1])
    size = human_bytes(total_bytes)
    if default > DEFAULT_SHARE:
        reason = pick(
            f"{default:.1%} each, because the corpus is small ({size}, {documents} documents), and less would "
            f"be too little to measure with; aim: {human_bytes(ENOUGH_BYTES)} and {ENOUGH_DOCUMENTS} documents, "
            f"but at most {LARGEST_DEFAULT:.0%}",
            f"各 {default:.1%}：语料较小（{size}，{documents} 个文档），再少就测不准",
        )
    else:
        reason = pick(f"{default:.1%} of {size} is enough to measure with", f"{size} 的 {default:.1%} 已足够测量")
    validation, test = (default if share is None else share for share in given)
    if validation + test >= 1:  # one share was given and is nearly everything
        validation, test = (min(default, (1 - sum(filter(None, given))) / 2) if s is None else s for s in given)
    return Shares(validation, test, reason)


def require_enough(total_bytes: int, documents: int, duplicates: int, shares: Shares | None = None) -> None:
    """Raise DataError where there is too little text for any split to hold something."""
    needed = 1 + ((shares.validation > 0) + (shares.test > 0) if shares else 2)
    removed = (
        pick(f" after {duplicates} exact copies were removed", f"（已去掉 {duplicates} 份重复）") if duplicates else ""
    )
    if total_bytes < MINIMUM_BYTES:
        raise DataError(
            f"the corpus has {total_bytes} bytes of text{removed}; at least {MINIMUM_BYTES} are needed",
            why="training, validation and test each need text of their own; a model that writes sensibly needs far "
            "more: 100 KB for a first look, 10 MB and more for something useful",
            fix="add text; or --no-dedup keeps copies" if duplicates else "add text",
            zh=f"语料只有 {total_bytes} 字节{removed}，至少需要 {MINIMUM_BYTES} 字节（训练、验证、测试各需文本；"
            "初步尝试建议 100 KB 以上，实用建议 10 MB 以上）。请添加文本",
        )
    if documents < needed:
        raise DataError(
            f"different documents in the corpus{removed}: {documents}; at least {needed} are needed",
            why="a document stands in one split only, and no split may be empty",
            fix="add documents, or hold out less: --test-share 0",
            zh=f"语料只有 {documents} 个不同的文档{removed}，至少需要 {needed} 个（训练、验证、测试各一）。"
            "请添加文档，或用 --test-share 0 减少留出部分",
        )


def mix(keys: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of uint64 ``[n]`` depends on every bit."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = keys ^ (keys >> np.uint64(31))
    return mixed


def first_copies(digests: np.ndarray) -> np.ndarray:
    """For each document the index of the first one with the same digest.

    Args:
        digests: uint64 ``[n, 2]``, the two halves of a 128-bit hash.

    Returns:
        int64 ``[n]``; a document that is no copy has its own index.
    """
    count = len(digests)
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests stay in document order
    ordered = digests[order]
    begins = np.ones(count, dtype=bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    group_start = np.maximum.accumulate(np.where(begins, np.arange(count), 0))
    first = np.empty(count, dtype=np.int64)
    first[order] = order[group_start]
    return first


def hash_sides(digests: np.ndarray, shares: Shares, seed: int) -> np.ndarray:
    """The side of each document (0 train, 1 validation, 2 test), uint8 ``[n]``, from its digest uint64 ``[n, 2]``.

    A split with a share above 0 is never empty: the document with the smallest hash of the fullest split moves there.

    Raises:
        DataError: there are fewer different documents than splits.
    """
    with np.errstate(over="ignore"):
        seeded = digests[:, 0] ^ mix(np.array([seed % 2**64], dtype=np.uint64))
        keys = mix(seeded)
    position = (keys >> np.uint64(11)).astype(np.float64) / 2**53
    sides = np.zeros(len(keys), dtype=np.uint8)
    sides[position < shares.validation + shares.test] = 2
    sides[position < shares.validation] = 1
    wanted = [0] + [side for side, share in ((1, shares.validation), (2, shares.test)) if share > 0]
    for side in wanted:
        if not (sides == side).any():
            # take from the fullest split a text that is not its only one; all copies of it move together
            fullest = max(wanted, key=lambda other: len(np.unique(keys[sides == other])))
            candidates = np.unique(keys[sides == fullest])
            if len(candidates) < 2:
                require_enough(MINIMUM_BYTES, len(np.unique(keys)), 0, shares)
            sides[keys == candidates[0]] = side
    return sides


def tail_boundaries(characters: int, shares: Shares) -> tuple[int, int]:
    """Where validation and test begin, in characters.

    >>> tail_boundaries(1_115_394, Shares(validation=0.1, test=0.0))
    (1003854, 1115394)
    """
    # rounding first: 1 - 0.05 - 0.05 is a hair below 0.9 in binary
    validation = int(round(1 - shares.validation - shares.test, 12) * characters)
    test = int(round(1 - shares.test, 12) * characters)
    return validation, test
