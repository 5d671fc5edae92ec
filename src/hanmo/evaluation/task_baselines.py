"""What a fine-tuned network has to beat: simple answers and classical models, measured on the same held-out records.

A score means little by itself: where 87 of 100 messages are no spam, 0.87 is what a model reaches that never looks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hanmo.data.tasks.types import Labelled, Tagged
from hanmo.errors import ResourceError
from hanmo.language import pick
from hanmo.progress import display_width, human_time

MOST_RECORDS = 20_000  # that a classical model learns from; of more, so many are taken evenly
MOST_SENTENCES = 4_000
CRF_ITERATIONS = 40  # where the classical tagger has reached most of what it reaches


@dataclass(frozen=True)
class Score:
    """A way to answer, and what it reaches.

    Args:
        name: for people, in their language.
        measures: by the names that the objective of the network gives them.
        seconds: to learn and to answer.
    """

    name: str
    measures: dict[str, float]
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json`` and the run's folder."""
        return asdict(self)


def classification_scores(train: Sequence[Labelled], validation: Sequence[Labelled], multi_label: bool) -> list[Score]:
    """The most frequent labels for every text; a linear classifier of pieces of words (n-grams of characters)."""
    from hanmo.models.linear import LinearClassifier

    usual = Counter(record.labels for record in train).most_common(1)[0][0]
    name = ", ".join(usual) or pick("no label", "无标签")
    scores = [Score(pick(f"always '{name}'", f"总答“{name}”"), accuracy([usual] * len(validation), validation))]

    def linear() -> dict[str, float]:
        chosen = evenly(train, MOST_RECORDS)
        labels = [record.labels if multi_label else record.labels[0] for record in chosen]
        classifier = LinearClassifier(features="characters", calibration="none", multi_label=multi_label)
        classifier.fit(list(map(text_of, chosen)), labels)
        found = classifier.predict(list(map(text_of, validation)))
        return accuracy([tuple(item) if multi_label else (item,) for item in found], validation)

    return [*scores, *timed(pick("linear classifier", "线性分类器"), linear)]


def text_of(record: Labelled) -> str:
    """A text; two stand on lines of their own."""
    return (record.text if record.pair is None else f"{record.text}\n{record.pair}") or " "


def accuracy(found: Sequence[tuple[str, ...]], records: Sequence[Labelled]) -> dict[str, float]:
    """The share of the texts with exactly the right labels; with several a text, the micro F1 of all labels."""
    right = sum(set(labels) == set(record.labels) for labels, record in zip(found, records, strict=True))
    measures = {"accuracy": right / max(1, len(records))}
    if any(len(record.labels) != 1 for record in records):
        common = sum(len(set(labels) & set(record.labels)) for labels, record in zip(found, records, strict=True))
        total = sum(len(set(labels)) + len(set(record.labels)) for labels, record in zip(found, records, strict=True))
        measures["micro_f1"] = 2 * common / max(1, total)
    return measures


def tagging_scores(
    train: Sequence[Tagged], validation: Sequence[Tagged], *, template: str | None = None
) -> list[Score]:
    """The most frequent tag of each word, whatever stands round it; a conditional random field (Lafferty 2001).

    Args:
        template: the features of the field; None: those that fit the tokens.
    """
    from hanmo.tasks.tagging import Field, UsualTag, with_tokens

    chosen, usual = with_tokens(train), UsualTag()
    given: dict[str, Any] = {} if template is None else {"template": template}
    field = Field(max_iterations=CRF_ITERATIONS, **given)
    usual.fit(chosen)
    scores = [Score(usual.name, tag_measures(usual.answer(validation), validation))]

    def learnt() -> dict[str, float]:
        field.fit(evenly(chosen, MOST_SENTENCES))
        return tag_measures(field.answer(validation), validation)

    return [*scores, *timed(field.name, learnt)]


def tag_measures(found: Sequence[tuple[str, ...]], records: Sequence[Tagged]) -> dict[str, float]:
    """The share of words with the right tag; for tags of spans, the F1 of whole spans (Tjong Kim Sang 2002)."""
    from hanmo.tasks.tagging import TagMetric

    metric = TagMetric(records)
    measures = metric.measures(metric.statistics(records, found).sum(axis=0))
    return {name: float(measures[name]) for name in ("accuracy", "f1") if name in measures}


def evenly(records: Sequence[Any], most: int) -> list[Any]:
    """At most so many records, evenly from first to last."""
    step = max(1.0, len(records) / most)
    return [records[int(place * step)] for place in range(min(most, len(records)))]


def timed(name: str, measure: Callable[[], dict[str, float]]) -> list[Score]:
    """A score, unless the package that it needs is not installed."""
    began = time.monotonic()
    try:
        measures = measure()
    except ResourceError:
        return []
    return [Score(name, measures, time.monotonic() - began)]


def describe_scores(scores: Sequence[Score]) -> str:
    """A table for people: a line for each way to answer, a column for each measure."""
    names = list(dict.fromkeys(name for score in scores for name in score.measures))
    width = max(display_width(score.name) for score in scores)
    lines = []
    for score in scores:
        cells = "".join(
            f"  {name} {score.measures[name]:.4f}" if name in score.measures else " " * (len(name) + 9)
            for name in names
        )
        took = f"  ({human_time(score.seconds)})" if score.seconds >= 1 else ""
        lines.append(f"  {score.name}{' ' * (width - display_width(score.name))}{cells}{took}".rstrip())
    return "\n".join(lines)


def verdict(scores: Sequence[Score], own: Mapping[str, float], *, of_base: bool) -> str:
    """Say it where the network is not better than what it is compared with; empty where it is.

    Args:
        own: the measures of the network; F1 counts before accuracy, and that before the loss.
        of_base: the scores are those of the base before its training.
    """
    for name, sign in (("f1", 1), ("micro_f1", 1), ("accuracy", 1), ("loss", -1)):
        rivals = [score for score in scores if name in score.measures]
        if name not in own or not rivals:
            continue
        best = max(rivals, key=lambda score: sign * score.measures[name])
        theirs = best.measures[name]
        if sign * theirs < sign * own[name]:
            return ""
        if of_base:
            return pick(
                f"the base was as good before (its {name}: {theirs:.4f}): the learning rate may be too high, or the "
                "data too few or unlike the validation data",
                f"训练前的基础模型已不差于此（{name} {theirs:.4f}）：学习率可能过高，或数据太少、与验证数据不一致",
            )
        return pick(
            f"'{best.name}' is as good or better (its {name}: {theirs:.4f}): train longer, take more data or a base "
            "that knows the language better, or be content with it",
            f"“{best.name}”不差于本模型（{name} {theirs:.4f}）："
            "可延长训练、增加数据、换用更懂该语言的基础模型，或直接用它",
        )
    return ""


def read_scores(values: Sequence[Mapping[str, Any]]) -> list[Score]:
    """The scores that :meth:`Score.as_dict` wrote."""
    return [Score(value["name"], dict(value["measures"]), value["seconds"]) for value in values]
