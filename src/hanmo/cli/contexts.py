"""How long the rows of a fine-tuning are: what its records need, not all that the network could see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hanmo.language import pick
from hanmo.settings import Resolution, notice

if TYPE_CHECKING:
    from hanmo.cli.finetune import FinetuneSettings
    from hanmo.text.tokenizer import Tokenizer

STEP = 64  # lengths are rounded up to multiples of it
NEARLY_ALL = 99  # per cent of the records; what is longer is rare, and cut with --truncate
FAR_LONGER = 4  # times as long as nearly all others: such a record is pointed at
WINDOW = 512  # tokens of a question and a part of its text (BERT reads so many); longer texts are read in windows
TEXT_ROW = 1024  # tokens of a row of plain text
MOST_SHARED = 8  # conversations of mean length that share a row at most: more costs memory and gains nothing
LITTLE_WASTE = 0.02  # of the places in packed rows may stay empty
PACKED_SAMPLE = 2000  # lengths from which the waste is told

UNKNOWN = ("[UNK]", "<unk>")  # what tokenizers of words and characters write for what they do not know
MUCH_UNKNOWN = 0.05  # of the tokens

Fits = Callable[[int], bool]


def rounded(length: float) -> int:
    """A length, rounded up.

    >>> rounded(100), rounded(128)
    (128, 128)
    """
    return max(STEP, -(-int(np.ceil(length)) // STEP) * STEP)


def record_lengths(records: Sequence[Any], tokenizer: Tokenizer, overhead: int) -> list[int]:
    """Tokens of each record: of a text with its pair, of words; of texts that stand in rows of their own the most."""
    from hanmo.data.tasks.types import Labelled, Pair, Similar, Tagged

    texts: list[str] = []
    counts: list[int] = []
    for record in records:
        if isinstance(record, Labelled):
            parts = [record.text] if record.pair is None else [record.text, record.pair]
        elif isinstance(record, Tagged):
            parts = [record.text]
        elif isinstance(record, Pair):
            parts = [record.source, record.target]
        else:
            assert isinstance(record, Similar)
            parts = [record.anchor, record.positive, *([] if record.negative is None else [record.negative])]
        texts += parts
        counts.append(len(parts))
    encoded = tokenizer.encode_documents(texts)
    tell_unknown(encoded, tokenizer)
    sizes = [len(ids) for ids in encoded]
    lengths, at = [], 0
    for record, count in zip(records, counts, strict=True):
        own = sizes[at : at + count]
        lengths.append(overhead + (max(own) if isinstance(record, (Pair, Similar)) else sum(own)))
        at += count
    return lengths


def tell_unknown(encoded: Sequence[np.ndarray], tokenizer: Tokenizer) -> None:
    """Say it where much of the data is written with characters that the base does not know."""
    unknown = next((tokenizer.special_tokens[name] for name in UNKNOWN if name in tokenizer.special_tokens), None)
    if unknown is None:
        return
    count = sum(int((ids == unknown).sum()) for ids in encoded)
    share = count / max(1, sum(len(ids) for ids in encoded))
    if share > MUCH_UNKNOWN:
        notice(
            pick(
                f"{share:.0%} of the tokens are unknown to the base, which cannot tell them apart: choose a --base "
                "that was trained on this language",
                f"{share:.0%} 的词元不在基础模型的词表中，模型无法区分它们：请用 --base 换一个学过该语言的模型",
            )
        )


def choose_context(
    settings: FinetuneSettings,
    resolution: Resolution,
    lengths: Sequence[int],
    limit: int,
    fits: Fits,
    *,
    packed: bool = False,
) -> int:
    """Tokens of a row: what the longest record needs; with ``--truncate`` and ``--skip-long`` what nearly all need, as
    far as memory goes.

    Args:
        lengths: tokens of each record, control tokens included.
        limit: tokens that the network can see.
        fits: whether a row of so many tokens finds room in memory.
        packed: several records share a row.
    """
    longest = max(lengths, default=1)
    shorter = settings.truncate or settings.skip_long
    most = float(np.percentile(lengths, NEARLY_ALL)) if lengths else 1.0
    if shorter:
        wanted = rounded(most)
        reason = pick(
            f"{NEARLY_ALL} % of the records have at most {int(most):,} tokens, the longest {longest:,}",
            f"{NEARLY_ALL}% 的记录不超过 {int(most):,} 个词元，最长 {longest:,}",
        )
    else:
        wanted = rounded(longest)
        reason = pick(f"the longest record has {longest:,} tokens", f"最长的记录有 {longest:,} 个词元")
    shared = shared_row(lengths, min(limit, wanted), limit) if packed and lengths else 0
    if shared > wanted:
        wanted = shared
        reason += pick("; several share a row", "；多条记录共用一行")
    wanted = min(limit, wanted)
    while shorter and wanted > STEP and not fits(wanted):
        wanted = max(STEP, wanted // 2 // STEP * STEP)
        reason = pick("more does not fit into memory", "更长则内存放不下")
    if settings.context is None and not shorter and rounded(most) * FAR_LONGER <= min(limit, longest):
        beyond = sum(length > rounded(most) for length in lengths)
        notice(
            pick(
                f"{beyond:,} of {len(lengths):,} records are longer than {rounded(most):,} tokens, the longest has "
                f"{longest:,}: with --truncate they would be cut, and the run would need less memory and time",
                f"{len(lengths):,} 条记录中有 {beyond:,} 条超过 {rounded(most):,} 个词元，最长 {longest:,}："
                "加上 --truncate 会截断它们，内存与时间都会减少",
            )
        )
    resolution.compute(settings, "context", wanted, reason)
    assert settings.context is not None
    return min(limit, settings.context)


def shared_row(lengths: Sequence[int], least: int, limit: int) -> int:
    """The shortest row, of at least so many tokens, that several records share with little waste."""
    from hanmo.training.packing import pack

    mean = float(np.mean(lengths))
    most = max(least, min(limit, rounded(MOST_SHARED * mean)))
    step = rounded(mean / 2)
    sample = lengths[:: max(1, len(lengths) // PACKED_SAMPLE)]
    fitting = [length for length in sample if length <= least]
    rows: list[int] = [*range(least, most, step), most]
    waste: dict[int, float] = {row: pack(fitting, row).waste for row in rows}
    enough = [row for row in rows if waste[row] <= LITTLE_WASTE]
    return enough[0] if enough else min(rows, key=lambda row: waste[row])


def choose_window(settings: FinetuneSettings, resolution: Resolution, limit: int) -> int:
    """Tokens of a question and a part of its text."""
    reason = pick("longer texts are read in overlapping windows", "更长的文本分成重叠的窗口阅读")
    resolution.compute(settings, "context", min(limit, WINDOW), reason)
    assert settings.context is not None
    return min(limit, settings.context)


def choose_text_row(
    settings: FinetuneSettings,
    resolution: Resolution,
    documents: Sequence[int],
    shortest_split: int,
    limit: int,
    fits: Fits,
) -> int:
    """Tokens of a row of plain text, in which several documents stand one after the other.

    Args:
        documents: tokens of each document.
        shortest_split: tokens of the smaller one of training and validation, which has to hold a row.
    """
    most = float(np.percentile(documents, NEARLY_ALL)) if len(documents) else 1.0
    wanted, reason = (
        rounded(most),
        pick(
            f"{NEARLY_ALL} % of the texts have at most {int(most):,} tokens",
            f"{NEARLY_ALL}% 的文本不超过 {int(most):,} 个词元",
        ),
    )
    if wanted > TEXT_ROW:
        wanted, reason = (
            TEXT_ROW,
            pick(
                "the texts are longer; more costs memory and changes little",
                "文本更长，但再长只会多占内存，效果变化不大",
            ),
        )
    if wanted > limit:
        wanted, reason = limit, pick("the network sees no more at once", "模型一次只能看到这么多")
    while wanted > STEP and not fits(wanted):
        wanted, reason = (
            max(STEP, wanted // 2 // STEP * STEP),
            pick("more does not fit into memory", "更长则内存放不下"),
        )
    if wanted > shortest_split // 2:
        wanted = max(8, min(wanted, shortest_split // 2))
        reason = pick("the validation part is short", "验证部分较短")
    resolution.compute(settings, "context", wanted, reason)
    assert settings.context is not None
    return min(limit, settings.context)
