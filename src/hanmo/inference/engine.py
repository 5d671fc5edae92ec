"""The engine: requests in, tokens out.

A step of the engine reads some tokens of every request that is running: the next token of those that write, and pieces
of the prompts of those that do not yet. A request joins as soon as there is room and leaves when it has finished, so
requests of any length and age share the work (continuous batching; Yu et al. 2022). What texts that have finished left
in the cache serves later prompts that begin alike. Guesses of the next tokens (speculation) are read together with the
token they follow, and those that turn out right need no step of their own.

There is no thread of the engine's own: whoever waits for a token makes the next step for all (:meth:`Engine.chunks`).

Letters in names: B rows, L tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import ModelError, UsageError
from hanmo.inference.networks import Network, Piece, Text
from hanmo.inference.sampling import Sampling, draw, process
from hanmo.inference.speculation import Guesser, PromptLookup
from hanmo.inference.stream import IncrementalDecoder

MAX_ROWS = 32  # texts that are written at the same time
MAX_GUESSING = 4  # texts; where more are written at once, guesses cost as much as they save
BUSY_PIECE = 128  # tokens of prompts read in one step while others wait for their next token
KEPT = 64  # finished texts that stay in the cache for prompts that begin alike
SHARED = 16  # tokens; a shorter common beginning is read again

FinishReason = Literal["stop", "length"]


@dataclass
class TokenLogprobs:
    """What the network thought of a token that was written, before temperature and the other processors.

    Attributes:
        logprob: log-probability of the token, nats.
        top: ids and log-probabilities of the most probable tokens, as many as were asked for.
    """

    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Chunk:
    """One step of a stream: the next token of one choice and the text that became certain with it (often none).

    The texts of a choice add up to the text that is given at once; so do the ids. Only the last chunk of a choice has a
    ``finish_reason``.

    Attributes:
        reused_tokens: of the prompt, tokens that were still in the cache and not read again.
        logprobs: one entry per id, where they were asked for.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason | None
    prompt_tokens: int
    index: int = 0
    choice: int = 0
    stop_string: str | None = None
    reused_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None


@dataclass
class Vocabulary:
    """What the engine must know of tokens.

    Attributes:
        size: ids from here on are never written.
        piece: the bytes of a token.
        ends: tokens that end a text.
        forbidden: tokens that are never written.
    """

    size: int
    piece: Callable[[int], bytes]
    ends: frozenset[int]
    forbidden: list[int]


class Request:
    """A prompt that is to be continued, and the chunks that nobody has taken yet."""

    def __init__(self, ids: Sequence[int], sampling: Sampling, index: int, room: int) -> None:
        self.ids, self.sampling, self.index, self.room = list(ids), sampling, index, room
        self.chunks: deque[Chunk] = deque()
        self.going = sampling.n  # choices that have not finished
        self.cancelled = False
        self.error: BaseException | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.going == 0 or self.cancelled or self.error is not None

    @property
    def columns(self) -> int:
        """Tokens that prompt and answer have at most."""
        return len(self.ids) + self.room


@dataclass(eq=False)
class Row:
    """One choice of a request.

    Attributes:
        ids: prompt and answer; the network has read the first ``text.length`` of them.
        first: tokens before the first that was written.
        reused: of the prompt, tokens that were in the cache.
    """

    request: Request
    choice: int
    text: Text
    ids: list[int]
    first: int
    reused: int
    decoder: IncrementalDecoder
    generator: torch.Generator | None
    guesser: Guesser | None
    guess: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def unread(self) -> int:
        """Tokens that the network has not read yet; one where the next is to be written."""
        return len(self.ids) - self.text.length

    def accept(self, id: int, vocabulary: Vocabulary, logprobs: TokenLogprobs | None) -> None:
        """Take the next token."""
        ends = id in vocabulary.ends and not self.request.sampling.ignore_eos
        self.ids.append(id)
        text = "" if ends else self.decoder.feed(vocabulary.piece(id))
        reason: FinishReason | None = None
        if ends or self.decoder.stop_string is not None:
            reason = "stop"
        elif len(self.ids) - self.first == self.request.room:
            reason = "length"
        if reason is not None:
            text += self.decoder.finish()
            if self.decoder.stop_string is not None:  # an unfinished character at the very end can complete one
                reason = "stop"
        self.give(text, [id], reason, None if logprobs is None else [logprobs])

    def give_up(self) -> None:
        """End: every token is forbidden."""
        self.give(self.decoder.finish(), [], "stop")

    def give(
        self, text: str, ids: list[int], reason: FinishReason | None, logprobs: list[TokenLogprobs] | None = None
    ) -> None:
        """Put a chunk where the request's reader finds it."""
        request, place = self.request, (len(self.request.ids), self.request.index, self.choice)
        request.chunks.append(Chunk(text, ids, reason, *place, self.decoder.stop_string, self.reused, logprobs))
        if reason is not None:
            self.finished = True
            request.going -= 1


@dataclass(eq=False)
class Kept:
    """A finished text that is still in the cache."""

    ids: NDArray[np.int64]
    text: Text
    adapter: str | None


class Engine:
    """Runs the requests to one network; several threads may use it.

    Args:
        network: what computes.
        vocabulary: what it may write.
        name: of the model, for errors.
        speculate: whether to guess tokens that followed the same tokens before; the results are the same.
        draft: makes the guesser of a row, instead.
    """

    def __init__(
        self,
        network: Network,
        vocabulary: Vocabulary,
        *,
        name: str = "model",
        speculate: bool = True,
        draft: Callable[[], Guesser] | None = None,
    ) -> None:
        self.network, self.vocabulary, self.name = network, vocabulary, name
        self.new_guesser: Callable[[], Guesser] | None = None
        if network.trims and (draft or speculate):
            self.new_guesser = draft or PromptLookup
        self.waiting: deque[Request] = deque()
        self.rows: list[Row] = []
        self.kept: list[Kept] = []
        self.changed = threading.Condition()
        self.busy = False  # somebody is making a step
        self.steps = 0
        self.read_tokens = 0
        self.guessed_tokens = 0
        self.right_tokens = 0  # of those guessed

    # From outside, by any thread -------------------------------------------------------------------------------------

    def submit(self, ids: Sequence[int], sampling: Sampling, *, room: int, index: int = 0) -> Request:
        """Put a request at the end of the queue.

        Args:
            ids: the prompt, not empty.
            room: tokens that may be written, at least one.
            index: what its chunks are to be numbered by.
        """
        request = Request(ids, sampling, index, room)
        self.waiting.append(request)
        return request

    def chunks(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        """The chunks of some requests as they come. Closing the iterator cancels the requests.

        Raises:
            ModelError: the network computes NaN or infinite values.
            ResourceError: there is not enough memory for a text.
        """
        try:
            while True:
                for request in requests:
                    while request.chunks:
                        yield request.chunks.popleft()
                    if request.error is not None:
                        raise request.error
                if all(request.finished for request in requests):
                    return
                if self.claim(lambda: any(request.chunks or request.error for request in requests)):
                    try:
                        self.step()
                    finally:
                        self.unclaim()
        finally:
            self.cancel(requests)

    def cancel(self, requests: Sequence[Request]) -> None:
        """Stop requests; what they hold is given back at once or, if somebody makes a step, with the next."""
        for request in requests:
            request.cancelled = request.cancelled or not request.finished
        with self.changed:
            if self.busy:
                return
            self.busy = True
        try:
            self.sweep()
        finally:
            self.unclaim()

    def claim(self, ready: Callable[[], bool] = lambda: False) -> bool:
        """Wait until nobody makes a step, and be the one who does; False as soon as ``ready`` instead."""
        with self.changed:
            while self.busy and not ready():
                self.changed.wait()
            if ready():
                return False
            self.busy = True
            return True

    def unclaim(self) -> None:
        """Let the others go on."""
        with self.changed:
            self.busy = False
            self.changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have the network to oneself."""
        self.claim()
        try:
            yield
        finally:
            self.unclaim()

    # One step, by the thread that has claimed it ---------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Read the next tokens of all that run. An error ends the requests that took part, and no others."""
        self.sweep()
        self.admit()
        pieces = self.plan()
        if not pieces:
            return
        self.steps += 1
        self.read_tokens += sum(len(piece.ids) for _, piece in pieces)
        try:
            logits_LV = self.network.read([piece for _, piece in pieces])[:, : self.vocabulary.size]
            self.write([(row, piece) for row, piece in pieces if piece.wanted], logits_LV)
        except BaseException as error:
            for row, _ in pieces:
                row.request.error = row.request.error or error
            self.sweep()
            if not isinstance(error, Exception):  # Ctrl-C is also for the one who made the step
                raise
        self.sweep()

    def sweep(self) -> None:
        """Let go of what has finished, was cancelled, or failed."""
        for request in [request for request in self.waiting if request.finished]:
            self.waiting.remove(request)
        going = []
        for row in self.rows:
            if row.request.error is not None or (row.request.cancelled and not row.finished):
                self.leave(row)
            elif row.finished:
                self.keep(row)
            else:
                going.append(row)
        self.rows = going

    def leave(self, row: Row) -> None:
        """Give back what a row holds."""
        row.text.release()
        if row.guesser is not None:
            row.guesser.release()

    def keep(self, row: Row) -> None:
        """Leave a finished text in the cache; those that are its beginning need not stay."""
        if row.guesser is not None:
            row.guesser.release()
        if not self.network.trims:
            row.text.release()
            return
        ids = np.array(row.ids[: row.text.length])
        for other in [*self.kept]:
            if other.adapter == row.request.sampling.adapter and common(other.ids, ids) == len(other.ids):
                self.forget(other)
        self.kept.append(Kept(ids, row.text, row.request.sampling.adapter))
        if len(self.kept) > min(KEPT, self.network.keeps):
            self.forget(self.kept[0])

    def forget(self, kept: Kept) -> None:
        """Give back a text that was kept."""
        self.kept.remove(kept)
        kept.text.release()

    def admit(self) -> None:
        """Let requests in as long as there is memory; texts that are only kept make way."""
        while self.waiting:
            request = self.waiting[0]
            n = request.sampling.n
            if self.rows and len(self.rows) + n > MAX_ROWS:
                return
            lengths = [row.request.columns for row in self.rows] + [request.columns] * n
            while self.kept and not self.network.fits([*lengths, *(len(kept.ids) for kept in self.kept)]):
                self.forget(self.kept[0])
            if self.rows and not self.network.fits(lengths):
                return
            self.waiting.popleft()
            try:
                self.begin(request)
            except Exception as error:
                request.error = error

    def begin(self, request: Request) -> None:
        """The first row of a request; the other choices part from it when the prompt is read."""
        text, ids, reused = self.shared(request)
        if text is None:
            text, ids = self.network.open(request.ids, request.room, request.sampling.adapter)
        self.rows.append(self.new_row(request, 0, text, ids, reused))

    def shared(self, request: Request) -> tuple[Text | None, list[int], int]:
        """A text that begins with the longest part of the prompt which is still in the cache."""
        if not self.kept:
            return None, request.ids, 0
        prompt = np.array(request.ids[:-1])  # at least one token has to be read
        best, kept = max(
            ((common(kept.ids, prompt), kept) for kept in self.kept if kept.adapter == request.sampling.adapter),
            key=lambda pair: pair[0],
            default=(0, None),
        )
        if kept is None or best < SHARED:
            return None, request.ids, 0
        self.kept.remove(kept)
        self.kept.append(kept)  # used last, forgotten last
        text = kept.text.fork()
        text.trim(best)
        return text, request.ids, best

    def new_row(self, request: Request, choice: int, text: Text, ids: Sequence[int], reused: int) -> Row:
        """The state of one choice before its first token."""
        sampling, generator = request.sampling, None
        if not sampling.greedy:
            generator = torch.Generator(self.network.device)
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed + choice)
        guesser = None if self.new_guesser is None else self.new_guesser()
        decoder = IncrementalDecoder(sampling.stop)
        return Row(request, choice, text, list(ids), len(ids), reused, decoder, generator, guesser)

    def plan(self) -> list[tuple[Row, Piece]]:
        """What is read in this step, by whom."""
        writing = [row for row in self.rows if row.unread == 1]
        pieces = []
        for row in writing:
            row.guess = []
            room = row.request.room - (len(row.ids) - row.first) - 1
            if row.guesser is not None and room > 0 and len(writing) <= MAX_GUESSING:
                row.guess = row.guesser.guess(row.ids, room)
                self.guessed_tokens += len(row.guess)
            pieces.append((row, Piece(row.text, [row.ids[-1], *row.guess], 1 + len(row.guess))))
        left = min(BUSY_PIECE, self.network.piece) if writing else self.network.piece
        for row in self.rows:
            if left and (unread := row.unread) > 1:
                ids = row.ids[row.text.length : row.text.length + left]
                pieces.append((row, Piece(row.text, ids, int(len(ids) == unread))))
                left -= len(ids)
                row.guess = []
        return pieces

    def write(self, pieces: list[tuple[Row, Piece]], logits_LV: Tensor) -> None:
        """Choose the next tokens of the rows that have been read to their end."""
        if not pieces:
            return
        rows, places, place = [], [], 0
        finite, greedy = most_likely(logits_LV)
        for row, piece in pieces:
            if not all(finite[place : place + piece.wanted]):
                row.request.error = self.not_finite()
            else:
                for choice in self.choices(row):
                    rows.append(choice)
                    places.append(place)
            place += piece.wanted
        simple = [row.request.sampling.simple and not self.vocabulary.forbidden for row in rows]
        first = {place: greedy[place] for place, plain in zip(places, simple, strict=True) if plain}
        chosen = [first.get(place) if plain else None for place, plain in zip(places, simple, strict=True)]
        self.draw([number for number, plain in enumerate(simple) if not plain], rows, places, logits_LV, chosen)
        for row, place, plain, id in zip(rows, places, simple, chosen, strict=True):
            self.follow(row, place, id, logits_LV, greedy if plain else None)

    def choices(self, row: Row) -> list[Row]:
        """The row itself; and, when the prompt has been read, the other choices, which part from it here."""
        n = row.request.sampling.n
        if n == 1 or len(row.ids) > row.first or row.choice:
            return [row]
        others = [self.new_row(row.request, choice, row.text.fork(), row.ids, row.reused) for choice in range(1, n)]
        self.rows += others
        return [row, *others]

    def draw(
        self, numbers: list[int], rows: list[Row], places: list[int], logits_LV: Tensor, chosen: list[int | None]
    ) -> None:
        """Choose by the rows' settings, those with the same settings together; None where all is forbidden."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number in numbers:
            groups.setdefault(rows[number].request.sampling.processing, []).append(number)
        for group in groups.values():
            part_BV = logits_LV[[places[number] for number in group]]
            ids = self.choose([rows[number] for number in group], part_BV)
            for number, id in zip(group, ids, strict=True):
                chosen[number] = id

    def choose(self, rows: list[Row], logits_BV: Tensor) -> list[int | None]:
        """The next token of rows that have the same settings."""
        sampling, V = rows[0].request.sampling, logits_BV.size(1)
        if self.vocabulary.forbidden:
            logits_BV[:, self.vocabulary.forbidden] = -math.inf
        for number, row in enumerate(rows):
            if (constraint := row.request.sampling.constraint) is not None:
                try:
                    keep_allowed(logits_BV[number], constraint.allowed(row.ids[row.first :]))
                except Exception as error:  # those who share the step go on
                    row.request.error = error
        history_BT = torch.empty(len(rows), 0, dtype=torch.int64)
        if sampling.needs_history:
            longest = max(len(row.ids) for row in rows)
            history = [[V] * (longest - len(row.ids)) + row.ids for row in rows]  # V is padding
            history_BT = torch.tensor(history, device=logits_BV.device)
        logits_BV = process(logits_BV, history_BT, sampling)
        stuck_B = logits_BV.isneginf().all(dim=1)
        stuck = stuck_B.tolist()
        if any(stuck):
            logits_BV = logits_BV.masked_fill(stuck_B.unsqueeze(1), 0.0)
        generators = [row.generator for row in rows if row.generator is not None]
        ids = draw(logits_BV, generators or None)
        return [None if blocked else id for id, blocked in zip(ids, stuck, strict=True)]

    def follow(self, row: Row, place: int, id: int | None, logits_LV: Tensor, greedy: list[int] | None) -> None:
        """Write a row's next token, and those that were guessed right; the network forgets the others."""
        guess, wanted = row.guess, row.request.sampling.logprobs
        length, right = row.text.length - len(guess), 0
        while row.request.error is None:
            if id is None:
                row.give_up()
                break
            at = place + right
            row.accept(
                id, self.vocabulary, None if wanted is None else logprobs(logits_LV[at : at + 1], [id], wanted)[0]
            )
            if row.finished or right == len(guess) or id != guess[right]:
                break
            right += 1
            if greedy is not None:
                id = greedy[place + right]
            else:
                id = self.choose([row], logits_LV[place + right : place + right + 1].clone())[0]
        if guess:
            row.text.trim(length + right)
            self.right_tokens += right
        if row.guesser is not None:
            row.guesser.learn(len(guess), right)

    def not_finite(self) -> ModelError:
        """The error for a network whose numbers are none."""
        return ModelError(
            "the network computes NaN or infinite values",
            where=self.name,
            why="its weights are damaged, or too large for the precision they are stored in",
            zh="网络算出了 NaN 或无穷大：权重已损坏，或超出其存储精度的范围",
        )


def keep_allowed(logits_V: Tensor, allowed: Sequence[int] | None) -> None:
    """Remove, in place, what a constraint does not allow; None allows all.

    Raises:
        UsageError: something that is no token of the vocabulary was allowed.
    """
    if allowed is None:
        return
    try:
        ids = torch.as_tensor(list(allowed) or np.empty(0, np.int64))
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    except (TypeError, ValueError, RuntimeError):
        low = high = -1
    if low < 0 or high >= len(logits_V) or ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UsageError(
            "the constraint allows something that is no token",
            why=f"allowed(ids) must return ids from 0 to {len(logits_V) - 1}, or None where all are allowed",
            fix="look at what it returns for the tokens written so far",
            zh=f"约束返回的不是词元：allowed(ids) 应返回 0 到 {len(logits_V) - 1} 的编号，全部允许时返回 None。"
            "请检查其返回值",
        )
    mask_V = torch.ones(len(logits_V), dtype=torch.bool)
    mask_V[ids.long()] = False
    logits_V.masked_fill_(mask_V.to(logits_V.device), -math.inf)


def most_likely(logits_LV: Tensor) -> tuple[list[bool], list[int]]:
    """The token with the largest logit in each row, the first of equals; and whether that logit is finite, which it is
    not where one is NaN or infinite, or all are minus infinity."""
    if logits_LV.device.type == "cpu":
        rows = logits_LV.numpy()  # a tenth of the time, and no threads to wake
        ids = [int(row.argmax()) for row in rows]
        return [math.isfinite(row[id]) for row, id in zip(rows, ids, strict=True)], ids
    best = logits_LV.max(dim=1)
    return best.values.isfinite().tolist(), best.indices.tolist()


def common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """How many tokens two texts begin with that are the same."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def logprobs(logits_LV: Tensor, ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """What the network thought of L tokens, and at each place the ``top`` most probable ones."""
    logprobs_LV = logits_LV.log_softmax(dim=1)
    of_ids = logprobs_LV.gather(1, torch.as_tensor(ids, device=logits_LV.device).unsqueeze(1)).squeeze(1).tolist()
    best = logprobs_LV.topk(min(top, logprobs_LV.size(1)), dim=1)
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprobs(value, list(zip(*pairs, strict=True))) for value, pairs in zip(of_ids, tops, strict=True)]
