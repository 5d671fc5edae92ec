"""Question answering: the answer to a question from a text that is given, or from the passages of many.

Where a text does not tell, the answer is empty. In many passages the search (``retrieval``) finds those that are read,
and the best of their answers is given, with the passage that it is from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hanmo.data.tasks.types import QuestionAnswer
from hanmo.errors import UsageError
from hanmo.language import pick
from hanmo.tasks.answers import AnswerMetric, Passage, Reply
from hanmo.tasks.base import Form, Ground, System, Task
from hanmo.tasks.readers import BestSentence, OpenBook, PromptedReader, SpanReader
from hanmo.tasks.retrieval import PassageIndex, passages_of_documents, sentences_in

GUESSED = 200  # records whose sentences are guessed from
SHOWN = 300  # characters of a passage


class QuestionAnswering(Task[QuestionAnswer, Reply]):
    """Answers from texts."""

    name, kind, training = "question-answering", "question_answer", "question-answering"
    aliases = ("qa", "questions", "reading")
    help = "answers to questions from a text, or from a folder of documents with the passage cited"
    help_zh = "问答：从给定文本或一个文件夹的文档中找答案，并注明出处"
    inputs = ("text", "context")

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.about = Ground()
        self.index: PassageIndex | None = None

    def ground(self, ground: Ground) -> None:
        """What questions are about: a text, documents, or the passages of all records.

        Raises:
            DataError: there is no text in the documents.
            UsageError: more than one of the three is given, or fewer than one passage is to be read.
        """
        if (ground.context is not None) + (ground.documents is not None) + bool(ground.records) > 1:
            raise UsageError(
                "a text, documents and the passages of records are answers to one question",
                fix="give only one of --context, --documents and --open-book",
                zh="--context、--documents、--open-book 只能给一个",
            )
        if ground.top < 1:
            raise UsageError("--top must be at least 1", zh="--top 至少为 1")
        self.about, self.index = ground, None
        if ground.documents is not None:
            self.index = PassageIndex(passages_of_documents(ground.documents), ground.encoder)
        elif ground.records:
            texts = dict.fromkeys(record.context for record in ground.records)
            self.index = PassageIndex([Passage(text) for text in texts], ground.encoder)

    def grounded(self, reader: System[QuestionAnswer, Reply]) -> System[QuestionAnswer, Reply]:
        """A reader that is given its passages by the search, where there is one."""
        return reader if self.index is None else OpenBook(reader, self.index, self.about.top)

    def metric(self, records: Sequence[QuestionAnswer]) -> AnswerMetric:
        """Exact match and F1; the language of the questions decides the rules."""
        return AnswerMetric(records)

    def baselines(self, records: Sequence[QuestionAnswer]) -> list[System[QuestionAnswer, Reply]]:
        """The sentence that BM25 finds."""
        del records
        return [self.grounded(BestSentence())]

    def system(
        self, model: Any, train: Sequence[QuestionAnswer] = (), form: Form | None = None
    ) -> System[QuestionAnswer, Reply]:
        """A network with a head for spans, or a language model that is asked."""
        from hanmo.inference.encoder import TextEncoder

        if isinstance(model, TextEncoder) and model.task == "span-extraction":
            always = bool(train) and all(record.answers for record in train)
            return self.grounded(SpanReader(model, always=always, threshold=self.about.threshold))
        if not hasattr(model, "generate"):
            raise self.cannot(model)
        return self.grounded(PromptedReader(model, train, form or Form()))

    def record(self, text: str) -> QuestionAnswer:
        """A question about the text that is given, or a text after a tab; none is needed where passages are searched.

        Raises:
            UsageError: there is no question, or nothing that it could be about.
        """
        question, tab, context = text.partition("\t")
        if not tab:
            context = self.about.context or ""
        if not question.strip():
            raise UsageError(
                "the question is empty",
                fix='hanmo qa --model MODEL --context FILE "question"',
                zh='问题为空：hanmo qa --model 模型 --context 文件 "问题"',
            )
        if self.index is None and not context.strip():
            raise UsageError(
                "there is no text that the question is about",
                fix="give a text or a file with --context, files or folders with --documents, or the text after a tab",
                zh="没有可供回答的文本：请用 --context 给出文本或文件，用 --documents 给出文件夹，"
                "或在问题后加制表符与文本",
            )
        return QuestionAnswer("", context, question.strip(), ())

    def record_from(self, data: Mapping[str, str]) -> QuestionAnswer:
        """A question (``text``) about a ``context``, which may have been given before; see :meth:`record`."""
        if not data.get("context", "").strip():
            return self.record(data["text"].replace("\t", " "))
        return QuestionAnswer("", data["context"], data["text"].strip(), ())

    def as_data(self, answer: Reply) -> dict[str, Any]:
        """The answer, where it stands in its passage, and the passage, where one was searched for."""
        data: dict[str, Any] = {"answer": answer.text or None, "score": answer.score}
        passage = answer.passage
        if answer.start is not None and answer.text:
            data |= {"start": answer.start, "end": answer.start + len(answer.text)}
        if passage is not None and self.index is not None:
            data |= {"file": passage.file, "line": line_of(answer), "passage": passage.text}
        return data

    def describe(self, record: QuestionAnswer, answer: Reply) -> str:
        """The answer; with its source where passages were searched."""
        del record
        text = " ".join(answer.text.split()) or pick("no answer", "没有答案")
        passage = answer.passage
        if self.index is None or passage is None or not answer.text:
            return text
        where = f"{passage.file}:{line_of(answer)}: " if passage.file else ""
        return f"{text}\n  {where}{excerpt(passage.text, answer.start or 0)}"

    def chance(self, records: Sequence[QuestionAnswer]) -> dict[str, float]:
        """The F1 of any sentence of the text, whichever it is; of some records, evenly from first to last."""
        step = -(-len(records) // GUESSED)
        some = records[:: max(1, step)]
        metric, total = self.metric(records), 0.0
        for record in some:
            sentences = sentences_in(record.context)
            total += sum(metric.best(record, text)[1] for _, text in sentences) / max(1, len(sentences))
        return {"f1": total / len(some)} if some and self.index is None else {}


def line_of(answer: Reply) -> int:
    """The line on which an answer begins, or its passage where it does not stand there literally; 0 without a file."""
    passage = answer.passage
    if passage is None or not passage.file:
        return 0
    return passage.line + passage.text.count("\n", 0, answer.start or 0)


def excerpt(text: str, place: int, most: int = SHOWN) -> str:
    """A text on one line; of a long one what stands around a place.

    >>> excerpt("one two\\nthree four five", 9, 12)
    '…two three f…'
    """
    begin = max(0, min(place - most // 2, len(text) - most))
    shown = " ".join(text[begin : begin + most].split())
    return "…" * (begin > 0) + shown + "…" * (begin + most < len(text))
