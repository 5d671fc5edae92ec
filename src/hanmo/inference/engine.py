"""The engine: a network and its tokenizer as something that writes, streams and scores text.

A call is decoded in batches of rows of similar length; what differs from one kind of network to another is in
:mod:`hanmo.inference.networks`. The n choices of a prompt share
the work of reading it, every choice draws from its own generator, and a row that has finished leaves its batch.

Letters in names: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import ModelError, UsageError
from hanmo.inference.networks import Network, SourceNetwork, adapt
from hanmo.inference.sampling import Sampling, draw, process
from hanmo.inference.stream import IncrementalDecoder
from hanmo.models.ngram import NGramModel
from hanmo.models.recurrent import RecurrentModel
from hanmo.models.transformer import Transformer

if TYPE_CHECKING:
    from hanmo.text.tokenizer import Tokenizer

MAX_ROWS = 32  # rows that decode together
CACHE_BYTES = 1 << 30  # keys and values of one batch, unless a single row needs more
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")  # what chat templates close an answer with

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[int]


@dataclass
class Completion:
    """What was written after a prompt.

    Attributes:
        text: the new text, without the stop string that ended it.
        ids: the new tokens as they were generated, the closing end-of-sequence token included.
        finish_reason: "stop" (end-of-sequence token or stop string) or "length" (``max_new_tokens`` or the context).
        prompt_tokens: tokens the model read before it wrote.
        index: which prompt of the call this belongs to.
        choice: 0 to n-1.
        stop_string: the stop string that was met, if any.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    index: int = 0
    choice: int = 0
    stop_string: str | None = None


@dataclass
class Chunk:
    """One step of a stream: the next token of one choice and the text that became certain with it (often none).

    The texts of a choice add up to the text that :meth:`LanguageModel.generate` returns; so do the ids. Only the last
    chunk of a choice has a ``finish_reason``.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason | None
    prompt_tokens: int
    index: int = 0
    choice: int = 0
    stop_string: str | None = None


@dataclass
class Row:
    """One sequence that is being written."""

    index: int
    choice: int
    prompt_tokens: int
    room: int  # tokens that may still be generated
    decoder: IncrementalDecoder
    generator: torch.Generator
    finished: bool = False

    def accept(self, id: int, piece: bytes, ends: bool) -> Chunk:
        """Take the next token: ``piece`` are its bytes, ``ends`` says that it closes the text."""
        self.room -= 1
        text = "" if ends else self.decoder.feed(piece)
        reason: FinishReason | None = None
        if ends or self.decoder.stop_string is not None:
            reason = "stop"
        elif self.room == 0:
            reason = "length"
        if reason is not None:
            text += self.decoder.finish()
            self.finished = True
            if self.decoder.stop_string is not None:  # an unfinished character at the very end can complete one
                reason = "stop"
        return self.chunk(text, [id], reason)

    def give_up(self) -> Chunk:
        """End a row for which every token is forbidden."""
        self.finished = True
        return self.chunk(self.decoder.finish(), [], "stop")

    def chunk(self, text: str, ids: list[int], reason: FinishReason | None) -> Chunk:
        """A chunk that carries this row's place in the call."""
        return Chunk(text, ids, reason, self.prompt_tokens, self.index, self.choice, self.decoder.stop_string)


class LanguageModel:
    """A network that writes, with its tokenizer: a decoder, an encoder-decoder, a recurrent network, an n-gram model.

    Args:
        model: the network; it is put into evaluation mode.
        tokenizer: the tokenizer it was trained with.
        name: what the user calls the model.
        eos_ids: tokens that end a text; the tokenizer's own and the usual ends of a chat turn are added.
        prompt_prefix: tokens put before every *text* prompt (a beginning-of-sequence token, a document separator).
        prompt_suffix: tokens put after every *text* prompt (the end of an encoder-decoder's source).
        start_ids: the tokens with which the answer of an encoder-decoder begins.
        forbidden_ids: tokens that are never written.

    Prompts given as ids are never changed. An empty prompt starts from the prefix, else from BOS or EOS.

    >>> model.generate("Once upon a time", max_new_tokens=20)[0].text       # doctest: +SKIP
    >>> model.logprobs(model.tokenizer.encode("从前有座山")).mean()            # doctest: +SKIP
    """

    def __init__(
        self,
        model: Transformer | RecurrentModel | NGramModel | Network,
        tokenizer: Tokenizer,
        *,
        name: str = "model",
        eos_ids: Sequence[int] = (),
        prompt_prefix: Sequence[int] = (),
        prompt_suffix: Sequence[int] = (),
        start_ids: Sequence[int] = (),
        forbidden_ids: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.network = adapt(model, start_ids=start_ids)
        self.tokenizer = tokenizer
        self.name = name
        self.prompt_prefix, self.prompt_suffix = list(prompt_prefix), list(prompt_suffix)
        ends = [*eos_ids, tokenizer.eos_id, *(tokenizer.special_tokens.get(token) for token in END_OF_TURN)]
        self.eos_ids = frozenset(id for id in ends if id is not None)
        size = min(self.network.vocab_size, tokenizer.vocab_size)
        self.forbidden_ids = [id for id in forbidden_ids if 0 <= id < size]

    @property
    def context_length(self) -> int:
        """Tokens the model can see at once, prompt and answer together."""
        return self.network.context_length

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    @property
    def start_id(self) -> int | None:
        """The token a text begins after: the prompt prefix, else BOS, else EOS (a document separator)."""
        candidates = [*self.prompt_prefix[-1:], self.tokenizer.bos_id, self.tokenizer.eos_id]
        return next((id for id in candidates if id is not None), None)

    @property
    def reads_source(self) -> bool:
        """Whether the prompt is a source apart from the answer: an encoder-decoder."""
        return isinstance(self.network, SourceNetwork)

    def room(self, prompt_tokens: int) -> int:
        """Tokens that may follow a prompt of that length; below one if it is too long."""
        return self.network.room(prompt_tokens)

    # Writing ---------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[Completion]:
        """Continue one or many prompts.

        Args:
            prompts: a text, a list of ids, or a list of these.
            options: the fields of :class:`~hanmo.inference.sampling.Sampling`.

        Returns:
            ``n`` completions per prompt, in the order of the prompts.

        Raises:
            UsageError: a bad option, an id outside the vocabulary, or a prompt longer than the context.
        """
        sampling = Sampling.from_options(options)
        completions: dict[tuple[int, int], Completion] = {}
        for batch in self._batches(self._encode_all(prompts), sampling):
            for chunk in self._decode(batch, sampling):
                key = (chunk.index, chunk.choice)
                done = completions.setdefault(key, Completion("", [], "length", chunk.prompt_tokens, *key))
                done.text += chunk.text
                done.ids += chunk.ids
                done.finish_reason = chunk.finish_reason or "length"
                done.stop_string = chunk.stop_string
        return [completions[key] for key in sorted(completions)]

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[Chunk]:
        """Continue one prompt token by token; with ``n`` > 1 the chunks of the choices alternate.

        The checks happen at once, the work while the result is iterated; closing the iterator stops it.

        Raises:
            UsageError: as :meth:`generate`.
        """
        sampling = Sampling.from_options(options)
        if not is_prompt(prompt):
            raise UsageError("stream takes one prompt: a text or a list of ids", fix="call it once per prompt")
        return self._decode([(0, self.encode_prompt(prompt))], sampling)

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation in the model's own template, ready for :meth:`generate` or :meth:`stream`."""
        from hanmo.text.chat import render_chat  # jinja is needed for chat only

        return render_chat(self.tokenizer, messages, add_generation_prompt=True)

    def chat(self, messages: list[dict[str, str]], **options: Any) -> list[Completion]:
        """Answer a conversation of ``{"role": ..., "content": ...}`` messages; options as in :meth:`generate`."""
        return self.generate([self.chat_ids(messages)], **options)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The ids the model reads for a prompt: a text after the prefix, ids unchanged.

        Raises:
            UsageError: nothing to start from, an id outside the vocabulary, or no room left in the context.
            DataError: the text has a lone surrogate.
        """
        if isinstance(prompt, str):
            ids = self.prompt_prefix + self.tokenizer.encode(prompt) + self.prompt_suffix
        elif is_prompt(prompt):
            ids = [int(id) for id in prompt]
        else:
            raise UsageError(
                f"a prompt is a text or a list of ids, not {type(prompt).__name__}", zh="提示应为文本或编号列表"
            )
        if not ids:
            if self.start_id is None:
                raise UsageError(
                    "the prompt is empty and this model has no token to start from",
                    fix="give at least one character",
                    zh="提示为空，而该模型没有起始符号，请至少输入一个字符",
                )
            ids = [self.start_id]
        self._check_ids(ids)
        if self.network.room(len(ids)) < 1:
            raise UsageError(
                f"the prompt has {len(ids)} tokens; this model's context holds {self.context_length}, "
                "and at least one must be left for the answer",
                where=self.name,
                fix=f"shorten the prompt by {len(ids) - self.context_length + 1} tokens or more",
                zh=f"提示有 {len(ids)} 个词元，模型上下文为 {self.context_length}，还须为回答至少留一个。请缩短提示",
            )
        return ids

    def _encode_all(self, prompts: Prompt | Sequence[Prompt]) -> list[tuple[int, list[int]]]:
        """Each prompt's index and ids."""
        if isinstance(prompts, str) or (is_prompt(prompts) and len(prompts)):  # an empty list holds no prompts
            prompts = [cast(Prompt, prompts)]
        return [(index, self.encode_prompt(cast(Prompt, prompt))) for index, prompt in enumerate(prompts)]

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Refuse ids for which the network has no embedding."""
        V = self.network.vocab_size
        for place, id in enumerate(ids):
            if not 0 <= id < V:
                raise UsageError(
                    f"the id {id} at position {place} is outside the vocabulary",
                    where=self.name,
                    fix=f"this model's ids are 0 to {V - 1}; were they made by another tokenizer?",
                    zh=f"第 {place} 个词元编号 {id} 超出词表（应为 0 到 {V - 1}），是否用错了分词器？",
                )

    def _room(self, length: int, sampling: Sampling) -> int:
        """Tokens that may be generated after a prompt of ``length`` tokens."""
        return min(sampling.max_new_tokens, self.network.room(length))

    def _batches(
        self, prompts: list[tuple[int, list[int]]], sampling: Sampling
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """Group prompts of similar length, so that little is padded and the cache stays within its bound."""
        batch: list[tuple[int, list[int]]] = []
        for index, ids in sorted(prompts, key=lambda item: len(item[1])):
            rows = (len(batch) + 1) * sampling.n
            shortest = len(batch[0][1]) if batch else len(ids)
            columns = len(ids) + self._room(shortest, sampling)
            if batch and (
                rows > MAX_ROWS or len(ids) > 2 * shortest + 64 or rows * self.network.row_bytes(columns) > CACHE_BYTES
            ):
                yield batch
                batch = []
            batch.append((index, ids))
        if batch:
            yield batch

    @torch.inference_mode()
    def _decode(self, prompts: list[tuple[int, list[int]]], sampling: Sampling) -> Iterator[Chunk]:
        """Decode one batch: ``n`` rows per prompt, one token per row and step."""
        V = min(self.network.vocab_size, self.tokenizer.vocab_size)  # padded embeddings were never trained
        rows = [self._row(index, choice, ids, sampling) for index, ids in prompts for choice in range(sampling.n)]
        batch = self.network.begin([ids for _, ids in prompts], max(row.room for row in rows))
        logits_BV = batch.prefill()[:, :V]
        if sampling.n > 1:
            repeated = [place for place in range(len(prompts)) for _ in range(sampling.n)]
            batch.select(repeated)
            logits_BV = logits_BV[repeated]
        while True:
            if not logits_BV.isfinite().all():
                raise ModelError(
                    "the network computes NaN or infinite values",
                    where=self.name,
                    why="its weights are damaged, or too large for the precision they are stored in",
                    zh="网络算出了 NaN 或无穷大：权重已损坏，或超出其存储精度的范围",
                )
            if self.forbidden_ids:
                logits_BV[:, self.forbidden_ids] = -math.inf
            logits_BV = process(logits_BV, batch.tokens_BS, sampling)
            stuck = [False] * len(rows)
            if sampling.no_repeat_ngram_size:  # may forbid every token of a small vocabulary
                stuck_B = logits_BV.isneginf().all(dim=1)
                logits_BV, stuck = logits_BV.masked_fill(stuck_B.unsqueeze(1), 0.0), stuck_B.tolist()
            chosen = draw(logits_BV, None if sampling.greedy else [row.generator for row in rows])
            for row, id, blocked in zip(rows, chosen, stuck, strict=True):
                ends = id in self.eos_ids and not sampling.ignore_eos
                yield row.give_up() if blocked else row.accept(id, self.tokenizer.token_bytes(id), ends)
            going = [place for place, row in enumerate(rows) if not row.finished]
            if not going:
                return
            if len(going) < len(rows):
                batch.select(going)
                rows, chosen = [rows[place] for place in going], [chosen[place] for place in going]
            logits_BV = batch.step(chosen)[:, :V]

    def _row(self, index: int, choice: int, ids: list[int], sampling: Sampling) -> Row:
        """The state of one choice before its first token."""
        generator = torch.Generator(self.device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed + choice)
        room = self._room(len(ids), sampling)
        return Row(index, choice, len(ids), room, IncrementalDecoder(sampling.stop), generator)

    # Scoring ---------------------------------------------------------------------------------------------------------

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Log-probability of each token given those before it.

        The first is conditioned on the token a text begins after (``start_id``); where a model has none, it counts as
        one of ``vocab_size`` equally likely tokens.

        Args:
            ids: T token ids, at most ``context_length``.

        Returns:
            float32 ``[T]`` on the CPU, in nats.

        Raises:
            UsageError: an id outside the vocabulary, or more tokens than the context holds.
        """
        ids = [int(id) for id in ids]
        self._check_ids(ids)
        if len(ids) > self.context_length:
            raise self._too_long(len(ids))
        if not ids:
            return torch.empty(0)
        if self.start_id is None:
            rest = self._score(torch.tensor([ids]))[0]
            return torch.cat((rest.new_tensor([-math.log(self.network.vocab_size)]), rest))
        return self._score(torch.tensor([[self.start_id, *ids]]))[0]

    def score(self, ids_BT: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Log-probability of each token but the first, given those before it in its row.

        Rows may be padded on the right with any id of the vocabulary; what stands after a token does not change it.

        Args:
            ids_BT: integer ids ``[B, T]``; T - 1 is at most ``context_length``.

        Returns:
            ``[B, T-1]`` in nats: ``out[b, t] = log P(ids[b, t+1] | ids[b, :t+1])``.

        Raises:
            UsageError: an id outside the vocabulary, or more tokens than the context holds.
        """
        ids = np.asarray(ids_BT, dtype=np.int64)
        if ids.ndim != 2:
            raise UsageError(f"score expects ids of shape [rows, tokens], not {list(ids.shape)}")
        outside_B = ((ids < 0) | (ids >= self.network.vocab_size)).any(axis=1)
        if outside_B.any():
            self._check_ids(ids[outside_B.argmax()].tolist())
        B, T = ids.shape
        length = T - 1  # the last token is only predicted
        if length > self.context_length:
            raise self._too_long(length)
        if B == 0 or T < 2:
            return np.zeros((B, max(T - 1, 0)))
        return self._score(torch.from_numpy(ids)).double().numpy()

    def answer_logprobs(self, source: Prompt, answer: Sequence[int]) -> Tensor:
        """Log-probability of each token of an answer to a source, in nats, float32 ``[T]``; encoder-decoders only.

        Raises:
            UsageError: another kind of network, an id outside the vocabulary, or a source longer than the context.
        """
        if not isinstance(self.network, SourceNetwork):
            raise UsageError(
                "only an encoder-decoder reads a source apart from its answer",
                where=self.name,
                fix="score both as one text with logprobs",
                zh="只有编码器—解码器模型区分原文与答案；其他模型请用 logprobs 对整段文本评分",
            )
        self._check_ids(answer)
        return self.network.answer_logprobs(self.encode_prompt(source), answer)

    @torch.inference_mode()
    def _score(self, ids_BT: Tensor) -> Tensor:
        """float32 ``[B, T-1]`` on the CPU."""
        if ids_BT.size(1) < 2:
            return torch.empty(ids_BT.size(0), 0)
        return self.network.score(ids_BT)

    def _too_long(self, length: int) -> UsageError:
        """The error for a text that cannot be scored in one piece."""
        return UsageError(
            f"{length} tokens are to be scored; this model's context holds {self.context_length}",
            where=self.name,
            fix="score the text in windows (hanmo evaluate does)",
            zh=f"要评分的文本有 {length} 个词元，超过模型上下文（{self.context_length}），请分段评分",
        )


def is_prompt(value: object) -> bool:
    """Whether a value is one prompt (a text, or a sequence of ids) and not a list of prompts."""
    if isinstance(value, str):
        return True
    return isinstance(value, list | tuple | np.ndarray) and all(isinstance(id, int | np.integer) for id in value)
