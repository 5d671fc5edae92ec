"""Semantic roles: who does what to whom. The arguments of a predicate that is given.

Learnt as tagging: the predicate is put between two marks, and the tags of the tokens are its arguments. So whatever
learns tags, a conditional random field or a network, learns roles.

Letters in names: N records, L roles.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hanmo.data.tasks.schemes import spans_of
from hanmo.data.tasks.types import Proposition, Tagged
from hanmo.errors import DataError, UsageError
from hanmo.language import pick
from hanmo.models.crf_features import CLOSE, OPEN
from hanmo.tasks.base import Form, System, Task
from hanmo.tasks.metric import Floats, Metric, ratio
from hanmo.tasks.spans import HEAD, Span, span_measures, span_numbers, type_table
from hanmo.tasks.tagging import Field, Network, Tags, span_text
from hanmo.text.normalize import SURROGATE
from hanmo.text.segment import segment

Arguments = tuple[Span, ...]  # first token, end (exclusive), role
NOT_COUNTED = frozenset({"V", "C-V"})  # the predicate itself
BRACKETS = {OPEN: "(", CLOSE: ")"}  # what stands for the marks where a sentence has them itself
MOST, ITERATIONS = 10_000, 80  # what the field learns from and how long: some minutes
RARE = 20  # a role seen fewer times is not learnt by the field: each costs time, and it would not be found
REACH = 3  # words between a predicate and its neighbour, at most
CORE = 3  # roles that the nearest phrases can have
MARKED = re.compile(r"(.*?)\[\s*([^\[\]\s][^\[\]]*?)\s*\](.*)", re.DOTALL)


# Roles as tags --------------------------------------------------------------------------------------------------------


def to_tagged(record: Proposition, known: Collection[str] | None = None) -> Tagged:
    """A proposition as a sentence with a marked predicate, whose tags are the arguments in IOB2.

    Args:
        known: the tags that there are; an argument that needs another is left out. None: all.

    >>> tagged = to_tagged(Proposition(("He", "left", "us"), 1, ((0, 1, "ARG0"), (2, 3, "ARG1"))))
    >>> tagged.tokens, tagged.tags
    (('He', '[', 'left', ']', 'us'), ('B-ARG0', 'O', 'O', 'O', 'B-ARG1'))
    """
    tags = ["O"] * len(record.tokens)
    for start, end, role in record.arguments:
        own = [f"B-{role}", *[f"I-{role}"] * (end - start - 1)]
        if role not in NOT_COUNTED and (known is None or all(tag in known for tag in own)):
            tags[start:end] = own
    words = [BRACKETS.get(token, token) for token in record.tokens]
    at = record.predicate
    tokens = (*words[:at], OPEN, words[at], CLOSE, *words[at + 1 :])
    return Tagged(tokens, (*tags[:at], "O", "O", "O", *tags[at + 1 :]), file=record.file, line=record.line)


def from_tags(record: Proposition, tags: Sequence[str]) -> Arguments:
    """The arguments that the tags of a marked sentence say; none reaches over the predicate.

    >>> from_tags(Proposition(("He", "left", "us"), 1), ("B-ARG0", "O", "O", "O", "I-ARG1"))
    ((0, 1, 'ARG0'), (2, 3, 'ARG1'))
    """
    at = record.predicate
    plain = (*tags[:at], "O", *tags[at + 3 :])
    return tuple(span for span in spans_of(plain) if span[2] not in NOT_COUNTED)


def tags_of(records: Iterable[Proposition], least: int = 1) -> set[str]:
    """The tags of all roles that occur so often at least."""
    records = list(records)
    counts = Counter(role for record in records for _, _, role in record.arguments)
    found = {tag for record in records for tag in to_tagged(record).tags}
    return {tag for tag in found if tag == "O" or counts[tag[2:]] >= least}


class RoleMetric(Metric[Proposition, Arguments]):
    """Precision, recall and F1 of arguments: right are the predicate, the role, the first and the last token; and the
    share of the predicates all of whose arguments are right.

    As in CoNLL-2005 and 2012 the predicate itself (V, C-V) is not counted; references (R-ARG0) are. A continuation
    (C-ARG1) is an argument of its own here, as in most papers; the scorer of 2005 joins it to what it continues.
    """

    primary = "f1"

    def __init__(self, records: Sequence[Proposition]) -> None:
        self.roles = tuple(sorted({role for record in records for _, _, role in counted(record.arguments)}))

    def statistics(self, records: Sequence[Proposition], answers: Sequence[Arguments]) -> Floats:
        """One, all right; then what :func:`~hanmo.tasks.spans.span_numbers` counts, ``[N, 5 + 3 L]``."""
        true = [counted(record.arguments) for record in records]
        found = [counted(answer) for answer in answers]
        whole = [(1.0, float(right == given)) for right, given in zip(true, found, strict=True)]
        return np.concatenate([np.array(whole).reshape(-1, 2), span_numbers(true, found, self.roles)], axis=1)

    def measures(self, sums: Floats) -> dict[str, Floats]:
        """Precision, recall, F1, and the share of predicates answered without a mistake."""
        return {**span_measures(sums[..., 2:]), "exact": ratio(sums[..., 1], sums[..., 0])}

    def signature(self) -> Mapping[str, Any]:
        """What is counted."""
        return {"counted": "no V, with R- and C-", "roles": len(self.roles)}

    def details(self, records: Sequence[Proposition], answers: Sequence[Arguments]) -> dict[str, Any]:
        """Precision, recall and F1 of each role."""
        sums = self.statistics(records, answers).sum(0)
        return {"roles": type_table(sums[2 + HEAD :], self.roles)}


def counted(arguments: Iterable[Span]) -> set[Span]:
    """The arguments that are measured."""
    return {span for span in arguments if span[2] not in NOT_COUNTED}


# Ways to answer -------------------------------------------------------------------------------------------------------


class Adjacent(System[Proposition, Arguments]):
    """The nearest phrase before a predicate and the nearest after it, with the usual roles of that side.

    What a phrase is, counts tell: going away from the predicate, is this word mostly the first of an argument, and does
    an argument mostly go on with this word? Only the three most frequent roles are looked at. The role of a phrase is
    the most frequent of them that the predicate has on that side.
    """

    kind, learns = "baseline", True

    def __init__(self) -> None:
        self.name = pick("nearest phrases", "最近短语")
        self.likely: dict[tuple[str, int, str], bool] = {}  # "begins" or "goes on", side, word
        self.roles: dict[tuple[int, str], str] = {}  # side, predicate

    def fit(self, train: Sequence[Proposition], validation: Sequence[Proposition] = ()) -> None:
        """Count.

        Raises:
            DataError: there are no records.
        """
        del validation
        if not train:
            raise DataError(
                "there are no predicates to learn from",
                fix="give training data with --train",
                zh="没有可供训练的谓词；请用 --train 给出训练数据",
            )
        frequent = Counter(role for record in train for _, _, role in counted(record.arguments)).most_common(CORE)
        core, votes = {role for role, _ in frequent}, Counter[tuple[str, int, str]]()
        roles: dict[tuple[int, str], Counter[str]] = {}
        for record in train:
            words = lowered(record)
            spans = [span for span in record.arguments if span[2] in core]
            for side in (-1, 1):
                self.vote(record, words, spans, side, votes)
            for start, _, role in spans:
                for verb in ("", words[record.predicate]):
                    roles.setdefault((-1 if start < record.predicate else 1, verb), Counter())[role] += 1
        self.likely = {key: count > 0 for key, count in votes.items()}
        self.roles = {key: counts.most_common(1)[0][0] for key, counts in roles.items()}

    def vote(
        self, record: Proposition, words: Sequence[str], spans: Sequence[Span], side: int, votes: Counter[Any]
    ) -> None:
        """What the nearest argument on one side says of its words, and of those before and behind it."""
        owner = {place: span for span in spans for place in range(span[0], span[1])}
        within = None
        for place in outward(record, side):
            if within is None:
                within = owner.get(place)
                votes["begins", side, words[place]] += 1 if within else -1
            else:
                votes["goes on", side, words[place]] += 1 if owner.get(place) == within else -1
                if owner.get(place) != within:
                    return

    def answer(self, records: Sequence[Proposition]) -> list[Arguments]:
        """One phrase on each side, where there is one."""
        return [
            tuple(span for side in (-1, 1) for span in self.nearest(record, lowered(record), side))
            for record in records
        ]

    def nearest(self, record: Proposition, words: Sequence[str], side: int) -> list[Span]:
        """The phrase on one side, if there is one."""
        run: list[int] = []
        for place in outward(record, side):  # unknown words are mostly names and nouns
            if self.likely.get(("goes on" if run else "begins", side, words[place]), True):
                run.append(place)
            elif run or abs(place - record.predicate) > REACH:
                break
        role = self.roles.get((side, words[record.predicate]), self.roles.get((side, ""), ""))
        return [(min(run), max(run) + 1, role)] if run and role else []


def outward(record: Proposition, side: int) -> range:
    """The places on one side of a predicate, the nearest first."""
    return range(record.predicate + side, len(record.tokens) if side > 0 else -1, side)


def lowered(record: Proposition) -> list[str]:
    """The words, small."""
    return [token.lower() for token in record.tokens]


class OverTags(System[Proposition, Arguments]):
    """What tags sentences, for sentences with a marked predicate.

    Args:
        inner: a conditional random field or a network.
        most: records that it learns from; of more, so many are taken evenly.
    """

    def __init__(self, inner: System[Tagged, Tags], most: int | None = None) -> None:
        self.most = most
        self.inner, self.name, self.kind, self.learns = inner, inner.name, inner.kind, inner.learns
        self.key = inner.key.partition("-")[0]

    def fit(self, train: Sequence[Proposition], validation: Sequence[Proposition] = ()) -> None:
        """Learn the roles that are not rare, or all where every role is."""
        if self.most is not None and len(train) > self.most:
            train = [train[place * len(train) // self.most] for place in range(self.most)]
        known = tags_of(train, RARE)
        known = known if len(known) > 1 else tags_of(train)
        self.inner.fit([to_tagged(record, known) for record in train], [to_tagged(r, known) for r in validation])

    def answer(self, records: Sequence[Proposition]) -> list[Arguments]:
        """The arguments that the tags say."""
        found = self.inner.answer([to_tagged(record) for record in records])
        return [from_tags(record, tags) for record, tags in zip(records, found, strict=True)]

    def save(self, folder: Path) -> Path | None:
        """Write what tags."""
        return self.inner.save(folder)

    def signature(self) -> Mapping[str, Any]:
        """That of what tags."""
        return self.inner.signature()


class SemanticRoles(Task[Proposition, Arguments]):
    """The arguments of predicates."""

    name, kind, training = "semantic-roles", "roles", "semantic-roles"
    aliases = ("srl",)
    help = "semantic roles: who does what to whom; the arguments of a predicate"
    help_zh = "语义角色标注：谁对谁做了什么，即谓词的论元"

    def metric(self, records: Sequence[Proposition]) -> RoleMetric:
        """Spans with their roles."""
        return RoleMetric(records)

    def baselines(self, records: Sequence[Proposition]) -> list[System[Proposition, Arguments]]:
        """The nearest phrases."""
        del records
        return [Adjacent()]

    def candidates(self, records: Sequence[Proposition]) -> list[System[Proposition, Arguments]]:
        """A conditional random field whose features know the predicate."""
        del records
        return [OverTags(Field(template="roles", max_iterations=ITERATIONS), MOST)]

    def system(
        self, model: Any, train: Sequence[Proposition] = (), form: Form | None = None
    ) -> System[Proposition, Arguments]:
        """A tagger or a network that was trained on marked predicates."""
        from hanmo.inference.encoder import TextEncoder
        from hanmo.models.crf_tagger import CRFTagger

        del train, form
        if isinstance(model, CRFTagger) and model.template == "roles":
            return OverTags(Field(model))
        if isinstance(model, TextEncoder) and model.task == "token-classification":
            return OverTags(Network(model))
        raise self.cannot(model)

    def record(self, text: str) -> Proposition:
        """A sentence whose predicate stands in brackets: ``She [sold] the car.``

        Raises:
            UsageError: no word stands in brackets.
        """
        found = MARKED.fullmatch(SURROGATE.sub("\ufffd", text))
        if found is None:
            raise UsageError(
                "it is not said which word is the predicate",
                why="roles are those of one predicate",
                fix="put it in brackets: 'She [sold] the car.'",
                zh="没有指明谓词；请用方括号标出，例如“她[卖掉]了车。”",
            )
        before, predicate, after = found.groups()
        first, second = segment(before), segment(after)
        return Proposition((*first, " ".join(predicate.split()), *second), len(first))

    def as_data(self, answer: Arguments) -> dict[str, Any]:
        """The arguments: first token, end (exclusive), role."""
        return {"arguments": [{"start": start, "end": end, "role": role} for start, end, role in answer]}

    def describe(self, record: Proposition, answer: Arguments) -> str:
        """The predicate and its arguments in the order of the sentence, one a line."""
        sentence, at = Tagged(record.tokens, ()), record.predicate
        spans = sorted([*answer, (at, at + 1, "V")])
        return "\n".join(f"{role}: {span_text(sentence, start, end)}" for start, end, role in spans)
