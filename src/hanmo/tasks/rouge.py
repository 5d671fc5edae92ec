"""ROUGE (Lin 2004) as the package rouge-score computes it; for Chinese with its characters as tokens.

rouge-score's own tokens are runs of ASCII letters and digits, so that of a Chinese text nothing would be left. Where
references are Chinese, the same scorer is given other tokens: each Chinese character, and each word or number of other
scripts, in lower case, full-width forms as their usual ones.

Letters in names: N records, K numbers of a record.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hanmo.data.tasks.types import Pair
from hanmo.errors import missing_package
from hanmo.language import pick
from hanmo.tasks.metric import Floats, Metric, ratio
from hanmo.tasks.prompts import mostly_chinese
from hanmo.text.segment import HAN, LETTER
from hanmo.text.sentences import split_sentences

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TOKEN = re.compile(rf"[{HAN}]|[0-9]+(?:\.[0-9]+)*|{LETTER}+")
LONGEST = 3000  # tokens of a text that count: the longest common subsequence takes the product of both lengths


class Characters:
    """Tokens for texts that hold Chinese, for rouge-score.

    >>> Characters().tokenize("用ＢＥＲＴ得到92.5分。")
    ['用', 'bert', '得', '到', '92.5', '分']
    """

    def tokenize(self, text: str) -> list[str]:
        """Chinese characters, words, numbers; no marks."""
        return TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


class Words:
    """rouge-score's own tokens, kept for texts that come again: references, and sentences under trial."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.tokenize = functools.lru_cache(maxsize=1 << 16)(DefaultTokenizer(use_stemmer=True).tokenize)


class Rouge:
    """ROUGE of single texts.

    Args:
        chinese: whether the tokens are characters; otherwise words without their endings (Porter's stemmer).

    Raises:
        ResourceError: rouge-score is not installed.
    """

    def __init__(self, *, chinese: bool) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError:
            raise missing_package("rouge-score", "metrics", pick("ROUGE", "计算 ROUGE")) from None
        self.chinese = chinese
        self.tokens: Any = Characters() if chinese else Words()
        self.scorer = RougeScorer(list(TYPES), tokenizer=self.tokens)
        self.quick = RougeScorer(["rouge1", "rougeL"], tokenizer=self.tokens)

    def scores(self, references: Sequence[str], answer: str) -> Mapping[str, Any]:
        """Precision, recall and F of each type, against the reference that gives the best F.

        Sentences stand on lines of their own, as ROUGE-Lsum reads them; of a text with more than 3,000 tokens these.
        """
        given = [self.on_lines(text) for text in references]
        found: Mapping[str, Any] = self.scorer.score_multi(given, self.on_lines(answer))
        return found

    def on_lines(self, text: str) -> str:
        """A text with a sentence a line; of one with thousands of tokens the beginning."""
        lines, room = [], LONGEST
        for sentence in split_sentences(text):
            length = self.length(sentence) if len(text) > LONGEST else 0
            if length > room:
                lines.append(sentence[: room * len(sentence) // length])
                break
            lines.append(sentence)
            room -= length
        return "\n".join(lines)

    def gain(self, references: Sequence[str], text: str) -> float:
        """How good a text is as an answer: the mean of the F of ROUGE-1 and ROUGE-L."""
        found = self.quick.score_multi(list(references), text)
        return float(found["rouge1"].fmeasure + found["rougeL"].fmeasure) / 2

    def length(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.tokens.tokenize(text))


class SummaryMetric(Metric[Pair, str]):
    """The mean F of ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum, from 0 to 1, each against the best of the references."""

    primary = "rougeL"

    def __init__(self, records: Sequence[Pair]) -> None:
        self.chinese = mostly_chinese([record.target for record in records])
        self.rouge = Rouge(chinese=self.chinese)
        counts = {1 + len(record.references) for record in records}
        self.references = str(counts.pop()) if len(counts) == 1 else "var"

    def statistics(self, records: Sequence[Pair], answers: Sequence[str]) -> Floats:
        """One; the F, precision and recall of each type; tokens of the answer, and of the first reference."""
        rows = np.zeros((len(records), 3 + 3 * len(TYPES)))
        for row, record, answer in zip(rows, records, answers, strict=True):
            found = self.rouge.scores((record.target, *record.references), answer)
            parts = [[found[kind].fmeasure, found[kind].precision, found[kind].recall] for kind in TYPES]
            row[:] = [1, *np.ravel(parts), self.rouge.length(answer), self.rouge.length(record.target)]
        return rows

    def measures(self, sums: Floats) -> dict[str, Floats]:
        """Means of F."""
        return {kind: ratio(sums[..., 1 + 3 * place], sums[..., 0]) for place, kind in enumerate(TYPES)}

    def signature(self) -> Mapping[str, Any]:
        """Tokens and version."""
        from importlib.metadata import version

        tokens = "characters" if self.chinese else "words-porter"
        return {"tok": tokens, "nrefs": self.references, "best": "f", "rouge_score": version("rouge-score")}

    def details(self, records: Sequence[Pair], answers: Sequence[str]) -> dict[str, Any]:
        """Precision and recall of each type; mean lengths in tokens."""
        mean = self.statistics(records, answers).mean(0) if records else np.zeros(3 + 3 * len(TYPES))
        table: dict[str, Any] = {
            kind: {"precision": float(mean[2 + 3 * place]), "recall": float(mean[3 + 3 * place])}
            for place, kind in enumerate(TYPES)
        }
        return {**table, "answer_tokens": float(mean[-2]), "reference_tokens": float(mean[-1])}
