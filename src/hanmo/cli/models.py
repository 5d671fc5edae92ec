"""``hanmo models``: which models are known and here, and what each is."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.outcome import Outcome
from hanmo.language import pick
from hanmo.progress import display_width, human_bytes, human_count
from hanmo.settings import CommonSettings, argument

if TYPE_CHECKING:
    from hanmo.inference.inspection import Listed

HELP = "which models are known and here: kind, size, licence, languages, tasks"
HELP_ZH = "列出已知和本机的模型：类型、大小、许可证、语言、任务"

TASKS_ZH = {
    "generate": "续写",
    "chat": "对话",
    "embed": "向量",
    "fill": "填空",
    "classify": "分类",
    "tag": "标注",
    "answer": "问答",
    "translate": "翻译",
    "rewrite": "改写",
    "similarity": "相似度",
}
LABELS_ZH = {
    "name": "名称",
    "kind": "类型",
    "architecture": "结构",
    "parameters": "参数",
    "size": "大小",
    "licence": "许可证",
    "languages": "语言",
    "tasks": "任务",
    "where": "位置",
    "format": "格式",
    "problem": "问题",
    "description": "说明",
    "hidden_size": "隐藏维度",
    "num_layers": "层数",
    "num_heads": "注意力头数",
    "vocab_size": "词表大小",
    "context_length": "上下文长度",
    "precision": "精度",
    "order": "阶数",
    "ngrams": "n 元组数",
    "method": "方法",
    "labels": "标签",
    "source": "来源",
    "metrics": "指标",
    "hanmo": "翰墨版本",
}
COLUMNS = ("name", "architecture", "parameters", "size", "licence", "languages", "tasks", "where")
NUMBERS = ("parameters", "size")  # stand to the right
NARROWEST = 8  # columns that a shortened cell keeps
NARROW = 100  # columns of a terminal below which the place is not shown
SHOWN_LANGUAGES = 3


@dataclass
class ModelsSettings(CommonSettings):
    """Settings of ``hanmo models``."""

    models: list[str] = argument(
        "a name for all that is known of it, or files and folders to search; default: the catalog, runs/ and the cache",
        zh="模型名称（查看详情），或要搜索的文件和文件夹；默认列出目录、runs/ 和缓存",
        many=True,
    )


def label(key: str) -> str:
    """The name of a column or a detail in the user's language."""
    return pick(key.replace("_", " "), LABELS_ZH.get(key, key))


def cells(listed: Listed) -> dict[str, str]:
    """What the table shows of a model; ``-`` where nothing is known."""
    languages = list(listed.languages)
    if len(languages) > SHOWN_LANGUAGES:
        languages = [*languages[:SHOWN_LANGUAGES], f"+{len(languages) - SHOWN_LANGUAGES}"]
    name, where = listed.name, listed.path or ""
    if listed.place in ("folder", "file"):  # named by its path, which stands in the last column
        parts = Path(where).parts
        name = "/".join(parts[-2:] if parts[-1] == "model" else parts[-1:])
    if listed.place == "catalog":
        where = pick("in the cache", "已下载") if listed.path else pick("to download", "未下载")
    values = {
        "name": name + (" !" if listed.problem else ""),
        "architecture": listed.architecture or listed.kind,
        "parameters": "" if listed.parameters is None else human_count(listed.parameters),
        "size": "" if listed.size is None else human_bytes(listed.size),
        "licence": listed.licence,
        "languages": ",".join(languages),
        "tasks": ",".join(pick(task, TASKS_ZH.get(task, task)) for task in listed.tasks),
        "where": where,
    }
    return {key: one_line(value) or "-" for key, value in values.items()}


def one_line(text: str) -> str:
    """Text of a file for a terminal: no line breaks, no control characters."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def shorten(text: str, width: int, *, keep_end: bool = False) -> str:
    """Cut a text to so many columns; a cut is marked.

    >>> shorten("千字文千字文", 7), shorten("runs/诗/model", 9, keep_end=True), shorten("abc", 3)
    ('千字文…', '…诗/model', 'abc')
    """
    if display_width(text) <= width:
        return text
    while text and display_width(text) > width - 1:
        text = text[1:] if keep_end else text[:-1]
    return "…" + text if keep_end else text + "…"


def column_widths(rows: list[dict[str, str]], columns: int | None) -> dict[str, int]:
    """The columns to show and their widths: the widest is made narrower until all fit (None: as wide as needed)."""
    shown = COLUMNS if columns is None or columns >= NARROW else COLUMNS[:-1]
    widths = {key: max(display_width(row[key]) for row in rows) for key in shown}
    free = [key for key in shown if key not in NUMBERS]
    while columns is not None and sum(widths.values()) + 2 * (len(widths) - 1) > columns:
        widest = max(free, key=lambda key: widths[key])
        if widths[widest] <= NARROWEST:
            break
        widths[widest] -= 1
    return widths


def table(found: list[Listed], columns: int | None = None) -> str:
    """The models as a table of at most ``columns`` columns of the terminal, and what is wrong with some of them."""
    rows = [{key: label(key) for key in COLUMNS}, *(cells(listed) for listed in found)]
    widths = column_widths(rows, columns)
    lines = []
    for row in rows:
        parts = []
        for key, width in widths.items():
            cell = shorten(row[key], width, keep_end=key == "where")
            space = " " * (width - display_width(cell))
            parts.append(space + cell if key in NUMBERS else cell + space)
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths.values()))
    lines += [one_line(f"! {listed.name}: {listed.problem}") for listed in found if listed.problem]
    return "\n".join(lines)


def details(listed: Listed) -> str:
    """All that is known of one model, a line each."""
    shown = cells(listed)
    rows: dict[str, Any] = {key: shown[key] for key in COLUMNS if key not in ("where", "languages")}
    rows |= {"name": listed.name, "kind": listed.kind, "languages": ",".join(listed.languages), "format": listed.format}
    rows["where"] = listed.path or shown["where"]
    if listed.parameters is not None:
        rows["parameters"] = f"{shown['parameters']} ({listed.parameters:,})"
    if listed.size is not None:
        rows["size"] = f"{shown['size']} ({listed.size:,})"
    more = dict(listed.details)
    chinese = more.pop("description_zh", "")
    if "description" in more:
        more["description"] = pick(str(more["description"]), str(chinese))
    rows |= more
    rows["problem"] = listed.problem
    rows = {key: value for key, value in rows.items() if value not in ("", "-", None, [], {})}
    width = max(display_width(label(key)) for key in rows)
    lines = []
    for key, value in rows.items():
        name = label(key)
        if isinstance(value, dict):
            value = [f"{part.replace('_', ' ')} {number}" for part, number in value.items()]
        text = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
        lines.append(name + " " * (width - display_width(name)) + "  " + one_line(shorten(text, 1000)))
    return "\n".join(lines)


def run(settings: ModelsSettings) -> Outcome:
    """List the models, or tell everything about the one that was named."""
    from hanmo.inference.inventory import find_model, local_models

    found = [listed for name in settings.models for listed in find_model(name)] if settings.models else local_models()
    if len(settings.models) == 1 and len(found) == 1:
        return Outcome({"model": asdict(found[0])}, details(found[0]))
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return Outcome({"models": [asdict(listed) for listed in found]}, table(found, columns))
