"""Write a model as a GGUF file, which llama.cpp and the programs built on it run.

Which tensor gets which type, for each of the types a user can ask for:

=======  ==============================================================================================================
F16      all matrices in half precision
Q8_0     all matrices with 8 bits
Q4_0     all matrices with 4 bits, except the output (or the embedding that serves as output): Q6_K
Q4_K     as Q4_0, but with Q4_K, and Q6_K also for the values and the second feed-forward matrix in the first and the
         last eighth of the layers and in every third one between: where errors hurt most
=======  ==============================================================================================================

Norms, biases and learned positions stay in F32. The types with super-blocks need rows of a multiple of 256 values;
other rows get the next type that can hold them (Q5_0 for Q4_K, Q8_0 for Q6_K, F16 for rows that are no multiple of 32).
This is llama.cpp's own mixture for these types ("Q4_K_M" for Q4_K), save for GPT-2's fused attention matrices, which it
keeps in Q5_K throughout; here they are treated as the values they contain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hanmo.errors import ModelError, UsageError, nearest
from hanmo.folder import atomic_file
from hanmo.language import pick
from hanmo.models.checkpoints.gguf import llama3_factors
from hanmo.models.checkpoints.gguf_header import TENSOR_TYPES
from hanmo.models.checkpoints.gguf_names import (
    FAMILIES,
    FUSED,
    FUSED_PARTS,
    LAYER_NAMES,
    LLAMA3_PARAMETERS,
    ROTARY_FACTORS,
    TOP_NAMES,
    Family,
    family_of,
)
from hanmo.models.checkpoints.gguf_quantize import LARGEST_HALF, quantize
from hanmo.models.checkpoints.gguf_tokenizer_writer import tokenizer_metadata
from hanmo.models.checkpoints.weights import check_vocabulary
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.progress import Progress
from hanmo.settings import notice
from hanmo.text.tokenizer import Tokenizer

FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 15}  # llama.cpp's numbers; 15 is its mixture "Q4_K_M"
SENSITIVE = ("attn_v", FUSED, "ffn_down")
SMALLER_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
BLOCKS = {name: (number, block, size) for number, (name, block, size) in TENSOR_TYPES.items()}
CHUNK_VALUES = 1 << 22  # values packed at a time: 16 MB


@dataclass(frozen=True)
class Written:
    """What a GGUF file became: its size, bits per weight over all tensors, and the number of weights of each type."""

    num_bytes: int
    bits_per_weight: float
    weights_by_type: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """A tensor to be written: its name in the file, the parameters whose rows it holds, and how it is stored."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    kind: str

    @property
    def num_bytes(self) -> int:
        _, block, size = BLOCKS[self.kind]
        return int(np.prod(self.shape, dtype=np.int64)) // block * size


def save_gguf(
    path: str | Path,
    config: TransformerConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    type: str = "Q8_0",
    generation: dict[str, Any] | None = None,
    name: str = "",
    license: str = "",
) -> Written:
    """Write a decoder of the Llama, Qwen or GPT-2 family to a GGUF file, completely or not at all.

    Tensors are read, packed and written one after another, a few megabytes at a time.

    Args:
        path: the file; what stands there is replaced once the new one is whole.
        config, state, tokenizer: as :func:`hanmo.models.checkpoints.huggingface.load_folder` gives them.
        type: F16, Q8_0, Q4_0 or Q4_K.
        generation: the special ids and ``add_bos_token`` of :class:`LoadedModel`; default: those of the tokenizer.
        name, license: written into the file where given.

    Raises:
        ModelError: llama.cpp has no form for this network or tokenizer, or a weight is not finite or beyond 65504.
        UsageError: an unknown type, or a folder stands at ``path``.
        ResourceError: the disk is full or cannot be written; an older file at ``path`` is intact.
    """
    path = Path(path)
    if type not in FILE_TYPES:
        fix = nearest(type, FILE_TYPES)
        raise UsageError(f"the GGUF type '{type}' cannot be written", fix=fix, zh=f"不能写入类型 '{type}'，{fix}")
    if path.is_dir():
        raise UsageError("there is a folder where the file should go", where=str(path), zh="这个位置上已有文件夹")
    architecture = family_of(config)
    check_vocabulary(tokenizer, config, str(path))
    plans = plan(architecture, config, state, type)
    metadata = {
        "general.type": "model",
        "general.name": name or path.stem,
        "general.license": license,
        "general.file_type": FILE_TYPES[type],
        "general.quantization_version": 2,
        **network_metadata(architecture, config),
        **tokenizer_metadata(tokenizer, config.vocab_size, generation or default_generation(tokenizer)),
    }
    factors = rotary_factors(config)
    with atomic_file(path, sum(item.num_bytes for item in plans)) as temporary:
        write_header(temporary, architecture, metadata, plans, factors)
        with temporary.open("ab") as stream, Progress(pick("writing", "写入"), len(plans), "tensors") as progress:
            if factors is not None:
                write_padded(stream, [factors.numpy().tobytes()])
            for index, item in enumerate(plans, 1):
                pieces = rows_of(item, config, state, FAMILIES[architecture])
                write_padded(stream, (pack(piece, item) for piece in pieces))
                progress.update(index)
    by_type: dict[str, int] = {}
    for item in plans:
        by_type[item.kind] = by_type.get(item.kind, 0) + int(np.prod(item.shape, dtype=np.int64))
    bits = 8 * sum(item.num_bytes for item in plans) / sum(by_type.values())
    return Written(path.stat().st_size, bits, by_type)


def default_generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a tokenizer alone says about the special ids."""
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}


# What goes into the file ---------------------------------------------------------------------------------------------


def plan(architecture: str, config: TransformerConfig, state: Mapping[str, Tensor], type: str) -> list[Plan]:
    """Every tensor of the file, in order.

    Raises:
        ModelError: a parameter of the network is missing in ``state``, is too much, or has another shape.
    """
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
    given = {name: tuple(t.shape) for name, t in state.items() if not (config.tie_embeddings and name in TIED)}
    for parameter in sorted(expected.keys() ^ given.keys()) or (n for n in expected if expected[n] != given[n]):
        raise ModelError(
            f"the weights do not fit the configuration: '{parameter}' is {given.get(parameter, 'missing')}, "
            f"expected {expected.get(parameter, 'nothing of that name')}",
            zh=f"权重与配置不符：'{parameter}'",
        )
    groups: dict[str, list[str]] = {}
    for parameter in expected:
        groups.setdefault(gguf_name(parameter, FAMILIES[architecture]), []).append(parameter)
    plans = []
    for name, parts in groups.items():
        if len(parts) > 1:  # queries, keys, values, in whatever order the module has them
            parts.sort(key=lambda part: next(i for i, middle in enumerate(FUSED_PARTS) if f".{middle}." in part))
        shape = (sum(expected[part][0] for part in parts), *expected[parts[0]][1:])
        plans.append(Plan(name, tuple(parts), shape, kind_of(name, shape, config, type)))
    return plans


TIED = ("lm_head.weight",)


def gguf_name(parameter: str, family: Family) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``blk.3.attn_q.weight``."""
    for theirs, ours in TOP_NAMES.items():
        if ours == parameter:
            return theirs
    _, _, layer, *middle, last = parameter.split(".")
    module = ".".join(middle)
    if family.fused and module in FUSED_PARTS:
        return f"blk.{layer}.{FUSED}.{last}"
    found = next(theirs for theirs, ours in LAYER_NAMES.items() if ours == module)
    return f"blk.{layer}.{found}.{last}"


def kind_of(name: str, shape: tuple[int, ...], config: TransformerConfig, type: str) -> str:
    """How a tensor is stored; see the table at the top."""
    if len(shape) == 1 or name == "position_embd.weight":
        return "F32"
    kind = type
    output = name == "output.weight" or (config.tie_embeddings and name == "token_embd.weight")
    if type in ("Q4_0", "Q4_K") and output:
        kind = "Q6_K"
    if type == "Q4_K" and name.startswith("blk.") and name.split(".")[2] in SENSITIVE:
        layer, eighth = int(name.split(".")[1]), config.num_layers // 8
        outer = layer < eighth or layer >= config.num_layers * 7 // 8
        kind = "Q6_K" if outer or (layer - eighth) % 3 == 2 else kind
    if shape[-1] % BLOCKS[kind][1]:
        kind = SMALLER_BLOCKS.get(kind, kind)
    return kind if shape[-1] % BLOCKS[kind][1] == 0 else "F16"


def network_metadata(architecture: str, config: TransformerConfig) -> dict[str, Any]:
    """The entries that describe the network."""
    context = config.max_position_embeddings
    if config.sliding_window is not None and config.sliding_window < context:
        context = config.sliding_window  # within the window, sliding and full attention are the same
        notice(
            pick(
                f"this model sees a sliding window of {context} tokens, which llama.cpp's architecture "
                f"'{architecture}' does not have: the file states a context of {context} tokens",
                f"该模型使用 {context} 词元的滑动窗口，llama.cpp 的 '{architecture}' 结构没有此机制："
                f"文件中的上下文长度写为 {context}",
            )
        )
    family = FAMILIES[architecture]
    entries: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        family.epsilon: float(config.norm_eps),
    }
    if config.positions == "rotary":
        entries |= {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": float(config.rope_theta),
        }
        scaling = config.rope_scaling or {}
        if scaling.get("rope_type") == "linear":
            entries |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    entries = {f"{architecture}.{key}": value for key, value in entries.items()}
    if parameters := llama3_parameters(config):
        entries[LLAMA3_PARAMETERS] = parameters
    return entries


def llama3_parameters(config: TransformerConfig) -> list[float]:
    """Factor, low and high frequency factor and original context of Llama 3's rescaling; empty without it."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") != "llama3":
        return []
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return [float(scaling[key]) for key in keys]


def rotary_factors(config: TransformerConfig) -> Tensor | None:
    """By what Llama 3's rescaling divides each rotary frequency, float32 ``[N/2]``; None for other rescalings."""
    parameters = llama3_parameters(config)
    return llama3_factors(config.head_dim, config.rope_theta, *parameters).float() if parameters else None


# Writing -------------------------------------------------------------------------------------------------------------


def write_header(
    path: Path, architecture: str, metadata: dict[str, Any], plans: list[Plan], factors: Tensor | None
) -> None:
    """Everything before the data of the tensors."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value not in ("", []):
            writer.add_key_value(key, value, GGUFValueType[kinds[value.__class__]])
    extra = [] if factors is None else [Plan(ROTARY_FACTORS, (), tuple(factors.shape), "F32")]
    for item in (*extra, *plans):
        kind = GGMLQuantizationType(BLOCKS[item.kind][0])
        writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), item.num_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with path.open("ab") as stream:
        write_padded(stream, [])


def write_padded(stream: Any, pieces: Any) -> None:
    """Write bytes and fill up to the alignment of GGUF, 32 bytes."""
    for piece in pieces:
        stream.write(piece)
    stream.write(bytes(-stream.tell() % 32))


def rows_of(item: Plan, config: TransformerConfig, state: Mapping[str, Tensor], family: Family) -> Iterator[Tensor]:
    """The values of a tensor in the order of the file, float32, some rows at a time.

    Raises:
        ModelError: a value is not finite, or too large for the type.
    """
    for part in item.parts:
        tensor = state[part].detach()
        module = part.rpartition(".")[0]
        order = None
        if family.interleaved and module.endswith(("q_proj", "k_proj")):
            order = interleaved(tensor.size(0), config.num_heads if module.endswith("q_proj") else config.num_kv_heads)
        step = max(1, CHUNK_VALUES // max(1, tensor[:1].numel()))
        for start in range(0, tensor.size(0), step):
            rows = slice(start, start + step)
            piece = tensor[rows if order is None else order[rows].to(tensor.device)].float().cpu()
            limit = torch.finfo(torch.float32).max if item.kind == "F32" else LARGEST_HALF
            if not piece.abs().max() <= limit:  # also where it is not a number
                raise ModelError(
                    f"the tensor '{part}' holds {piece.abs().max():g}, which {item.kind} cannot store",
                    why=f"numbers in half precision end at {LARGEST_HALF:g}; weights of that size are seldom meant",
                    fix="check the training run, or export a folder, whose weights keep their precision",
                    zh=f"张量 '{part}' 含有 {piece.abs().max():g}，{item.kind} 无法存储。请检查训练，或改为导出文件夹",
                )
            yield piece


def interleaved(rows: int, heads: int) -> Tensor:
    """The order in which llama.cpp wants the query and key rows; see :func:`hanmo.models.checkpoints.gguf.unpermute`.

    >>> interleaved(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def pack(piece: Tensor, item: Plan) -> bytes:
    """The bytes of some rows of a tensor."""
    return quantize(piece if piece.dim() > 1 else piece[None], item.kind).tobytes()
