"""Learning from a teacher: the student matches the teacher's probabilities beside the data (Hinton et al. 2015).

The loss is ``alpha * temperature^2 * KL(teacher || student) + (1 - alpha) * loss of the data``, where both networks'
scores are divided by the temperature inside the divergence; its square keeps the gradient's size.

Letters in names: B rows, T tokens, M positions that count, D hidden size, V vocabulary, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hanmo.errors import ModelError, UsageError
from hanmo.models.transformer import Transformer
from hanmo.training.objectives.base import WHOLE, Batch, Objective, Share
from hanmo.training.objectives.rows import Reader
from hanmo.training.objectives.supervised import Classification

CHUNK = 1024  # positions whose logits of both networks are held at once


@runtime_checkable
class HasInputs(Protocol):
    """A token objective that says what a network needs beside the ids of a batch."""

    def inputs(self, model: Transformer, batch: Any) -> dict[str, Any]: ...


class Distillation(Objective[Reader, Batch]):
    """Another objective, with a teacher: over tokens (next, masked, or of a target text), or :class:`Classification`.

    Batches, weights and order are those of the objective; so is the validation loss, beside which the divergence from
    the teacher is measured.

    Args:
        objective: what the student would learn alone.
        teacher: a network of the same kind; it is not trained, and runs in evaluation mode.
        student: the network that will be trained, to compare the two.
        alpha: the share of the teacher in the loss, from 0 to 1.
        temperature: above one, also what the teacher finds unlikely is learned.

    Raises:
        ModelError: the two differ in their vocabulary or labels.
        UsageError: ``alpha`` or ``temperature`` is none, or an objective without probabilities to match.
    """

    def __init__(
        self,
        objective: Objective[Any, Any],
        teacher: Reader,
        student: Reader,
        *,
        alpha: float = 0.5,
        temperature: float = 2.0,
    ) -> None:
        if not 0 <= alpha <= 1 or not temperature > 0:
            raise UsageError(
                f"alpha must be from 0 to 1 and the temperature positive, not {alpha} and {temperature}",
                fix="0.5 and 2 are usual",
                zh=f"alpha 应在 0 到 1 之间、温度应为正数，而不是 {alpha} 和 {temperature}；常用 0.5 和 2",
            )
        self.of_labels, self.divisible = isinstance(objective, Classification), objective.divisible
        if self.of_labels:
            check_labels(teacher, student)
        else:
            check_vocabularies(teacher, student)
            if objective.unit != "token" or getattr(objective, "smoothing", False):
                raise UsageError(
                    "this objective has no probabilities of tokens that a teacher could give",
                    fix="distil next tokens, masked words, target texts without label smoothing, or labels of texts",
                    zh="该训练目标无法蒸馏；请用于语言建模、无标签平滑的序列到序列，或文本分类",
                )
        self.objective, self.alpha, self.temperature = objective, alpha, temperature
        self.teacher = teacher.eval().requires_grad_(False)
        self.unit = objective.unit

    @property
    def micro_batch(self) -> int:
        """Size of a micro-batch."""
        return self.objective.micro_batch

    @micro_batch.setter
    def micro_batch(self, size: int) -> None:
        self.objective.micro_batch = size

    def micro_batches(self, step: int, share: Share = WHOLE) -> Iterator[Batch]:
        return self.objective.micro_batches(step, share)

    def step_weight(self, step: int) -> float:
        return self.objective.step_weight(step)

    def tokens_in(self, step: int) -> int:
        return self.objective.tokens_in(step)

    def validation_batches(self, limit: int | None = None, share: Share = WHOLE) -> Iterator[Batch]:
        return self.objective.validation_batches(limit, share)

    def origin(self, step: int) -> str:
        return self.objective.origin(step)

    def state_tensors(self) -> dict[str, Tensor]:
        return self.objective.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.objective.load_state_tensors(tensors)

    def loss(self, model: Reader, batch: Batch) -> Tensor:
        hard, divergence = self.parts(model, batch)
        return (1 - self.alpha) * hard + self.alpha * self.temperature**2 * divergence

    def measure(self, model: Reader, batch: Batch) -> dict[str, tuple[float, float]]:
        """What the objective measures, and the divergence from the teacher in nats, at the temperature."""
        _, divergence = self.parts(model, batch)
        return {**self.objective.measure(model, batch), "divergence": (float(divergence), batch.weight)}

    def parts(self, model: Reader, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of the data and the summed divergence."""
        if next(self.teacher.parameters()).device != batch.ids.device:
            self.teacher.to(batch.ids.device)
        return self.label_parts(model, batch) if self.of_labels else self.token_parts(model, batch)

    def token_parts(self, model: Reader, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same over the positions that count, some at a time: logits are computed again for the gradient."""
        assert isinstance(model, Transformer) and isinstance(self.teacher, Transformer)
        counted_BT = batch.targets >= 0
        targets_M = batch.targets[counted_BT]
        student_MD = self.hidden(model, batch)[counted_BT]
        with torch.no_grad():
            teacher_MD = self.hidden(self.teacher, batch)[counted_BT]
        total = student_MD.new_zeros(2, dtype=torch.promote_types(student_MD.dtype, torch.float32))
        for at in range(0, len(targets_M), CHUNK):
            part = slice(at, at + CHUNK)
            total = total + checkpoint(
                token_losses, model, self.teacher, student_MD[part], teacher_MD[part], targets_M[part],
                self.temperature, use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        return total[0], total[1]

    def hidden(self, model: Transformer, batch: Batch) -> Tensor:
        """Hidden states of a network, ``[B, T, D]``."""
        if isinstance(self.objective, HasInputs):
            return model.hidden(batch.ids, **self.objective.inputs(model, batch))
        return model.hidden(batch.ids, segments_BT=getattr(batch, "segments", None))

    def label_parts(self, model: Reader, batch: Any) -> tuple[Tensor, Tensor]:
        """The same for labels of texts; each text weighs as much as in the loss of the data."""
        objective = self.objective
        assert isinstance(objective, Classification)
        scores_BL = objective.scores(model, batch)
        with torch.no_grad():
            taught_BL = objective.scores(self.teacher, batch)
        hard = objective.loss_of(scores_BL, batch)
        if objective.independent:  # each label is a choice of two: its score and zero
            student_BL2, teacher_BL2 = (
                torch.stack([scores, torch.zeros_like(scores)], dim=-1) for scores in (scores_BL, taught_BL)
            )
            return hard, divergences(student_BL2, teacher_BL2, self.temperature).mean(1).sum()
        found_B = divergences(scores_BL, taught_BL, self.temperature)
        if objective.label_weights is not None:
            found_B = found_B * objective.label_weights.to(found_B)[batch.targets]
        return hard, found_B.sum()


def divergences(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) over the last dimension, in nats, of scores divided by the temperature."""
    student, teacher = (F.log_softmax(scores / temperature, dim=-1) for scores in (student, teacher))
    return (teacher.exp() * (teacher - student)).sum(-1)


def token_losses(
    student: Transformer,
    teacher: Transformer,
    student_MD: Tensor,
    teacher_MD: Tensor,
    targets_M: Tensor,
    temperature: float,
) -> Tensor:
    """Summed cross-entropy and summed divergence of some positions, ``[2]``."""
    logits_MV = student.logits(student_MD)
    with torch.no_grad():
        taught_MV = teacher.logits(teacher_MD)
    hard = F.cross_entropy(logits_MV, targets_M, reduction="sum")
    return torch.stack([hard, divergences(logits_MV, taught_MV, temperature).sum()])


def check_vocabularies(teacher: Reader, student: Reader) -> None:
    """Refuse networks that do not write with the same tokens.

    Raises:
        ModelError: they do not.
    """
    pair = teacher, student
    if not all(isinstance(model, Transformer) and model.config.lm for model in pair):
        raise ModelError(
            "distillation over tokens is between two transformers with an output over the vocabulary",
            fix="give networks that write or fill in words",
            zh="词元级蒸馏要求师生都是带词表输出的 Transformer",
        )
    sizes = [model.config.vocab_size for model in pair]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"the teacher's vocabulary has {sizes[0]:,} entries, the student's {sizes[1]:,}",
            why="probabilities can be matched only over the same tokens",
            fix="build the student with the teacher's tokenizer",
            zh=f"教师词表有 {sizes[0]} 项，学生词表有 {sizes[1]} 项，必须相同；请用教师的分词器构建学生",
        )


def check_labels(teacher: Reader, student: Reader) -> None:
    """Refuse networks that do not have the same labels in the same order.

    Raises:
        ModelError: they do not.
    """
    labels = [() if model.head is None else model.head.config.labels for model in (teacher, student)]
    if labels[0] != labels[1]:
        raise ModelError(
            f"the teacher has the {len(labels[0])} labels {', '.join(labels[0][:8])}; "
            f"the student the {len(labels[1])} labels {', '.join(labels[1][:8])}",
            why="probabilities can be matched only over the same labels in the same order",
            fix="build the student's head with the teacher's labels",
            zh=f"教师与学生的标签不同（{len(labels[0])} 个与 {len(labels[1])} 个，须一致且顺序相同）",
        )
