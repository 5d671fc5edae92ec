"""How well a model predicts text: loss, perplexity per token and bits per byte, with bootstrap intervals.

Nats are summed over all tokens of all documents, the separator that ends each document included; bytes are the UTF-8
bytes of the documents, without separators. Bits per byte = nats / (ln 2 * bytes) compares models with different
tokenizers; perplexity = exp(nats / tokens) compares only models with the same tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hanmo.errors import DataError, ModelError
from hanmo.evaluation.intervals import MIN_UNITS, RESAMPLES, Interval, bootstrap_sums, percentile_interval
from hanmo.evaluation.windows import token_logprobs
from hanmo.models.ngram import NGramModel

Ints = NDArray[Any]
Floats = NDArray[np.float64]
DocumentScore = Callable[[Ints], Any]  # ids of one document [T] -> the log-probability of each

FEW_DOCUMENTS = 30
BLOCK_TOKENS = 1000


@runtime_checkable
class WindowModel(Protocol):
    """A model with a limited context, such as ``hanmo.inference.LanguageModel``."""

    @property
    def context_length(self) -> int:
        """The most tokens that it can look at."""

    @property
    def start_id(self) -> int | None:
        """The token a text begins after."""

    def score(self, ids_BT: Ints) -> NDArray[Any]:
        """Log P(ids[b, t+1] | ids[b, :t+1]), [B, T-1]."""


@dataclass(frozen=True)
class Likelihood:
    """What a model scores on a set of documents.

    ``unit`` says what the intervals resample: ``"documents"``, or ``"blocks"`` of about 1,000 tokens where there are
    fewer than 30 documents. Intervals are None where there are fewer than two units.
    """

    name: str
    nats: float
    tokens: int
    bytes: int
    documents: int
    unit: str
    units: int
    resamples: int
    loss_interval: Interval | None
    bits_per_byte_interval: Interval | None
    unit_nats: Floats = field(repr=False, compare=False)
    unit_bytes: Floats = field(repr=False, compare=False)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the loss: per token, the separators included."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the documents."""
        return self.nats / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: all numbers, intervals as [low, high] or None."""

        def pair(interval: Interval | None) -> list[float] | None:
            return [interval.low, interval.high] if interval else None

        return {
            "name": self.name,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_interval": pair(self.bits_per_byte_interval),
            "perplexity": self.perplexity,
            "loss": self.loss,
            "loss_interval": pair(self.loss_interval),
            "nats": self.nats,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "resampled": self.unit,
            "units": self.units,
            "resamples": self.resamples,
        }


class Uniform:
    """The model that knows nothing: every token of the vocabulary is equally likely."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def logprobs(self, ids: ArrayLike) -> Floats:
        """-ln(vocab_size) for each id, float64 [T]."""
        return np.full(np.asarray(ids).size, -math.log(self.vocab_size))


def evaluate_likelihood(
    model: WindowModel | NGramModel | Uniform | DocumentScore,
    tokens: Any,
    spans: ArrayLike,
    document_bytes: ArrayLike,
    *,
    name: str,
    token_bytes: ArrayLike | None = None,
    start_id: int | None = None,
    context_length: int | None = None,
    stride: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: bool = False,
) -> Likelihood:
    """Score every token of the documents once and sum up.

    Args:
        model: a model with ``score`` and ``context_length`` (read in windows, see ``windows.py``); an n-gram or uniform
            model; or a function from the ids of one document to their log-probabilities.
        tokens: the documents end to end, each with its final separator; an array, or anything whose slices are arrays.
        spans: token offsets where documents begin and end, [documents + 1].
        document_bytes: UTF-8 bytes of each document, [documents].
        name: what the model is called in tables.
        token_bytes: bytes that each id stands for, [vocab_size]; makes the byte counts of blocks exact (else each
            document's bytes are spread evenly over its tokens). Totals do not depend on it.
        start_id, context_length, stride: for models read in windows; the model's own values and half a context without.
        resamples, seed: of the bootstrap.

    Raises:
        DataError: there is nothing to score.
        ModelError: the model has no separator, or its results are no log-probabilities.
    """
    edges = np.asarray(spans, dtype=np.int64)
    ids = np.asarray(tokens[int(edges[0]) : int(edges[-1])])
    edges = edges - edges[0]
    logprobs: Floats
    if isinstance(model, WindowModel):
        start = model.start_id if start_id is None else start_id
        if start is None:
            raise ModelError(f"'{name}' has no document separator", fix="give the id of the separator as start_id")
        context = context_length or model.context_length
        logprobs = token_logprobs(
            model.score, ids, edges, start_id=start, context_length=context, stride=stride, progress=progress
        )
    elif isinstance(model, NGramModel) and ids.size and (ids[edges[1:] - 1] == model.eos_id).all():
        logprobs = model.logprobs(ids)  # in one call: it begins anew after each separator
    else:
        function = model.logprobs if isinstance(model, NGramModel | Uniform) else model
        scored = [np.asarray(function(ids[begin:end]), dtype=np.float64) for begin, end in pairwise(edges)]
        logprobs = np.concatenate([*scored, np.zeros(0)])
    shares = None if token_bytes is None else np.asarray(token_bytes, dtype=np.float64)[ids]
    return summarise(name, logprobs, edges, document_bytes, shares=shares, resamples=resamples, seed=seed)


def summarise(
    name: str,
    logprobs: Floats,
    spans: ArrayLike,
    document_bytes: ArrayLike,
    *,
    shares: Floats | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Likelihood:
    """The likelihood from the log-probability of each token, [T].

    ``shares`` [T] say how a document's bytes are divided among its tokens where blocks are resampled; evenly without.

    Raises:
        DataError: there are no tokens or no bytes, or the arrays do not fit together.
        ModelError: some log-probabilities are NaN.
    """
    spans = np.asarray(spans, dtype=np.int64)
    sizes = np.asarray(document_bytes, dtype=np.int64)
    if spans[-1] != logprobs.size or sizes.size != spans.size - 1:
        raise DataError(
            f"{logprobs.size} log-probabilities and {sizes.size} byte counts do not fit {spans.size - 1} documents "
            f"of {int(spans[-1])} tokens"
        )
    if not logprobs.size or not sizes.sum():
        raise DataError(
            "there is no text to evaluate on",
            why="the split has no documents, or only empty ones",
            fix="add text, or give the split a larger share",
            zh="没有可供评测的文本：该划分为空。请增加文本或调大该划分的比例",
        )
    if np.isnan(logprobs).any():
        raise ModelError(f"'{name}' gives NaN as the probability of {int(np.isnan(logprobs).sum())} tokens")
    edges, unit = resampling_units(spans)
    unit_nats = _sums_between(-logprobs, edges)
    unit_tokens = np.diff(edges).astype(np.float64)
    unit_bytes = sizes.astype(np.float64) if unit == "documents" else _bytes_between(edges, spans, sizes, shares)
    loss_interval = bits_interval = None
    if unit_nats.size >= MIN_UNITS and np.isfinite(unit_nats).all():
        sums = bootstrap_sums(np.stack([unit_nats, unit_tokens, unit_bytes], axis=1), resamples=resamples, seed=seed)
        loss_interval = percentile_interval(sums[:, 0] / sums[:, 1])
        bits_interval = percentile_interval(sums[:, 0] / np.maximum(sums[:, 2], 1) / math.log(2))
    return Likelihood(
        name=name,
        nats=float(-logprobs.sum()),
        tokens=logprobs.size,
        bytes=int(sizes.sum()),
        documents=sizes.size,
        unit=unit,
        units=unit_nats.size,
        resamples=resamples,
        loss_interval=loss_interval,
        bits_per_byte_interval=bits_interval,
        unit_nats=unit_nats,
        unit_bytes=unit_bytes,
    )


def resampling_units(spans: Ints) -> tuple[Ints, str]:
    """Token offsets between which a unit of resampling lies, and its kind.

    Documents; with fewer than 30, equal blocks of about 1,000 tokens (the block bootstrap of Künsch 1989, blocks not
    overlapping), which keep the dependence between neighbouring tokens.
    """
    if spans.size - 1 >= FEW_DOCUMENTS:
        return spans, "documents"
    blocks = max(1, round(int(spans[-1]) / BLOCK_TOKENS))
    return np.linspace(0, spans[-1], blocks + 1).round().astype(np.int64), "blocks"


def _sums_between(values: Floats, edges: Ints) -> Floats:
    """Sums of ``values`` between neighbouring ``edges``; an empty stretch sums to zero."""
    return np.array([values[begin:end].sum() for begin, end in pairwise(edges)])


def _bytes_between(edges: Ints, spans: Ints, sizes: Ints, shares: Floats | None) -> Floats:
    """Bytes of each block, each document's bytes divided among its tokens by ``shares`` (evenly without)."""
    lengths = np.diff(spans)
    if shares is None:
        shares = np.ones(int(spans[-1]))
    whole = np.maximum(_sums_between(shares, spans), 1e-9)
    return _sums_between(shares * np.repeat(sizes / whole, lengths), edges)


def describe_unit(unit: str) -> tuple[str, str]:
    """What was resampled, in English and Chinese (with the counting word)."""
    if unit == "documents":
        return "documents", "篇文档"
    return f"blocks of about {BLOCK_TOKENS:,} tokens", f"个约 {BLOCK_TOKENS:,} 词元的片段"
