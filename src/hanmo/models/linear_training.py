"""How the weights of a linear classifier are found: scikit-learn's solvers, folds, held-out scores.

Letters in names: N texts, F features, L labels. ``matrix_NF`` is a ``scipy.sparse.csr_matrix``; ``targets_NL`` holds 1
where a text has a label, else 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import UsageError, nearest
from hanmo.models import calibration
from hanmo.models.calibration import expected_calibration_error, two_sided
from hanmo.models.linear_features import Vectorizer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

METHODS = ("logistic", "svm", "naive-bayes", "nb-logistic")
COMPLEMENT_ALPHA = 0.1  # added to the sums of features in nb-logistic
FOLDS = 5
MAX_STEPS = 1000  # of the optimizers: far more than they take on text


@dataclass(frozen=True)
class LinearConfig:
    """How a classifier is trained.

    Raises:
        UsageError: an unknown method or calibration, or a strength of smoothing or penalty that is not positive.
    """

    method: str = "logistic"  # one of METHODS
    C: float | None = (
        10.0  # inverse strength of the penalty (logistic, svm, nb-logistic); None: chosen by cross-validation
    )
    alpha: float = 0.5  # naive-bayes: added to every count
    balanced: bool = False  # every label counts as much as every other, however rare
    multi_label: bool = False  # any number of labels can hold at once: one classifier for each
    calibration: str = "sigmoid"  # one of calibration.METHODS
    seed: int = 0  # of the folds, and of the order in which svm visits the texts

    def __post_init__(self) -> None:
        choices = (("method", self.method, METHODS), ("calibration", self.calibration, calibration.METHODS))
        for name, value, known in choices:
            if value not in known:
                raise UsageError(
                    f"unknown {name} {value!r}",
                    where=name,
                    fix=nearest(str(value), known),
                    zh=f"{name} 的值 {value!r} 未知，可用：" + "、".join(known),
                )
        for name, number in (("C", self.C), ("alpha", self.alpha)):
            if number is not None and not 0 < number < float("inf"):
                raise UsageError(f"{name} is {number}, it must be above 0", where=name, zh=f"{name} 必须大于 0")


def train_weights(matrix_NF: Any, targets_NL: Floats, config: LinearConfig, C: float) -> tuple[Floats, Floats]:
    """Weights [F, L] and bias [L] such that ``matrix @ weights + bias`` are the labels' scores.

    With two labels that exclude each other they are half a score for one and half against the other; a label that no
    text has (in a fold) gets -inf; with ``multi_label`` each column is a classifier of its own.
    """
    num_features, num_labels = matrix_NF.shape[1], targets_NL.shape[1]
    weights_FL, bias_L = np.zeros((num_features, num_labels)), np.full(num_labels, -np.inf)
    if config.multi_label:
        for label, has_label in enumerate(targets_NL.astype(np.int64).T):
            yes = int(has_label.sum())
            if 0 < yes < len(has_label):
                weights, bias = solve(matrix_NF, has_label, config, C)
                weights_FL[:, label], bias_L[label] = weights[:, 1] - weights[:, 0], bias[1] - bias[0]
            else:  # all or none have it: nothing tells them apart
                bias_L[label] = np.log((yes + 1) / (len(has_label) - yes + 1))
        return weights_FL, bias_L
    present = np.flatnonzero(targets_NL.any(0))
    weights_FL[:, present], bias_L[present] = solve(matrix_NF, targets_NL[:, present].argmax(1), config, C)
    return weights_FL, bias_L


def solve(matrix_NF: Any, labels_N: Ints, config: LinearConfig, C: float) -> tuple[Floats, Floats]:
    """Weights [F, L] and bias [L] of one classifier; ``labels_N`` are 0 to L - 1, each of them there.

    ``nb-logistic`` adds the scores of logistic regression, which learns from features what tells labels apart, and of
    complement naive Bayes (Rennie et al. 2003), which trusts rare features more: both err on different texts, and
    their sum is again one linear classifier.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import ComplementNB, MultinomialNB
    from sklearn.svm import LinearSVC

    class_weight = "balanced" if config.balanced else None
    if config.method == "naive-bayes":
        model = MultinomialNB(alpha=config.alpha, fit_prior=not config.balanced).fit(matrix_NF, labels_N)
        return model.feature_log_prob_.T, model.class_log_prior_
    if config.method in ("logistic", "nb-logistic"):
        model = LogisticRegression(C=C, max_iter=MAX_STEPS, class_weight=class_weight)
    else:
        model = LinearSVC(C=C, max_iter=MAX_STEPS, class_weight=class_weight, random_state=config.seed)
    model.fit(matrix_NF, labels_N)
    weights_FL, bias_L = model.coef_.T, model.intercept_
    if len(model.coef_) == 1:
        weights_FL, bias_L = two_sided(model.coef_[0]), two_sided(model.intercept_)[0]
    if config.method == "nb-logistic":
        added_FL = ComplementNB(alpha=COMPLEMENT_ALPHA).fit(matrix_NF, labels_N).feature_log_prob_.T
        weights_FL = weights_FL + added_FL - added_FL.mean(1, keepdims=True)
    return weights_FL, bias_L


def assign_folds(targets_NL: Floats, config: LinearConfig) -> Ints:
    """A fold for each text, the texts of a label (of a set of labels) spread over all folds as evenly as they go."""
    order = np.random.default_rng(config.seed).permutation(len(targets_NL))
    if not config.multi_label:
        order = order[np.argsort(targets_NL[order].argmax(1), kind="stable")]
    folds_N = np.empty(len(targets_NL), dtype=np.int64)
    folds_N[order] = np.arange(len(order)) % FOLDS
    return folds_N


def held_out_scores(
    vectorizer: Vectorizer,
    counts_NF: Any,
    targets_NL: Floats,
    config: LinearConfig,
    C: float,
    after_fold: Callable[[], None],
) -> Floats:
    """The scores [N, L] of each text by a model that had not seen it; NaN in rows where there is none.

    Rows are NaN if the other folds have fewer than two labels or no feature, or if they lack the label of that very
    text. The penalty counts once and each text's loss once, so that fewer texts would mean a stronger penalty and
    smaller scores than those of the final model: C is raised to make up for it.
    """
    folds_N = assign_folds(targets_NL, config)
    scores_NL = np.full(targets_NL.shape, np.nan)
    for fold in range(FOLDS):
        inside, outside = np.flatnonzero(folds_N == fold), np.flatnonzero(folds_N != fold)
        seen_L = targets_NL[outside].any(0)
        matrix_NF = vectorizer.weigh_as_seen(counts_NF, outside)
        if inside.size and matrix_NF.shape[1] and (config.multi_label or seen_L.sum() > 1):
            fold_C = C * len(targets_NL) / outside.size
            weights_FL, bias_L = train_weights(matrix_NF[outside], targets_NL[outside], config, fold_C)
            scores = matrix_NF[inside] @ weights_FL + bias_L
            if not config.multi_label:
                lowest = np.where(np.isfinite(scores), scores, np.inf).min(1, keepdims=True)
                scores = np.maximum(scores, lowest)  # a label that the fold never saw is the least likely one
                scores[~(targets_NL[inside] * seen_L).any(1)] = np.nan
            scores_NL[inside] = scores
        after_fold()
    return scores_NL


def accuracy(scores_NL: Floats, targets_NL: Floats, config: LinearConfig) -> float:
    """The share of right answers on scored texts: of texts, of labels if ``balanced``, of decisions if several hold."""
    scored = np.isfinite(scores_NL).all(1)
    if not scored.any():
        return 0.0
    scores_NL, targets_NL = scores_NL[scored], targets_NL[scored]
    if config.multi_label:
        return float(((scores_NL > 0) == (targets_NL > 0)).mean())
    right = scores_NL.argmax(1) == targets_NL.argmax(1)
    return float(np.average(right, weights=text_weights(targets_NL, config)))


def text_weights(targets_NL: Floats, config: LinearConfig) -> Floats:
    """How much each text counts: the same, or the same for all texts of a label together if ``balanced``."""
    if not config.balanced or config.multi_label:
        return np.ones(len(targets_NL))
    weights_N: Floats = 1 / targets_NL.sum(0)[targets_NL.argmax(1)]
    weights_N *= len(weights_N) / weights_N.sum()
    return weights_N


def calibration_error(probabilities_NL: Floats, targets_NL: Floats, config: LinearConfig) -> float:
    """Expected calibration error of the answers given, or of every yes or no if several labels can hold."""
    if config.multi_label:
        return expected_calibration_error(probabilities_NL.ravel(), targets_NL.ravel())
    confidences = probabilities_NL.max(1)
    right = probabilities_NL.argmax(1) == targets_NL.argmax(1)
    return expected_calibration_error(confidences, right.astype(np.float64), text_weights(targets_NL, config))
