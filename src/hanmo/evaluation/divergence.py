"""How far a model's predictions are from those of another: what quantisation has cost, before any task shows it.

The statistics are those that llama.cpp's ``llama-perplexity --kl-divergence`` prints, over every token of every window
(llama.cpp leaves out the first half of each).

Letters in names: T tokens, V vocabulary, N tokens of all windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import UsageError
from hanmo.evaluation.intervals import MIN_UNITS, Interval, bootstrap_sums, percentile_interval
from hanmo.language import pick
from hanmo.progress import Progress

WINDOW = 384
ROWS = 64  # tokens compared at once: bounds the memory of distributions


class Predictor(Protocol):
    """Something that predicts: a :class:`~hanmo.inference.language_model.LanguageModel`."""

    def logits(self, ids: Sequence[int]) -> Tensor:
        """float32 ``[T, V]``: the scores of what follows each token, given it and those before it."""
        ...


@dataclass(frozen=True)
class Divergence:
    """A model against a reference on the same tokens.

    Attributes:
        tokens: that were predicted; windows: in which they stood.
        kl: mean Kullback-Leibler divergence of the model from the reference, nats; with a 95 % bootstrap interval over
            windows (None for fewer than five).
        kl_median, kl_99, kl_most: of the tokens' divergences the median, the 99 % quantile and the largest.
        same_top: share of tokens for which both hold the same one most probable.
        probability_rms: root mean square of the difference of the right token's probability.
        perplexity, reference_perplexity: of the windows' tokens.
        ratio: of these perplexities, with its interval.
    """

    tokens: int
    windows: int
    kl: float
    kl_interval: tuple[float, float] | None
    kl_median: float
    kl_99: float
    kl_most: float
    same_top: float
    probability_rms: float
    perplexity: float
    reference_perplexity: float
    ratio: float
    ratio_interval: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def describe(self) -> str:
        """A line for each statistic."""

        def between(interval: tuple[float, float] | None, digits: int) -> str:
            return "" if interval is None else f"  [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"

        rows = [
            (pick("mean KL divergence", "平均 KL 散度"), f"{self.kl:.5f}" + between(self.kl_interval, 5)),
            (
                pick("median, 99 %, largest", "中位数、99%、最大"),
                f"{self.kl_median:.5f}, {self.kl_99:.4f}, {self.kl_most:.3f}",
            ),
            (pick("same top token", "首选词元相同"), f"{self.same_top:.2%}"),
            (pick("RMS of probability differences", "概率差的均方根"), f"{self.probability_rms:.2%}"),
            (
                pick("perplexity, reference, ratio", "困惑度、参照、比值"),
                f"{self.perplexity:.3f}, {self.reference_perplexity:.3f}, {self.ratio:.4f}"
                + between(self.ratio_interval, 4),
            ),
            (
                pick("tokens", "词元"),
                f"{self.tokens:,} " + pick(f"in {self.windows} windows", f"（{self.windows} 个窗口）"),
            ),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def divergence(
    reference: Predictor,
    model: Predictor,
    ids: NDArray[np.integer[Any]] | Sequence[int],
    *,
    window: int = WINDOW,
    progress: bool = False,
) -> Divergence:
    """Compare the predictions of two models that have the same tokens.

    Args:
        ids: a text; cut into windows, each read from its beginning. A rest shorter than a window is left out.

    Raises:
        UsageError: less than one window, or vocabularies of different sizes.
    """
    ids = [int(id) for id in ids]
    if window < 2 or len(ids) < window:
        raise UsageError(
            f"{len(ids)} tokens are less than a window of {window}",
            fix="give a longer text, or a window that it fills",
            zh=f"文本只有 {len(ids)} 个词元，不足一个窗口（{window}）；请给出更长的文本或更小的窗口",
        )
    starts = range(0, len(ids) - window + 1, window)
    columns: list[NDArray[np.float64]] = []
    bar = Progress(pick("comparing", "比较"), len(starts) * window, "tokens") if progress else None
    for start in starts:
        part = ids[start : start + window]
        columns.append(np.concatenate(list(compared(reference.logits(part), model.logits(part), part)), axis=1))
        if bar:
            bar.update(start + window)
    if bar:
        bar.close()
    return summary(columns)


def compared(reference_TV: Tensor, model_TV: Tensor, ids: Sequence[int]) -> Iterator[NDArray[np.float64]]:
    """For each token but the last of a window ``[4, T]``: divergence, whether the best token is the same, and the
    log-probabilities of the right token by the reference and the model."""
    if reference_TV.shape != model_TV.shape:
        raise UsageError(
            f"the vocabularies have {reference_TV.size(1)} and {model_TV.size(1)} tokens: these are different models",
            fix="compare forms of the same model",
            zh=f"两个模型的词表大小不同（{reference_TV.size(1)} 与 {model_TV.size(1)}），无法比较",
        )
    targets_T = torch.tensor(list(ids[1:]))
    for first in range(0, len(ids) - 1, ROWS):
        rows = slice(first, min(first + ROWS, len(ids) - 1))
        p, q = (logits_TV[rows].cpu().double().log_softmax(dim=1) for logits_TV in (reference_TV, model_TV))
        kl = (p.exp() * (p - q).where(p > -math.inf, 0.0)).sum(dim=1)
        right = targets_T[rows].unsqueeze(1)
        same = (p.argmax(dim=1) == q.argmax(dim=1)).double()
        yield torch.stack((kl, same, p.gather(1, right)[:, 0], q.gather(1, right)[:, 0])).numpy()


def summary(columns: list[NDArray[np.float64]]) -> Divergence:
    """The statistics of windows ``[4, T]`` (:func:`compared`)."""
    kl, same, p, q = np.concatenate(columns, axis=1)
    kl_interval = ratio_interval = None
    if len(columns) >= MIN_UNITS:
        units = np.stack([[len(part[0]), part[0].sum(), (part[2] - part[3]).sum()] for part in columns])
        sums = bootstrap_sums(units)
        kl_interval = ends(percentile_interval(sums[:, 1] / sums[:, 0]))
        ratio_interval = ends(percentile_interval(np.exp(sums[:, 2] / sums[:, 0])))
    return Divergence(
        tokens=len(kl),
        windows=len(columns),
        kl=float(kl.mean()),
        kl_interval=kl_interval,
        kl_median=float(np.median(kl)),
        kl_99=float(np.quantile(kl, 0.99)),
        kl_most=float(kl.max()),
        same_top=float(same.mean()),
        probability_rms=float(np.sqrt(np.square(np.exp(p) - np.exp(q)).mean())),
        perplexity=float(np.exp(-q.mean())),
        reference_perplexity=float(np.exp(-p.mean())),
        ratio=float(np.exp((p - q).mean())),
        ratio_interval=ratio_interval,
    )


def ends(interval: Interval) -> tuple[float, float]:
    """An interval as two numbers."""
    return interval.low, interval.high
