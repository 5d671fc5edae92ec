"""Estimators in the manner of scikit-learn, for notebooks: pipelines, cross-validation and grid search work on them.

>>> from hanmo import TextClassifier
>>> texts = ["a good film", "so good", "good fun", "a bad film", "so bad", "bad luck"]
>>> classifier = TextClassifier(C=1.0).fit(texts, ["+", "+", "+", "-", "-", "-"])
>>> classifier.predict(["good luck, good film", "a bad idea"]).tolist()
['+', '-']
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.data.tasks.types import Labelled
from hanmo.errors import UsageError, missing_package
from hanmo.language import pick
from hanmo.tasks.base import Form
from hanmo.tasks.classification import Classification, Linear

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
except ImportError:
    raise missing_package("scikit-learn", "classical", pick("TextClassifier", "使用 TextClassifier")) from None


class TextClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier of texts: linear, a fine-tuned network, or a language model that is asked.

    Args:
        base: None for a linear classifier; the name or folder of a transformer, which is fine-tuned; or
            ``"prompt:MODEL"`` for a language model that is shown some of the training texts.
        method: of a linear classifier: ``"logistic"``, ``"svm"``, ``"naive-bayes"`` or ``"nb-logistic"``.
        C: its inverse penalty; None: found by cross-validation.
        budget: time for fine-tuning, e.g. ``"2min"``; ``epochs`` instead makes it repeatable.
        shots: texts that a prompt shows.
        out: where the run of a fine-tuning is kept; None: nowhere.
        seed: of everything random.

    Attributes:
        classes_: the labels, in the order of the columns of :meth:`predict_proba`.
        system_: what answers (:class:`hanmo.tasks.base.System`).
    """

    def __init__(
        self,
        base: str | None = None,
        *,
        method: str = "logistic",
        C: float | None = None,
        budget: str = "2min",
        epochs: float | None = None,
        shots: int = 8,
        out: str | None = None,
        seed: int = 0,
    ) -> None:
        self.base, self.method, self.C, self.budget, self.epochs = base, method, C, budget, epochs
        self.shots, self.out, self.seed = shots, out, seed

    def fit(self, X: Sequence[str], y: Sequence[Any]) -> TextClassifier:
        """Learn from texts and their labels; labels of any type, which :meth:`predict` gives back.

        Raises:
            UsageError: not as many labels as texts.
            DataError: they cannot be learned from, for example because all labels are the same.
        """
        texts, labels = list(X), np.asarray(y)
        if len(texts) != len(labels):
            raise UsageError(
                f"{len(texts)} texts and {len(labels)} labels",
                zh=f"文本 {len(texts)} 条，标签 {len(labels)} 个，数目不等",
            )
        self.classes_, places = np.unique(labels, return_inverse=True)
        names = [str(label) for label in self.classes_.tolist()]
        if len(set(names)) < len(names):
            raise UsageError("two labels look the same as text", zh="有两个标签转成文本后相同")
        self.names_ = names
        records = [
            Labelled(text, (names[place],), file="X", line=number)
            for number, (text, place) in enumerate(zip(texts, places.tolist(), strict=True), 1)
        ]
        self.system_: Any
        if self.base is None:
            self.system_ = Linear(method=self.method, C=self.C, seed=self.seed)
            self.system_.fit(records)
        elif self.base.startswith("prompt:"):
            from hanmo.inference.loading import load

            model = load(self.base.removeprefix("prompt:"))
            self.system_ = Classification().system(model, records, Form(min(self.shots, len(records)), self.seed))
        else:
            self.system_ = self.fine_tuned(records)
        return self

    def fine_tuned(self, records: Sequence[Labelled]) -> Any:
        """The base with a head that has learned the records."""
        from hanmo.cli.finetune import FinetuneSettings, run
        from hanmo.inference.loading import load

        with tempfile.TemporaryDirectory(prefix="hanmo-classifier-") as folder:
            data = Path(folder, "train.jsonl")
            rows = ({"text": record.text, "label": record.labels[0]} for record in records)
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            settings = FinetuneSettings(
                paths=[str(data)],
                task="classification",
                base=self.base or "",
                out=self.out or str(Path(folder, "run")),
                overwrite=self.out is None,
                baseline=False,
                truncate=True,
                seed=self.seed,
                budget=None if self.epochs is not None else self.budget,
                epochs=self.epochs,
            )
            model = load(run(settings).data["model"])
            return Classification().system(model)

    def predict_proba(self, X: Sequence[str]) -> NDArray[np.float64]:
        """The probability of each label, ``[N, L]``, in the order of ``classes_``."""
        verdicts = self.system_.answer([Labelled(text, ()) for text in X])
        rows = [[verdict.probabilities.get(name, 0.0) for name in self.names_] for verdict in verdicts]
        return np.array(rows, dtype=np.float64).reshape(len(verdicts), len(self.names_))

    def predict(self, X: Sequence[str]) -> NDArray[Any]:
        """The label of each text."""
        verdicts = self.system_.answer([Labelled(text, ()) for text in X])
        places = [self.names_.index(verdict.labels[0]) if verdict.labels else 0 for verdict in verdicts]
        labels: NDArray[Any] = self.classes_[places]
        return labels
