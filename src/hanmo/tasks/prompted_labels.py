"""Labels from a language model that is asked: the probability of each label as its answer, calibrated.

A model prefers some labels whatever the text is. So the same question is asked about texts that say nothing, and the
probabilities are divided by those that the labels have there (contextual calibration, Zhao et al. 2021). A remote model
gives no probabilities of given answers; it is asked to write the label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hanmo.data.tasks.types import Labelled
from hanmo.errors import UsageError
from hanmo.progress import Progress
from hanmo.tasks.base import Form, System
from hanmo.tasks.classification import Verdict, text_of
from hanmo.tasks.metric import Floats
from hanmo.tasks.prompts import Prompt, Speaker, choose_shots, mark_of, mostly_chinese

NOTHING = ("N/A", "...", "无")  # texts that say nothing
MOST_LABELS = 64
LONGEST = 400  # characters of an example


class PromptedLabels(System[Labelled, Verdict]):
    """A language model that is asked for the label.

    Args:
        model: a language model, local or remote.
        train: records from which the labels are known, and the worked examples.
        form: how many examples, the instruction, and labels that no record tells.

    Raises:
        UsageError: no labels are known, or too many to ask for; several labels for a text.
    """

    def __init__(self, model: Any, train: Sequence[Labelled], form: Form) -> None:
        self.speaker, self.form, self.name = Speaker(model), form, model.name
        self.kind = self.speaker.kind
        self.labels = sorted({*form.labels, *(label for record in train for label in record.labels)})
        if not 2 <= len(self.labels) <= MOST_LABELS:
            raise UsageError(
                f"a language model can be asked for 2 to {MOST_LABELS} labels, not {len(self.labels)}",
                fix="give records with the labels: --train FILE",
                zh=f"提示语言模型分类需要 2 到 {MOST_LABELS} 个标签，现有 {len(self.labels)} 个；"
                "请用 --train 给出带标签的记录",
            )
        if any(len(record.labels) != 1 for record in train):
            raise UsageError(
                "a language model is asked for one label a text, and these records have several or none",
                fix="use a classifier: hanmo finetune --task classification --multi-label",
                zh="提示语言模型时每条文本只能有一个标签；多标签请用 "
                "hanmo finetune --task classification --multi-label",
            )
        chinese = mostly_chinese([record.text for record in train] or self.labels)
        names = "、".join(self.labels) if chinese else ", ".join(self.labels)
        own = (
            f"请给文本分类，只回答标签，不要解释。可选标签：{names}。"
            if chinese
            else (f"Classify the text. Answer with one label and nothing else. Labels: {names}.")
        )
        self.instruction = form.instruction or own
        self.field, self.lead = ("文本：", "标签：") if chinese else ("Text: ", "Label:")
        self.shots = tuple(
            (self.question(text_of(record)[:LONGEST]), record.labels[0])
            for record in choose_shots(train, form.shots, form.seed)
        )
        self.prior_L: Floats | None = None

    def question(self, text: str) -> str:
        """How a text is shown."""
        return f"{self.field}{text}"

    def prompt(self, text: str) -> Prompt:
        """The question about a text; of a long one its beginning, as much as the context holds."""
        whole = Prompt(self.instruction, self.question(text), self.shots, self.lead)
        room = self.speaker.model.context_length
        while room and len(text) > 64 and self.speaker.size(whole) > room - 32:
            text = text[: len(text) * 3 // 4]
            whole = Prompt(self.instruction, self.question(text), self.shots, self.lead)
        return whole

    def answer(self, records: Sequence[Labelled]) -> list[Verdict]:
        """The likeliest label of each text."""
        if self.kind == "remote":
            return self.written(records)
        if self.prior_L is None:
            self.prior_L = np.mean([self.probabilities(text) for text in NOTHING], axis=0)
        verdicts = []
        bar = Progress("asking", len(records), "texts")
        for record in records:
            row_L = self.probabilities(text_of(record)) / self.prior_L
            row_L /= row_L.sum()
            best = self.labels[int(row_L.argmax())]
            verdicts.append(Verdict((best,), dict(zip(self.labels, row_L.tolist(), strict=True))))
            bar.update(bar.done + 1)
        bar.close()
        return verdicts

    def probabilities(self, text: str) -> Floats:
        """The probability of each label among all labels, as an answer that ends after it, ``[L]``."""
        model = self.speaker.model
        ends = sorted(model.eos_ids)[:1] if self.speaker.chats else model.tokenizer.encode("\n")[:1]
        blank = "" if self.speaker.chats else " "
        choices = [[*model.tokenizer.encode(blank + label), *ends] for label in self.labels]
        scores = model.choice_logprobs(self.speaker.prompt(self.prompt(text)), choices)
        logs_L = np.array([float(score_T.double().sum()) for score_T in scores])
        odds_L: Floats = np.exp(np.maximum(logs_L - logs_L.max(), -50.0))
        shares_L: Floats = odds_L / odds_L.sum()
        return shares_L

    def written(self, records: Sequence[Labelled]) -> list[Verdict]:
        """What a remote model writes: the label that it begins with, else the first that it mentions; else none."""
        answers = self.speaker.write([self.prompt(text_of(record)) for record in records], max_new_tokens=24)
        return [Verdict(self.mentioned(answer)) for answer in answers]

    def mentioned(self, answer: str) -> tuple[str, ...]:
        """The label in an answer, whatever its case; of two at the same place the longer."""
        low = answer.casefold()
        found = [(place, -len(label), label) for label in self.labels if (place := low.find(label.casefold())) >= 0]
        return (min(found)[2],) if found else ()

    def signature(self) -> Mapping[str, Any]:
        """The prompt and its examples."""
        calibrated = {} if self.kind == "remote" else {"calibration": "contextual"}
        return {**mark_of(Prompt(self.instruction, "", self.shots, self.lead), len(self.shots)), **calibrated}
