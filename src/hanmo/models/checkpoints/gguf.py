"""GGUF files of the Llama, Qwen and GPT-2 families: llama.cpp's format, with full-precision or quantised weights.

Weights are unpacked to float32, a megabyte at a time, so that the peak is the unpacked model and little more.
The header is checked by our own reader; the ``gguf`` package only unpacks blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.models.checkpoints.gguf_header import TENSOR_TYPES, Header, TensorInfo, read_gguf_header
from hanmo.models.checkpoints.gguf_names import (
    FAMILIES,
    FUSED,
    FUSED_PARTS,
    LAYER_NAMES,
    LLAMA3_PARAMETERS,
    ROTARY_FACTORS,
    TOP_NAMES,
)
from hanmo.models.checkpoints.gguf_tokenizer import read_tokenizer, special_ids
from hanmo.models.checkpoints.weights import COPY_AGAIN, LoadedModel, check_size, check_vocabulary, refuse
from hanmo.models.transformer import TransformerConfig
from hanmo.text.tokenizer import Tokenizer

ARCHITECTURES = tuple(FAMILIES)
CHUNK_VALUES = 1 << 18  # values unpacked at a time: 1 MB, which stays in the cache of the processor
LLAMA3_SCALINGS = (  # those in use: (factor, low and high frequency factor, original context length)
    (8.0, 1.0, 4.0, 8192),
    (32.0, 1.0, 4.0, 8192),
)


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: rows of a tensor of the file.

    Attributes:
        rows: which; all but where a tensor holds several parameters.
        heads: of how many heads llama.cpp has reordered the rows (see :func:`unpermute`); 0: they are in order.
    """

    info: TensorInfo
    rows: range
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return (len(self.rows), *self.info.shape[1:])


@dataclass(frozen=True)
class OpenedFile:
    """A GGUF file whose header was checked and read; no weight was."""

    path: Path
    config: TransformerConfig
    sources: dict[str, Source]
    tokenizer: Tokenizer
    generation: dict[str, Any]


def open_file(path: Path) -> OpenedFile:
    """Read everything but the weights.

    Raises:
        ModelError: the file is damaged, of an unknown architecture, or stored in a type that is not known.
    """
    header = read_gguf_header(path)
    config = read_config(path, header)
    names = {name: hf_names(path, name) for name in header.tensors if name != ROTARY_FACTORS}
    check_size(config, sum(map(len, names.values())), str(path))
    tokenizer = read_tokenizer(path, header.metadata)
    check_vocabulary(tokenizer, config, str(path))
    generation = read_generation(path, header.metadata, config)
    family = FAMILIES[header.metadata["general.architecture"]]
    widths = [config.head_dim * heads for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    sources: dict[str, Source] = {}
    for name, targets in names.items():
        info = header.tensors[name]
        if len(targets) > 1 and info.shape[0] != sum(widths):
            refuse(path, f"the tensor '{name}' has {info.shape[0]} rows, expected {sum(widths)}")
        start = 0
        for target, width in zip(targets, widths if len(targets) > 1 else info.shape[:1], strict=True):
            heads = 0
            if family.interleaved and target.rpartition(".")[0].endswith(("q_proj", "k_proj")):
                heads = config.num_heads if "q_proj" in target else config.num_kv_heads
            sources[target] = Source(info, range(start, start + width), heads)
            start += width
    return OpenedFile(path, config, sources, tokenizer, generation)


def load_gguf(path: str | Path) -> LoadedModel:
    """Read a GGUF file: header and metadata first, then tensor by tensor.

    Raises:
        ModelError: the file is damaged, of an unknown architecture, or stored in a type that is not known.
    """
    path = Path(path)
    file = open_file(path)
    state: dict[str, Tensor] = {}
    for target, source in file.sources.items():
        weight = unpack(path, source.info, source.rows)
        state[target] = unpermute(weight, source.heads) if source.heads else weight
    return LoadedModel(file.config, state, file.tokenizer, file.generation, str(path))


def load_gguf_tokenizer(path: str | Path) -> Tokenizer:
    """Read only the tokenizer of a GGUF file.

    Raises:
        ModelError: the file is damaged, or its tokenizer is of a kind that is not known.
    """
    path = Path(path)
    return read_tokenizer(path, read_gguf_header(path).metadata)


def hf_names(path: Path, name: str) -> list[str]:
    """``blk.3.attn_q.weight`` -> ``["model.layers.3.self_attn.q_proj.weight"]``; a fused tensor has three names."""
    if name in TOP_NAMES:
        return [TOP_NAMES[name]]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isascii() and parts[1].isdigit():
        _, layer, middle, last = parts
        if middle == FUSED:
            return [f"model.layers.{int(layer)}.{part}.{last}" for part in FUSED_PARTS]
        if middle in LAYER_NAMES:
            return [f"model.layers.{int(layer)}.{LAYER_NAMES[middle]}.{last}"]
    refuse(
        path, f"the tensor '{name}' does not belong to a known architecture", fix="known: " + ", ".join(ARCHITECTURES)
    )


def unpack(path: Path, info: TensorInfo, rows: range | None = None) -> Tensor:
    """Read rows of one tensor, or all, and return them as float32, a few rows at a time."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(info.type)
    _, columns, _ = row_layout(info)
    rows = rows or range(row_layout(info)[0])
    values = np.empty((len(rows), columns), dtype=np.float32)
    step = max(1, CHUNK_VALUES // columns)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        values[start : start + len(piece)] = dequantize(read_rows(path, info, piece), kind)
    return torch.from_numpy(values.reshape(-1, *info.shape[1:]))


def row_layout(info: TensorInfo) -> tuple[int, int, int]:
    """How many rows a tensor has, the values of a row, and its bytes. Numbers in a line are a row each."""
    _, block, block_bytes = TENSOR_TYPES[info.type]
    columns = info.shape[-1] if len(info.shape) > 1 or block > 1 else 1
    return math.prod(info.shape) // columns, columns, columns // block * block_bytes


def read_rows(path: Path, info: TensorInfo, rows: range) -> NDArray[np.uint8]:
    """The bytes of rows of a tensor, ``[rows, bytes of a row]``."""
    _, _, size = row_layout(info)
    raw = np.fromfile(path, np.uint8, len(rows) * size, offset=info.offset + rows.start * size)
    if raw.size != len(rows) * size:
        refuse(path, f"the file ended inside the tensor '{info.name}'; it was changed while it was read")
    return raw.reshape(len(rows), size)


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's reordering of query and key rows.

    llama.cpp rotates neighbouring pairs (2i, 2i+1) of a head, Hugging Face the pairs (i, i + N/2); converters of the
    llama architecture therefore interleave the two halves of each head. ``[H*N, ...]`` in, the same shape out.
    """
    if weight.size(0) % (2 * heads):
        return weight  # a wrong shape: named by ``build``
    pairs = weight.view(heads, weight.size(0) // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


# Metadata to configuration -------------------------------------------------------------------------------------------


def read_config(path: Path, header: Header) -> TransformerConfig:
    """The network's shape from the metadata.

    Raises:
        ModelError: an unknown architecture or variant of it, or a value that is missing or not a number.
    """
    metadata, tensors = header.metadata, header.tensors
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"the architecture '{kind}' is not known",
            where=str(path),
            fix="known architectures: " + ", ".join(ARCHITECTURES),
            zh=f"不认识的模型结构 '{kind}'，目前支持：" + "、".join(ARCHITECTURES),
        )
    if metadata.get("split.count", 1) not in (0, 1):
        refuse(path, "the model is split over several files", fix="merge them with llama.cpp's gguf-split")
    if metadata.get(f"{kind}.expert_count"):
        refuse(path, "mixtures of experts are not known", fix="use a dense model")
    if "token_embd.weight" not in tensors:
        refuse(path, "the tensor 'token_embd.weight' is missing")

    def number(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{key}", default)
        if isinstance(value, list):  # one value per layer, where a model varies them
            if len(set(map(str, value))) != 1:
                refuse(path, f"'{kind}.{key}' differs from layer to layer, which is not known")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(path, f"the metadata '{kind}.{key}' is missing or not a number")
        if isinstance(value, float) and value == np.float32(value):
            return float(str(np.float32(value)))  # 1e-05 rather than 9.999999747378752e-06
        return value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads if heads else 0)
    if number("rope.dimension_count", head_dim) != head_dim or number("attention.value_length", head_dim) != head_dim:
        refuse(path, f"only heads that are rotated as a whole are known; this model's have {head_dim} dimensions")
    family, shape = FAMILIES[kind], tensors["token_embd.weight"].shape
    choices = dict(family.fixed)
    for name, tensor in {"attention_bias": "attn_q", "output_bias": "attn_output", "mlp_bias": "ffn_up"}.items():
        if name in family.free:
            choices[name] = f"blk.0.{tensor}.bias" in tensors
    if choices.get("positions", "rotary") == "rotary":
        theta = float(number("rope.freq_base", 10_000.0))
        if not 1 <= theta < float("inf"):
            refuse(path, f"the rotary base {theta} is not a number above 1")
        choices |= {"rope_theta": theta, "rope_scaling": read_scaling(path, header, kind, head_dim, theta)}
    try:
        return TransformerConfig(
            vocab_size=shape[0],
            hidden_size=hidden,
            num_layers=number("block_count"),
            num_heads=heads,
            num_kv_heads=number("attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=number("feed_forward_length"),
            max_position_embeddings=number("context_length"),
            norm_eps=float(number(family.epsilon)),
            tie_embeddings="output.weight" not in tensors,
            model_type=family.model_types[0],
            **choices,
        )
    except ModelError as error:
        fix = error.fix or COPY_AGAIN
        raise ModelError(error.what, where=str(path), why=error.why, fix=fix, zh=error.zh) from None


def read_scaling(path: Path, header: Header, kind: str, head_dim: int, theta: float) -> dict[str, Any] | None:
    """The rotary rescaling: none, linear, or Llama 3's, whose parameters are found again from the stored factors."""
    if ROTARY_FACTORS in header.tensors:
        info = header.tensors[ROTARY_FACTORS]
        if info.shape != (head_dim // 2,):
            refuse(path, f"'{ROTARY_FACTORS}' has shape {info.shape}, expected {(head_dim // 2,)}")
        stored = unpack(path, info).double()
        own = header.metadata.get(LLAMA3_PARAMETERS)
        given = [tuple(own)] if isinstance(own, list) and len(own) == 4 and all(type(x) is float for x in own) else []
        for factor, low, high, original in (*LLAMA3_SCALINGS, *given):
            if torch.allclose(stored, llama3_factors(head_dim, theta, factor, low, high, original), rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": int(original),
                }
        refuse(
            path, f"the rotary factors in '{ROTARY_FACTORS}' are none of the known ones", fix="known: Llama 3.1 and 3.2"
        )
    old = header.metadata.get(f"{kind}.rope.scale_linear")  # the key before rope.scaling.* existed
    scaling = header.metadata.get(f"{kind}.rope.scaling.type", "none" if old is None else "linear")
    factor = header.metadata.get(f"{kind}.rope.scaling.factor", 1.0 if old is None else old)
    if scaling not in ("none", "linear"):
        refuse(path, f"the rotary scaling '{scaling}' is not known", fix="known: none, linear, Llama 3's")
    if not isinstance(factor, int | float):
        refuse(path, "the rotary scaling factor is not a number")
    return {"rope_type": "linear", "factor": float(factor)} if scaling == "linear" and factor not in (0, 1) else None


def llama3_factors(head_dim: int, theta: float, factor: float, low: float, high: float, original: float) -> Tensor:
    """By how much Llama 3 divides each rotary frequency, float64 ``[N/2]`` (Llama 3.1's published rescaling)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = original * frequencies / (2 * torch.pi)  # full turns within the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - blend) / factor + blend)


def read_generation(path: Path, metadata: dict[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """The special ids and whether a plain prompt begins with BOS, as in :class:`LoadedModel`."""
    special = special_ids(path, metadata, config.vocab_size)
    ends = [special[name] for name in ("eos", "eot", "eom") if name in special]
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama")
    return {
        "bos_token_id": special.get("bos"),
        "eos_token_id": list(dict.fromkeys(ends)),
        "pad_token_id": special.get("pad"),
        "add_bos_token": "bos" in special and bool(add_bos),  # SentencePiece models expect BOS unless they say no
    }
