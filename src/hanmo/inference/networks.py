"""What the engine needs of a network, and every kind of network in that form.

A decoder, an encoder-decoder, a recurrent network, an n-gram model: each begins a :class:`Decoding` of some prompts and
scores rows of tokens. All else (sampling, stop strings, streams, batches) is the engine's and the same for all of them.

Letters in names: B rows, T tokens, S columns, M tokens of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import ModelError, UsageError
from hanmo.inference.batch import PREFILL_TOKENS, Batch, pad_left
from hanmo.models.cache import KVCache
from hanmo.models.cost import kv_cache_bytes
from hanmo.models.ngram import NGramModel
from hanmo.models.recurrent import RecurrentModel
from hanmo.models.transformer import Transformer

SCORE_TOKENS = 8192  # tokens that pass a network at once when scoring; bounds the memory of activations
LOGIT_VALUES = 1 << 24  # logits computed at once when scoring: 64 MB
UNBOUNDED = 32_768  # the context of networks that have no limit of their own
IMPOSSIBLE = -1e30  # the finite stand-in for a log-probability of minus infinity


class Decoding(Protocol):
    """Rows that are being written."""

    @property
    def tokens_BS(self) -> Tensor:
        """The ids of all columns so far; padding is an id that no token has."""
        ...

    def prefill(self) -> Tensor:
        """Read the prompts: logits of each row's first new token, float32 ``[B, V]``."""
        ...

    def step(self, ids: Sequence[int]) -> Tensor:
        """Append one token to every row: logits of the next, float32 ``[B, V]``."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the given rows; a row named more than once is repeated."""
        ...


class Network(Protocol):
    """A network that writes and scores tokens."""

    vocab_size: int
    context_length: int

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def room(self, prompt: int) -> int:
        """Tokens that may follow a prompt of that length."""
        ...

    def row_bytes(self, columns: int) -> int:
        """Memory that one row of so many columns takes while it is written."""
        ...

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> Decoding:
        """Rows for these prompts, to which ``room`` tokens will be appended at most."""
        ...

    def score(self, ids_BT: Tensor) -> Tensor:
        """``log P(ids[b, t+1] | ids[b, :t+1])`` in nats, float32 ``[B, T-1]`` on the CPU."""
        ...


def adapt(model: Any, *, start_ids: Sequence[int] = ()) -> Network:
    """The engine's view of a model; one that has that form already is returned as it is.

    Args:
        start_ids: the tokens with which the decoder of an encoder-decoder begins; default 0.

    Raises:
        ModelError: a network that reads both ways and so cannot write.
    """
    if isinstance(model, Transformer):
        if model.head is not None or not model.config.lm or not model.config.causal:
            raise ModelError(
                "this network reads texts and writes none",
                why="it has a task's head, or sees the words on both sides of each position",
                fix="hanmo.load gives it as a TextEncoder: embed, classify, tag or fill",
                zh="该网络只用于理解文本，不能生成。请用 hanmo.load 得到的 TextEncoder 做嵌入、分类、标注或填空",
            )
        return SourceNetwork(model, start_ids or [0]) if model.encoder is not None else DecoderNetwork(model)
    if isinstance(model, RecurrentModel):
        return RecurrentNetwork(model)
    if isinstance(model, NGramModel):
        return NGramNetwork(model)
    network: Network = model
    return network


class DecoderNetwork:
    """A transformer decoder."""

    def __init__(self, model: Transformer) -> None:
        self.model = model.eval()
        self.vocab_size = model.config.vocab_size
        self.context_length = model.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.model.output_weight.device

    def room(self, prompt: int) -> int:
        return self.context_length - prompt

    def row_bytes(self, columns: int) -> int:
        return kv_cache_bytes(self.model.config, columns, self.model.output_weight.element_size())

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> Decoding:
        return Batch(self.model, prompts, room)

    def score(self, ids_BT: Tensor) -> Tensor:
        """Neither all activations nor all logits are held at once."""
        B, T = ids_BT.shape
        scores_M, rows = torch.empty(B * (T - 1)), max(1, SCORE_TOKENS // T)
        for row in range(0, B, rows):
            part_BT = ids_BT[row : row + rows].to(self.device)
            hidden_MD = self.states(part_BT[:, :-1]).flatten(0, 1)
            first = row * (T - 1)
            scores_M[first : first + len(hidden_MD)] = token_scores(self.model, hidden_MD, part_BT[:, 1:].flatten())
        return scores_M.view(B, T - 1)

    def states(self, ids_BT: Tensor) -> Tensor:
        """Hidden states; long rows that need a mask are read in pieces, so that it never holds all pairs of tokens."""
        config, (B, T), weight = self.model.config, ids_BT.shape, self.model.output_weight
        slides = any(config.slides(layer) for layer in range(config.num_layers)) and (config.sliding_window or 0) < T
        if T <= PREFILL_TOKENS or not (slides or config.attention_softcap):
            return self.model.hidden(ids_BT)
        cache = KVCache(config, B, T, weight.dtype, weight.device)
        cache.reach_B1 = torch.full((B, 1), T, device=weight.device)
        pieces = [self.model.hidden(piece_BT, cache=cache) for piece_BT in torch.split(ids_BT, PREFILL_TOKENS, dim=1)]
        return torch.cat(pieces, dim=1)


def token_scores(model: Transformer, hidden_MD: Tensor, targets_M: Tensor) -> Tensor:
    """Log-probabilities of tokens from the hidden states before them, some logits at a time."""
    tokens = max(1, LOGIT_VALUES // model.config.vocab_size)
    pieces = zip(torch.split(hidden_MD, tokens), torch.split(targets_M, tokens), strict=True)
    return torch.cat([-F.cross_entropy(model.logits(x), y, reduction="none") for x, y in pieces]).cpu()


class SourceNetwork(DecoderNetwork):
    """An encoder-decoder: the prompt is the source, and the answer is written from ``start_ids`` on."""

    def __init__(self, model: Transformer, start_ids: Sequence[int]) -> None:
        super().__init__(model)
        assert model.config.encoder is not None
        self.start_ids, self.source_length = list(start_ids), model.config.encoder.max_position_embeddings

    def room(self, prompt: int) -> int:
        if prompt > self.source_length:
            return 0
        return self.context_length - len(self.start_ids)

    def row_bytes(self, columns: int) -> int:
        return kv_cache_bytes(self.model.config, columns, self.model.output_weight.element_size(), columns)

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> Decoding:
        longest = max(len(ids) for ids in prompts)
        source_BS = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts], device=self.device)
        lengths_B1 = torch.tensor([[len(ids)] for ids in prompts], device=self.device)
        mask_BS = torch.arange(longest, device=self.device) < lengths_B1
        memory = self.model.encode(source_BS, mask_BS=None if mask_BS.all() else mask_BS)
        return Batch(self.model, [self.start_ids] * len(prompts), room, memory=memory)

    def score(self, ids_BT: Tensor) -> Tensor:  # noqa: ARG002 - the protocol's
        raise UsageError(
            "an encoder-decoder scores an answer to a source, not a text by itself",
            fix="use answer_logprobs(source, answer)",
            zh="编码器—解码器模型只能对“原文→答案”评分，请使用 answer_logprobs(source, answer)",
        )

    @torch.inference_mode()
    def answer_logprobs(self, source: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Log-probability of each token of an answer to a source, in nats, float32 ``[T]``."""
        if not answer:
            return torch.empty(0)
        memory = self.model.encode(torch.tensor([list(source)], device=self.device))
        answer_T = torch.tensor(list(answer), device=self.device)
        before_1T = torch.cat((answer_T.new_tensor(self.start_ids), answer_T[:-1])).unsqueeze(0)
        hidden_TD = self.model.hidden(before_1T, memory=memory)[0, len(self.start_ids) - 1 :]
        return token_scores(self.model, hidden_TD, answer_T)


class RecurrentNetwork:
    """A recurrent language model: what it has read is in its state, so that its context has no end."""

    context_length = UNBOUNDED

    def __init__(self, model: RecurrentModel) -> None:
        self.model = model.eval()
        self.vocab_size = model.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.model.output_weight.device

    def room(self, prompt: int) -> int:
        return self.context_length - prompt

    def row_bytes(self, columns: int) -> int:
        return 8 * columns

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> Decoding:
        return RecurrentDecoding(self.model, prompts, room)

    def score(self, ids_BT: Tensor) -> Tensor:
        """Read in pieces, the state carried from one to the next."""
        B, T = ids_BT.shape
        tokens = max(1, min(SCORE_TOKENS, LOGIT_VALUES // self.vocab_size))
        rows, columns = max(1, tokens // T), min(T - 1, tokens)
        scores_BT = torch.empty(B, T - 1)
        for row in range(0, B, rows):
            part_BT, state = ids_BT[row : row + rows].to(self.device), None
            for start in range(0, T - 1, columns):
                stop = min(start + columns, T - 1)
                logits_BTV, state = self.model(part_BT[:, start:stop], state)
                targets_BT = part_BT[:, start + 1 : stop + 1]
                losses_BT = F.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")
                scores_BT[row : row + rows, start:stop] = -losses_BT
        return scores_BT


class RecurrentDecoding:
    """Token histories and states of some rows; prompts are read one by one, since they differ in length."""

    def __init__(self, model: RecurrentModel, prompts: Sequence[Sequence[int]], room: int) -> None:
        self.model, self.prompts = model, prompts
        self.history_BS = pad_left(prompts, room, model.config.vocab_size, model.output_weight.device)
        self.length = max(len(ids) for ids in prompts)
        self.state: tuple[Tensor, ...] = ()

    @property
    def tokens_BS(self) -> Tensor:
        return self.history_BS[:, : self.length]

    def prefill(self) -> Tensor:
        logits, states = [], []
        for ids in self.prompts:
            state = None
            for start in range(0, len(ids), SCORE_TOKENS):
                piece_1T = torch.tensor([list(ids[start : start + SCORE_TOKENS])], device=self.history_BS.device)
                last_11V, state = self.model(piece_1T, state, last_only=True)
            assert state is not None
            logits.append(last_11V[:, 0])
            states.append(state)
        self.state = tuple(torch.cat(parts, dim=1) for parts in zip(*states, strict=True))
        return torch.cat(logits)

    def step(self, ids: Sequence[int]) -> Tensor:
        ids_B = torch.tensor(ids, device=self.history_BS.device)
        self.history_BS[:, self.length] = ids_B
        self.length += 1
        logits_B1V, self.state = self.model(ids_B.unsqueeze(1), self.state)
        return logits_B1V[:, 0]  # type: ignore[no-any-return]

    def select(self, rows: Sequence[int]) -> None:
        order = torch.tensor(rows, device=self.history_BS.device)
        self.history_BS = self.history_BS[order]
        self.state = tuple(part[:, order] for part in self.state)


class NGramNetwork:
    """An n-gram model: its context is the last few tokens."""

    context_length = UNBOUNDED
    device = torch.device("cpu")

    def __init__(self, model: NGramModel) -> None:
        self.model, self.vocab_size = model, model.vocab_size

    def room(self, prompt: int) -> int:
        return self.context_length - prompt

    def row_bytes(self, columns: int) -> int:
        return 8 * columns

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> Decoding:
        return NGramDecoding(self.model, prompts, room)

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether the first token is the beginning of a text, which is context and never predicted."""
        return bool(ids[0] == self.model.bos_id)

    def score(self, ids_BT: Tensor) -> Tensor:
        rows = [
            self.model.logprobs(ids[1:]) if self.begins(ids) else self.model.logprobs(ids)[1:] for ids in ids_BT.numpy()
        ]
        return torch.from_numpy(np.maximum(np.stack(rows), IMPOSSIBLE)).float()


class NGramDecoding:
    """The token histories of some rows."""

    def __init__(self, model: NGramModel, prompts: Sequence[Sequence[int]], room: int) -> None:
        self.model = model
        self.rows = [list(ids[ids.index(model.bos_id) + 1 :] if model.bos_id in ids else ids) for ids in prompts]
        self.history_BS = pad_left(prompts, room, model.vocab_size, torch.device("cpu"))
        self.length = max(len(ids) for ids in prompts)

    @property
    def tokens_BS(self) -> Tensor:
        return self.history_BS[:, : self.length]

    def prefill(self) -> Tensor:
        rows = [self.model.next_logprobs(ids) for ids in self.rows]
        return torch.from_numpy(np.maximum(np.stack(rows), IMPOSSIBLE)).float()

    def step(self, ids: Sequence[int]) -> Tensor:
        self.history_BS[:, self.length] = torch.tensor(ids)
        self.length += 1
        for row, id in zip(self.rows, ids, strict=True):
            row.append(id)
        return self.prefill()

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [list(self.rows[row]) for row in rows]
        self.history_BS = self.history_BS[torch.tensor(rows)]
