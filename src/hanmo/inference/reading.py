"""Rows of tokens through a network that reads both ways, in the native engine or with torch; and the checks of what is
given.

Letters in names: B rows, T tokens of the longest, M tokens of all rows, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hanmo.errors import ModelError, UsageError, nearest
from hanmo.inference.native import library
from hanmo.inference.native.decoder import Weights
from hanmo.inference.native.encoder import CALL_TOKENS, PRECISIONS, NativeEncoder, reason_against_encoder
from hanmo.models.recurrent import RecurrentEncoder
from hanmo.models.transformer import Transformer
from hanmo.text.rows import padding_id
from hanmo.text.wrapping import Wrapped

if TYPE_CHECKING:
    from hanmo.text.tokenizer import Tokenizer

BATCH_ROWS = 32
BATCH_TOKENS = 8192  # padded tokens that pass torch's network at once; bounds the memory of activations and masks
ENGINES = ("auto", "native", "torch")

Pair = tuple[str, str]
Floats = NDArray[np.float32]
Read = Callable[[Tensor, Tensor, list[int]], Iterable[Tensor]]


class RowReader:
    """Runs a network over rows of any number and length.

    Args:
        model: the network, in evaluation mode. The native engine takes its weights over when it first computes; in
            the network there remain those of its head and of its output over the vocabulary.
        tokenizer: for the id of padding, which is masked.
        name: what the user calls the model.
        engine: "native", "torch", or "auto": native where it can compute the network on this machine.
        precision: of the native engine's weights: "fp32", "fp16" or "int8".

    Raises:
        UsageError: an engine or precision that is none, or that cannot be had here.
    """

    def __init__(
        self,
        model: Transformer | RecurrentEncoder,
        tokenizer: Tokenizer,
        name: str,
        *,
        engine: str = "auto",
        precision: str = "fp32",
    ) -> None:
        for value, known, what in ((engine, ENGINES, "engine"), (precision, PRECISIONS, "precision")):
            if value not in known:
                hint = nearest(value, known)
                raise UsageError(
                    f"an encoder has no {what} '{value}'", fix=hint, zh=f"编码器没有 {value} 这一选项。{hint}"
                )
        self.model, self.name, self.precision = model, name, precision
        self.device = next(model.parameters()).device
        self.padding_id = padding_id(tokenizer)
        if isinstance(model, RecurrentEncoder):
            self.token_types, self.hidden_size = 0, model.config.output_size
        else:
            self.token_types, self.hidden_size = model.config.token_types, model.config.hidden_size
        self.reason = "engine torch" if engine == "torch" else reason_against(model, self.device)
        self.encoder: NativeEncoder | None = None
        self.lock = threading.Lock()
        if self.reason and (engine == "native" or precision != "fp32"):
            wanted = "--engine native" if engine == "native" else f"--precision {precision}"
            raise UsageError(
                f"{wanted} needs the native engine, which cannot be used here: {self.reason}",
                where=name,
                fix="leave the option out: torch computes the model in float32; hanmo doctor says what is missing",
                zh=f"{wanted} 需要本地推理引擎，但此处无法使用（{self.reason}）。请去掉该选项，改由 torch 以 float32 "
                "计算",
            )

    @property
    def exact(self) -> bool:
        """Whether the states of a row are the same bits whatever other rows there are."""
        return self.reason is None

    def describe(self) -> str:
        """What computes, for people."""
        if self.reason:
            return f"torch on {self.device}"
        from hanmo.inference.native.network import INSTRUCTIONS

        threads = self.encoder.threads if self.encoder else torch.get_num_threads()
        return f"native, {INSTRUCTIONS[library.load()[1]]}, {self.precision}, {threads} threads"

    @torch.inference_mode()
    def run(self, rows: Sequence[Wrapped], read: Read, batch_size: int = BATCH_ROWS) -> list[Tensor]:
        """What ``read`` makes of the hidden states of each row, on the CPU.

        ``read`` gets the states of some rows one after the other, unpadded, ``[M, D]``, the lengths of the rows, and
        their indices. An empty row is read as one padding.

        Args:
            batch_size: rows that pass torch's network at once; the native engine, which pads none, takes as many as
                its memory is meant for.
        """
        results: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index].ids))
        start = 0
        while start < len(order):
            batch = order[start : self.batch_end(order, rows, start, batch_size)]
            chosen = [rows[index] for index in batch]
            states_MD = self.padded(chosen) if self.reason else self.unpadded(chosen)
            lengths_B = torch.tensor([max(1, len(row.ids)) for row in chosen], device=states_MD.device)
            found = read(states_MD, lengths_B, batch)
            if isinstance(found, Tensor):
                found = found.cpu()  # all rows at once
            if not (found if isinstance(found, Tensor) else torch.cat(found := list(found))).isfinite().all():
                raise ModelError(
                    "the network computes NaN or infinite values",
                    where=self.name,
                    why="its weights are damaged, or too large for the precision they are stored in",
                    zh="网络算出了 NaN 或无穷大：权重已损坏，或超出其存储精度的范围",
                )
            for index, result in zip(batch, found, strict=True):
                results[index] = result.cpu()
            start += len(batch)
        return results

    def batch_end(self, order: Sequence[int], rows: Sequence[Wrapped], start: int, batch_size: int) -> int:
        """Where the batch that begins at ``start`` ends, in rows from the longest to the shortest."""
        stop, tokens, longest = start + 1, len(rows[order[start]].ids), len(rows[order[start]].ids)
        while stop < len(order):
            tokens = (stop + 1 - start) * longest if self.reason else tokens + len(rows[order[stop]].ids)
            if tokens > (BATCH_TOKENS if self.reason else CALL_TOKENS) or (self.reason and stop == start + batch_size):
                break
            stop += 1
        return stop

    def unpadded(self, rows: Sequence[Wrapped]) -> Tensor:
        """Hidden states of the native engine, ``[M, D]``."""
        with self.lock:
            if self.encoder is None:
                assert isinstance(self.model, Transformer)
                self.encoder = NativeEncoder(self.model.config, taken_over(self.model), self.precision)
        ids, types = [row.ids or [self.padding_id] for row in rows], None
        if self.has_types(rows):
            types = [self.types_of(row) for row in rows]
        return self.encoder.hidden(ids, types)

    def has_types(self, rows: Sequence[Wrapped]) -> bool:
        """Whether the segments of some tokens are not 0 and mean something to the network."""
        return self.token_types > 1 and any(any(row.types) for row in rows)

    def types_of(self, row: Wrapped) -> list[int]:
        """The segments of a row's tokens, those of an empty row's padding too."""
        return [min(kind, self.token_types - 1) for kind in row.types] or [0]

    def padded(self, rows: Sequence[Wrapped]) -> Tensor:
        """Hidden states of torch's network, ``[M, D]``: computed of padded rows, from which the padding is removed."""
        hidden_BTD, mask_BT = self.hidden(rows)
        return hidden_BTD.flatten(0, 1) if mask_BT is None else hidden_BTD[mask_BT]

    def hidden(self, rows: Sequence[Wrapped]) -> tuple[Tensor, Tensor | None]:
        """Hidden states ``[B, T, D]`` of torch's network and the mask, None where no row is padded."""
        lists = [row.ids or [self.padding_id] for row in rows]
        T = max(len(ids) for ids in lists)
        ids_BT = torch.tensor([[*ids, *[self.padding_id] * (T - len(ids))] for ids in lists], device=self.device)
        lengths_B1 = torch.tensor([[len(ids)] for ids in lists], device=self.device)
        mask_BT: Tensor | None = torch.arange(T, device=self.device) < lengths_B1
        if min(len(ids) for ids in lists) == T:
            mask_BT = None
        if isinstance(self.model, RecurrentEncoder):
            return self.model.hidden(ids_BT, mask_BT), mask_BT
        types_BT = None  # all zero
        if self.has_types(rows):
            types = [self.types_of(row) for row in rows]
            types_BT = torch.tensor([[*kinds, *[0] * (T - len(kinds))] for kinds in types], device=self.device)
        return self.model.hidden(ids_BT, mask_BS=mask_BT, types_BT=types_BT), mask_BT


def reason_against(model: Transformer | RecurrentEncoder, device: torch.device) -> str | None:
    """Why the native engine cannot compute a network that reads; None where it can."""
    if isinstance(model, RecurrentEncoder):
        return "it is a recurrent network"
    if device.type != "cpu":
        return f"it computes on CPUs, not on {device}"
    if "model.layers.0.self_attn.q_proj.weight" not in model.state_dict():
        return "adapters are attached to it"
    engine, reason = library.load()
    return reason if engine is None else reason_against_encoder(model.config)


def taken_over(model: Transformer) -> Weights:
    """The weights of a network for the native engine, each of which leaves the network as it is asked for: no weight is
    held twice. Where the network writes words with its embedding, that stays."""
    state, config = model.state_dict(), model.config

    def take(name: str) -> Tensor | None:
        tensor: Tensor | None = state.pop(name, None)
        if tensor is not None and not (name == "model.embed_tokens.weight" and config.lm and config.tie_embeddings):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to("meta"), requires_grad=False))
        return tensor

    def matrix(name: str) -> Tensor:
        tensor = take(name)
        assert tensor is not None
        return tensor

    return Weights(matrix, take)


def check_texts(texts: object, *, pairs: bool = False) -> list[str | Pair]:
    """One text or many as a list; with ``pairs``, tuples of two texts as well.

    Raises:
        UsageError: something that is no text, with its index.
    """
    if isinstance(texts, str) or (pairs and isinstance(texts, tuple) and is_pair(texts)):
        texts = [texts]
    if isinstance(texts, bytes) or not isinstance(texts, Sequence | np.ndarray):
        raise not_text(texts, "")
    for index, text in enumerate(texts):
        if not isinstance(text, str) and not (pairs and is_pair(text)):
            raise not_text(text, f"text {index}")
    return [text if isinstance(text, str) else (text[0], text[1]) for text in texts]


def check_words(words: Sequence[str]) -> list[str]:
    """A list of strings.

    Raises:
        UsageError: something that is no string, with its index.
    """
    if isinstance(words, bytes) or not isinstance(words, Sequence):
        raise not_text(words, "")
    for index, word in enumerate(words):
        if not isinstance(word, str):
            raise not_text(word, f"item {index}")
    return list(words)


def is_pair(value: object) -> bool:
    """Two texts that belong together."""
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def not_text(value: object, where: str) -> UsageError:
    """The error for something else in the place of a text."""
    return UsageError(
        f"expected a text, not {type(value).__name__}",
        where=where,
        fix="give a string, or a list of strings; a pair is a tuple of two",
        zh=f"应为文本（字符串或字符串列表，成对文本用二元组），而不是 {type(value).__name__}",
    )
