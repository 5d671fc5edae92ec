"""Labels of whole texts and of words: cross-entropy over a head, and the likelihood of a conditional random field.

Letters in names: B texts or sentences, T tokens, W words, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.data.tasks.schemes import has_spans, span_counts
from hanmo.errors import DataError, UsageError, nearest
from hanmo.models.heads import HeadConfig
from hanmo.text.rows import spaced_words, word_pieces
from hanmo.training.objectives.base import IGNORED, ExampleObjective, Pick, padded
from hanmo.training.objectives.rows import (
    Ids,
    Prepared,
    Reader,
    RowBatch,
    RowMaker,
    as_ids,
    head_scores,
    require_head,
    tensors_of,
    types_of,
)

if TYPE_CHECKING:
    from hanmo.data.tasks.types import Labelled, Tagged


@dataclass(frozen=True)
class LabelledRow:
    """A text as a row, and the numbers of its labels."""

    ids: Ids
    types: Ids | None
    labels: tuple[int, ...]
    where: str = ""


class Classification(ExampleObjective[Reader, RowBatch, LabelledRow]):
    """Which label a text or a pair of texts has, or which labels.

    One label of several: cross-entropy. Any number of labels at once (or a head with one output): the mean over the
    labels of their binary cross-entropies.

    Args:
        train, validation: from :meth:`prepare`.
        head: that of the network.
        balanced: weigh each example by ``examples / (labels * examples of its label)``, so that rare labels count as
            much as frequent ones (King and Zeng 2001); the loss is then the weighted mean.

    Raises:
        UsageError: ``balanced`` where any number of labels can hold at once.
    """

    def __init__(
        self,
        train: Sequence[LabelledRow],
        validation: Sequence[LabelledRow],
        head: HeadConfig,
        *,
        batch_size: int,
        micro_batch: int,
        seed: int,
        balanced: bool = False,
    ) -> None:
        super().__init__(train, validation, batch_size=batch_size, micro_batch=micro_batch, seed=seed)
        self.head = head
        self.independent = independent(head)
        self.label_weights: Tensor | None = None
        if balanced:
            if self.independent:
                raise UsageError(
                    "balanced weights are for one label a text",
                    why="with several labels a text has no weight of its own",
                    fix="leave them out",
                    zh="多标签分类不支持 balanced 权重，请去掉该选项",
                )
            self.label_weights = balanced_weights([row.labels[0] for row in train], len(head.labels))

    @staticmethod
    def prepare(records: Iterable[Labelled], rows: RowMaker, head: HeadConfig) -> Prepared[LabelledRow]:
        """Rows of some records.

        Raises:
            DataError: a label that the head does not have, none or several where there must be one, a text that is too
                long or has a lone surrogate; with file and line.
            ModelError: a head for another task.
        """
        require_head(head, "sequence-classification")
        numbers = {label: number for number, label in enumerate(head.labels)}
        prepared: Prepared[LabelledRow] = Prepared()
        for record in records:
            labels = tuple(sorted({label_number(label, numbers, record.where) for label in record.labels}))
            if not independent(head) and len(labels) != 1:
                raise DataError(
                    f"the text has {len(labels)} labels, not one",
                    where=record.where,
                    fix="give it one label; or train with --multi-label",
                    zh=f"该文本有 {len(labels)} 个标签，应为一个；多标签数据请用 --multi-label",
                )
            texts = [record.text] if record.pair is None else [record.text, record.pair]
            row = rows.wrap(texts, record.where, prepared)
            prepared.examples.append(LabelledRow(as_ids(row.ids), types_of(row), labels, record.where))
        prepared.tell()
        return prepared

    def collate(self, picks: list[Pick[LabelledRow]]) -> RowBatch:
        examples = [pick.example for pick in picks]
        ids_BT, types_BT, segments_BT = tensors_of([row.ids for row in examples], [row.types for row in examples])
        if self.independent:
            targets = torch.zeros(len(examples), len(self.head.labels))
            for place, row in enumerate(examples):
                targets[place, list(row.labels)] = 1.0
        else:
            targets = torch.tensor([row.labels[0] for row in examples])
        return RowBatch(ids_BT, targets, sum(map(self.weight, examples)), types_BT, segments_BT)

    def length(self, example: LabelledRow) -> int:
        return len(example.ids)

    def weight(self, example: LabelledRow) -> float:
        return 1.0 if self.label_weights is None else float(self.label_weights[example.labels[0]])

    def scores(self, model: Reader, batch: RowBatch) -> Tensor:
        """``[B, L]``, before softmax or sigmoid."""
        return head_scores(model, batch)

    def loss(self, model: Reader, batch: RowBatch) -> Tensor:
        return self.loss_of(self.scores(model, batch), batch)

    def loss_of(self, scores_BL: Tensor, batch: RowBatch) -> Tensor:
        """The loss of some scores."""
        if self.independent:
            targets_BL = batch.targets.to(scores_BL.dtype)
            return F.binary_cross_entropy_with_logits(scores_BL, targets_BL, reduction="sum") / scores_BL.size(1)
        weights_L = None if self.label_weights is None else self.label_weights.to(scores_BL)
        return F.cross_entropy(scores_BL, batch.targets, weights_L, reduction="sum")

    def measure(self, model: Reader, batch: RowBatch) -> dict[str, tuple[float, float]]:
        """Loss and accuracy; with several labels a text, the share of texts that are wholly right, and micro F1."""
        scores_BL = self.scores(model, batch)
        measures = {"loss": (float(self.loss_of(scores_BL, batch)), batch.weight)}
        if not self.independent:
            right = int((scores_BL.argmax(1) == batch.targets).sum())
            return measures | {"accuracy": (right, len(scores_BL))}
        found_BL, true_BL = scores_BL > 0, batch.targets > 0
        measures["accuracy"] = int((found_BL == true_BL).all(1).sum()), len(scores_BL)
        measures["micro_f1"] = 2.0 * int((found_BL & true_BL).sum()), int(found_BL.sum()) + int(true_BL.sum())
        return measures


def independent(head: HeadConfig) -> bool:
    """Whether each label holds or not whatever the others do; the same question as in inference."""
    return head.multi_label or len(head.labels) == 1


def label_number(label: str, numbers: Mapping[str, int], where: str) -> int:
    """The place of a label among the head's.

    Raises:
        DataError: it has none.
    """
    if label not in numbers:
        raise DataError(
            f"the label {label!r} is not among the {len(numbers)} labels that the model has",
            where=where,
            why="a label that training never sees cannot be learned or scored",
            fix=f"correct it, or add examples of it to the training data. {nearest(label, numbers)}",
            zh=f"标签 {label!r} 不在模型的标签之中；请更正，或在训练数据中补充该标签的样本。{nearest(label, numbers)}",
        )
    return numbers[label]


def balanced_weights(labels: Sequence[int], count: int) -> Tensor:
    """The weight of each label, float32 ``[L]``: their mean over the examples is one; of a label without any, one.

    >>> balanced_weights([0, 0, 0, 1], 2).tolist()
    [0.6666666865348816, 2.0]
    """
    counts_L = torch.bincount(torch.tensor(labels), minlength=count).float()
    present = int((counts_L > 0).sum())
    return torch.where(counts_L > 0, len(labels) / (present * counts_L.clamp(min=1)), 1.0)


# Words ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaggedRow:
    """A sentence as a row, the place of the first token of each word, and the number of its label."""

    ids: Ids
    types: Ids | None
    places: Ids
    tags: Ids
    where: str = ""


@dataclass
class WordBatch(RowBatch):
    """Rows whose ``targets`` are those of their words, ``[B, W]``; ``places`` ``[B, W]`` is where each word begins."""

    places: Tensor | None = None


class Tagging(ExampleObjective[Reader, WordBatch, TaggedRow]):
    """The label of each word, read from its first token: each by itself, or as a path of a linear-chain CRF.

    A CRF gets the scores of words, not of tokens, so that its transitions join neighbours of the text. The weight of a
    batch is its number of words.

    Args:
        train, validation: from :meth:`prepare`.
    """

    unit = "token"

    @staticmethod
    def prepare(records: Iterable[Tagged], rows: RowMaker, head: HeadConfig) -> Prepared[TaggedRow]:
        """Rows of some sentences; with ``truncate`` the words that do not fit are left out.

        Raises:
            DataError: a label that the head does not have, not as many labels as words, a sentence that is too long or
                has a lone surrogate; with file and line.
            ModelError: a head for another task.
        """
        require_head(head, "token-classification")
        numbers = {label: number for number, label in enumerate(head.labels)}
        overhead = rows.wrapping.overhead()
        room = rows.context - overhead
        prepared: Prepared[TaggedRow] = Prepared()
        for record in records:
            words = list(record.tokens)
            if len(words) != len(record.tags):
                raise DataError(
                    f"the sentence has {len(words)} words and {len(record.tags)} labels",
                    where=record.where,
                    fix="give each word one label",
                    zh=f"句子有 {len(words)} 个词、{len(record.tags)} 个标签，应一一对应",
                )
            if not words:
                prepared.drop(record.where, "no words")
                continue
            tags = [label_number(tag, numbers, record.where) for tag in record.tags]
            try:
                pieces = word_pieces(rows.tokenizer, words, spaced_words(words))
            except DataError as error:
                error.where = record.where
                raise
            sizes = np.cumsum([min(len(piece), room) for piece in pieces])
            kept = int(np.searchsorted(sizes, room, side="right"))
            if kept < len(words) or max(map(len, pieces)) > room:
                rows.cut(sum(map(len, pieces)) + overhead, record.where, prepared, "sentence", "句子")
            row = rows.wrapping.wrap([id for piece in pieces[:kept] for id in piece[:room]])
            places = row.starts[0] + np.concatenate([[0], sizes[: kept - 1]])
            prepared.examples.append(
                TaggedRow(as_ids(row.ids), types_of(row), places.astype(np.int32), as_ids(tags[:kept]), record.where)
            )
        prepared.tell()
        return prepared

    def collate(self, picks: list[Pick[TaggedRow]]) -> WordBatch:
        examples = [pick.example for pick in picks]
        ids_BT, types_BT, segments_BT = tensors_of([row.ids for row in examples], [row.types for row in examples])
        targets_BW = padded([row.tags for row in examples], IGNORED)  # type: ignore[misc]
        places_BW = padded([row.places for row in examples], 0)  # type: ignore[misc]
        return WordBatch(ids_BT, targets_BW, sum(map(self.weight, examples)), types_BT, segments_BT, places_BW)

    def length(self, example: TaggedRow) -> int:
        return len(example.ids)

    def weight(self, example: TaggedRow) -> float:
        return float(len(example.tags))

    def scores(self, model: Reader, batch: WordBatch) -> Tensor:
        """The scores of each word's labels, ``[B, W, L]``; any values where there is no word."""
        assert batch.places is not None
        scores_BTL = head_scores(model, batch)
        return scores_BTL.gather(1, batch.places.unsqueeze(-1).expand(-1, -1, scores_BTL.size(2)))

    def loss(self, model: Reader, batch: WordBatch) -> Tensor:
        return self.loss_of(model, self.scores(model, batch), batch)

    def loss_of(self, model: Reader, scores_BWL: Tensor, batch: WordBatch) -> Tensor:
        """The loss of some scores."""
        assert model.head is not None
        if model.head.crf is not None:
            return model.head.crf(scores_BWL, batch.targets, batch.targets >= 0)  # type: ignore[no-any-return]
        return F.cross_entropy(scores_BWL.flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=IGNORED)

    def measure(self, model: Reader, batch: WordBatch) -> dict[str, tuple[float, float]]:
        """Loss and accuracy per word; of tags that mark spans, the F1 of whole spans."""
        assert model.head is not None
        scores_BWL = self.scores(model, batch)
        if model.head.crf is None:
            found_BW = scores_BWL.argmax(2)
        else:
            paths = model.head.crf.decode(scores_BWL, batch.targets >= 0)
            found_BW = padded(paths, 0).to(batch.targets.device)
        right = int(((found_BW == batch.targets) & (batch.targets >= 0)).sum())
        loss = float(self.loss_of(model, scores_BWL, batch))
        measures = {"loss": (loss, batch.weight), "accuracy": (right, batch.weight)}
        labels = model.head.config.labels
        if not has_spans(labels):
            return measures
        rows = zip(found_BW.tolist(), batch.targets.tolist(), strict=True)
        tags = (
            [[labels[id] for id, tag in zip(ids, true, strict=True) if tag >= 0] for ids in (found, true)]
            for found, true in rows
        )
        common, total = span_counts((found, true) for found, true in tags)
        return measures | {"f1": (2.0 * common, float(total))}
