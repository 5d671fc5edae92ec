"""A decoder in the native engine: what it can compute, its weights brought over, and calls to it.

Letters in names: R rows (tokens of one call), L rows whose logits are wanted, V vocabulary, N outputs of a matrix,
K its inputs.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import ModelError, UsageError, nearest
from hanmo.inference.native.adapters import Changes, changes_of_folder, joined_changes
from hanmo.inference.native.layout import (
    GROUP,
    PANEL,
    Matrix,
    Packed,
    Quantized,
    all_finite,
    alternate,
    filled,
    pack,
    pack_floats,
    stack,
    with_rows,
)
from hanmo.inference.native.library import call
from hanmo.inference.native.memory import give_back
from hanmo.inference.native.model import ACTIVATIONS, LAYER_VECTORS, NativeModel, Parts, bytes_of
from hanmo.inference.native.quantize import alike, quantize_int4, quantize_int8, quantize_int8_wide
from hanmo.models.transformer import Transformer, TransformerConfig, shapes_of
from hanmo.text.tokenizer import Tokenizer

PAGE = 32  # positions of a page of the cache, as in src/attention.h
ROWS = 512  # tokens of one call at most
CACHES = {"int8": 1, "fp16": 2, "fp32": 4}  # bytes of a number in the cache
PRECISIONS = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class LoadedParts:
    """A decoder read from disk in the engine's form.

    Attributes:
        config: the shape of the network.
        parts: its weights, as :class:`NativeDecoder` takes them.
        tokenizer, generation, source: as in :class:`~hanmo.models.checkpoints.weights.LoadedModel`.
    """

    config: TransformerConfig
    parts: Parts
    tokenizer: Tokenizer
    generation: dict[str, Any]
    source: str

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights, bytes."""
        return bytes_of(self.parts)


def reason_against(config: TransformerConfig) -> str | None:
    """Why the native engine cannot compute a network; None where it can."""
    if not (config.causal and config.lm) or config.encoder is not None or config.head is not None:
        return "it is not a decoder that writes"
    if config.positions not in ("rotary", "learned"):
        return f"its positions are {config.positions}"
    if "long_factor" in (config.rope_scaling or {}):
        return "LongRoPE chooses its factors by the length of the text"
    if config.norm_placement == "post" or not config.final_norm or not config.first_norm or config.embedding_norm:
        return "its norms stand elsewhere"
    if config.token_types or config.lm_transform:
        return "it has parts that only encoders have"
    if config.activation not in ACTIVATIONS:
        return f"its activation is {config.activation}"
    return None


@dataclass(frozen=True)
class Weights:
    """Where the parts of a decoder come from, by the names of :mod:`hanmo.models.transformer`.

    Attributes:
        matrix: weights ``[N, K]``, as floats or quantised.
        vector: norms, biases and tables; None where the network has none of that name.
    """

    matrix: Callable[[str], Matrix]
    vector: Callable[[str], Tensor | None]

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor]) -> Weights:
        """The tensors of a network, by name."""
        return cls(state.__getitem__, state.get)


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


def prepare(
    config: TransformerConfig,
    weights: Weights,
    precision: str | None = "fp32",
    place: Callable[[Tensor], Tensor] = as_it_is,
) -> Parts:
    """Bring a decoder's weights into the engine's form: products that read the same are joined, matrices packed.

    Args:
        precision: what weights are brought to, as :func:`packed` says; embedding and output have at least 8 bits.
        place: brings the tensors of a matrix to where they will stay, as soon as it is packed (``memory.py``).
    """
    parts: Parts = {}
    vector, edge = weights.vector, "int8" if precision == "int4" else precision
    # The largest first, while there is nothing else: converting them needs the most memory.
    parts["embedding"] = packed(weights.matrix("model.embed_tokens.weight"), edge, place)
    if not config.tie_embeddings:
        parts["head"] = packed(weights.matrix("lm_head.weight"), edge, place)
    for layer in range(config.num_layers):
        parts |= {
            f"layers.{layer}.{name}": part for name, part in layer_parts(config, weights, precision, layer, place)
        }
    for name, source, factor in (
        ("norm.weight", "model.norm.weight", config.logit_scale),
        ("norm.bias", "model.norm.bias", config.logit_scale),
        ("head.bias", "lm_bias", 1.0),
        ("positions", "model.embed_positions.weight", 1.0),
    ):
        value = vector(source)
        if value is not None:
            if name == "positions":
                value = value[config.position_offset :]
            parts[name] = (value.float() + norm_offset(config, name)).flatten() * factor
    give_back()  # what the conversion took
    return parts


def sizes_of_parts(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """What :func:`prepare` makes for a configuration: outputs and inputs of matrices, lengths of vectors, by name."""
    sliding = config.sliding_layers and config.sliding_layers[:1]
    with torch.device("meta"):  # all layers are alike: one is made
        shapes = shapes_of(Transformer(replace(config, num_layers=1, sliding_layers=sliding)))
    hidden, query, first = config.hidden_size, config.num_heads * config.head_dim, "model.layers.0."
    rows = query + 2 * config.num_kv_heads * config.head_dim
    inner = -(-config.intermediate_size // GROUP) * GROUP * (2 if config.gated else 1)
    layer: dict[str, tuple[int, ...]] = {
        "qkv": (rows, hidden),
        "output": (hidden, query),
        "gate_up": (inner, hidden),
        "down": (hidden, config.intermediate_size),
    }
    layer |= {name: shapes[first + name] for name in LAYER_VECTORS[:10] if first + name in shapes}
    biases = {
        "qkv": "self_attn.q_proj",
        "output": "self_attn.o_proj",
        "gate_up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    layer |= {f"{name}.bias": layer[name][:1] for name, source in biases.items() if f"{first}{source}.bias" in shapes}
    sizes = {f"layers.{number}.{name}": size for number in range(config.num_layers) for name, size in layer.items()}
    sizes["embedding"] = (config.vocab_size, hidden)
    if not config.tie_embeddings:
        sizes["head"] = (config.vocab_size, hidden)
    sizes |= {name: shapes[f"model.{name}"] for name in ("norm.weight", "norm.bias") if f"model.{name}" in shapes}
    if config.lm_bias:
        sizes["head.bias"] = (config.vocab_size,)
    if config.positions == "learned":
        sizes["positions"] = (config.max_position_embeddings * hidden,)
    return sizes


def norm_offset(config: TransformerConfig, name: str) -> float:
    """What is added to the weight of a norm: Gemma stores its distance from one."""
    return 1.0 if config.norm == "rms+1" and name.endswith("norm.weight") else 0.0


def layer_parts(
    config: TransformerConfig, weights: Weights, precision: str | None, layer: int, place: Callable[[Tensor], Tensor]
) -> list[tuple[str, Packed | Tensor]]:
    """Matrices and vectors of one layer."""
    prefix = f"model.layers.{layer}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    matrix, vector = weights.matrix, weights.vector
    filled_intermediate = -(-config.intermediate_size // GROUP) * GROUP
    inner = with_rows(matrix(mlp + "up_proj.weight"), filled_intermediate)
    if config.gated:
        outer = with_rows(matrix(mlp + "gate_proj.weight"), filled_intermediate)
        inner = alternate(*alike([outer, inner]))
    parts: list[tuple[str, Packed | Tensor]] = [
        ("qkv", packed(stack(alike([matrix(f"{attention}{name}_proj.weight") for name in "qkv"])), precision, place)),
        ("output", packed(matrix(attention + "o_proj.weight"), precision, place)),
        ("gate_up", packed(inner, precision, place)),
        ("down", packed(matrix(mlp + "down_proj.weight"), precision, place)),
    ]
    for name in LAYER_VECTORS[:10]:
        value = vector(prefix + name)
        if value is not None:
            parts.append((name, value.float() + norm_offset(config, name)))
    biases = [value.float() for name in "qkv" if (value := vector(f"{attention}{name}_proj.bias")) is not None]
    if biases:
        parts.append(("qkv.bias", torch.cat(biases)))
    for name, source in (("output.bias", attention + "o_proj.bias"), ("down.bias", mlp + "down_proj.bias")):
        if (value := vector(source)) is not None:
            parts.append((name, value.float()))
    if (bias := vector(mlp + "up_proj.bias")) is not None:
        bias = filled(bias.float(), filled_intermediate)
        gate = vector(mlp + "gate_proj.bias")
        if gate is not None:
            joined = alternate(filled(gate.float(), filled_intermediate), bias)
            assert isinstance(joined, Tensor)
            bias = joined
        parts.append(("gate_up.bias", bias))
    return parts


QUANTIZERS: dict[str, Callable[[Tensor], Quantized]] = {
    "int8": quantize_int8,
    "int8-wide": quantize_int8_wide,
    "int4": quantize_int4,
}


def packed(given: Matrix, precision: str | None, place: Callable[[Tensor], Tensor] = as_it_is) -> Packed:
    """A matrix in the engine's layout.

    Args:
        precision: None: as it is (float32, half precision, or quantised). "fp32", "fp16": floats. "int8", "int8-wide",
            "int4": so many bits; what has as many already is left as it is.

    Raises:
        ModelError: a weight is beyond the range of half precision, or no number.
    """
    if precision in ("fp32", "fp16"):
        result = pack_floats(given if isinstance(given, Tensor) else given.dequantize(), precision)
    elif isinstance(given, Quantized) and (precision is None or given.kind.startswith(precision.partition("-")[0])):
        result = pack(given)
    elif isinstance(given, Tensor) and precision is None:
        result = pack_floats(given, "fp16" if given.dtype == torch.float16 else "fp32")
    else:
        floats = given if isinstance(given, Tensor) else given.dequantize()
        result = pack(QUANTIZERS[str(precision)](floats))
    numbers = result.scales if result.scales.numel() else result.values
    if numbers.dtype == torch.float16 and not all_finite(numbers):
        raise ModelError(
            "a matrix holds NaN, infinite values, or weights beyond the range of half precision",
            fix="load it in float32: precision fp32",
            zh="权重含有 NaN、无穷大，或超出半精度范围的数值。请用 fp32 精度加载",
        )
    return replace(result, values=place(result.values), scales=place(result.scales))


class NativeDecoder(NativeModel):
    """A decoder in the native engine; errors of :class:`~hanmo.inference.native.model.NativeModel`.

    Args:
        config: its shape.
        parts: its weights, from :func:`prepare`. They are not copied, and kept as long as this.
        threads: that compute; default: as many as torch uses.
        rows: tokens of one call at most; decides the memory of activations.
        cache: how keys and values are kept, "fp32", "fp16" or "int8" (with a scale per 32 numbers); default: fp32 where
            the weights are, else fp16.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parts: Parts,
        *,
        threads: int | None = None,
        rows: int = ROWS,
        cache: str | None = None,
    ) -> None:
        embedding = parts["embedding"]
        assert isinstance(embedding, Packed)
        self.cache = cache or ("fp32" if embedding.kind == "fp32" else "fp16")
        if self.cache not in CACHES:
            raise UsageError(
                f"keys and values cannot be kept as '{self.cache}'",
                fix=nearest(self.cache, CACHES),
                zh=f"键值缓存没有 '{self.cache}' 这种格式。{nearest(self.cache, CACHES)}",
            )
        self.adapters: dict[int, list[Packed]] = {}  # the engine reads their matrices where they lie
        self.width = -(-config.vocab_size // PANEL) * PANEL
        super().__init__(config, parts, threads, rows)

    def add_adapter(self, adapter: str | Path | Changes, base: str = "") -> int:
        """Take an adapter in; which rows of a call it changes is said with each call.

        Args:
            adapter: a folder of ours or PEFT's, or the matrices A ``[R, K]`` and scaled B ``[N, R]`` of linear layers,
                by their name in the network (see :mod:`hanmo.inference.native.adapters`).
            base: what the decoder was loaded from; a notice says so if the adapter was made for another name.

        Returns:
            its number.

        Raises:
            ModelError: it cannot be read, does not fit, holds NaN, or adds more than low-rank matrices.
        """
        changes = changes_of_folder(adapter, self.config, base) if isinstance(adapter, str | Path) else adapter
        joined = list(joined_changes(self.config, changes))
        if not joined:
            raise ModelError("the adapter changes nothing", where="native engine", zh="适配器没有任何改动")
        with self.lock:
            number = next(number for number in range(len(self.adapters) + 1) if number not in self.adapters)
            try:
                for layer, name, a, b in joined:
                    sizes = (4 * a.values.numel(), 4 * b.values.numel())
                    where = (self.handle, number, layer, name, a.outputs)
                    call("model_adapter", *where, a.values, sizes[0], b.values, sizes[1])
            except BaseException:
                with contextlib.suppress(ModelError):  # where not even the first matrix was taken
                    call("model_adapter_free", self.handle, number)
                raise
            self.adapters[number] = [part for _, _, a, b in joined for part in (a, b)]
        return number

    def remove_adapter(self, number: int) -> None:
        """Forget an adapter; its number may be given to another.

        Raises:
            ModelError: there is none of that number.
        """
        with self.lock:
            call("model_adapter_free", self.handle, number)
            del self.adapters[number]

    @property
    def page_bytes(self) -> int:
        """Memory of the keys and values of one page, bytes."""
        config = self.config
        filled_head = -(-config.head_dim // GROUP) * GROUP
        scales = filled_head // GROUP * 2 if self.cache == "int8" else 0
        return config.num_layers * config.num_kv_heads * 2 * PAGE * (filled_head * CACHES[self.cache] + scales)


def numbers(values: Sequence[int]) -> NDArray[np.int32]:
    """Whole numbers as the engine takes them.

    Raises:
        ModelError: one has more than 32 bits.
    """
    try:
        return np.array(values, np.int32)
    except OverflowError:
        raise ModelError(
            "a token, position, text, page or adapter has a number of more than 32 bits",
            where="native engine",
            zh="词元、位置、文本、页或适配器的编号超过 32 位",
        ) from None


class PagedCache:
    """The memory of keys and values of one decoder, in pages; pages that were never used take no memory.

    Args:
        decoder: whose keys and values.
        pages: how many there are.
    """

    def __init__(self, decoder: NativeDecoder, pages: int) -> None:
        self.decoder, self.pages = decoder, pages
        self.handle = ctypes.c_void_p()
        call("cache_new", decoder.handle, pages, CACHES[decoder.cache], ctypes.byref(self.handle))

    def copy(self, source: int, target: int) -> None:
        """Copy one page to another."""
        with self.decoder.lock:
            call("cache_copy", self.handle, source, target)

    def forward(
        self,
        ids: Sequence[int],
        texts: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
        wanted: Sequence[int],
        adapters: Sequence[int] | None = None,
    ) -> Tensor:
        """Read tokens: R rows, those of a text together and in the order of their positions. Threads that call at the
        same time wait for each other.

        Args:
            ids: tokens of the rows.
            texts: the text of each row, a number of ``tables``, ascending.
            positions: the place of each row in its text; all before it must have been read.
            tables: for each text its pages in order.
            wanted: the rows whose logits are wanted.
            adapters: the adapter of each row, a number from :meth:`NativeDecoder.add_adapter`, or -1. All rows of a
                text must have the same, those that were read before included.

        Returns:
            float32 ``[L, V]``.

        Raises:
            ModelError: a request that cannot be; nothing was computed.
            ResourceError: too little memory.
        """
        table = np.full((len(tables), max(map(len, tables), default=0)), -1, np.int32)  # -1: no page
        for row, pages in enumerate(tables):
            table[row, : len(pages)] = numbers(pages)
        arrays = [numbers(values) for values in (ids, texts, positions, wanted)]
        chosen = None if adapters is None else numbers(adapters)
        if len({len(ids), len(texts), len(positions), len(ids if adapters is None else adapters)}) > 1:
            raise ModelError(
                "tokens, texts, positions and adapters are not equally many",
                where="native engine",
                zh="词元、文本、位置与适配器的数目不等",
            )
        logits = torch.empty(len(wanted), self.decoder.width)
        with self.decoder.lock:
            call(
                "forward",
                *(self.decoder.handle, self.handle, len(ids), *arrays[:3], chosen, *table.shape, table),
                *(len(wanted), arrays[3], logits),
            )
        return logits[:, : self.decoder.config.vocab_size]

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            call("cache_free", self.handle)
