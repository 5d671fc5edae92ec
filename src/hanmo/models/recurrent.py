"""Recurrent networks: language models that read from left to right, and encoders that read both ways.

Choices this file knows:

- cells: the simple recurrence of Elman (1990) with tanh, the LSTM (Hochreiter and Schmidhuber 1997) with a forget gate
  whose bias starts at one (Jozefowicz et al. 2015), the GRU (Cho et al. 2014);
- tied embeddings (Press and Wolf 2017; Inan et al. 2017), behind a projection where the sizes differ;
- locked dropout: one mask for all time steps of a sequence (Gal and Ghahramani 2016), before every layer and after the
  last; embedding dropout: whole words of the vocabulary are left out of a pass (the same paper; Merity et al. 2018);
- bidirectional encoders over padded batches, with the heads of :mod:`hanmo.models.heads`: with a CRF on top this is the
  tagger of Huang et al. (2015).

A state is a tuple of tensors ``[layers, B, H]``: the hidden state, and for an LSTM the cell state after it.

=====  ==============================================
B      batch
T      positions in this call
E      size of an embedding
H      hidden size of a layer (of each direction)
D      size of what the output layer or head reads
V      vocabulary
=====  ==============================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hanmo.errors import ModelError, nearest
from hanmo.models.heads import Head, HeadConfig
from hanmo.models.kernels.loss import token_loss

CELLS: Mapping[str, Callable[..., nn.Module]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
GATES = {"rnn": 1, "lstm": 4, "gru": 3}  # products per unit: each gate and the candidate
KEPT = {"rnn": 2, "lstm": 17, "gru": 8}  # numbers per unit and token that torch's layers keep for the backward pass
FORGET_BIAS = 1.0

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class RecurrentConfig:
    """Everything that decides the shape of a recurrent network.

    Raises:
        ModelError: sizes or rates that are none, or that contradict each other.
    """

    cell: str  # one of CELLS
    vocab_size: int
    embedding_size: int
    hidden_size: int  # of each direction
    num_layers: int
    tie_embeddings: bool = True
    dropout: float = 0.0  # locked, on the input of every layer
    output_dropout: float = 0.0  # locked, on the output of the last layer
    embedding_dropout: float = 0.0  # share of the vocabulary left out of a pass
    bidirectional: bool = False

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ModelError(
                f"the cell '{self.cell}' is not known",
                where="config.json",
                fix=nearest(str(self.cell), CELLS),
                zh=f"不认识的循环单元 '{self.cell}'，目前支持：" + "、".join(CELLS),
            )
        for name in ("vocab_size", "embedding_size", "hidden_size", "num_layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ModelError(
                    f"{name} must be a positive whole number, not {value!r}",
                    where="config.json",
                    zh=f"{name} 必须是正整数，而不是 {value!r}",
                )
        for name in ("dropout", "output_dropout", "embedding_dropout"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise ModelError(
                    f"{name} must be a share from 0 to below 1, not {value!r}",
                    where="config.json",
                    zh=f"{name} 应为 0 到 1 之间（不含 1）的比例，而不是 {value!r}",
                )
        if self.bidirectional and self.tie_embeddings:
            raise ModelError(
                "a bidirectional network has no output embedding to tie",
                where="config.json",
                why="it sees the words that a language model would have to predict",
                fix="set tie_embeddings to false",
                zh="双向网络没有可共享的输出词嵌入；请将 tie_embeddings 设为 false",
            )

    @property
    def output_size(self) -> int:
        """D: what the output layer or a head reads."""
        return self.hidden_size * (2 if self.bidirectional else 1)

    @property
    def has_projection(self) -> bool:
        """Whether the output must be brought to the size of the embedding that it shares."""
        return self.tie_embeddings and self.embedding_size != self.hidden_size

    def input_size(self, layer: int) -> int:
        """What a layer reads at each position."""
        return self.embedding_size if layer == 0 else self.output_size

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``; ``model_type`` is the cell.

        >>> RecurrentConfig("gru", 100, 8, 8, 1).to_dict()["model_type"]
        'gru'
        """
        values = dataclasses.asdict(self)
        return {"model_type": values.pop("cell"), **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecurrentConfig:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ModelError: a key is missing or unknown, or a value cannot be.
        """
        given = {("cell" if key == "model_type" else key): value for key, value in values.items()}
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        for name in sorted(given.keys() - known):
            raise ModelError(
                f"unknown key '{name}'",
                where="config.json",
                fix=nearest(name, known),
                zh=f"未知的键 '{name}'，{nearest(name, known)}",
            )
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in given:
                name = "model_type" if field.name == "cell" else field.name
                raise ModelError(f"the key '{name}' is missing", where="config.json", zh=f"缺少键 '{name}'")
        return cls(**given)


# Size and cost -------------------------------------------------------------------------------------------------------


def matrix_parameters(config: RecurrentConfig) -> int:
    """Weights that each position is multiplied with: the layers and the projection, the output embedding left out."""
    directions = 2 if config.bidirectional else 1
    rows = directions * GATES[config.cell] * config.hidden_size
    layers = sum(rows * (config.input_size(layer) + config.hidden_size) for layer in range(config.num_layers))
    return layers + (config.embedding_size * config.hidden_size if config.has_projection else 0)


def num_parameters(config: RecurrentConfig) -> int:
    """All parameters of a language model or, if bidirectional, of an encoder without its head; tested on the modules.

    >>> num_parameters(RecurrentConfig("lstm", 10_000, 200, 200, 2))  # 2 million of them are the embedding
    2653200
    """
    directions = 2 if config.bidirectional else 1
    biases = 2 * config.num_layers * directions * GATES[config.cell] * config.hidden_size
    embedding = config.vocab_size * config.embedding_size
    if config.bidirectional:
        return embedding + matrix_parameters(config) + biases
    output = config.vocab_size * (1 if config.tie_embeddings else 1 + config.hidden_size)
    return embedding + matrix_parameters(config) + biases + output


def training_flops_per_token(config: RecurrentConfig) -> float:
    """Forward and backward of a language model: three times two operations per weight, the output layer included."""
    read = config.embedding_size if config.has_projection else config.output_size
    return 6.0 * (matrix_parameters(config) + config.vocab_size * read)


def activation_bytes(config: RecurrentConfig, rows: int, length: int) -> int:
    """Bytes that a forward pass of a language model keeps for the backward pass, weights and loss left out."""
    values = config.num_layers * KEPT[config.cell] * config.hidden_size
    values += config.embedding_size * config.has_projection
    return 4 * rows * length * values


# The network ---------------------------------------------------------------------------------------------------------


def locked_dropout(x_BTD: Tensor, rate: float, training: bool) -> Tensor:
    """Zero some features of each sequence at all of its positions, and scale the others up."""
    if not training or not rate:
        return x_BTD
    mask_B1D = torch.empty_like(x_BTD[:, :1]).bernoulli_(1 - rate).div_(1 - rate)
    return x_BTD * mask_B1D


def embed(embedding: nn.Embedding, ids_BT: Tensor, rate: float, training: bool) -> Tensor:
    """Embeddings ``[B, T, E]``; in training a share ``rate`` of all words is zero wherever it occurs in the batch."""
    x_BTE: Tensor = embedding(ids_BT)
    if not training or not rate:
        return x_BTE
    mask_V = torch.empty_like(embedding.weight[:, 0]).bernoulli_(1 - rate).div_(1 - rate)
    return x_BTE * mask_V[ids_BT].unsqueeze(-1)


def make_layers(config: RecurrentConfig) -> nn.ModuleList:
    """One module per layer, so that dropout can stand between them."""
    cell = CELLS[config.cell]
    return nn.ModuleList(
        cell(config.input_size(layer), config.hidden_size, batch_first=True, bidirectional=config.bidirectional)
        for layer in range(config.num_layers)
    )


@torch.no_grad()
def initialize(module: nn.Module, config: RecurrentConfig, seed: int) -> None:
    """Draw all weights of a network: uniform in ``+-1/sqrt(H)``, embeddings in ``+-0.1``; biases are zero.

    An LSTM's forget gates start open, with bias one, so that it remembers before it has learned what to forget.
    """
    generator = torch.Generator().manual_seed(seed)
    H = config.hidden_size
    for name, parameter in module.named_parameters():
        if name.startswith("head."):
            continue  # has its own beginning
        if parameter.dim() < 2:
            parameter.zero_()
            if config.cell == "lstm" and "bias_ih" in name:  # torch's order of gates: input, forget, candidate, output
                parameter[H : 2 * H] = FORGET_BIAS
        else:
            bound = 0.1 if "embed" in name else H**-0.5
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * (2 * bound) - bound)


class RecurrentModel(nn.Module):
    """A recurrent language model.

    >>> model = RecurrentModel(RecurrentConfig("lstm", 11, 8, 8, 2))
    >>> logits, state = model(torch.tensor([[1, 2, 3]]))
    >>> logits.shape, [part.shape for part in state]
    (torch.Size([1, 3, 11]), [torch.Size([2, 1, 8]), torch.Size([2, 1, 8])])
    """

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        if config.bidirectional:
            raise ModelError(
                "a language model reads in one direction",
                where="config.json",
                why="read backwards, it would see the words it has to predict",
                fix="set bidirectional to false, or build a RecurrentEncoder",
                zh="语言模型只能单向阅读；请将 bidirectional 设为 false，或使用 RecurrentEncoder",
            )
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = make_layers(config)
        if config.has_projection:
            self.projection = nn.Linear(config.hidden_size, config.embedding_size, bias=False)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))

    @property
    def output_weight(self) -> Tensor:
        """The output embedding, ``[V, D]``; the input embedding itself where they are tied."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def initialize(self, seed: int) -> None:
        """Draw all weights; see :func:`initialize`."""
        initialize(self, self.config, seed)

    def initial_state(self, batch_size: int) -> State:
        """The state before the first token: zeros, ``[layers, B, H]``."""
        shape = (self.config.num_layers, batch_size, self.config.hidden_size)
        parts = 2 if self.config.cell == "lstm" else 1
        return tuple(self.output_weight.new_zeros(shape) for _ in range(parts))

    def hidden(self, ids_BT: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the output layer reads, ``[B, T, D]``, and the state after the last token."""
        state = self.initial_state(ids_BT.size(0)) if state is None else state
        x = embed(self.embed_tokens, ids_BT, self.config.embedding_dropout, self.training)
        after = []
        for index, layer in enumerate(self.layers):
            x = locked_dropout(x, self.config.dropout, self.training)
            before = tuple(part[index : index + 1].contiguous() for part in state)
            x, last = layer(x, before if len(before) > 1 else before[0])
            after.append(last if isinstance(last, tuple) else (last,))
        x = locked_dropout(x, self.config.output_dropout, self.training)
        if self.config.has_projection:
            x = self.projection(x)
        return x, tuple(torch.cat(parts) for parts in zip(*after, strict=True))

    def forward(self, ids_BT: Tensor, state: State | None = None, *, last_only: bool = False) -> tuple[Tensor, State]:
        """Logits of the next token after each position.

        Args:
            ids_BT: token ids, int64 ``[B, T]``.
            state: where an earlier call ended; the beginning without it.
            last_only: compute the logits of the last position only.

        Returns:
            float32 logits ``[B, T, V]`` (``[B, 1, V]`` with ``last_only``), and the state after the last token.
        """
        x_BTD, state = self.hidden(ids_BT, state)
        if last_only:
            x_BTD = x_BTD[:, -1:]
        return F.linear(x_BTD, self.output_weight, self.output_bias).float(), state

    def loss(self, ids_BT: Tensor, targets_BT: Tensor, chunk: int | None = None) -> Tensor:
        """Summed negative log-likelihood of the targets, in nats; targets below zero are left out."""
        return self.stream_loss(ids_BT, targets_BT, None, chunk)[0]

    def stream_loss(
        self, ids_BT: Tensor, targets_BT: Tensor, state: State | None, chunk: int | None = None
    ) -> tuple[Tensor, State]:
        """:meth:`loss` of a text that goes on from ``state``, and the state after it; logits ``chunk`` at a time."""
        x_BTD, state = self.hidden(ids_BT, state)
        x_MD, targets_M = x_BTD.flatten(0, 1), targets_BT.flatten()
        total = token_loss(x_MD, self.output_weight, targets_M, bias=self.output_bias, chunk=chunk)
        return total, state


class RecurrentEncoder(nn.Module):
    """A bidirectional network with a head: one label for a text, one for each token, or a span.

    Args:
        config: with ``bidirectional=True``.
        head: what it answers.

    >>> config = RecurrentConfig("lstm", 11, 8, 8, 1, tie_embeddings=False, bidirectional=True)
    >>> tagger = RecurrentEncoder(config, HeadConfig("token-classification", ("O", "B", "I")))
    >>> tagger(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 3])
    """

    def __init__(self, config: RecurrentConfig, head: HeadConfig) -> None:
        super().__init__()
        if not config.bidirectional:
            raise ModelError(
                "an encoder reads in both directions",
                where="config.json",
                fix="set bidirectional to true, or build a RecurrentModel",
                zh="编码器是双向的；请将 bidirectional 设为 true，或使用 RecurrentModel",
            )
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = make_layers(config)
        self.head = Head(config.output_size, head)

    def initialize(self, seed: int) -> None:
        """Draw all weights but the head's; see :func:`initialize`."""
        initialize(self, self.config, seed)

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Hidden states of both directions side by side, ``[B, T, D]``; zeros where a row is padded.

        Args:
            ids_BT: token ids, int64.
            mask_BT: bool, True for the tokens of a row, which stand first; default all.

        Raises:
            ModelError: a row has no token, or padding stands before one.
        """
        if mask_BT is None:
            mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        lengths_B = mask_BT.sum(1)
        right_padded = torch.arange(ids_BT.size(1), device=ids_BT.device) < lengths_B.unsqueeze(1)
        if not ids_BT.numel() or int(lengths_B.min()) < 1 or not torch.equal(mask_BT, right_padded):
            raise ModelError(
                "every row needs at least one token, and its padding after them",
                why="the backward direction begins at the last token of a row",
                fix="leave empty texts out, and pad on the right",
                zh="每行至少要有一个词元，且填充须在右侧；请去掉空文本并改为右填充",
            )
        x = embed(self.embed_tokens, ids_BT, self.config.embedding_dropout, self.training)
        for layer in self.layers:
            x = locked_dropout(x, self.config.dropout, self.training)
            packed = pack_padded_sequence(x, lengths_B.cpu(), batch_first=True, enforce_sorted=False)
            x, _ = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=ids_BT.size(1))
        return locked_dropout(x, self.config.output_dropout, self.training)

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Scores of the head; arguments as in :meth:`hidden`."""
        return self.head(self.hidden(ids_BT, mask_BT), mask_BT)  # type: ignore[no-any-return]
