"""Rows of tokens through a network that reads both ways: batches, padding, masks; and the checks of what is given.

Letters in names: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import ModelError, UsageError
from hanmo.models.recurrent import RecurrentEncoder
from hanmo.models.transformer import Transformer
from hanmo.text.rows import padding_id
from hanmo.text.wrapping import Wrapped

if TYPE_CHECKING:
    from hanmo.text.tokenizer import Tokenizer

BATCH_ROWS = 32
BATCH_TOKENS = 8192  # padded tokens that pass the network at once; bounds the memory of activations and masks

Pair = tuple[str, str]
Floats = NDArray[np.float32]
Read = Callable[[Tensor, Tensor | None, list[int]], Iterable[Tensor]]


class RowReader:
    """Runs a network over rows of any number and length.

    Args:
        model: the network, in evaluation mode.
        tokenizer: for the id of padding, which is masked.
        name: what the user calls the model.
    """

    def __init__(self, model: Transformer | RecurrentEncoder, tokenizer: Tokenizer, name: str) -> None:
        self.model, self.name = model, name
        self.padding_id = padding_id(tokenizer)
        if isinstance(model, RecurrentEncoder):
            self.token_types, self.hidden_size = 0, model.config.output_size
        else:
            self.token_types, self.hidden_size = model.config.token_types, model.config.hidden_size

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def run(self, rows: Sequence[Wrapped], read: Read, batch_size: int = BATCH_ROWS) -> list[Tensor]:
        """What ``read`` makes of the hidden states of each row, on the CPU.

        ``read`` gets hidden states ``[B, T, D]``, padded on the right, their mask (None where nothing is padded), and
        the indices of the rows.
        """
        results: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        start = 0
        while start < len(order):
            stop, most = start + 1, min(len(order), start + batch_size)
            while stop < most and (stop + 1 - start) * len(rows[order[stop]].ids) <= BATCH_TOKENS:
                stop += 1
            batch = order[start:stop]
            found = read(*self.hidden([rows[index] for index in batch]), batch)
            if isinstance(found, Tensor):
                found = found.cpu()  # all rows at once
            for index, result in zip(batch, found, strict=True):
                if not result.isfinite().all():
                    raise ModelError(
                        "the network computes NaN or infinite values",
                        where=self.name,
                        why="its weights are damaged, or too large for the precision they are stored in",
                        zh="网络算出了 NaN 或无穷大：权重已损坏，或超出其存储精度的范围",
                    )
                results[index] = result.cpu()
            start = stop
        return results

    def hidden(self, rows: Sequence[Wrapped]) -> tuple[Tensor, Tensor | None]:
        """Hidden states ``[B, T, D]`` and the mask, None where no row is padded. An empty row becomes one padding."""
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
        if self.token_types > 1 and any(any(row.types) for row in rows):
            types = [[min(kind, self.token_types - 1) for kind in row.types] for row in rows]
            types_BT = torch.tensor([[*kinds, *[0] * (T - len(kinds))] for kinds in types], device=self.device)
        return self.model.hidden(ids_BT, mask_BS=mask_BT, types_BT=types_BT), mask_BT


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
