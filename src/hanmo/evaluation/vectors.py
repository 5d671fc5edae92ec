"""How good word vectors are: analogies, and similarity as people judge it.

- **Analogies** in the format of Mikolov et al. (2013): sections ``: name``, then lines ``a b c d``. A question counts
  as answered right where ``d`` itself is the best word of the whole vocabulary but a, b and c (3CosAdd). Questions with
  an unknown word are reported both ways: left out, and counted as wrong.
- **Similarity**: lines of two words and a score (tab, comma or spaces between). Spearman's rank correlation with the
  cosine, with a percentile interval from resampled pairs (Efron and Tibshirani 1993, chapter 13).

Coverage matters as much as the score: two models are comparable on the same questions only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import DataError
from hanmo.evaluation.intervals import MIN_UNITS, RESAMPLES, Interval, percentile_interval
from hanmo.models.embeddings import WordVectors

Floats = NDArray[np.float64]

QUESTIONS_AT_ONCE = 256
SCORES_AT_ONCE = 1 << 26  # bounds the memory of the scores of many questions on a large vocabulary
LONGEST_LINE = 10_000


@dataclass
class Section:
    """The questions of one kind: how many there are, how many have known words only, how many were answered right."""

    name: str
    questions: int = 0
    known: int = 0
    right: int = 0

    @property
    def accuracy(self) -> float | None:
        """Share of right answers among the questions whose words are all known; None where there are none."""
        return self.right / self.known if self.known else None

    @property
    def accuracy_of_all(self) -> float:
        """Share of right answers where a question with an unknown word counts as wrong."""
        return self.right / self.questions

    @property
    def coverage(self) -> float:
        """Share of questions whose words are all known."""
        return self.known / self.questions

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        shares = {"coverage": self.coverage, "accuracy": self.accuracy, "accuracy_of_all": self.accuracy_of_all}
        return {"name": self.name, "questions": self.questions, "known": self.known, "right": self.right, **shares}


@dataclass
class AnalogyReport:
    """Sections, and their sum."""

    path: str
    sections: list[Section]

    @property
    def total(self) -> Section:
        """All sections together."""
        sums = [sum(getattr(part, name) for part in self.sections) for name in ("questions", "known", "right")]
        return Section("total", *sums)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        sections = [section.to_dict() for section in self.sections]
        return {"kind": "analogies", "path": self.path, "total": self.total.to_dict(), "sections": sections}


@dataclass
class SimilarityReport:
    """Spearman's correlation over the pairs of which both words have a vector.

    ``spearman`` and ``interval`` are None where it is not defined: fewer than three pairs, or all scores equal.
    ``unseen`` counts the covered pairs of which a word is not in the vocabulary and got its vector from its n-grams.
    """

    path: str
    pairs: int
    covered: int
    unseen: int
    spearman: float | None
    interval: Interval | None

    @property
    def coverage(self) -> float:
        """Share of pairs of which both words have a vector."""
        return self.covered / self.pairs

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        interval = vars(self.interval) if self.interval else None
        numbers = {"pairs": self.pairs, "covered": self.covered, "unseen": self.unseen, "coverage": self.coverage}
        return {"kind": "similarity", "path": self.path, **numbers, "spearman": self.spearman, "interval": interval}


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that are not blank, each with its place ``file:line``.

    Raises:
        DataError: no such file, not UTF-8, or a line of absurd length.
    """
    try:
        with path.open("rb") as stream:
            number = 0
            while raw := stream.readline(LONGEST_LINE + 1):
                number += 1
                where = f"{path}:{number}"
                if len(raw) > LONGEST_LINE:
                    raise DataError("the line is too long for a list of words", where=where, zh="这一行太长，不是词表")
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError:
                    raise DataError("not valid UTF-8", where=where, zh="不是有效的 UTF-8") from None
                if line:
                    yield where, line
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror}", where=str(path), zh=f"无法读取文件：{error.strerror}"
        ) from None


def evaluate_analogies(vectors: WordVectors, path: str | Path) -> AnalogyReport:
    """Answer the questions of a file.

    Raises:
        DataError: the file is missing, empty or not in this format, with file and line.
    """
    sections: list[Section] = []
    known: list[tuple[Section, list[int]]] = []  # each question with the rows of a, b, c, d
    for where, line in lines_of(Path(path)):
        if line.startswith(":"):
            sections.append(Section(line[1:].strip()))
            continue
        words = line.split()
        if len(words) != 4:
            raise DataError(
                f"an analogy has four words, this line has {len(words)}",
                where=where,
                fix="write  a b c d  on each line, and  : name  before each section",
                zh=f"类比题每行四个词，这一行有 {len(words)} 个。每行写 a b c d，每节之前写 : 名称",
            )
        if not sections:
            sections.append(Section("questions"))
        sections[-1].questions += 1
        rows = [row for word in words if (row := vectors.row(word)) is not None]
        if len(rows) == 4:
            sections[-1].known += 1
            known.append((sections[-1], rows))
    if not any(section.questions for section in sections):
        raise DataError("the file holds no analogies", where=str(path), zh="文件中没有类比题")
    right = answers_right(vectors, np.array([rows for _, rows in known], dtype=np.int64).reshape(-1, 4))
    for (section, _), is_right in zip(known, right.tolist(), strict=True):
        section.right += is_right
    return AnalogyReport(str(path), [section for section in sections if section.questions])


def answers_right(vectors: WordVectors, rows_Q4: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether d is the best of all words but a, b and c, for questions given as rows: bool [Q]."""
    right = np.zeros(len(rows_Q4), dtype=np.bool_)
    if not len(rows_Q4):
        return right
    units = vectors.matrix / vectors.norms[:, None]
    step = max(1, min(QUESTIONS_AT_ONCE, SCORES_AT_ONCE // len(units)))
    for begin in range(0, len(rows_Q4), step):
        a, b, c, d = rows_Q4[begin : begin + step].T
        scores = (units[b] - units[a] + units[c]) @ units.T
        for asked in (a, b, c):
            scores[np.arange(len(a)), asked] = -np.inf
        right[begin : begin + step] = scores.argmax(axis=1) == d
    return right


def evaluate_similarity(
    vectors: WordVectors, path: str | Path, *, resamples: int = RESAMPLES, seed: int = 0
) -> SimilarityReport:
    """Compare cosines with the scores that people gave to pairs of words.

    Lines that begin with ``#``, and a first line whose third column is not a number, are passed over.

    Raises:
        DataError: the file is missing, empty or not in this format, with file and line.
    """
    pairs = unseen = 0
    judged: list[float] = []
    cosines: list[float] = []
    for number, (where, line) in enumerate(line for line in lines_of(Path(path)) if not line[1].startswith("#")):
        fields = [part.strip() for part in re.split(r"\t" if "\t" in line else r"," if "," in line else r"\s+", line)]
        score = as_number(fields[2]) if len(fields) >= 3 else None
        if score is None:
            if number == 0 and len(fields) >= 3:  # the names of the columns
                continue
            raise DataError(
                "two words and a number are expected",
                where=where,
                fix="write  word, tab, word, tab, score  on each line",
                zh="每行应为：词、制表符、词、制表符、分数",
            )
        pairs += 1
        first, second = (vectors.find_vector(word) for word in fields[:2])
        if first is not None and second is not None:
            unseen += any(vectors.row(word) is None for word in fields[:2])
            judged.append(score)
            cosines.append(cosine(first, second))
    if not pairs:
        raise DataError("the file holds no pairs of words", where=str(path), zh="文件中没有词对")
    spearman = correlation(np.array(judged), np.array(cosines))
    interval = None
    if spearman is not None:
        interval = bootstrap_correlation(np.array(judged), np.array(cosines), resamples, seed)
    return SimilarityReport(str(path), pairs, len(judged), unseen, spearman, interval)


def as_number(text: str) -> float | None:
    """The finite number that a text is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def cosine(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Cosine of two vectors; 0 where one is zero."""
    lengths = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return float(first @ second) / lengths if lengths else 0.0


def ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of their ranks.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    shared: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return shared


def correlation(first: Floats, second: Floats) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs, or where one side is all equal."""
    if len(first) < 3:
        return None
    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (first, second))
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale else None


def bootstrap_correlation(first: Floats, second: Floats, resamples: int, seed: int) -> Interval | None:
    """Percentile interval of the correlation over resampled pairs; None where too few of them have one."""
    if len(first) < MIN_UNITS:
        return None
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(len(first), size=len(first)) for _ in range(resamples))
    found = [value for rows in drawn if (value := correlation(first[rows], second[rows])) is not None]
    return percentile_interval(np.array(found)) if 2 * len(found) > resamples else None


def is_analogies(path: str | Path) -> bool:
    """Whether a file holds analogies: its first line names a section, or its first two have four words, none a number.

    One line is not enough: the names of the columns of a similarity set can be four words.

    Raises:
        DataError: the file cannot be read.
    """
    lines = [line for _, line in islice(lines_of(Path(path)), 2)]
    if not lines or lines[0].startswith("#"):
        return False
    words = [line.split() for line in lines]
    return lines[0].startswith(":") or all(
        len(four) == 4 and all(as_number(word) is None for word in four) for four in words
    )
