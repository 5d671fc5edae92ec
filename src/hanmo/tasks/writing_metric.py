"""What can be counted of written texts: forms kept, variety, and what references cost a model.

Variety belongs to all texts together, and is no sum over them as it stands. Each text's part of it is, once the texts
are there: an n-gram that stands c times in all texts counts 1/c each time, and these parts add up to the number of
different n-grams, so that distinct-n is exact; self-BLEU is the mean of the BLEU of each text with others as its
references. A bootstrap over records then draws texts and keeps what they are compared with: its interval says how far
the number depends on the texts that were looked at, in the company they were written in. Drawing texts anew into their
own company would count copies of a text as repetition.

Letters in names: N texts, K numbers of a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.data.tasks.types import Prompted
from hanmo.language import pick
from hanmo.tasks.diversity import joined, number, self_bleu, units
from hanmo.tasks.forms import check
from hanmo.tasks.metric import Floats, Metric, ratio

RARELY_BROKEN = frozenset({"script", "rhyme words"})  # they count for the form, without a column of their own


@dataclass(frozen=True)
class Written:
    """A text.

    Attributes:
        form: that it should have; empty where any will do.
        tries: texts that were drawn until this one was taken.
        bits: that the system needs for the reference of the record, characters: of the reference that this covers, line
            ends among them; 0 and 0 where nothing is known.
    """

    text: str
    form: str = ""
    tries: int = 1
    bits: float = 0.0
    characters: int = 0


class WritingMetric(Metric[Prompted, Written]):
    """Form accuracy and the share of texts that keep each rule; distinct-1 and -2; self-BLEU; bits per character.

    The bits are those of the references after their prompts. They can be compared between models with different
    tokenizers, as perplexities per token cannot; 2 to the power of them is the perplexity per character. A character
    that a vocabulary does not have costs what the token for unknown ones costs.

    Args:
        forms: of each record; empty where it has none.
        language: of self-BLEU: ``zh`` or ``en``.
    """

    lower = frozenset({"self_bleu", "bits_per_character"})

    def __init__(self, forms: Sequence[str], language: str) -> None:
        self.forms, self.language = list(forms), language
        rules = [rule.name for form in dict.fromkeys(forms) if form for rule in check("", form).rules]
        self.rules = [name for name in dict.fromkeys(rules) if name not in RARELY_BROKEN]
        self.primary = "form" if any(forms) else "distinct_2"
        self.right = kept if forms and all(forms) else None

    def statistics(self, records: Sequence[Prompted], answers: Sequence[Written]) -> Floats:
        """Form known and kept; for each rule, whether the form has it and it is kept; for n = 1, 2 the part of the
        different n-grams and the number of n-grams; self-BLEU and one; bits and characters."""
        del records
        forms_N2, rules_NR2 = np.zeros((len(answers), 2)), np.zeros((len(answers), len(self.rules), 2))
        for row, (form, answer) in enumerate(zip(self.forms, answers, strict=True)):
            if not form:
                continue
            report = check(answer.text, form)
            forms_N2[row] = 1, report.holds
            for rule in report.rules:
                if rule.name in self.rules:
                    rules_NR2[row, self.rules.index(rule.name)] = 1, rule.holds
        texts = [answer.text for answer in answers]
        costs_N2 = np.array([(answer.bits, answer.characters) for answer in answers], dtype=np.float64)
        parts = [forms_N2, rules_NR2.reshape(len(answers), -1), variety(texts, 1), variety(texts, 2)]
        return np.concatenate([*parts, self.likeness(texts), costs_N2.reshape(len(answers), 2)], axis=1)

    def likeness(self, texts: Sequence[str]) -> Floats:
        """Self-BLEU of each text and one, ``[N, 2]``; zeros where there is one text only."""
        if len(texts) < 2:
            return np.zeros((len(texts), 2))
        scores_N = self_bleu(texts, self.language, sample=len(texts)).scores
        return np.stack([scores_N, np.ones(len(texts))], axis=1)

    def measures(self, sums: Floats) -> dict[str, Floats]:
        """The shares and means."""
        rules = 2 + 2 * len(self.rules)
        values = {"form": share(sums, 0)} if self.rules else {}
        values |= {name.replace(" ", "_"): share(sums, 2 + 2 * place) for place, name in enumerate(self.rules)}
        for n in (1, 2):
            values[f"distinct_{n}"] = ratio(sums[..., rules + 2 * n - 2], sums[..., rules + 2 * n - 1])
        bleu, costs = rules + 4, rules + 6
        values["self_bleu"] = np.where(sums[..., bleu + 1] > 0, ratio(sums[..., bleu], sums[..., bleu + 1]), np.nan)
        known = sums[..., costs + 1] > 0
        values["bits_per_character"] = np.where(known, ratio(sums[..., costs], sums[..., costs + 1]), np.nan)
        return values

    def signature(self) -> Mapping[str, Any]:
        """Units and references of the measures of variety."""
        return {"units": "characters+words", "self-bleu": f"{self.language}/50"}

    def details(self, records: Sequence[Prompted], answers: Sequence[Written]) -> dict[str, Any]:
        """How many texts were drawn in all."""
        drawn = sum(answer.tries for answer in answers)
        return {"counts": {pick("texts drawn", "写出的文本数"): drawn}} if drawn > len(records) else {}


def kept(statistics: Floats) -> NDArray[np.bool_]:
    """Which texts keep their form."""
    holds: NDArray[np.bool_] = statistics[:, 1] > 0
    return holds


def share(sums: Floats, place: int) -> Floats:
    """How many of those that have something keep it; NaN where none has it."""
    shares: Floats = np.where(sums[..., place] > 0, ratio(sums[..., place + 1], sums[..., place]), np.nan)
    return shares


def variety(texts: Sequence[str], n: int) -> Floats:
    """Each text's part of the different n-grams of all texts, and its number of n-grams, ``[N, 2]``.

    >>> variety(["ab ab cd ef", "ab ab"], 1).sum(axis=0).round(9).tolist()  # three words, six tokens
    [3.0, 6.0]
    """
    found, row_of = joined(number([units(text) for text in texts]), n)
    _, codes, counts = np.unique(found, return_inverse=True, return_counts=True)
    parts_N = np.bincount(row_of, weights=1.0 / counts[codes], minlength=len(texts))
    return np.stack([parts_N, np.bincount(row_of, minlength=len(texts)).astype(np.float64)], axis=1)
