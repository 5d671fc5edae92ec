"""The schemes in which tags of tokens say where spans begin and end, and their conversion to IOB2.

============  =======================================================================================
IOB1          I-X inside a span; B-X only where a span follows another of its type at once
IOB2          B-X at the beginning of every span, I-X inside, O outside (Tjong Kim Sang and Veenstra 1999)
BIOES, BMES   E-X (also L-X) ends a span, S-X (also U-X) is a span of one token, M-X is I-X
IO            I-X inside a span, nothing marks its beginning
plain         tags that speak of single tokens, such as parts of speech
============  =======================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hanmo.errors import DataError
from hanmo.language import pick

SPAN_TAG = re.compile(r"O|[BIMESLU](?:[-_](.+))?", re.DOTALL)
CLOSED = ("BIOES", "BMES", "BILOU")
SCHEMES = ("IOB1", "IOB2", "IO", *CLOSED, "plain")


@dataclass(frozen=True)
class Scheme:
    """A scheme, and how it was told.

    Attributes:
        repaired: tags that the scheme does not allow where they stand; they are read in the way that loses least.
    """

    name: str
    reason: str
    repaired: int = 0


def split_tag(tag: str) -> tuple[str, str]:
    """Prefix and type: ``B-LOC`` -> ``("B", "LOC")``; a type called O, which some files have, is outside.

    >>> split_tag("B-LOC"), split_tag("E"), split_tag("O"), split_tag("B-O"), split_tag("S_LOC")
    (('B', 'LOC'), ('E', ''), ('O', ''), ('O', ''), ('S', 'LOC'))
    """
    kind = tag[2:]
    return ("O", "") if tag == "O" or kind == "O" else (tag[:1], kind)


def detect_scheme(sentences: Iterable[Sequence[str]]) -> Scheme:
    """Tell the scheme from the tags of all sentences.

    >>> detect_scheme([["I-PER", "I-PER", "O"]]).name, detect_scheme([["B-PER", "E-PER", "O", "S-LOC"]]).name
    ('IO', 'BIOES')
    >>> detect_scheme([["NOUN", "VERB"]]).name, detect_scheme([["I-PER", "B-PER"]]).name
    ('plain', 'IOB1')
    """
    sentences = list(sentences)
    tags = {tag for sentence in sentences for tag in sentence}
    odd = next((tag for tag in sorted(tags) if not SPAN_TAG.fullmatch(tag)), None)
    prefixes = {split_tag(tag)[0] for tag in tags} - {"O"}
    if odd is not None or not (prefixes or "O" in tags):
        reason = pick(f"'{odd}' is no tag of a span", f"'{odd}' 不是片段标签") if odd else ""
        return Scheme("plain", reason)
    if prefixes & set("ESLUM"):
        middle = "BMES" if "M" in prefixes or ("I" not in prefixes and "O" not in tags) else "BIOES"
        name = "BILOU" if prefixes & set("LU") else middle
        listed = "".join(sorted(prefixes))
        reason = pick(f"the tags begin with {', '.join(listed)}", f"标签前缀为 {'、'.join(listed)}")
        return Scheme(name, reason, broken_spans(sentences))
    begun = fresh_begins(sentences)
    if not begun["I"]:
        return Scheme("IOB2", pick("every span begins with B-", "每个片段以 B- 开始"))
    if "B" not in prefixes:
        return Scheme("IO", pick("there is no B-", "没有 B-"))
    if not begun["B"]:
        return Scheme("IOB1", pick("B- stands only between two spans of a type", "B- 只出现在同类片段之间"))
    if begun["I"] > begun["B"]:  # neither holds; what agrees with more spans is meant
        reason = pick(f"{begun['I']:,} spans begin with I-, {begun['B']:,} with B-", "多数片段以 I- 开始")
        return Scheme("IOB1", reason, begun["B"])
    reason = pick(f"{begun['B']:,} spans begin with B-, {begun['I']:,} with I-", "多数片段以 B- 开始")
    return Scheme("IOB2", reason, begun["I"])


def fresh_begins(sentences: Iterable[Sequence[str]]) -> dict[str, int]:
    """How many spans that follow no span of their type begin with I and with B."""
    counts = {"I": 0, "B": 0}
    for sentence in sentences:
        before = ""
        for tag in sentence:
            prefix, kind = split_tag(tag)
            if prefix in counts and before != f"in {kind}":
                counts[prefix] += 1
            before = "" if prefix == "O" else f"in {kind}"
    return counts


def broken_spans(sentences: Iterable[Sequence[str]]) -> int:
    """How many tags of a closed scheme do not follow from the one before."""
    count = 0
    for sentence in sentences:
        open_kind: str | None = None
        for tag in sentence:
            prefix, kind = split_tag(tag)
            continues = prefix in "IMEL"
            count += (open_kind is not None and not continues) or (continues and open_kind != kind)
            open_kind = kind if prefix in "BIM" else None
        count += open_kind is not None
    return count


def to_iob2(tags: Sequence[str], scheme: str) -> tuple[str, ...]:
    """The tags of one sentence in IOB2.

    Spans that the scheme does not allow are kept: a tag inside a span of which there is no beginning begins one.

    Args:
        scheme: one of ``SCHEMES``; ``plain`` changes nothing.

    Raises:
        DataError: a tag that belongs to no scheme of spans.

    >>> to_iob2(["I-PER", "B-PER", "I-LOC"], "IOB1"), to_iob2(["B-PER", "E-PER", "S-LOC", "O"], "BIOES")
    (('B-PER', 'B-PER', 'B-LOC'), ('B-PER', 'I-PER', 'B-LOC', 'O'))
    """
    if scheme == "plain":
        return tuple(tags)
    converted = []
    open_kind: str | None = None
    for tag in tags:
        if not SPAN_TAG.fullmatch(tag):
            raise DataError(
                f"'{tag}' is no tag of the scheme {scheme}",
                fix="expected O, or B-TYPE, I-TYPE, ...",
                zh=f"'{tag}' 不是 {scheme} 标签（应为 O 或 B-类型、I-类型等）",
            )
        prefix, kind = split_tag(tag)
        if prefix == "O":
            converted.append("O")
            open_kind = None
            continue
        begins = prefix in "BSU" or open_kind != kind
        converted.append(("B" if begins else "I") + (f"-{kind}" if kind else ""))
        # in a closed scheme the end of a span is marked, so what follows it is a new one
        open_kind = None if prefix in "ESLU" else kind
    return tuple(converted)


def to_bioes(tags: Sequence[str]) -> tuple[str, ...]:
    """IOB2 tags of one sentence in BIOES, whose labels tell a tagger more: where a span ends, and which are single.

    >>> to_bioes(["B-PER", "I-PER", "O", "B-LOC"])
    ('B-PER', 'E-PER', 'O', 'S-LOC')
    """
    marked = ["O"] * len(tags)
    for start, end, kind in spans_of(tags):
        signs = ["B", *["I"] * (end - start - 2), "E"] if end - start > 1 else ["S"]
        marked[start:end] = [f"{sign}-{kind}" if kind else sign for sign in signs]
    return tuple(marked)


def spans_of(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """First token, end (exclusive) and type of each span of IOB2 tags.

    >>> spans_of(["B-PER", "I-PER", "O", "B-LOC"])
    [(0, 2, 'PER'), (3, 4, 'LOC')]
    """
    spans: list[tuple[int, int, str]] = []
    for place, tag in enumerate(tags):
        prefix, kind = split_tag(tag)
        if prefix == "I" and spans and spans[-1][1:] == (place, kind):
            spans[-1] = (spans[-1][0], place + 1, kind)
        elif prefix != "O":
            spans.append((place, place + 1, kind))
    return spans


def has_spans(tags: Iterable[str]) -> bool:
    """Whether tags mark spans, so that whole spans can be counted.

    >>> has_spans(["O", "B-PER"]), has_spans(["B", "I"]), has_spans(["NOUN", "VERB"])
    (True, True, False)
    """
    known = set(tags)
    begins = any(tag == "B" or tag.startswith("B-") for tag in known)
    return begins and all(SPAN_TAG.fullmatch(tag) for tag in known)


def span_counts(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> tuple[int, int]:
    """Of found and true tags of some sentences: the spans they have in common, and all spans of both.

    Twice the first by the second is the F1 of spans (Tjong Kim Sang 2002), which the CoNLL scorer gives.

    >>> span_counts([(["B-PER", "I-PER", "B-LOC"], ["B-PER", "I-PER", "O"])])
    (1, 3)
    """
    common = total = 0
    for found, true in pairs:
        found_spans, true_spans = set(spans_of(found)), set(spans_of(true))
        common += len(found_spans & true_spans)
        total += len(found_spans) + len(true_spans)
    return common, total
