"""The page of a comparison: the table, the picture of quality over latency, the recommendation; as text and as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from hanmo import __version__
from hanmo.evaluation.choice import Choice, Limit, broken, quantities
from hanmo.evaluation.report import page
from hanmo.evaluation.task_table import cell, columns, title
from hanmo.evaluation.trials import Trial
from hanmo.language import pick
from hanmo.progress import human_time


def heads(primary: str) -> list[str]:
    """The columns."""
    return [
        pick("system", "系统"),
        title(primary),
        pick("learning", "训练"),
        "p50",
        "p99",
        pick("answers/s", "回答/秒"),
        pick("memory", "内存"),
        pick("on disk", "体积"),
        pick("J/1,000", "焦/千次"),
        pick("cost/1,000", "费用/千次"),
    ]


def size(value: float | None) -> str:
    """Bytes for people."""
    return "-" if value is None else f"{value / 1e6:,.1f} MB" if value < 1e8 else f"{value / 1e6:,.0f} MB"


def milliseconds(value: float | None) -> str:
    """A short time for people."""
    return "-" if value is None else f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.2f} s"


def cells(trial: Trial, front: bool, limits: Sequence[Limit]) -> list[str]:
    """The row of a candidate; a star where no other beats it."""
    known = quantities(trial)
    mark = "★ " if front else "  "
    name = mark + trial.name + (" ✗" if trial.score is not None and broken(trial, limits) else "")
    if trial.score is None:
        return [name, trial.problem, *["-"] * 8]
    train, energy, cost = known["train"], known["energy"], known["cost"]
    return [
        name,
        cell(trial.score.main),
        "-" if train is None else human_time(train) if train >= 1 else f"{train:.2f} s",
        milliseconds(known["latency"]),
        milliseconds(known["p99"]),
        f"{trial.throughput:,.0f}" if trial.throughput >= 10 else f"{trial.throughput:.2f}",
        size(known["memory"]),
        size(known["size"]),
        "-" if energy is None else f"{energy:,.1f}",
        "-" if cost is None else f"{cost:.4f}",
    ]


def notes(trials: Sequence[Trial], n: int, limits: Sequence[Limit]) -> list[str]:
    """What the columns mean and how they came about."""
    sources = sorted({trial.energy_source for trial in trials if trial.energy_source})
    lines = [
        pick(
            f"n = {n:,} test records, answered once by each; in brackets 95 % intervals; ★: no other is better in "
            "quality, latency and memory; p50, p99: one answer at a time; memory: peak of a process that only answers",
            f"n = {n:,} 条测试记录，每个系统只回答一次；方括号内为 95% 置信区间；★：在质量、延迟、内存上无被支配者；"
            "p50、p99：逐条回答；内存：只做回答的进程的峰值",
        ),
        pick("energy: ", "能耗：") + "; ".join(sources),
    ]
    if limits:
        lines.append(
            pick("limits (✗ breaks one): ", "限制（✗ 表示不满足）：") + ", ".join(limit.text for limit in limits)
        )
    return lines


def render_comparison(
    trials: Sequence[Trial], fronts: Sequence[bool], choice: Choice, limits: Sequence[Limit], primary: str, n: int
) -> str:
    """The whole as plain text."""
    table = [heads(primary), *(cells(trial, front, limits) for trial, front in zip(trials, fronts, strict=True))]
    return "\n".join([*columns(table), "", *notes(trials, n, limits), "", choice.reason])


def comparison_page(
    name: str,
    trials: Sequence[Trial],
    fronts: Sequence[bool],
    choice: Choice,
    limits: Sequence[Limit],
    primary: str,
    n: int,
) -> str:
    """The whole as one HTML page that needs nothing else."""
    head = "".join(f"<th class=n>{escape(text)}</th>" for text in heads(primary))
    rows = []
    for trial, front in zip(trials, fronts, strict=True):
        kind = " class=best" if trial is choice.recommended else ""
        rows.append(
            f"<tr{kind}>"
            + "".join(f"<td class=n>{escape(text)}</td>" for text in cells(trial, front, limits))
            + "</tr>"
        )
    soft = "".join(f"<p class=soft>{escape(line)}</p>" for line in notes(trials, n, limits))
    marks = "".join(
        f"<li>{escape(trial.name)}: <code>{escape(trial.score.signature)}</code></li>"
        for trial in trials
        if trial.score
    )
    sections = [
        (pick("Candidates", "候选"), f"<table><tr>{head}</tr>{''.join(rows)}</table>{soft}"),
        (pick("Quality over latency", "质量与延迟"), picture(trials, fronts, choice, primary)),
        (pick("Signatures", "签名"), f"<ul class=soft>{marks}</ul>"),
    ]
    return page(name, choice.reason, sections, {"hanmo": __version__})


def picture(
    trials: Sequence[Trial], fronts: Sequence[bool], choice: Choice, primary: str, width: int = 860, height: int = 300
) -> str:
    """Quality with its interval over the latency, on a logarithmic axis, as inline SVG."""
    points = [(t, f, t.latency(0.5) or 1e-6, t.score.main) for t, f in zip(trials, fronts, strict=True) if t.score]
    points = [point for point in points if math.isfinite(point[3].value)]
    if not points:
        return ""
    lows = [p[3].interval.low if p[3].interval else p[3].value for p in points]
    highs = [p[3].interval.high if p[3].interval else p[3].value for p in points]
    low, high = min(lows), max(max(highs), min(lows) + 1e-3)
    first, last = math.log10(min(p[2] for p in points)) - 0.2, math.log10(max(p[2] for p in points)) + 0.6

    def x(seconds: float) -> float:
        return 60 + (width - 80) * (math.log10(seconds) - first) / (last - first)

    def y(value: float) -> float:
        return 20 + (height - 60) * (high - value) / (high - low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(primary)}">']
    for power in range(math.ceil(first), math.floor(last) + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="20" y2="{height - 40}" stroke="#8883"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{height - 22}" font-size="12" text-anchor="middle" fill="currentColor">'
            f"{escape(milliseconds(10.0**power))}</text>"
        )
    parts += [
        f'<text x="52" y="{y(value) + 4:.1f}" font-size="12" text-anchor="end" fill="currentColor">{value:.3f}</text>'
        for value in (low, (low + high) / 2, high)
    ]
    for (trial, front, seconds, measured), bottom, top in zip(points, lows, highs, strict=True):
        colour = "#b3261e" if trial is choice.recommended else "#2f5d8a" if front else "#888"
        at = x(seconds)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(bottom):.1f}" y2="{y(top):.1f}" stroke="{colour}"/>'
            f'<circle cx="{at:.1f}" cy="{y(measured.value):.1f}" r="5" fill="{colour}"/>'
            f'<text x="{at + 8:.1f}" y="{y(measured.value) - 6:.1f}" font-size="12" fill="currentColor">'
            f"{escape(trial.name)}</text>"
        )
    return "".join(parts) + "</svg>"
