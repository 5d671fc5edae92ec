"""The page of a training run, written anew at every evaluation: curves, measures, settings; no outside resource."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from hanmo.evaluation.report import loss_curve, page, pairs, read_log, settings_table
from hanmo.evaluation.search_report import search_sections
from hanmo.progress import human_count, human_time
from hanmo.training.search_record import SearchRecord


class TrainingReport:
    """A tracker that keeps ``<run>/report.html`` up to date.

    Args:
        run: folder of the run, with its ``log.jsonl``.
        plan: what was expected before the start, by name.
        settings, computed: resolved settings, and the reasons of those that were computed.
        versions: what the run was made with.
        search: what a search over settings tried, if there was one.
    """

    def __init__(
        self,
        run: Path,
        *,
        plan: Mapping[str, str],
        settings: Mapping[str, Any],
        computed: Mapping[str, str],
        versions: Mapping[str, str],
        search: SearchRecord | None = None,
    ) -> None:
        self.run, self.plan, self.settings, self.computed = run, plan, settings, computed
        self.versions, self.search = versions, search

    def log(self, entry: Mapping[str, float | bool]) -> None:
        """Write the page after an evaluation."""
        if "validation_loss" in entry:
            self.write()

    def write(self) -> Path:
        """Write the page.

        Returns:
            where it is.
        """
        log = read_log(self.run / "log.jsonl")
        evaluations = [entry for entry in log if "validation_loss" in entry]
        last = evaluations[-1] if evaluations else {}
        verdict = f"validation loss · 验证损失 {last['validation_loss']:.4f}" if last else "–"
        sections = [
            ("Loss · 损失曲线", loss_curve(log)),
            ("Validation · 验证", measure_table(evaluations)),
            ("Expected before the start · 开始前的估计", pairs(list(self.plan.items()))),
            ("Settings and why · 设置与理由", settings_table(dict(self.settings), dict(self.computed))),
        ]
        sections[2:2] = search_sections(self.search)
        target = self.run / "report.html"
        target.write_text(page(self.run.name, verdict, sections, self.versions), encoding="utf-8")
        return target

    def close(self) -> None:
        """Write the last state, if there is any."""
        if (self.run / "log.jsonl").is_file():
            self.write()


def measure_table(evaluations: list[dict[str, Any]], most: int = 40) -> str:
    """Every measure at every evaluation, the best loss in bold."""
    if not evaluations:
        return "<p class=soft>–</p>"
    names = [name for name in evaluations[-1] if name.startswith("validation_")]
    best = min(entry["validation_loss"] for entry in evaluations)
    head = "".join(f"<th class=n>{escape(name.removeprefix('validation_'))}</th>" for name in names)
    rows = []
    for entry in evaluations[-most:]:
        values = "".join(f"<td class=n>{entry[name]:.4f}</td>" if name in entry else "<td></td>" for name in names)
        mark = " class=best" if entry["validation_loss"] == best else ""
        rows.append(
            f"<tr{mark}><td class=n>{entry['step']:,}</td><td class=n>{human_count(entry['tokens'])}</td>"
            f"<td class=n>{human_time(entry['elapsed'])}</td>{values}</tr>"
        )
    return (
        "<table><tr><th class=n>step · 步</th><th class=n>tokens · 词元</th><th class=n>time · 用时</th>"
        f"{head}</tr>{''.join(rows)}</table>"
    )
