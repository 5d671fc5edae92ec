"""Masked language modelling: hide words of a text and have the network find them (Devlin et al. 2019).

Whole words are hidden, not parts of them: all tokens of an English word, all characters of a Chinese one (Cui et al.
2021). Which token begins a word is found once, from the text, when a corpus is prepared (:mod:`words`).

Letters in names: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import DataError, ModelError
from hanmo.models.transformer import Transformer
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.wrapping import Wrapping, wrapping_of
from hanmo.training.objectives.base import IGNORED, WHOLE, Objective, Order, Share, padded
from hanmo.training.objectives.causal import PackedBatch, Tokens
from hanmo.training.objectives.rows import Ids, Prepared, RowMaker, as_ids
from hanmo.training.objectives.words import word_beginnings

if TYPE_CHECKING:
    from hanmo.data.tasks.types import Text

HIDDEN, REPLACED = 0.8, 0.1  # of the chosen tokens: become the mask, become another token; the rest stay
VALIDATION = 1 << 40  # where noise of validation rows begins to count, beyond every training step

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """Tokens with their control tokens, the text that each belongs to (from 1), and whether each begins a word."""

    ids: Ids
    segments: Ids
    begins: Bools
    where: str = ""


class Rows(Protocol):
    """Where rows come from; an epoch may cut them in its own way."""

    def __len__(self) -> int:
        """Rows of one epoch."""

    def row(self, epoch: int, index: int) -> Row:
        """One of them."""

    def origin(self, epoch: int, index: int) -> str:
        """Where it is from."""


@dataclass(frozen=True)
class Masking:
    """Chooses the tokens to be found, and what stands in their places.

    Args:
        mask_id: the id of the mask.
        control: ids that are never chosen, and never stand for another token.
        vocab_size: ids of the tokenizer.
        share: of the tokens are chosen.
        whole_words: words are chosen as a whole; False: each token by itself.
    """

    mask_id: int
    control: frozenset[int]
    vocab_size: int
    share: float = 0.15
    whole_words: bool = True

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, share: float = 0.15, whole_words: bool = True) -> Masking:
        """The masking for a tokenizer.

        Raises:
            ModelError: it has no mask token.
        """
        if tokenizer.mask_id is None:
            raise ModelError(
                "the tokenizer has no mask token",
                where="tokenizer.json",
                why="a hidden word must look like no other token",
                fix="add one with hanmo.training.objectives.words.with_mask(tokenizer), "
                "or name it as mask_token in tokenizer_config.json",
                zh="分词器没有掩码符号；请用 hanmo.training.objectives.words.with_mask(tokenizer) 添加，"
                "或在 tokenizer_config.json 中以 mask_token 指明",
            )
        control = frozenset(tokenizer.special_tokens.values())
        return cls(tokenizer.mask_id, control, tokenizer.vocab_size, share, whole_words)

    def __call__(self, row: Row, key: Sequence[int]) -> tuple[Ids, Ids]:
        """The row's ids with some of them hidden, and the target of each (IGNORED where nothing is to be found).

        Words are taken in random order until the share is reached; of the one that crosses it a coin decides, so that
        the share is met on average whatever the length of words. At least one word is hidden.

        Args:
            key: decides the choice; equal keys, equal choices.
        """
        generator = np.random.default_rng(list(key))
        free = ~self.is_control[row.ids]
        targets = np.full(len(row.ids), IGNORED, dtype=np.int32)
        if not free.any():
            return row.ids, targets
        begins = (row.begins | ~np.roll(free, 1) | (np.roll(row.segments, 1) != row.segments))[free]
        begins[0] = True
        words = np.cumsum(begins if self.whole_words else np.ones_like(begins)) - 1
        sizes = np.bincount(words)
        order = generator.permutation(len(sizes))
        used, budget = np.cumsum(sizes[order]), self.share * len(words)
        count = int(np.searchsorted(used, budget, side="right"))
        if count < len(order):
            rest = budget - (used[count - 1] if count else 0)
            count += bool(generator.random() * sizes[order[count]] < rest)
        chosen_words = np.zeros(len(sizes), dtype=bool)
        chosen_words[order[: max(1, count)]] = True
        chosen = np.flatnonzero(free)[chosen_words[words]]
        targets[chosen] = row.ids[chosen]
        ids, dice = row.ids.copy(), generator.random(len(chosen))
        ids[chosen[dice < HIDDEN]] = self.mask_id
        replaced = chosen[(dice >= HIDDEN) & (dice < HIDDEN + REPLACED)]
        ids[replaced] = generator.choice(self.ordinary, len(replaced))
        return ids, targets

    @cached_property
    def is_control(self) -> Bools:
        """For each id, whether it is a control token."""
        return np.isin(np.arange(self.vocab_size), list(self.control))

    @cached_property
    def ordinary(self) -> Ids:
        """All ids that are none."""
        return np.flatnonzero(~self.is_control).astype(np.int32)


class Windows:
    """Rows of a corpus whose documents lie end to end: windows that begin at a new random offset in each epoch.

    Each document of a window gets the control tokens of inference in the place of its separator.

    A document sees only itself and counts its positions from its own beginning, so a row may hold more tokens than
    the context, while none of its documents does.

    Args:
        tokens: token ids, each document closed by its separator.
        begins: for each of them, whether it begins a word; see :func:`~hanmo.training.objectives.words.mark_words`.
        context: tokens that a network sees.
        wrapping: the control tokens round a text.
        separator: the token that closes a document; None: the corpus is one text.
        seed: decides the offset of each epoch.
        shifted: False: windows always begin at the first token and cover all, as validation needs it.

    Raises:
        DataError: there are not as many marks as tokens.
    """

    def __init__(
        self,
        tokens: Tokens,
        begins: Tokens,
        *,
        context: int,
        wrapping: Wrapping,
        separator: int | None,
        seed: int,
        shifted: bool = True,
    ) -> None:
        if len(tokens) != len(begins):
            raise DataError(
                f"there are {len(tokens)} tokens and {len(begins)} marks of words",
                why="the marks belong to another corpus or tokenizer",
                fix="mark the words of this corpus anew",
                zh=f"词元 {len(tokens)} 个、词首标记 {len(begins)} 个，两者不符；请重新标记该语料",
            )
        self.tokens, self.begins, self.wrapping, self.separator = tokens, begins, wrapping, separator
        self.size, self.seed, self.shifted = context - wrapping.overhead(), seed, shifted
        # one window fewer than fit, so that every offset leaves room
        self.count = -(-len(tokens) // self.size) if not shifted else max(len(tokens) > 0, len(tokens) // self.size - 1)

    def __len__(self) -> int:
        return self.count

    def start(self, epoch: int, index: int) -> int:
        """The token at which a window begins."""
        room = max(0, len(self.tokens) - self.count * self.size)
        offset = np.random.default_rng([self.seed, epoch]).integers(0, room + 1) if self.shifted else 0
        return int(offset) + index * self.size

    def row(self, epoch: int, index: int) -> Row:
        start = self.start(epoch, index)
        ids = self.tokens[start : start + self.size].astype(np.int32)
        begins = self.begins[start : start + self.size].astype(bool)
        closed = np.flatnonzero(ids == self.separator) if self.separator is not None else np.empty(0, dtype=np.int64)
        starts, ends = [0, *(closed + 1).tolist()], [*closed.tolist(), len(ids)]
        spans = [span for span in zip(starts, ends, strict=True) if span[0] < span[1]]
        return joined([ids[a:b] for a, b in spans], [begins[a:b] for a, b in spans], self.wrapping)

    def origin(self, epoch: int, index: int) -> str:
        return f"window of {self.size} tokens at {self.start(epoch, index):,}"


def joined(texts: Sequence[Ids], begins: Sequence[Bools], wrapping: Wrapping, where: str = "") -> Row:
    """Texts in one row, each with its control tokens and with a number of its own."""
    before, after = as_ids(wrapping.prefix), as_ids(wrapping.suffix)
    marks = [np.ones(len(before), dtype=bool), np.ones(len(after), dtype=bool)]
    rows = [np.concatenate([before, ids, after]) for ids in texts] or [np.concatenate([before, after])]
    flags = [np.concatenate([marks[0], flag, marks[1]]) for flag in begins] or [np.concatenate(marks)]
    segments = [np.full(len(ids), number, dtype=np.int32) for number, ids in enumerate(rows, start=1)]
    return Row(np.concatenate(rows), np.concatenate(segments), np.concatenate(flags), where)


@dataclass
class Sentences:
    """Rows of separate texts, the same in every epoch."""

    examples: Sequence[Row]

    @staticmethod
    def prepare(records: Iterable[Text], rows: RowMaker) -> Prepared[Row]:
        """Rows of some texts; one without a visible character is dropped and counted.

        Raises:
            DataError: a text is too long and must not be cut, or has a lone surrogate; with file and line.
        """
        prepared: Prepared[Row] = Prepared()
        for record in records:
            if not record.text.strip():
                prepared.drop(record.where, "blank")
                continue
            try:
                ids, begins = word_beginnings(rows.tokenizer, record.text)
            except DataError as error:
                error.where = record.where
                raise
            room = rows.context - rows.wrapping.overhead()
            if len(ids) > room:
                rows.cut(len(ids) + rows.wrapping.overhead(), record.where, prepared)
            prepared.examples.append(joined([as_ids(ids[:room])], [begins[:room]], rows.wrapping, record.where))
        prepared.tell()
        return prepared

    def __len__(self) -> int:
        return len(self.examples)

    def row(self, epoch: int, index: int) -> Row:  # noqa: ARG002 - every epoch has the same rows
        return self.examples[index]

    def origin(self, epoch: int, index: int) -> str:  # noqa: ARG002
        return self.examples[index].where or f"text {index}"


class MaskedLanguageModeling(Objective[Transformer, PackedBatch]):
    """Find the hidden words of texts. The weight of a batch is the number of tokens that are to be found.

    Every epoch visits all rows in a new random order and hides other words in them; what is hidden in the validation
    data is always the same.

    Args:
        train, validation: rows, :class:`Windows` or :class:`Sentences`.
        masking: what is hidden.
        batch_size: rows per optimizer step; at most all of them.
        micro_batch: rows per forward pass; changes memory, not the gradient.
        seed: decides the order and what is hidden.

    Raises:
        DataError: there are no rows.
    """

    def __init__(
        self, train: Rows, validation: Rows, masking: Masking, *, batch_size: int, micro_batch: int, seed: int
    ) -> None:
        for name, zh, rows in (("training", "训练", train), ("validation", "验证", validation)):
            if not len(rows):
                raise DataError(f"there is no {name} text", fix="add texts", zh=f"没有{zh}文本，请补充数据")
        self.train, self.validation, self.masking, self.seed = train, validation, masking, seed
        self.batch_size, self.micro_batch = min(batch_size, len(train)), micro_batch
        self.order = Order(len(train), self.batch_size, seed)
        self.kept: tuple[int, list[tuple[Ids, Ids, Ids]]] = (-1, [])

    @classmethod
    def over_corpus(
        cls,
        train: tuple[Tokens, Tokens],
        validation: tuple[Tokens, Tokens],
        tokenizer: Tokenizer,
        *,
        context: int,
        separator: int | None,
        batch_size: int,
        micro_batch: int,
        seed: int,
    ) -> MaskedLanguageModeling:
        """Over two corpora, each given as its tokens and their marks of words.

        Raises:
            DataError: a split is empty.
            ModelError: the tokenizer has no mask token.
        """
        masking, wrapping = Masking.of(tokenizer), wrapping_of(tokenizer)
        rows = [
            Windows(*split, context=context, wrapping=wrapping, separator=separator, seed=seed, shifted=shifted)
            for split, shifted in ((train, True), (validation, False))
        ]
        return cls(rows[0], rows[1], masking, batch_size=batch_size, micro_batch=micro_batch, seed=seed)

    def places(self, step: int) -> list[tuple[int, int]]:
        """Epoch and index of each row of a step."""
        epochs = (sample // len(self.train) for sample in range(step * self.batch_size, (step + 1) * self.batch_size))
        return list(zip(epochs, self.order.step(step), strict=True))

    def rows(self, step: int) -> list[tuple[Ids, Ids, Ids]]:
        """Hidden ids, targets and segments of the rows of a step, short ones first; the latest step's are kept."""
        if self.kept[0] != step:
            rows = [self.train.row(epoch, index) for epoch, index in self.places(step)]
            hidden = [(*self.masking(row, (self.seed, step, place)), row.segments) for place, row in enumerate(rows)]
            self.kept = step, sorted(hidden, key=lambda parts: len(parts[0]))
        return self.kept[1]

    def micro_batches(self, step: int, share: Share = WHOLE) -> Iterator[PackedBatch]:
        rows = self.rows(step)
        starts = range(0, len(rows), self.micro_batch)
        for number in share.of(len(starts)):
            yield collate_masked(rows[starts[number] : starts[number] + self.micro_batch])

    def step_weight(self, step: int) -> float:
        return float(sum(int((targets >= 0).sum()) for _, targets, _ in self.rows(step)))

    def tokens_in(self, step: int) -> int:
        return sum(len(ids) for ids, _, _ in self.rows(step))

    def inputs(self, model: Transformer, batch: PackedBatch) -> dict[str, Any]:
        """What the network needs beside the ids.

        Raises:
            ModelError: it reads from left to right, and cannot see what follows a hidden word.
        """
        if model.config.causal:
            raise ModelError(
                "this network reads from left to right",
                why="a hidden word is found from what stands on both sides of it",
                fix="train an encoder, such as BERT or ModernBERT; or train this network on next tokens",
                zh="该网络只从左向右读，不能做掩码语言建模；请训练编码器（如 BERT），或改用下一词元预测",
            )
        return {"segments_BT": batch.segments}

    def loss(self, model: Transformer, batch: PackedBatch) -> Tensor:
        return model.loss(batch.ids, batch.targets, **self.inputs(model, batch))

    def validation_batches(self, limit: int | None = None, share: Share = WHOLE) -> Iterator[PackedBatch]:
        """Rows of the validation data, or about ``limit`` tokens of them, spread evenly over it."""
        count = whole = len(self.validation)
        if limit is not None:
            probes = {round(place) for place in np.linspace(0, whole - 1, 16)}
            tokens = sum(len(self.validation.row(0, index).ids) for index in probes) / len(probes)
            count = max(1, min(whole, int(limit / tokens)))
        chosen = sorted({round(place) for place in np.linspace(0, whole - 1, count)})
        for number in share.of(-(-len(chosen) // self.micro_batch)):
            indices = chosen[number * self.micro_batch : (number + 1) * self.micro_batch]
            rows = [(index, self.validation.row(0, index)) for index in indices]
            yield collate_masked(
                [(*self.masking(row, (self.seed, VALIDATION, index)), row.segments) for index, row in rows]
            )

    def origin(self, step: int) -> str:
        names = [self.train.origin(epoch, index) for epoch, index in self.places(step)]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def collate_masked(rows: Sequence[tuple[Ids, Ids, Ids]]) -> PackedBatch:
    """Rows of hidden ids, targets and segments as one batch; segments None where each row is one text, unpadded."""
    ids_BT, targets_BT, segments_BT = (
        padded([row[part] for row in rows], fill)  # type: ignore[misc]
        for part, fill in ((0, 0), (1, IGNORED), (2, 0))
    )
    weight = float((targets_BT >= 0).sum())
    return PackedBatch(ids_BT, targets_BT, weight, None if bool((segments_BT == 1).all()) else segments_BT)
