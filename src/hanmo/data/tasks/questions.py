"""Questions about a text: SQuAD (versions 1 and 2), DRCD, CMRC 2018, and one question per record in jsonl or tables.

An answer must stand in its context where the record says. A start that is wrong is repaired where the answer occurs
once; a start that is not given is the first place where the answer occurs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from hanmo.data.tasks.files import LineFinder, RecordFile
from hanmo.data.tasks.formats import JSON_FORMATS
from hanmo.data.tasks.named import Roles, named_rows, names
from hanmo.data.tasks.types import Answer, QuestionAnswer
from hanmo.language import pick
from hanmo.text.normalize import SURROGATE

ROLES = Roles(
    ("context", "question"),
    ("answers", "start", "span", "id", "title", "impossible"),
    (
        names(
            context="context passage context_text paragraph text document article 上下文 篇章 原文",
            question="question query query_text 问题",
            answers="answers answer answer_text 答案 回答",
            start="answer_start start start_position answer_begin 起始",
            span="span answer_span token_span",
            id="id qid query_id question_id 编号",
            title="title 标题",
            impossible="is_impossible unanswerable",
        ),
    ),
)
LISTS = ("qas", "questions")
EXPECTED = '{"context": "...", "question": "...", "answers": [{"text": "...", "answer_start": 0}]}'
WORD = re.compile(r"\S+")


class BadAnswer(Exception):
    """Why a question cannot be used."""


def read_questions(file: RecordFile) -> Iterator[QuestionAnswer]:
    """The questions of a file.

    Raises:
        DataError: it cannot be told which key or column is what.
    """
    finder = LineFinder(file)  # before anything is read
    if file.format in JSON_FORMATS and is_nested(file):
        yield from nested_questions(file, finder)
        return
    file.on_piece = None
    for row in named_rows(file, ROLES, None):
        values = row.values
        if "answers" not in file.report.taken and "impossible" not in file.report.taken:
            # named_rows has told what it took: no record of this file has answers
            raise file.error(
                row.line,
                "the records have no answers",
                row.raw,
                EXPECTED,
                pick("say which key or column it is: --fields answers=NAME", "请指定：--fields answers=名称"),
                "记录中没有答案",
            )
        given = values.get("answers")
        if values.get("start") is not None and not isinstance(given, dict):
            given = {"text": given, "answer_start": values["start"]}
        parts = {"answers": given, "span": values.get("span"), "is_impossible": values.get("impossible")}
        name = str(values["id"]) if values.get("id") is not None else f"{file.name}:{row.line}"
        yield from question(file, row.line, row.raw, name, values, parts)


def is_nested(file: RecordFile) -> bool:
    """Whether the records are articles or paragraphs with lists of questions."""
    first = [value for _, value in file.sample_objects(1) if isinstance(value, dict)]
    return any("paragraphs" in value or any(isinstance(value.get(key), list) for key in LISTS) for value in first)


def nested_questions(file: RecordFile, finder: LineFinder) -> Iterator[QuestionAnswer]:
    """The questions of articles with paragraphs (SQuAD), or of paragraphs (CMRC)."""
    file.report.taken.update(
        context=pick("'context' or 'context_text' of a paragraph", "段落的 context 或 context_text"),
        question=pick("'question' or 'query_text' in its 'qas'", "qas 中的 question 或 query_text"),
        answers="'answers'",
    )
    for line, article in file.objects():
        if not isinstance(article, dict):
            file.bad(line, pick("not an article", "不是文章"), article, '{"title": "...", "paragraphs": [...]}')
            continue
        paragraphs = article.get("paragraphs", [article])
        if not isinstance(paragraphs, list) or not all(isinstance(item, dict) for item in paragraphs):
            file.bad(line, pick("'paragraphs' is not a list of objects", "paragraphs 不是对象列表"), article, EXPECTED)
            continue
        for paragraph in paragraphs:
            context = paragraph.get("context", paragraph.get("context_text"))
            asked = next((paragraph[key] for key in LISTS if isinstance(paragraph.get(key), list)), None)
            if not isinstance(context, str) or asked is None:
                what = pick("the paragraph has no context or no qas", "段落没有 context 或 qas")
                file.bad(line, what, paragraph, EXPECTED)
                continue
            for item in asked:
                if not isinstance(item, dict):
                    file.bad(line, pick("a question is not an object", "问题不是对象"), item, EXPECTED)
                    continue
                text = item.get("question", item.get("query_text"))
                place = finder.find(text, line) if isinstance(text, str) else line
                name = str(item.get("id", item.get("query_id", f"{file.name}:{place}")))
                values = {"context": context, "question": text, "title": article.get("title")}
                yield from question(file, place, item, name, values, item)


def question(
    file: RecordFile, line: int, raw: Any, name: str, values: dict[str, Any], parts: dict[str, Any]
) -> Iterator[QuestionAnswer]:
    """One record, or none if it is bad.

    Args:
        name: its id.
        values: ``context``, ``question`` and perhaps ``title``.
        parts: ``answers`` in any layout, perhaps ``is_impossible`` and ``span`` (first and last word of the answer).
    """
    context, asked = values["context"], values["question"]
    expected = EXPECTED
    try:
        if not isinstance(asked, str) or not asked.strip() or not isinstance(context, str) or not context.strip():
            raise BadAnswer(pick("the question or its context is empty", "问题或上下文为空"))
        context = SURROGATE.sub("\ufffd", context)
        answers: tuple[Answer, ...] = ()
        if not is_true(parts.get("is_impossible")):
            if "answers" not in parts or parts["answers"] is None:
                raise BadAnswer(pick("there are no answers", "没有 answers"))
            expected = pick("an answer that stands in the context where it says", "答案在上下文的所示位置")
            answers = answers_of(file, context, parts["answers"], parts.get("span"))
    except BadAnswer as error:
        file.bad(line, pick(f"question {name}: {error}", f"问题 {name}：{error}"), raw, expected)
        return
    if not answers:
        file.report.notes[pick("a question without answer in the text", "文中没有答案的问题")] += 1
    title = values.get("title")
    text = SURROGATE.sub("\ufffd", asked.strip())
    yield QuestionAnswer(
        name, context, text, answers, title if isinstance(title, str) else "", file=file.name, line=line
    )


def answers_of(file: RecordFile, context: str, value: Any, span: Any) -> tuple[Answer, ...]:
    """The answers with their places, each once.

    Raises:
        BadAnswer: there are some, and none stands in the context.
    """
    found: list[Answer] = []
    failure: BadAnswer | None = None
    given = texts_and_starts(value)
    for text, start in given:
        try:
            found.append(locate(file, context, text, start if start is not None else start_of_span(context, span)))
        except BadAnswer as error:
            failure = error
    if failure is not None:
        if not found:
            raise failure
        file.report.notes[
            pick("an answer that is not in the text, beside good ones", "个别答案不在文中，其余可用")
        ] += 1
    return tuple(dict.fromkeys(found))


def texts_and_starts(value: Any) -> list[tuple[str, int | None]]:
    """The answers in any layout: a text, a list of texts or objects, or lists of texts and starts side by side.

    Raises:
        BadAnswer: it is none of these.
    """
    if isinstance(value, dict):
        texts = value.get("text")
        starts = value.get("answer_start", value.get("start"))
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        if starts is None and isinstance(texts, list):
            starts = [None] * len(texts)
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise BadAnswer(pick("texts and starts of the answers do not match", "答案的 text 与 answer_start 不对应"))
        value = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if isinstance(value, str):
        value = [value] if value.strip() else []
    if not isinstance(value, list):
        raise BadAnswer(pick("the answers are not texts", "答案不是文本"))
    result: list[tuple[str, int | None]] = []
    for item in value:
        text = item.get("text") if isinstance(item, dict) else item
        start = item.get("answer_start", item.get("start")) if isinstance(item, dict) else None
        if isinstance(start, str) and start.strip().isdigit():
            start = int(start)
        if not isinstance(text, str) or not text.strip() or isinstance(start, bool):
            raise BadAnswer(pick("an answer is empty or not a text", "答案为空或不是文本"))
        result.append((SURROGATE.sub("\ufffd", text), start if isinstance(start, int) else None))
    return result


def locate(file: RecordFile, context: str, text: str, start: int | None) -> Answer:
    """The answer where it really stands, without blanks around it.

    Raises:
        BadAnswer: it does not stand there, and elsewhere not or more than once.
    """
    if start is not None and start >= 0 and context.startswith(text, start):
        return text.strip(), start + len(text) - len(text.lstrip())
    text = text.strip()
    if start is not None and start >= 0 and context.startswith(text, start):
        return text, start
    count = context.count(text)
    first = context.find(text)
    if start is None and count:
        if count > 1:
            note = pick("an answer without start: the first of several places was taken", "答案无起点，取首次出现处")
            file.report.notes[note] += 1
        return text, first
    if count == 1:
        file.report.notes[pick("the start of an answer was repaired", "修正了答案的起点")] += 1
        return text, first
    if not count:
        raise BadAnswer(pick(f"the answer '{text}' is not in the context", f"答案“{text}”不在上下文中"))
    there = context[start : start + len(text)] if start is not None and start >= 0 else ""
    raise BadAnswer(
        pick(
            f"the answer '{text}' is not at {start} (there is '{there}'), but at {count} other places",
            f"答案“{text}”不在 {start} 处（那里是“{there}”），而另有 {count} 处",
        )
    )


def start_of_span(context: str, span: Any) -> int | None:
    """The character where the first word of a span of words begins; None where that is not known.

    >>> start_of_span("one two three", [1, 2])
    4
    """
    if not (isinstance(span, list) and len(span) == 2 and all(isinstance(place, int) for place in span)):
        return None
    for number, word in enumerate(WORD.finditer(context)):
        if number == span[0]:
            return word.start()
    return None


def is_true(value: Any) -> bool:
    """Whether a flag is set, also in a table."""
    return value is True or value == 1 or (isinstance(value, str) and value.strip().lower() in ("true", "1", "yes"))
