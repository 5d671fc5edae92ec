"""Calibration: scores of a classifier become probabilities that can be taken at their word.

Of all texts that get a label with probability 0.8, eight in ten should have it. Two maps, both fitted on scores of
texts that the scoring model had not seen:

- **sigmoid**: ``softmax(a * score + b)`` with one scale and a bias for each label, Platt's sigmoid ("Probabilistic
  Outputs for Support Vector Machines", 1999) for any number of labels, with his smoothed targets, so that scores that
  separate the labels perfectly still give finite probabilities.
- **isotonic**: for each label any rising step function of its log odds (Zadrozny and Elkan, "Transforming Classifier
  Scores into Accurate Multiclass Probability Estimates", 2002), scaled to sum to one; it needs some thousand texts.

Letters in names: N texts, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

METHODS = ("sigmoid", "isotonic", "none")
BIAS_PRIOR = 1e-3  # only so that biases that differ by a constant, which softmax ignores, have one answer
ISOTONIC_FLOOR = 1e-4  # no step says never or always


@dataclass
class Calibration:
    """A map from scores [N, L] to probabilities [N, L].

    ``tensors`` hold its numbers: for sigmoid ``scale`` [1], or [L] where several labels can hold at once, and ``bias``
    [L]; for isotonic ``knots`` and ``heights`` of all labels one after the other and where each label ``begins``
    [L + 1].

    >>> Calibration("none", multi_label=False).apply(np.array([[0.0, 0.0]])).tolist()
    [[0.5, 0.5]]
    """

    method: str
    multi_label: bool
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, method: str, scores_NL: Floats, targets_NL: Floats, weights_N: Floats, multi_label: bool
    ) -> Calibration:
        """Fit on held-out scores.

        Args:
            method: one of :data:`METHODS`.
            scores_NL: scores of texts that the model had not seen.
            targets_NL: 1 where a text has the label, else 0.
            weights_N: how much each text counts.
            multi_label: each label is a question of its own, instead of one label for each text.
        """
        if method == "none":
            return cls(method, multi_label)
        if method == "isotonic":
            return cls(method, multi_label, fit_isotonic(log_odds(scores_NL, multi_label), targets_NL, weights_N))
        if not multi_label:
            scale, bias_L = fit_softmax(scores_NL, targets_NL, weights_N)
            return cls(method, multi_label, {"scale": np.array([scale]), "bias": bias_L})
        fits = [
            fit_softmax(two_sided(scores), np.stack([1 - targets, targets], axis=1), weights_N)
            for scores, targets in zip(scores_NL.T, targets_NL.T, strict=True)
        ]
        scales = np.array([scale for scale, _ in fits])
        return cls(method, multi_label, {"scale": scales, "bias": np.array([bias[1] - bias[0] for _, bias in fits])})

    def apply(self, scores_NL: Floats) -> Floats:
        """Probabilities [N, L]; rows sum to one unless several labels can hold at once."""
        if self.method == "isotonic":
            odds_NL, steps = log_odds(scores_NL, self.multi_label), self.tensors
            columns = []
            for label, (begin, end) in enumerate(zip(steps["begins"][:-1], steps["begins"][1:], strict=True)):
                columns.append(np.interp(odds_NL[:, label], steps["knots"][begin:end], steps["heights"][begin:end]))
            raised_NL = np.stack(columns, axis=1)
            return raised_NL if self.multi_label else raised_NL / raised_NL.sum(1, keepdims=True)
        if self.method == "sigmoid":
            scores_NL = scores_NL * self.tensors["scale"] + self.tensors["bias"]
        return sigmoid(scores_NL) if self.multi_label else softmax(scores_NL)

    def is_sound(self, num_labels: int) -> bool:
        """Whether tensors that were read from a file can be applied to ``num_labels`` scores."""
        tensors = self.tensors
        if not all(array.dtype.kind in "fi" and np.isfinite(array).all() for array in tensors.values()):
            return False
        if self.method == "none":
            return not tensors
        if self.method == "sigmoid":
            scales = num_labels if self.multi_label else 1
            return {name: array.shape for name, array in tensors.items()} == {"scale": (scales,), "bias": (num_labels,)}
        if self.method != "isotonic" or set(tensors) != {"begins", "knots", "heights"}:
            return False
        begins, knots, heights = tensors["begins"], tensors["knots"], tensors["heights"]
        return (
            begins.shape == (num_labels + 1,)
            and begins.dtype.kind == "i"
            and knots.shape == heights.shape == (begins[-1],)
            and begins[0] == 0
            and bool((np.diff(begins) > 0).all())
            and bool(((heights > 0) & (heights <= 1)).all())
        )


def fit_softmax(scores_NL: Floats, targets_NL: Floats, weights_N: Floats) -> tuple[float, Floats]:
    """The scale and biases [L] of the least cross-entropy; with Platt's targets ``(n + 1) / (n + 2)`` instead of 1."""
    from scipy.optimize import minimize

    num_labels = scores_NL.shape[1]
    certainty_L = (targets_NL.sum(0) + 1) / (targets_NL.sum(0) + 2)
    certain_N1 = (targets_NL * certainty_L).sum(1, keepdims=True)
    smoothed_NL = np.where(targets_NL > 0, certain_N1, (1 - certain_N1) / max(1, num_labels - 1))
    spread = float(scores_NL.std()) or 1.0
    scaled_NL, share_N1 = scores_NL / spread, (weights_N / weights_N.sum())[:, None]

    def loss(parameters: Floats) -> tuple[float, Floats]:
        scale, bias_L = np.exp(parameters[0]), parameters[1:]
        logits_NL = scale * scaled_NL + bias_L
        logits_NL -= logits_NL.max(1, keepdims=True)
        log_partition_N1 = np.log(np.exp(logits_NL).sum(1, keepdims=True))
        error_NL = share_N1 * (np.exp(logits_NL - log_partition_N1) - smoothed_NL)
        value = (share_N1 * smoothed_NL * (log_partition_N1 - logits_NL)).sum() + BIAS_PRIOR * bias_L @ bias_L / 2
        slope = scale * (error_NL * scaled_NL).sum()
        return float(value), np.concatenate([[slope], error_NL.sum(0) + BIAS_PRIOR * bias_L])

    bounds = [(-10.0, 10.0)] + [(None, None)] * num_labels  # scores without any meaning would drive the scale to zero
    found = minimize(loss, np.zeros(num_labels + 1), jac=True, method="L-BFGS-B", bounds=bounds)
    return float(np.exp(found.x[0]) / spread), np.asarray(found.x[1:], dtype=np.float64)


def fit_isotonic(odds_NL: Floats, targets_NL: Floats, weights_N: Floats) -> dict[str, NDArray[Any]]:
    """The steps of each label, by scikit-learn's pool-adjacent-violators."""
    from sklearn.isotonic import IsotonicRegression

    knots, heights = [], []
    for odds, targets in zip(odds_NL.T, targets_NL.T, strict=True):
        steps = IsotonicRegression(out_of_bounds="clip").fit(odds, targets, sample_weight=weights_N)
        knots.append(np.asarray(steps.X_thresholds_, dtype=np.float64))
        heights.append(np.clip(steps.y_thresholds_, ISOTONIC_FLOOR, 1 - ISOTONIC_FLOOR).astype(np.float64))
    begins = np.cumsum([0, *(part.size for part in knots)]).astype(np.int64)
    return {"begins": begins, "knots": np.concatenate(knots), "heights": np.concatenate(heights)}


def log_odds(scores_NL: Floats, multi_label: bool) -> Floats:
    """For each label its score against all others together, which unlike a score of softmax has a fixed zero."""
    if multi_label:
        return scores_NL
    columns = []
    for label in range(scores_NL.shape[1]):
        others = np.delete(scores_NL, label, axis=1)
        columns.append(scores_NL[:, label] - np.logaddexp.reduce(others, axis=1))
    return np.stack(columns, axis=1)


def two_sided(scores: Floats) -> Floats:
    """One score [N] for yes as scores [N, 2] for no and yes, of which softmax makes the same as sigmoid of the one."""
    return np.stack([-scores / 2, scores / 2], axis=1)


def softmax(scores_NL: Floats) -> Floats:
    """Probabilities whose logarithms differ as the scores do."""
    raised = np.exp(scores_NL - scores_NL.max(axis=1, keepdims=True))
    shares: Floats = raised / raised.sum(axis=1, keepdims=True)
    return shares


def sigmoid(scores: Floats) -> Floats:
    """``1 / (1 + exp(-score))`` without overflow."""
    small = np.exp(-np.abs(scores))
    shares: Floats = np.where(scores >= 0, 1.0, small) / (1 + small)
    return shares


def expected_calibration_error(
    confidences: Floats, correct: NDArray[Any], weights: Floats | None = None, bins: int = 15
) -> float:
    """How far confidence and accuracy lie apart, in bins of equal width, weighted by their texts.

    Naeini, Cooper and Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning" (AAAI 2015).

    >>> expected_calibration_error(np.array([0.75, 0.75, 0.75, 0.75]), np.array([1, 1, 1, 0]))
    0.0
    """
    places = np.minimum((confidences * bins).astype(np.int64), bins - 1)
    weights = np.ones(len(confidences)) if weights is None else weights
    gaps = np.bincount(places, weights * (confidences - correct), minlength=bins)
    return float(np.abs(gaps).sum() / weights.sum())
