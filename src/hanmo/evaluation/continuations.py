"""What continuations of contexts are worth: the question that multiple-choice benchmarks ask, put in batches.

The choices of one context share it, and contexts that begin alike (the same examples before each question) share their
beginning: what is shared is read once. Long contexts lose tokens on their left.

Letters in names: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hanmo.errors import DataError
from hanmo.inference.language_model import LanguageModel
from hanmo.inference.networks import LOGIT_VALUES, Network, Piece

SHARED = 16  # tokens; a shorter common beginning is read again
FAMILY = 64  # first tokens by which contexts that begin alike come one after the other
TOGETHER = 32  # continuations of one context that are read before others


@dataclass(frozen=True)
class Score:
    """The worth of a continuation.

    Attributes:
        place: the pair it belongs to.
        logprob: nats, summed over its tokens.
        greedy: whether each of its tokens is the most probable one at its place.
    """

    place: int
    logprob: float
    greedy: bool


@dataclass
class Branch:
    """A continuation while it is read; ``seen`` counts its tokens whose probability is known."""

    place: int
    ids: list[int]
    seen: int = 0
    logprob: float = 0.0
    greedy: bool = True

    @property
    def unread(self) -> list[int]:
        """The tokens that have yet to be read; the last is only predicted."""
        return self.ids[self.seen - 1 : -1]

    def take(self, logits_TV: Tensor) -> None:
        """The logits of its next tokens, which need not be many."""
        targets_T = torch.tensor(self.ids[self.seen : self.seen + len(logits_TV)], device=logits_TV.device)
        logits_TV = logits_TV[: len(targets_T)].float()
        logprobs_T = logits_TV.log_softmax(dim=1).gather(1, targets_T.unsqueeze(1))
        self.logprob += float(logprobs_T.double().sum())
        self.greedy = self.greedy and bool((logits_TV.argmax(dim=1) == targets_T).all())
        self.seen += len(targets_T)

    def score(self) -> Score:
        """The result, when everything has been seen."""
        return Score(self.place, self.logprob, self.greedy)


@dataclass
class Group:
    """A context and its continuations."""

    context: tuple[int, ...]
    branches: list[Branch] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the context with the longest continuation."""
        return len(self.context) + max(len(branch.ids) for branch in self.branches)


class Shelf:
    """The beginning that the last contexts had in common, still in the cache."""

    def __init__(self) -> None:
        self.ids: tuple[int, ...] = ()
        self.text: Any = None

    def clear(self) -> None:
        """Give it back."""
        if self.text is not None:
            self.text.release()
        self.ids, self.text = (), None


def score_continuations(
    model: LanguageModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: int | None = None,
    batch: int = 8,
) -> Iterator[Score]:
    """Log-probabilities of continuations, given their contexts; the longest first.

    Args:
        model: any but an encoder-decoder.
        pairs: the ids of a context (at least one) and of its continuation. An empty continuation is worth 0.
        max_length: tokens that the model reads at most; default: its context. Of context and continuation the last
            ``max_length + 1`` count, since the very last token is predicted and not read.
        batch: contexts that are read at the same time.

    Raises:
        UsageError: an id outside the vocabulary.
        DataError: an empty context, or a continuation longer than ``max_length``.
        ModelError: the network computes NaN.
    """
    longest = max_length or model.context_length
    groups = grouped(pairs, longest)
    yield from (Score(place, 0.0, True) for place, (_, continuation) in enumerate(pairs) if not len(continuation))
    for group in groups:
        model._check_ids([*group.context, *(id for branch in group.branches for id in branch.ids)])
    shelf = Shelf()
    try:
        for part in portions(model.network, ordered(groups), batch):
            for branch in read(model, part, shelf, batch):
                if math.isnan(branch.logprob):
                    raise model.engine.not_finite()
                yield branch.score()
    finally:
        shelf.clear()


def grouped(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int) -> list[Group]:
    """The continuations by what is left of their contexts.

    >>> [(group.context, [branch.ids for branch in group.branches]) for group in
    ...  grouped([([1, 2], [3]), ([1, 2], [4, 5]), ([1, 2, 3, 4], [5, 6])], longest=3)]
    [((1, 2), [[4, 5], [3]]), ((3, 4), [[5, 6]])]
    """
    groups: dict[tuple[int, ...], Group] = {}
    for place, (context, continuation) in enumerate(pairs):
        if not len(continuation):
            continue
        if not len(context) or len(continuation) > longest:
            raise DataError(
                f"continuation {place} has {len(continuation)} tokens after a context of {len(context)}",
                why=f"a context has at least one token, and a continuation at most {longest}, which are read at once",
                fix="score long texts in windows (loglikelihood_rolling, hanmo evaluate)",
                zh=f"第 {place} 个续文有 {len(continuation)} 个词元，上文有 {len(context)} 个：上文至少要有一个词元，"
                f"续文最多 {longest} 个。长文本请分段评分",
            )
        head = tuple(context)[-(longest + 1 - len(continuation)) :]
        groups.setdefault(head, Group(head)).branches.append(Branch(place, list(continuation)))
    for group in groups.values():
        group.branches.sort(key=lambda branch: -len(branch.ids))
    return [
        Group(group.context, group.branches[start : start + TOGETHER])
        for group in groups.values()
        for start in range(0, len(group.branches), TOGETHER)
    ]


def ordered(groups: Sequence[Group]) -> list[Group]:
    """Those that begin alike after each other; the family with the longest first, and in it the longest."""
    families: dict[tuple[int, ...], list[Group]] = {}
    for group in sorted(groups, key=lambda group: -group.length):
        families.setdefault(group.context[:FAMILY], []).append(group)
    return [group for family in families.values() for group in family]


def portions(network: Network, groups: Sequence[Group], batch: int) -> Iterator[list[Group]]:
    """Groups that are read at the same time: at most ``batch``, as many as there is memory for, and all that begin
    alike before others."""
    sizes = Counter(group.context[:FAMILY] for group in groups)
    part: list[Group] = []
    lengths: list[int] = []
    for group in groups:
        family = group.context[:FAMILY]
        parted = bool(part) and part[0].context[:FAMILY] != family
        parted = parted and max(sizes[family], sizes[part[0].context[:FAMILY]]) > 1
        more = [group.length] * (1 + min(batch, len(group.branches)))
        if part and (parted or len(part) == batch or not network.fits([group.length, *lengths, *more])):
            yield part
            part, lengths = [], []
        part.append(group)
        lengths += more
    if part:
        yield part


@torch.inference_mode()
def read(model: LanguageModel, groups: Sequence[Group], shelf: Shelf, batch: int) -> list[Branch]:
    """Read contexts and then their continuations."""
    network = model.network
    with model.engine.alone(), ExitStack() as opened:
        for kept in [*model.engine.kept]:  # texts that were written before make way
            model.engine.forget(kept)
        texts = begin(model, groups, shelf, opened)
        last = read_contexts(network, [(text, unread) for text, unread in texts])
        going: list[tuple[Any, Branch]] = []
        for (text, _), logits_1V, group in zip(texts, last, groups, strict=True):
            for branch in group.branches:
                branch.take(logits_1V)
            longer = [branch for branch in group.branches if len(branch.ids) > 1]
            going += [(text, branch) for branch in longer]
        for start in range(0, len(going), batch):
            with ExitStack() as forks:
                branches = [
                    (forked(text, forks) if shared(text, going) else text, branch)
                    for text, branch in going[start : start + batch]
                ]
                read_continuations(network, branches)
    return [branch for group in groups for branch in group.branches]


def shared(text: Any, going: Sequence[tuple[Any, Branch]]) -> bool:
    """Whether several continuations follow a text."""
    return sum(other is text for other, _ in going) > 1


def forked(text: Any, stack: ExitStack) -> Any:
    """A second text that begins with what this one has read."""
    fork = text.fork()
    stack.callback(fork.release)
    return fork


def begin(
    model: LanguageModel, groups: Sequence[Group], shelf: Shelf, opened: ExitStack
) -> list[tuple[Any, Sequence[int]]]:
    """A text for each context, and what it has yet to read: all, or what follows the common beginning."""
    network, longest = model.network, max(group.length for group in groups)
    contexts = [group.context for group in groups]
    beginning = min(common(contexts[0], context) for context in contexts)
    beginning = min(beginning, min(map(len, contexts)) - 1)  # what follows the last token is wanted of each
    if beginning < SHARED or not network.trims or (len(groups) == 1 and common(shelf.ids, contexts[0]) < SHARED):
        shelf.clear()
        found: list[tuple[Any, Sequence[int]]] = []
        for group in groups:
            text, unread = network.open(group.context, group.length - len(group.context), model.adapter)
            opened.callback(text.release)
            found.append((text, unread))
        return found
    wanted = contexts[0][:beginning]
    known = common(shelf.ids, wanted)
    if known < SHARED:
        shelf.clear()
        shelf.text, _ = network.open(wanted, longest - beginning, model.adapter)
        known = 0
    else:
        shelf.text.trim(known)
    shelf.ids = wanted
    if known < beginning:
        read_contexts(network, [(shelf.text, wanted[known:])])
    return [(forked(shelf.text, opened), context[beginning:]) for context in contexts]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with that are the same.

    >>> common([1, 2, 3], [1, 2, 4, 5])
    2
    """
    length = min(len(a), len(b))
    return next((place for place in range(length) if a[place] != b[place]), length)


def read_contexts(network: Network, texts: Sequence[tuple[Any, Sequence[int]]]) -> list[Tensor]:
    """Read the rest of some texts together; what follows the last token of each, ``[1, V]``."""
    last: dict[int, Tensor] = {}
    at = 0
    while len(last) < len(texts):
        numbers = [number for number in range(len(texts)) if number not in last]
        pieces = []
        for number in numbers:
            text, ids = texts[number]
            part = ids[at : at + network.piece]
            pieces.append(Piece(text, part, int(at + len(part) == len(ids))))
        parts = torch.split(network.read(pieces), [piece.wanted for piece in pieces])
        last |= {number: part for number, part in zip(numbers, parts, strict=True) if len(part)}
        at += network.piece
    return [last[number] for number in range(len(texts))]


def read_continuations(network: Network, branches: Sequence[tuple[Any, Branch]]) -> None:
    """Read continuations to their ends, as many tokens at once as there is memory for logits."""
    most = max(1, LOGIT_VALUES // network.vocab_size)
    going = list(branches)
    while going:
        pieces: list[Piece] = []
        for text, branch in going:
            room = min(network.piece, most - sum(piece.wanted for piece in pieces))
            if room < 1:
                break
            part = branch.unread[:room]
            pieces.append(Piece(text, part, len(part)))
        parts = torch.split(network.read(pieces), [piece.wanted for piece in pieces])
        for (_, branch), part_TV in zip(going, parts, strict=False):
            branch.take(part_TV)
        going = [(text, branch) for text, branch in going if branch.unread]
