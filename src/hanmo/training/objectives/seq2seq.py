"""A source text to a target text, for encoder-decoder networks (Sutskever et al. 2014; Vaswani et al. 2017).

Letters in names: B pairs, S source tokens, T target tokens, M targets that count, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hanmo.errors import DataError, ModelError, UsageError
from hanmo.models.transformer import Transformer
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.wrapping import source_wrapping
from hanmo.training.objectives.base import IGNORED, Batch, ExampleObjective, Pick, padded, padding_segments
from hanmo.training.objectives.rows import Ids, Prepared, as_ids, too_long

if TYPE_CHECKING:
    from hanmo.data.tasks.types import Pair as TextPair

CHUNK = 2048  # targets whose logits are held at once


@dataclass(frozen=True)
class SourceRow:
    """A source as the encoder reads it, and what the decoder reads and has to answer, both of one length."""

    source: Ids
    inputs: Ids
    targets: Ids
    where: str = ""


@dataclass
class SourceBatch(Batch):
    """Decoder inputs and targets ``[B, T]``, and sources ``[B, S]`` with their segments, None where none is padded."""

    source: Tensor | None = None
    source_segments: Tensor | None = None


@dataclass(frozen=True)
class SourceRowMaker:
    """Puts pairs of texts into rows for one encoder-decoder, as generation reads and writes them.

    Args:
        tokenizer: the network's.
        prefix, suffix: control tokens round a source.
        start_ids: the tokens that an answer begins after.
        end_id: the token that ends it.
        source_context, context: tokens of a source, and of an answer with all control tokens.
        truncate: cut what is longer, and count it; otherwise it is refused.
        skip: leave out pairs that are longer, and count them: the halves of a cut pair do not match.
    """

    tokenizer: Tokenizer
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    start_ids: tuple[int, ...]
    end_id: int
    source_context: int
    context: int
    truncate: bool = False
    skip: bool = False

    @classmethod
    def of(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        generation: Mapping[str, Any],
        *,
        max_source: int | None = None,
        max_target: int | None = None,
        truncate: bool = False,
        skip: bool = False,
    ) -> SourceRowMaker:
        """The rows of a network.

        Args:
            generation: the entries of its ``generation_config.json``.
            max_source, max_target: tokens of a row, control tokens included; default what the network can see.

        Raises:
            ModelError: it has no encoder, nothing says where an answer begins or ends, or there is no room for a text.
        """
        if model.config.encoder is None:
            raise ModelError(
                "this network has no encoder beside its decoder",
                fix="a decoder learns pairs by instruction tuning",
                zh="该网络没有独立的编码器；单解码器模型请用指令微调",
            )
        prefix, suffix, start = source_wrapping(tokenizer, generation)
        forced = generation.get("forced_bos_token_id")
        ends = generation.get("eos_token_id", tokenizer.eos_id)
        end = ends[0] if isinstance(ends, list) and ends else ends
        if type(end) is not int:
            raise ModelError(
                "nothing says which token ends an answer",
                where="generation_config.json",
                fix="add eos_token_id; without it a network never learns to stop",
                zh="generation_config.json 没有说明结束符号，请加入 eos_token_id",
            )
        limits = model.config.encoder.max_position_embeddings, model.config.max_position_embeddings
        source_context, context = min(limits[0], max_source or limits[0]), min(limits[1], max_target or limits[1])
        start_ids = (start,) if forced is None else (start, forced)
        if source_context <= len(prefix) + len(suffix) or context <= len(start_ids) + 1:
            raise ModelError(
                f"{source_context} tokens of source and {context} of target leave no room for a text",
                zh=f"源长度 {source_context} 与目标长度 {context} 容不下任何文本",
            )
        return cls(tokenizer, tuple(prefix), tuple(suffix), start_ids, end, source_context, context, truncate, skip)

    def row(self, source: str, target: str, where: str, prepared: Prepared[SourceRow]) -> SourceRow | None:
        """One pair, or None where it is left out; a target that is cut keeps no end token, for it goes on."""
        try:
            source_ids, target_ids = self.tokenizer.encode(source), self.tokenizer.encode(target)
        except DataError as error:
            error.where = where
            raise
        source_room = self.source_context - len(self.prefix) - len(self.suffix)
        room = self.context - len(self.start_ids) - 1
        answer = [*target_ids[:room], self.end_id]
        if len(source_ids) > source_room or len(target_ids) > room:
            if self.skip:
                return None
            if not self.truncate:
                long_source = len(source_ids) > source_room
                length, limit = (len(source_ids), source_room) if long_source else (len(target_ids), room)
                raise too_long(length, limit, where, *(("source", "源文本") if long_source else ("target", "目标文本")))
            prepared.truncated += 1
            answer = answer[:-1] if len(target_ids) > room else answer
        inputs = [*self.start_ids, *answer[:-1]]
        targets = [IGNORED] * (len(self.start_ids) - 1) + answer
        read = [*self.prefix, *source_ids[:source_room], *self.suffix]
        return SourceRow(as_ids(read), as_ids(inputs), as_ids(targets), where)


class SequenceToSequence(ExampleObjective[Transformer, SourceBatch, SourceRow]):
    """Every token of the target and the token that ends it, given the source and the target so far.

    The weight of a batch is its number of target tokens.

    Args:
        train, validation: from :meth:`prepare`.
        smoothing: the share of each target's probability that is spread over the whole vocabulary (label smoothing,
            Szegedy et al. 2016). The validation loss is that without it.

    Raises:
        UsageError: a share that is none.
    """

    unit = "token"

    def __init__(
        self,
        train: Sequence[SourceRow],
        validation: Sequence[SourceRow],
        *,
        batch_size: int,
        micro_batch: int,
        seed: int,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(train, validation, batch_size=batch_size, micro_batch=micro_batch, seed=seed)
        if not 0 <= smoothing < 1:
            raise UsageError(
                f"label smoothing is a share from 0 to below 1, not {smoothing}",
                fix="0.1 is usual",
                zh=f"标签平滑应在 0 到 1 之间（不含 1），而不是 {smoothing}；常用 0.1",
            )
        self.smoothing = smoothing

    @staticmethod
    def prepare(records: Iterable[TextPair], rows: SourceRowMaker) -> Prepared[SourceRow]:
        """Rows of some pairs; one with a blank source or target is dropped and counted.

        Raises:
            DataError: a text is too long and must not be cut, or has a lone surrogate; with file and line.
        """
        prepared: Prepared[SourceRow] = Prepared()
        for record in records:
            blank = next((name for name in ("source", "target") if not getattr(record, name).strip()), None)
            if blank:
                prepared.drop(record.where, f"the {blank} is blank")
                continue
            row = rows.row(record.source, record.target, record.where, prepared)
            if row is None:
                prepared.drop(record.where, f"longer than {rows.source_context} tokens of source or {rows.context}")
                continue
            prepared.examples.append(row)
        prepared.tell()
        return prepared

    def collate(self, picks: list[Pick[SourceRow]]) -> SourceBatch:
        examples = [pick.example for pick in picks]
        source_BS = padded([row.source for row in examples], 0)  # type: ignore[misc]
        segments_BS = padding_segments([row.source for row in examples], source_BS.size(1))  # type: ignore[misc]
        inputs_BT = padded([row.inputs for row in examples], 0)  # type: ignore[misc]
        targets_BT = padded([row.targets for row in examples], IGNORED)  # type: ignore[misc]
        return SourceBatch(inputs_BT, targets_BT, sum(map(self.weight, examples)), source_BS, segments_BS)

    def length(self, example: SourceRow) -> int:
        return len(example.source) + len(example.inputs)

    def weight(self, example: SourceRow) -> float:
        return float((example.targets >= 0).sum())

    def inputs(self, model: Transformer, batch: SourceBatch) -> dict[str, Any]:
        """What the decoder needs beside its ids. Its padding stands at the right, where it sees it from nowhere."""
        assert batch.source is not None
        return {"memory": model.encode(batch.source, segments_BS=batch.source_segments)}

    def loss(self, model: Transformer, batch: SourceBatch) -> Tensor:
        inputs = self.inputs(model, batch)
        if not self.smoothing:
            return model.loss(batch.ids, batch.targets, **inputs)
        counted_BT = batch.targets >= 0
        hidden_MD = model.hidden(batch.ids, **inputs)[counted_BT]
        targets_M = batch.targets[counted_BT]
        total = hidden_MD.new_zeros(())
        for x_MD, target_M in zip(torch.split(hidden_MD, CHUNK), torch.split(targets_M, CHUNK), strict=True):
            total = total + checkpoint(
                smoothed, model, x_MD, target_M, self.smoothing, use_reentrant=False, preserve_rng_state=False
            )
        return total

    def measure(self, model: Transformer, batch: SourceBatch) -> dict[str, tuple[float, float]]:
        """The loss without smoothing."""
        loss = model.loss(batch.ids, batch.targets, **self.inputs(model, batch))
        return {"loss": (float(loss), batch.weight)}


def smoothed(model: Transformer, hidden_MD: Tensor, targets_M: Tensor, smoothing: float) -> Tensor:
    """Summed cross-entropy against smoothed targets; the logits are computed again for the gradient, not kept."""
    return F.cross_entropy(model.logits(hidden_MD), targets_M, reduction="sum", label_smoothing=smoothing)
