"""Summaries made of sentences of the text: the first ones, the most central ones, those that look like summaries.

Letters in names: S sentences of a text, W words of its vocabulary, D dimensions, F features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.data.tasks.types import Pair
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.tasks.base import System
from hanmo.tasks.prompts import mostly_chinese
from hanmo.tasks.rouge import Rouge
from hanmo.text.segment import segment, stop_words
from hanmo.text.sentences import join_words, split_clauses, split_sentences

MOST_SENTENCES = 5  # of a summary whose length is chosen by training records
USUAL_SENTENCES = 3  # without training records
TITLE = 0.6  # summaries shorter than this share of a sentence are made of clauses
TRIED = 400  # training records by which a length is chosen
LEARNT = 1000  # training records whose sentences are ranked
DAMPING = 0.85  # of PageRank
ROUNDS = 50
TOO_ALIKE = 0.7  # cosine of two sentences of which only one is told
BLEND = 0.3  # how much likeness to what is told already takes away
RIDGE = 10.0
FEATURES = 8

Floats = NDArray[np.float64]


# Vectors of sentences -------------------------------------------------------------------------------------------------


def word_vectors(sentences: Sequence[str]) -> Any:
    """TF-IDF of the sentences of one text among themselves, rows of length one, sparse ``[S, W]``.

    Stop words and marks are left out; where nothing else is there, they stay.
    """
    from scipy.sparse import csr_matrix

    dull = stop_words("en") | stop_words("zh")
    words = [[word for word in map(str.lower, segment(sentence)) if word[0].isalnum()] for sentence in sentences]
    words = [[word for word in row if word not in dull] or row for row in words]
    number: dict[str, int] = {}
    counts = [Counter(number.setdefault(word, len(number)) for word in row) for row in words]
    met = np.zeros(max(1, len(number)))
    for row in counts:
        met[list(row)] += 1
    idf_W = np.log((1 + len(sentences)) / (1 + met)) + 1
    lengths = np.cumsum([0, *map(len, counts)])
    columns = np.array([column for row in counts for column in row], dtype=np.int64)
    values = np.array([count for row in counts for count in row.values()], dtype=np.float64)
    values = values * idf_W[columns] if len(columns) else values
    for begin, end in pairwise(lengths):
        values[begin:end] /= np.linalg.norm(values[begin:end]) or 1.0
    return csr_matrix((values, columns, lengths), shape=(len(sentences), len(met)))


def text_rank(vectors_SD: Any) -> Floats:
    """How central each sentence is, ``[S]``, with a sum of one: PageRank on cosines (Mihalcea and Tarau 2004).

    The graph is never written down: a step through it is two products with the vectors, so that thousands of sentences
    need little memory. Dense vectors, whose cosines can be negative, are moved to cosines from 0 to 1.

    Args:
        vectors_SD: rows of length one, sparse and not negative, or dense.
    """
    S = vectors_SD.shape[0]
    if S < 2:
        return np.full(S, 1.0)
    dense = isinstance(vectors_SD, np.ndarray)

    def step(x_S: Floats) -> Floats:
        y_S: Floats = vectors_SD @ (vectors_SD.T @ x_S) - x_S * own_S
        moved_S: Floats = (y_S + x_S.sum() - x_S) / 2
        return moved_S if dense else y_S

    own_S = np.asarray((vectors_SD**2 if dense else vectors_SD.multiply(vectors_SD)).sum(axis=1)).ravel()
    degree_S = step(np.ones(S))
    linked_S = degree_S > 1e-9
    rank_S = np.full(S, 1 / S)
    for _ in range(ROUNDS):
        sent_S = np.where(linked_S, rank_S / np.where(linked_S, degree_S, 1.0), 0.0)
        lost = rank_S[~linked_S].sum()
        following_S: Floats = (1 - DAMPING) / S + DAMPING * (np.maximum(step(sent_S), 0.0) + lost / S)
        if np.abs(following_S - rank_S).sum() < 1e-8:
            return following_S
        rank_S = following_S
    return rank_S


def choose(scores_S: Floats, vectors_SD: Any, k: int) -> list[int]:
    """The places of k sentences in their order: good ones that do not repeat each other.

    Maximal marginal relevance (Carbonell and Goldstein 1998): each next one is best after its likeness to those that
    are chosen is taken away; one that says nearly the same is taken only when nothing else is left.
    """
    spread = scores_S.max() - scores_S.min() if len(scores_S) else 0.0
    value_S = (scores_S - scores_S.min()) / spread if spread > 0 else np.ones(len(scores_S))
    alike_S, chosen = np.zeros(len(scores_S)), list[int]()
    left_S = np.ones(len(scores_S), dtype=bool)
    for _ in range(min(k, len(scores_S))):
        gain_S = (1 - BLEND) * value_S - BLEND * alike_S - 10.0 * (alike_S > TOO_ALIKE)
        best = int(np.argmax(np.where(left_S, gain_S, -np.inf)))
        chosen.append(best)
        left_S[best] = False
        likeness = vectors_SD @ vectors_SD[best].T
        alike_S = np.maximum(
            alike_S, np.asarray(likeness.todense() if hasattr(likeness, "todense") else likeness).ravel()
        )
    return sorted(chosen)


# Systems --------------------------------------------------------------------------------------------------------------


class Extractive(System[Pair, str]):
    """Some sentences of a text in their order.

    How many is learnt: as many as give the best ROUGE on training records.

    Attributes:
        count: sentences of a summary.
        clauses: whether clauses are chosen instead, as summaries are much shorter than sentences: titles.
        cut: tokens after which a summary of one sentence is cut off, where summaries are shorter than sentences.
    """

    kind = "classical"
    whole = False  # whether only whole sentences are taken

    def __init__(self, count: int | None = None) -> None:
        self.learns = count is None
        self.count = count or USUAL_SENTENCES
        self.cut: int | None = None
        self.chinese = self.clauses = False

    def split(self, text: str) -> list[str]:
        """What is chosen from."""
        return split_clauses(text) if self.clauses else split_sentences(text)

    def learn(self, train: Sequence[Pair], rouge: Rouge) -> None:
        """What has to be known before sentences can be scored."""

    def fit(self, train: Sequence[Pair], validation: Sequence[Pair] = ()) -> None:
        """Learn how sentences are scored, and how many are told."""
        del validation
        self.chinese = mostly_chinese([record.target for record in train])
        rouge = Rouge(chinese=self.chinese)
        tried = train[:: max(1, len(train) // TRIED)][:TRIED]
        usual = int(np.median([rouge.length(record.target) for record in tried]))
        sentences = [rouge.length(sentence) for record in tried for sentence in split_sentences(record.source)]
        self.clauses = not self.whole and usual < TITLE * float(np.median(sentences or [0]))
        self.learn(train, rouge)
        texts = [self.split(record.source) for record in tried]
        best = -1.0
        for count in range(1, MOST_SENTENCES + 1):
            gain = self.gain(texts, tried, rouge, count, None)
            if gain > best:
                best, self.count, self.cut = gain, count, None
        for cut in sorted({usual, usual * 5 // 4, usual * 3 // 2} - {0}):
            gain = self.gain(texts, tried, rouge, 1, cut)
            if gain > best:
                best, self.count, self.cut = gain, 1, cut

    def gain(
        self, texts: Sequence[Sequence[str]], records: Sequence[Pair], rouge: Rouge, count: int, cut: int | None
    ) -> float:
        """The mean ROUGE of summaries of so many sentences."""
        found = [
            rouge.gain((record.target, *record.references), self.shortened(self.chosen(text, count), cut))
            for text, record in zip(texts, records, strict=True)
        ]
        return float(np.mean(found))

    @abstractmethod
    def chosen(self, sentences: Sequence[str], count: int) -> str:
        """A summary of so many sentences; of a text with fewer, all."""

    def shortened(self, text: str, cut: int | None) -> str:
        """The beginning of a text, so many words, or Chinese characters."""
        if cut is None:
            return text
        words = segment(text, "en") if self.chinese else text.split()
        return text if len(words) <= cut else (join_words if self.chinese else " ".join)(words[:cut])

    def answer(self, records: Sequence[Pair]) -> list[str]:
        """The summaries."""
        answers = []
        bar = Progress(pick("summarizing", "摘要"), len(records), "texts")
        for number, record in enumerate(records, 1):
            answers.append(self.shortened(self.chosen(self.split(record.source), self.count), self.cut))
            bar.update(number)
        bar.close()
        return answers

    def signature(self) -> Mapping[str, Any]:
        """How many sentences or clauses, and where they are cut."""
        unit = "clauses" if self.clauses else "sentences"
        return {unit: self.count, **({"cut": self.cut} if self.cut else {})}


class Lead(Extractive):
    """The first sentences, which summarize news so well that few systems did better for long (Nenkova 2005).

    Args:
        count: how many; None: as training records say.
    """

    kind, whole = "baseline", True

    def __init__(self, count: int | None = None) -> None:
        super().__init__(count)
        self.name = pick(f"lead-{count}", f"前 {count} 句") if count else pick("lead-k", "前 k 句")

    def chosen(self, sentences: Sequence[str], count: int) -> str:
        """The first."""
        return join_words(sentences[:count])


class Scored(Extractive):
    """The sentences with the highest scores that do not repeat each other."""

    def vectors(self, sentences: Sequence[str]) -> Any:
        """Vectors of the sentences of a text, rows of length one."""
        return word_vectors(sentences)

    @abstractmethod
    def scores(self, sentences: Sequence[str], vectors: Any) -> Floats:
        """How much each sentence belongs into a summary, ``[S]``."""

    def chosen(self, sentences: Sequence[str], count: int) -> str:
        """The best ones in their order."""
        if len(sentences) <= count:
            return join_words(sentences)
        vectors = self.vectors(sentences)
        return join_words([sentences[i] for i in choose(self.scores(sentences, vectors), vectors, count)])


class TextRank(Scored):
    """The most central sentences.

    Args:
        encoder: a :class:`~hanmo.inference.encoder.TextEncoder` that gives the vectors; None: TF-IDF.
        count: how many; None: as training records say.
    """

    def __init__(self, encoder: Any = None, count: int | None = None) -> None:
        super().__init__(count)
        self.encoder = encoder
        self.name = pick("TextRank over TF-IDF", "TextRank（TF-IDF）") if encoder is None else encoder.name
        self.kind = "classical" if encoder is None else "encoder"

    def vectors(self, sentences: Sequence[str]) -> Any:
        """TF-IDF, or the encoder's."""
        if self.encoder is None:
            return word_vectors(sentences)
        return np.asarray(self.encoder.embed(list(sentences)), dtype=np.float64)

    def scores(self, sentences: Sequence[str], vectors: Any) -> Floats:
        """PageRank."""
        del sentences
        return text_rank(vectors)


class Ranker(Scored):
    """Sentences that look like those that training summaries are made of.

    Ridge regression from where a sentence stands, how long and how central it is, and its words, to the ROUGE that it
    would have as a summary by itself, less the mean of its text.
    """

    learns = True

    def __init__(self) -> None:
        super().__init__()
        self.name = pick("sentence ranker (ridge regression)", "句子排序（岭回归）")
        self.hasher: Any = None
        self.weights: Any = None

    def learn(self, train: Sequence[Pair], rouge: Rouge) -> None:
        """Measure the sentences of some training records, and fit them."""
        from scipy.sparse import vstack
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import Ridge

        self.hasher = HashingVectorizer(
            analyzer=lambda text: word_pairs(text), n_features=1 << 16, norm="l2", alternate_sign=False
        )
        rows, gains = [], []
        for record in train[:: max(1, len(train) // LEARNT)][:LEARNT]:
            sentences = self.split(record.source)[:60]
            if len(sentences) < 2:
                continue
            found = np.array([rouge.gain((record.target, *record.references), sentence) for sentence in sentences])
            rows.append(self.features(sentences, word_vectors(sentences)))
            gains.append(found - found.mean())
        self.weights = None
        if rows:
            self.weights = Ridge(alpha=RIDGE, solver="lsqr").fit(vstack(rows).tocsr(), np.concatenate(gains))

    def features(self, sentences: Sequence[str], vectors: Any) -> Any:
        """Numbers and hashed words of each sentence, sparse ``[S, F]``."""
        from scipy.sparse import csr_matrix, hstack

        S = len(sentences)
        place_S = np.arange(S)
        length_S = np.array([len(segment(sentence, "en")) for sentence in sentences], dtype=np.float64)
        middle_S = np.asarray(vectors.mean(axis=0)).ravel()
        numbers_SF = np.stack(
            [
                place_S / max(1, S - 1),
                place_S == 0,
                place_S == 1,
                place_S == S - 1,
                np.log1p(length_S) / 4,
                length_S / max(1.0, length_S.max()),
                text_rank(vectors) * S / 4,
                np.asarray(vectors @ middle_S).ravel() * np.sqrt(S) / 2,
            ],
            axis=1,
        ).astype(np.float64)
        assert numbers_SF.shape[1] == FEATURES
        return hstack([csr_matrix(numbers_SF), self.hasher.transform(sentences)]).tocsr()

    def scores(self, sentences: Sequence[str], vectors: Any) -> Floats:
        """What the regression says; where nothing could be learnt, the first sentences are best."""
        if self.weights is None:
            return -np.arange(len(sentences), dtype=np.float64)
        found: Floats = self.weights.predict(self.features(sentences, vectors))
        return found


def word_pairs(text: str) -> list[str]:
    """Words and pairs of neighbours."""
    words = [word.lower() for word in segment(text)]
    return [*words, *(f"{first} {second}" for first, second in pairwise(words))]
