"""Preference tuning: of two answers, make the preferred one likelier than the other.

Three losses over the log probabilities of the two answers y+ and y-:

- "dpo" (Rafailov et al. 2023, equation 7): -log sigmoid(beta ((log p(y+) - log r(y+)) - (log p(y-) - log r(y-)))),
  where r is the reference, the network before the training. With label smoothing s the preference is taken to be wrong
  with probability s (conservative DPO, Mitchell 2023).
- "orpo" (Hong et al. 2024, equations 6 and 7): the loss of y+ per token, and beta times -log sigmoid of the difference
  of the log odds of both, computed from the mean log probability per token. Needs no reference.
- "simpo" (Meng et al. 2024, equation 6): -log sigmoid(beta (mean log p(y+) - mean log p(y-)) - margin). Neither.

The reference is the network with its start weights, so its log probabilities are computed once, before the first step,
and kept as two numbers for each pair: no second network is in memory during the training.

Letters in names: P pairs, B = 2P rows (the preferred answers first), T tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hanmo.data.tasks.types import Preference
from hanmo.errors import DataError, UsageError, nearest
from hanmo.folder import atomic_file
from hanmo.language import pick
from hanmo.models.transformer import Transformer
from hanmo.progress import Progress
from hanmo.text.chat_targets import ChatTargets, TrainedRow, completion_row
from hanmo.text.tokenizer import Tokenizer
from hanmo.training.objectives.base import IGNORED, Batch, ExampleObjective, Pick, padded, padding_segments
from hanmo.training.objectives.instructions import AnswerRow, answer_row, at, no_template
from hanmo.training.objectives.rows import Prepared, too_long

LOSSES = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0}  # and the usual beta of each


@dataclass(frozen=True)
class PreferenceLoss:
    """Which loss, and its constants.

    Args:
        kind: one of ``LOSSES``.
        beta: how strongly the answers are driven apart (ORPO: the weight of that part); None: what is usual.
        smoothing: of "dpo", the share of the preferences that are taken to be wrong.
        margin: of "simpo", by how much the preferred answer is to lead.

    Raises:
        UsageError: a value that no loss can have.
    """

    kind: str = "dpo"
    beta: float | None = None
    smoothing: float = 0.0
    margin: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in LOSSES:
            raise UsageError(
                f"'{self.kind}' is not a loss for preferences", fix=nearest(self.kind, LOSSES),
                zh=f"不认识的偏好损失 '{self.kind}'，可用：{'、'.join(LOSSES)}",
            )  # fmt: skip
        if not 0 < self.strength < math.inf or not 0 <= self.smoothing < 0.5 or not math.isfinite(self.margin):
            raise UsageError(
                f"beta must be above 0 and label smoothing from 0 to below 0.5, "
                f"not {self.strength} and {self.smoothing}",
                fix="leave them out; the usual values are good ones",
                zh=f"beta 应大于 0、标签平滑应在 0 到 0.5 之间（不含 0.5），而不是 {self.strength} 和 {self.smoothing}",
            )

    @property
    def strength(self) -> float:
        """Beta."""
        return LOSSES[self.kind] if self.beta is None else self.beta

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the network before the training."""
        return self.kind == "dpo"

    def __call__(self, chosen: Scores, rejected: Scores) -> tuple[Tensor, Tensor]:
        """The loss of each pair and its margin, by which the preferred answer is ahead, ``[P]`` both."""
        if self.kind == "dpo":
            margin_P = self.strength * (chosen.total - chosen.reference - rejected.total + rejected.reference)
            right, wrong = F.logsigmoid(margin_P), F.logsigmoid(-margin_P)
            return -(1 - self.smoothing) * right - self.smoothing * wrong, margin_P
        if self.kind == "orpo":
            margin_P = log_odds(chosen.mean) - log_odds(rejected.mean)
            return -chosen.mean - self.strength * F.logsigmoid(margin_P), margin_P
        margin_P = self.strength * (chosen.mean - rejected.mean)
        return -F.logsigmoid(margin_P - self.margin), margin_P


@dataclass(frozen=True)
class Scores:
    """Of some answers: log probabilities, tokens, and log probabilities under the reference, ``[P]`` each."""

    total: Tensor
    tokens: Tensor
    reference: Tensor

    @property
    def mean(self) -> Tensor:
        """The log probability per token."""
        return self.total / self.tokens


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p; a probability of one is taken to be slightly less."""
    logprob = logprob.clamp(max=-1e-6)
    return logprob - torch.log(-torch.expm1(logprob))


@dataclass(frozen=True)
class PreferenceRow:
    """The two answers with their prompt, and their log probabilities under the reference, nan where not computed."""

    chosen: AnswerRow
    rejected: AnswerRow
    where: str = ""
    reference: tuple[float, float] = (math.nan, math.nan)


@dataclass
class PreferenceBatch(Batch):
    """Rows ``[2P, T]``, the preferred answers before the others; ``reference`` ``[2P]`` are log probabilities."""

    segments: Tensor | None = None
    reference: Tensor | None = None


def prepare_pairs(
    records: Iterable[Preference], chat: ChatTargets | Tokenizer, *, context: int, truncate: bool = False
) -> Prepared[PreferenceRow]:
    """Rows of preferences; those with a blank answer, or equal ones, are dropped and counted.

    Args:
        chat: of a model with a template; the tokenizer of one without, for prompts of one message.
        context: tokens of a row.
        truncate: cut the end of what is longer, and count it; otherwise it is refused. A pair of which an answer is
            cut off whole, or of which only equal parts are left, is dropped.

    Raises:
        DataError: malformed messages, or a row that is too long and must not be cut; with file and line.
        ModelError: the template cannot be trained on; see :class:`~hanmo.text.chat_targets.ChatTargets`.
    """
    prepared: Prepared[PreferenceRow] = Prepared()
    for record in records:
        if not record.chosen.strip() or not record.rejected.strip():
            prepared.drop(record.where, pick("an answer is blank", "有空白的回答"))
            continue
        sides = [answer_of(record, text, chat) for text in (record.chosen, record.rejected)]
        longest = max(len(row.ids) - 1 for row in sides)
        if longest > context:
            if not truncate:
                raise too_long(longest, context, record.where, "pair of answers", "回答对")
            prepared.truncated += 1
        chosen, rejected = (answer_row(row, context, record.where) for row in sides)
        if not (chosen.learned and rejected.learned):
            prepared.drop(record.where, pick("no token of an answer fits into the context", "上下文容不下回答"))
        elif (
            chosen.inputs.tolist() == rejected.inputs.tolist() and chosen.targets.tolist() == rejected.targets.tolist()
        ):
            prepared.drop(record.where, pick("both answers are the same", "两个回答相同"))
        else:
            prepared.examples.append(PreferenceRow(chosen, rejected, record.where))
    prepared.tell()
    return prepared


def answer_of(record: Preference, text: str, chat: ChatTargets | Tokenizer) -> TrainedRow:
    """The row of one answer."""
    try:
        if isinstance(chat, ChatTargets):
            return chat.rows([*record.prompt, {"role": "assistant", "content": text}], last_only=True)[0]
        if len(record.prompt) != 1:
            raise no_template()
        return completion_row(chat, record.prompt[0]["content"], text)
    except DataError as error:
        raise at(record.where, error) from None


class PreferenceTuning(ExampleObjective[Transformer, PreferenceBatch, PreferenceRow]):
    """Of each pair, make the preferred answer likelier; both sides go through the network together.

    Args:
        train, validation: from :func:`prepare_pairs`; for "dpo" after :func:`with_reference`.
        kind: the loss.
        micro_batch: pairs at a time.

    Raises:
        DataError: the loss needs a reference, and a pair has none.
    """

    unit = "pair"

    def __init__(
        self,
        train: Sequence[PreferenceRow],
        validation: Sequence[PreferenceRow],
        kind: PreferenceLoss | None = None,
        *,
        batch_size: int,
        micro_batch: int,
        seed: int,
    ) -> None:
        super().__init__(train, validation, batch_size=batch_size, micro_batch=micro_batch, seed=seed)
        self.kind = kind or PreferenceLoss()
        lacking = (row for split in (train, validation) for row in split if not all(map(math.isfinite, row.reference)))
        if self.kind.needs_reference and (row := next(lacking, None)):
            raise DataError(
                f"'{self.kind.kind}' compares with the network before the training, and a pair has no such numbers",
                where=row.where,
                fix="compute them first: with_reference(model, rows)",
                zh=f"损失 '{self.kind.kind}' 需要训练前模型的对数概率；请先用 with_reference 计算",
            )

    def collate(self, picks: list[Pick[PreferenceRow]]) -> PreferenceBatch:
        return collate_pairs([pick.example for pick in picks])

    def length(self, example: PreferenceRow) -> int:
        return len(example.chosen.inputs) + len(example.rejected.inputs)

    def losses(self, model: Transformer, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """The loss and the margin of each pair, ``[P]``."""
        assert batch.reference is not None
        total_B = answer_logprobs(model, batch)
        parts = total_B, (batch.targets >= 0).sum(1), batch.reference.to(total_B)
        first, second = ([part.chunk(2)[side] for part in parts] for side in (0, 1))
        return self.kind(Scores(*first), Scores(*second))

    def loss(self, model: Transformer, batch: PreferenceBatch) -> Tensor:
        return self.losses(model, batch)[0].sum()

    def measure(self, model: Transformer, batch: PreferenceBatch) -> dict[str, tuple[float, float]]:
        """The loss; the share of pairs whose preferred answer is ahead (accuracy); by how much it is (margin)."""
        losses_P, margins_P = self.losses(model, batch)
        measures = {"loss": losses_P, "accuracy": (margins_P > 0).float(), "margin": margins_P}
        return {name: (float(values.sum()), batch.weight) for name, values in measures.items()}


def collate_pairs(pairs: Sequence[PreferenceRow]) -> PreferenceBatch:
    """Pairs to one padded batch."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    ids_BT = padded([row.inputs for row in rows], 0)  # type: ignore[misc]
    targets_BT = padded([row.targets for row in rows], IGNORED)  # type: ignore[misc]
    segments_BT = padding_segments([row.inputs for row in rows], ids_BT.size(1))  # type: ignore[misc]
    reference_B = torch.tensor([pair.reference[side] for side in (0, 1) for pair in pairs], dtype=torch.float64)
    return PreferenceBatch(ids_BT, targets_BT, float(len(pairs)), segments_BT, reference_B)


def answer_logprobs(model: Transformer, batch: PreferenceBatch) -> Tensor:
    """Log probability of the answer of each row, ``[B]``."""
    return model.target_logprobs(batch.ids, batch.targets, segments_BT=batch.segments).sum(1)


@torch.no_grad()
def with_reference(
    model: Transformer, rows: Sequence[PreferenceRow], *, micro_batch: int, cache: Path | None = None
) -> list[PreferenceRow]:
    """The same pairs with their log probabilities under a network, which is the reference from now on.

    Args:
        model: with its start weights; adapters that are on belong to it.
        micro_batch: pairs at a time.
        cache: a file in the run's folder that keeps the numbers. It is used again only for the same pairs and weights.
    """
    identity = fingerprint(model, rows)
    numbers = None if cache is None else read_reference(cache, identity)
    if numbers is None:
        numbers = compute_reference(model, rows, micro_batch)
        if cache is not None:
            with atomic_file(cache) as temporary:
                save_file({"reference": numbers}, temporary, metadata={"fingerprint": identity})
    return [replace(row, reference=(pair[0], pair[1])) for row, pair in zip(rows, numbers.tolist(), strict=True)]


def compute_reference(model: Transformer, rows: Sequence[PreferenceRow], micro_batch: int) -> Tensor:
    """Log probabilities of both answers, float64 ``[len(rows), 2]``; pairs of like lengths are computed together."""
    device = next(model.parameters()).device
    numbers = torch.empty(len(rows), 2, dtype=torch.float64)
    order = sorted(
        range(len(rows)), key=lambda index: max(len(rows[index].chosen.inputs), len(rows[index].rejected.inputs))
    )
    was_training = model.training
    model.eval()
    with Progress(pick("reference", "参考模型"), total=len(rows), unit=pick("pairs", "对")) as progress:
        for at in range(0, len(order), micro_batch):
            chosen = order[at : at + micro_batch]
            batch = collate_pairs([rows[index] for index in chosen])
            batch.to(device)
            numbers[chosen] = answer_logprobs(model, batch).double().cpu().view(2, -1).T
            progress.update(at + len(chosen))
    model.train(was_training)
    return numbers


def fingerprint(model: Transformer, rows: Sequence[PreferenceRow]) -> str:
    """A hash of all weights and of all tokens."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for row in rows:
        for side in (row.chosen, row.rejected):
            digest.update(len(side.inputs).to_bytes(8, "little") + side.inputs.tobytes() + side.targets.tobytes())
    return digest.hexdigest()


def read_reference(cache: Path, identity: str) -> Tensor | None:
    """What a cache holds; None where there is none, or it belongs to other pairs or weights."""
    if not cache.is_file():
        return None
    try:
        with safe_open(cache, framework="pt") as file:
            return file.get_tensor("reference") if file.metadata()["fingerprint"] == identity else None
    except (SafetensorError, OSError, KeyError, TypeError):  # damaged: it can be computed again
        return None
