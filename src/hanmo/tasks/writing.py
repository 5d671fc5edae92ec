"""Writing: poems, stories, mail. What can be checked is the form; how varied texts are, and how well a model foresees
what people wrote, are measured beside it. Whether a text is good is not.

Letters in names: N texts, K numbers of a text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hanmo.data.tasks.types import Prompted
from hanmo.errors import UsageError
from hanmo.language import pick
from hanmo.tasks.base import Form, System, Task
from hanmo.tasks.drafting import SEEDS, Drafter, learnt_model
from hanmo.tasks.forms import FORMS, VERSES, check, form_like, form_name
from hanmo.tasks.prompts import Prompt, choose_shots, mark_of, mostly_chinese
from hanmo.tasks.writing_metric import WritingMetric, Written

TEMPERATURE = 0.8
NEW_TOKENS = 400
LINE_TOKENS = 200  # of short verse
MOST_TRIES = 256
NGRAM = 5  # characters
SCORED = 8  # references that are scored together
BY_FORM = {  # what a model that answers is told; others read the name of the form
    "五言绝句": "写一首五言绝句：四句，每句五个汉字，偶数句押韵。",
    "七言绝句": "写一首七言绝句：四句，每句七个汉字，偶数句押韵。",
    "五言律诗": "写一首五言律诗：八句，每句五个汉字，偶数句押同一平声韵。",
    "七言律诗": "写一首七言律诗：八句，每句七个汉字，偶数句押同一平声韵。",
    "书信": "写一封信：先称呼，再正文，然后祝颂语，最后署名，各占一行。",
    "haiku": "Write a haiku: three lines of 5, 7 and 5 syllables.",
    "couplet": "Write a couplet: two lines that rhyme.",
    "limerick": "Write a limerick: five lines that rhyme AABBA, the third and fourth shorter.",
    "letter": "Write a letter: a greeting, the text, a closing, and a name, on lines of their own.",
}
assert set(BY_FORM) == set(FORMS)
ONLY = ("Answer with the text only.", "只回答作品本身。")


def is_chinese(form: str, text: str) -> bool:
    """Whether a text is to be Chinese: its form says it, or else its prompt."""
    return "\u4e00" <= form[0] <= "\u9fff" if form else mostly_chinese([text])


def begin_of(form: str, text: str, layout: str | None = None) -> str:
    """What a model that only goes on with texts reads before the text that it writes.

    A Chinese poem stands below its form and title, as ``benchmarks/writing.py`` lays out the poems that a decoder
    learns; a prompt without a form is gone on with as it is.

    Args:
        layout: another one, with ``{form}`` and ``{prompt}``.

    >>> begin_of("五言绝句", "春雨")
    '五言绝句《春雨》\\n'
    """
    if layout:
        return layout.replace("{form}", form).replace("{prompt}", text)
    if not form:
        return text
    return f"{form}《{text}》\n" if is_chinese(form, text) else f"{form.capitalize()}: {text}\n\n"


class Writer(System[Prompted, Written]):
    """A language model.

    Where a record has a reference, the bits that the model needs for it are counted; the text is written without it.

    Args:
        model: local or remote.
        train: records with references, for the worked examples.
        form: how many examples; its instruction is what a model that answers is told, and for others the layout of what
            they go on with (``{form}``, ``{prompt}``).
        usual: the form of records that name none.
        tries: texts that are drawn at most until one keeps its form.
        temperature: of the draws.
        free: whether a Chinese form is only asked for, not held to while the model writes.
    """

    def __init__(
        self,
        model: Any,
        train: Sequence[Prompted] = (),
        form: Form | None = None,
        *,
        usual: str = "",
        tries: int = 1,
        temperature: float = TEMPERATURE,
        free: bool = False,
    ) -> None:
        self.name, self.model, self.given = model.name, model, form or Form()
        self.usual, self.tries, self.temperature, self.free = usual, tries, temperature, free
        self.drafter = Drafter(model, most=NEW_TOKENS)
        self.kind = self.drafter.kind
        known = [record for record in train if record.reference]
        self.shots: list[Prompted] = choose_shots(known, self.given.shots, self.given.seed)
        self.held: dict[str, Any] = {}

    # What a model reads -----------------------------------------------------------------------------------------------

    def instruction(self, form: str, text: str) -> str:
        """What is said before the first question; nothing where the prompt itself says what to write."""
        own = f"{BY_FORM[form]}{'' if is_chinese(form, text) else ' '}{ONLY[is_chinese(form, text)]}" if form else ""
        return own if self.given.instruction is None else self.given.instruction

    def question(self, form: str, text: str) -> str:
        """A record as a message."""
        return (f"题目：{text}" if is_chinese(form, text) else f"Topic: {text}") if form else text

    def prompt(self, record: Prompted) -> Any:
        """What the model reads for a record whose form is settled."""

        def make(text: str) -> Any:
            shots = [(shot, shot.form or form_like(shot.reference)) for shot in self.shots]
            if self.drafter.chats:
                asked = tuple((self.question(form, shot.prompt), shot.reference) for shot, form in shots)
                return Prompt(self.instruction(record.form, text), self.question(record.form, text), asked)
            layout = self.given.instruction
            before = "".join(begin_of(form, shot.prompt, layout) + shot.reference + "\n\n" for shot, form in shots)
            return before + begin_of(record.form, text, layout)

        return self.drafter.fitted(record.prompt, make)

    def constraint(self, form: str) -> Any:
        """What holds the model to lines and lengths; None where nothing does."""
        if self.free or self.drafter.remote or form not in VERSES:
            return None
        if form not in self.held:
            from hanmo.inference.constraints import Verses

            self.held[form] = Verses(self.model, *VERSES[form])
        return self.held[form]

    # Writing ----------------------------------------------------------------------------------------------------------

    def answer(self, records: Sequence[Prompted]) -> list[Written]:
        """The texts, of several tries the first that keeps its form, or the one that keeps most of its rules."""
        settled = [replace(record, form=settled_form(record, self.usual)) for record in records]
        prompts = [self.prompt(record) for record in settled]
        best: list[tuple[float, str]] = [(-1.0, "")] * len(records)
        drawn = [0] * len(records)
        waiting, count = list(range(len(records))), 1
        while waiting:
            count = min(count, self.tries - drawn[waiting[0]])
            for place, texts in zip(waiting, self.draw(settled, prompts, waiting, count, drawn), strict=True):
                drawn[place] += count
                form = settled[place].form
                found = [(check(text, form).share if form else 1.0, text.strip()) for text in texts]
                best[place] = max([best[place], *found], key=lambda item: item[0])  # of equals the first
            waiting = [place for place in waiting if best[place][0] < 1 and drawn[place] < self.tries]
            count *= 2
        bits = self.likelihoods(settled, prompts)
        return [
            Written(text, record.form, number, *cost)
            for (_, text), record, number, cost in zip(best, settled, drawn, bits, strict=True)
        ]

    def draw(
        self, records: Sequence[Prompted], prompts: Sequence[Any], places: Sequence[int], count: int, drawn: list[int]
    ) -> list[list[str]]:
        """So many further texts for each of some records."""
        texts: dict[int, list[str]] = {}
        for form in dict.fromkeys(records[place].form for place in places):
            some = [place for place in places if records[place].form == form]
            options: dict[str, Any] = {"temperature": self.temperature}
            if (constraint := self.constraint(form)) is not None:
                options["constraint"] = constraint
            if form in VERSES or form in ("haiku", "couplet", "limerick"):
                options["max_new_tokens"] = min(self.drafter.most, LINE_TOKENS)
            self.drafter.stops = ["\n\n"] if form and "letter" not in form and form != "书信" else []
            options["seeds"] = [self.given.seed + SEEDS * place + drawn[place] for place in some]
            label = form or pick("writing", "写作")
            found = self.drafter.write([prompts[place] for place in some], count, label=label, **options)
            texts.update(zip(some, found, strict=True))
        return [texts[place] for place in places]

    # Foreseeing -------------------------------------------------------------------------------------------------------

    def likelihoods(self, records: Sequence[Prompted], prompts: Sequence[Any]) -> list[tuple[float, int]]:
        """The bits that the model needs for each reference after its prompt, and how many characters that covers;
        0 and 0 where there is no reference, or a model that does not say. What is beyond the context is left out."""
        costs: list[tuple[float, int]] = [(0.0, 0)] * len(records)
        if self.drafter.remote:
            return costs
        rows = []
        for place, record in enumerate(records):
            if record.reference:
                before, after = self.drafter.ids(prompts[place]), self.model.tokenizer.encode(record.reference)
                rows.append((place, before, after[: max(0, int(self.model.context_length) + 1 - len(before))]))
        rows.sort(key=lambda row: len(row[1]) + len(row[2]))
        for begin in range(0, len(rows), SCORED):
            some = rows[begin : begin + SCORED]
            width = max(len(before) + len(after) for _, before, after in some)
            ids_BT = np.zeros((len(some), width), dtype=np.int64)
            for row, (_, before, after) in zip(ids_BT, some, strict=True):
                row[: len(before) + len(after)] = before + after
            logprobs_BT = self.model.score(ids_BT)
            for logprobs_T, (place, before, after) in zip(logprobs_BT, some, strict=True):
                told = logprobs_T[len(before) - 1 : len(before) + len(after) - 1]
                whole = records[place].reference
                text = (
                    whole
                    if len(after) == len(self.model.tokenizer.encode(whole))
                    else self.model.tokenizer.decode(after)
                )
                costs[place] = (-float(told.sum()) / math.log(2), len(text))
        return costs

    def signature(self) -> Mapping[str, Any]:
        """Prompt, examples, tries, and whether forms were forced."""
        form = self.usual or "五言绝句"
        shown = Prompt(self.instruction(form, ""), self.question(form, "")) if self.drafter.chats else None
        mark = mark_of(shown or Prompt("", begin_of(form, "", self.given.instruction)), len(self.shots))
        held = "free" if self.free or self.drafter.remote else "held"
        drawn = {"tries": self.tries, "temperature": f"{self.temperature:g}", "seed": self.given.seed}
        return {**mark, "form": held, **drawn, "tokens": self.drafter.most}


def settled_form(record: Prompted, usual: str = "") -> str:
    """The form of a record: its own, that of the reference's shape, or the usual one; empty where there is none.

    Raises:
        UsageError: the record names one that there is not.
    """
    if record.form:
        return form_name(record.form, record.where if record.file else "")
    return usual or form_like(record.reference)


class NGramWriter(System[Prompted, Written]):
    """What five characters tell: an n-gram model of the references of other records, below their forms and prompts."""

    kind, learns = "baseline", True

    def __init__(self, **options: Any) -> None:
        self.name, self.options = pick(f"n-gram of {NGRAM} characters", f"{NGRAM} 元字符模型"), options
        self.writer: Writer | None = None

    def fit(self, train: Sequence[Prompted], validation: Sequence[Prompted] = ()) -> None:
        """Count; of records without references their prompts."""
        del validation
        usual = self.options.get("usual", "")
        texts = [begin_of(settled_form(record, usual), record.prompt) + record.reference for record in train]
        self.writer = Writer(learnt_model(texts, NGRAM, self.name), **self.options)

    def answer(self, records: Sequence[Prompted]) -> list[Written]:
        """The texts, written as any model writes them."""
        assert self.writer is not None
        return self.writer.answer(records)

    def signature(self) -> Mapping[str, Any]:
        """As of any model."""
        return {"tries": self.options.get("tries", 1)} if self.writer is None else self.writer.signature()


class People(System[Prompted, Written]):
    """The references themselves: how often people keep the forms, and how varied their texts are."""

    def __init__(self, usual: str = "") -> None:
        self.name, self.usual = pick("the references (written by people)", "参考文本（人写的）"), usual

    def answer(self, records: Sequence[Prompted]) -> list[Written]:
        """The references."""
        return [Written(record.reference, settled_form(record, self.usual)) for record in records]


class Writing(Task[Prompted, Written]):
    """Poems, stories, mail."""

    name, kind, training = "writing", "prompted", "text"
    aliases = ("poems", "poetry", "stories", "mail")
    help = "poems, stories and mail; forms are checked: lines, lengths, rhymes"
    help_zh = "写作：诗、故事、书信；检查体裁的句数、字数与押韵"
    settings = ("form", "tries", "temperature", "free_form")

    def options(self) -> dict[str, Any]:
        """For :class:`Writer`.

        Raises:
            UsageError: an unknown form; tries that cannot be.
        """
        tries, temperature = int(self.given.get("tries", 1)), float(self.given.get("temperature", TEMPERATURE))
        if not 1 <= tries <= MOST_TRIES or (tries > 1 and temperature == 0):
            raise UsageError(
                f"--tries must be from 1 to {MOST_TRIES}, and above 1 with a temperature above 0",
                fix="for example --tries 16 --temperature 0.8",
                zh=f"--tries 应为 1 到 {MOST_TRIES}；大于 1 时温度须大于 0，例如 --tries 16 --temperature 0.8",
            )
        usual = form_name(self.given["form"], "--form") if self.given.get("form") else ""
        free = bool(self.given.get("free_form", False))
        return {"usual": usual, "tries": tries, "temperature": temperature, "free": free}

    def metric(self, records: Sequence[Prompted]) -> WritingMetric:
        """Form, variety, and what references cost.

        Raises:
            UsageError: a record names a form that there is not.
        """
        usual = self.options()["usual"]
        forms = [settled_form(record, usual) for record in records]
        chinese = mostly_chinese([record.reference or record.prompt for record in records])
        return WritingMetric(forms, "zh" if chinese or any(form in VERSES for form in forms) else "en")

    def baselines(self, records: Sequence[Prompted]) -> list[System[Prompted, Written]]:
        """An n-gram model of the references."""
        del records
        return [NGramWriter(**self.options())]

    def yardsticks(self, records: Sequence[Prompted]) -> list[System[Prompted, Written]]:
        """The references, where every record has one."""
        return [People(self.options()["usual"])] if all(record.reference for record in records) else []

    def system(self, model: Any, train: Sequence[Prompted] = (), form: Form | None = None) -> System[Prompted, Written]:
        """A language model that writes."""
        if not hasattr(model, "generate") or getattr(model, "reads_source", False):
            raise self.cannot(
                model,
                fix="take a language model that continues texts or answers; train one with hanmo build",
                zh="该模型不能写作；请使用能续写或对话的语言模型，也可用 hanmo build 训练一个",
            )
        return Writer(model, train, form, **self.options())

    def record(self, text: str) -> Prompted:
        """A prompt.

        Raises:
            UsageError: it is empty.
        """
        if not text.strip():
            raise UsageError(
                "the prompt is empty",
                fix='say what to write about: hanmo poems --model M --form 五言绝句 "春雨"',
                zh='提示是空的；请给出题目：hanmo poems --model 模型 --form 五言绝句 "春雨"',
            )
        return Prompted(text.strip())

    def as_data(self, answer: Written) -> dict[str, Any]:
        """The text, and the rules of its form."""
        data: dict[str, Any] = {"text": answer.text, "tries": answer.tries}
        if answer.form:
            report = check(answer.text, answer.form)
            data |= {"form": answer.form, "holds": report.holds}
            data["rules"] = {rule.name: rule.holds for rule in report.rules}
        return data

    def describe(self, record: Prompted, answer: Written) -> str:
        """The text, and below it the check of its form."""
        del record
        if not answer.form:
            return answer.text
        number = answer.tries
        head = pick(f"{answer.form}, {number} drawn:", f"{answer.form}，共写 {number} 稿：")
        return f"{answer.text}\n\n{head}\n{check(answer.text, answer.form)}"
