"""The report of a run as one HTML page without any outside resource: data, training, evaluation, samples, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from hanmo.evaluation.search_report import search_sections
from hanmo.language import language
from hanmo.progress import human_bytes, human_count, human_time
from hanmo.text.report import REFERENCE
from hanmo.training.search_record import SearchRecord

STYLE = """
:root { --ink: #1d1b18; --soft: #6d675e; --paper: #fbf8f1; --line: #ddd5c5; --seal: #a8321f; --blue: #2f5d8a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ece6da; --soft: #a39b8d; --paper: #1b1a18; --line: #3a3733; --seal: #e2725f; --blue: #7fb0df; }
}
body { margin: 2.5rem auto; max-width: 54rem; padding: 0 1.2rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, "Noto Sans SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.9rem; margin-bottom: 0; }
h2 { margin-top: 2.4rem; font-size: 1.15rem; border-bottom: 1px solid var(--line); }
p.verdict { font-size: 1.1rem; border-left: 3px solid var(--seal); padding-left: 1rem; }
.soft { color: var(--soft); font-size: .9rem; }
code, pre { font: .85rem/1.5 ui-monospace, Menlo, monospace; }
code { overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.best td { font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 2px solid var(--line); padding-left: 1rem; }
pre b { color: var(--seal); font-weight: 600; }
svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; }
.train { stroke: var(--blue); fill: none; stroke-width: 1.2; opacity: .55; }
.validation { stroke: var(--seal); fill: none; stroke-width: 2; }
.grid { stroke: var(--line); }
"""


@dataclass
class Sample:
    """A prompt from held-out text and what the model wrote after it."""

    prompt: str
    text: str


@dataclass
class ReportContent:
    """Everything on the page, as plain data.

    Args:
        name: of the run.
        data: the data report (:mod:`hanmo.data.report`); ``tokens`` the report of the token corpus.
        tokenizer: its rows on the built-in samples (:mod:`hanmo.text.report`).
        plan: lines that describe the network and the estimates.
        log: the entries of the run's log.
        evaluation: rows, comparison and signature, as :meth:`Evaluation.as_dict` gives them.
        verdict: the comparison in words.
        timings: seconds of each stage.
        settings, computed: the settings in force and the reasons of the computed ones.
        search: what a search over settings tried, if there was one.
    """

    name: str
    data: dict[str, Any]
    tokens: dict[str, Any]
    tokenizer: list[dict[str, Any]]
    plan: dict[str, str]
    log: list[dict[str, Any]]
    evaluation: dict[str, Any]
    verdict: str
    samples: list[Sample]
    timings: dict[str, float]
    settings: dict[str, Any]
    computed: dict[str, str]
    versions: dict[str, str]
    search: SearchRecord | None = None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a run's log, as if it had never been interrupted.

    A line that a kill cut off is left out; so are steps that were done again after a resumption.
    """
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "loss" in entry:
            while entries and entries[-1]["step"] >= entry["step"]:
                entries.pop()
        entries.append(entry)
    return entries


def render(content: ReportContent) -> str:
    """The page as HTML text; every value is escaped."""
    sections = [
        ("Evaluation · 评测", evaluation_table(content.evaluation)),
        ("Loss · 损失曲线", loss_curve(content.log)),
        ("Samples · 样例", samples(content.samples)),
        ("Data · 数据", pairs(data_rows(content.data, content.tokens))),
        ("Tokenizer · 分词器", tokenizer_table(content.tokenizer)),
        ("Model and estimates · 模型与估计", pairs(list(content.plan.items()))),
        ("Time · 用时", pairs([(name, human_time(seconds)) for name, seconds in content.timings.items()])),
        ("Settings and why · 设置与理由", settings_table(content.settings, content.computed)),
    ]
    sections[2:2] = search_sections(content.search)
    return page(content.name, content.verdict, sections, content.versions)


def page(name: str, verdict: str, sections: Sequence[tuple[str, str]], versions: Mapping[str, str]) -> str:
    """A whole page from its sections, titles and HTML."""
    body = "".join(f"<h2>{escape(title)}</h2>{html}" for title, html in sections)
    made = " · ".join(f"{tool} {version}" for tool, version in versions.items())
    return (
        f'<!doctype html><html lang="{language()}"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} · Hanmo</title><style>{STYLE}</style>"
        f"<h1>{escape(name)}</h1><p class=soft>Hanmo 翰墨 · {escape(made)}</p>"
        f"<p class=verdict>{escape(verdict)}</p>{body}</html>\n"
    )


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """The models side by side; the best one in bold."""
    rows = evaluation["rows"]
    best = min(row["bits_per_byte"] for row in rows)
    head = (
        "<tr><th>model · 模型</th><th class=n>bits per byte · 比特/字节</th><th class=n>95 % CI</th>"
        "<th class=n>perplexity · 困惑度</th><th class=n>nats per token</th></tr>"
    )
    lines = []
    for row in rows:
        interval = row["bits_per_byte_interval"]
        shown = f"{interval[0]:.3f} – {interval[1]:.3f}" if interval else "–"
        mark = " class=best" if row["bits_per_byte"] == best else ""
        lines.append(
            f"<tr{mark}><td>{escape(row['name'])}</td><td class=n>{row['bits_per_byte']:.3f}</td>"
            f"<td class=n>{shown}</td><td class=n>{row['perplexity']:,.2f}</td><td class=n>{row['loss']:.4f}</td></tr>"
        )
    row = rows[0]
    note = (
        f"{row['documents']:,} documents, {row['bytes']:,} bytes, {row['tokens']:,} tokens of held-out text; "
        f"intervals by bootstrap over {row['units']:,} {row['resampled']}."
    )
    return (
        f"<table>{head}{''.join(lines)}</table><p class=soft>{escape(note)}<br>"
        f"<code>{escape(evaluation['signature'])}</code></p>"
    )


def data_rows(data: dict[str, Any], tokens: dict[str, Any]) -> list[tuple[str, str]]:
    """The data report in rows."""
    lengths, duplicates, files = data["lengths"], data["duplicates"], data["files"]
    languages = ", ".join(
        f"{name} {share:.0%}" for name, share in sorted(data["languages"].items(), key=lambda x: -x[1])
    )
    splits = ", ".join(
        f"{name} {part['documents']:,} ({human_bytes(part['bytes'])})" for name, part in data["splits"].items()
    )
    encodings = ", ".join(f"{name} {count}" for name, count in data["encodings"].items())
    return [
        ("files · 文件", f"{files['read']:,} ({human_bytes(files['bytes'])})"),
        ("encodings · 编码", encodings or "–"),
        ("documents · 文档", f"{data['documents']:,} ({human_count(data['characters'])} characters)"),
        ("languages · 语言", languages),
        (
            "lengths · 长度",
            f"median {lengths['median']:,}, 95 % below {lengths['p95']:,}, longest {lengths['max']:,} characters",
        ),
        ("duplicates · 重复", f"{duplicates['documents']:,}"),
        ("bad records · 坏记录", f"{data['bad_records']['count']:,}"),
        ("splits · 划分", splits),
        (
            "tokens · 词元",
            f"{human_count(sum(tokens['tokens'].values()))}; vocabulary {tokens['vocab_size']:,}; "
            f"{tokens['characters_per_token']:.2f} characters per token",
        ),
    ]


def tokenizer_table(rows: Sequence[dict[str, Any]]) -> str:
    """Characters per token on the built-in samples, beside a known tokenizer."""
    names = ("this · 本模型", REFERENCE, "UTF-8")
    head = "<tr><th>text · 文本</th>" + "".join(f"<th class=n>{escape(name)}</th>" for name in names) + "</tr>"
    lines = [
        f"<tr><td>{escape(row['name'])}</td><td class=n>{row['characters_per_token']:.2f}</td>"
        f"<td class=n>{row['reference_characters_per_token']:.2f}</td>"
        f"<td class=n>{row['raw_characters_per_token']:.2f}</td></tr>"
        for row in rows
    ]
    note = "<p class=soft>characters per token, more is better · 每词元字符数，越大越好</p>"
    return f"<table>{head}{''.join(lines)}</table>{note}"


def samples(items: Sequence[Sample]) -> str:
    """Prompts in bold, the model's continuation after them."""
    if not items:
        return "<p class=soft>–</p>"
    return "".join(f"<pre><b>{escape(item.prompt)}</b>{escape(item.text)}</pre>" for item in items)


def settings_table(settings: dict[str, Any], computed: dict[str, str]) -> str:
    """Every setting; the computed ones with their reason."""
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td><code>{escape(str(value))}</code></td>"
        f"<td class=soft>{escape(computed.get(name, ''))}</td></tr>"
        for name, value in settings.items()
        if value not in (None, [], "")
    ]
    return f"<table>{''.join(rows)}</table>"


def loss_curve(log: Sequence[dict[str, Any]], width: int = 860, height: int = 300) -> str:
    """Training and validation loss over tokens, as an inline SVG picture."""
    train = thin([(entry["tokens"], entry["loss"]) for entry in log if "loss" in entry])
    evaluations = [entry for entry in log if "validation_loss" in entry and "whole" not in entry]
    validation = [(entry["tokens"], entry["validation_loss"]) for entry in evaluations]
    values = [y for _, y in train + validation if math.isfinite(y)]
    if not values:
        return "<p class=soft>–</p>"
    left, bottom, right, top = 48, height - 34, width - 10, 10
    most = max(x for x, _ in train + validation)
    low, high = min(values), max(values)
    span = high - low or 1.0

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(
            f"{left + x / most * (right - left):.1f},{bottom - (y - low) / span * (bottom - top):.1f}"
            for x, y in points
        )

    lines = []
    for step in range(5):
        value = low + span * step / 4
        y = bottom - (bottom - top) * step / 4
        lines.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" />')
        lines.append(f'<text x="4" y="{y + 4:.1f}">{value:.2f}</text>')
    for step in range(5):
        x = left + (right - left) * step / 4
        anchor = "end" if step == 4 else "middle"
        lines.append(f"<text x={x:.1f} y={height - 12} text-anchor={anchor}>{human_count(most * step / 4)}</text>")
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss over tokens">{"".join(lines)}'
        f'<polyline class="train" points="{path(train)}" />'
        f'<polyline class="validation" points="{path(validation)}" /></svg>'
        "<p class=soft>nats per token over training tokens · 训练词元数与每词元损失: thin blue · 细蓝 training · 训练, "
        "red · 红 validation · 验证</p>"
    )


def thin(points: list[tuple[float, float]], keep: int = 400) -> list[tuple[float, float]]:
    """At most ``keep`` points, each the mean of its neighbours, so that long runs stay readable."""
    if len(points) <= keep:
        return points
    size = len(points) / keep
    groups = [points[int(i * size) : int((i + 1) * size)] for i in range(keep)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
