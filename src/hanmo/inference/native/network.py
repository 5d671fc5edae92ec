"""A decoder of the native engine in the form that all networks have (:mod:`hanmo.inference.networks`).

Letters in names: B texts, T tokens, L tokens whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import ResourceError
from hanmo.inference.native import library
from hanmo.inference.native.decoder import NativeDecoder, PagedCache
from hanmo.inference.native.pages import PAGE, PagedText, Pages
from hanmo.inference.networks import LOGIT_VALUES, Piece
from hanmo.models.device import available_memory

CACHE_BYTES = 1 << 30  # keys and values of all texts, unless a single text needs more; memory is taken as it is used
INSTRUCTIONS = {"avx512": "AVX-512 VNNI", "avxvnni": "AVX-VNNI", "avx2": "AVX2", "neon": "NEON", "plain": "portable"}


class NativeNetwork:
    """A decoder that the native engine computes. What it computes for a text is the same, bit for bit, whatever is read
    with it, in whatever pieces, by how many threads.

    Args:
        decoder: the network.
    """

    device = torch.device("cpu")
    trims = True
    keeps = 64

    def __init__(self, decoder: NativeDecoder) -> None:
        self.decoder = decoder
        config = decoder.config
        self.vocab_size, self.context_length, self.piece = (
            config.vocab_size,
            config.max_position_embeddings,
            decoder.rows,
        )
        most = max(1, int(0.8 * available_memory()) // decoder.page_bytes)  # else the system would end the process
        wanted = max(CACHE_BYTES // decoder.page_bytes, -(-config.max_position_embeddings // PAGE) + 1)
        self.cache = PagedCache(decoder, min(most, wanted))
        self.pages = Pages(self.cache.pages, self.cache.copy)
        self.adapters: dict[str | None, int] = {None: -1}  # their numbers in the decoder, by name

    def describe(self) -> str:
        kinds = self.decoder.kinds
        return f"native, {INSTRUCTIONS[library.load()[1]]}, {'/'.join(kinds)}, {self.decoder.threads} threads"

    def room(self, prompt: int) -> int:
        return self.context_length - prompt

    def fits(self, lengths: Sequence[int]) -> bool:
        return sum(length // PAGE + 2 for length in lengths) <= self.cache.pages  # one more where texts part in a page

    def add_adapter(self, folder: Path, name: str) -> None:
        """Read an adapter folder; :meth:`NativeDecoder.add_adapter` tells what can be wrong with it."""
        self.adapters[name] = self.decoder.add_adapter(folder)

    def open(self, prompt: Sequence[int], room: int, adapter: str | None) -> tuple[PagedText, list[int]]:
        if not self.fits([len(prompt) + room]):
            held = (self.cache.pages - 2) * PAGE
            raise ResourceError(
                f"there is memory for the keys and values of {held:,} tokens; prompt and answer have "
                f"{len(prompt) + room:,}",
                fix=f"a shorter prompt, or max_new_tokens of at most {max(0, held - len(prompt)):,}",
                zh=f"内存只够存放 {held:,} 个词元的键和值，提示与回答共 {len(prompt) + room:,} 个；"
                "请缩短提示或减小 max_new_tokens",
            )
        return PagedText(self.pages, adapter=self.adapters[adapter]), list(prompt)

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """As many tokens in one call as it takes; the others in the next."""
        logits, call, count = [], list[Piece](), 0
        for piece in pieces:
            ids, wanted = list(piece.ids), piece.wanted
            while ids:
                part, ids = ids[: self.decoder.rows - count], ids[self.decoder.rows - count :]
                call.append(Piece(piece.text, part, max(0, wanted - len(ids))))
                wanted, count = min(wanted, len(ids)), count + len(part)
                if count == self.decoder.rows:
                    logits.append(self.call(call))
                    call, count = [], 0
        if call:
            logits.append(self.call(call))
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def call(self, pieces: Sequence[Piece]) -> Tensor:
        """One call of the engine."""
        ids: list[int] = []
        texts: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        adapters: list[int] = []
        for number, piece in enumerate(pieces):
            text, count = piece.text, len(piece.ids)
            text.reserve(count)
            ids += piece.ids
            texts += [number] * count
            adapters += [text.adapter] * count
            positions += range(text.length, text.length + count)
            wanted += range(len(ids) - piece.wanted, len(ids))
        tables = [piece.text.table for piece in pieces]
        chosen = adapters if len(self.adapters) > 1 else None
        logits_LV = self.cache.forward(ids, texts, positions, tables, wanted, adapters=chosen)
        for piece in pieces:
            piece.text.length += len(piece.ids)
        return logits_LV

    def score(self, ids_BT: Tensor) -> Tensor:
        """One text after the other, in pieces."""
        B, T = ids_BT.shape
        scores_BT = torch.empty(B, T - 1)
        count = max(1, min(self.decoder.rows, LOGIT_VALUES // self.vocab_size))
        for row, ids in enumerate(ids_BT.tolist()):
            text = PagedText(self.pages)
            try:
                for start in range(0, T - 1, count):
                    part = ids[start : min(start + count, T - 1)]
                    logits_TV = self.read([Piece(text, part, len(part))])
                    targets_T = ids_BT[row, start + 1 : start + 1 + len(part)]
                    losses_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
                    scores_BT[row, start : start + len(part)] = -losses_T
            finally:
                text.release()
        return scores_BT
