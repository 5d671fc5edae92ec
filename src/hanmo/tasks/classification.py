"""Classification: the labels of a text, or of two; sentiment, spam, topics, offensiveness, intents.

Letters in names: N records, L labels, B bins of confidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.data.tasks.types import Labelled
from hanmo.language import pick
from hanmo.tasks.base import Form, System, Task
from hanmo.tasks.metric import Floats, Metric, ratio

BINS = 10  # of confidence, for the calibration error
MOST_CONFUSIONS = 20  # labels whose table of confusions is shown


@dataclass(frozen=True)
class Verdict:
    """The labels of a text, and how probable each label is where the system says so."""

    labels: tuple[str, ...]
    probabilities: Mapping[str, float] = field(default_factory=dict)

    @property
    def confidence(self) -> float:
        """The probability of the likeliest label."""
        return max(self.probabilities.values(), default=float("nan"))


class LabelMetric(Metric[Labelled, Verdict]):
    """Accuracy (all labels right), macro F1, with several labels a text also micro F1; and the expected calibration
    error in ten bins (Guo et al. 2017; a record with several labels counts once, by its likeliest).

    Macro F1 is the mean over the labels that the records have, so that one that only the answers have costs precision
    elsewhere but is no label of its own: as scikit-learn's f1_score with ``labels`` those of the truth.
    """

    primary = "accuracy"
    lower = frozenset({"ece"})

    def __init__(self, records: Sequence[Labelled]) -> None:
        self.labels = tuple(sorted({label for record in records for label in record.labels}))
        self.multi_label = any(len(record.labels) != 1 for record in records)
        if self.multi_label:
            self.primary = "micro_f1"

    def statistics(self, records: Sequence[Labelled], answers: Sequence[Verdict]) -> Floats:
        """One, right, labels given, common and true; for each label common, given, true; for each bin of confidence
        count, confidence, right."""
        number = {label: place for place, label in enumerate(self.labels)}
        head_N5, labels_N3L = np.zeros((len(records), 5)), np.zeros((len(records), 3, len(number)))
        bins_N3B = np.zeros((len(records), 3, BINS))
        for row, (record, answer) in enumerate(zip(records, answers, strict=True)):
            true, given = set(record.labels), set(answer.labels)
            head_N5[row] = 1, true == given, len(given), len(true & given), len(true)
            for kind, labels in enumerate((true & given, given, true)):
                for label in labels & number.keys():
                    labels_N3L[row, kind, number[label]] = 1
            if answer.probabilities:
                best = max(answer.probabilities, key=answer.probabilities.__getitem__)
                place = min(BINS - 1, int(answer.confidence * BINS))
                bins_N3B[row, :, place] = 1, answer.confidence, best in true
        parts = (head_N5, labels_N3L.reshape(len(records), -1), bins_N3B.reshape(len(records), -1))
        return np.concatenate(parts, axis=1)

    def parts(self, sums: Floats) -> tuple[Floats, Floats, Floats]:
        """Sums as ``[..., 5]``, ``[..., 3, L]``, ``[..., 3, B]``."""
        cut = 5 + 3 * len(self.labels)
        shape = sums.shape[:-1]
        return sums[..., :5], sums[..., 5:cut].reshape(*shape, 3, -1), sums[..., cut:].reshape(*shape, 3, BINS)

    def measures(self, sums: Floats) -> dict[str, Floats]:
        """Accuracy, macro F1, micro F1 where texts have several labels, ECE where there are probabilities."""
        head, labels, bins = self.parts(sums)
        met = labels[..., 1, :] + labels[..., 2, :]
        values = {
            "accuracy": ratio(head[..., 1], head[..., 0]),
            "macro_f1": ratio(ratio(2 * labels[..., 0, :], met).sum(-1), (met > 0).sum(-1)),
        }
        if self.multi_label:
            values["micro_f1"] = ratio(2 * head[..., 3], head[..., 2] + head[..., 4])
        if np.any(bins):
            values["ece"] = ratio(np.abs(bins[..., 1, :] - bins[..., 2, :]).sum(-1), bins[..., 0, :].sum(-1))
        return values

    def right(self, statistics: Floats) -> NDArray[np.bool_]:
        """Which records were answered right as a whole."""
        right: NDArray[np.bool_] = statistics[:, 1] > 0
        return right

    def signature(self) -> Mapping[str, Any]:
        """Labels and bins."""
        return {"labels": len(self.labels), "ece_bins": BINS}

    def details(self, records: Sequence[Labelled], answers: Sequence[Verdict]) -> dict[str, Any]:
        """Precision, recall and F1 of each label; and where each text has one label, how often which was given for
        which: rows are right labels, columns given ones, the last column others."""
        _, labels_3L, _ = self.parts(self.statistics(records, answers).sum(0))
        precision, recall = ratio(labels_3L[0], labels_3L[1]), ratio(labels_3L[0], labels_3L[2])
        f1, true_L = ratio(2 * labels_3L[0], labels_3L[1] + labels_3L[2]), labels_3L[2]
        table = {
            label: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "n": int(true_L[i]),
            }
            for i, label in enumerate(self.labels)
        }
        details: dict[str, Any] = {"labels": table}
        if not self.multi_label:
            number = {label: place for place, label in enumerate(self.labels)}
            confusion = np.zeros((len(number), len(number) + 1), dtype=int)
            for record, answer in zip(records, answers, strict=True):
                given = answer.labels[0] if len(answer.labels) == 1 else ""
                confusion[number[record.labels[0]], number.get(given, -1)] += 1
            details["confusion"] = confusion.tolist()
        return details


# Ways to answer -------------------------------------------------------------------------------------------------------


class Usual(System[Labelled, Verdict]):
    """The most frequent labels for every text, with the shares of the labels as probabilities."""

    kind, learns = "baseline", True

    def __init__(self) -> None:
        self.name = pick("most frequent label", "最常见标签")
        self.verdict = Verdict(())

    def fit(self, train: Sequence[Labelled], validation: Sequence[Labelled] = ()) -> None:
        """Count."""
        del validation
        single = Counter(label for record in train for label in record.labels)
        usual = Counter(record.labels for record in train).most_common(1)[0][0]
        self.verdict = Verdict(usual, {label: count / len(train) for label, count in single.items()})

    def answer(self, records: Sequence[Labelled]) -> list[Verdict]:
        """The same for all."""
        return [self.verdict] * len(records)


def text_of(record: Labelled) -> str:
    """A text; two stand on lines of their own; of none there is a blank."""
    return (record.text if record.pair is None else f"{record.text}\n{record.pair}") or " "


class Linear(System[Labelled, Verdict]):
    """Logistic regression or support vectors over TF-IDF of words and pieces of words.

    Args:
        given: a trained classifier; without one it is trained by :meth:`fit`.
        settings: for :class:`~hanmo.models.linear.LinearClassifier`.
    """

    kind = "classical"

    def __init__(self, given: Any = None, *, name: str = "", **settings: Any) -> None:
        self.classifier, self.settings, self.learns = given, settings, given is None
        self.name = name or pick("TF-IDF + logistic regression", "TF-IDF + 逻辑回归")
        self.key = "" if given is not None else settings.get("method", "logistic")

    def fit(self, train: Sequence[Labelled], validation: Sequence[Labelled] = ()) -> None:
        """Train; of several labels for a text, with one classifier for each label."""
        from hanmo.models.linear import LinearClassifier

        del validation
        several = any(len(record.labels) != 1 for record in train)
        labels = [record.labels if several else record.labels[0] for record in train]
        self.classifier = LinearClassifier(multi_label=several, **self.settings)
        self.classifier.fit([text_of(record) for record in train], labels)

    def answer(self, records: Sequence[Labelled]) -> list[Verdict]:
        """The likeliest label, or all above one half."""
        rows = self.classifier.predict_proba([text_of(record) for record in records])
        return verdicts(rows, self.classifier.labels, several=self.classifier.config.multi_label)

    def save(self, folder: Path) -> Path:
        """Write the classifier."""
        self.classifier.save(folder)
        return folder


class Network(System[Labelled, Verdict]):
    """A network with a head for classification.

    Args:
        encoder: a :class:`~hanmo.inference.encoder.TextEncoder` whose task that is.
    """

    def __init__(self, encoder: Any) -> None:
        from hanmo.models.recurrent import RecurrentEncoder

        self.encoder, self.name = encoder, encoder.name
        self.kind = "recurrent" if isinstance(encoder.model, RecurrentEncoder) else "encoder"

    def answer(self, records: Sequence[Labelled]) -> list[Verdict]:
        """The likeliest label, or all above one half."""
        texts = [record.text if record.pair is None else (record.text, record.pair) for record in records]
        return verdicts(
            self.encoder.predict_proba(texts), self.encoder.labels, several=self.encoder.model.head.config.multi_label
        )


def verdicts(rows_NL: Floats, labels: Sequence[str], *, several: bool) -> list[Verdict]:
    """Verdicts from probabilities."""
    out = []
    for row_L in np.asarray(rows_NL, dtype=np.float64):
        chosen = [labels[int(i)] for i in np.flatnonzero(row_L >= 0.5)] if several else [labels[int(row_L.argmax())]]
        out.append(Verdict(tuple(chosen), dict(zip(labels, row_L.tolist(), strict=True))))
    return out


class Classification(Task[Labelled, Verdict]):
    """Labels of texts."""

    name, kind, training = "classification", "labelled", "classification"
    aliases = ("sentiment", "spam", "topic", "offensiveness", "intent")
    help = "labels of texts: sentiment, spam, topics, offensiveness, intents"
    help_zh = "文本分类：情感、垃圾信息、主题、冒犯性、意图"
    inputs = ("text", "pair")

    def metric(self, records: Sequence[Labelled]) -> LabelMetric:
        """Accuracy and F1 over the labels of the records."""
        return LabelMetric(records)

    def baselines(self, records: Sequence[Labelled]) -> list[System[Labelled, Verdict]]:
        """The most frequent label; a linear classifier."""
        del records
        return [Usual(), Linear()]

    def candidates(self, records: Sequence[Labelled]) -> list[System[Labelled, Verdict]]:
        """Other linear models; a small recurrent network."""
        from hanmo.tasks.recurrent import RecurrentClassifier

        del records
        return [
            Linear(method="naive-bayes", name=pick("naive Bayes", "朴素贝叶斯")),
            Linear(
                method="nb-logistic",
                features="characters",
                name=pick("logistic regression + naive Bayes", "逻辑回归 + 朴素贝叶斯"),
            ),
            Linear(method="svm", name=pick("TF-IDF + linear SVM", "TF-IDF + 线性 SVM")),
            RecurrentClassifier(),
        ]

    def system(self, model: Any, train: Sequence[Labelled] = (), form: Form | None = None) -> System[Labelled, Verdict]:
        """A linear classifier, a network with a head, or a language model that is asked."""
        from hanmo.inference.encoder import TextEncoder
        from hanmo.models.linear import LinearClassifier
        from hanmo.tasks.prompted_labels import PromptedLabels

        if isinstance(model, LinearClassifier):
            return Linear(model)
        if isinstance(model, TextEncoder):
            if model.task != "sequence-classification":
                raise self.cannot(model)
            return Network(model)
        if hasattr(model, "generate"):
            return PromptedLabels(model, train, form or Form())
        raise self.cannot(model)

    def record(self, text: str) -> Labelled:
        """A text; a tab parts two."""
        first, tab, second = text.partition("\t")
        return Labelled(first, (), second if tab else None)

    def record_from(self, data: Mapping[str, str]) -> Labelled:
        """A text, or two."""
        return Labelled(data["text"], (), data.get("pair"))

    def as_data(self, answer: Verdict) -> dict[str, Any]:
        """Labels and probabilities, the likeliest first."""
        ordered = sorted(answer.probabilities.items(), key=lambda item: -item[1])
        return {"labels": list(answer.labels), "probabilities": dict(ordered)}

    def describe(self, record: Labelled, answer: Verdict) -> str:
        """The labels with their probabilities."""
        del record
        named = [
            f"{label} {answer.probabilities[label]:.3f}" if label in answer.probabilities else label
            for label in answer.labels
        ]
        return ", ".join(named) or pick("no label", "无标签")

    def chance(self, records: Sequence[Labelled]) -> dict[str, float]:
        """Each label equally often."""
        labels = {label for record in records for label in record.labels}
        single = all(len(record.labels) == 1 for record in records)
        return {"accuracy": 1 / len(labels)} if single and labels else {}
