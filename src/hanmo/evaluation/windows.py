"""Log-probabilities of long documents from a model with a limited context.

The rule: each document stands alone, after the document separator; every token is predicted exactly once; a document
longer than the context is read in overlapping windows, so that a token has at least ``context_length - stride + 1``
tokens before it in its window, unless its document has fewer. With the default stride that is half a context at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.errors import ModelError, UsageError
from hanmo.language import pick
from hanmo.progress import Progress

Ints = NDArray[Any]
Floats = NDArray[np.float64]
Score = Callable[[Ints], NDArray[Any]]  # ids [B, T] -> log P(ids[b, t+1] | ids[b, :t+1]) as [B, T-1]

BATCH_TOKENS = 8192


@dataclass
class Windows:
    """W windows over documents that begin with a separator; all arrays are int64 [W].

    A window reads tokens ``begin`` to ``end`` (included) of its document, where the separator is token 0, and the
    predictions of tokens ``first`` to ``end`` count.
    """

    document: Ints
    begin: Ints
    first: Ints
    end: Ints


def default_stride(context_length: int) -> int:
    """Half the context: twice the work of windows side by side, and no token without half a context before it."""
    return max(1, context_length // 2)


def plan_windows(lengths: Ints, context_length: int, stride: int) -> Windows:
    """The windows over documents of ``lengths`` tokens (the separator before them not counted).

    >>> plan = plan_windows(np.array([3, 9]), context_length=4, stride=2)
    >>> list(zip(plan.document.tolist(), plan.begin.tolist(), plan.first.tolist(), plan.end.tolist()))
    [(0, 0, 1, 3), (1, 0, 1, 4), (1, 2, 5, 6), (1, 4, 7, 8), (1, 5, 9, 9)]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    more = np.maximum(0, -(-(lengths - context_length) // stride))
    number = np.where(lengths > 0, 1 + more, 0)
    document = np.repeat(np.arange(lengths.size), number)
    nth = np.arange(document.size) - np.repeat(np.cumsum(number) - number, number)
    end = np.minimum(lengths[document], context_length + nth * stride)
    first = np.where(nth == 0, 1, context_length + (nth - 1) * stride + 1)
    return Windows(document, np.maximum(0, end - context_length), first, end)


def token_logprobs(
    score: Score,
    tokens: Ints,
    spans: Ints | None = None,
    *,
    start_id: int,
    context_length: int,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = False,
) -> Floats:
    """Natural log-probability of every token of a stream of documents, float64 [T].

    Windows are batched with others of about their length and padded on the right, which a causal model cannot see.

    Args:
        score: the model: ids [B, T] to log P(ids[b, t+1] | ids[b, :t+1]) as [B, T-1]; it must look at ids[:, :-1]
            only, T - 1 is at most ``context_length``.
        tokens: ids [T], the documents end to end.
        spans: where documents begin and end, [documents + 1]; one document without it.
        start_id: the separator that documents begin after.
        context_length: the most tokens that the model can look at.
        stride: new tokens per window; half the context without it.
        batch_tokens: the most tokens in a batch (a single window may be longer).

    Raises:
        UsageError: a context below 1 or a stride outside 1..context_length.
        ModelError: the model returns another shape, or numbers that are no log-probabilities.
    """
    stride = default_stride(context_length) if stride is None else stride
    if not 1 <= stride <= context_length:
        raise UsageError(
            f"no windows with context {context_length} and stride {stride}",
            fix="choose a stride between 1 and the context length",
        )
    tokens = np.asarray(tokens)
    spans = np.array([0, tokens.size]) if spans is None else np.asarray(spans, dtype=np.int64)
    stream = np.insert(tokens.astype(np.int64), spans[:-1], start_id)
    offsets = spans[:-1] + np.arange(spans.size - 1)  # of the separators in the stream
    plan = plan_windows(np.diff(spans), context_length, stride)
    logprobs = np.full(tokens.size, np.nan)
    bar = Progress(pick("evaluating", "评测"), tokens.size, "tokens") if progress else None
    done = 0
    for batch in _batches(plan, batch_tokens):
        begin, end = plan.begin[batch, None], plan.end[batch, None]
        at = begin + np.arange(int((end - begin).max()) + 1)  # of each document's tokens
        offset = offsets[plan.document[batch], None]
        ids = np.where(at <= end, stream[offset + np.minimum(at, end)], start_id)
        scores = _checked(score(ids), ids)
        counts = (at[:, 1:] >= plan.first[batch, None]) & (at[:, 1:] <= end)
        places = (spans[plan.document[batch], None] + at[:, 1:] - 1)[counts]
        logprobs[places] = scores[counts]
        done += places.size
        if bar:
            bar.update(done)
    if bar:
        bar.close()
    return logprobs


def _batches(plan: Windows, batch_tokens: int) -> Iterator[Ints]:
    """Indices of windows to score together: longest first, as many as fit ``batch_tokens`` with their padding."""
    lengths = plan.end - plan.begin + 1
    order = np.argsort(-lengths, kind="stable")
    position = 0
    while position < order.size:
        rows = max(1, batch_tokens // int(lengths[order[position]]))
        yield order[position : position + rows]
        position += rows


def _checked(scores: NDArray[Any], ids: Ints) -> Floats:
    """Refuse what cannot be log-probabilities of ``ids[:, 1:]``."""
    scores = np.asarray(scores, dtype=np.float64)
    expected = (ids.shape[0], ids.shape[1] - 1)
    if scores.shape != expected:
        raise ModelError(f"the model scored ids of shape {ids.shape} with shape {scores.shape}, not {expected}")
    if not (scores <= 1e-3).all():  # also finds NaN; half precision rounds a little above zero
        raise ModelError(
            "the model gives NaN or positive log-probabilities",
            why="its weights are damaged, or its numbers overflow at this precision",
            fix="load it in float32, or train again with a lower learning rate",
            zh="模型给出了 NaN 或大于 0 的对数概率：权重损坏或数值溢出。请以 float32 加载，或降低学习率重新训练",
        )
    return scores
