"""Translation: Chinese to English, English to Chinese, or whatever the pairs are.

The floor is a dictionary that is learnt from the same pairs (IBM Model 1) and used word for word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hanmo.data.tasks.types import Pair
from hanmo.language import pick
from hanmo.tasks.base import Form, System, Task
from hanmo.tasks.bleu import TranslationMetric
from hanmo.tasks.prompts import Prompt, choose_shots, mark_of, mostly_chinese
from hanmo.tasks.rewriting import Rewriter
from hanmo.text.segment import segment
from hanmo.text.sentences import join_words

LONGEST = 400  # characters of a worked example
GROWTH = 3.0  # tokens of a translation for each of its source, at most: Chinese may cost a token a byte
PIECE = 256  # tokens of the sentences that a language model is given together
SENTENCES = 64  # the same for encoder-decoders, which have learnt from single sentences
SENTENCE_END = frozenset(".!?。！？")

INSTRUCTIONS = {  # (is the source Chinese, is the target) -> instruction, name of the source, name of the target
    (True, False): (
        "Translate the Chinese text into English. Answer with the translation only.",
        "Chinese: ",
        "English:",
    ),
    (False, True): ("把下面的英文译成中文，只回答译文。", "英文：", "中文："),
    (True, True): ("改写下面的文本，只回答结果。", "原文：", "结果："),
    (False, False): ("Translate the text. Answer with the translation only.", "Text: ", "Translation:"),
}


# Baselines ------------------------------------------------------------------------------------------------------------


class Copy(System[Pair, str]):
    """The source as it is: what names, numbers and signs alone are worth."""

    def __init__(self) -> None:
        self.name = pick("the source itself", "照抄原文")

    def answer(self, records: Sequence[Pair]) -> list[str]:
        """The sources."""
        return [record.source for record in records]


class Dictionary(System[Pair, str]):
    """Each word by its likeliest translation, in the order of the source; words never seen stay as they are.

    Words are compared in lower case; a translation is written as it mostly is inside a sentence.
    """

    kind, learns = "baseline", True

    def __init__(self) -> None:
        self.name = pick("word-for-word dictionary (IBM Model 1)", "逐词词典（IBM 模型 1）")
        self.words: dict[str, str] = {}

    def fit(self, train: Sequence[Pair], validation: Sequence[Pair] = ()) -> None:
        """Learn the dictionary."""
        from hanmo.models.lexical import LexicalTable

        del validation
        targets = [segment(record.target) for record in train]
        forms = usual_forms(targets)
        lowered = [[word.lower() for word in words] for words in targets]
        sources = [[word.lower() for word in segment(record.source)] for record in train]
        table = LexicalTable().fit(list(zip(sources, lowered, strict=True)))
        self.words = {source: forms[target] for source, target in table.best.items()}

    def answer(self, records: Sequence[Pair]) -> list[str]:
        """Word for word, line by line."""
        return ["\n".join(map(self.line, record.source.splitlines())) for record in records]

    def line(self, text: str) -> str:
        """A line; sentences begin with a capital."""
        words: list[str] = []
        for word in segment(text):
            known = self.words.get(word.lower(), word)
            words.append(known[:1].upper() + known[1:] if not words or words[-1] in SENTENCE_END else known)
        return join_words(words)


def usual_forms(sentences: Sequence[Sequence[str]]) -> dict[str, str]:
    """How each word is mostly written inside sentences, where case says something; by its lower case."""
    inside: dict[str, Counter[str]] = {}
    for words in sentences:
        for place, word in enumerate(words):
            inside.setdefault(word.lower(), Counter())[word] += 1 if place else 0
    return {low: max(forms, key=lambda form: (forms[form], form == low)) for low, forms in inside.items()}


# Language models ------------------------------------------------------------------------------------------------------


class Translator(System[Pair, str]):
    """A language model: an encoder-decoder reads the bare source, others are asked.

    A long text is translated in pieces of whole sentences, line by line.

    Args:
        model: local or remote.
        train: pairs that tell the languages, and the worked examples. Without them, Chinese is translated into
            English, and everything else into Chinese.
        form: how many examples; its instruction stands before a source that an encoder-decoder reads.
    """

    def __init__(self, model: Any, train: Sequence[Pair], form: Form) -> None:
        self.name = model.name
        self.given = form.instruction
        self.languages: tuple[bool, bool] | None = None
        if train:
            self.languages = chinese([record.source for record in train]), chinese([record.target for record in train])
        self.shots: tuple[tuple[str, str], ...] = ()
        self.rewriter = Rewriter(model, self.prompt, growth=GROWTH, most=1024, prefix=self.prefix)
        self.kind = self.rewriter.speaker.kind
        if not self.rewriter.bare:
            _, field, _ = self.words("")
            self.shots = tuple(
                (field + short(record.source), short(record.target))
                for record in choose_shots(train, form.shots, form.seed)
            )

    def words(self, text: str) -> tuple[str, str, str]:
        """Instruction, name of the source, name of the translation."""
        own, field, lead = INSTRUCTIONS[self.direction(text)]
        return self.given or own, field, lead

    def direction(self, text: str) -> tuple[bool, bool]:
        """Whether the source is Chinese, and the translation."""
        if self.languages is not None:
            return self.languages
        source = chinese([text])
        return source, not source

    def prefix(self, text: str) -> str:
        """What an encoder-decoder reads before a source: as told, else what it has learnt to be told."""
        told: Mapping[str, str] = getattr(self.rewriter.model, "target_prefixes", {})
        own = told.get("zh" if self.direction(text)[1] else "en", "")
        return own if self.given is None else self.given

    def prompt(self, text: str) -> Prompt:
        """How a source is asked about."""
        instruction, field, lead = self.words(text)
        return Prompt(instruction, field + text, self.shots, lead)

    def answer(self, records: Sequence[Pair]) -> list[str]:
        """The translations, with the lines of the sources."""
        pieces: list[str] = []
        places: list[list[list[int]]] = []  # of each record, of each of its lines, its pieces
        for record in records:
            places.append([])
            for line in record.source.splitlines():
                cut = list(self.rewriter.pieces(line, SENTENCES if self.rewriter.bare else PIECE))
                places[-1].append(list(range(len(pieces), len(pieces) + len(cut))))
                pieces += cut
        written = self.rewriter.write(pieces, pick("translating", "翻译"))
        return ["\n".join(join_words([written[i] for i in line]) for line in lines).strip() for lines in places]

    def signature(self) -> Mapping[str, Any]:
        """The prompt and its examples; of an encoder-decoder what stands before its sources."""
        if self.rewriter.bare:
            return {"prefix": repr(self.given)} if self.given else {}
        return mark_of(self.prompt(""), len(self.shots))


def chinese(texts: Sequence[str]) -> bool:
    """Are most texts Chinese?"""
    return mostly_chinese(texts)


def short(text: str) -> str:
    """A text as part of a worked example: one line, not too long."""
    return " ".join(text.split())[:LONGEST]


class Translation(Task[Pair, str]):
    """Texts in another language."""

    name, kind, training = "translation", "pair", "seq2seq"
    aliases = ("mt", "translate")
    help = "texts in another language: Chinese to English, English to Chinese"
    help_zh = "翻译：中译英、英译中"

    def metric(self, records: Sequence[Pair]) -> TranslationMetric:
        """BLEU and chrF; the references' language decides BLEU's tokens."""
        return TranslationMetric(records)

    def baselines(self, records: Sequence[Pair]) -> list[System[Pair, str]]:
        """The source itself; the dictionary."""
        del records
        return [Copy(), Dictionary()]

    def system(self, model: Any, train: Sequence[Pair] = (), form: Form | None = None) -> System[Pair, str]:
        """A language model of any kind."""
        if not hasattr(model, "generate"):
            raise self.cannot(
                model,
                fix="take an encoder-decoder (hanmo finetune --task seq2seq), or a language model that can be asked",
                zh="该模型不能翻译；请使用编码器—解码器（hanmo finetune --task seq2seq）或可提示的语言模型",
            )
        return Translator(model, train, form or Form())

    def record(self, text: str) -> Pair:
        """A text without a translation."""
        return Pair(text, "")

    def as_data(self, answer: str) -> dict[str, Any]:
        """The translation."""
        return {"translation": answer}

    def describe(self, record: Pair, answer: str) -> str:
        """The translation."""
        del record
        return answer
