"""A decoder in the native engine: what it can compute, its weights brought over, and calls to it.

Letters in names: R rows (tokens of one call), L rows whose logits are wanted, V vocabulary, N outputs of a matrix,
K its inputs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.inference.native.layout import (
    GROUP,
    KINDS,
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
from hanmo.inference.native.quantize import alike, quantize_int4, quantize_int8, quantize_int8_wide
from hanmo.models.positions import rotary_frequencies, rotary_magnitude
from hanmo.models.transformer import Transformer, TransformerConfig, shapes_of
from hanmo.text.tokenizer import Tokenizer

PAGE = 32  # positions of a page of the cache, as in src/attention.h
ROWS = 512  # tokens of one call at most
PRECISIONS = ("fp32", "fp16", "int8", "int4")
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "quick_gelu": 4}

# What a layer and the network hold, by the numbers of src/model.h; a part's name is that of its place in the network.
LAYER_MATRICES = ("qkv", "output", "gate_up", "down")
MATRICES = ("embedding", "head")  # numbered on from those of a layer
LAYER_VECTORS = (
    "input_layernorm.weight",
    "input_layernorm.bias",
    "post_attention_layernorm.weight",
    "post_attention_layernorm.bias",
    "attention_output_norm.weight",
    "attention_output_norm.bias",
    "mlp_output_norm.weight",
    "mlp_output_norm.bias",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "qkv.bias",
    "output.bias",
    "gate_up.bias",
    "down.bias",
)
VECTORS = (  # numbered on from those of a layer
    "norm.weight",
    "norm.bias",
    "head.bias",
    "positions",
    "embed_norm.weight",
    "embed_norm.bias",
)

Parts = dict[str, Packed | Tensor]  # matrices and vectors by name, as the engine wants them


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


def bytes_of(parts: Parts) -> int:
    """Memory of weights, bytes."""
    tensors = [
        tensor
        for part in parts.values()
        for tensor in ((part.values, part.scales) if isinstance(part, Packed) else (part,))
    ]
    return sum(tensor.nbytes for tensor in tensors)


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
        precision: None: as it is (float32, half precision, or quantised). "fp32", "fp16": floats. "int8", "int8-wide", "int4":
            so many bits; what has as many already is left as it is.

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


class NativeModel:
    """A network in the native engine: its shape and weights.

    Args:
        config: its shape.
        parts: its weights. They are not copied, and kept as long as this.
        threads: that compute; default: as many as torch uses.
        rows: tokens of one call of a decoder at most; decides the memory of activations.

    Raises:
        ModelError: parts that are missing or do not fit the shape.
        ResourceError: too little memory, or no native engine on this machine.
    """

    def __init__(self, config: TransformerConfig, parts: Parts, threads: int | None, rows: int) -> None:
        self.config, self.parts, self.rows = config, parts, rows
        self.threads = threads or torch.get_num_threads()
        self.handle = ctypes.c_void_p()
        self.owner = os.getpid()
        embedding = parts["embedding"]
        call("model_new", *shape_of(config, rows), self.threads, ctypes.byref(self.handle))
        try:
            for layer in range(config.num_layers):
                for number, name in enumerate(LAYER_MATRICES):
                    self.put_matrix(layer, number, parts.get(f"layers.{layer}.{name}"))
                for number, name in enumerate(LAYER_VECTORS):
                    self.put_vector(layer, number, parts.get(f"layers.{layer}.{name}"))
                call("model_sliding", self.handle, layer, config.slides(layer))
            self.put_matrix(-1, len(LAYER_MATRICES), embedding)
            self.put_matrix(-1, len(LAYER_MATRICES) + 1, parts.get("head", embedding))
            for number, name in enumerate(VECTORS):
                self.put_vector(-1, len(LAYER_VECTORS) + number, parts.get(name))
            self.put_rotary()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the memory back; the network cannot be used any more."""
        handle, self.handle = self.handle, ctypes.c_void_p()
        if handle:
            call("model_free", handle)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.close()

    def put_matrix(self, layer: int, number: int, part: Packed | Tensor | None) -> None:
        if not isinstance(part, Packed):  # the engine names what is missing when it is to compute
            return
        sizes = (part.values.numel() * part.values.element_size(), part.scales.numel() * part.scales.element_size())
        call(
            "model_matrix",
            *(self.handle, layer, number, KINDS[part.kind], part.outputs, part.inputs),
            *(part.values, sizes[0], part.scales, sizes[1]),
        )

    def put_vector(self, layer: int, number: int, part: Packed | Tensor | None) -> None:
        if isinstance(part, Tensor):
            call("model_vector", self.handle, layer, number, part.float().contiguous(), part.numel())

    def put_rotary(self) -> None:
        config = self.config
        for local in (False, True):
            frequencies = rotary_frequencies(config, local=local) if config.positions == "rotary" else torch.empty(0)
            plain = bool(local and config.rope_local_theta) or not config.rope_scaling
            magnitude = 1.0 if plain else rotary_magnitude(config)
            if frequencies.numel():
                call("model_rotary", self.handle, local, frequencies.float(), frequencies.numel(), float(magnitude))

    @property
    def kinds(self) -> list[str]:
        """The kinds of weights that its matrices have."""
        return sorted({part.kind for part in self.parts.values() if isinstance(part, Packed)})

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights, bytes."""
        return bytes_of(self.parts)


class NativeDecoder(NativeModel):
    """A decoder in the native engine; arguments and errors of :class:`NativeModel`.

    Args:
        parts: from :func:`prepare`.
        cache_floats: whether keys and values are kept as floats; default: where the weights are.
    """

    def __init__(
        self,
        config: TransformerConfig,
        parts: Parts,
        *,
        threads: int | None = None,
        rows: int = ROWS,
        cache_floats: bool | None = None,
    ) -> None:
        super().__init__(config, parts, threads, rows)
        embedding = parts["embedding"]
        assert isinstance(embedding, Packed)
        self.cache_floats = embedding.kind == "fp32" if cache_floats is None else cache_floats
        self.width = -(-config.vocab_size // PANEL) * PANEL

    @property
    def page_bytes(self) -> int:
        """Memory of the keys and values of one page, bytes."""
        config = self.config
        filled_head = -(-config.head_dim // GROUP) * GROUP
        return config.num_layers * config.num_kv_heads * 2 * filled_head * PAGE * (4 if self.cache_floats else 2)


def shape_of(config: TransformerConfig, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole numbers and the floats of ``Shape`` in src/model.h."""
    rotated = (config.rotary_dim or config.head_dim) if config.positions == "rotary" else 0
    sizes = (
        *(config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
        *(config.intermediate_size, config.vocab_size, config.max_position_embeddings, rotated),
        *(ACTIVATIONS[config.activation], config.gated, config.norm == "layer", config.sliding_window or 0, rows),
    )
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    caps = (config.attention_softcap or 0.0, config.logit_softcap or 0.0)
    return np.array(sizes, np.int64), np.array([config.norm_eps, config.embedding_scale, scale, *caps], np.float32)


class PagedCache:
    """The memory of keys and values of one decoder, in pages; pages that were never used take no memory.

    Args:
        decoder: whose keys and values.
        pages: how many there are.
    """

    def __init__(self, decoder: NativeDecoder, pages: int) -> None:
        self.decoder, self.pages = decoder, pages
        self.handle = ctypes.c_void_p()
        call("cache_new", decoder.handle, pages, 4 if decoder.cache_floats else 2, ctypes.byref(self.handle))

    def copy(self, source: int, target: int) -> None:
        """Copy one page to another."""
        call("cache_copy", self.handle, source, target)

    def forward(
        self,
        ids: Sequence[int],
        texts: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
        wanted: Sequence[int],
    ) -> Tensor:
        """Read tokens: R rows, those of a text together and in the order of their positions.

        Args:
            ids: tokens of the rows.
            texts: the text of each row, a number of ``tables``, ascending.
            positions: the place of each row in its text; all before it must have been read.
            tables: for each text its pages in order.
            wanted: the rows whose logits are wanted.

        Returns:
            float32 ``[L, V]``.
        """
        longest = max(map(len, tables))
        table = np.zeros((len(tables), longest), np.int32)
        for row, pages in enumerate(tables):
            table[row, : len(pages)] = pages
        arrays = [np.array(values, np.int32) for values in (ids, texts, positions, wanted)]
        logits = torch.empty(len(wanted), self.decoder.width)
        call(
            "forward",
            *(self.decoder.handle, self.handle, len(ids), *arrays[:3], *table.shape, table),
            *(len(wanted), arrays[3], logits),
        )
        return logits[:, : self.decoder.config.vocab_size]

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            call("cache_free", self.handle)
