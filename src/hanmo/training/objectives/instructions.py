"""Instruction tuning: the answers of conversations, given what precedes them (Ouyang et al. 2022, section 3.4).

Only the assistant's words and the token that ends them are learned; :mod:`hanmo.text.chat_targets` says which those
are. Conversations share rows (:mod:`hanmo.training.packing`), and none sees another.

Letters in names: B rows, T tokens, M targets that count, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanmo.data.tasks.types import Dialogue, Pair
from hanmo.errors import DataError
from hanmo.language import pick
from hanmo.models.transformer import Embedding, Transformer
from hanmo.settings import notice
from hanmo.text.chat_targets import ChatTargets, TrainedRow, completion_row
from hanmo.text.tokenizer import Tokenizer
from hanmo.training.objectives.base import IGNORED, ExampleObjective, Pick, padded
from hanmo.training.objectives.causal import PackedBatch
from hanmo.training.objectives.rows import Ids, Prepared, as_ids, too_long
from hanmo.training.packing import Packing, pack

CHUNK = 2048  # targets whose logits are held at once


@dataclass(frozen=True)
class AnswerRow:
    """What the network reads, and what it has to answer at each position (negative: nothing), both of one length."""

    inputs: Ids
    targets: Ids
    where: str = ""

    @property
    def learned(self) -> int:
        """Targets that count."""
        return int((self.targets >= 0).sum())


@dataclass(frozen=True)
class SharedRow:
    """Texts that share a row."""

    texts: tuple[AnswerRow, ...]

    @property
    def where(self) -> str:
        """The places of its texts."""
        return ", ".join(dict.fromkeys(text.where for text in self.texts if text.where))


def answer_row(row: TrainedRow, context: int, where: str = "") -> AnswerRow:
    """A row of at most ``context`` inputs; each has its successor as target where that is learned."""
    ids = as_ids(row.ids[: context + 1])
    targets = np.where(row.trained[1 : context + 1], ids[1:], IGNORED).astype(np.int32)
    return AnswerRow(ids[:-1], targets, where)


def trained_rows(record: Dialogue | Pair, chat: ChatTargets | Tokenizer) -> list[TrainedRow]:
    """The rows of a record; none where there is nothing to learn.

    A text and its continuation are a question and an answer for a model with a template.

    Raises:
        DataError: malformed messages, or a text with a lone surrogate; with the record's file and line.
    """
    try:
        if isinstance(record, Dialogue):
            if isinstance(chat, Tokenizer):
                raise no_template()
            return chat.rows(record.messages)
        if not record.target.strip():
            return []
        if isinstance(chat, Tokenizer):
            return [completion_row(chat, record.source, record.target)]
        question = {"role": "user", "content": record.source}
        return chat.rows([question, {"role": "assistant", "content": record.target}])
    except DataError as error:
        raise at(record.where, error) from None


def no_template() -> DataError:
    """The error for conversations where the model has no form for them."""
    return DataError(
        "a conversation needs a chat template, and the model has none",
        fix="give the model one; hanmo.text.chat_targets.with_chat_tokens adds that of ChatML",
        zh="对话数据需要对话模板，而该模型没有；可为它加上 ChatML 模板",
    )


def at(where: str, error: DataError) -> DataError:
    """An error about a part of a record, with the record's place before it."""
    error.where = ": ".join(place for place in (where, error.where) if place)
    return error


def prepare_rows(
    records: Iterable[Dialogue | Pair],
    chat: ChatTargets | Tokenizer,
    *,
    context: int,
    truncate: bool = False,
) -> Prepared[AnswerRow]:
    """Rows of conversations, or of texts and their continuations.

    Args:
        records: without an answer to learn, they are dropped and counted.
        chat: of a model with a template; the tokenizer of one without, which learns continuations as they are.
        context: tokens of a row.
        truncate: cut the end of what is longer, and count it; otherwise it is refused. A row of which no learned token
            is left is dropped.

    Raises:
        DataError: malformed messages, or a row that is too long and must not be cut; with file and line.
        ModelError: the template cannot be trained on; see :class:`~hanmo.text.chat_targets.ChatTargets`.
    """
    prepared: Prepared[AnswerRow] = Prepared()
    rewritten = chat.rewritten if isinstance(chat, ChatTargets) else 0
    for record in records:
        rows = trained_rows(record, chat)
        if not rows:
            prepared.drop(record.where, pick("there is no answer to learn", "没有可学习的回答"))
        for row in rows:
            add_row(prepared, row, context, truncate, record.where)
    prepared.tell()
    if isinstance(chat, ChatTargets) and (count := chat.rewritten - rewritten):
        notice(
            pick(
                f"the chat template changes earlier turns of {count:,} conversations (their thoughts, for example); "
                "each of their answers is learned in a row of its own, after the prompt it would have in use",
                f"对话模板会改写 {count:,} 个对话中较早的轮次（例如去掉思考过程）；"
                "这些对话的每个回答单独成行，提示与实际使用时一致",
            )
        )
    return prepared


def add_row(prepared: Prepared[AnswerRow], row: TrainedRow, context: int, truncate: bool, where: str) -> None:
    """Add a row if it fits or may be cut."""
    length = len(row.ids) - 1  # the last token is only a target
    if length > context:
        if not truncate:
            raise too_long(length, context, where, "conversation", "对话")
        prepared.truncated += 1
    made = answer_row(row, context, where)
    if made.learned:
        prepared.examples.append(made)
    else:
        prepared.drop(where, pick("no token of an answer fits into the context", "上下文容不下回答的任何词元"))


def collate_rows(rows: Sequence[Sequence[AnswerRow]]) -> PackedBatch:
    """Rows of texts to one batch; padding is at the right, in segment 0.

    A single text that fills its row needs no segments.
    """
    ids, targets, segments = (
        padded([np.concatenate(parts) for parts in kind], fill)  # type: ignore[misc]
        for kind, fill in (
            ([[text.inputs for text in row] for row in rows], 0),
            ([[text.targets for text in row] for row in rows], IGNORED),
            ([[np.full(len(t.inputs), n, np.int32) for n, t in enumerate(row, 1)] for row in rows], 0),
        )
    )
    return PackedBatch(ids, targets, float((targets >= 0).sum()), None if bool((segments == 1).all()) else segments)


class InstructionTuning(ExampleObjective[Transformer, PackedBatch, SharedRow]):
    """Every token of every answer, given the conversation so far; the weight of a batch is the number of them.

    Args:
        train, validation: from :func:`prepare_rows`.
        context: tokens of a row.
        batch_size, micro_batch: rows, of many conversations each where they are packed.
        packed: let conversations share rows; else each has its own, padded to the longest of its micro-batch.
        seed: decides which share a row, and the order of the rows.

    Attributes:
        packing: what became of the training examples.
    """

    unit = "token"

    def __init__(
        self,
        train: Sequence[AnswerRow],
        validation: Sequence[AnswerRow],
        *,
        context: int,
        batch_size: int,
        micro_batch: int,
        seed: int,
        packed: bool = True,
    ) -> None:
        rows = [shared_rows(split, context, seed, packed) for split in (train, validation)]
        super().__init__(rows[0][0], rows[1][0], batch_size=batch_size, micro_batch=micro_batch, seed=seed)
        self.packing = rows[0][1]

    def collate(self, picks: list[Pick[SharedRow]]) -> PackedBatch:
        return collate_rows([pick.example.texts for pick in picks])

    def length(self, example: SharedRow) -> int:
        return sum(len(text.inputs) for text in example.texts)

    def weight(self, example: SharedRow) -> float:
        return float(sum(text.learned for text in example.texts))

    def loss(self, model: Transformer, batch: PackedBatch) -> Tensor:
        return model.loss(batch.ids, batch.targets, segments_BT=batch.segments)

    def measure(self, model: Transformer, batch: PackedBatch) -> dict[str, tuple[float, float]]:
        """The loss, and the share of learned tokens that are the most probable ones (accuracy)."""
        counted_BT = batch.targets >= 0
        hidden_MD = model.hidden(batch.ids, segments_BT=batch.segments)[counted_BT]
        targets_M = batch.targets[counted_BT]
        loss, right = 0.0, 0
        for x_MD, target_M in zip(torch.split(hidden_MD, CHUNK), torch.split(targets_M, CHUNK), strict=True):
            logits_MV = model.logits(x_MD)
            loss += float(F.cross_entropy(logits_MV, target_M, reduction="sum"))
            right += int((logits_MV.argmax(-1) == target_M).sum())
        return {"loss": (loss, batch.weight), "accuracy": (float(right), batch.weight)}


def shared_rows(
    examples: Sequence[AnswerRow], context: int, seed: int, packed: bool
) -> tuple[list[SharedRow], Packing]:
    """Examples in rows of the context.

    Raises:
        DataError: one is longer.
    """
    lengths = [len(example.inputs) for example in examples]
    if lengths and max(lengths) > context:
        longest = lengths.index(max(lengths))
        raise too_long(lengths[longest], context, examples[longest].where, "conversation", "对话")
    if packed:
        packing = pack(lengths, context, seed)
    else:
        packing = Packing([[index] for index in range(len(lengths))], context, sum(lengths))
    return [SharedRow(tuple(examples[index] for index in row)) for row in packing.rows], packing


def widen(model: Transformer, vocab_size: int) -> int:
    """Give a network rows for tokens that were added to its tokenizer; returns how many it lacked.

    A new row is the mean of all others, so that the new token begins neither likelier nor less likely than the average
    one (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). They must be trained: with
    LoRA, name the embedding among ``modules_to_save``.
    """
    missing = vocab_size - model.config.vocab_size
    if missing <= 0:
        return 0

    def wider(old: Tensor) -> nn.Parameter:
        rows = old.detach().mean(0, keepdim=True).expand(missing, *old.shape[1:])
        return nn.Parameter(torch.cat([old.detach(), rows]), requires_grad=old.requires_grad)

    config = replace(model.config, vocab_size=vocab_size)
    for stack in (model.model, model.encoder):
        if stack is None or not hasattr(stack, "embed_tokens"):
            continue
        table = Embedding(vocab_size, config.hidden_size, device="meta")
        table.weight = wider(stack.embed_tokens.weight)
        stack.embed_tokens = table
        stack.config = replace(stack.config, vocab_size=vocab_size)
    if hasattr(model, "lm_head"):
        model.lm_head.weight = wider(model.lm_head.weight)
        model.lm_head.out_features = vocab_size
    if model.lm_bias is not None:
        model.lm_bias = wider(model.lm_bias)
    model.config = config if config.encoder is None else replace(config, encoder=model.encoder.config)  # type: ignore[union-attr]
    return missing
