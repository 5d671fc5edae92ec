"""Word vectors: Word2Vec (skip-gram, CBOW), FastText and GloVe behind one interface.

- **Word2Vec** (Mikolov et al., "Distributed Representations of Words and Phrases and their Compositionality", NeurIPS
  2013) and **FastText** (see subwords.py) are trained by gensim, **GloVe** by glove.py. What is learnt is the same for
  all: one row for each word. gensim is needed for training alone, never to load or to look up.
- **Analogies** are solved by adding cosines, or by multiplying them (Levy and Goldberg, "Linguistic Regularities in
  Sparse and Explicit Word Representations", CoNLL 2014).
- **Texts** are the mean of their words' vectors, each weighted by a / (a + p(word)) where counts are known (Arora,
  Liang and Ma, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings", ICLR 2017): frequent words say little.
  Their second step, removing the first principal component, gained one point more in benchmarks/vectors.py (the
  weights themselves four to seven) and needs a whole set of texts, so it is left out.
- **On disk** a model is a folder with ``config.json``, ``model.safetensors`` and ``vocabulary.txt`` (a word on each
  line, most frequent first). The matrices are memory-mapped: they take no memory until words are asked for.

Names: V words, D dimensions, B texts.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hanmo.errors import DataError, ModelError, UsageError, nearest
from hanmo.folder import atomic_folder, read_json, verify, write_json
from hanmo.models import word2vec_format
from hanmo.models.embedding_files import CONFIG, VOCABULARY, WEIGHTS, fit_together, map_tensors, read_vocabulary
from hanmo.models.subwords import Subwords
from hanmo.settings import wanted_threads
from hanmo.text.segment import segment

Floats = NDArray[np.float32]

METHODS = ("skipgram", "cbow", "fasttext", "glove")
MODEL_TYPE = "vectors"
SIF_A = 1e-3  # the constant a of Arora et al., the best of their range
SPELLINGS = 50_000  # the most frequent words among which a misspelt one is looked for
ROWS_AT_ONCE = 1 << 16


def words_of(text: str, *, lowercase: bool = True) -> list[str]:
    """The words of a text as vectors are trained on them: no punctuation, and usually in small letters.

    >>> words_of("Word vectors, in 2013!")
    ['word', 'vectors', 'in', '2013']
    """
    words = [word for word in segment(text) if any(map(str.isalnum, word))]
    return [word.lower() for word in words] if lowercase else words


@dataclass(eq=False)
class WordVectors:
    """Words and their vectors.

    Attributes:
        words: V words, the most frequent first.
        matrix: float32 [V, D]; memory-mapped and read-only where it was loaded from a folder.
        method: how they were made: one of :data:`METHODS`, or "imported".
        counts: how often each word occurred, int64 [V], where that is known.
        subwords: of FastText: the vectors of n-grams, from which unseen words get theirs.
        training: the settings they were trained with and what was measured, as plain data.

    >>> vectors = WordVectors(["cat", "dog", "car"], np.array([[1, 0.1], [1, 0.2], [0, 1]], dtype=np.float32))
    >>> vectors.nearest("cat", 1)[0][0], round(vectors.similarity("cat", "dog"), 3)
    ('dog', 0.995)
    """

    words: list[str]
    matrix: Floats
    method: str = "imported"
    counts: NDArray[np.int64] | None = None
    subwords: Subwords | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = {word: row for row, word in enumerate(self.words)}
        if len(self.rows) != len(self.words) or self.matrix.shape[:1] != (len(self.words),):
            raise DataError(
                f"{len(self.words)} words ({len(self.rows)} distinct) and a matrix {list(self.matrix.shape)} differ",
                fix="give one row for each word, and each word once",
                zh="词与矩阵不匹配：每个词应恰有一行，且不得重复",
            )

    def __len__(self) -> int:
        return len(self.words)

    @property
    def size(self) -> int:
        """D."""
        return int(self.matrix.shape[1])

    @classmethod
    def train(
        cls,
        sentences: Iterable[Sequence[str]],
        method: str = "skipgram",
        *,
        size: int = 100,
        window: int | None = None,
        min_count: int = 5,
        epochs: int | None = None,
        seed: int = 0,
        threads: int | None = None,
        progress: bool = False,
    ) -> WordVectors:
        """Learn vectors from text.

        Args:
            sentences: texts as words (see :func:`words_of`); can be gone through again and again, as a list can.
                A word's context never crosses the ends of one of them.
            method: one of :data:`METHODS`.
            size: D.
            window: the largest distance between a word and its context; default: 5, GloVe 10.
            min_count: words that occur less often are left out, as if they were not in the text.
            epochs: passes over the text; default: GloVe 30, others 5 to 40, more for less text.
            seed: decides all that is random. GloVe gives the same vectors with any number of threads; the other methods
                repeat themselves only with one.
            threads: default: ``HANMO_THREADS``, else as many as the machine has.

        Raises:
            UsageError: an unknown method, an impossible value, or sentences that can be read only once.
            DataError: too little text.
            ResourceError: gensim, or scipy for GloVe, is not installed.
        """
        from hanmo.models.embedding_training import train  # the training code is not needed to look words up

        return train(
            sentences,
            method,
            size=size,
            window=window,
            min_count=min_count,
            epochs=epochs,
            seed=seed,
            threads=threads or wanted_threads() or os.cpu_count() or 1,
            progress=progress,
        )

    def row(self, word: str) -> int | None:
        """The row of a word as it is written, else of its small letters; None where it is not in the vocabulary."""
        found = self.rows.get(word)
        return self.rows.get(word.lower()) if found is None else found

    def find_vector(self, word: str) -> Floats | None:
        """The vector of a word, float32 [D]; of an unseen one from its n-grams where there are any, else None."""
        row = self.row(word)
        if row is not None:
            return np.array(self.matrix[row])
        return self.subwords.vector(word) if self.subwords else None

    def vector(self, word: str) -> Floats:
        """The vector of a word, float32 [D].

        Raises:
            UsageError: the word is not in the vocabulary and has no n-grams; the message names similar spellings.
        """
        vector = self.find_vector(word)
        if vector is None:
            raise self.unknown(word)
        return vector

    def unknown(self, word: str) -> UsageError:
        """The error for a word without a vector."""
        close = difflib.get_close_matches(word.lower(), self.words[:SPELLINGS], n=3, cutoff=0.6)
        return UsageError(
            f"'{word}' is not in the vocabulary of {len(self.words)} words",
            fix="did you mean " + ", ".join(f"'{found}'" for found in close) + "?" if close else "try another word",
            zh=f"词表（{len(self.words)} 词）中没有 '{word}'。"
            + ("是否想写 " + "、".join(f"'{found}'" for found in close) + "？" if close else "请换一个词"),
        )

    @functools.cached_property
    def norms(self) -> Floats:
        """The length of each vector, float32 [V]; 1 for a vector of zeros.

        Raises:
            ModelError: the matrix holds a number that is not finite.
        """
        norms = np.empty(len(self), dtype=np.float32)
        for begin in range(0, len(self), ROWS_AT_ONCE):
            norms[begin : begin + ROWS_AT_ONCE] = np.linalg.norm(self.matrix[begin : begin + ROWS_AT_ONCE], axis=1)
        if not np.isfinite(norms).all():
            row = int(np.argmin(np.isfinite(norms)))
            raise ModelError(
                f"the vector of '{self.words[row]}' has a number that is not finite",
                fix="copy or train the model again",
                zh=f"'{self.words[row]}' 的向量含非有限数；请重新复制或重新训练",
            )
        norms[norms == 0] = 1
        return norms

    def cosines(self, vector: Floats) -> Floats:
        """Cosine of a vector [D] with every word, float32 [V]."""
        cosines: Floats = self.matrix @ unit(vector) / self.norms
        return cosines

    def best(self, scores: Floats, n: int, without: Iterable[int | None] = ()) -> list[tuple[str, float]]:
        """The ``n`` words of highest score, best first; equal ones in the order of the vocabulary."""
        excluded = {row for row in without if row is not None}
        n = max(0, min(n, len(self) - len(excluded)))
        scores[list(excluded)] = -np.inf
        if not n:
            return []
        least = np.partition(scores, -n)[-n]
        candidates = np.flatnonzero(scores >= least)
        order = candidates[np.argsort(-scores[candidates], kind="stable")][:n]
        return [(self.words[row], float(scores[row])) for row in order]

    def nearest(self, word: str | ArrayLike, n: int = 10) -> list[tuple[str, float]]:
        """The ``n`` words nearest to a word (itself left out) or to a vector [D], with their cosines.

        Raises:
            UsageError: an unknown word, or a vector of another size.
        """
        if isinstance(word, str):
            return self.best(self.cosines(self.vector(word)), n, [self.row(word)])
        vector = np.asarray(word, dtype=np.float32)
        if vector.shape != (self.size,):
            raise UsageError(
                f"a vector of {self.size} numbers is expected, not one of shape {list(vector.shape)}",
                fix="make it with vector() or text_vector() of this model",
                zh=f"应为 {self.size} 维向量，不是形状 {list(vector.shape)}；请用本模型的 vector() 或 text_vector()",
            )
        return self.best(self.cosines(vector), n)

    def similarity(self, a: str, b: str) -> float:
        """The cosine between two words.

        Raises:
            UsageError: an unknown word.
        """
        return float(unit(self.vector(a)) @ unit(self.vector(b)))

    def analogy(self, a: str, b: str, c: str, n: int = 10, *, multiply: bool = False) -> list[tuple[str, float]]:
        """What is to ``c`` as ``b`` is to ``a``: the ``n`` best words with their scores; the three are left out.

        The score of x is cos(x, b) - cos(x, a) + cos(x, c), divided by the length of b - a + c; with ``multiply`` it is
        cos(x, b) cos(x, c) / cos(x, a) with cosines moved to the range from 0 to 1.

        Raises:
            UsageError: an unknown word.
        """
        rows = [self.row(word) for word in (a, b, c)]
        vectors = [unit(self.vector(word)) for word in (a, b, c)]
        if not multiply:
            return self.best(self.cosines(vectors[1] - vectors[0] + vectors[2]), n, rows)
        from_a, from_b, from_c = (0.5 + 0.5 * self.cosines(vector) for vector in vectors)
        scores: Floats = from_b * from_c / (from_a + np.float32(1e-3))
        return self.best(scores, n, rows)

    def text_vector(self, text: str | Sequence[str]) -> Floats:
        """The vector of a text (or of its words), float32 [D]: the weighted mean of its words' vectors.

        Words without a vector are passed over; a text that has no other is a vector of zeros.
        """
        words = words_of(text, lowercase=False) if isinstance(text, str) else text
        total = np.zeros(self.size, dtype=np.float64)
        weights = 0.0
        for word in words:
            vector = self.find_vector(word)
            if vector is not None:
                weight = self.weight(word)
                total += weight * vector
                weights += weight
        mean: Floats = (total / (weights or 1)).astype(np.float32)
        return mean

    def text_vectors(self, texts: Iterable[str | Sequence[str]]) -> Floats:
        """The vectors of texts, float32 [B, D]; see :meth:`text_vector`."""
        vectors = [self.text_vector(text) for text in texts]
        return np.stack(vectors) if vectors else np.empty((0, self.size), dtype=np.float32)

    @functools.cached_property
    def total_count(self) -> int:
        """Words of the training text that are in the vocabulary."""
        return 0 if self.counts is None else int(self.counts.sum())

    def weight(self, word: str) -> float:
        """The weight of a word in a text: a / (a + p(word)); 1 where counts are not known."""
        row = self.row(word)
        if self.counts is None or row is None:
            return 1.0
        return SIF_A / (SIF_A + float(self.counts[row]) / max(1, self.total_count))

    def save(self, folder: str | Path) -> None:
        """Write the model folder, completely or not at all.

        Raises:
            UsageError: a word with a line end, or ``folder`` is a file.
            ResourceError: the disk is full or cannot be written.
        """
        from safetensors.numpy import save_file

        for word in self.words:
            if not word or "\n" in word or word.encode("utf-8", "replace").decode() != word:
                raise UsageError(
                    f"the word {word!r} cannot be saved: it is empty, holds a line end or is not valid text",
                    fix="leave such words out",
                    zh=f"词 {word!r} 为空、含换行或不是有效文本，无法保存；请去掉这样的词",
                )
        tensors: dict[str, NDArray[Any]] = {"vectors": np.ascontiguousarray(self.matrix, dtype=np.float32)}
        if self.counts is not None:
            tensors["counts"] = np.ascontiguousarray(self.counts, dtype=np.int64)
        if self.subwords is not None:
            tensors["ngrams"] = np.ascontiguousarray(self.subwords.table, dtype=np.float32)
        with atomic_folder(Path(folder), {"kind": "model", "model_type": MODEL_TYPE}) as temporary:
            write_json(temporary / CONFIG, self.config())
            (temporary / VOCABULARY).write_bytes("".join(word + "\n" for word in self.words).encode())
            save_file(tensors, temporary / WEIGHTS)

    def config(self) -> dict[str, Any]:
        """What ``config.json`` says."""
        lengths = [self.subwords.shortest, self.subwords.longest] if self.subwords else None
        return {
            "model_type": MODEL_TYPE,
            "method": self.method,
            "vocab_size": len(self),
            "size": self.size,
            "subword_lengths": lengths,
            "training": self.training,
        }

    @classmethod
    def load(cls, folder: str | Path) -> WordVectors:
        """Open a model folder; the matrices stay on the disk until they are used.

        Raises:
            ModelError: no such folder, another kind of model, or damaged.
        """
        folder = Path(folder).expanduser()
        verify(folder, hashes=False)
        config = read_json(folder / CONFIG)
        if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
            raise ModelError(
                "this model does not hold word vectors",
                where=str(folder / CONFIG),
                fix="give a folder that 'hanmo vectors train' wrote, or a word2vec file",
                zh="这不是词向量模型。请给出 hanmo vectors train 写出的文件夹，或 word2vec 文件",
            )
        tensors = map_tensors(folder / WEIGHTS)
        words = read_vocabulary(folder / VOCABULARY)
        if not fit_together(config, tensors, len(words)):
            raise ModelError(
                "the words, the matrices and config.json do not fit together",
                where=str(folder),
                why="nothing was loaded",
                fix="copy or train the model again",
                zh="词表、矩阵与 config.json 不一致，未加载任何内容。请重新复制或重新训练",
            )
        subwords = Subwords(tensors["ngrams"], *config["subword_lengths"]) if "ngrams" in tensors else None
        return cls(words, tensors["vectors"], config["method"], tensors.get("counts"), subwords, config["training"])

    def save_word2vec(self, path: str | Path, binary: bool = False) -> None:
        """Write words and vectors in word2vec's text or binary format; counts and n-grams have no place in it.

        Raises:
            UsageError: a word with whitespace, which the format cannot hold.
            ResourceError: the disk is full or cannot be written.
        """
        word2vec_format.write_word2vec(path, self.words, self.matrix, binary=binary)

    @classmethod
    def load_word2vec(cls, path: str | Path) -> WordVectors:
        """Read a word2vec file (text or binary, told from its content) or a GloVe text file, plain or gzipped.

        Raises:
            DataError: no such file, or damaged; with file and line.
            ResourceError: the vectors do not fit in memory.
        """
        return cls(*word2vec_format.read_word2vec(path))


def unit(vector: Floats) -> Floats:
    """The vector at length 1; zeros stay zeros."""
    scaled: Floats = vector / np.float32(np.linalg.norm(vector) or 1)
    return scaled


def open_vectors(name: str | Path) -> WordVectors:
    """Word vectors from a model folder or from a word2vec file.

    Raises:
        ModelError: nothing there, or damaged.
        DataError: a file that is no word2vec file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        is_run = not (path / CONFIG).exists() and (path / "model" / CONFIG).is_file()
        return WordVectors.load(path / "model" if is_run else path)
    if path.is_file():
        return WordVectors.load_word2vec(path)
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, beside)
    raise ModelError(f"there is no model '{name}'", fix=hint, zh=f"找不到模型 '{name}'，{hint}")
