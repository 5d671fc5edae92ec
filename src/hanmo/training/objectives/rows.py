"""From records to rows of tokens, for the objectives over labelled examples: what fits, what is cut, what is told.

A row is built exactly as :class:`hanmo.inference.encoder.TextEncoder` builds it, so that a network meets in use what it
met in training.

Letters in names: B rows, T tokens, D hidden size, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import DataError, ModelError
from hanmo.language import pick
from hanmo.models.heads import HeadConfig
from hanmo.models.recurrent import RecurrentEncoder
from hanmo.models.transformer import Transformer
from hanmo.settings import notice
from hanmo.text.rows import UNBOUNDED, padding_id, shorten
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.wrapping import Wrapped, Wrapping, wrapping_of
from hanmo.training.objectives.base import Batch, padded, padding_segments

LISTED = 20  # records that a report names; all are counted

Ids = NDArray[np.int32]
Reader = Transformer | RecurrentEncoder
ExampleT = TypeVar("ExampleT")


@dataclass
class Prepared(Sequence[ExampleT], Generic[ExampleT]):
    """The token examples of some records, and what became of those that did not fit.

    Attributes:
        examples: what there is to train on.
        truncated: records of which only a part is read.
        dropped: records that gave no example.
        reasons: ``file:line: reason`` of the first dropped ones.
    """

    examples: list[ExampleT] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    reasons: list[str] = field(default_factory=list)

    @overload
    def __getitem__(self, index: int) -> ExampleT: ...
    @overload
    def __getitem__(self, index: slice) -> list[ExampleT]: ...
    def __getitem__(self, index: int | slice) -> ExampleT | list[ExampleT]:
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)

    def drop(self, where: str, reason: str) -> None:
        """Note a record that gives no example."""
        self.dropped += 1
        if len(self.reasons) < LISTED:
            self.reasons.append(f"{where}: {reason}" if where else reason)

    def tell(self) -> None:
        """Say what was cut and what was dropped, if anything was."""
        if self.truncated:
            notice(
                pick(
                    f"{self.truncated:,} records are longer than the context; only a part of each is read",
                    f"{self.truncated:,} 条记录超过上下文长度，只读取其中一部分",
                )
            )
        if self.dropped:
            more = pick(f" and {self.dropped - 3} more", f" 等 {self.dropped} 条") if self.dropped > 3 else ""
            notice(
                pick(f"{self.dropped:,} records were dropped: ", f"舍弃了 {self.dropped:,} 条记录：")
                + "; ".join(self.reasons[:3])
                + more
            )


@dataclass(frozen=True)
class RowMaker:
    """Puts texts into rows for one network.

    Args:
        tokenizer: the network's.
        wrapping: the control tokens round a text or a pair.
        context: tokens of a row, control tokens included.
        truncate: cut what is longer, and count it; otherwise it is refused.
    """

    tokenizer: Tokenizer
    wrapping: Wrapping
    context: int
    truncate: bool = False

    @classmethod
    def of(
        cls, model: Reader, tokenizer: Tokenizer, *, max_length: int | None = None, truncate: bool = False
    ) -> RowMaker:
        """The rows that a :class:`~hanmo.inference.encoder.TextEncoder` of this network reads.

        Args:
            max_length: tokens of a row; default what the network can see.

        Raises:
            ModelError: such rows leave no room for a text.
        """
        if isinstance(model, Transformer):
            limit, causal = model.config.max_position_embeddings, model.config.causal
        else:
            limit, causal = UNBOUNDED, False
        wrapping = wrapping_of(tokenizer, causal=causal)
        context = min(limit, max_length or limit)
        if context <= wrapping.overhead(pair=True) + 1:
            raise ModelError(
                f"rows of {context} tokens leave no room for a text", zh=f"最大长度 {context} 容不下任何文本"
            )
        return cls(tokenizer, wrapping, context, truncate)

    def encode(self, text: str, where: str) -> list[int]:
        """The ids of a text.

        Raises:
            DataError: it has a lone surrogate; the message names the record.
        """
        try:
            return self.tokenizer.encode(text)
        except DataError as error:
            error.where = where
            raise

    def cut(self, length: int, where: str, prepared: Prepared[Any], what: str = "record", zh: str = "记录") -> None:
        """Count a record that does not fit, or refuse it.

        Raises:
            DataError: nothing is to be cut.
        """
        if not self.truncate:
            raise too_long(length, self.context, where, what, zh)
        prepared.truncated += 1

    def wrap(self, texts: Sequence[str], where: str, prepared: Prepared[Any]) -> Wrapped:
        """A text or a pair with its control tokens; of a pair that is too long, the longer part is cut first.

        Raises:
            DataError: it is too long and nothing is to be cut, or has a lone surrogate.
        """
        parts = [self.encode(text, where) for text in texts]
        lengths, overhead = [len(part) for part in parts], self.wrapping.overhead(pair=len(parts) > 1)
        kept = shorten(lengths, self.context - overhead)
        if kept != lengths:
            self.cut(sum(lengths) + overhead, where, prepared)
        row = self.wrapping.wrap(*(part[:size] for part, size in zip(parts, kept, strict=True)))
        if not row.ids:  # a text without tokens, of a network without control tokens
            return Wrapped([padding_id(self.tokenizer)], [0], row.starts)
        return row


def too_long(length: int, context: int, where: str, what: str = "record", zh: str = "记录") -> DataError:
    """The error for a record that does not fit into the context."""
    return DataError(
        f"the {what} has {length} tokens, the context holds {context}",
        where=where,
        why="what is cut off would not be learned",
        fix="shorten it, or let it be cut with --truncate (such records are counted)",
        zh=f"{zh}有 {length} 个词元，超过上下文长度 {context}；请缩短，或用 --truncate 截断（会计数）",
    )


def require_head(head: HeadConfig, task: str) -> None:
    """Refuse a head for another task.

    Raises:
        ModelError: it is one.
    """
    if head.task != task:
        raise ModelError(
            f"the network has a head for {head.task}, this objective needs one for {task}",
            where="config.json",
            fix=f"build the network with a head for {task}",
            zh=f"网络的任务头是 {head.task}，该训练目标需要 {task}",
        )


def as_ids(numbers: Sequence[int]) -> Ids:
    """Small integers as an array that takes little memory."""
    return np.array(numbers, dtype=np.int32)


@dataclass
class RowBatch(Batch):
    """Padded rows; ``types`` and ``segments`` are ``[B, T]``, None where all are 0 or nothing is padded."""

    types: Tensor | None = None
    segments: Tensor | None = None


def tensors_of(rows: Sequence[Ids], types: Sequence[Ids | None]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Ids, types and segments of some rows, int64 ``[B, T]``."""
    ids_BT = padded(rows, 0)  # type: ignore[arg-type]  # arrays are sequences of int
    types_BT = None
    if any(kinds is not None for kinds in types):
        filled = [
            np.zeros(len(row), np.int32) if kinds is None else kinds for row, kinds in zip(rows, types, strict=True)
        ]
        types_BT = padded(filled, 0)  # type: ignore[arg-type]
    return ids_BT, types_BT, padding_segments(rows, ids_BT.size(1))  # type: ignore[arg-type]


def types_of(row: Wrapped) -> Ids | None:
    """The types of a row; None where all are 0."""
    return as_ids(row.types) if any(row.types) else None


def network_inputs(model: Transformer, types_BT: Tensor | None, segments_BT: Tensor | None) -> dict[str, Any]:
    """What a transformer needs beside ids; types only where it has embeddings for them."""
    known = model.config.token_types
    if types_BT is None or known < 2:
        return {"segments_BT": segments_BT}
    return {"segments_BT": segments_BT, "types_BT": types_BT.clamp(max=known - 1)}


def head_scores(model: Reader, batch: RowBatch) -> Tensor:
    """What the head says: ``[B, L]`` for one label a text, else ``[B, T, L]``."""
    if isinstance(model, RecurrentEncoder):
        return model(batch.ids, None if batch.segments is None else batch.segments > 0)  # type: ignore[no-any-return]
    return model(batch.ids, **network_inputs(model, batch.types, batch.segments))  # type: ignore[no-any-return]


def hidden_states(model: Reader, ids_BT: Tensor, types_BT: Tensor | None, segments_BT: Tensor | None) -> Tensor:
    """Hidden states of padded rows, ``[B, T, D]``."""
    if isinstance(model, RecurrentEncoder):
        return model.hidden(ids_BT, None if segments_BT is None else segments_BT > 0)
    return model.hidden(ids_BT, **network_inputs(model, types_BT, segments_BT))
