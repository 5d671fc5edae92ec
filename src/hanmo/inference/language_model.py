"""A network and its tokenizer as something that writes, streams and scores text.

How requests share the work is in :mod:`hanmo.inference.engine`; what differs from one kind of network to another is in
:mod:`hanmo.inference.networks`. Every choice draws from its own generator, so that its tokens do not depend on who else
is being served.

Letters in names: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import UsageError
from hanmo.inference.decoders import SourceNetwork
from hanmo.inference.engine import Chunk, Engine, FinishReason, Request, TokenLogprobs, Vocabulary, logprobs
from hanmo.inference.networks import Network, Piece, adapt
from hanmo.inference.sampling import Sampling, whole_number
from hanmo.inference.speculation import DraftModel
from hanmo.language import pick
from hanmo.models.ngram import NGramModel
from hanmo.models.recurrent import RecurrentModel
from hanmo.models.transformer import Transformer

if TYPE_CHECKING:
    from hanmo.text.tokenizer import Tokenizer

SCORED = 64  # tokens whose log-probabilities are computed at once, for little memory
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")  # what chat templates close an answer with

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
        reused_tokens: of the prompt, tokens that were still in the cache and not read again.
        logprobs: one entry per id, where they were asked for.
    """

    text: str
    ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    index: int = 0
    choice: int = 0
    stop_string: str | None = None
    reused_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None


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
        speculate: whether to guess tokens that followed the same tokens before, which changes the speed and nothing
            else (:mod:`hanmo.inference.speculation`).
        draft: a smaller model with the same tokenizer, which makes the guesses instead.

    Attributes:
        target_prefixes: what a source has to begin with, by the language (``zh``, ``en``) that it is to become, where
            one encoder-decoder translates in both directions.

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
        speculate: bool = True,
        draft: LanguageModel | None = None,
    ) -> None:
        self.model = model
        self.network = adapt(model, start_ids=start_ids)
        self.tokenizer = tokenizer
        self.name = name
        self.prompt_prefix, self.prompt_suffix = list(prompt_prefix), list(prompt_suffix)
        ends = [*eos_ids, tokenizer.eos_id, *(tokenizer.special_tokens.get(token) for token in END_OF_TURN)]
        self.target_prefixes: dict[str, str] = {}
        self.eos_ids = frozenset(id for id in ends if id is not None)
        size = min(self.network.vocab_size, tokenizer.vocab_size)  # padded embeddings were never trained
        self.forbidden_ids = [id for id in forbidden_ids if 0 <= id < size]
        self.vocabulary_size = size
        vocabulary = Vocabulary(size, tokenizer.token_bytes, self.eos_ids, self.forbidden_ids)
        guesser = None if draft is None else self.guesser_of(draft)
        self.adapters: list[str] = []
        self.adapter: str | None = None  # for requests that name none
        self.engine = Engine(self.network, vocabulary, name=name, speculate=speculate, draft=guesser)

    def add_adapter(self, folder: str | Path, name: str | None = None) -> str:
        """Add a LoRA adapter, ours or PEFT's; requests with several adapters and none are computed together.

        Args:
            folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
            name: for the option ``adapter`` of :meth:`generate`; default: that of the folder.

        Returns:
            the name.

        Raises:
            ModelError: the folder is damaged or was made for another model, or is of a kind that the engine cannot use.
            UsageError: the name is taken, or this kind of network has no adapters.
        """
        name = name or Path(folder).resolve().name
        add = getattr(self.network, "add_adapter", None)
        if add is None or name in self.adapters:
            what = f"the name '{name}' is taken" if add else "networks of this kind have no adapters"
            raise UsageError(
                what,
                where=self.name,
                fix="give another name" if add else "adapters belong to transformers",
                zh=f"名称 '{name}' 已被占用，请换一个名称" if add else "这类网络不支持适配器",
            )
        with self.engine.alone():
            add(Path(folder), name)
        self.adapters.append(name)
        return name

    def guesser_of(self, draft: LanguageModel) -> Callable[[], DraftModel]:
        """What makes the guesses of a text with a smaller model.

        Raises:
            UsageError: its tokens are others, or one of the two networks cannot take tokens back.
        """
        size = min(self.tokenizer.vocab_size, draft.tokenizer.vocab_size, draft.network.vocab_size)
        same = all(self.tokenizer.token_bytes(id) == draft.tokenizer.token_bytes(id) for id in range(size))
        if not same or self.tokenizer.vocab_size != draft.tokenizer.vocab_size:
            raise UsageError(
                f"'{draft.name}' has other tokens than '{self.name}' and cannot guess them",
                fix="a draft model must have the same tokenizer: take a smaller model of the same family",
                zh=f"'{draft.name}' 与 '{self.name}' 的分词器不同，不能用作草稿模型；请选用同系列的较小模型",
            )
        if not (self.network.trims and draft.network.trims):
            raise UsageError(
                "a draft model needs networks that can take tokens back, and one of these cannot",
                fix="recurrent networks, encoder-decoders and LongRoPE cannot; leave the draft model out",
                zh="草稿模型要求两个网络都能撤回词元（循环网络、编码器—解码器和 LongRoPE 不能）；请不要使用草稿模型",
            )
        return lambda: DraftModel(draft.network, size)

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

    def describe(self) -> str:
        """What computes, for people: the engine, its form of weights, its threads."""
        return self.network.describe()

    def room(self, prompt_tokens: int) -> int:
        """Tokens that may follow a prompt of that length; below one if it is too long."""
        return self.network.room(prompt_tokens)

    # Writing ---------------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, seeds: Sequence[int] | None = None, **options: Any
    ) -> list[Completion]:
        """Continue one or many prompts.

        Args:
            prompts: a text, a list of ids, or a list of these.
            seeds: one for each prompt, instead of the same ``seed`` for all.
            options: the fields of :class:`~hanmo.inference.sampling.Sampling`.

        Returns:
            ``n`` completions per prompt, in the order of the prompts.

        Raises:
            UsageError: a bad option, an id outside the vocabulary, or a prompt longer than the context.
        """
        encoded = sorted(self._encode_all(prompts), key=lambda item: len(item[1]))
        completions: dict[tuple[int, int], Completion] = {}
        for chunk in self.engine.chunks(self._submit_all(encoded, seeds, options)):
            key = (chunk.index, chunk.choice)
            done = completions.setdefault(key, Completion("", [], "length", chunk.prompt_tokens, *key))
            done.text += chunk.text
            done.ids += chunk.ids
            done.finish_reason = chunk.finish_reason or "length"
            done.stop_string, done.reused_tokens = chunk.stop_string, chunk.reused_tokens
            if chunk.logprobs is not None:
                done.logprobs = [*(done.logprobs or []), *chunk.logprobs]
        return [completions[key] for key in sorted(completions)]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], *, seeds: Sequence[int] | None = None, **options: Any
    ) -> Iterator[Chunk]:
        """Continue one or many prompts token by token; chunks of several prompts and choices alternate.

        The checks happen at once, the work while the result is iterated; closing the iterator stops it.

        Args:
            prompts: as for :meth:`generate`; ``index`` of a chunk says which of them it continues.
            seeds: as for :meth:`generate`.
            options: the fields of :class:`~hanmo.inference.sampling.Sampling`.

        Raises:
            UsageError: as :meth:`generate`.
        """
        several = cast(Sequence[Prompt], [prompts] if is_prompt(prompts) else prompts)
        return self.engine.chunks(self._submit_all(self._encode_all(several), seeds, options))

    def _submit_all(
        self, encoded: Sequence[tuple[int, list[int]]], seeds: Sequence[int] | None, options: dict[str, Any]
    ) -> list[Request]:
        """The requests of prompts with their numbers."""
        sampling = Sampling.from_options(options)
        own = {} if seeds is None else {place: replace(sampling, seed=seed) for place, seed in enumerate(seeds)}
        return [self._submit(index, ids, own.get(index, sampling)) for index, ids in encoded]

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
            raise no_prompt(prompt)
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
        if not isinstance(prompts, Iterable):
            raise no_prompt(prompts)
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

    def _submit(self, index: int, ids: list[int], sampling: Sampling) -> Request:
        """Ask the engine to continue a prompt."""
        sampling.adapter = sampling.adapter or self.adapter
        if sampling.adapter is not None and sampling.adapter not in self.adapters:
            known = ", ".join(self.adapters) or pick("none", "无")
            raise UsageError(
                f"the model has no adapter '{sampling.adapter}'",
                where=self.name,
                why=f"those that were added: {known}",
                fix="add it first: model.add_adapter(FOLDER)",
                zh=f"模型没有适配器 '{sampling.adapter}'（已添加：{known}）；请先调用 model.add_adapter(文件夹)",
            )
        room = min(sampling.max_new_tokens, self.network.room(len(ids)))
        return self.engine.submit(ids, sampling, room=room, index=index)

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
        ids = whole_ids(ids)
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
        ids = np.asarray(ids_BT)
        if ids.size and ids.dtype.kind not in "iu":
            raise no_ids()
        ids = ids.astype(np.int64, copy=False)
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

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """The scores of what follows each token, given it and those before it; nothing is put before the first.

        Args:
            ids: T token ids, at least one, at most ``context_length``.

        Returns:
            float32 ``[T, V]``: four bytes for each token of the vocabulary, for each of T.

        Raises:
            UsageError: an id outside the vocabulary, or more tokens than the context holds.
        """
        return torch.cat(list(self._logits_by_piece(whole_ids(ids))))

    @torch.inference_mode()
    def prompt_logprobs(self, ids: Sequence[int], top: int = 0) -> list[TokenLogprobs | None]:
        """What the network thinks of each token of a prompt, given those before it.

        The values are those that would have been given had the tokens been written after each other
        (``generate(..., logprobs=top)``). The first token has nothing before it, and the source of an encoder-decoder
        is never written: None.

        Args:
            ids: T token ids, at least one, at most ``context_length``; nothing is put before the first.
            top: how many of the most probable tokens are given at each place.

        Raises:
            UsageError: an id outside the vocabulary, or more tokens than the context holds.
        """
        ids = whole_ids(ids)
        if self.reads_source:
            return [None] * len(ids)
        whole_number("top", top, 0, self.network.vocab_size)
        scores: list[TokenLogprobs | None] = [None]
        for logits_LV in self._logits_by_piece(ids):
            for start in range(0, len(logits_LV), SCORED):
                part_LV = logits_LV[start : start + SCORED, : self.vocabulary_size]
                following = ids[len(scores) : len(scores) + len(part_LV)]  # nothing follows the last
                scores += logprobs(part_LV[: len(following)], following, top)
        return scores

    def _logits_by_piece(self, ids: list[int]) -> Iterator[Tensor]:
        """The rows of :meth:`logits`, as many at a time as the network likes to read."""
        self._check_ids(ids)
        if not 1 <= len(ids) <= self.context_length:
            raise self._too_long(len(ids))
        with self.engine.alone():
            text, unread = self.network.open(ids, 0, self.adapter)
            try:
                for start in range(0, len(unread), self.network.piece):
                    part = unread[start : start + self.network.piece]
                    yield self.network.read([Piece(text, part, len(part))])
            finally:
                text.release()

    @torch.inference_mode()
    def choice_logprobs(self, prompt: Prompt, choices: Sequence[Sequence[int]]) -> list[Tensor]:
        """What each of some answers to one prompt is worth; the prompt is read once.

        Args:
            prompt: as for :meth:`generate`.
            choices: the ids of each answer, at least one id each.

        Returns:
            for each answer the log-probability of each of its tokens, in nats, float32 ``[T]``.

        Raises:
            UsageError: an id outside the vocabulary, an empty answer, or more tokens than the context holds.
        """
        if self.reads_source:
            return [self.answer_logprobs(prompt, choice) for choice in choices]
        answers = [whole_ids(choice) for choice in choices]
        ids, longest = self.encode_prompt(prompt), max(map(len, answers), default=0)
        self._check_ids([*ids, *(id for answer in answers for id in answer)])
        if not all(answers):
            raise no_ids()
        if len(ids) + longest > self.context_length:
            raise self._too_long(len(ids) + longest)
        scores = []
        with self.engine.alone():
            text, unread = self.network.open(ids, longest, self.adapter)
            try:
                for start in range(0, len(unread), self.network.piece):
                    last_LV = self.network.read([Piece(text, unread[start : start + self.network.piece])])
                for answer in answers:
                    logits_TV = last_LV[-1:]
                    if len(answer) > 1:
                        branch = text.fork()
                        try:
                            more_TV = self.network.read([Piece(branch, answer[:-1], len(answer) - 1)])
                        finally:
                            branch.release()
                        logits_TV = torch.cat([logits_TV, more_TV])
                    logprobs_TV = logits_TV[:, : self.vocabulary_size].float().log_softmax(-1).cpu()
                    scores.append(logprobs_TV[torch.arange(len(answer)), torch.tensor(answer)])
            finally:
                text.release()
        return scores

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
        with self.engine.alone():
            return self.network.score(ids_BT)

    def _too_long(self, length: int) -> UsageError:
        """The error for a text that cannot be scored in one piece."""
        return UsageError(
            f"{length} tokens are to be scored; this model's context holds {self.context_length}",
            where=self.name,
            fix="score the text in windows (hanmo evaluate does)",
            zh=f"要评分的文本有 {length} 个词元，超过模型上下文（{self.context_length}），请分段评分",
        )


def no_prompt(value: object) -> UsageError:
    """The error for something that is no prompt."""
    return UsageError(f"a prompt is a text or a list of ids, not {type(value).__name__}", zh="提示应为文本或编号列表")


def no_ids() -> UsageError:
    """The error for something that is no token."""
    return UsageError("tokens are given by their ids, which are whole numbers", zh="词元应以整数编号给出")


def whole_ids(ids: Sequence[int]) -> list[int]:
    """Ids as a list, whatever held them; what is no whole number is refused, not rounded."""
    try:
        return [operator.index(id) for id in ids]
    except TypeError:
        raise no_ids() from None


def is_prompt(value: object) -> bool:
    """Whether a value is one prompt (a text, or a sequence of ids) and not a list of prompts."""
    if isinstance(value, str):
        return True
    return isinstance(value, list | tuple | np.ndarray) and all(isinstance(id, int | np.integer) for id in value)
