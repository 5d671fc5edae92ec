"""Word and character n-grams of a text as numbers, for linear models.

A feature is an n-gram with its kind before it: ``w:very good`` of words, ``c:ood`` of characters. Values are
``(1 + ln tf) * idf`` with ``idf = ln((1 + N) / (1 + df)) + 1``, scaled to length one for each kind (Salton and Buckley,
"Term-weighting approaches in automatic text retrieval", 1988), or just 1 for every feature that is there, which naive
Bayes does best with on short texts (Wang and Manning, "Baselines and Bigrams", ACL 2012).
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import DataError, UsageError, nearest
from hanmo.text.normalize import normalize
from hanmo.text.segment import FIRST_HAN, LANGUAGES, segment

Floats = NDArray[np.float64]

KINDS = {"words": ("w",), "characters": ("c",), "both": ("w", "c")}
MAX_FEATURES = 1_000_000  # of more, those in the most texts: the tables of a model stay within some 100 MB
SPACES = re.compile(r"\s+")
LONGEST = 32  # n-grams; longer ones are in one text only
CHINESE_NGRAMS, LETTER_NGRAMS = (1, 3), (2, 5)  # one Han character says about as much as two or three letters


@dataclass(frozen=True)
class FeatureConfig:
    """Which n-grams are taken from a text.

    Raises:
        UsageError: an unknown kind or language, or a range of lengths that is none.
    """

    features: str = "both"  # one of KINDS
    word_ngrams: tuple[int, int] = (1, 2)  # shortest and longest, in words
    character_ngrams: tuple[int, int] | None = None  # in characters; None: 1 to 3 for Chinese, 2 to 5 otherwise
    min_count: int = 2  # n-grams in fewer texts are left out
    stop_words: tuple[str, ...] = ()  # words to leave out, lower case
    language: str | None = None  # for the segmenter
    binary: bool = False  # 1 for what is there, instead of tf-idf

    def __post_init__(self) -> None:
        if self.features not in KINDS:
            raise UsageError(
                f"unknown features {self.features!r}",
                where="features",
                fix=nearest(self.features, KINDS),
                zh=f"未知的特征种类 {self.features!r}，可用：" + "、".join(KINDS),
            )
        if self.language not in (None, *LANGUAGES):
            raise UsageError(
                f"unknown language {self.language!r}",
                where="language",
                fix="known: " + ", ".join(LANGUAGES),
                zh=f"未知语言 {self.language!r}，可用：zh、en",
            )
        for name in ("word_ngrams", "character_ngrams"):
            bounds = getattr(self, name)
            if bounds is not None and not (len(bounds) == 2 and 1 <= bounds[0] <= bounds[1] <= LONGEST):
                raise UsageError(
                    f"{name} is {bounds!r}",
                    where=name,
                    fix=f"give the shortest and the longest, as (1, 2), at most {LONGEST}",
                    zh=f"{name} 应为（最短，最长），例如 (1, 2)，最长不超过 {LONGEST}",
                )
        if self.min_count < 1:
            raise UsageError("min_count must be 1 or more", where="min_count", zh="min_count 至少为 1")

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> FeatureConfig:
        """From JSON, where tuples have become lists.

        Raises:
            TypeError, UsageError: a key or value that is none of a configuration.
        """
        known: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return cls(**known)


@dataclass
class Vectorizer:
    """A fixed list of features and how much each one counts.

    >>> vectorizer = Vectorizer.fit(["a good day", "a bad day"], FeatureConfig(features="words", word_ngrams=(1, 1)))
    >>> vectorizer.names
    ['w:a', 'w:day']
    """

    config: FeatureConfig
    names: list[str]
    idf: Floats  # [F]
    rows: dict[str, int] = field(init=False)
    first_word: int = field(init=False)  # the row where the words begin: "c:" sorts before "w:"
    stop_words: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = {name: row for row, name in enumerate(self.names)}
        self.first_word = sum(name.startswith("c:") for name in self.names)
        self.stop_words = frozenset(self.config.stop_words)

    @classmethod
    def fit(cls, texts: Sequence[str], config: FeatureConfig) -> Vectorizer:
        """Collect the features of the texts and count in how many each one is.

        Raises:
            DataError: no feature is left.
            ResourceError: Chinese words are wanted and the package ``jieba`` is not installed.
        """
        if config.character_ngrams is None:
            bounds = CHINESE_NGRAMS if is_mostly_chinese(texts) else LETTER_NGRAMS
            config = FeatureConfig(**{**asdict(config), "character_ngrams": bounds})
        counter = cls(config, [], np.zeros(0))
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(counter.terms(text).keys())
        names = sorted(name for name, count in counts.items() if count >= config.min_count)
        if len(names) > MAX_FEATURES:
            names = sorted(sorted(names, key=lambda name: -counts[name])[:MAX_FEATURES])
        if not names:
            raise DataError(
                "no feature is left to learn from",
                why=f"no n-gram is in {config.min_count} or more texts once stop words are taken out",
                fix="lower min_count, take fewer stop words, or give more texts",
                zh="没有可用的特征：请降低 min_count、减少停用词，或增加文本",
            )
        found = np.array([counts[name] for name in names], dtype=np.float64)
        return cls(config, names, np.log((1 + len(texts)) / (1 + found)) + 1)

    def terms(self, text: str) -> Counter[str]:
        """Every n-gram of a text with how often it is there, known or not."""
        text = normalize(text, half_width=True).lower()
        found: Counter[str] = Counter()
        if "w" in KINDS[self.config.features]:
            words = [word for word in segment(text, self.config.language) if word not in self.stop_words]
            low, high = self.config.word_ngrams
            for n in range(low, high + 1):
                found.update("w:" + " ".join(words[i : i + n]) for i in range(len(words) - n + 1))
        if "c" in KINDS[self.config.features]:
            line = f" {SPACES.sub(' ', text).strip()} "  # a space at both ends, so that the ends can be seen
            low, high = self.config.character_ngrams or LETTER_NGRAMS
            for n in range(low, high + 1):
                found.update("c:" + line[i : i + n] for i in range(len(line) - n + 1))
        return found

    def vector(self, text: str) -> tuple[NDArray[np.int64], Floats]:
        """The rows of the features that a text has, ascending, and their values."""
        find = self.rows.get
        counts = {row: count for name, count in self.terms(text).items() if (row := find(name)) is not None}
        known = sorted(counts.items())
        rows = np.array([row for row, _ in known], dtype=np.int64)
        if self.config.binary:
            return rows, np.ones(rows.size)
        values = (1 + np.log(np.array([count for _, count in known], dtype=np.float64))) * self.idf[rows]
        split = int(np.searchsorted(rows, self.first_word))
        for part in (values[:split], values[split:]):
            if part.size:
                part /= np.sqrt(np.square(part).sum())
        return rows, values

    def counts(self, texts: Iterable[str]) -> Any:
        """How often each text has each feature, ``scipy.sparse.csr_matrix`` float64 [N, F]."""
        from scipy.sparse import csr_matrix

        begins, rows, numbers = [0], array("q"), array("d")
        find = self.rows.get
        for text in texts:
            found = {row: count for name, count in self.terms(text).items() if (row := find(name)) is not None}
            for row in sorted(found):
                rows.append(row)
                numbers.append(found[row])
            begins.append(len(rows))
        # 32-bit places as scikit-learn's solvers want them; there are fewer than 2^31 in any memory
        places = np.frombuffer(rows, dtype=np.int64).astype(np.int32)
        data = np.frombuffer(numbers, dtype=np.float64).copy()
        return csr_matrix((data, places, np.array(begins, dtype=np.int32)), shape=(len(begins) - 1, len(self.names)))

    def weigh(self, counts_NF: Any) -> Any:
        """Counts as the values of :meth:`vector`, a sparse matrix [N, F]."""
        return weigh(counts_NF, self.idf, self.first_word, self.config.binary)

    def weigh_as_seen(self, counts_NF: Any, seen: NDArray[np.int64]) -> Any:
        """Counts as values for a vectorizer that was fitted on the texts ``seen`` only, a sparse matrix [N, fewer].

        Held-out texts must not vote on which features are kept: what two texts have is seen once by a model
        that has not seen the other, and in a new text it would not be known.
        """
        found = np.bincount(counts_NF[seen].indices, minlength=len(self.names))
        kept = np.flatnonzero(found >= self.config.min_count)
        idf = np.log((1 + len(seen)) / (1 + found[kept])) + 1
        return weigh(counts_NF[:, kept], idf, int(np.searchsorted(kept, self.first_word)), self.config.binary)


def weigh(counts_NF: Any, idf: Floats, first_word: int, binary: bool) -> Any:
    """Counts of features as tf-idf of length one for each kind (columns below and from ``first_word``), or as ones."""
    matrix_NF = counts_NF.copy()
    if binary:
        matrix_NF.data[:] = 1
        return matrix_NF
    matrix_NF.data = (1 + np.log(matrix_NF.data)) * idf[matrix_NF.indices]
    text = np.repeat(np.arange(matrix_NF.shape[0]), np.diff(matrix_NF.indptr))
    part = 2 * text + (matrix_NF.indices >= first_word)
    matrix_NF.data /= np.sqrt(np.bincount(part, np.square(matrix_NF.data)))[part]
    return matrix_NF


def is_mostly_chinese(texts: Sequence[str]) -> bool:
    """Whether a sample of the texts has more Han characters than words of letters."""
    sample = " ".join(text[:200] for text in texts[:1000])
    return len(FIRST_HAN.findall(sample)) > len(re.findall(r"[A-Za-z]+", sample))
