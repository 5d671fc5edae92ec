"""The part of a run's page that shows a search over settings: what was tried, and how the losses fell."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hanmo.language import pick
from hanmo.training.search_record import COMPLETE, FAILED, PRUNED, UNFINISHED, SearchRecord, Trial

TITLE = "Search over settings · 参数搜索"
STATES = {
    COMPLETE: "complete · 完成",
    PRUNED: "pruned · 提前终止",
    FAILED: "failed · 失败",
    UNFINISHED: "unfinished · 未完成",
}


def search_section(record: SearchRecord) -> str:
    """A sentence, a picture and the table of all trials."""
    winner = record.winner
    note = pick(
        "Every trial is the whole run on a shorter horizon. What is best there need not be best for the run: the "
        "longer a training, the lower its best learning rate.",
        "每次试验是缩短了的完整训练。短训练中的最佳设置未必也是长训练的最佳：训练越长，最佳学习率越低。",
    )
    return (
        f"<p>{escape(record.describe())}</p>{curves(record, winner)}{trial_table(record, winner)}"
        f"<p class=soft>{escape(note)}</p>"
    )


def trial_table(record: SearchRecord, winner: Trial | None) -> str:
    """One row for each trial; the winner in bold."""
    names = [dimension.name for dimension in record.dimensions]
    titles = ["trial · 试验", *names, "loss · 损失", "steps · 步", "seconds · 秒"]
    head = "".join(f"<th class=n>{escape(title)}</th>" for title in titles) + "<th>end · 结果</th>"
    rows = []
    for trial in record.trials:
        loss = "–" if trial.loss is None else f"{trial.loss:.4f}"
        cells = [str(trial.number), *(f"{trial.values[name]:g}" for name in names), loss, f"{trial.steps:,}"]
        cells.append(f"{trial.seconds:.1f}")
        mark = " class=best" if trial is winner else ""
        end = escape(STATES[trial.state] + (f": {trial.reason}" if trial.reason else ""))
        rows.append(f"<tr{mark}>" + "".join(f"<td class=n>{cell}</td>" for cell in cells) + f"<td>{end}</td></tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def points_of(trial: Trial, parts: int) -> list[tuple[float, float]]:
    """The share of its horizon and the loss there, for each measurement of a trial."""
    points = [(int(rung) / parts, loss) for rung, loss in trial.rungs.items()]
    return [*points, (1.0, trial.loss)] if trial.state == COMPLETE and trial.loss is not None else points


def curves(record: SearchRecord, winner: Trial | None, width: int = 860, height: int = 220) -> str:
    """The losses of all trials over the horizon of a trial, as an inline SVG picture."""
    lines = [(trial, points_of(trial, record.parts)) for trial in record.trials]
    values = [loss for _, points in lines for _, loss in points]
    if not values:
        return ""
    left, bottom, right, top = 48, height - 30, width - 10, 10
    low, span = min(values), max(values) - min(values) or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return left + point[0] * (right - left), bottom - (point[1] - low) / span * (bottom - top)

    def drawn(points: Sequence[tuple[float, float]], style: str) -> str:
        places = [place(point) for point in points]
        dots = "".join(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5" />' for x, y in places)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f'<polyline class="{style}" points="{path}" />{dots}'

    grid = []
    for part in range(3):
        y = bottom - (bottom - top) * part / 2
        grid.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" />')
        grid.append(f'<text x="4" y="{y + 4:.1f}">{low + span * part / 2:.2f}</text>')
    for part in range(record.parts + 1):
        x = left + (right - left) * part / record.parts
        anchor = "end" if part == record.parts else "middle"
        grid.append(
            f'<text x="{x:.1f}" y="{height - 8}" text-anchor="{anchor}">{100 * part / record.parts:.0f} %</text>'
        )
    others = "".join(drawn(points, "train") for trial, points in lines if trial is not winner)
    best = "".join(drawn(points, "validation") for trial, points in lines if trial is winner)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="losses of the trials">'
        f"{''.join(grid)}{others}{best}</svg>"
        "<p class=soft>validation loss over the horizon of a trial · 各试验的验证损失: "
        "red · 红 the chosen · 所选, blue · 蓝 the others · 其他</p>"
    )


def search_sections(record: SearchRecord | None) -> list[tuple[str, str]]:
    """Title and HTML, to be put among the sections of a page; nothing where there was no search."""
    return [(TITLE, search_section(record))] if record is not None and record.trials else []
