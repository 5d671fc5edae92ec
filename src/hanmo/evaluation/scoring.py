"""Systems measured on the records of a task: each number with interval, signature, and what it is compared with.

Intervals are percentiles of a bootstrap over records, exact ones where all answers are right or none is. Two systems
are compared on the same draws of the same records (a paired bootstrap), and where an answer is right or wrong as a
whole, by McNemar's exact test, too.

Letters in names: N records, K numbers of a record.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.data.tasks.types import Record
from hanmo.errors import DataError
from hanmo.evaluation.intervals import (
    CONFIDENCE,
    MIN_UNITS,
    RESAMPLES,
    Interval,
    bootstrap_sums,
    percentile_interval,
)
from hanmo.evaluation.table import signature
from hanmo.language import pick
from hanmo.tasks.base import System, Task

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """One number and its interval; None where there are too few records to say."""

    value: float
    interval: Interval | None = None

    def as_data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        interval = None if self.interval is None else [self.interval.low, self.interval.high]
        return {"value": self.value if math.isfinite(self.value) else None, "interval": interval}


@dataclass
class Score:
    """What a system reaches on some records.

    Attributes:
        measures: by name; the task's primary measure among them.
        sums: the numbers of each record, ``[N, K]``, from which two systems are compared.
        seconds: that all answers took.
        leaked: the same measures without the records that the training data hold, where there are such.
    """

    name: str
    kind: str
    n: int
    primary: str
    measures: dict[str, Measured]
    signature: str
    sums: Floats
    seconds: float
    answers: list[Any] = field(repr=False)
    details: dict[str, Any] = field(default_factory=dict)
    without_leaks: dict[str, Measured] | None = None

    @property
    def main(self) -> Measured:
        """The primary measure."""
        return self.measures[self.primary]

    def as_data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = {
            "name": self.name,
            "kind": self.kind,
            "n": self.n,
            "primary": self.primary,
            "measures": {name: measured.as_data() for name, measured in self.measures.items()},
            "signature": self.signature,
            "seconds": self.seconds,
            "details": self.details,
        }
        if self.without_leaks is not None:
            data["without_leaks"] = {name: measured.as_data() for name, measured in self.without_leaks.items()}
        return data


def score(
    task: Task[Any, Any],
    system: System[Any, Any],
    records: Sequence[Record],
    *,
    leaked: NDArray[np.bool_] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Score:
    """Let a system answer records and measure its answers.

    Args:
        leaked: which of the records stand in the training data as well, ``[N]``.

    Raises:
        DataError: there are no records.
    """
    if not records:
        raise DataError("there are no records to measure on", zh="没有可用于评测的记录")
    start = time.perf_counter()
    answers = system.answer(records)
    seconds = time.perf_counter() - start
    assert len(answers) == len(records), f"{system.name} gave {len(answers)} answers to {len(records)} records"
    answers = system.weigh(records, answers)
    metric = task.metric(records)
    statistics_NK = metric.statistics(records, answers)
    without = None
    if leaked is not None and leaked.any() and not leaked.all():
        without = measure(metric, statistics_NK[~leaked], resamples=resamples, seed=seed)
    mark = signature(
        task=task.name, data=digest(records), n=len(records), **metric.signature(), **system.signature(), ci="bootstrap"
    )
    return Score(
        system.name,
        system.kind,
        len(records),
        metric.primary,
        measure(metric, statistics_NK, resamples=resamples, seed=seed),
        mark,
        statistics_NK,
        seconds,
        answers,
        metric.details(records, answers),
        without,
    )


def measure(metric: Any, statistics_NK: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Measured]:
    """The measures of some records with their intervals."""
    values = metric.measures(statistics_NK.sum(axis=0))
    if len(statistics_NK) < MIN_UNITS:
        return {name: Measured(float(value)) for name, value in values.items()}
    drawn = metric.measures(bootstrap_sums(statistics_NK, resamples=resamples, seed=seed))
    found = {name: Measured(float(value), interval_of(drawn[name])) for name, value in values.items()}
    right = getattr(metric, "right", None)
    share = None if right is None else float(np.mean(right(statistics_NK)))
    if share in (0.0, 1.0) and found[metric.primary].value == share:
        found[metric.primary] = Measured(share, interval_of_all(share, len(statistics_NK)))
    return found


def interval_of_all(share: float, n: int) -> Interval:
    """The exact interval (Clopper and Pearson 1934) where none of n answers is right, or all are: a bootstrap, which
    only draws what was seen, would be certain.

    >>> str(interval_of_all(0.0, 50)), str(interval_of_all(1.0, 50))
    ('0.000 to 0.071', '0.929 to 1.000')
    """
    bound = ((1 - CONFIDENCE) / 2) ** (1 / n)
    return Interval(0.0, 1 - bound) if share == 0 else Interval(bound, 1.0)


def interval_of(samples: Floats) -> Interval | None:
    """The percentile interval of the draws in which there was something to measure; None where there was in none."""
    samples = np.asarray(samples, dtype=np.float64)
    finite = samples[np.isfinite(samples)]
    return percentile_interval(finite) if finite.size else None


@dataclass(frozen=True)
class Difference:
    """The primary measure of one system minus that of another, on the same records.

    Attributes:
        better: the difference in the direction in which more is better.
        p: of McNemar's exact test, where answers are right or wrong as a whole.
    """

    first: str
    second: str
    measure: str
    value: float
    better: float
    interval: Interval | None
    n: int
    p: float | None = None

    @property
    def significant(self) -> bool:
        """Does the interval of the difference leave out zero?"""
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high

    def sentence(self) -> str:
        """The result in words, in the user's language."""
        better, worse = (self.first, self.second) if self.better > 0 else (self.second, self.first)
        if self.interval is None:
            return pick(
                f"{self.n} records are too few to say whether {self.first} or {self.second} is better",
                f"记录太少（{self.n} 条），无法判断 {self.first} 与 {self.second} 孰优",
            )
        method = pick(f"paired bootstrap, n = {self.n:,}", f"配对自助法，n = {self.n:,}")
        method += "" if self.p is None else pick(f"; McNemar p = {self.p:.2g}", f"；McNemar p = {self.p:.2g}")
        low, high = self.interval.low, self.interval.high
        if not self.significant:
            return pick(
                f"no significant difference between {self.first} and {self.second}: {self.value:+.4f} {self.measure} "
                f"(95% CI {low:+.4f} to {high:+.4f}, {method})",
                f"{self.first} 与 {self.second} 无显著差异：{self.measure} 相差 {self.value:+.4f}"
                f"（95% 置信区间 {low:+.4f} 到 {high:+.4f}，{method}）",
            )
        small, large = sorted((abs(low), abs(high)))
        return pick(
            f"{better} is better than {worse} by {abs(self.value):.4f} {self.measure} "
            f"(95% CI {small:.4f} to {large:.4f}, {method}): significant",
            f"{better} 的 {self.measure} 比 {worse} 好 {abs(self.value):.4f}"
            f"（95% 置信区间 {small:.4f} 到 {large:.4f}，{method}）：差异显著",
        )

    def as_data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "measure": self.measure,
            "difference": self.value,
            "interval": None if self.interval is None else [self.interval.low, self.interval.high],
            "p_mcnemar": self.p,
            "significant": self.significant,
        }


def difference(
    metric: Any, first: Score, second: Score, *, measure: str = "", resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Compare two systems on the same records.

    Args:
        measure: by which; default: the primary one.

    Raises:
        DataError: they were not measured on the same records.
    """
    check_same(first, second)
    name, interval = measure or metric.primary, None
    value = first.measures[name].value - second.measures[name].value
    if first.n >= MIN_UNITS:
        both = bootstrap_sums(np.concatenate([first.sums, second.sums], axis=1), resamples=resamples, seed=seed)
        K = first.sums.shape[1]
        interval = interval_of(metric.measures(both[:, :K])[name] - metric.measures(both[:, K:])[name])
    right = getattr(metric, "right", None)
    p = None if right is None or measure else mcnemar(right(first.sums), right(second.sums))
    better = -value if name in metric.lower else value
    return Difference(first.name, second.name, name, value, better, interval, first.n, p)


def check_same(first: Score, second: Score) -> None:
    """Refuse to compare two systems that were not measured on the same records.

    Raises:
        DataError: they were not.
    """
    if first.sums.shape != second.sums.shape:
        raise DataError(
            f"'{first.name}' and '{second.name}' were not measured on the same records",
            zh=f"'{first.name}' 与 '{second.name}' 不是在相同的记录上评测的",
        )


@dataclass(frozen=True)
class WinRate:
    """How often the answer of one system is better than that of another to the same record; even ones count half.

    Attributes:
        p: of the sign test, which leaves the even ones out.
    """

    first: str
    second: str
    value: float
    interval: Interval | None
    won: int
    even: int
    lost: int
    p: float

    def sentence(self) -> str:
        """The result in words, in the user's language."""
        low, high = (self.interval.low, self.interval.high) if self.interval else (math.nan, math.nan)
        sure = self.interval is not None and not low <= 0.5 <= high
        verdict = pick("significant", "差异显著") if sure else pick("no significant difference", "无显著差异")
        bounds = pick(f"95% CI {low:.3f} to {high:.3f}, ", f"95% 置信区间 {low:.3f} 到 {high:.3f}，")
        return pick(
            f"win rate by rules of {self.first} against {self.second}: {self.value:.3f} "
            f"({bounds if self.interval else ''}{self.won} won, {self.even} even, {self.lost} lost; "
            f"sign test p = {self.p:.2g}): {verdict}",
            f"{self.first} 对 {self.second} 的规则胜率：{self.value:.3f}"
            f"（{bounds if self.interval else ''}{self.won} 胜 {self.even} 平 {self.lost} 负；"
            f"符号检验 p = {self.p:.2g}）：{verdict}",
        )

    def as_data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "first": self.first,
            "second": self.second,
            "win_rate": self.value,
            "interval": None if self.interval is None else [self.interval.low, self.interval.high],
            "won": self.won,
            "even": self.even,
            "lost": self.lost,
            "p_sign": self.p,
        }


def win_rate(metric: Any, first: Score, second: Score, *, resamples: int = RESAMPLES, seed: int = 0) -> WinRate | None:
    """How often the first system wins, with a bootstrap over records; None where the metric does not tell.

    Raises:
        DataError: they were not measured on the same records.
    """
    if not hasattr(metric, "wins"):
        return None
    check_same(first, second)
    points_N = metric.wins(first.sums, second.sums)
    interval = None
    if first.n >= MIN_UNITS:
        interval = interval_of(bootstrap_sums(points_N[:, None], resamples=resamples, seed=seed)[:, 0] / first.n)
    won, lost = points_N == 1, points_N == 0
    counted = int(won.sum()), int((points_N == 0.5).sum()), int(lost.sum())
    return WinRate(first.name, second.name, float(points_N.mean()), interval, *counted, mcnemar(won, lost))


def mcnemar(first_N: NDArray[np.bool_], second_N: NDArray[np.bool_]) -> float:
    """The exact two-sided p of McNemar's test (1947): whether two systems are right equally often.

    >>> round(mcnemar(np.array([True] * 9 + [False]), np.array([False] * 9 + [True])), 4)
    0.0215
    """
    only_first, only_second = int((first_N & ~second_N).sum()), int((~first_N & second_N).sum())
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def digest(records: Sequence[Record]) -> str:
    """The hash of what records say, wherever they are from."""
    state = hashlib.sha256()
    for record in records:
        content = {name: value for name, value in vars(record).items() if name not in ("file", "line")}
        state.update(repr(sorted(content.items())).encode("utf-8", "surrogatepass"))
    return state.hexdigest()[:12]
