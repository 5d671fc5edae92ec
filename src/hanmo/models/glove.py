"""GloVe word vectors: weighted least squares on the logarithm of co-occurrence counts.

Pennington, Socher and Manning, "GloVe: Global Vectors for Word Representation" (EMNLP 2014), equation 8::

    J = sum over x_ij > 0 of  f(x_ij) (w_i . c_j + b_i + d_j - log x_ij)^2,     f(x) = min(1, (x / x_max)^alpha)

with two vectors and two biases for each word; the result is the sum of both vectors.

How it is made fast with numpy and scipy alone:

- **Tiles.** The words are dealt into G groups, so that each group has frequent and rare words alike; groups of rows and
  of columns cut the count matrix into G x G tiles. One step takes the summed gradient of one tile: one gathered dot
  product for the errors, two sparse-times-dense products for the gradients. A tile's factors fit in a core's cache.
- **Collisions.** A word that occurs in many entries of a tile gets the *sum* of their gradients before AdaGrad squares
  it: every step is an exact mini-batch AdaGrad step (Duchi, Hazan and Singer, JMLR 2011), nothing is lost or counted
  twice. The accumulator grows before the division, so that no single step moves a parameter by more than the learning
  rate, however many entries a tile has.
- **Shuffling and threads.** An epoch visits all tiles in random order, as G rounds of G tiles that share neither rows
  nor columns (Gemulla et al., "Large-Scale Matrix Factorization with Distributed Stochastic Gradient Descent", KDD
  2011). The tiles of a round can be stepped side by side, and the result is the same bit for bit with any number of
  threads.

Names: V words, D dimensions, N nonzero entries; a *factor* [V, D + 2] is a vector with its bias and a one, in the order
that makes ``rows @ columns.T`` the sum of the dot product and both biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import DataError, missing_package
from hanmo.language import pick

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

CHUNK_WORDS = 200_000  # words whose pairs are counted at once: about 200 MB of working space with a window of 10
TILE_ENTRIES = 20_000  # entries of a tile, on average: enough work to hide Python's share, few enough for the cache
MIN_GROUPS = 16  # a word gets at least so many steps in an epoch; with fewer it learns visibly slower
DOT_ROWS = 4096  # rows gathered at once for the dot products


@dataclass(frozen=True)
class GloveSettings:
    """The constants of the method.

    ``x_max`` is 100 in the paper, for corpora of billions of words; 10 serves one of millions, where few pairs of words
    meet a hundred times.
    """

    size: int = 100
    epochs: int = 30
    learning_rate: float = 0.05
    x_max: float = 10.0
    alpha: float = 0.75
    seed: int = 0


@dataclass
class Factors:
    """What is learnt: ``rows`` [V, D+2] (vector, bias, 1) and ``columns`` [V, D+2] (vector, 1, bias), float32."""

    rows: Floats
    columns: Floats

    @classmethod
    def random(cls, num_words: int, size: int, generator: np.random.Generator) -> Factors:
        """Uniform in (-0.5, 0.5) / D, as in the authors' program."""
        drawn = (generator.random((2, num_words, size + 2), dtype=np.float32) - np.float32(0.5)) / np.float32(size)
        rows, columns = drawn
        rows[:, size + 1] = 1
        columns[:, size] = 1
        return cls(rows, columns)

    def vectors(self) -> Floats:
        """The word vectors, float32 [V, D]: the sum of both."""
        return self.rows[:, :-2] + self.columns[:, :-2]


@dataclass
class Tile:
    """The nonzero entries of one group of rows and one group of columns, row by row.

    ``starts`` [rows + 1], ``columns`` [N] and ``rows`` [N] count within the groups; ``targets`` [N] is log x and
    ``weights`` [N] is f(x).
    """

    row_slice: slice
    column_slice: slice
    starts: Ints
    rows: Ints
    columns: Ints
    targets: Floats
    weights: Floats


def cooccurrences(documents: Iterable[NDArray[Any]], num_words: int, window: int) -> csr_array:
    """How often words stand near one another: symmetric sparse float32 [V, V]; a pair d words apart counts 1/d.

    Args:
        documents: ids of the words of each document; pairs never cross its ends.
        num_words: V; ids are below it.
        window: the largest distance.

    Memory: the distinct pairs met so far (12 bytes each), and working space for ``CHUNK_WORDS`` words.

    >>> cooccurrences([np.array([0, 1, 2])], 3, window=2).toarray()
    array([[0. , 1. , 0.5],
           [1. , 0. , 1. ],
           [0.5, 1. , 0. ]], dtype=float32)
    """
    sparse = import_sparse()
    total = sparse.csr_array((num_words, num_words), dtype=np.float32)
    for ids, numbers, fresh in chunks(documents, window):
        left, right, weights = [], [], []
        for distance in range(1, min(window, len(ids) - 1) + 1):
            # each pair is counted in the chunk in which its right word is new
            first = max(0, fresh - distance)
            near, far = ids[first : len(ids) - distance], ids[first + distance :]
            together = numbers[first : len(ids) - distance] == numbers[first + distance :]
            left.append(near[together])
            right.append(far[together])
            weights.append(np.full(len(left[-1]), 1 / distance, dtype=np.float32))
        if left:
            entries = np.concatenate(weights), (np.concatenate(left), np.concatenate(right))
            total = total + sparse.coo_array(entries, shape=(num_words, num_words)).tocsr()
    return (total + total.T).tocsr()


def chunks(documents: Iterable[NDArray[Any]], window: int) -> Iterator[tuple[Ints, NDArray[np.int64], int]]:
    """Runs of about ``CHUNK_WORDS`` words: ids, the number of each one's document, and where the new words begin.

    The ``window`` words before the new ones are given again, as their context.
    """
    ids = np.empty(0, dtype=np.int32)
    numbers = np.empty(0, dtype=np.int64)
    fresh = 0
    waiting: list[tuple[Ints, int]] = []
    size = 0

    def joined() -> tuple[Ints, NDArray[np.int64]]:
        lengths = [len(piece) for piece, _ in waiting]
        owners = np.repeat(np.array([number for _, number in waiting], dtype=np.int64), lengths)
        return np.concatenate([ids, *(piece for piece, _ in waiting)]), np.concatenate([numbers, owners])

    for number, document in enumerate(documents):
        for begin in range(0, len(document), CHUNK_WORDS):
            piece = np.asarray(document[begin : begin + CHUNK_WORDS], dtype=np.int32)
            waiting.append((piece, number))
            size += len(piece)
            if size >= CHUNK_WORDS:
                ids, numbers = joined()
                yield ids, numbers, fresh
                ids, numbers = ids[len(ids) - min(window, len(ids)) :], numbers[len(numbers) - min(window, len(ids)) :]
                fresh, waiting, size = len(ids), [], 0
    if waiting:
        ids, numbers = joined()
        yield ids, numbers, fresh


def train_glove(
    counts: csr_array,
    settings: GloveSettings | None = None,
    *,
    threads: int = 1,
    on_epoch: Callable[[int, float], None] | None = None,
) -> tuple[Floats, list[float]]:
    """Learn vectors from co-occurrence counts.

    Args:
        counts: nonnegative sparse [V, V], the words sorted by falling frequency (as every vocabulary here is).
        settings: the constants of the method.
        threads: tiles that are stepped at once; the result does not depend on it.
        on_epoch: called after each epoch with its number and its mean loss.

    Returns:
        The vectors, float32 [V, D], and for each epoch the mean of J over the N entries, measured on the way.

    Raises:
        DataError: there is no entry to learn from.
    """
    settings = settings or GloveSettings()
    if counts.nnz == 0:
        raise DataError(
            "no two known words stand near each other",
            fix="give more text, or lower --min-count",
            zh="没有任何两个已知词相邻出现。请提供更多文本，或调小 --min-count",
        )
    generator = np.random.default_rng(settings.seed)
    num_words = counts.shape[0]
    groups = min(num_words, max(MIN_GROUPS, round((counts.nnz / TILE_ENTRIES) ** 0.5)))
    order, tiles = cut_tiles(counts, groups, settings, generator)
    factors = Factors.random(num_words, settings.size, generator)
    squares = Factors(np.ones_like(factors.rows), np.ones_like(factors.columns))
    losses = []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for epoch in range(settings.epochs):
            total = 0.0
            rows = generator.permutation(groups)
            for shift in generator.permutation(groups):
                round_tiles = [tiles[row][(row + shift) % groups] for row in rows]
                total += sum(
                    pool.map(lambda tile: adagrad_step(factors, squares, tile, settings.learning_rate), round_tiles)
                )
            losses.append(total / counts.nnz)
            if on_epoch:
                on_epoch(epoch + 1, losses[-1])
    vectors = np.empty((num_words, settings.size), dtype=np.float32)
    vectors[order] = factors.vectors()
    return vectors, losses


def cut_tiles(
    counts: csr_array, groups: int, settings: GloveSettings, generator: np.random.Generator
) -> tuple[NDArray[np.int64], list[list[Tile]]]:
    """The order in which the words are laid out, group after group, and the tiles ``[row group][column group]``.

    Of each run of G words of like frequency one goes to each group.
    """
    num_words = counts.shape[0]
    dealt = [generator.permutation(groups) for _ in range(-(-num_words // groups))]
    group_of = np.concatenate(dealt)[:num_words]
    order = np.argsort(group_of, kind="stable")
    bounds = np.searchsorted(group_of[order], np.arange(groups + 1)).tolist()
    slices = [slice(begin, end) for begin, end in pairwise(bounds)]
    laid_out = counts[order][:, order].tocsr()
    tiles = []
    for row_slice in slices:
        band = laid_out[row_slice].tocsc()
        tiles.append([make_tile(band[:, part].tocsr(), row_slice, part, settings) for part in slices])
    return order, tiles


def make_tile(entries: csr_array, row_slice: slice, column_slice: slice, settings: GloveSettings) -> Tile:
    """A tile of the count matrix, with the logarithms and the weights of its entries."""
    rows = np.repeat(np.arange(entries.shape[0], dtype=np.int32), np.diff(entries.indptr))
    values = entries.data.astype(np.float32)
    return Tile(
        row_slice,
        column_slice,
        entries.indptr.astype(np.int32),
        rows,
        entries.indices.astype(np.int32),
        np.log(values),
        np.minimum(1, (values / np.float32(settings.x_max)) ** np.float32(settings.alpha)),
    )


def gradients(factors: Factors, tile: Tile) -> tuple[float, Floats, Floats]:
    """The loss J of a tile, and its gradients for the rows [R, D+2] and columns [C, D+2] of the tile.

    The constant ones in the factors have gradient zero.
    """
    sparse = import_sparse()
    rows, columns = factors.rows[tile.row_slice], factors.columns[tile.column_slice]
    predicted = np.empty(len(tile.rows), dtype=np.float32)
    for begin in range(0, len(predicted), DOT_ROWS):
        part = slice(begin, begin + DOT_ROWS)
        np.einsum("nd,nd->n", rows[tile.rows[part]], columns[tile.columns[part]], out=predicted[part])
    errors = predicted - tile.targets
    weighted = tile.weights * errors
    loss = float(weighted @ errors)
    weighted *= 2
    shape = (len(rows), len(columns))
    matrix = sparse.csr_array((weighted, tile.columns, tile.starts), shape=shape)
    row_gradients = matrix @ columns
    column_gradients = matrix.T @ rows
    row_gradients[:, -1] = 0
    column_gradients[:, -2] = 0
    return loss, row_gradients, column_gradients


def adagrad_step(factors: Factors, squares: Factors, tile: Tile, learning_rate: float) -> float:
    """One AdaGrad step on one tile; returns the tile's loss before the step."""
    loss, row_gradients, column_gradients = gradients(factors, tile)
    for values, sums, gradient in (
        (factors.rows[tile.row_slice], squares.rows[tile.row_slice], row_gradients),
        (factors.columns[tile.column_slice], squares.columns[tile.column_slice], column_gradients),
    ):
        sums += gradient * gradient
        gradient /= np.sqrt(sums)
        gradient *= np.float32(learning_rate)
        values -= gradient
    return loss


def import_sparse() -> Any:
    """The module ``scipy.sparse``.

    Raises:
        ResourceError: scipy is not installed.
    """
    try:
        from scipy import sparse
    except ImportError:
        raise missing_package("scipy", "classical", pick("training GloVe vectors", "训练 GloVe 词向量")) from None
    return sparse
