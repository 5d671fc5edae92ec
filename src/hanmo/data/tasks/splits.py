"""Splits of records without leaks, and checks of labels before training.

Records that share a text always stand on the same side: the side follows from a hash of the text and the seed. Texts
are compared without regard to case, width and blanks (NFKC, case folding). What counts as the text: of labelled and
tagged records the text; of pairs the source and the target, either of which may be shared; of dialogues what the user
says; of preferences the prompt; of propositions the sentence; of questions the context; of similar texts all of them.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from hanmo.data.problems import LISTED
from hanmo.data.splits import SPLITS, Shares, hash_sides, mix
from hanmo.data.tasks.types import (
    Dialogue,
    Labelled,
    Pair,
    Preference,
    Problem,
    Prompted,
    Proposition,
    QuestionAnswer,
    Record,
    Similar,
    Tagged,
    Text,
)
from hanmo.errors import DataError
from hanmo.language import pick

T = TypeVar("T", bound=Record)


@dataclass
class SplitReport:
    """How records were divided.

    Attributes:
        counts: records in each split.
        texts: how many groups of records without a shared text there are.
        duplicates: records that are equal to an earlier one in everything; they stay, beside it.
        conflicts: records whose text has other labels than the first record of that text.
        stratified: whether every label has its share of each split.
        examples: places of the first duplicates and conflicts, each with the earlier record.
    """

    counts: dict[str, int] = field(default_factory=dict)
    texts: int = 0
    duplicates: int = 0
    conflicts: int = 0
    stratified: bool = False
    examples: list[dict[str, str]] = field(default_factory=list)

    def describe(self) -> str:
        """The report as text, in the user's language."""
        names = {
            "train": pick("training", "训练"),
            "validation": pick("validation", "验证"),
            "test": pick("test", "测试"),
        }
        counts = ", ".join(f"{names[name]} {count:,}" for name, count in self.counts.items())
        how = pick(", labels in equal shares", "，各标签比例相同") if self.stratified else ""
        lines = [pick(f"records: {counts}; {self.texts:,} different texts{how}",
                      f"记录：{counts}；共 {self.texts:,} 种不同文本{how}")]  # fmt: skip
        if self.duplicates:
            lines.append(pick(f"{self.duplicates:,} records repeat an earlier one", f"{self.duplicates:,} 条记录重复"))
        if self.conflicts:
            lines.append(
                pick(
                    f"{self.conflicts:,} records have the text of an earlier one and other labels",
                    f"{self.conflicts:,} 条记录与先前文本相同而标签不同",
                )
            )
        lines += [f"  {item['where']} = {item['first']} ({item['what']})" for item in self.examples]
        return "\n".join(lines)


@dataclass
class Split(Generic[T]):
    """Records for training, validation and test, each in the order of the files."""

    train: list[T]
    validation: list[T]
    test: list[T]
    report: SplitReport


def split_records(records: Sequence[T], shares: Shares, seed: int = 0) -> Split[T]:
    """Divide records so that no text stands on two sides.

    The same records, shares and seed give the same split, whatever their order. Labelled records are divided label by
    label, so that each has its share everywhere; of a label with too few texts, all are for training.

    Args:
        shares: of validation and test; with 0 the split is empty.
        seed: any integer.

    Raises:
        DataError: there are fewer different texts than splits, or no share is left for training.
    """
    if not 0 <= shares.validation + shares.test < 1 or min(shares.validation, shares.test) < 0:
        raise DataError(
            f"validation and test take {shares.validation + shares.test:.0%} of the records",
            fix="leave something for training, for example 0.1 each",
            zh="验证集与测试集占去全部记录，请减小比例，例如各 0.1",
        )
    report = SplitReport()
    groups, digests = group_records(records)
    wanted = 1 + (shares.validation > 0) + (shares.test > 0)
    report.texts = len(digests)
    if len(digests) < wanted:
        raise DataError(
            f"there are too few different texts: {len(digests)}; at least {wanted} are needed",
            where=records[0].file if records else "",
            why="no text may stand on two sides, and no side may be empty",
            fix="add records; or give those to validate on as a file of their own, with --validation",
            zh=f"不同的文本太少：只有 {len(digests)} 条，至少需要 {wanted} 条（训练与验证不能共用文本）。"
            "请添加记录，或用 --validation 另给验证文件",
        )
    if records and all(isinstance(record, Labelled) for record in records):
        sides = stratified_sides(records, groups, digests, shares, seed)
        report.stratified = sides is not None
    else:
        sides = None
    if sides is None:
        sides = hash_sides(digests, shares, seed)
    parts: tuple[list[T], list[T], list[T]] = ([], [], [])
    for record, group in zip(records, groups, strict=True):
        parts[sides[group]].append(record)
    report.counts = {name: len(part) for name, part in zip(SPLITS, parts, strict=True)}
    find_duplicates(records, report)
    return Split(*parts, report)


def canonical(text: str) -> str:
    """A text without what does not make it another one: case, width, amount of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def leak_keys(record: Record) -> list[str]:
    """The texts that must not stand on two sides."""
    if isinstance(record, (Text, Labelled)):
        return [canonical(record.text)]  # a premise with two hypotheses is one text
    if isinstance(record, (Tagged, Proposition)):
        return [canonical(" ".join(record.tokens))]
    if isinstance(record, Pair):
        return ["s" + canonical(record.source), *("t" + canonical(t) for t in (record.target, *record.references))]
    if isinstance(record, Dialogue):
        return ["\n\n".join(canonical(item["content"]) for item in record.messages if item["role"] == "user")]
    if isinstance(record, Preference):
        return ["\n\n".join(canonical(item["content"]) for item in record.prompt if item["role"] == "user")]
    if isinstance(record, QuestionAnswer):
        return [canonical(record.context)]
    if isinstance(record, Similar):
        return [canonical(text) for text in (record.anchor, record.positive, record.negative) if text is not None]
    if isinstance(record, Problem):
        return [canonical("\n".join((record.prompt, *record.asserts)))]
    if isinstance(record, Prompted):
        return [canonical(record.reference or record.prompt)]  # many poems have the same title
    raise TypeError(f"no record: {type(record).__name__}")


def digest_of(text: str) -> bytes:
    """A 128-bit hash of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def group_records(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Groups of records that share a text, directly or through others.

    Returns:
        The group of each record, int64 ``[n]``; the digest of each group, the smallest of its texts, uint64 ``[g, 2]``.
    """
    parents: list[int] = []
    first_of: dict[bytes, int] = {}
    smallest: list[bytes] = []

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    for place, record in enumerate(records):
        parents.append(place)
        smallest.append(b"\xff" * 16)
        for key in leak_keys(record):
            digest = digest_of(key)
            other, own = root(first_of.setdefault(digest, place)), root(place)
            low, high = min(other, own), max(other, own)
            parents[high] = low
            smallest[low] = min(smallest[low], smallest[high], digest)
    roots = [root(place) for place in range(len(records))]
    kept, groups = np.unique(np.array(roots, dtype=np.int64), return_inverse=True)
    data = b"".join(smallest[place] for place in kept)
    return groups, np.frombuffer(data, dtype=np.uint64).reshape(-1, 2)


def stratified_sides(
    records: Sequence[Record], groups: np.ndarray, digests: np.ndarray, shares: Shares, seed: int
) -> np.ndarray | None:
    """The side of each group (0 train, 1 validation, 2 test) label by label; None if a split would be empty.

    A group whose records have different labels belongs to the first of them by alphabet. Inside a label the groups are
    ordered by their hashes, and each split takes the first that are left until it has its share of the records.
    """
    with np.errstate(over="ignore"):
        keys = mix(digests[:, 0] ^ mix(np.array([seed % 2**64], dtype=np.uint64)))
    sizes = np.bincount(groups, minlength=len(digests))
    labels: dict[int, tuple[str, ...]] = {}
    for record, group in zip(records, groups.tolist(), strict=True):
        own = tuple(sorted(record.labels)) if isinstance(record, Labelled) else ()
        labels[group] = min(labels.get(group, own), own)
    strata: dict[tuple[str, ...], list[int]] = {}
    for group in np.argsort(keys, kind="stable").tolist():
        strata.setdefault(labels[group], []).append(group)
    sides = np.zeros(len(digests), dtype=np.uint8)
    for members in strata.values():
        total = int(sizes[members].sum())
        place = 0
        for side, share in ((1, shares.validation), (2, shares.test)):
            taken = 0
            while taken + 0.5 * sizes[members[place]] <= share * total and place < len(members) - 1:
                sides[members[place]] = side
                taken += int(sizes[members[place]])
                place += 1
    needed = [side for side, share in ((0, 1.0), (1, shares.validation), (2, shares.test)) if share > 0]
    return sides if all((sides == side).any() for side in needed) else None


def find_duplicates(records: Sequence[Record], report: SplitReport) -> None:
    """Count records that repeat an earlier one, and those that contradict one."""
    seen: dict[bytes, Record] = {}
    texts: dict[bytes, Labelled] = {}
    for record in records:
        content = repr([value for name, value in vars(record).items() if name not in ("file", "line")])
        earlier = seen.setdefault(digest_of(content), record)
        what = ""
        if earlier is not record:
            report.duplicates += 1
            what = pick("equal", "重复")
        elif isinstance(record, Labelled):
            text = canonical(record.text) + "\n" + canonical(record.pair or "")
            earlier = known = texts.setdefault(digest_of(text), record)
            if set(known.labels) != set(record.labels):
                report.conflicts += 1
                what = pick("other labels", "标签不同")
        if what and len(report.examples) < LISTED:
            report.examples.append({"where": record.where, "first": earlier.where, "what": what})


def labels_in(record: Any) -> Sequence[str]:
    """The labels or tags of a record.

    Raises:
        DataError: it is of a kind without labels.
    """
    if isinstance(record, Labelled):
        return record.labels
    if isinstance(record, Tagged):
        return record.tags
    name = type(record).__name__
    raise DataError(f"records of the kind {name} have no labels", zh=f"{name} 记录没有标签")


def label_names(records: Sequence[Labelled] | Sequence[Tagged]) -> tuple[str, ...]:
    """All labels or tags, in an order that does not depend on that of the records.

    Numbers are in their order; ``O`` comes first, and of tags of spans those of one type stand together.

    >>> label_names([Tagged(("a", "b", "c"), ("B-PER", "O", "I-PER"))]), label_names([Labelled("a", ("10", "9"))])
    (('O', 'B-PER', 'I-PER'), ('9', '10'))
    """
    found = {label for record in records for label in labels_in(record)}
    if all(label.isdecimal() for label in found):
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    return tuple(sorted(found, key=lambda label: (label != "O", label[2:] if label[1:2] == "-" else label, label)))


def check_labels(
    train: Sequence[Labelled] | Sequence[Tagged], validation: Sequence[Labelled] | Sequence[Tagged]
) -> None:
    """Refuse validation records with labels that training never shows: they could not be predicted.

    Raises:
        DataError: naming the first such label, with file and line, and how many there are.
    """
    known = {label for record in train for label in labels_in(record)}
    unseen: dict[str, str] = {}
    count = 0
    for record in validation:
        new = [label for label in labels_in(record) if label not in known]
        count += bool(new)
        for label in new:
            unseen.setdefault(label, record.where)
    if not unseen:
        return
    label, where = next(iter(unseen.items()))
    others = [name for name in unseen if name != label]
    more = pick(" (so do: ", "（另有：") + ", ".join(others[:10]) + pick(")", "）") if others else ""
    shown = ", ".join(sorted(known)[:20])
    raise DataError(
        f"the label '{label}' does not occur in the training records{more}",
        where=where,
        why=f"the model would never learn to give it; {count} of {len(validation)} validation records are affected. "
        f"Training has: {shown}",
        fix="correct the label, leave these records out, or divide the records anew so that each label is in training",
        zh=f"标签 '{label}' 在训练集中没有出现{more}，模型无法学会；受影响的验证记录：{count}/{len(validation)}。"
        f"训练集标签：{shown}。请更正标签、去掉这些记录，或重新划分数据",
    )
