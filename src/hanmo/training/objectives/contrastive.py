"""Vectors of texts: each text nearer to its partner than to the other texts of its group.

The loss is InfoNCE (van den Oord et al. 2018) over cosines, with the other partners of the group as negatives
(Henderson et al. 2017) and, where records name some, texts that look right and are not.

Letters in names: G pairs of a group, R texts, C candidates, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import DataError, UsageError
from hanmo.models.heads import pool
from hanmo.training.objectives.base import WHOLE, Batch, Objective, Order, Share
from hanmo.training.objectives.rows import Ids, Prepared, Reader, RowMaker, as_ids, hidden_states, tensors_of

if TYPE_CHECKING:
    from hanmo.data.tasks.types import Similar


class TextPooling(Protocol):
    """How states become a vector: :class:`hanmo.inference.pooling.Pooling`, with which the model will be used."""

    @property
    def max_length(self) -> int | None: ...

    @property
    def lowercase(self) -> bool: ...

    def __call__(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Mean:
    """The mean of the states of all tokens, which is what inference takes where a folder says nothing else."""

    max_length: int | None = None
    lowercase: bool = False

    def __call__(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        return pool(hidden_BTD, mask_BT, "mean")


@dataclass(frozen=True)
class SimilarRow:
    """A text, its partner and perhaps a text that is none, as rows; ``keys`` are equal for equal texts."""

    anchor: Ids
    positive: Ids
    negative: Ids | None
    keys: tuple[int, int, int]
    where: str = ""

    @property
    def length(self) -> int:
        """Tokens of all its texts."""
        return len(self.anchor) + len(self.positive) + (0 if self.negative is None else len(self.negative))


@dataclass
class GroupBatch(Batch):
    """Some groups: ``ids`` ``[R, T]`` are all anchors; ``candidates`` are the partners, then the negatives.

    ``targets`` ``[R]`` is the place of each anchor's partner among the candidates, and ``allowed`` ``[R, C]`` says
    which candidates it is compared with: its own, and those of its group that are not known to be right as well.
    ``mutual`` ``[R, R]`` says the same of the anchors that a partner is compared with.
    """

    segments: Tensor | None = None
    candidates: Tensor | None = None
    candidate_segments: Tensor | None = None
    allowed: Tensor | None = None
    mutual: Tensor | None = None


class Contrastive(Objective[Reader, GroupBatch]):
    """Texts that belong together get vectors that point the same way.

    Each step takes ``batch_size`` groups of ``group`` records, drawn anew in every epoch. Negatives come from the
    record's own group alone, so that neither the micro-batch nor the number of processes changes the loss.

    Args:
        train, validation: from :meth:`prepare`.
        pooling: how the model will make one vector of a text.
        group: records that are negatives of each other; more make the task harder and need more memory.
        batch_size: groups per optimizer step.
        micro_batch: groups per forward pass; changes memory, not the gradient.
        temperature: by which cosines are divided.
        symmetric: also find the text for its partner; the loss is the mean of both directions.
        seed: decides order and groups.

    Raises:
        DataError: fewer than two records to train on, or to validate on.
        UsageError: a group of one, or a temperature that is not positive.
    """

    unit = "pair"

    def __init__(
        self,
        train: Sequence[SimilarRow],
        validation: Sequence[SimilarRow],
        *,
        pooling: TextPooling | None = None,
        group: int = 32,
        batch_size: int = 1,
        micro_batch: int = 1,
        temperature: float = 0.05,
        symmetric: bool = False,
        seed: int,
    ) -> None:
        for name, zh, examples in (("training", "训练", train), ("validation", "验证", validation)):
            if len(examples) < 2:
                raise DataError(
                    f"{name} examples: {len(examples)}; texts are compared with others, so two are the least",
                    fix="add records, or give some to validate on with --validation",
                    zh=f"{zh}样本只有 {len(examples)} 条，对比学习至少需要两条；请补充数据，或用 --validation 另给文件",
                )
        if group < 2:
            raise UsageError(f"a group of {group} has no negatives", fix="give at least 2", zh="每组至少需要 2 条记录")
        if not temperature > 0:
            raise UsageError(
                f"the temperature must be positive, not {temperature}",
                fix="0.05 is usual",
                zh="温度应为正数，常用 0.05",
            )
        self.train, self.validation, self.seed = train, validation, seed
        self.pooling: TextPooling = pooling or Mean()
        self.group, self.micro_batch = min(group, len(train)), micro_batch
        self.batch_size = max(1, min(batch_size, len(train) // self.group))
        self.temperature, self.symmetric = temperature, symmetric
        self.order = Order(len(train), self.batch_size * self.group, seed)

    @staticmethod
    def prepare(
        records: Iterable[Similar],
        rows: RowMaker,
        pooling: TextPooling | None = None,
        *,
        min_score: float | None = None,
    ) -> Prepared[SimilarRow]:
        """Rows of some records, read as ``pooling`` says; one with a blank text is dropped and counted.

        Args:
            min_score: records that say how similar their texts are belong together from here on; others are dropped
                and counted.

        Raises:
            DataError: a text is too long and must not be cut, or has a lone surrogate; a record has a score and
                nothing says which scores are high; with file and line.
        """
        if pooling is not None and pooling.max_length:
            rows = replace(rows, context=min(rows.context, pooling.max_length))
        prepared: Prepared[SimilarRow] = Prepared()
        known: dict[str, int] = {}
        for record in records:
            texts = [record.anchor, record.positive, *([record.negative] if record.negative is not None else [])]
            if record.score is not None and min_score is None:
                raise DataError(
                    f"the record has a score of similarity, {record.score}",
                    where=record.where,
                    why="texts with a low score do not belong together, and must not be drawn to each other",
                    fix="say from which score on they do, with --min-score",
                    zh=f"该记录带有相似度分数 {record.score}；请用 --min-score 指明多高的分数算相似",
                )
            if record.score is not None and min_score is not None and record.score < min_score:
                prepared.drop(record.where, f"score {record.score} is below {min_score}")
                continue
            if not all(text.strip() for text in texts):
                prepared.drop(record.where, "a text is blank")
                continue
            if pooling is not None and pooling.lowercase:
                texts = [text.lower() for text in texts]
            cut: Prepared[SimilarRow] = Prepared()  # a record counts once, however many of its texts are cut
            ids = [as_ids(rows.wrap([text], record.where, cut).ids) for text in texts]
            prepared.truncated += cut.truncated > 0
            keys = [known.setdefault(text, len(known)) for text in texts]
            negative = ids[2] if len(ids) > 2 else None
            prepared.examples.append(
                SimilarRow(ids[0], ids[1], negative, (keys[0], keys[1], keys[-1] if negative is not None else -1),
                           record.where)
            )  # fmt: skip
        prepared.tell()
        return prepared

    def groups(self, step: int) -> list[list[SimilarRow]]:
        """The groups of one step."""
        examples = [self.train[index] for index in self.order.step(step)]
        return [examples[at : at + self.group] for at in range(0, len(examples), self.group)]

    def micro_batches(self, step: int, share: Share = WHOLE) -> Iterator[GroupBatch]:
        yield from self.batches(self.groups(step), share)

    def batches(self, groups: list[list[SimilarRow]], share: Share) -> Iterator[GroupBatch]:
        """A process's part of some groups, ``micro_batch`` at a time."""
        starts = range(0, len(groups), self.micro_batch)
        for number in share.of(len(starts)):
            yield collate_groups(groups[starts[number] : starts[number] + self.micro_batch])

    def step_weight(self, step: int) -> float:  # noqa: ARG002 - every step has the same size
        return self.batch_size * self.group

    def tokens_in(self, step: int) -> int:
        return sum(self.train[index].length for index in self.order.step(step))

    def vectors(self, model: Reader, ids_RT: Tensor, segments_RT: Tensor | None) -> Tensor:
        """One vector of length one per text, ``[R, D]``."""
        hidden_RTD = hidden_states(model, ids_RT, None, segments_RT)
        mask_RT = torch.ones_like(ids_RT, dtype=torch.bool) if segments_RT is None else segments_RT > 0
        return F.normalize(self.pooling(hidden_RTD, mask_RT))

    def scores(self, model: Reader, batch: GroupBatch) -> Tensor:
        """Cosines of all anchors and all candidates by the temperature, ``[R, C]``."""
        assert batch.candidates is not None
        anchors_RD = self.vectors(model, batch.ids, batch.segments)
        candidates_CD = self.vectors(model, batch.candidates, batch.candidate_segments)
        return anchors_RD @ candidates_CD.T / self.temperature

    def loss(self, model: Reader, batch: GroupBatch) -> Tensor:
        return self.loss_of(self.scores(model, batch), batch)

    def loss_of(self, scores_RC: Tensor, batch: GroupBatch) -> Tensor:
        """The loss of some scores."""
        assert batch.allowed is not None and batch.mutual is not None
        compared_RC = scores_RC.masked_fill(~batch.allowed, float("-inf"))
        loss = F.cross_entropy(compared_RC, batch.targets, reduction="sum")
        if not self.symmetric:
            return loss
        back_RR = scores_RC[:, : len(scores_RC)].T.masked_fill(~batch.mutual, float("-inf"))
        return (loss + F.cross_entropy(back_RR, batch.targets, reduction="sum")) / 2

    def measure(self, model: Reader, batch: GroupBatch) -> dict[str, tuple[float, float]]:
        """Loss, and the share of texts whose nearest candidate is their partner."""
        assert batch.allowed is not None
        scores_RC = self.scores(model, batch)
        nearest_R = scores_RC.masked_fill(~batch.allowed, float("-inf")).argmax(1)
        right = int((nearest_R == batch.targets).sum())
        return {"loss": (float(self.loss_of(scores_RC, batch)), batch.weight), "accuracy": (right, batch.weight)}

    def validation_batches(self, limit: int | None = None, share: Share = WHOLE) -> Iterator[GroupBatch]:
        """Groups of the validation data, always the same; the last record joins the last group rather than be alone."""
        order = np.random.default_rng([self.seed]).permutation(len(self.validation))
        examples = [self.validation[int(index)] for index in order]
        starts = [*range(0, max(1, len(examples) - 1), self.group), len(examples)]
        groups = [examples[start:stop] for start, stop in pairwise(starts)]
        if limit is not None and (total := sum(row.length for row in examples)) > limit:
            groups = groups[: max(1, len(groups) * limit // total)]
        yield from self.batches(groups, share)

    def origin(self, step: int) -> str:
        names = [row.where for group in self.groups(step) for row in group if row.where]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more if names else f"step {step}"


def collate_groups(groups: Sequence[Sequence[SimilarRow]]) -> GroupBatch:
    """Groups as one batch, in which no group sees another."""
    rows = [row for group in groups for row in group]
    numbers = [number for number, group in enumerate(groups) for _ in group]
    hard = [(row.negative, row.keys[2], number) for row, number in zip(rows, numbers, strict=True)
            if row.negative is not None]  # fmt: skip
    ids_RT, _, segments_RT = tensors_of([row.anchor for row in rows], [None] * len(rows))
    candidates = [*(row.positive for row in rows), *(ids for ids, _, _ in hard)]
    candidates_CT, _, candidate_segments = tensors_of(candidates, [None] * len(candidates))
    anchor_R, positive_R = (torch.tensor([row.keys[part] for row in rows]) for part in (0, 1))
    candidate_C = torch.cat([positive_R, torch.tensor([key for _, key, _ in hard], dtype=torch.long)])
    group_R = torch.tensor(numbers)
    group_C = torch.cat([group_R, torch.tensor([number for _, _, number in hard], dtype=torch.long)])
    together_RR = group_R == group_R[:, None]
    same_anchor_RR, same_partner_RR = (together_RR & (key_R == key_R[:, None]) for key_R in (anchor_R, positive_R))
    # what is named as the partner of an equal text of the group is right as well, and so is the text itself
    right_RC = joins(same_anchor_RR, positive_R[:, None] == candidate_C) | (anchor_R[:, None] == candidate_C)
    back_RR = joins(same_partner_RR, anchor_R[:, None] == anchor_R) | (positive_R[:, None] == anchor_R)
    own_RR = torch.eye(len(rows), dtype=torch.bool)
    allowed_RC = (group_R[:, None] == group_C) & ~right_RC
    allowed_RC[:, : len(rows)] |= own_RR
    mutual_RR = together_RR & ~back_RR | own_RR
    return GroupBatch(
        ids_RT, torch.arange(len(rows)), float(len(rows)), segments_RT, candidates_CT, candidate_segments,
        allowed_RC, mutual_RR,
    )  # fmt: skip


def joins(left: Tensor, right: Tensor) -> Tensor:
    """Whether anything links a row of one bool matrix with a column of the other."""
    return (left.float() @ right.float()) > 0
