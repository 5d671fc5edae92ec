"""Which of two models predicts better, and whether the difference could be chance: a paired bootstrap."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hanmo.errors import DataError
from hanmo.evaluation.intervals import MIN_UNITS, RESAMPLES, Interval, bootstrap_sums, percentile_interval
from hanmo.evaluation.likelihood import Likelihood, describe_unit
from hanmo.language import pick


@dataclass(frozen=True)
class Comparison:
    """The difference of two models in bits per byte, first minus second, on the same documents."""

    first: str
    second: str
    difference: float
    interval: Interval | None
    unit: str
    units: int

    @property
    def significant(self) -> bool:
        """Does the interval of the difference leave out zero?"""
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high

    def sentence(self) -> str:
        """The result in words, in the user's language."""
        better, worse = (self.first, self.second) if self.difference < 0 else (self.second, self.first)
        size = abs(self.difference)
        if self.interval is None:
            return pick(
                f"{better} is better than {worse} by {size:.3f} bits per byte; "
                "there is too little text to say whether that is chance",
                f"{better} 比 {worse} 好 {size:.3f} 比特/字节；文本太少，无法判断是否偶然",
            )
        unit, unit_zh = describe_unit(self.unit)
        method = pick(f"paired bootstrap over {self.units:,} {unit}", f"对 {self.units:,} {unit_zh}做配对自助法")
        if self.significant:
            low, high = sorted((abs(self.interval.low), abs(self.interval.high)))
            return pick(
                f"{better} is better than {worse} by {size:.3f} bits per byte "
                f"(95% CI {low:.3f} to {high:.3f}, {method}): significant",
                f"{better} 比 {worse} 好 {size:.3f} 比特/字节"
                f"（95% 置信区间 {low:.3f} 到 {high:.3f}，{method}）：差异显著",
            )
        low, high = self.interval.low, self.interval.high
        return pick(
            f"no significant difference between {self.first} and {self.second}: {self.difference:+.3f} bits per byte "
            f"(95% CI {low:+.3f} to {high:+.3f}, {method})",
            f"{self.first} 与 {self.second} 无显著差异：{self.difference:+.3f} 比特/字节"
            f"（95% 置信区间 {low:+.3f} 到 {high:+.3f}，{method}）",
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "difference": self.difference,
            "interval": [self.interval.low, self.interval.high] if self.interval else None,
            "significant": self.significant,
        }


def compare(first: Likelihood, second: Likelihood, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare two models on the same documents by a paired bootstrap: both are resampled with the same draws.

    Raises:
        DataError: the two were not measured on the same documents, or with few documents not with the same tokenizer.
    """
    if first.unit_bytes.shape != second.unit_bytes.shape or not np.allclose(first.unit_bytes, second.unit_bytes):
        raise DataError(
            f"'{first.name}' and '{second.name}' were not measured on the same {first.unit}",
            why="a paired comparison needs the same text on both sides, cut in the same places",
            fix="evaluate both on the same split"
            + (" with the same tokenizer, or on 30 documents or more" if first.unit == "blocks" else ""),
        )
    differences = first.unit_nats - second.unit_nats
    interval = None
    if differences.size >= MIN_UNITS and np.isfinite(differences).all():
        sums = bootstrap_sums(np.stack([differences, first.unit_bytes], axis=1), resamples=resamples, seed=seed)
        interval = percentile_interval(sums[:, 0] / np.maximum(sums[:, 1], 1) / math.log(2))
    return Comparison(
        first.name,
        second.name,
        first.bits_per_byte - second.bits_per_byte,
        interval,
        first.unit,
        first.units,
    )
