"""Before a run: a text as the network will see it, what of it is learned, and whether the model can learn to stop.

The most frequent complaint about fine-tuning is a model that never ends its answers, because the token that ends them
was masked, cut off, or never there. So the tokens that a run will train on are looked at themselves, not the settings
that should have led to them; and a run that could not teach the end of a text is refused.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import IO, Any

import numpy as np
import torch

from hanmo.errors import DataError, ModelError
from hanmo.language import pick
from hanmo.text.tokenizer import Tokenizer
from hanmo.training.estimates import Estimate
from hanmo.training.objectives.base import Batch, Objective
from hanmo.training.objectives.causal import Tokens

LOOKED_AT = 64  # texts of the first step
SHOWN = 600  # characters of one run of learned or read tokens
SHOWN_TEXT = 24  # runs of a text
SCAN = 1 << 20  # tokens of a corpus that are searched at a time
OPEN, CLOSE = "⟦", "⟧"
LEARNED, STOP, READ, RESET = "\x1b[32m", "\x1b[1;7;32m", "\x1b[2m", "\x1b[0m"
UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # what would steer a terminal


@dataclass(frozen=True)
class LearnedText:
    """The tokens of one text, and for each whether the network learns to write it."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of a text that are all read or all learned; a stop token is one by itself."""

    text: str
    tokens: int
    learned: bool
    stop: bool


def texts_of(batch: Batch) -> Iterator[LearnedText]:
    """The texts of a batch in which each position's target is the token after it; packed rows hold several."""
    segments_BT = getattr(batch, "segments", None)
    if segments_BT is None:
        segments_BT = torch.ones_like(batch.ids)
    for ids_T, targets_T, segments_T in zip(
        batch.ids.tolist(), batch.targets.tolist(), segments_BT.tolist(), strict=True
    ):
        start = 0
        for at in range(1, len(ids_T) + 1):
            if at == len(ids_T) or segments_T[at] != segments_T[start]:
                if segments_T[start] > 0:
                    yield successors(ids_T[start:at], targets_T[start:at])
                start = at


def successors(ids: list[int], targets: list[int]) -> LearnedText:
    """Inputs and targets, each the next token or negative, as one text; what pads a row after its end is left out."""
    last = max((place for place, target in enumerate(targets) if target >= 0), default=-1)
    learned = [False, *(target >= 0 for target in targets)]
    if last < 0 or ids[last + 1 : last + 2] == [targets[last]]:  # more follows that is read and not learned
        return LearnedText(tuple(ids), tuple(learned[:-1]))
    return LearnedText((*ids[: last + 1], targets[last]), tuple(learned[: last + 2]))


def first_texts(objective: Objective[Any, Any], count: int = LOOKED_AT) -> list[LearnedText]:
    """The first texts that an objective will train on."""
    return list(islice((text for batch in objective.micro_batches(0) for text in texts_of(batch)), count))


# Whether it can learn to stop -----------------------------------------------------------------------------------------


def check_stop_token(
    texts: Iterable[LearnedText], tokenizer: Tokenizer, stop_ids: Collection[int], where: str = ""
) -> Counter[int]:
    """Refuse texts from which no network could learn to stop; else count how often each stop token is learned.

    Args:
        texts: of :func:`first_texts`.
        stop_ids: the tokens at which generation stops (those of :class:`~hanmo.text.chat_targets.ChatTargets`, or EOS).
        where: what the texts are from.

    Raises:
        ModelError: there is no stop token, or it is there and is not learned.
        DataError: a text has nothing to learn, or no text comes to its end.
    """
    if not stop_ids:
        raise ModelError(
            "nothing says which token ends an answer",
            where=where,
            why="the model would never learn to stop",
            fix="name an eos_token in tokenizer_config.json, or use a chat template that ends answers with one",
            zh="没有说明用哪个符号结束回答，模型将学不会停止；请在 tokenizer_config.json 中指定 eos_token，"
            "或使用会写出结束符号的对话模板",
        )
    learned: Counter[int] = Counter()
    masked = 0
    for text in texts:
        if not any(text.learned):
            raise DataError(
                "a text has no token to learn",
                where=where,
                why="it would cost time and teach nothing",
                fix="leave it out, or give it an answer",
                zh="有一条文本没有任何可学习的词元；请去掉它，或补充回答",
            )
        for place, (id, counts) in enumerate(zip(text.ids, text.learned, strict=True)):
            if id in stop_ids:
                learned[id] += counts
                masked += not counts and place > 0 and text.learned[place - 1]
    if not learned.total():
        raise masked_stop(tokenizer, stop_ids, where) if masked else absent_stop(tokenizer, stop_ids, where)
    return +learned


def names_of(tokenizer: Tokenizer, ids: Collection[int]) -> str:
    """Tokens as text, for people."""
    return ", ".join(tokenizer.decode([id], skip_special=False) for id in sorted(ids))


def masked_stop(tokenizer: Tokenizer, stop_ids: Collection[int], where: str) -> ModelError:
    """The error for stop tokens that are there and not learned."""
    names, same = names_of(tokenizer, stop_ids), tokenizer.pad_id in stop_ids
    return ModelError(
        f"the stop token {names} follows the answers and is not learned",
        where=where,
        why="it is the padding token too, and padding is never learned" if same else "the model would never stop",
        fix="name another pad_token in tokenizer_config.json" if same else "mark it as learned",
        zh=f"回答之后的停止符号 {names} 没有参与训练"
        + (
            "：它同时是填充符号（pad_token）。请在 tokenizer_config.json 中另设 pad_token"
            if same
            else "，请把它计入目标"
        ),
    )


def absent_stop(tokenizer: Tokenizer, stop_ids: Collection[int], where: str) -> DataError:
    """The error for texts without an end."""
    names = names_of(tokenizer, stop_ids)
    return DataError(
        f"no text comes to its stop token {names}",
        where=where,
        why="the model would never learn to stop; perhaps every text is cut off",
        fix="give a larger --context, or texts that end with it",
        zh=f"没有一条文本以停止符号 {names} 结束（可能全部被截断），模型将学不会停止；"
        "请增大 --context，或检查数据的结尾",
    )


def check_separator(tokens: Tokens, separator: int | None, tokenizer: Tokenizer) -> int:
    """Refuse a corpus in which no document is closed, from which a network learns no end; else count the ends.

    Args:
        tokens: of the training split.
        separator: the token that closes documents; None: the corpus is one text, and nothing is checked.

    Raises:
        DataError: the separator is nowhere.
    """
    if separator is None:
        return 0
    parts = (tokens[at : at + SCAN] for at in range(0, len(tokens), SCAN))
    count = sum(int(np.count_nonzero(part == separator)) for part in parts)
    if not count:
        raise absent_stop(tokenizer, [separator], "")
    return count


# What a text looks like -----------------------------------------------------------------------------------------------


def runs_of(text: LearnedText, tokenizer: Tokenizer, stop_ids: Collection[int]) -> list[Run]:
    """A text in runs of tokens that are read, learned, or learned stop tokens."""
    runs: list[Run] = []
    start = 0
    kinds = [(counts, counts and id in stop_ids) for id, counts in zip(text.ids, text.learned, strict=True)]
    for at in range(1, len(kinds) + 1):
        if at == len(kinds) or kinds[at] != kinds[start]:
            ids = text.ids[start:at]
            runs.append(Run(tokenizer.decode(ids, skip_special=False), len(ids), *kinds[start]))
            start = at
    return runs


def printable(text: str) -> str:
    """A text that is safe to print, and not too long."""
    if len(text) > SHOWN:
        left_out = pick(f" [... {len(text) - SHOWN:,} characters ...] ", f" [……省略 {len(text) - SHOWN:,} 字……] ")
        text = text[: SHOWN * 2 // 3] + left_out + text[-SHOWN // 3 :]
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def wants_colour(stream: IO[str]) -> bool:
    """Whether to colour what goes to a stream: a terminal, unless ``NO_COLOR`` is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@dataclass(frozen=True)
class Preview:
    """One text as the network will see it.

    Attributes:
        runs: what it is made of.
        stops: how often each stop token is learned in the texts that were looked at.
        texts: how many those are.
        where: what they are from.
    """

    runs: tuple[Run, ...]
    stops: dict[str, int]
    texts: int
    where: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return sum(run.tokens for run in self.runs)

    @property
    def learned(self) -> int:
        """Tokens of it that are learned."""
        return sum(run.tokens for run in self.runs if run.learned)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json`` and the report."""
        return {
            "where": self.where,
            "tokens": self.tokens,
            "learned": self.learned,
            "runs": [asdict(run) for run in self.runs],
            "stop_tokens": self.stops,
            "texts": self.texts,
        }

    def describe(self, *, colour: bool = False) -> str:
        """The text for people: what is learned in colour, or between brackets."""
        shown = self.runs[:SHOWN_TEXT]
        parts = []
        for run in shown:
            text = printable(run.text)
            if colour:
                style = STOP if run.stop else LEARNED if run.learned else READ
                # Each line for itself: the text is indented, and a terminal forgets colours at its pager's pleasure.
                parts.append("\n".join(f"{style}{line}{RESET}" if line else "" for line in text.split("\n")))
            else:
                parts.append(f"{OPEN}{text}{CLOSE}" if run.learned else text)
        if left := len(self.runs) - len(shown):
            parts.append(pick(f" [... {left} more parts ...]", f" [……另有 {left} 段……]"))
        marked = (
            pick("what is learned is green", "绿色部分参与训练")
            if colour
            else pick(f"what is learned stands in {OPEN} {CLOSE}", f"{OPEN} {CLOSE} 内的部分参与训练")
        )
        head = pick(
            f"a text as the model will see it ({self.learned:,} of {self.tokens:,} tokens are learned; {marked}):",
            f"模型实际看到的一条文本（共 {self.tokens:,} 词元，其中 {self.learned:,} 个参与训练；{marked}）：",
        )
        stops = ", ".join(f"{name} ({count:,}x)" for name, count in self.stops.items())
        tail = pick(
            f"the stop token is learned: {stops} in the first {self.texts:,} texts",
            f"停止符号参与训练：前 {self.texts:,} 条文本中有 {stops}",
        )
        body = "\n".join("  | " + line for line in "".join(parts).split("\n"))
        return "\n".join([head, body, tail] if self.stops else [head, body])


def preview(
    objective: Objective[Any, Any], tokenizer: Tokenizer, stop_ids: Collection[int], *, must_stop: bool = True
) -> Preview:
    """The first text of a run, after a look at the first ones; the most telling is one that is learned to its end.

    For objectives whose targets are next tokens: causal, sequence to sequence, instructions, preferences.

    Args:
        must_stop: refuse texts from which no network learns to stop. False for windows of a corpus, most of which hold
            no end of a document: see :func:`check_separator`.

    Raises:
        ModelError, DataError: as :func:`check_stop_token`.
    """
    texts, where = first_texts(objective), objective.origin(0)
    if must_stop:
        stops = check_stop_token(texts, tokenizer, stop_ids, where)
    else:
        stops = Counter(
            id for text in texts for id, counts in zip(text.ids, text.learned, strict=True) if counts and id in stop_ids
        )
    chosen = max(texts, key=lambda text: telling(text, stop_ids))  # the first of the best
    named = {names_of(tokenizer, [id]): count for id, count in stops.most_common()}
    return Preview(tuple(runs_of(chosen, tokenizer, stop_ids)), named, len(texts), where)


def telling(text: LearnedText, stop_ids: Collection[int]) -> int:
    """How much a text shows: best one that is learned to its end, else one with any end that is learned."""
    if text.learned[-1] and text.ids[-1] in stop_ids:
        return 2
    return int(any(counts and id in stop_ids for id, counts in zip(text.ids, text.learned, strict=True)))


@dataclass(frozen=True)
class Preflight:
    """All that is told before a run; the preview is left out for objectives without next tokens."""

    estimate: Estimate
    preview: Preview | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json`` and the report."""
        return {"preview": None if self.preview is None else self.preview.as_dict(), **self.estimate.as_dict()}

    def describe(self, *, colour: bool = False) -> str:
        """Everything for people, in their language."""
        head = pick("expected, before the start:", "开始之前的估计：")
        parts = [f"{head}\n{self.estimate.describe()}"]
        if self.preview is not None:
            parts.insert(0, self.preview.describe(colour=colour))
        return "\n".join(parts)
