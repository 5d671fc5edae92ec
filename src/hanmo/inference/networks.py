"""What the engine needs of a network, and the kinds of networks that are no transformers in that form.

A network reads pieces of texts, of one or of many at a time, and remembers what it has read of each
(:class:`Text`). All else (which text reads how much when, sampling, stop strings, streams) is the engine's, and the
same for all networks.

Letters in names: B rows, T tokens, L tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.models.ngram import NGramModel
from hanmo.models.recurrent import RecurrentModel
from hanmo.models.transformer import Transformer

SCORE_TOKENS = 8192  # tokens that pass a network at once when scoring; bounds the memory of activations
LOGIT_VALUES = 1 << 24  # logits computed at once when scoring: 64 MB
UNBOUNDED = 32_768  # the context of networks that have no limit of their own
IMPOSSIBLE = -1e30  # the finite stand-in for a log-probability of minus infinity


class Text(Protocol):
    """What a network remembers of a text that it has read."""

    @property
    def length(self) -> int:
        """Tokens that were read."""
        ...

    def fork(self) -> Text:
        """A second text that begins with all that this one has read."""
        ...

    def trim(self, length: int) -> None:
        """Forget the tokens from ``length`` on; only where the network ``trims``."""
        ...

    def release(self) -> None:
        """Forget everything; the text is not used any more."""
        ...


@dataclass
class Piece:
    """Tokens to be read next of a text.

    Attributes:
        wanted: of how many of the last tokens the logits are wanted.
    """

    text: Any  # of the network that reads it
    ids: Sequence[int]
    wanted: int = 1


class Network(Protocol):
    """A network that writes and scores tokens.

    Attributes:
        piece: tokens that it reads at once.
        trims: whether its texts can be shortened: then beginnings are shared, and guesses tried.
        keeps: finished texts that it may hold for prompts that begin alike.
    """

    vocab_size: int
    context_length: int
    piece: int
    trims: bool
    keeps: int

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def describe(self) -> str:
        """What computes, for people."""
        ...

    def room(self, prompt: int) -> int:
        """Tokens that may follow a prompt of that length."""
        ...

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether there is memory for texts of these lengths at the same time."""
        ...

    def open(self, prompt: Sequence[int], room: int, adapter: str | None) -> tuple[Any, list[int]]:
        """A new text to which at most ``room`` tokens will be added, read with an adapter or none; and what it has to
        read first."""
        ...

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """Read one piece each of some texts: the wanted logits, one piece after the other, float32 ``[L, V]``."""
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
        from hanmo.inference.decoders import DecoderNetwork, SourceNetwork

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


class RecurrentText:
    """The state of a recurrent network after the tokens it has read; states are never changed, so texts share them."""

    def __init__(self, length: int = 0, state: tuple[Tensor, ...] | None = None) -> None:
        self.length, self.state = length, state

    def fork(self) -> RecurrentText:
        return RecurrentText(self.length, self.state)

    def trim(self, length: int) -> None:
        raise NotImplementedError

    def release(self) -> None:
        self.state = None


class RecurrentNetwork:
    """A recurrent language model: what it has read is in its state, so that its context has no end."""

    context_length, piece, trims, keeps = UNBOUNDED, SCORE_TOKENS, False, 0

    def __init__(self, model: RecurrentModel) -> None:
        self.model = model.eval()
        self.vocab_size = model.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.model.output_weight.device

    def describe(self) -> str:
        return f"torch on {self.device}"

    def room(self, prompt: int) -> int:
        return self.context_length - prompt

    def fits(self, lengths: Sequence[int]) -> bool:  # noqa: ARG002 - a state has one size
        return True

    def open(self, prompt: Sequence[int], room: int, adapter: str | None) -> tuple[RecurrentText, list[int]]:  # noqa: ARG002
        return RecurrentText(), list(prompt)

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """Texts that read one token each are read together."""
        logits: list[Tensor] = [torch.empty(0)] * len(pieces)
        single = [number for number, piece in enumerate(pieces) if len(piece.ids) == 1 and piece.text.state is not None]
        if len(single) > 1:
            states = zip(*(pieces[number].text.state for number in single), strict=True)
            ids_B1 = torch.tensor([pieces[number].ids for number in single], device=self.device)
            logits_B1V, state = self.model(ids_B1, tuple(torch.cat(parts, dim=1) for parts in states))
            for row, number in enumerate(single):
                self.keep(pieces[number], tuple(part[:, row : row + 1].contiguous() for part in state))
                logits[number] = logits_B1V[row, 1 - pieces[number].wanted :]
        for number in set(range(len(pieces))) - set(single if len(single) > 1 else ()):
            piece = pieces[number]
            ids_1T = torch.tensor([list(piece.ids)], device=self.device)
            logits_1TV, state = self.model(ids_1T, piece.text.state, last_only=piece.wanted <= 1)
            self.keep(piece, state)
            logits[number] = logits_1TV[0, logits_1TV.size(1) - piece.wanted :]
        return torch.cat(logits)

    def keep(self, piece: Piece, state: tuple[Tensor, ...]) -> None:
        """Remember a text's state after a piece."""
        piece.text.state = state
        piece.text.length += len(piece.ids)

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


class TokenText:
    """A text of which the tokens themselves are remembered."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self.ids = list(ids)

    @property
    def length(self) -> int:
        return len(self.ids)

    def fork(self) -> TokenText:
        return TokenText(self.ids)

    def trim(self, length: int) -> None:
        del self.ids[length:]

    def release(self) -> None:
        self.ids.clear()


class NGramNetwork:
    """An n-gram model: its context is the last few tokens."""

    context_length, piece, trims, keeps = UNBOUNDED, UNBOUNDED, True, 0
    device = torch.device("cpu")

    def __init__(self, model: NGramModel) -> None:
        self.model, self.vocab_size = model, model.vocab_size

    def describe(self) -> str:
        return "NumPy"

    def room(self, prompt: int) -> int:
        return self.context_length - prompt

    def fits(self, lengths: Sequence[int]) -> bool:  # noqa: ARG002 - tokens take no memory worth counting
        return True

    def open(self, prompt: Sequence[int], room: int, adapter: str | None) -> tuple[TokenText, list[int]]:  # noqa: ARG002
        return TokenText(), list(prompt)

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """Each wanted distribution by itself."""
        rows = []
        for piece in pieces:
            ids: list[int] = piece.text.ids
            ids += piece.ids
            rows += [self.next_logprobs(ids[: len(ids) - back]) for back in range(piece.wanted - 1, -1, -1)]
        if not rows:
            return torch.empty(0, self.vocab_size)
        return torch.from_numpy(np.maximum(np.stack(rows), IMPOSSIBLE)).float()

    def next_logprobs(self, ids: list[int]) -> Any:
        """Of every token after these, of which only those after the beginning of the text are its context."""
        if self.model.bos_id in ids:
            ids = ids[ids.index(self.model.bos_id) + 1 :]
        return self.model.next_logprobs(ids)

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether the first token is the beginning of a text, which is context and never predicted."""
        return bool(ids[0] == self.model.bos_id)

    def score(self, ids_BT: Tensor) -> Tensor:
        rows = [
            self.model.logprobs(ids[1:]) if self.begins(ids) else self.model.logprobs(ids)[1:] for ids in ids_BT.numpy()
        ]
        return torch.from_numpy(np.maximum(np.stack(rows), IMPOSSIBLE)).float()
