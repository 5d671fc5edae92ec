"""A network in the native engine, decoder or encoder: its shape and weights brought over."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from hanmo.inference.native.layout import KINDS, Packed
from hanmo.inference.native.library import call
from hanmo.models.positions import rotary_frequencies, rotary_magnitude
from hanmo.models.transformer import TransformerConfig

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


def bytes_of(parts: Parts) -> int:
    """Memory of weights, bytes."""
    tensors = [
        tensor
        for part in parts.values()
        for tensor in ((part.values, part.scales) if isinstance(part, Packed) else (part,))
    ]
    return sum(tensor.nbytes for tensor in tensors)


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
        self.lock = threading.Lock()  # one call at a time: they share the memory of activations
        MODELS.add(self)
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
        with self.lock:
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


# A lock that another thread holds while the process forks would never be given back in the child.
MODELS: weakref.WeakSet[NativeModel] = weakref.WeakSet()


def renew_locks() -> None:
    """What a child does first."""
    for model in MODELS:
        model.lock = threading.Lock()


os.register_at_fork(after_in_child=renew_locks)


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
