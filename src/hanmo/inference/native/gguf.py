"""GGUF files in the native engine at their own bits: no weight goes through 32 bits unless it must be rounded.

What becomes of each type is said in ``blocks.py``. Matrices that the engine computes as one (queries, keys and values;
gate and up-projection) are brought to the widest of their kinds where a file mixes them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.inference.native.blocks import from_rows
from hanmo.inference.native.decoder import LoadedParts, Weights, prepare, reason_against
from hanmo.inference.native.layout import Matrix, Quantized, all_finite
from hanmo.inference.native.memory import Arena, vocabulary_reading
from hanmo.models.checkpoints.gguf import OpenedFile, open_file, read_rows, row_layout, unpermute
from hanmo.models.checkpoints.gguf_header import TENSOR_TYPES
from hanmo.models.checkpoints.weights import COPY_AGAIN, refuse
from hanmo.models.device import one_thread
from hanmo.models.tensors import check_shapes
from hanmo.models.transformer import Transformer, shapes_of


def open_gguf(path: str | Path, precision: str | None = None) -> LoadedParts | str:
    """Read a GGUF file into the engine's form, tensor by tensor.

    Args:
        precision: what weights are brought to, as :func:`~hanmo.inference.native.decoder.packed` says; None: their own
            bits.

    Returns:
        the parts of the decoder; or the reason why the engine cannot compute it.

    Raises:
        ModelError: the file is damaged, of an unknown architecture, or stored in a type that is not known.
    """
    path = Path(path)
    with vocabulary_reading():
        file = open_file(path)
    reason = reason_against(file.config)
    if reason:
        return reason
    with torch.device("meta"):
        expected = shapes_of(Transformer(file.config))
    try:
        check_shapes(expected, {name: source.shape for name, source in file.sources.items()})
    except ModelError as error:
        fix = error.fix or COPY_AGAIN
        raise ModelError(error.what, where=str(path), why=error.why, fix=fix, zh=error.zh) from None
    weights = Weights(lambda name: read_matrix(file, name), lambda name: read_vector(file, name))
    with one_thread() if precision is None else contextlib.nullcontext():  # only copying: thousands of short operations
        parts = prepare(file.config, weights, precision, Arena().place)
    return LoadedParts(file.config, parts, file.tokenizer, file.generation, str(path))


def read_matrix(file: OpenedFile, name: str) -> Matrix:
    """A matrix of the network by the name of its parameter, its rows in our order.

    Raises:
        ModelError: a weight or a scale is not a finite number.
    """
    source = file.sources[name]
    kind, _, _ = TENSOR_TYPES[source.info.type]
    _, _, size = row_layout(source.info)
    matrix = from_rows(kind, source.rows, size, lambda rows: torch.from_numpy(read_rows(file.path, source.info, rows)))
    numbers = [matrix] if isinstance(matrix, Tensor) else [matrix.scales_NG, matrix.minima_NG]
    check_finite(file.path, source.info.name, numbers)
    if source.heads:
        order = unpermute(torch.arange(len(source.rows)), source.heads)
        matrix = matrix.rows(order) if isinstance(matrix, Quantized) else matrix[order]
    return matrix


def read_vector(file: OpenedFile, name: str) -> Tensor | None:
    """A norm, bias or table in float32; None where the network has none of that name."""
    source = file.sources.get(name)
    if source is None:
        return None
    values = read_matrix(file, name)
    floats = values.float() if isinstance(values, Tensor) else values.dequantize()
    return floats.reshape(source.shape)


def check_finite(path: Path, name: str, tensors: list[Tensor] | list[Tensor | None]) -> None:
    """Refuse NaN and infinite numbers, which would make every later one the same."""
    for tensor in tensors:
        if tensor is not None and not all_finite(tensor):
            refuse(path, f"the tensor '{name}' holds NaN or infinite values, or scales beyond half precision")
