"""The comparison of models as plain text, with the line that says what exactly was measured."""

from __future__ import annotations

from collections.abc import Sequence

from hanmo import __version__
from hanmo.evaluation.comparison import Comparison
from hanmo.evaluation.likelihood import Likelihood, describe_unit
from hanmo.language import pick
from hanmo.progress import display_width


def signature(**fields: object) -> str:
    """``key:value|key:value|...``, closed by Hanmo's version: results with different signatures cannot be compared.

    >>> signature(data="3fa9", split="test").rpartition("|")[0]
    'data:3fa9|split:test'
    """
    return "|".join(f"{key}:{value}" for key, value in {**fields, "hanmo": __version__}.items())


def render_table(rows: Sequence[Likelihood], comparisons: Sequence[Comparison] = (), *, signature: str) -> str:
    """A table of models in the user's language: bits per byte with its interval, perplexity, loss; then comparisons.

    Args:
        rows: measured on the same documents, in the order to show.
        comparisons: told in a sentence each under the table.
        signature: from :func:`signature`.
    """
    header = [
        pick("model", "模型"),
        pick("bits per byte", "比特/字节"),
        pick("95% CI", "95% 置信区间"),
        pick("perplexity", "困惑度"),
        pick("nats per token", "纳特/词元"),
    ]
    cells = [header]
    for row in rows:
        interval = row.bits_per_byte_interval
        shown = f"{interval.low:.3f} - {interval.high:.3f}" if interval else "-"
        cells.append([row.name, f"{row.bits_per_byte:.3f}", shown, f"{row.perplexity:,.2f}", f"{row.loss:.4f}"])
    widths = [max(display_width(line[column]) for line in cells) for column in range(len(header))]
    lines = [_line(line, widths) for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += _footer(rows)
    lines += [comparison.sentence() for comparison in comparisons]
    return "\n".join([*lines, signature])


def _footer(rows: Sequence[Likelihood]) -> list[str]:
    """What the numbers were measured on and how the intervals came about."""
    if not rows:
        return []
    row = rows[0]
    unit, unit_zh = describe_unit(row.unit)
    return [
        pick(
            f"{row.documents:,} documents, {row.bytes:,} bytes, {row.tokens:,} tokens (document ends included); "
            f"intervals: bootstrap over {row.units:,} {unit}, {row.resamples:,} resamples",
            f"{row.documents:,} 篇文档，{row.bytes:,} 字节，{row.tokens:,} 个词元（含文档结束符）；"
            f"置信区间：对 {row.units:,} {unit_zh}做自助法，重抽样 {row.resamples:,} 次",
        )
    ]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first column to the left, the numbers to the right."""
    parts = []
    for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        space = " " * (width - display_width(cell))
        parts.append(cell + space if column == 0 else space + cell)
    return "  ".join(parts)
