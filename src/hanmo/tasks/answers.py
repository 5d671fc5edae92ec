"""Answers to questions, and how they are measured: by the rules of SQuAD for English, of CMRC 2018 for Chinese.

SQuAD (Rajpurkar et al. 2016; 2018 for questions without an answer): lower case, without the marks of ASCII, and
without the articles a, an, the; an answer is exact where nothing else differs; F1 is that of its words as a bag.

CMRC 2018 (Cui et al. 2019): lower case, without some marks; Chinese characters stand alone, anything between them is
cut into words by NLTK. F1 follows from the longest run of tokens that answer and truth share. NLTK's words are those of
its Treebank tokenizer; the script lets a trained model look for sentences before, which only matters to answers that
hold several English sentences.

Either way the best of several right answers counts, and where there is none, the answer must be empty.

Letters in names: N records, K numbers of a record.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hanmo.data.tasks.types import QuestionAnswer
from hanmo.errors import missing_package
from hanmo.language import pick
from hanmo.tasks.metric import Floats, Metric, ratio
from hanmo.tasks.prompts import mostly_chinese

ARTICLES = re.compile(r"\b(?:a|an|the)\b")
ASCII_MARKS = str.maketrans("", "", string.punctuation)
CMRC_MARKS = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
CMRC_TOKENS = re.compile(r"[\u4e00-\u9fa5]|[^\u4e00-\u9fa5]+")
RANKS = (1, 5, 20)  # of recall
LONGEST = 20_000  # characters of an answer that count

Agreement = tuple[float, float]  # exact, F1


# Answers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """A part of a text that can be cited.

    Attributes:
        file, line: where it begins; no file where the passage was given with the question.
    """

    text: str
    file: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        """The place for people, ``file:line``; empty where there is none."""
        return f"{self.file}:{self.line}" if self.file else ""


@dataclass(frozen=True)
class Reply:
    """An answer, and the passage that it is from.

    Attributes:
        text: empty where the passage does not tell.
        start: the character of the passage at which the answer begins; None where it does not stand there literally.
        score: by which the answers of a system can be compared; None where it gives none.
        passage: what was read; of several the one that the answer is from, or the likeliest one where none tells.
        found: the passages that a search gave, the best first; None where none was made.
    """

    text: str
    start: int | None = None
    score: float | None = None
    passage: Passage | None = None
    found: tuple[Passage, ...] | None = None


# SQuAD and CMRC -------------------------------------------------------------------------------------------------------


def squad_form(text: str) -> str:
    """An answer without what the rules of SQuAD do not look at.

    >>> squad_form("The  Moon's an apple.")
    'moons apple'
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(ASCII_MARKS)).split())


def squad_agreement(truth: str, answer: str) -> Agreement:
    """Whether two answers are the same, and the F1 of their words."""
    right, given = squad_form(truth), squad_form(answer)
    words, answered = right.split(), given.split()
    if not words or not answered:
        return float(right == given), float(words == answered)
    common = sum((Counter(words) & Counter(answered)).values())
    return float(right == given), f1_of(common, len(answered), len(words))


def cmrc_tokens(text: str) -> list[str]:
    """The tokens of an answer by the rules of CMRC 2018.

    >>> cmrc_tokens("《三体》，刘慈欣")
    ['三', '体', '刘', '慈', '欣']
    """
    tokens: list[str] = []
    for run in CMRC_TOKENS.findall(text.lower().strip().translate(CMRC_MARKS)):
        tokens += [run] if "\u4e00" <= run[0] <= "\u9fa5" else treebank()(run)
    return tokens


@functools.cache
def treebank() -> Callable[[str], list[str]]:
    """NLTK's tokenizer of words.

    Raises:
        ResourceError: NLTK is not installed.
    """
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError:
        raise missing_package("nltk", "metrics", pick("the rules of CMRC 2018", "CMRC 2018 评测规则")) from None
    tokenize: Callable[[str], list[str]] = NLTKWordTokenizer().tokenize
    return tokenize


def cmrc_agreement(truth: str, answer: str) -> Agreement:
    """Whether two answers are the same, and the F1 of the longest run of tokens that they share."""
    right, given = (text.lower().strip().translate(CMRC_MARKS) for text in (truth, answer))
    tokens, answered = cmrc_tokens(truth), cmrc_tokens(answer)
    return float(right == given), f1_of(longest_run(tokens, answered), len(answered), len(tokens))


def longest_run(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest run of tokens that stands in both.

    >>> longest_run("abcdx", "xbcd")
    3
    """
    best, before = 0, [0] * (len(second) + 1)
    for token in first:
        here = [0] * (len(second) + 1)
        for place, other in enumerate(second):
            if token == other:
                here[place + 1] = before[place] + 1
                best = max(best, here[place + 1])
        before = here
    return best


def f1_of(common: int, given: int, right: int) -> float:
    """F1 from counts of tokens; 0 where nothing is common."""
    if not common:
        return 0.0
    precision, recall = common / given, common / right
    return 2 * precision * recall / (precision + recall)


# The metric -----------------------------------------------------------------------------------------------------------


class AnswerMetric(Metric[QuestionAnswer, Reply]):
    """Exact match and F1 of answers, from 0 to 1, and recall@k where passages were searched for.

    Where some questions have no answer in their text, also exact match and F1 of those that have one, and the share of
    the others that was left without an answer. Recall@k is the share of the questions with an answer whose passage, or
    a part of it, is among the first k that were found; in documents of other files, of which a passage among the first
    k holds a right answer (Karpukhin et al. 2020).

    Args:
        records: whose questions decide the rules: mostly Chinese, CMRC 2018, otherwise SQuAD.
    """

    primary = "f1"

    def __init__(self, records: Sequence[QuestionAnswer]) -> None:
        self.chinese = mostly_chinese([record.question for record in records])
        self.agreement = cmrc_agreement if self.chinese else squad_agreement

    def best(self, record: QuestionAnswer, answer: str) -> Agreement:
        """The agreement with the best right answer; where there is none, an empty answer is right."""
        truths = [text for text, _ in record.answers]
        if not self.chinese:
            truths = [text for text in truths if squad_form(text)]
        if not truths:
            return (1.0, 1.0) if not (answer if self.chinese else squad_form(answer)).strip() else (0.0, 0.0)
        pairs = [self.agreement(truth, answer[:LONGEST]) for truth in truths]
        return max(exact for exact, _ in pairs), max(f1 for _, f1 in pairs)

    def statistics(self, records: Sequence[QuestionAnswer], answers: Sequence[Reply]) -> Floats:
        """With an answer: one, exact, F1; without: one, right; searched: one, found among the first k for each k."""
        rows = np.zeros((len(records), 6 + len(RANKS)))
        for row, record, answer in zip(rows, records, answers, strict=True):
            exact, f1 = self.best(record, answer.text)
            if not record.answers:
                row[3:5] = 1, exact
                continue
            row[:3] = 1, exact, f1
            if answer.found is not None:
                rank = self.rank(record, answer.found)
                row[5:] = 1, *(rank < k for k in RANKS)
        return rows

    def rank(self, record: QuestionAnswer, found: Sequence[Passage]) -> int:
        """The place of the first right passage, from 0; one behind all ranks where there is none."""
        truths = [squad_form(text) for text, _ in record.answers]
        for place, passage in enumerate(found[: RANKS[-1]]):
            if passage.text == record.context or (not passage.file and passage.text in record.context):
                return place
            if passage.file and any(f" {truth} " in f" {squad_form(passage.text)} " for truth in truths if truth):
                return place
            if passage.file and self.chinese and any(truth in squad_form(passage.text) for truth in truths if truth):
                return place
        return RANKS[-1]

    def measures(self, sums: Floats) -> dict[str, Floats]:
        """Over all questions; over those with and those without an answer, where there are both; recall."""
        total = sums[..., 0] + sums[..., 3]
        values = {
            "f1": ratio(sums[..., 2] + sums[..., 4], total),
            "exact_match": ratio(sums[..., 1] + sums[..., 4], total),
        }
        if np.any(sums[..., 3]):
            values["has_answer_f1"] = share(sums[..., 2], sums[..., 0])
            values["has_answer_exact_match"] = share(sums[..., 1], sums[..., 0])
            values["no_answer_accuracy"] = share(sums[..., 4], sums[..., 3])
        if np.any(sums[..., 5]):
            for place, k in enumerate(RANKS):
                values[f"recall@{k}"] = share(sums[..., 6 + place], sums[..., 5])
        return values

    def right(self, statistics: Floats) -> Any:
        """Which records were answered exactly."""
        return statistics[:, 1] + statistics[:, 4] > 0

    def signature(self) -> Mapping[str, Any]:
        """Whose rules."""
        return {"rules": "cmrc2018" if self.chinese else "squad2", "best": "max"}

    def details(self, records: Sequence[QuestionAnswer], answers: Sequence[Reply]) -> dict[str, Any]:
        """How many questions have an answer, and how many got one."""
        return {
            "with_answer": sum(bool(record.answers) for record in records),
            "answered": sum(bool(answer.text) for answer in answers),
        }


def share(above: Floats, below: Floats) -> Floats:
    """A quotient; NaN where there was nothing to count."""
    return np.where(below > 0, ratio(above, below), np.nan)
