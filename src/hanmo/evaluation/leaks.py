"""Records to measure on that the training data hold as well: whoever knows the answer by heart, scores too well.

Public Chinese sets have up to 28 % of their test records in their training part, so scores are shown with and without.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hanmo.data.tasks.splits import canonical, digest_of, leak_keys
from hanmo.data.tasks.types import Pair, QuestionAnswer, Record


def question_of(record: Record) -> str:
    """What a record asks: the text that has to be answered, without case, width and amount of white space."""
    if isinstance(record, Pair):
        return canonical(record.source)
    if isinstance(record, QuestionAnswer):
        return f"{canonical(record.question)}\n{canonical(record.context)}"
    return "\n".join(leak_keys(record))


def find_leaks(train: Sequence[Record], records: Sequence[Record]) -> NDArray[np.bool_]:
    """Which records ask what a training record asks, ``[N]``."""
    known = {digest_of(question_of(record)) for record in train}
    return np.array([digest_of(question_of(record)) in known for record in records], dtype=bool)
