"""Quantised folders: a model in the engine's form on disk, which is mapped into memory and used as it lies there.

The layout is that of Hugging Face (``config.json``, ``tokenizer.json``, ...) and ``hanmo.json`` with the hash of every
file. ``packed.safetensors`` holds the parts of :func:`~hanmo.inference.native.decoder.prepare`: of a matrix its
``<name>.values`` and ``<name>.scales`` as ``src/matrix.h`` describes them, of a vector its float32 numbers. Metadata in
its header say the kind and size of each matrix. Every tensor begins at a multiple of 64 bytes of the file (tensors
named ``padding.<n>`` fill the gaps, blanks the header). The same bytes serve every machine.

``config.json`` has a ``quantization_config`` with a method of ours, and there is no ``model.safetensors``, so that
programs which do not know the form say so instead of loading something else.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.folder import MANIFEST, atomic_folder, listed_files, read_manifest, write_json
from hanmo.inference.native.decoder import LoadedParts, reason_against, sizes_of_parts
from hanmo.inference.native.layout import KINDS, Packed, all_finite, shapes_of_packed
from hanmo.inference.native.memory import ALIGNMENT, huge_memory, vocabulary_reading
from hanmo.inference.native.model import Parts
from hanmo.models.architectures import write_config
from hanmo.models.checkpoints.huggingface import OWN_METHOD, check_manifest, read_config, read_generation, read_object
from hanmo.models.checkpoints.save import default_card, generation_entries
from hanmo.models.checkpoints.weights import check_size, check_vocabulary, read_whole_header, refuse
from hanmo.models.transformer import TransformerConfig
from hanmo.text.tokenizer import Tokenizer

METHOD, VERSION = OWN_METHOD, 1  # of quantization_config; the version of this layout
WEIGHTS = "packed.safetensors"
PADDING = "padding."
READ_UP_TO = 1 << 30  # bytes of weights that are read into huge pages (about 0.3 s); more are mapped
TYPES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}  # as safetensors calls them


def is_quantized(folder: Path) -> bool:
    """Whether a folder is one of these."""
    path = folder / "config.json"
    method = read_object(path).get("quantization_config") if path.is_file() else None
    return isinstance(method, dict) and method.get("quant_method") == METHOD


# Writing --------------------------------------------------------------------------------------------------------------


def save_quantized(
    target: str | Path, loaded: LoadedParts, *, provenance: dict[str, Any], card: str | None = None
) -> None:
    """Write a quantised folder, completely or not at all.

    Args:
        target: what stands there is replaced once the new folder is whole.
        loaded: the decoder in the engine's form.
        provenance: further entries of ``hanmo.json``: what it was made from and how, licence, ``prompt_prefix``...
        card: the text of ``README.md``; default: :func:`quantized_card`.

    Raises:
        ResourceError: the disk is full or cannot be written; an older folder at ``target`` is intact.
    """
    target = Path(target)
    config, tokenizer = loaded.config, loaded.tokenizer
    generation = generation_entries(config, tokenizer, loaded.generation)
    special = {key: value for key, value in generation.items() if key.endswith("_token_id")}
    precision = precision_of(loaded.parts)
    method = {"quant_method": METHOD, "version": VERSION, "precision": precision}
    form = {"form": "quantized", "form_version": VERSION, "precision": precision, "kinds": kinds_of(loaded.parts)}
    with atomic_folder(target, {**provenance, **form}) as folder:
        write_parts(folder / WEIGHTS, loaded.parts)
        tokenizer.save(folder)
        write_json(folder / "config.json", {**write_config(config), **special, "quantization_config": method})
        write_json(folder / "generation_config.json", generation)
        text = quantized_card(target.name, loaded, provenance) if card is None else card
        (folder / "README.md").write_text(text, encoding="utf-8")


def kinds_of(parts: Parts) -> dict[str, int]:
    """How many weights there are in each kind."""
    kinds: dict[str, int] = {}
    for part in parts.values():
        if isinstance(part, Packed):
            kinds[part.kind] = kinds.get(part.kind, 0) + part.outputs * part.inputs
    return kinds


def precision_of(parts: Parts) -> str:
    """What people call the form: the kind of most weights within the layers."""
    kinds = kinds_of({name: part for name, part in parts.items() if name.startswith("layers.")})
    return max(kinds, key=lambda kind: kinds[kind]).removesuffix("-minimum")


def quantized_card(name: str, loaded: LoadedParts, provenance: dict[str, Any]) -> str:
    """A model card that says, besides what is known of every model, in how many bits the weights are and who reads
    them."""
    card = default_card(name, loaded.config, provenance, library=METHOD)
    kinds = kinds_of(loaded.parts)
    total = sum(kinds.values())
    shares = ", ".join(f"{kind} {count / total:.0%}" for kind, count in kinds.items())
    bits = 8 * loaded.weight_bytes / total
    return card + "\n".join(
        [
            "",
            "## Quantised weights / 量化权重",
            "",
            f"{bits:.2f} bits per weight ({shares}), in groups of 32. They are read by Hanmo's engine for CPUs; "
            "for other programs export the original model.",
            "",
            f"每个权重 {bits:.2f} 位（{shares}），每 32 个一组。由翰墨的 CPU 引擎读取；其他程序请使用原模型的导出。",
            "",
            *calibration_lines(provenance.get("quantized", {}).get("calibration")),
        ]
    )


def calibration_lines(record: dict[str, Any] | None) -> list[str]:
    """What the rounding was calibrated with, in words."""
    if not record:
        return []
    files, tokens = [file["file"] for file in record["files"]], record["tokens"]
    return [
        f"Rounding was calibrated on {tokens:,} tokens " + (f"of {', '.join(files)}." if files else "of its own."),
        "",
        f"舍入用 {tokens:,} 个词元校准，取自" + (f" {'、'.join(files)}。" if files else "模型自己生成的文本。"),
        "",
    ]


def tensors_of(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the file, matrices in the order of the network."""
    for name, part in parts.items():
        if isinstance(part, Packed):
            yield f"{name}.values", part.values
            if part.scales.numel():
                yield f"{name}.scales", part.scales
        else:
            yield name, part.float()


def write_parts(path: Path, parts: Parts) -> None:
    """Write the parts as a safetensors file in which every tensor begins at a multiple of 64 bytes."""
    matrices = {
        name: [part.kind, part.outputs, part.inputs] for name, part in parts.items() if isinstance(part, Packed)
    }
    sums = {name: zlib.crc32(data_of(tensor)) for name, tensor in tensors_of(parts)}
    metadata = {"format": METHOD, "version": str(VERSION), "matrices": json.dumps(matrices), "crc32": json.dumps(sums)}
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, tensor in tensors_of(parts):
        end = position + tensor.nbytes
        header[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end + -end % ALIGNMENT
        if position > end:
            header[f"{PADDING}{len(header)}"] = {
                "dtype": "U8",
                "shape": [position - end],
                "data_offsets": [end, position],
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors_of(parts):
            stream.write(data_of(tensor))
            stream.write(bytes(-tensor.nbytes % ALIGNMENT))


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


# Reading --------------------------------------------------------------------------------------------------------------


def open_quantized(folder: str | Path, *, mapped: bool | None = None) -> LoadedParts:
    """Open a quantised folder.

    The order is: the manifest (size and SHA-256 of every file), the configuration, the header of the weights, the
    tokenizer, and only then the weights.

    Args:
        mapped: the engine reads from the file as it lies in the system's cache, which all processes share. False: from
            memory of this process in huge pages (``memory.py``), which is faster once it is read. None: read where that
            takes a moment only (up to 1 GB).

    Raises:
        ModelError: something is missing, damaged, of an unknown version, or does not fit together.
    """
    folder = Path(folder)
    check_form(folder)
    check_files(folder)
    raw = read_object(folder / "config.json")
    raw.pop("quantization_config", None)
    config = read_config(raw, folder / "config.json")
    reason = reason_against(config)
    if reason:
        raise ModelError(
            f"the configuration describes no decoder of the native engine: {reason}",
            where=str(folder / "config.json"),
            fix="copy the folder again, or quantize the original model again",
            zh="config.json 描述的不是本地引擎能计算的解码器。请重新复制，或从原模型重新量化",
        )
    header, metadata, start = read_whole_header(folder / WEIGHTS)
    check_size(config, len(header), str(folder))
    with vocabulary_reading():
        tokenizer = Tokenizer.load(folder)
        generation = read_generation(folder, raw, config, tokenizer)
    check_vocabulary(tokenizer, config, str(folder / "tokenizer.json"))
    matrices = read_matrices(folder / WEIGHTS, metadata)
    check_header(folder / WEIGHTS, header, start, config, matrices)
    if mapped is None:
        mapped = (folder / WEIGHTS).stat().st_size > READ_UP_TO
    read = map_file(folder / WEIGHTS) if mapped else read_file(folder / WEIGHTS)
    parts = parts_of_file(folder / WEIGHTS, header, start, matrices, read)
    return LoadedParts(config, parts, tokenizer, generation, str(folder))


def check_form(folder: Path) -> None:
    """Check that the folder is one of ours, of a version that is known, and lists its weights."""
    method = read_object(folder / "config.json").get("quantization_config")
    version = method.get("version") if isinstance(method, dict) else None
    if not isinstance(method, dict) or method.get("quant_method") != METHOD or version != VERSION:
        raise ModelError(
            f"the folder is not quantised in a form that is known, but in {str(method)[:100]}",
            where=str(folder / "config.json"),
            fix="update Hanmo, or quantize the original model again:  hanmo quantize MODEL FOLDER",
            zh="这个文件夹的量化形式无法识别。请更新 Hanmo，或从原模型重新量化：hanmo quantize 模型 文件夹",
        )
    if WEIGHTS not in listed_files(folder, read_manifest(folder)):
        raise ModelError(
            f"the manifest does not list {WEIGHTS}",
            where=str(folder / MANIFEST),
            why="without its hash nobody could tell whether the weights are whole",
            fix="copy the whole folder again",
            zh=f"清单中没有 {WEIGHTS}，无法确认权重是否完整。请重新复制整个文件夹",
        )


def check_files(folder: Path) -> None:
    """Compare sizes and hashes of all files with the manifest; where the weights differ, say in which tensor."""
    try:
        check_manifest(folder)
    except ModelError as error:
        path = folder / WEIGHTS
        name = damaged_tensor(path) if error.where == str(path) and path.is_file() else None
        if name is None:
            raise
        raise ModelError(
            f"the tensor '{name}' is damaged: {error.what}",
            where=str(path),
            why=error.why,
            fix=error.fix,
            zh=f"张量 '{name}' 已损坏。{error.zh}",
        ) from None


def damaged_tensor(path: Path) -> str | None:
    """The first tensor whose bytes do not give the checksum that the header has for it."""
    try:
        header, metadata, start = read_whole_header(path)
        sums = json.loads(metadata["crc32"])
        with path.open("rb") as stream:
            for name, expected in sums.items():
                first, last = header[name]["data_offsets"]
                stream.seek(start + first)
                if zlib.crc32(stream.read(last - first)) != expected:
                    return str(name)[:80]
    except (ModelError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        pass  # the header is what is damaged
    return None


def read_matrices(path: Path, metadata: Mapping[str, str]) -> dict[str, tuple[str, int, int]]:
    """Kind, outputs and inputs of each matrix, from the metadata of the header."""
    try:
        described = json.loads(metadata["matrices"])
        matrices = {str(name): (kind, outputs, inputs) for name, (kind, outputs, inputs) in described.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        refuse(path, "the header does not describe its matrices")
    for name, (kind, outputs, inputs) in matrices.items():
        if not isinstance(kind, str) or kind not in KINDS or type(outputs) is not int or type(inputs) is not int:
            refuse(path, f"the matrix '{name[:80]}' is of no kind and size that is known")
    return matrices


def check_header(
    path: Path,
    header: Mapping[str, Mapping[str, Any]],
    start: int,
    config: TransformerConfig,
    matrices: Mapping[str, tuple[str, int, int]],
) -> None:
    """Compare names, types, shapes and places of all tensors with what the configuration asks for."""
    wanted = sizes_of_parts(config)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, size in wanted.items():
        if len(size) == 1:
            expected[name] = (torch.float32, size)
            continue
        kind, outputs, inputs = matrices.get(name, ("", 0, 0))
        if (outputs, inputs) != size:
            given = f"{outputs} x {inputs}" if kind else "missing"
            refuse(path, f"the matrix '{name}' is {given}, the configuration asks for {size[0]} x {size[1]}")
        for suffix, form in shapes_of_packed(kind, outputs, inputs).items():
            expected[f"{name}.{suffix}"] = form
    stored = {name: entry for name, entry in header.items() if not name.startswith(PADDING)}
    unknown = sorted(stored.keys() - expected.keys()) + sorted(matrices.keys() - wanted.keys())
    missing = sorted(expected.keys() - stored.keys())
    if unknown or missing:
        name, what = (missing[0], "is missing") if missing else (unknown[0], "belongs to no part of this network")
        refuse(path, f"the tensor '{name[:80]}' {what}")
    for name, (dtype, shape) in expected.items():
        entry = stored[name]
        if entry["dtype"] != TYPES[dtype] or tuple(entry["shape"]) != shape:
            given = f"{entry['dtype']} {entry['shape']}"
            refuse(path, f"the tensor '{name}' is {given}, expected {TYPES[dtype]} {list(shape)}")
        if (start + entry["data_offsets"][0]) % ALIGNMENT:
            refuse(path, f"the tensor '{name}' does not begin at a multiple of {ALIGNMENT} bytes")


def map_file(path: Path) -> Callable[[int, int], Tensor]:
    """A function that gives the bytes of a file from one place to another, without reading them."""
    with path.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants to write; nobody does
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the map alive
    return lambda first, last: whole[first:last]


def read_file(path: Path) -> Callable[[int, int], Tensor]:
    """As :func:`map_file`, but read into huge pages."""
    with path.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        whole = huge_memory(size)[:size]
        place, count = whole.numpy().data, 0
        while count < size and (more := stream.readinto(place[count:])):  # the system gives 2 GB at a time
            count += more
    return lambda first, last: whole[first : min(last, count)]


def parts_of_file(
    path: Path,
    header: Mapping[str, Mapping[str, Any]],
    start: int,
    matrices: Mapping[str, tuple[str, int, int]],
    read: Callable[[int, int], Tensor],
) -> Parts:
    """The parts in a checked file.

    Raises:
        ModelError: a number is not finite.
    """
    types = {name: dtype for dtype, name in TYPES.items()}

    def tensor(name: str) -> Tensor:
        first, last = header[name]["data_offsets"]
        raw = read(start + first, start + last)
        if len(raw) != last - first:
            refuse(path, "the file was changed while it was read")
        values = raw.view(types[header[name]["dtype"]]).view(header[name]["shape"])
        if values.is_floating_point() and not all_finite(values):
            refuse(path, f"the tensor '{name}' holds NaN or infinite values")
        return values

    parts: Parts = {}
    for name, (kind, outputs, inputs) in matrices.items():
        has_scales = f"{name}.scales" in header
        values = tensor(f"{name}.values")
        scales = tensor(f"{name}.scales") if has_scales else torch.empty(0, dtype=torch.float16)
        parts[name] = Packed(kind, outputs, inputs, values, scales)
    of_matrices = {f"{name}.{suffix}" for name in matrices for suffix in ("values", "scales")}
    for name in header:
        if name not in of_matrices and not name.startswith(PADDING):
            parts[name] = tensor(name)
    return parts
