"""An encoder in the native engine: what it can compute, its weights brought over, and calls to it.

Texts are computed without padding: the tokens of all texts of a call stand one after the other. A text's states are
the same bits whatever other texts there are, in whatever order, and however many threads compute.

Letters in names: M tokens of all texts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.inference.native.decoder import Weights, as_it_is, layer_parts, numbers, packed
from hanmo.inference.native.library import call
from hanmo.inference.native.model import ACTIVATIONS, NativeModel, Parts
from hanmo.models.transformer import TransformerConfig

CALL_TOKENS = 8192  # of one call at most, but for a text that is longer; bounds the memory of activations
PRECISIONS = ("fp32", "fp16", "int8")


def reason_against_encoder(config: TransformerConfig) -> str | None:
    """Why the native engine cannot compute a network's states; None where it can."""
    if config.causal or config.encoder is not None or config.shared_embedding:
        return "it is not an encoder alone"
    if config.positions not in ("rotary", "learned"):
        return f"its positions are {config.positions}"
    if "long_factor" in (config.rope_scaling or {}):
        return "LongRoPE chooses its factors by the length of the text"
    if config.norm_placement == "sandwich" or config.norm == "rms+1":
        return "its norms stand where only decoders have them"
    if config.attention_softcap is not None:
        return "its attention is capped"
    if config.activation not in ACTIVATIONS:
        return f"its activation is {config.activation}"
    return None


def prepare_encoder(config: TransformerConfig, weights: Weights, precision: str = "fp32") -> Parts:
    """Bring an encoder's weights into the engine's form; see :func:`hanmo.inference.native.decoder.prepare`.

    Args:
        precision: one of PRECISIONS.
    """
    parts: Parts = {}
    inner = "int8-wide" if precision == "int8" else precision
    for layer in range(config.num_layers):
        found = layer_parts(config, weights, inner, layer, as_it_is)
        parts |= {f"layers.{layer}.{name}": part for name, part in found}
    parts["embedding"] = packed(weights.matrix("model.embed_tokens.weight"), precision)
    for name, source in (
        ("norm.weight", "model.norm.weight"),
        ("norm.bias", "model.norm.bias"),
        ("embed_norm.weight", "model.embed_norm.weight"),
        ("embed_norm.bias", "model.embed_norm.bias"),
        ("types", "model.embed_types.weight"),
    ):
        value = weights.vector(source)
        if value is not None:
            parts[name] = value.float().flatten()
    positions = weights.vector("model.embed_positions.weight")
    if positions is not None:
        parts["positions"] = positions[config.position_offset :].float().flatten()
    return parts


class NativeEncoder(NativeModel):
    """An encoder in the native engine; errors of :class:`NativeModel`.

    Args:
        config: its shape.
        weights: its parts by name.
        precision: of the weights, one of PRECISIONS; with "int8" activations are rounded to 8 bits as well.
        threads: that compute; default: as many as torch uses.

    >>> states_MD = encoder.hidden([[101, 7592, 102], [101, 102]])                     # doctest: +SKIP
    >>> states_MD.shape                                                                # doctest: +SKIP
    torch.Size([5, 384])
    """

    def __init__(
        self, config: TransformerConfig, weights: Weights, precision: str = "fp32", threads: int | None = None
    ) -> None:
        self.precision = precision
        super().__init__(config, prepare_encoder(config, weights, precision), threads, rows=1)
        types = self.parts.get("types")
        if isinstance(types, Tensor):
            call("model_types", self.handle, types, config.token_types, types.numel())

    def hidden(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> Tensor:
        """States of the last layer of all tokens of all texts, float32 ``[M, D]``, in the order given.

        Args:
            texts: token ids of each text, at least one.
            types: the segment of each token; default 0.

        Raises:
            ModelError: a text that is empty or longer than the context, or ids that the network does not have.
            ResourceError: too little memory.
        """
        lengths = np.array([len(text) for text in texts], np.int32)
        if types is not None and [len(row) for row in types] != lengths.tolist():
            raise ModelError("a text and its segments differ in length", zh="文本与其分段编号的长度不同")
        if not lengths.all():
            raise ModelError("a text has no tokens", where="native engine (encode)", zh="文本没有词元")
        total = int(lengths.sum())
        states_MD = torch.empty(total, self.config.hidden_size)
        if not total:
            return states_MD
        tokens, segments = flat(texts), None if types is None else flat(types)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        order = np.argsort(-lengths, kind="stable")  # the longest first: threads end together
        if (order[1:] > order[:-1]).all() and total <= CALL_TOKENS:
            self.encode(lengths, tokens, segments, states_MD)
            return states_MD
        for chosen in calls(order, lengths):
            places = np.concatenate([np.arange(starts[text], starts[text + 1]) for text in chosen])
            found_MD = torch.empty(len(places), self.config.hidden_size)
            self.encode(lengths[chosen], tokens[places], None if segments is None else segments[places], found_MD)
            states_MD[torch.from_numpy(places)] = found_MD
        return states_MD

    def encode(self, lengths: np.ndarray, tokens: np.ndarray, types: np.ndarray | None, states_MD: Tensor) -> None:
        """One call of the engine, which computes one at a time."""
        with self.lock:
            call("encode", self.handle, len(lengths), lengths, len(tokens), tokens, types, states_MD)


def flat(rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """The numbers of all rows, one row after the other."""
    return numbers(list(chain.from_iterable(rows)))


def calls(order: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Texts, in their order, cut into calls of at most CALL_TOKENS tokens, but at least one text."""
    cuts, tokens = [0], 0
    for place, text in enumerate(order):
        tokens += int(lengths[text])
        if tokens > CALL_TOKENS and place > cuts[-1]:
            cuts.append(place)
            tokens = int(lengths[text])
    return [order[start:end] for start, end in zip(cuts, [*cuts[1:], len(order)], strict=True)]
