"""Which model is enough: the limits that a team has, the candidates that no other beats, and a recommendation with its
reason.

Of all candidates that keep the limits, those count as equally good whose quality is not significantly below that of the
best. Of these the recommendation is the cheapest to run: the fastest one, and of equally fast ones the smallest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hanmo.errors import UsageError, nearest
from hanmo.evaluation.scoring import Difference, difference
from hanmo.evaluation.task_table import title
from hanmo.evaluation.trials import Trial
from hanmo.language import pick
from hanmo.settings import parse_duration
from hanmo.tasks.metric import Metric

QUANTITIES = ("quality", "latency", "p99", "throughput", "memory", "size", "train", "energy", "cost")
UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
LIMIT = re.compile(r"\s*([A-Za-z_0-9]+)\s*(<=|>=|<|>)\s*([0-9.]+(?:e-?[0-9]+)?)\s*([A-Za-zµ%/]*)\s*")


@dataclass(frozen=True)
class Limit:
    """A bound of a quantity: seconds, bytes, answers per second, joules, a currency, or the primary measure."""

    quantity: str
    above: bool  # whether the value must lie above
    bound: float
    text: str

    def kept(self, value: float | None) -> bool:
        """Whether a value keeps it; one that is not known does not, but a model that was not trained has no time."""
        if value is None:
            return self.quantity in ("train", "cost", "size")
        return value >= self.bound if self.above else value <= self.bound


def parse_limits(text: str) -> list[Limit]:
    """The limits of ``"latency<20ms, memory<500MB"``.

    >>> [(limit.quantity, limit.bound) for limit in parse_limits("latency<20ms, memory<500MB, quality>0.9")]
    [('latency', 0.02), ('memory', 500000000.0), ('quality', 0.9)]

    Raises:
        UsageError: one that is not understood.
    """
    limits = []
    for part in filter(str.strip, re.split(r"[,，;；]", text)):
        found = LIMIT.fullmatch(part)
        name = found[1].lower() if found else ""
        if found is None or name not in QUANTITIES:
            raise UsageError(
                f"'{part.strip()}' is no limit",
                where="--limits",
                fix=nearest(name, QUANTITIES) if name else "for example latency<20ms, memory<500MB, quality>0.9",
                zh=f"无法理解的限制 '{part.strip()}'；例如 latency<20ms, memory<500MB, quality>0.9",
            )
        limits.append(Limit(name, found[2].startswith(">"), amount(name, found[3], found[4]), part.strip()))
    return limits


def amount(quantity: str, number: str, unit: str) -> float:
    """A number and its unit in seconds, bytes, joules or as it is.

    Raises:
        UsageError: the unit does not belong to the quantity.
    """
    low = unit.lower()
    if quantity in ("latency", "p99", "train"):
        if low in ("ms", "us", "µs"):
            return float(number) * (1e-3 if low == "ms" else 1e-6)
        return parse_duration(number + (low or "s"))
    if quantity in ("memory", "size") and (low or "b") in UNITS:
        return float(number) * UNITS[low or "b"]
    if quantity == "energy" and low in ("", "j", "kj", "wh"):
        return float(number) * {"": 1.0, "j": 1.0, "kj": 1e3, "wh": 3600.0}[low]
    if quantity == "quality" and low in ("", "%"):
        return float(number) / (100 if low else 1)
    if quantity in ("throughput", "cost") and low in ("", "/s"):
        return float(number)
    raise UsageError(
        f"the unit '{unit}' does not belong to {quantity}",
        where="--limits",
        fix="ms, s, min for times; MB, GB for memory and size; J, Wh for energy per 1,000 answers",
        zh=f"单位 '{unit}' 不适用于 {quantity}：时间用 ms、s、min，内存与大小用 MB、GB，每千次能耗用 J、Wh",
    )


def quantities(trial: Trial) -> dict[str, float | None]:
    """What limits can be about, in seconds, bytes, joules and money for 1,000 answers."""
    return {
        "quality": None if trial.score is None else trial.score.main.value,
        "latency": trial.latency(0.5),
        "p99": trial.latency(0.99),
        "throughput": trial.throughput or None,
        "memory": trial.peak_memory,
        "size": trial.size,
        "train": trial.train_seconds,
        "energy": None if trial.joules is None else 1000 * trial.joules,
        "cost": trial.cost,
    }


def broken(trial: Trial, limits: Sequence[Limit]) -> list[Limit]:
    """The limits that a candidate does not keep."""
    values = quantities(trial)
    return [limit for limit in limits if not limit.kept(values[limit.quantity])]


def pareto(trials: Sequence[Trial], lower: bool) -> list[bool]:
    """Which candidates no other beats: none is at least as good in quality, latency and memory and better in one."""

    def values(trial: Trial) -> tuple[float, float, float]:
        known = quantities(trial)
        quality = known["quality"]
        worth = -math.inf if quality is None or not math.isfinite(quality) else -quality if lower else quality
        return (-worth, known["latency"] or 0.0, known["memory"] or 0.0)

    rows = [values(trial) for trial in trials]
    marks = []
    for trial, row in zip(trials, rows, strict=True):
        beaten = any(all(a <= b for a, b in zip(other, row, strict=True)) and other != row for other in rows)
        marks.append(trial.score is not None and not beaten)
    return marks


@dataclass(frozen=True)
class Choice:
    """The recommendation.

    Attributes:
        recommended: a candidate, or None where none keeps the limits.
        best: the one of the highest quality.
        reason: one sentence.
    """

    recommended: Trial | None
    best: Trial | None
    reason: str
    difference: Difference | None = None


def choose(trials: Sequence[Trial], metric: Metric[Any, Any], limits: Sequence[Limit]) -> Choice:
    """Recommend the cheapest candidate that is not significantly worse than the best of those that keep the limits."""
    scored = [trial for trial in trials if trial.score is not None and math.isfinite(trial.score.main.value)]
    sign = -1 if metric.primary in metric.lower else 1

    def quality(trial: Trial) -> float:
        assert trial.score is not None
        return sign * trial.score.main.value

    able = [trial for trial in scored if not broken(trial, limits)]
    if not able:
        return Choice(None, max(scored, key=quality, default=None), nothing_fits(scored, limits))
    best = max(able, key=quality)
    equal = [trial for trial in able if trial is best or not worse(metric, trial, best)]

    def price(trial: Trial) -> tuple[float, float, float]:
        return (round(math.log10(max(trial.latency(0.5) or 0.0, 1e-5)), 1), trial.peak_memory or 0, -quality(trial))

    found = min(equal, key=price)
    between = (
        None
        if found is best or found.score is None or best.score is None
        else difference(metric, found.score, best.score)
    )
    return Choice(found, best, reason(found, best, metric.primary, limits, between), between)


def worse(metric: Metric[Any, Any], trial: Trial, best: Trial) -> bool:
    """Whether a candidate is significantly worse, or cannot be told from it only because there are too few records."""
    assert trial.score is not None and best.score is not None
    found = difference(metric, trial.score, best.score)
    return found.interval is None or (found.significant and found.better < 0)


def reason(found: Trial, best: Trial, measure: str, limits: Sequence[Limit], between: Difference | None) -> str:
    """Why that one."""
    assert found.score is not None and best.score is not None
    speed = found.latency(0.5) or 0.0
    measure = title(measure)
    numbers = pick(
        f"{measure} {found.score.main.value:.4f}, {1e3 * speed:.2f} ms for an answer, "
        f"{(found.peak_memory or 0) / 1e6:,.0f} MB",
        f"{measure} {found.score.main.value:.4f}，每次回答 {1e3 * speed:.2f} 毫秒，内存 "
        f"{(found.peak_memory or 0) / 1e6:,.0f} MB",
    )
    within = pick(" within the limits", "满足限制且") if limits else ""
    if found is best or between is None:
        return pick(
            f"take {found.name}: the best{within} ({numbers})", f"推荐 {found.name}：{within}效果最好（{numbers}）"
        )
    times = (best.latency(0.5) or 0.0) / max(speed, 1e-9)
    if times > 1.2:
        gain = pick(f"{times:.1f} times as fast", f"速度为其 {times:.1f} 倍")
    else:
        gain = pick("as fast with no more memory", "速度相当，内存不更多")
    return pick(
        f"take {found.name} ({numbers}): no significant difference from the best{within}, {best.name} "
        f"({best.score.main.value:.4f}), and {gain}",
        f"推荐 {found.name}（{numbers}）：与{within}最好的 {best.name}（{best.score.main.value:.4f}）"
        f"无显著差异，{gain}",
    )


def nothing_fits(scored: Sequence[Trial], limits: Sequence[Limit]) -> str:
    """What to say where no candidate keeps the limits."""
    if not scored:
        return pick("no candidate could be measured", "没有任何候选模型完成评测")
    fewest = min(scored, key=lambda trial: len(broken(trial, limits)))
    names = ", ".join(limit.text for limit in broken(fewest, limits))
    return pick(
        f"no candidate keeps all limits; {fewest.name} comes nearest (it breaks: {names})",
        f"没有候选满足全部限制；最接近的是 {fewest.name}（不满足：{names}）",
    )


def as_row(trial: Trial, front: bool, limits: Sequence[Limit]) -> Mapping[str, object]:
    """A candidate as plain data, for JSON."""
    return {
        "name": trial.name,
        "kind": trial.kind,
        "problem": trial.problem,
        "model": trial.model,
        **quantities(trial),
        "measures": {} if trial.score is None else trial.score.as_data()["measures"],
        "without_leaks": None if trial.score is None else trial.score.as_data().get("without_leaks"),
        "signature": "" if trial.score is None else trial.score.signature,
        "energy_source": trial.energy_source,
        "pareto": front,
        "breaks": [limit.text for limit in broken(trial, limits)] if trial.score is not None else [],
    }
