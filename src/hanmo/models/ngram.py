"""N-gram language models with interpolated modified Kneser-Ney smoothing, over integer token ids.

The choices:

- **Estimate**: Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (Harvard TR-10-98,
  1998): three discounts for each order (n-grams seen once, twice, three times or more), continuation counts below the
  highest order, interpolation all the way down to the uniform distribution.
- **Document boundaries** follow KenLM and SRILM: a document w1..wn is the sentence ``<s> w1 .. wn </s>``; no n-gram
  crosses its ends; ``<s>`` is context and never predicted; an n-gram that begins with ``<s>`` has no left neighbour, so
  its plain count stands in for its continuation count.
- **One separator id**: base models of Hanmo use one id for ``<s>`` and ``</s>``. Nothing is lost: as the first id of an
  n-gram of two or more it can only be ``<s>``, as the last id only ``</s>``. The unigram row of the separator holds the
  probability of ``</s>`` and the backoff weight of ``<s>``, which an ARPA file lists on two lines.
- **Vocabulary**: every id of ``range(vocab_size)`` can be predicted, also those never seen in training (they share the
  uniform mass), except a ``bos_id`` that differs from ``eos_id``: its log-probability is -inf.
- **Storage**: numpy arrays only. An n-gram is its prefix and its last word, so each order is one sorted array of
  ``prefix_row * vocab_size + word``, where ``prefix_row`` is the index of the prefix in the table one order below. A
  lookup is a binary search, and the words seen after a context lie side by side. ``ngram_counts.py`` does the counting.

Names: a *row* is the index of an n-gram in the table of its order; row -1 means "not seen". T counts tokens.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hanmo.errors import DataError, ModelError
from hanmo.folder import atomic_file, os_error_of
from hanmo.models.ngram_counts import (
    CHUNK_TOKENS,
    Chunk,
    Counts,
    Ints,
    Marks,
    check_ids,
    contexts_of,
    count_ngrams,
    find_rows,
    lay_out,
    read_chunks,
    suffix_rows,
)
from hanmo.progress import Progress

if TYPE_CHECKING:
    from hanmo.text.tokenizer import Tokenizer

Floats = NDArray[np.float64]

FORMAT = "hanmo-ngram-1"
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # KenLM's --discount_fallback


@dataclass
class Table:
    """The n-grams of one order; rows are sorted by key.

    ``keys`` int64 [rows]; ``logprobs`` float64 [rows], natural log P(last word | the words before it), interpolated;
    ``backoffs`` float64 [rows], natural log of the mass that the n-gram, as a context, leaves to the order below
    (empty for the highest order).
    """

    keys: Ints
    logprobs: Floats
    backoffs: Floats


@dataclass
class NGramModel:
    """An n-gram model: P(w | the order - 1 tokens before it).

    >>> model = NGramModel.train([[5, 6, 7, 0], [5, 6, 0]], order=3, vocab_size=8, bos_id=0, eos_id=0)
    >>> bool(abs(np.exp(model.next_logprobs([5])).sum() - 1) < 1e-12)
    True
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    tables: list[Table]
    discounts: list[tuple[float, float, float]]  # D1, D2, D3+ of each order, lowest first; none if read from ARPA
    trained_on: dict[str, int] = field(default_factory=dict)  # tokens and documents

    @property
    def order(self) -> int:
        """The longest n-gram."""
        return len(self.tables)

    @classmethod
    def train(
        cls,
        documents: Iterable[ArrayLike],
        order: int,
        vocab_size: int,
        *,
        bos_id: int,
        eos_id: int,
        chunk_tokens: int = CHUNK_TOKENS,
        progress: bool = False,
    ) -> NGramModel:
        """Count and estimate a model in one pass over ``documents``.

        Each document is a one-dimensional array of ids. Its final ``eos_id`` may be there (as a token corpus has it) or
        is added; an ``eos_id`` further inside ends a document too, so a flat stream of documents can be given in pieces
        that end at document ends. The documents are read once and not kept: memory goes by the distinct n-grams (about
        70 bytes each at the peak) and by ``chunk_tokens``, the tokens that are counted at once; it changes no result.

        Raises:
            DataError: no documents; an id outside the vocabulary; a ``bos_id`` inside a document where it is not also
                ``eos_id``.
            ModelError: ``order`` below 1, or separator ids outside the vocabulary.
        """
        if order < 1 or not (0 <= bos_id < vocab_size and 0 <= eos_id < vocab_size):
            raise ModelError(
                f"no n-gram model of order {order} with {vocab_size} ids, bos_id {bos_id} and eos_id {eos_id}",
                fix="the order is at least 1 and both separators are ids of the vocabulary",
                zh=f"无法建立阶数为 {order}、词表大小为 {vocab_size} 的 n-gram 模型：阶数至少为 1，起止符须在词表内",
            )
        chunks = read_chunks(documents, order, vocab_size, bos_id, eos_id, chunk_tokens)
        if progress:
            chunks = _shown(chunks, f"{order}-gram model")
        counted = count_ngrams(chunks, order, vocab_size)
        occurrences = counted[0].occurrences
        trained_on = {"tokens": int(occurrences.sum()), "documents": int(occurrences[eos_id])}
        tables, discounts = _estimate(counted, vocab_size, bos_id, eos_id)
        return cls(vocab_size, bos_id, eos_id, tables, discounts, trained_on)

    def logprobs(self, ids: ArrayLike) -> Floats:
        """Natural log P(ids[t] | the tokens before it in its document), float64 [T].

        The first token is predicted after the document start. An ``eos_id`` is predicted like any token, and the token
        after it starts a new document: a whole split of a token corpus is scored in one call.

        Raises:
            DataError: an id outside the vocabulary.
        """
        array = np.asarray(ids)
        check_ids(array, self.vocab_size)
        pieces = []
        for begin in range(0, array.size, CHUNK_TOKENS):
            # The tokens before the chunk give its first tokens their context and are not scored again.
            left = max(0, begin - self.order)
            stream, starts = lay_out(array[left : begin + CHUNK_TOKENS], self.bos_id, self.eos_id)
            pieces.append(self._score(stream, starts)[~starts][begin - left :])
        return np.concatenate(pieces) if pieces else np.zeros(0)

    def _score(self, ids: Ints, starts: Marks) -> Floats:
        """Log-probabilities of a laid-out stream; the entries at ``starts`` have no meaning."""
        rows = ids.astype(np.int64)
        logprobs = self.tables[0].logprobs[rows]
        for lower, table in itertools.pairwise(self.tables):
            at, contexts, rows = self._extend(table, rows, ids, starts)
            logprobs[at] += lower.backoffs[contexts]
            seen = np.flatnonzero(rows >= 0)
            logprobs[seen] = table.logprobs[rows[seen]]
        return logprobs

    def _extend(self, table: Table, rows: Ints, ids: Ints, starts: Marks) -> tuple[Ints, Ints, Ints]:
        """From the rows of the (n-1)-grams that end at each position to those of the n-grams.

        Returns the positions whose context was seen, the rows of those contexts, and the new row of every position.
        """
        at, contexts = contexts_of(rows, starts)
        longer = np.full(ids.size, -1, dtype=np.int64)
        longer[at] = find_rows(table.keys, contexts * self.vocab_size + ids[at].astype(np.int64))
        return at, contexts, longer

    def next_logprobs(self, context: Sequence[int] | Ints) -> Floats:
        """Natural log P(w | context) for every id w, float64 [vocab_size]; ``exp`` of it sums to one.

        ``context`` is the beginning of a document (what stands before its last ``eos_id`` is ignored); empty means the
        document start.

        Raises:
            DataError: an id outside the vocabulary.
        """
        array = np.asarray(context, dtype=np.int64)
        check_ids(array, self.vocab_size)
        ends = np.flatnonzero(array == self.eos_id)
        document = array[ends[-1] + 1 :] if ends.size else array
        # With order - 1 tokens at hand the document start is out of reach.
        ids = np.append(self.bos_id, document)[max(0, document.size + 2 - self.order) :]
        starts = np.zeros(ids.size, dtype=bool)
        rows = ids
        logprobs = self.tables[0].logprobs.copy()
        for lower, table in itertools.pairwise(self.tables):
            row = int(rows[-1])
            if row >= 0:
                first, last = np.searchsorted(table.keys, [row * self.vocab_size, (row + 1) * self.vocab_size])
                logprobs += lower.backoffs[row]
                logprobs[table.keys[first:last] - row * self.vocab_size] = table.logprobs[first:last]
            # A longer context may be known where this one is not: pruned ARPA files lack some suffixes.
            _, _, rows = self._extend(table, rows, ids, starts)
        return logprobs

    def perplexity(self, ids: ArrayLike, *, unknown_id: int | None = None) -> float:
        """exp of the mean of ``-logprobs(ids)``: the perplexity per word, as KenLM, SRILM and PTB results give it.

        Args:
            ids: documents (sentences) end to end, each with its ``eos_id``, which counts as a word; ``<s>`` does not.
            unknown_id: leave the predictions of this id out of sum and count ("excluding OOVs"); as context it stays.
                Without it every word counts ("including OOVs"), as on PTB, where ``<unk>`` is a word of the text.

        Raises:
            DataError: an id outside the vocabulary, or nothing to score.

        >>> model = NGramModel.train([[1, 2, 0], [2, 0]], order=1, vocab_size=4, bos_id=0, eos_id=0)
        >>> round(model.perplexity([1, 0]), 3)  # (0.225 * 0.325) ** (-1 / 2)
        3.698
        """
        logprobs = self.logprobs(ids)
        if unknown_id is not None:
            logprobs = logprobs[np.asarray(ids) != unknown_id]
        if not logprobs.size:
            raise DataError("there are no words to take the perplexity of", zh="没有可供计算困惑度的词")
        with np.errstate(over="ignore"):
            return float(np.exp(-logprobs.mean()))

    def to_arpa(self, path: str | Path, tokenizer: Tokenizer) -> None:
        """Write an ARPA file with the tokens of ``tokenizer`` as words; see :func:`hanmo.models.arpa.write_arpa`.

        An id that has no token is written as ``<|7|>``.
        """
        import tokenizers

        from hanmo.models.arpa import write_arpa

        vocabulary = tokenizers.Tokenizer.from_str(tokenizer.to_json()).get_vocab(with_added_tokens=True)
        tokens = {index: token for token, index in vocabulary.items()}
        write_arpa(self, path, [tokens.get(index, f"<|{index}|>") for index in range(self.vocab_size)])

    @staticmethod
    def from_arpa(path: str | Path) -> tuple[NGramModel, list[str]]:
        """Read an ARPA file: the model, and the word of each id; see :func:`hanmo.models.arpa.read_arpa`."""
        from hanmo.models.arpa import read_arpa

        return read_arpa(path)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the tables take."""
        return sum(table.keys.nbytes + table.logprobs.nbytes + table.backoffs.nbytes for table in self.tables)

    def save(self, path: str | Path) -> None:
        """Write the model as one safetensors file, completely or not at all.

        Raises:
            ResourceError: the disk is full or cannot be written; an older file at ``path`` is intact.
        """
        path = Path(path)
        config = {name: value for name, value in self.describe().items() if name != "bytes"}
        config |= {"bos_id": self.bos_id, "eos_id": self.eos_id}
        tensors = {
            f"{n}.{name}": getattr(table, name)
            for n, table in enumerate(self.tables, start=1)
            for name in ("keys", "logprobs", "backoffs")
        }
        with atomic_file(path) as temporary:
            try:
                save_file(tensors, temporary, {"format": FORMAT, "config": json.dumps(config)})
            except SafetensorError as error:
                raise os_error_of(error, path) from error

    @classmethod
    def load(cls, path: str | Path) -> NGramModel:
        """Read a model that :meth:`save` wrote.

        Raises:
            ModelError: the file is missing, truncated, not an n-gram model, or its tables contradict one another.
        """
        path = Path(path)
        try:
            with safe_open(path, framework="numpy") as stream:
                header = stream.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ModelError("not an n-gram model of Hanmo", where=str(path), zh="这不是 Hanmo 的 n-gram 模型")
                config = json.loads(header["config"])
                tables = [
                    Table(*(stream.get_tensor(f"{n}.{name}") for name in ("keys", "logprobs", "backoffs")))
                    for n in range(1, int(config["order"]) + 1)
                ]
            model = cls(
                int(config["vocab_size"]),
                int(config["bos_id"]),
                int(config["eos_id"]),
                tables,
                [(float(one), float(two), float(more)) for one, two, more in config["discounts"]],
                dict(config["trained_on"]),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the n-gram model cannot be read: {error}",
                where=str(path),
                why="the file is missing, truncated or altered; nothing was loaded",
                fix="copy or train it again",
                zh="n-gram 模型文件缺失、被截断或被改动，未加载任何内容。请重新复制或重新训练",
            ) from None
        _check_tables(model, path)
        return model

    def describe(self) -> dict[str, Any]:
        """Order, vocabulary, training size, memory, and for each order the number of n-grams and the discounts."""
        return {
            "kind": "ngram",
            "smoothing": "interpolated modified Kneser-Ney" if self.discounts else "as the ARPA file has it",
            "order": self.order,
            "vocab_size": self.vocab_size,
            "bytes": self.nbytes,
            "trained_on": dict(self.trained_on),
            "ngrams": [int(table.keys.size) for table in self.tables],
            "discounts": [list(discounts) for discounts in self.discounts],
        }


def _check_tables(model: NGramModel, path: Path) -> None:
    """Refuse tables whose sizes, order or values do not fit together: lookups in them would go wrong."""
    rows_below = 1
    # Weights that other programs made may back off to more than one.
    most = 1e-9 if model.discounts else np.finfo(np.float64).max
    for n, table in enumerate(model.tables, start=1):
        rows = table.keys.size
        sound = (
            table.keys.dtype == np.int64
            and table.logprobs.dtype == table.backoffs.dtype == np.float64
            and table.keys.shape == table.logprobs.shape == (rows,)
            and table.backoffs.shape == (rows if n < model.order else 0,)
            and (n > 1 or rows == model.vocab_size)
            and bool((np.diff(table.keys, prepend=-1) > 0).all())
            and (rows == 0 or int(table.keys[-1]) < rows_below * model.vocab_size)
            and bool((table.logprobs <= most).all() and (table.backoffs <= most).all())  # also finds NaN
        )
        if not sound:
            raise ModelError(
                f"the table of {n}-grams is not sound",
                where=str(path),
                why="its sizes, order or values do not fit the model's header; nothing was loaded",
                fix="copy or train the model again",
                zh=f"{n}-gram 表的大小、顺序或数值与文件头不符，未加载任何内容。请重新复制或重新训练",
            )
        rows_below = rows
    if not (model.tables and 0 <= model.bos_id < model.vocab_size and 0 <= model.eos_id < model.vocab_size):
        raise ModelError(
            "the header of the n-gram model is not sound", where=str(path), zh="n-gram 模型的文件头有误，未加载任何内容"
        )


def _estimate(
    counted: list[Counts], vocab_size: int, bos_id: int, eos_id: int
) -> tuple[list[Table], list[tuple[float, float, float]]]:
    """Probabilities and backoff weights from counts, lowest order first; ``counted`` is emptied to free its memory.

    With a(hw) the count of n-gram hw (continuation count below the highest order) and h' the context h without its
    first word: P(w|h) = (a(hw) - D(a(hw))) / a(h.) + gamma(h) P(w|h'), where gamma(h) = sum over w of D(a(hw)) / a(h.).
    """
    tables: list[Table] = []
    discounts: list[tuple[float, float, float]] = []
    lower = np.full(1, 1.0 / (vocab_size if bos_id == eos_id else vocab_size - 1))
    begins = np.zeros(1, dtype=bool)  # does the prefix begin with the document start?
    suffixes = np.zeros(vocab_size, dtype=np.int64)  # of unigrams: the empty n-gram, whose estimate is uniform
    counted.reverse()
    while counted:
        counts = counted.pop()
        n = len(tables) + 1
        prefixes = counts.keys // vocab_size
        adjusted = counts.occurrences
        begins = begins[prefixes] if n > 1 else counts.keys == bos_id
        longer_suffixes = np.zeros(0, dtype=np.int64)
        if counted:
            longer_suffixes = suffix_rows(counted[-1].keys, counts.keys, suffixes if n > 1 else None, vocab_size)
            continuations = np.bincount(longer_suffixes, minlength=counts.keys.size)
            # The unigram of the document start is never predicted: there is nothing to correct for n = 1.
            adjusted = continuations if n == 1 else np.where(begins, adjusted, continuations)
        discounts.append(_discounts(adjusted))
        taken = np.array([0.0, *discounts[-1]])[np.minimum(adjusted, 3)]
        totals = np.bincount(prefixes, weights=adjusted, minlength=lower.size)
        masses = np.bincount(prefixes, weights=taken, minlength=totals.size)
        has_words = totals > 0
        gammas = np.divide(masses, totals, out=np.ones(totals.size), where=has_words)
        probabilities = (adjusted - taken) / totals[prefixes]
        probabilities += gammas[prefixes] * lower[suffixes]
        if n == 1 and bos_id != eos_id:
            probabilities[bos_id] = 0.0
        if tables:
            tables[-1].backoffs = np.log(gammas)
        with np.errstate(divide="ignore"):  # log 0 of a document start that is never predicted
            tables.append(Table(counts.keys, np.log(probabilities), np.zeros(0)))
        lower, suffixes = probabilities, longer_suffixes
    return tables, discounts


def _shown(chunks: Iterator[Chunk], label: str) -> Iterator[Chunk]:
    """The chunks, with a line that says how many tokens were counted."""
    with Progress(label, unit="tokens") as bar:
        for chunk in chunks:
            yield chunk
            bar.update(bar.done + chunk.ids.size - chunk.left)


def _discounts(counts: Ints) -> tuple[float, float, float]:
    """D1, D2 and D3+ from the numbers of n-grams with count 1, 2, 3 and 4 (Chen and Goodman 1998, equation 26).

    Small or strange corpora have no n-gram with some of these counts, or give a discount outside (0, count]: then the
    whole order takes :data:`FALLBACK_DISCOUNTS`, as KenLM does on request.
    """
    n1, n2, n3, n4 = (int(number) for number in np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
    if not (n1 and n2 and n3):
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    if not all(0 < estimate <= count for count, estimate in enumerate(estimates, start=1)):
        return FALLBACK_DISCOUNTS
    return estimates
