"""Scores of systems as plain text: a line for each, every number with its interval, then who is better in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hanmo.evaluation.scoring import Difference, Measured, Score, WinRate
from hanmo.language import pick
from hanmo.progress import display_width

MEASURES = {  # names for people; those of which only one form is usual stay as they are
    "accuracy": ("accuracy", "准确率"),
    "macro_f1": ("macro F1", "宏平均 F1"),
    "micro_f1": ("micro F1", "微平均 F1"),
    "ece": ("ECE", "ECE"),
    "f1": ("F1", "F1"),
    "precision": ("precision", "精确率"),
    "recall": ("recall", "召回率"),
    "exact_match": ("exact match", "完全匹配"),
    "has_answer_f1": ("F1 where there is an answer", "有答案的 F1"),
    "has_answer_exact_match": ("exact match where there is one", "有答案的完全匹配"),
    "no_answer_accuracy": ("right without answer", "无答案判对率"),
    "recall@1": ("recall@1", "召回率@1"),
    "recall@5": ("recall@5", "召回率@5"),
    "recall@20": ("recall@20", "召回率@20"),
    "token_accuracy": ("token accuracy", "词元准确率"),
    "bleu": ("BLEU", "BLEU"),
    "chrf": ("chrF", "chrF"),
    "form": ("form kept", "合体裁"),
    "lines": ("lines", "句数"),
    "length": ("length", "字数"),
    "rhyme": ("rhyme", "押韵"),
    "syllables": ("syllables", "音节"),
    "greeting": ("greeting", "称呼"),
    "body": ("body", "正文"),
    "closing": ("closing", "结语"),
    "signature": ("signature", "署名"),
    "distinct_1": ("distinct-1", "distinct-1"),
    "distinct_2": ("distinct-2", "distinct-2"),
    "self_bleu": ("self-BLEU", "self-BLEU"),
    "bits_per_character": ("bits/character", "比特/字"),
    "rougeL": ("ROUGE-L", "ROUGE-L"),
    "sound_rougeL": ("sound ROUGE-L", "合格 ROUGE-L"),
    "loss": ("loss", "损失"),
    "bits_per_byte": ("bits/byte", "比特/字节"),
    "checks": ("all rules", "全部规则"),
    "answered": ("answered", "有回答"),
    "ended": ("ended", "自行结束"),
    "language": ("language", "语言相符"),
    "no_loop": ("no loop", "不循环"),
    "no_echo": ("no echo", "不照抄"),
    "instructions": ("instructions", "遵循指令"),
    "prompt_strict": ("prompt strict", "整题（严格）"),
    "prompt_loose": ("prompt loose", "整题（宽松）"),
    "instruction_strict": ("instruction strict", "单项（严格）"),
    "instruction_loose": ("instruction loose", "单项（宽松）"),
    "obeyed": ("obeyed", "遵循"),
}
WIDEST = 6  # measures in a table; what is left stands in a table below


def title(measure: str) -> str:
    """The name of a measure for people."""
    return pick(*MEASURES.get(measure, (measure, measure)))


def cell(measured: Measured | None) -> str:
    """A number and its interval."""
    if measured is None or measured.value != measured.value:
        return "-"
    if measured.interval is None:
        return f"{measured.value:.4f}"
    return f"{measured.value:.4f} [{measured.interval.low:.3f}, {measured.interval.high:.3f}]"


def columns(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells under each other: the first column to the left, the others to the right; a rule under the head."""
    widths = [max(display_width(line[place]) for line in cells) for place in range(len(cells[0]))]
    lines = []
    for line in cells:
        parts = []
        for place, (text, width) in enumerate(zip(line, widths, strict=True)):
            space = " " * (width - display_width(text))
            parts.append(text + space if place == 0 else space + text)
        lines.append("  ".join(parts).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def tables(names: Sequence[str], rows: Sequence[tuple[str, Mapping[str, Measured]]]) -> list[str]:
    """Lines of one table, or of several under each other where there are many measures."""
    lines: list[str] = []
    for begin in range(0, len(names), WIDEST):
        some = names[begin : begin + WIDEST]
        head = [pick("system", "系统"), *map(title, some)]
        lines += [""] if lines else []
        lines += columns([head, *([name, *(cell(found.get(one)) for one in some)] for name, found in rows)])
    return lines


def render_scores(
    scores: Sequence[Score],
    differences: Sequence[Difference | WinRate] = (),
    *,
    chance: Mapping[str, float] | None = None,
) -> str:
    """A table of systems on the same records.

    Args:
        scores: in the order to show.
        differences: told in a sentence each under the table.
        chance: what blind guessing reaches, by measure.
    """
    names = list(dict.fromkeys(name for score in scores for name in score.measures))
    names.sort(key=lambda name: name != scores[0].primary)
    rows = [(score.name, score.measures) for score in scores]
    if chance:
        guess = {name: Measured(value) for name, value in chance.items()}
        rows.insert(0, (pick("blind guess", "随机猜测"), guess))
    lines = tables(names, rows)
    clean = [(score.name, score.without_leaks) for score in scores if score.without_leaks]
    if clean:
        lines += ["", pick("without the records that the training data hold:", "去除训练集中出现过的记录后：")]
        lines += tables(names, clean)
    n = scores[0].n
    lines += [
        "",
        pick(
            f"n = {n:,}; in brackets 95 % intervals (bootstrap over records)",
            f"n = {n:,}；方括号内为 95% 置信区间（对记录做自助法）",
        ),
    ]
    lines += [difference.sentence() for difference in differences]
    lines += [f"{score.name}: {score.signature}" for score in scores]
    return "\n".join(lines)


def render_details(details: Mapping[str, Any]) -> str:
    """Measures by label, the table of confusions where it is small enough, counts; empty where there are none."""
    lines = [f"{name}: {count:,}" for name, count in details.get("counts", {}).items()]
    if by_label := details.get("labels"):
        fields = list(next(iter(by_label.values())))
        head = [pick("label", "标签"), *(pick(*MEASURES.get(field, (field, field))) for field in fields)]
        body = [
            [label, *(f"{row[f]:.3f}" if isinstance(row[f], float) else str(row[f]) for f in fields)]
            for label, row in by_label.items()
        ]
        lines += columns([head, *body])
    confusion = details.get("confusion")
    if confusion and by_label and len(by_label) <= 12:
        names = [*by_label, pick("other", "其他")]
        lines += ["", pick("rows: right labels, columns: given ones", "行：正确标签；列：给出的标签")]
        used = [i for i in range(len(names)) if i < len(by_label) or any(row[i] for row in confusion)]
        lines += columns(
            [
                ["", *(names[i] for i in used)],
                *([name, *(str(row[i]) for i in used)] for name, row in zip(names, confusion, strict=False)),
            ]
        )
    return "\n".join(lines)
