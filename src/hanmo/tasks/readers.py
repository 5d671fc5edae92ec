"""What answers questions: the best sentence, a network that finds spans, a language model that is asked; and a search
that gives them their passages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hanmo.data.tasks.types import QuestionAnswer
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.settings import notice
from hanmo.tasks.answers import RANKS, Passage, Reply
from hanmo.tasks.base import Form, System
from hanmo.tasks.prompts import Prompt, Speaker, choose_shots, mark_of, mostly_chinese
from hanmo.tasks.retrieval import PassageIndex, best_first, cut_passages, sentences_in

LONGEST_ANSWER = 64  # tokens of a language model
LONGEST_SHOT = 600  # characters of the text of a worked example
LONGEST_QUESTION = 500  # characters of a question that a language model reads
PIECES = (600, 150, 40)  # width of the pieces of a text that is longer than the context; smaller where none fits
FEW = 20  # texts that are read without telling how it goes
RARER = 3.0  # of the logarithm of a rank
BLANKS = re.compile(r"\s+")
NOTHING = re.compile(
    r"\W*(?:no[ -]?answer|unanswerable|not? (?:stated|mentioned|given)|the text does not (?:say|tell)"
    r"|无答案|没有答案|文中没有|文中未提|未提及)",
    re.IGNORECASE,
)
LEAD = re.compile(r"^(?:the answer is|answer|答案|回答)\s*(?:[:：]|是|\b)\s*", re.IGNORECASE)
QUOTES = " \t\"'“”‘’「」『』`"
STOPS = ".。"


# Baseline -------------------------------------------------------------------------------------------------------------


class BestSentence(System[QuestionAnswer, Reply]):
    """The sentence that is most like the question, by BM25 among the sentences of its text."""

    def __init__(self) -> None:
        self.name = pick("best BM25 sentence", "BM25 最佳句")

    def answer(self, records: Sequence[QuestionAnswer]) -> list[Reply]:
        """A sentence each; none of an empty text."""
        kept: dict[str, list[tuple[int, str]]] = {}
        replies = []
        for record in records:
            sentences = kept.setdefault(record.context, sentences_in(record.context))
            if not sentences:
                replies.append(Reply("", passage=Passage(record.context)))
                continue
            start, text = sentences[best_first(record.question, [text for _, text in sentences])[0]]
            replies.append(Reply(text, start, None, Passage(record.context)))
        return replies


# A network that finds spans -------------------------------------------------------------------------------------------


class SpanReader(System[QuestionAnswer, Reply]):
    """A network with a head for the two ends of an answer; long texts are read in overlapping windows.

    Args:
        encoder: a :class:`~hanmo.inference.encoder.TextEncoder` whose task is that.
        always: whether an answer is given even where none seems likelier, as where all records have one.
        threshold: by how much the score of an answer must be above that of none.
    """

    kind = "encoder"

    def __init__(self, encoder: Any, *, always: bool = False, threshold: float = 0.0) -> None:
        self.encoder, self.name, self.always, self.threshold = encoder, encoder.name, always, threshold
        self.cut = 0

    def answer(self, records: Sequence[QuestionAnswer]) -> list[Reply]:
        """The best span of each text, or none."""
        self.cut = 0
        bar = Progress(pick("reading", "阅读"), len(records), "texts") if len(records) > FEW else None
        replies = []
        for number, record in enumerate(records, 1):
            replies.append(self.read(record))
            if bar is not None:
                bar.update(number)
        if bar is not None:
            bar.close()
        if self.cut:
            notice(
                pick(
                    f"{self.cut:,} questions leave no room for a text; their beginning was read",
                    f"{self.cut:,} 个问题过长，只读了开头",
                )
            )
        return replies

    def read(self, record: QuestionAnswer) -> Reply:
        """The answer to one question."""
        found = self.encoder.answer(self.fitting(record.question), record.context)
        passage, margin = Passage(record.context), found.score - found.no_answer_score
        if not found.text or not (self.always or margin > self.threshold):
            return Reply("", None, -margin if found.text else None, passage)
        return Reply(found.text, found.start, margin, passage)

    def fitting(self, question: str) -> str:
        """As much of a question as leaves room for a text."""
        encoder = self.encoder
        _, offsets = encoder.tokenizer.encode_with_offsets(question)
        most = (encoder.max_length - encoder.wrapping.overhead(pair=True)) // 2
        if len(offsets) <= most:
            return question
        self.cut += 1
        return question[: offsets[most - 8][1]]

    def signature(self) -> Mapping[str, Any]:
        """From when on none is likelier."""
        return {"answers": "always"} if self.always else {"threshold": self.threshold}


# A language model that is asked ---------------------------------------------------------------------------------------


class PromptedReader(System[QuestionAnswer, Reply]):
    """A language model that is asked to answer from the text, or to say that it does not tell.

    Of a text that is longer than the context it reads the pieces that BM25 finds, in their order.

    Args:
        model: local or remote.
        train: records for worked examples, which tell the language, too.
        form: how many examples, and the instruction.
    """

    def __init__(self, model: Any, train: Sequence[QuestionAnswer], form: Form) -> None:
        self.speaker, self.name, self.given = Speaker(model), model.name, form.instruction
        self.kind = self.speaker.kind
        self.chinese = mostly_chinese([record.question for record in train]) if train else None
        self.shots = tuple(
            (self.question(record.question, short_context(record)), record.answers[0][0] if record.answers else none)
            for record in choose_shots(train, form.shots, form.seed)
            for none in (self.wording(record.question)[3],)
        )

    def wording(self, question: str) -> tuple[str, str, str, str, str]:
        """Instruction, name of the text, of the question, what to say where there is no answer, name of the answer."""
        chinese = mostly_chinese([question]) if self.chinese is None else self.chinese
        if chinese:
            own = "根据文本回答问题，只抄写文本中的原词，越短越好，不要解释。文本没有说明时，只回答“无答案”。"
            return self.given or own, "文本：", "问题：", "无答案", "答案："
        own = (
            "Answer the question from the text. Copy the words of the text, as few as possible, and explain nothing. "
            "If the text does not tell, answer: no answer"
        )
        return self.given or own, "Text: ", "Question: ", "no answer", "Answer:"

    def question(self, question: str, context: str) -> str:
        """How a question is shown."""
        _, text, asked, _, _ = self.wording(question)
        return f"{text}{context}\n{asked}{question}"

    def prompt(self, question: str, context: str) -> Prompt:
        """The whole prompt."""
        instruction, _, _, _, lead = self.wording(question)
        return Prompt(instruction, self.question(question, context), self.shots, lead)

    def fits(self, question: str, context: str) -> bool:
        """Is there room for it and its answer?"""
        limit = self.speaker.model.context_length
        return limit is None or self.speaker.size(self.prompt(question, context)) + LONGEST_ANSWER <= int(limit)

    def readable(self, record: QuestionAnswer) -> tuple[str, str]:
        """The question and as much of its text as fits: the pieces that are most like the question, in their order."""
        asked, text = record.question[:LONGEST_QUESTION], record.context
        if self.fits(asked, text):
            return asked, text
        for size in PIECES:
            pieces = [text[start:end] for start, end in cut_passages(text, size)]
            kept: list[int] = []
            for place in best_first(asked, pieces):
                tried = sorted([*kept, place])
                if not self.fits(asked, "\n".join(pieces[i] for i in tried)):
                    break
                kept = tried
            if kept:
                return asked, "\n".join(pieces[i] for i in kept)
        text = text[: PIECES[-1]]
        while len(asked) > 1 and not self.fits(asked, text):
            asked = asked[: len(asked) // 2]
        return asked, text

    def answer(self, records: Sequence[QuestionAnswer]) -> list[Reply]:
        """What the model writes, found again in the text where it stands there."""
        asked = [place for place, record in enumerate(records) if record.context.strip()]
        written = dict.fromkeys(range(len(records)), "")
        bar = Progress(pick("asking", "提问"), len(asked), "texts")
        for begin in range(0, len(asked), 16):
            some = asked[begin : begin + 16]
            prompts = [self.prompt(*self.readable(records[place])) for place in some]
            answers = self.speaker.write(prompts, max_new_tokens=LONGEST_ANSWER)
            written.update(zip(some, answers, strict=True))
            bar.update(begin + len(some))
        bar.close()
        return [in_context(cleaned(written[place]), record.context) for place, record in enumerate(records)]

    def signature(self) -> Mapping[str, Any]:
        """The prompt and its examples."""
        return mark_of(self.prompt("", ""), len(self.shots))


def short_context(record: QuestionAnswer) -> str:
    """The text of a worked example: around its answer, if it is long."""
    if len(record.context) <= LONGEST_SHOT:
        return record.context
    middle = record.answers[0][1] if record.answers else 0
    begin = max(0, min(middle - LONGEST_SHOT // 2, len(record.context) - LONGEST_SHOT))
    return record.context[begin : begin + LONGEST_SHOT].strip()


def cleaned(written: str) -> str:
    """An answer without what models put around it; empty where it says that there is none.

    >>> cleaned('Answer: "in 1851".\\nThe text says so.'), cleaned("No answer.")
    ('in 1851', '')
    """
    line = next((line.strip() for line in written.splitlines() if line.strip()), "")
    line = LEAD.sub("", line.strip(QUOTES))
    if NOTHING.match(line):
        return ""
    return line.strip(QUOTES + STOPS) if not re.search(r"\b\w\.\w\.$", line) else line.strip(QUOTES)


def in_context(answer: str, context: str) -> Reply:
    """An answer with its place in the text, whatever its case and white space; without one, if it is worded anew."""
    passage = Passage(context)
    if not answer:
        return Reply("", None, None, passage)
    start = context.find(answer)
    if start >= 0:
        return Reply(answer, start, None, passage)
    pattern = r"\s+".join(map(re.escape, BLANKS.split(answer)))
    found = re.search(pattern, context, re.IGNORECASE)
    if found:
        return Reply(found[0], found.start(), None, passage)
    return Reply(answer, None, None, passage)


# Search and read ------------------------------------------------------------------------------------------------------


class OpenBook(System[QuestionAnswer, Reply]):
    """A reader whose passages are found by a search; the best of their answers is given.

    Which is best, the reader's score says, less what it takes to believe a passage that was found later: three times
    the logarithm of its rank, about as much rarer as such passages are right. (Of 839 questions of SQuAD 76 % have
    their passage at rank 1, some 3 % at each of the next four.) Of a reader without scores it is the first answer.

    Args:
        reader: answers questions about a text.
        index: what is searched.
        top: how many passages are read.
    """

    def __init__(self, reader: System[QuestionAnswer, Reply], index: PassageIndex, top: int) -> None:
        self.reader, self.index, self.top, self.kind = reader, index, top, reader.kind
        self.name = reader.name

    def answer(self, records: Sequence[QuestionAnswer]) -> list[Reply]:
        """Search, read all passages of all questions, and choose."""
        found = [self.index.search(record.question, max(self.top, RANKS[-1])) for record in records]
        tasks = [
            (number, place, replace(record, context=passage.text))
            for number, (record, passages) in enumerate(zip(records, found, strict=True))
            for place, passage in enumerate(passages[: self.top])
        ]
        read: list[dict[int, Reply]] = [{} for _ in records]
        for (number, place, _), reply in zip(tasks, self.reader.answer([task for *_, task in tasks]), strict=True):
            read[number][place] = reply
        return [best_of(replies, passages) for replies, passages in zip(read, found, strict=True)]

    def signature(self) -> Mapping[str, Any]:
        """What is searched, and how many passages are read."""
        return {**self.reader.signature(), **self.index.signature(), "top": self.top}


def best_of(replies: Mapping[int, Reply], passages: Sequence[Passage]) -> Reply:
    """The best answer, with the passage that it is from; none where no passage tells."""
    told = {place: reply for place, reply in replies.items() if reply.text}
    if not told:
        return Reply("", None, None, passages[0] if passages else None, tuple(passages))
    values = {place: (told[place].score or 0.0) - RARER * math.log(place + 1) for place in told}
    best = max(told, key=lambda place: (values[place], -place))
    return replace(told[best], passage=passages[best], found=tuple(passages))
