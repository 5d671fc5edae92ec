"""Where in a context the answer to a question begins and ends (Rajpurkar et al. 2016; without an answer, 2018).

Letters in names: B windows, T tokens, A answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import DataError
from hanmo.models.heads import HeadConfig
from hanmo.text.rows import OVERLAP, windows
from hanmo.training.objectives.base import ExampleObjective, Pick, padded
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
    from hanmo.data.tasks.types import QuestionAnswer

NO_ANSWER = (0, 0)  # the first token of a row stands for "there is none here", as inference reads it


@dataclass(frozen=True)
class SpanRow:
    """A question and a window of its context as a row, and the first and last token of each answer in it."""

    ids: Ids
    types: Ids | None
    spans: tuple[tuple[int, int], ...]
    where: str = ""


@dataclass
class SpanBatch(RowBatch):
    """Rows whose ``targets`` ``[B, 2]`` are a span's ends; ``answers`` ``[B, A, 2]`` are all that are right."""

    answers: Tensor | None = None


@dataclass
class PreparedSpans(Prepared[SpanRow]):
    """Windows; beside what is cut and dropped, the answers that begin or end inside a token."""

    inexact: int = 0


class SpanExtraction(ExampleObjective[Reader, SpanBatch, SpanRow]):
    """Both ends of an answer: the mean of two cross-entropies over the tokens of a row.

    A context longer than a row is read in overlapping windows, the same as in inference; a window that does not hold
    the whole answer says that there is none.

    Args:
        train, validation: from :meth:`prepare`.
    """

    @staticmethod
    def prepare(
        records: Iterable[QuestionAnswer], rows: RowMaker, head: HeadConfig, *, overlap: int = OVERLAP
    ) -> PreparedSpans:
        """Windows of some records; a record whose answers are not in its context is dropped and counted.

        Args:
            overlap: tokens that neighbouring windows share, at most half of one.

        Raises:
            DataError: a question that leaves no room for its context and must not be cut, a lone surrogate; with file
                and line.
            ModelError: a head for another task.
        """
        require_head(head, "span-extraction")
        prepared = PreparedSpans()
        whole = rows.context - rows.wrapping.overhead(pair=True)
        for record in records:
            asked = rows.encode(record.question, record.where)
            if len(asked) > whole // 2:
                rows.cut(len(asked), record.where, prepared, f"question (at most {whole // 2} fit)", "问题")
                asked = asked[: whole // 2]
            try:
                ids, offsets = rows.tokenizer.encode_with_offsets(record.context)
            except DataError as error:
                error.where = record.where
                raise
            found = [locate(text, start, record.context, offsets) for text, start in record.answers]
            answers = [span for span in found if span is not None]
            if not ids or (found and not answers):
                prepared.drop(record.where, "the answer is not where the record says" if ids else "empty context")
                continue
            prepared.inexact += any(not exact for _, _, exact in answers)
            room = whole - len(asked)
            for start, end in windows(len(ids), room, min(overlap, room // 2)):
                row = rows.wrapping.wrap(asked, ids[start:end])
                shift = row.starts[1] - start
                inside = [(a + shift, b + shift) for a, b, _ in answers if start <= a and b < end]
                spans = tuple(dict.fromkeys(inside)) or (NO_ANSWER,)
                prepared.examples.append(SpanRow(as_ids(row.ids), types_of(row), spans, record.where))
        prepared.tell()
        return prepared

    def collate(self, picks: list[Pick[SpanRow]]) -> SpanBatch:
        examples = [pick.example for pick in picks]
        ids_BT, types_BT, segments_BT = tensors_of([row.ids for row in examples], [row.types for row in examples])
        targets_B2 = torch.tensor([row.spans[0] for row in examples])
        starts_BA, ends_BA = (padded([[span[end] for span in row.spans] for row in examples], -1) for end in (0, 1))
        answers_BA2 = torch.stack([starts_BA, ends_BA], dim=2)
        return SpanBatch(ids_BT, targets_B2, len(examples), types_BT, segments_BT, answers_BA2)

    def length(self, example: SpanRow) -> int:
        return len(example.ids)

    def scores(self, model: Reader, batch: SpanBatch) -> Tensor:
        """Scores of every token as first and as last one, ``[B, T, 2]``; minus infinity where a row is padded."""
        scores_BT2 = head_scores(model, batch)
        if batch.segments is None:
            return scores_BT2
        return scores_BT2.masked_fill((batch.segments == 0).unsqueeze(-1), float("-inf"))

    def loss(self, model: Reader, batch: SpanBatch) -> Tensor:
        return self.loss_of(self.scores(model, batch), batch)

    def loss_of(self, scores_BT2: Tensor, batch: SpanBatch) -> Tensor:
        """The loss of some scores."""
        return 0.5 * F.cross_entropy(scores_BT2, batch.targets, reduction="sum")

    def measure(self, model: Reader, batch: SpanBatch) -> dict[str, tuple[float, float]]:
        """Loss, and the share of windows whose first token, last token, or both are those of an answer."""
        assert batch.answers is not None
        scores_BT2 = self.scores(model, batch)
        right_BA2 = scores_BT2.argmax(1).unsqueeze(1) == batch.answers
        count = len(scores_BT2)
        starts, ends = (int(column.any(1).sum()) for column in right_BA2.unbind(2))
        return {
            "loss": (float(self.loss_of(scores_BT2, batch)), batch.weight),
            "accuracy": (int(right_BA2.all(2).any(1).sum()), count),
            "start_accuracy": (starts, count),
            "end_accuracy": (ends, count),
        }


def locate(answer: str, start: int, context: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int, bool] | None:
    """The first and the last token of an answer, and whether they hold nothing else; None if it is not there.

    Args:
        answer: the text.
        start: the character of the context at which it begins.
        context: where it stands.
        offsets: the characters of each token of the context.

    >>> locate("moon", 4, "the moon", [(0, 3), (3, 8)])
    (1, 1, True)
    """
    if start < 0 or context[start : start + len(answer)] != answer or not answer.strip():
        return None
    begin = start + len(answer) - len(answer.lstrip())
    end = start + len(answer.rstrip())
    touching = [place for place, (a, b) in enumerate(offsets) if a < end and b > begin]
    if not touching:
        return None
    first, last = touching[0], touching[-1]
    exact = context[offsets[first][0] : offsets[last][1]].strip() == answer.strip()
    return first, last, exact
