"""BLEU (Papineni et al. 2002) and chrF (Popović 2015) as sacreBLEU computes them (Post 2018).

Both follow from counts that are summed over the records, and sacreBLEU keeps these counts for its own bootstrap; here
they are a metric's numbers of a record. So a score is its score to the digit, and its interval costs no second count.

Letters in names: N records, K numbers of a record.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from hanmo.data.tasks.types import Pair
from hanmo.errors import ResourceError, missing_package
from hanmo.language import pick
from hanmo.tasks.metric import Floats, Metric
from hanmo.tasks.prompts import mostly_chinese

BLEU_COUNTS = 10  # lengths of both, then matches and n-grams of orders 1 to 4
INSIDE = ("_extract_corpus_statistics", "_compute_score_from_stats")  # what its own significance tests use


class TranslationMetric(Metric[Pair, str]):
    """BLEU and chrF2 of texts against one reference or several, from 0 to 100.

    Where most references are Chinese, BLEU's tokens are single Chinese characters (sacreBLEU's ``zh``), otherwise the
    words of mteval-v13a.

    Args:
        records: whose references decide the tokens.

    Raises:
        ResourceError: sacreBLEU is not installed.
    """

    primary = "bleu"

    def __init__(self, records: Sequence[Pair]) -> None:
        self.tokens = "zh" if mostly_chinese([record.target for record in records]) else "13a"
        counts = {1 + len(record.references) for record in records}
        self.references = str(counts.pop()) if len(counts) == 1 else "var"
        self.bleu, self.chrf = scorers(self.tokens)

    def statistics(self, records: Sequence[Pair], answers: Sequence[str]) -> Floats:
        """The counts of BLEU, then those of chrF: of answer, reference and match for each of six orders."""
        if not records:
            return np.zeros((0, BLEU_COUNTS + 18))
        streams = list(zip_longest(*((record.target, *record.references) for record in records)))
        parts = [scorer._extract_corpus_statistics(list(answers), streams) for scorer in (self.bleu, self.chrf)]
        return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts], axis=1)

    def measures(self, sums: Floats) -> dict[str, Floats]:
        """BLEU and chrF2 of sums."""
        rows = np.asarray(sums, dtype=np.float64).reshape(-1, sums.shape[-1])
        pairs = [
            (
                self.bleu._compute_score_from_stats(row[:BLEU_COUNTS].tolist()).score,
                self.chrf._compute_score_from_stats(row[BLEU_COUNTS:].tolist()).score,
            )
            for row in rows
        ]
        values = np.array(pairs).reshape(*sums.shape[:-1], 2)
        return {"bleu": values[..., 0], "chrf": values[..., 1]}

    def signature(self) -> Mapping[str, Any]:
        """As sacreBLEU's, for both."""
        import sacrebleu

        mark = {"nrefs": self.references, "case": "mixed", "eff": "no", "tok": self.tokens, "smooth": "exp"}
        return {**mark, "chrf": "nc6-nw0", "sacrebleu": sacrebleu.__version__}

    def details(self, records: Sequence[Pair], answers: Sequence[str]) -> dict[str, Any]:
        """What BLEU is made of: precisions of the four orders, and the lengths, whose quotient is punished below 1."""
        if not records:
            return {}
        total = self.statistics(records, answers).sum(0)[:BLEU_COUNTS].tolist()
        score = self.bleu._compute_score_from_stats(total)
        return {
            "precisions": [float(value) for value in score.precisions],
            "brevity_penalty": float(score.bp),
            "answer_tokens": int(score.sys_len),
            "reference_tokens": int(score.ref_len),
        }


@functools.cache
def scorers(tokens: str) -> tuple[Any, Any]:
    """sacreBLEU's BLEU and chrF with their usual settings.

    Raises:
        ResourceError: it is not installed, or a version that keeps its counts elsewhere.
    """
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise missing_package("sacrebleu", "metrics", pick("BLEU and chrF", "计算 BLEU 与 chrF")) from None
    bleu, chrf = BLEU(tokenize=tokens, force=True), CHRF()
    if not all(hasattr(scorer, name) for scorer in (bleu, chrf) for name in INSIDE):
        raise ResourceError(
            "this version of sacrebleu does not give the counts of a record",
            fix="pip install 'sacrebleu>=2.5,<3'",
            zh="此版本的 sacrebleu 不提供逐句统计量，请安装：pip install 'sacrebleu>=2.5,<3'",
        )
    return bleu, chrf
