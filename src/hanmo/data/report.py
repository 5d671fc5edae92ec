"""The data report: what was found, what was left out, and how long, how varied and in which language the texts are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from hanmo.data.encodings import readable_name
from hanmo.data.problems import LISTED
from hanmo.data.readers import Reader
from hanmo.data.settings import DataSettings
from hanmo.data.sources import Listing, Source
from hanmo.data.splits import SPLITS, Shares
from hanmo.data.spool import Table
from hanmo.language import pick
from hanmo.progress import human_bytes, human_count
from hanmo.text.language import LANGUAGES

LANGUAGE_NAMES_ZH = {"zh": "中文", "en": "英文", "code": "代码", "mixed": "中英混合", "other": "其他"}


def make_report(
    listing: Listing,
    reader: Reader,
    table: Table,
    sides: np.ndarray,
    shares: Shares,
    duplicates: dict[str, Any],
    empty: int,
) -> dict[str, Any]:
    """The report as plain data.

    Args:
        listing: the files.
        reader: what was met while reading them.
        table: the documents that stay.
        sides: split of each document.
        shares: of validation and test.
        duplicates: see :func:`duplicate_summary`.
        empty: number of blank documents that were dropped.
    """
    settings = reader.settings
    used = [source for source in listing.sources if not source.skipped]
    sizes = table.ends - table.starts
    lengths = table.characters
    by_language = np.bincount(table.languages, weights=lengths, minlength=len(LANGUAGES)) / lengths.sum()
    return {
        "documents": len(table),
        "characters": int(lengths.sum()),
        "bytes": int(sizes.sum()),
        "files": {"read": len(used), "bytes": sum(source.size for source in used)},
        "formats": count_of(source.format for source in used),
        "encodings": count_of(readable_name(source.encoding) for source in used if source.encoding),
        "other_encodings": [
            {"file": source.name, "encoding": readable_name(source.encoding)}
            for source in used
            if source.encoding not in ("utf-8", "")
        ][:LISTED],
        "text_fields": [{"file": source.name, "field": source.field} for source in used if source.field][:LISTED],
        "sections": {"files": reader.cut_files, "bytes": reader.section_bytes},
        "languages": {name: round(float(by_language[i]), 4) for i, name in enumerate(LANGUAGES) if by_language[i]},
        "duplicates": duplicates,
        "empty_documents": empty,
        "lengths": length_summary(lengths),
        "split": {
            "method": settings.split,
            "seed": settings.seed,
            "validation_share": shares.validation,
            "test_share": shares.test,
            "reason": shares.reason,
        },
        "splits": {
            name: {
                "documents": int((sides == side).sum()),
                "characters": int(lengths[sides == side].sum()),
                "bytes": int(sizes[sides == side].sum()),
            }
            for side, name in enumerate(SPLITS)
        },
        "skipped_files": {
            "count": sum(bool(source.skipped) for source in listing.sources),
            "hidden": listing.hidden,
            "first": [{"file": s.name, "reason": s.skipped} for s in listing.sources if s.skipped][:LISTED],
        },
        "bad_records": {"count": reader.problems.count, "first": reader.problems.first},
        "normalization": normalization(settings),
    }


def duplicate_summary(table: Table, sources: list[Source], first: np.ndarray, removed: bool) -> dict[str, Any]:
    """How many documents are exact copies, and of what the first ones are copies.

    Args:
        table: all documents.
        sources: the files they are from.
        first: index of the first document with the same text, int64 ``[n]``.
        removed: whether the copies are taken out.
    """
    copies = np.flatnonzero(first != np.arange(len(first)))
    return {
        "documents": len(copies),
        "characters": int(table.characters[copies].sum()),
        "removed": removed,
        "first": [
            {"where": place(table, sources, copy), "copy_of": place(table, sources, int(first[copy]))}
            for copy in copies[:LISTED].tolist()
        ],
    }


def count_of(names: Iterable[str]) -> dict[str, int]:
    """How often each name occurs, most frequent first."""
    return dict(Counter(names).most_common())


def place(table: Table, sources: list[Source], row: int) -> str:
    """Where a document is from, as ``file:line``."""
    return f"{sources[int(table.files[row])].name}:{int(table.lines[row])}"


def length_summary(lengths: np.ndarray) -> dict[str, Any]:
    """Minimum, median, 95th percentile and maximum of document lengths in characters."""
    low, median, high, top = np.percentile(lengths, [0, 50, 95, 100]).round().astype(int).tolist()
    return {"unit": "characters", "min": low, "median": median, "p95": high, "max": top}


def normalization(settings: DataSettings) -> list[str]:
    """The steps that were applied."""
    steps = ["line ends", "control characters", "NFC"]
    return steps + ["half width"] * settings.half_width + ["simplified Chinese"] * settings.simplify


def describe(report: dict[str, Any], tokens: dict[str, Any] | None = None) -> str:
    """The report in a few lines, in the user's language.

    Args:
        report: :attr:`Corpus.report`.
        tokens: :attr:`TokenCorpus.report`, if the corpus is tokenised.
    """
    lines = [
        *input_lines(report),
        *text_lines(report),
        *split_lines(report),
        *problem_lines(report),
    ]
    if tokens:
        total = sum(tokens["tokens"].values())
        lines.append(
            pick(
                f"tokens       {human_count(total)} of a vocabulary of {tokens['vocab_size']:,}; "
                f"{tokens['characters_per_token']:.2f} characters and {tokens['bytes_per_token']:.2f} bytes per token",
                f"词元      {human_count(total)}（词表 {tokens['vocab_size']:,}）；"
                f"每词元 {tokens['characters_per_token']:.2f} 字符、{tokens['bytes_per_token']:.2f} 字节",
            )
        )
    return "\n".join(lines)


def share_list(shares: dict[str, float], names: dict[str, str]) -> str:
    """``zh 93%, en 7%``, largest first."""
    ordered = sorted(shares.items(), key=lambda entry: -entry[1])
    return ", ".join(f"{pick(name, names[name])} {share:.0%}" for name, share in ordered)


def input_lines(report: dict[str, Any]) -> list[str]:
    """What was read."""
    files = report["files"]
    formats = ", ".join(f"{count} {name}" for name, count in report["formats"].items())
    encodings = ", ".join(f"{count} {name}" for name, count in report["encodings"].items())
    lines = [
        pick(
            f"files        {files['read']:,} ({human_bytes(files['bytes'])}): {formats}",
            f"文件      {files['read']:,} 个（{human_bytes(files['bytes'])}）：{formats}",
        )
    ]
    if encodings:
        lines.append(pick(f"encodings    {encodings}", f"编码      {encodings}"))
    fields = [f"{entry['file']}: {entry['field']}" for entry in report["text_fields"][:5]]
    return lines + [pick("text field   ", "正文字段  ") + field for field in fields]


def text_lines(report: dict[str, Any]) -> list[str]:
    """What the documents are like."""
    lengths, duplicates, sections = report["lengths"], report["duplicates"], report["sections"]
    documents, total, size = report["documents"], human_count(report["characters"]), human_bytes(report["bytes"])
    lines = [
        pick(
            f"documents    {documents:,}; {total} characters, {size}",
            f"文档      {documents:,} 个；{total} 字符，{size}",
        ),
        pick(
            f"lengths      {lengths['min']:,} to {lengths['max']:,} characters; median {lengths['median']:,}, "
            f"95 % below {lengths['p95']:,}",
            f"长度      {lengths['min']:,} 至 {lengths['max']:,} 字符；中位数 {lengths['median']:,}，"
            f"95% 不超过 {lengths['p95']:,}",
        ),
        pick("languages    ", "语言      ") + share_list(report["languages"], LANGUAGE_NAMES_ZH),
    ]
    if sections["files"]:
        lines.append(
            pick(
                f"sections     {sections['files']:,} long texts were cut every {sections['bytes']:,} bytes or so",
                f"分段      {sections['files']:,} 个长文本被切成约 {sections['bytes']:,} 字节的段落",
            )
        )
    if duplicates["documents"]:
        characters = human_count(duplicates["characters"])
        done = pick("removed", "已去除") if duplicates["removed"] else pick("kept", "已保留")
        lines.append(
            pick(
                f"duplicates   {duplicates['documents']:,} exact copies ({characters} characters), {done}",
                f"重复      {duplicates['documents']:,} 份完全相同（{characters} 字符），{done}",
            )
        )
    return lines


def split_lines(report: dict[str, Any]) -> list[str]:
    """How the documents were divided."""
    names = {"train": "训练", "validation": "验证", "test": "测试"}
    parts = [
        pick(
            f"{name} {part['documents']:,} ({human_bytes(part['bytes'])})",
            f"{names[name]} {part['documents']:,}（{human_bytes(part['bytes'])}）",
        )
        for name, part in report["splits"].items()
    ]
    method, reason = report["split"]["method"], report["split"]["reason"]
    lines = [pick(f"splits       {', '.join(parts)}; by {method}", f"划分      {'，'.join(parts)}；方式 {method}")]
    return lines + ([pick(f"             {reason}", f"          {reason}")] if reason else [])


def problem_lines(report: dict[str, Any]) -> list[str]:
    """What was left out."""
    skipped, bad, empty = report["skipped_files"], report["bad_records"], report["empty_documents"]
    lines = []
    if empty:
        lines.append(
            pick(f"empty        {empty:,} blank documents were dropped", f"空白      丢弃 {empty:,} 个空白文档")
        )
    if skipped["count"] or skipped["hidden"]:
        shown = ", ".join(f"{entry['file']} ({entry['reason']})" for entry in skipped["first"][:3])
        lines.append(
            pick(
                f"left out     {skipped['count']:,} files, {skipped['hidden']:,} hidden  {shown}".rstrip(),
                f"跳过      {skipped['count']:,} 个文件，{skipped['hidden']:,} 个隐藏项  {shown}".rstrip(),
            )
        )
    if bad["count"]:
        lines.append(pick(f"bad records  {bad['count']:,}, skipped", f"坏记录    {bad['count']:,} 条，已跳过"))
        lines += [f"             {entry['where']}: {entry['what']}" for entry in bad["first"][:3]]
    return lines
