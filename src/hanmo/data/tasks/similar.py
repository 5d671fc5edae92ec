"""Texts that belong together, for embeddings: pairs, triplets, pairs with a score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.named import NUMBER, Column, Roles, ambiguous, as_text, named_rows, names
from hanmo.data.tasks.types import Similar
from hanmo.language import pick

SCORE = "score similarity label similarity_score gold_label 分数 相似度 标签"
ROLES = Roles(
    ("anchor", "positive"),
    ("negative", "score"),
    (
        names(anchor="anchor 锚", positive="positive pos 正例", negative="negative neg 负例", score=SCORE),
        names(
            anchor="query question sentence text",
            positive="positive pos positive_passage positives",
            negative="negative neg hard_negative negatives",
            score=SCORE,
        ),
        names(anchor="sentence1 句子1", positive="sentence2 句子2", negative="sentence3 句子3", score=SCORE),
        names(anchor="text1 text_a 文本1", positive="text2 text_b 文本2", score=SCORE),
        names(anchor="question1 q1", positive="question2 q2", score=SCORE + " is_duplicate"),
        names(anchor="query question 问题", positive="answer passage document response 答案", score=SCORE),
        names(anchor="title 标题", positive="body abstract text 正文 摘要", score=SCORE),
    ),
)


def read_similar(file: RecordFile) -> Iterator[Similar]:
    """The pairs and triplets of a file; a list of positives gives a record for each, with the negatives dealt out.

    Raises:
        DataError: it cannot be told which key or column is what.
    """
    for row in named_rows(file, ROLES, looks):
        anchor = as_text(row.values["anchor"])
        positives = texts_of(row.values["positive"])
        negatives = texts_of(row.values.get("negative", []))
        if not anchor or not positives or negatives is None:
            what = pick("a text is empty or missing", "有文本为空或缺失")
            file.bad(row.line, what, row.raw, pick("two or three texts", "两段或三段文本"))
            continue
        score = row.values.get("score")
        number = score_of(score)
        if score is not None and number is None:
            file.bad(row.line, pick("the score is not a number", "分数不是数字"), row.raw, pick("a number", "数字"))
            continue
        if any(negative in (anchor, *positives) for negative in negatives):
            what = pick("the negative is equal to the anchor or a positive", "负例与锚文本或正例相同")
            file.bad(row.line, what, row.raw, pick("another text", "另一段文本"))
            continue
        if len(negatives) > len(positives):
            unused = pick("a negative beyond the first of a positive was left out", "每个正例只用一个负例，其余未用")
            file.report.notes[unused] += len(negatives) - len(positives)
        for place, positive in enumerate(positives):
            negative = negatives[place % len(negatives)] if negatives else None
            yield Similar(anchor, positive, negative, number, file=file.name, line=row.line)


def texts_of(value: Any) -> list[str] | None:
    """The texts in a text or a list of texts, of an empty cell none; None if one in a list is empty or no text."""
    if value is None or value == "":
        return []
    texts = [as_text(item) for item in value] if isinstance(value, list) else [as_text(value)]
    whole = [text for text in texts if text]
    return whole if len(whole) == len(texts) else None


def score_of(value: Any) -> float | None:
    """A finite number, also written as text; else None.

    >>> score_of("0.5"), score_of(True), score_of("high")
    (0.5, 1.0, None)
    """
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def looks(file: RecordFile, columns: list[Column], given: dict[str, int]) -> dict[str, tuple[int, str]]:
    """The columns of a table without header: two or three texts in their order, then perhaps a number.

    Raises:
        DataError: there are more or fewer columns, or a number elsewhere.
    """
    found = {role: (number, pick("as named", "按指定")) for role, number in given.items()}
    rest = [column for column in columns if column.number not in given.values()]
    if "score" not in found and len(rest) > 2 - len(found) and rest and rest[-1].numeric:
        found["score"] = (rest.pop().number, pick("numbers", "数字"))
    open_roles = [role for role in ("anchor", "positive", "negative") if role not in found]
    needed = [role for role in ("anchor", "positive") if role not in found]
    if not len(needed) <= len(rest) <= len(open_roles) or any(column.numeric for column in rest):
        raise ambiguous(file, columns, ("anchor", "positive"))
    reason = pick("the texts, in their order", "按列的先后")
    found.update({role: (column.number, reason) for role, column in zip(open_roles, rest, strict=False)})
    return found
