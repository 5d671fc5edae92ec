"""Summarization: a short text that says what a long one says; news, papers and their titles, mail, dialogues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hanmo.data.tasks.types import Pair
from hanmo.language import pick
from hanmo.tasks.base import Form, System, Task
from hanmo.tasks.extractive import Lead, Ranker, TextRank
from hanmo.tasks.prompts import Prompt, choose_shots, mark_of, mostly_chinese
from hanmo.tasks.rewriting import Rewriter
from hanmo.tasks.rouge import SummaryMetric

LONGEST = 1500  # characters of the text of a worked example
USUAL_TOKENS = 160  # of a summary, where no training records tell
PART = 0.25  # of a part's tokens that its own summary may have
MOST_PART = 1024  # tokens of a part, where a text is longer than the context
MOST_ROUNDS = 8


class Summarizer(System[Pair, str]):
    """A language model: an encoder-decoder reads the bare text, others are asked.

    A text that is longer than the context is summarized in parts, and then the summaries of the parts, until it fits
    (map and reduce).

    Args:
        model: local or remote.
        train: pairs that tell how long a summary is, and the worked examples.
        form: how many examples; its instruction stands before a text that an encoder-decoder reads.
    """

    def __init__(self, model: Any, train: Sequence[Pair], form: Form) -> None:
        self.name, self.given = model.name, form.instruction
        self.chinese = mostly_chinese([record.source for record in train]) if train else None
        self.words = self.usual_length(train)
        self.shots: tuple[tuple[str, str], ...] = ()
        tokens = 4 * self.words if self.words else USUAL_TOKENS
        self.rewriter = Rewriter(model, self.prompt, growth=1.0, most=max(48, tokens), prefix=self.prefix)
        self.kind = self.rewriter.speaker.kind
        if not self.rewriter.bare:
            field = self.wording("")[1]
            self.shots = tuple(
                (field + record.source[:LONGEST].strip(), record.target.strip())
                for record in choose_shots(train, form.shots, form.seed)
            )

    def usual_length(self, train: Sequence[Pair]) -> int | None:
        """Words of a summary, or characters where it is Chinese; None where nothing tells."""
        if not train:
            return None
        lengths = [len(record.target) if self.chinese else len(record.target.split()) for record in train[:1000]]
        return max(4, int(np.percentile(lengths, 75)))

    def wording(self, text: str) -> tuple[str, str, str]:
        """Instruction, name of the text, name of the summary."""
        chinese = mostly_chinese([text]) if self.chinese is None else self.chinese
        if chinese:
            size = f"不超过 {self.words} 字" if self.words else "三句话以内"
            return self.given or f"概括下面的文本，{size}，只回答摘要。", "文本：", "摘要："
        size = f"at most {self.words} words" if self.words else "at most three sentences"
        return self.given or f"Summarize the text in {size}. Answer with the summary only.", "Text: ", "Summary:"

    def prefix(self, text: str) -> str:
        """What an encoder-decoder reads before a text."""
        del text
        return self.given or ""

    def prompt(self, text: str) -> Prompt:
        """How a text is asked about."""
        instruction, field, lead = self.wording(text)
        return Prompt(instruction, field + text, self.shots, lead)

    def answer(self, records: Sequence[Pair]) -> list[str]:
        """The summaries; long texts are brought to the length of the context before."""
        texts = [" ".join(record.source.split()) if self.rewriter.bare else record.source for record in records]
        for _ in range(MOST_ROUNDS):
            long = [i for i, text in enumerate(texts) if not self.rewriter.fits(text)]
            if not long:
                break
            for i, text in zip(long, self.reduced([texts[i] for i in long]), strict=True):
                texts[i] = text
        texts = [text if self.rewriter.fits(text) else self.beginning(text) for text in texts]
        return self.rewriter.write(texts, pick("summarizing", "摘要"))

    def reduced(self, texts: Sequence[str]) -> list[str]:
        """The summaries of the parts of each text, one after the other; never longer than the text."""
        parts = [list(self.rewriter.pieces(" ".join(text.split()), MOST_PART)) for text in texts]
        written = self.rewriter.write([part for some in parts for part in some], pick("summarizing parts", "分段摘要"))
        out, begin = [], 0
        for some in parts:
            short = [
                answer if 0 < len(answer) < len(part) else part[: int(len(part) * PART)]
                for answer, part in zip(written[begin : begin + len(some)], some, strict=True)
            ]
            out.append("\n".join(short))
            begin += len(some)
        return out

    def beginning(self, text: str) -> str:
        """As much of a text as fits."""
        return next(self.rewriter.pieces(" ".join(text.split()), MOST_PART), "")

    def signature(self) -> Mapping[str, Any]:
        """The prompt and its examples; of an encoder-decoder what stands before its texts."""
        if self.rewriter.bare:
            return {"prefix": repr(self.given)} if self.given else {}
        return mark_of(self.prompt(""), len(self.shots))


class Summarization(Task[Pair, str]):
    """Short texts that say what long ones say."""

    name, kind, training, whole = "summarization", "pair", "seq2seq", True
    aliases = ("summary", "summarisation", "summarize")
    help = "short texts that say what long ones say: sentences of the text, or written by a model"
    help_zh = "摘要：从原文选句，或由模型撰写"

    def metric(self, records: Sequence[Pair]) -> SummaryMetric:
        """ROUGE; the references' language decides the tokens."""
        return SummaryMetric(records)

    def baselines(self, records: Sequence[Pair]) -> list[System[Pair, str]]:
        """The first sentence; as many of the first as training records say."""
        del records
        return [Lead(1), Lead()]

    def candidates(self, records: Sequence[Pair]) -> list[System[Pair, str]]:
        """Central sentences; sentences ranked by a regression."""
        del records
        return [TextRank(), Ranker()]

    def system(self, model: Any, train: Sequence[Pair] = (), form: Form | None = None) -> System[Pair, str]:
        """An encoder, whose vectors tell which sentences are central; a language model of any kind."""
        from hanmo.inference.encoder import TextEncoder

        if isinstance(model, TextEncoder):
            system = TextRank(model)
            if train:
                system.fit(train)
            system.learns = False
            return system
        if not hasattr(model, "generate"):
            raise self.cannot(
                model,
                fix="take an encoder for vectors of sentences, an encoder-decoder (hanmo finetune --task seq2seq), "
                "or a language model that can be asked",
                zh="该模型不能用于摘要；请使用句向量编码器、编码器—解码器（hanmo finetune --task seq2seq）"
                "或可提示的语言模型",
            )
        return Summarizer(model, train, form or Form())

    def record(self, text: str) -> Pair:
        """A text without a summary."""
        return Pair(text, "")

    def as_data(self, answer: str) -> dict[str, Any]:
        """The summary."""
        return {"summary": answer}

    def describe(self, record: Pair, answer: str) -> str:
        """The summary."""
        del record
        return answer
