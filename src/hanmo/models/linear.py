"""Linear text classifiers over word and character n-grams: logistic regression, support vectors, naive Bayes.

All end as one weight for each feature and label, so one class trains, calibrates, explains and saves them:

- **logistic**: multinomial logistic regression with an L2 penalty (L-BFGS).
- **svm**: linear support vectors with squared hinge loss, one against the rest (Fan et al., "LIBLINEAR", 2008).
- **naive-bayes**: multinomial with additive smoothing over what is there or not (Wang and Manning 2012).
- **nb-logistic**: logistic regression and complement naive Bayes (Rennie et al. 2003) added up: one classifier again.

scikit-learn does the training. A saved model needs only numpy (and jieba for Chinese words) and holds JSON and
safetensors. Probabilities are calibrated on scores from cross-validation (``calibration.py``).

Letters in names: N texts, F features, L labels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hanmo.errors import DataError, ModelError, UsageError, missing_package, nearest
from hanmo.folder import atomic_folder, fsync_path, read_json, verify, write_json
from hanmo.language import pick
from hanmo.models.calibration import Calibration
from hanmo.models.linear_features import FeatureConfig, Vectorizer
from hanmo.models.linear_training import (
    FOLDS,
    LinearConfig,
    accuracy,
    assign_folds,
    calibration_error,
    held_out_scores,
    text_weights,
    train_weights,
)
from hanmo.progress import Progress
from hanmo.text.normalize import SURROGATE

Floats = NDArray[np.float64]

CONFIG, VOCABULARY, WEIGHTS = "config.json", "vocabulary.json", "model.safetensors"
C_GRID = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Contribution(NamedTuple):
    """What one feature of a text added to the score of a label, beyond the mean of all labels."""

    feature: str
    kind: str  # "word" or "character"
    value: float


class LinearClassifier:
    """A text classifier that trains in seconds and says why.

    Args:
        method: ``"logistic"``, ``"svm"``, ``"naive-bayes"``, or ``"nb-logistic"`` (the sum of the first and the third).
        features: ``"words"``, ``"characters"`` or ``"both"``; see :class:`~hanmo.models.linear_features.FeatureConfig`
            for it and for ``word_ngrams``, ``character_ngrams``, ``min_count`` and ``language``.
        stop_words: words to leave out, such as ``hanmo.text.segment.stop_words("zh")``.
        others: the fields of :class:`~hanmo.models.linear_training.LinearConfig`.

    Attributes:
        labels: in the order of the columns of :meth:`predict_proba`.
        report: what training chose and why, and the calibration error in cross-validation, before and after.

    >>> texts = ["a good film", "so good", "good fun", "a bad film", "so bad", "bad luck"]
    >>> classifier = LinearClassifier(features="words").fit(texts, ["+", "+", "+", "-", "-", "-"])
    >>> classifier.predict(["good film", "bad fun"]), classifier.explain("good film")[0].feature
    (['+', '-'], 'good')
    """

    def __init__(
        self,
        method: str = "logistic",
        features: str = "both",
        *,
        word_ngrams: tuple[int, int] = (1, 2),
        character_ngrams: tuple[int, int] | None = None,
        min_count: int = 2,
        stop_words: Collection[str] = (),
        language: str | None = None,
        **others: Any,
    ) -> None:
        try:
            self.config = LinearConfig(method, **others)
        except TypeError:
            unknown = sorted(set(others) - set(LinearConfig.__dataclass_fields__))
            raise UsageError(
                f"unknown setting {', '.join(unknown)}",
                fix=nearest(unknown[0], LinearConfig.__dataclass_fields__),
                zh="未知的设置：" + "、".join(unknown),
            ) from None
        self.feature_config = FeatureConfig(
            features,
            word_ngrams,
            character_ngrams,
            min_count,
            tuple(sorted(stop_words)),
            language,
            binary=method == "naive-bayes",
        )
        self.labels: tuple[str, ...] = ()
        self.report: dict[str, Any] = {}
        self.vectorizer: Vectorizer
        self.weights: NDArray[np.float32]  # [F, L]
        self.bias: Floats  # [L]
        self.calibration: Calibration

    def fit(self, texts: Sequence[str], labels: Sequence[Any], *, progress: bool = False) -> LinearClassifier:
        """Learn from labelled texts; the same texts in the same order give the same model.

        Args:
            texts: any number, none of them empty.
            labels: one string for each text; with ``multi_label`` a collection of strings, which may be empty.
            progress: show the rounds of training.

        Raises:
            DataError: texts and labels that cannot be learned from; the message names the record.
            ResourceError: the package ``scikit-learn`` (or ``jieba``, for Chinese words) is not installed.
        """
        try:
            import sklearn  # noqa: F401
        except ImportError:
            raise missing_package(
                "scikit-learn", "classical", pick("training a linear classifier", "训练线性分类器")
            ) from None
        self.labels = check_records(texts, labels, self.config.multi_label)
        numbers = {label: number for number, label in enumerate(self.labels)}
        targets_NL = np.zeros((len(texts), len(self.labels)))
        for record, given in enumerate(labels):
            for label in given if self.config.multi_label else [given]:
                targets_NL[record, numbers[label]] = 1
        self.vectorizer = Vectorizer.fit(texts, self.feature_config)
        counts_NF = self.vectorizer.counts(texts)
        self.report = {"texts": len(texts), "features": len(self.vectorizer.names)}
        C, held_out_NL = self.cross_validate(counts_NF, targets_NL, progress)
        weights_FL, self.bias = train_weights(self.vectorizer.weigh(counts_NF), targets_NL, self.config, C)
        self.weights = weights_FL.astype(np.float32)
        self.calibrate(held_out_NL, targets_NL)
        return self

    def cross_validate(self, counts_NF: Any, targets_NL: Floats, progress: bool) -> tuple[float, Floats | None]:
        """The penalty to use and the scores of each text by a model that had not seen it (None if not needed)."""
        config = self.config
        grid = C_GRID if config.C is None and config.method != "naive-bayes" else (config.C or 1.0,)
        if len(grid) == 1 and config.calibration == "none":
            return grid[0], None
        bar = Progress("classifier", len(grid) * FOLDS, "fits") if progress else None

        def after_fold() -> None:
            if bar:
                bar.update(bar.done + 1)

        vectorizer = self.vectorizer
        scores = {C: held_out_scores(vectorizer, counts_NF, targets_NL, config, C, after_fold) for C in grid}
        if bar:
            bar.close()
        accuracies = {C: accuracy(scores_NL, targets_NL, config) for C, scores_NL in scores.items()}
        best = max(grid, key=lambda C: accuracies[C])  # of equals the first, which has the strongest penalty
        self.report["held_out_accuracy"] = round(accuracies[best], 4)
        if len(grid) > 1:
            kind = "balanced accuracy" if config.balanced else "accuracy"
            measured = ", ".join(f"{C:g}: {share:.4f}" for C, share in accuracies.items())
            self.report["C"] = best
            self.report["why"] = f"C={best:g} has the best {kind} in {FOLDS}-fold cross-validation ({measured})"
        return best, scores[best]

    def calibrate(self, held_out_NL: Floats | None, targets_NL: Floats) -> None:
        """Fit the map from scores to probabilities on the held-out scores and report its calibration error."""
        config = self.config
        raw = self.calibration = Calibration("none", config.multi_label)
        if held_out_NL is None or config.calibration == "none":
            return
        scored = np.isfinite(held_out_NL).all(1)
        scores_NL, known_NL = held_out_NL[scored], targets_NL[scored]
        if len(scores_NL) < 2 * len(self.labels):
            self.report["calibration"] = "none: too few texts with held-out scores"
            return
        weights_N = text_weights(known_NL, config)

        def fitted(chosen: Any) -> Calibration:
            given = scores_NL[chosen], known_NL[chosen], weights_N[chosen]
            return Calibration.fit(config.calibration, *given, config.multi_label)

        self.calibration = fitted(slice(None))
        after_NL = np.empty_like(scores_NL)
        halves_N = assign_folds(known_NL, config) % 2
        for half in (0, 1):  # a map is judged on texts that it was not fitted on
            after_NL[halves_N == half] = fitted(halves_N != half).apply(scores_NL[halves_N == half])
        for name, probabilities_NL in (("ece_before", raw.apply(scores_NL)), ("ece_after", after_NL)):
            self.report[name] = round(calibration_error(probabilities_NL, known_NL, config), 4)

    def scores(self, texts: Sequence[str]) -> Floats:
        """Uncalibrated scores [N, L] of texts.

        Raises:
            ModelError: the classifier has not been trained.
        """
        self.check_trained()
        if isinstance(texts, str):
            raise UsageError(
                "give a list of texts, not one string", fix="[text]", zh="请传入文本列表，而不是单个字符串"
            )
        scores_NL = np.empty((len(texts), len(self.labels)))
        for row, text in enumerate(texts):
            features, values = self.vectorizer.vector(text)
            # a sum over rows and no matrix product: the same bits whatever else is in the batch
            scores_NL[row] = (values[:, None] * self.weights[features]).sum(0) + self.bias
        return scores_NL

    def predict_proba(self, texts: Sequence[str]) -> Floats:
        """Calibrated probabilities [N, L] in the order of ``labels``; rows sum to one unless ``multi_label``.

        A text without any known feature, such as the empty one, gets what the labels' shares in training say.
        """
        scores_NL = self.scores(texts)
        return self.calibration.apply(scores_NL)

    def predict(self, texts: Sequence[str]) -> list[Any]:
        """The most probable label of each text; with ``multi_label`` the list of labels of probability 0.5 or more."""
        probabilities_NL = self.predict_proba(texts)
        if self.config.multi_label:
            return [[self.labels[label] for label in np.flatnonzero(row >= 0.5)] for row in probabilities_NL]
        return [self.labels[label] for label in probabilities_NL.argmax(1)]

    def explain(self, text: str, label: str | None = None, top: int = 10) -> list[Contribution]:
        """The features of a text that spoke most for a label (the most probable one if None), strongest first.

        Raises:
            ModelError: the classifier has not been trained.
            UsageError: an unknown label.
        """
        column = int(self.predict_proba([text])[0].argmax()) if label is None else self.column(label)
        features, values = self.vectorizer.vector(text)
        weights = self.weights[features].astype(np.float64)
        middle = 0.0 if self.config.multi_label else weights.mean(1)
        shares = values * (weights[:, column] - middle)
        order = [place for place in np.argsort(-shares, kind="stable")[:top] if shares[place] > 0]
        names = [self.vectorizer.names[row] for row in features[order]]
        kinds = {"w": "word", "c": "character"}
        return [
            Contribution(name[2:], kinds[name[0]], float(shares[place]))
            for name, place in zip(names, order, strict=True)
        ]

    def column(self, label: str) -> int:
        """The column of a label.

        Raises:
            UsageError: there is no such label.
        """
        self.check_trained()
        if label not in self.labels:
            raise UsageError(
                f"unknown label {label!r}", where="label", fix=nearest(label, self.labels), zh=f"没有标签 {label!r}"
            )
        return self.labels.index(label)

    def check_trained(self) -> None:
        """Refuse to answer before training.

        Raises:
            ModelError: the classifier has not been trained.
        """
        if not self.labels or not hasattr(self, "weights"):
            raise ModelError(
                "the classifier has not been trained",
                fix="call fit(texts, labels) first",
                zh="分类器尚未训练，请先调用 fit",
            )

    def describe(self) -> dict[str, Any]:
        """Kind, method, labels, features, and the report of the training."""
        return {
            "kind": "linear",
            "method": self.config.method,
            "labels": list(self.labels),
            "training": asdict(self.config),
            "features": asdict(self.vectorizer.config if self.labels else self.feature_config),
            "report": dict(self.report),
        }

    def save(self, folder: str | Path) -> None:
        """Write the model folder, whole or not at all.

        Raises:
            ModelError: the classifier has not been trained.
            ResourceError: the disk is full or cannot be written.
        """
        self.check_trained()
        config = {"model_type": "linear", **self.describe()}
        del config["kind"], config["method"]
        tensors = {"weights": self.weights, "bias": self.bias, "idf": self.vectorizer.idf}
        tensors |= {f"calibration.{name}": array for name, array in self.calibration.tensors.items()}
        with atomic_folder(folder, {"kind": "linear"}) as temporary:
            write_json(temporary / CONFIG, {**config, "calibration": self.calibration.method})
            write_json(temporary / VOCABULARY, self.vectorizer.names)
            save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, temporary / WEIGHTS)
            fsync_path(temporary / WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> LinearClassifier:
        """Read a model folder, without scikit-learn; the probabilities are those of the saved model, bit for bit.

        Raises:
            ModelError: a file is missing, truncated, altered, or not what :meth:`save` writes.
        """
        folder = Path(folder)
        verify(folder)
        config, names = read_json(folder / CONFIG), read_json(folder / VOCABULARY)
        if not isinstance(config, dict) or config.get("model_type") != "linear":
            raise unsound(folder / CONFIG, "it does not describe a linear classifier")
        labels = check_names(config.get("labels"), folder / CONFIG)
        names = check_names(names, folder / VOCABULARY)
        model = cls()
        try:
            model.config = LinearConfig(**config["training"])
            model.feature_config = FeatureConfig.from_dict(config["features"])
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise unsound(folder / CONFIG, f"its settings are not known here ({error})") from None
        try:
            tensors = load_file(folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise unsound(folder / WEIGHTS, str(error)) from None
        expected = {
            "weights": (np.float32, (len(names), len(labels))),
            "bias": (np.float64, (len(labels),)),
            "idf": (np.float64, (len(names),)),
        }
        for name, (dtype, shape) in expected.items():
            array = tensors.get(name, np.zeros(0))
            if array.dtype != dtype or array.shape != shape or not np.isfinite(array).all():
                raise unsound(folder / WEIGHTS, f"{name} is not a finite tensor of shape {list(shape)}")
        maps = {key.removeprefix("calibration."): array for key, array in tensors.items() if key not in expected}
        model.calibration = Calibration(str(config.get("calibration")), model.config.multi_label, maps)
        if not model.calibration.is_sound(len(labels)):
            raise unsound(folder / WEIGHTS, "the calibration does not fit the labels")
        model.labels = tuple(labels)
        model.vectorizer = Vectorizer(model.feature_config, names, tensors["idf"])
        model.weights, model.bias = tensors["weights"], tensors["bias"]
        model.report = config["report"] if isinstance(config.get("report"), dict) else {}
        return model


def check_records(texts: Sequence[str], labels: Sequence[Any], multi_label: bool) -> tuple[str, ...]:
    """The labels that occur, sorted.

    Raises:
        DataError: not as many labels as texts, an empty text, a label that is no string, or fewer than two labels.
    """
    if len(texts) != len(labels):
        raise DataError(
            f"{len(texts)} texts and {len(labels)} labels", zh=f"文本数（{len(texts)}）与标签数（{len(labels)}）不一致"
        )
    known: set[str] = set()
    for record, (text, given) in enumerate(zip(texts, labels, strict=True), start=1):
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                "the text is empty", where=f"record {record}", fix="leave it out", zh="文本为空，请删去这条记录"
            )
        group = given if multi_label and not isinstance(given, str) else [given]
        if (multi_label and isinstance(given, str)) or not all(
            isinstance(label, str) and label and not SURROGATE.search(label) for label in group
        ):
            expected = "a collection of strings" if multi_label else "a string that is not empty"
            raise DataError(
                f"the label is {given!r}, expected {expected}",
                where=f"record {record}",
                zh="标签应为" + ("字符串的集合" if multi_label else "非空字符串"),
            )
        known.update(group)
    if len(known) < (1 if multi_label else 2):
        raise DataError(
            f"all texts have the same label {min(known)!r}" if known else "there are no labels",
            why="there is nothing to tell apart",
            fix="give texts of two labels or more",
            zh="至少需要两种不同的标签才能训练分类器",
        )
    return tuple(sorted(known))


def check_names(value: object, path: Path) -> list[str]:
    """A value read from JSON if it is a list, not empty, of distinct strings.

    Raises:
        ModelError: it is not.
    """
    if not isinstance(value, list) or not 0 < len(value) == len({name for name in value if isinstance(name, str)}):
        raise unsound(path, "the names in it are no list of distinct strings")
    return value


def unsound(path: Path, why: str) -> ModelError:
    """The error for a file that is not what was once saved."""
    return ModelError(
        "the linear model is not sound",
        where=str(path),
        why=f"{why}; nothing was loaded",
        fix="copy or train the model again",
        zh="线性模型文件不完整或不一致，未加载任何内容。请重新复制或重新训练",
    )
