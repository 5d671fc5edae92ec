"""What every importer hands back, and safetensors files read with distrust.

A weight file from elsewhere is checked against its own header before a byte of it is used: the rules are those of the
safetensors format (header at most 100 MB and inside the file, offsets contiguous, without overlap or gap, up to the
exact end of the file). A truncated or hostile file is refused while it is still only a name and a size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.folder import os_error_of
from hanmo.models.transformer import TransformerConfig

if TYPE_CHECKING:
    from hanmo.text.tokenizer import Tokenizer

MAX_HEADER = 100_000_000
WEIGHT_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes per value
TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BUFFER_TYPES = {"I64": 8, "I32": 4, "U8": 1, "BOOL": 1}  # of positions and masks that older files store: never used
MAX_DIMENSION = 1 << 24  # rows or columns of one matrix
COPY_AGAIN = "copy or download the file again"


@dataclass
class LoadedModel:
    """A model read from disk, not yet built.

    Attributes:
        config: the shape of the network.
        state: every weight by the name of its parameter, in the stored precision (float32 where it was quantised).
        tokenizer: the tokenizer that belongs to the weights.
        generation: the entries of ``generation_config.json``; ``eos_token_id`` is always a list (maybe empty), and
            ``add_bos_token`` says whether the model expects its BOS token before every plain prompt.
        source: where it was read from, for people.
        checked: whether names, shapes and values were compared with the configuration already.
    """

    config: TransformerConfig
    state: dict[str, Tensor]
    tokenizer: Tokenizer
    generation: dict[str, Any]
    source: str
    checked: bool = False


def refuse(path: Path, what: str, *, fix: str = COPY_AGAIN) -> NoReturn:
    """Raise the error for a weight file that is not what its header says."""
    raise ModelError(
        what,
        where=str(path),
        why="the file is truncated, altered or not a weight file; nothing was loaded",
        fix=fix,
        zh=f"权重文件有问题（{what}），未加载任何内容。请重新复制或下载",
    )


def refuse_impostor(path: Path, head: bytes) -> None:
    """Name the two things that most often stand where a weight file should be."""
    if head.startswith(b"version https://git-lfs"):
        refuse(path, "this is a Git LFS pointer, not the weights", fix="fetch the file itself:  git lfs pull")
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html>", b"<html lan") or head.lstrip()[:5] == b"<?xml":
        refuse(path, "this is a web page, not the weights", fix="download the file itself, not the page that shows it")


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read and check the header of a safetensors file; no tensor is touched.

    Returns:
        ``{name: {"dtype", "shape", "data_offsets"}}``.

    Raises:
        ModelError: the file is missing, truncated, or breaks a rule of the format; the message says which.
    """
    return read_whole_header(path)[0]


def read_whole_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """As :func:`read_header`; also the file's ``__metadata__``, and the byte at which the tensors begin."""
    if not path.is_file():
        raise ModelError(
            "the weight file is missing", where=str(path), fix=COPY_AGAIN, zh="缺少权重文件，请重新复制或下载"
        )
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(64)
        refuse_impostor(path, head)
        if size < 8:
            refuse(path, f"the file has {size} bytes, a safetensors file has at least 8")
        length = int.from_bytes(head[:8], "little")
        if length > min(MAX_HEADER, size - 8):
            refuse(path, f"the header claims {length} bytes; the file has {size} and a header at most {MAX_HEADER}")
        stream.seek(8)
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        refuse(path, "the header is not JSON")
    if not isinstance(header, dict):
        refuse(path, "the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse(path, "the metadata in the header is not an object of texts")
    check_offsets(path, header, size - 8 - length)
    return header, metadata, 8 + length


def check_offsets(path: Path, header: dict[str, Any], data_size: int) -> None:
    """Check that the tensors of a header fill exactly ``data_size`` bytes, one after another."""
    spans = []
    for name, entry in header.items():
        spans.append((*tensor_span(path, name, entry), name))
    position = 0
    for start, stop, name in sorted(spans):
        if start != position:
            kind = "overlaps the tensor before it" if start < position else "leaves a gap before it"
            refuse(path, f"the tensor '{name}' starts at byte {start}, expected {position}: it {kind}")
        position = stop
    if position != data_size:
        refuse(path, f"the header describes {position} bytes of tensors, the file holds {data_size}")


def tensor_span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """The first byte and the one after the last of a tensor, checked against its type and shape."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError):
        refuse(path, f"the entry of the tensor '{name}' lacks dtype, shape or data_offsets")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        refuse(path, f"the tensor '{name}' has a size or offset that is not a whole number")
    width = {**WEIGHT_TYPES, **BUFFER_TYPES}.get(dtype) if isinstance(dtype, str) else None
    if width is None:
        refuse(
            path,
            f"the tensor '{name}' is stored as {str(dtype)[:20]}, which is not a weight type",
            fix="known: " + ", ".join(WEIGHT_TYPES) + "; export the model in one of them",
        )
    expected = math.prod(shape) * width
    if stop - start != expected:
        refuse(path, f"the tensor '{name}' {shape} {dtype} needs {expected} bytes, its offsets span {stop - start}")
    return start, stop


def read_safetensors(path: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, memory-mapped: the pages are read when they are first used.

    Args:
        dtype: the precision to bring weights to. Those stored in another one are read and converted one by one, so that
            the file is never held in memory beside its converted form.

    Raises:
        ModelError: as :func:`read_header`.
    """
    header = read_header(path)
    other = {
        name for name, entry in header.items() if dtype is not None and TORCH_TYPES.get(entry["dtype"], dtype) != dtype
    }
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in header.keys() - other}
    if other:
        with path.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            for name in sorted(other, key=lambda name: int(header[name]["data_offsets"][0])):
                tensors[name] = read_tensor(stream, start, header[name]).to(dtype)
    return tensors


def read_tensor(stream: BinaryIO, start: int, entry: Mapping[str, Any]) -> Tensor:
    """One tensor of an open file whose data begin at ``start``, in the precision it is stored in."""
    first, last = entry["data_offsets"]
    stream.seek(start + first)
    data = bytearray(last - first)
    stream.readinto(data)  # type: ignore[attr-defined]
    stored = TORCH_TYPES[entry["dtype"]]
    flat = torch.frombuffer(data, dtype=stored) if data else torch.empty(0, dtype=stored)
    return flat.reshape(entry["shape"])


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors to a safetensors file.

    Raises:
        OSError: with the number the system gave; the Rust writer would hide it in a text.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # what this user gives to files; the writer would leave them readable by nobody else
    try:
        save_file(state, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        raise os_error_of(error, path) from error
    path.chmod(mode)


def check_size(config: TransformerConfig, num_tensors: int, where: str) -> None:
    """Refuse a configuration that the weights cannot fill, before a network of that size is built."""
    layers = config.num_layers + (config.encoder.num_layers if config.encoder else 0)
    if layers * 6 > num_tensors:  # two norms, two matrices of attention and two of the feed-forward, where fused
        raise ModelError(
            f"the configuration has {layers} layers, the weights are only {num_tensors} tensors",
            where=where,
            why="weights and configuration belong to different models, or the weights are incomplete",
            fix=COPY_AGAIN,
            zh=f"配置有 {layers} 层，权重却只有 {num_tensors} 个张量：不属于同一个模型，或不完整。请重新复制或下载",
        )
    attention = config.num_heads * config.head_dim
    largest = max(config.vocab_size, config.hidden_size, config.intermediate_size, attention)
    if largest > MAX_DIMENSION:
        raise ModelError(
            f"a dimension of {largest} is more than any model has ({MAX_DIMENSION})",
            where=where,
            why="the configuration is damaged, or made to exhaust the memory",
            fix=COPY_AGAIN,
            zh=f"维度 {largest} 超出任何模型（上限 {MAX_DIMENSION}）：配置已损坏或被篡改。请重新复制或下载",
        )


def check_vocabulary(tokenizer: Tokenizer, config: TransformerConfig, where: str) -> None:
    """Refuse a tokenizer that can produce ids for which the model has no embedding.

    The other way round (more embeddings than tokens) is common: exporters round the vocabulary up.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model knows only {config.vocab_size}",
            where=where,
            why="the tokenizer belongs to another model",
            fix="put the tokenizer.json of this model beside its weights",
            zh=f"分词器有 {tokenizer.vocab_size} 个编号，模型只有 {config.vocab_size} 个：它们不属于同一个模型",
        )


def known_ids(value: Any, vocab_size: int, where: str) -> list[int]:
    """One id or a list of ids as a list; None as an empty one, and so -1, by which some configurations mean it.

    Raises:
        ModelError: an id outside the vocabulary.
    """
    ids = [] if value in (None, -1) else value if isinstance(value, list) else [value]
    for number in ids:
        if type(number) is not int or not 0 <= number < vocab_size:
            raise ModelError(
                f"the token id {number!r} is not in the vocabulary of {vocab_size}",
                where=where,
                fix="correct the id, or copy or download the model again",
                zh=f"编号 {number!r} 不在词表的 {vocab_size} 个之内。请改正该编号，或重新复制或下载模型",
            )
    return list(ids)
