"""Weights in the form in which the native engine reads them: quantised in groups of 32 inputs, packed in panels.

The packed layout is described in ``src/matrix.h``. Here are the numbers before packing: a matrix ``[N, K]`` as integers
``[N, K/32, 32]`` with a scale (and perhaps a minimum) per group, in half precision.

Letters in names: N outputs, K inputs, G groups of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hanmo.errors import ModelError

PANEL, GROUP, STEP = 16, 32, 4
CHUNK = 1 << 18  # weights that are packed at a time: they stay in the cache of the processor
WIDE = 4  # groups that share a scale in "int8-wide"
KINDS = {"fp32": 0, "fp16": 1, "int8": 2, "int4": 3, "int4-minimum": 4, "int8-wide": 5}  # as in src/matrix.h
FLOAT_TYPES = {"fp32": torch.float32, "fp16": torch.float16}
OFFSETS = {"int8": 128, "int8-wide": 128, "int4": 8, "int4-minimum": 0}


@dataclass(frozen=True)
class Quantized:
    """A matrix as integers; a weight is ``scale * (integer - offset) + minimum``.

    Attributes:
        kind: "int8", "int8-wide", "int4" or "int4-minimum".
        integers_NGI: uint8 ``[N, G, 32]``, offset included: 1 to 255, or 0 to 15.
        scales_NG, minima_NG: float16; with "int8-wide" a scale for every four groups, the last of which may be fewer.
    """

    kind: str
    integers_NGI: Tensor
    scales_NG: Tensor
    minima_NG: Tensor | None = None
    inputs: int = 0  # K, where the last group is not full

    @property
    def size(self) -> tuple[int, int]:
        """Outputs and inputs."""
        N, G, _ = self.integers_NGI.shape
        return N, self.inputs or G * GROUP

    @property
    def tensors(self) -> list[Tensor]:
        """Integers, scales, and minima where there are any."""
        return [part for part in (self.integers_NGI, self.scales_NG, self.minima_NG) if part is not None]

    def dequantize(self) -> Tensor:
        """The weights, float32 ``[N, K]``."""
        scales_NG = self.scales_NG.float()
        if self.kind == "int8-wide":
            scales_NG = scales_NG.repeat_interleave(WIDE, 1)[:, : self.integers_NGI.size(1)]
        weights = (self.integers_NGI.float() - OFFSETS[self.kind]) * scales_NG.unsqueeze(-1)
        if self.minima_NG is not None:
            weights = weights + self.minima_NG.float().unsqueeze(-1)
        return weights.flatten(1)[:, : self.size[1]]

    def rows(self, order: Tensor) -> Quantized:
        """The given rows, in that order."""
        return self.joined([self], lambda tensors: tensors[0][order])

    def joined(self, parts: Sequence[Quantized], join: Callable[[Sequence[Tensor]], Tensor]) -> Quantized:
        """Matrices of one kind made one by a function of their tensors."""
        minima = [part.minima_NG for part in parts if part.minima_NG is not None]
        integers, scales = join([part.integers_NGI for part in parts]), join([part.scales_NG for part in parts])
        return Quantized(self.kind, integers, scales, join(minima) if minima else None, self.inputs)


Matrix = Tensor | Quantized  # weights [N, K], as floats or quantised


@dataclass(frozen=True)
class Packed:
    """A matrix in the engine's layout.

    Attributes:
        kind: one of ``KINDS``.
        outputs, inputs: before they are filled up.
        values: uint8 bytes, or floats.
        scales: float16; empty for floats.
    """

    kind: str
    outputs: int
    inputs: int
    values: Tensor
    scales: Tensor


def all_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinite number. (Half precision by its bits: no processor is quick at it.)"""
    if values.dtype != torch.float16:
        return bool(values.isfinite().all())
    bits = values.contiguous().view(torch.int16).numpy()
    return not bits.size or int((bits & 0x7FFF).max()) < 0x7C00


def filled(x: Tensor, rows: int, value: float = 0) -> Tensor:
    """The same with more rows, which hold one value."""
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_full((rows - len(x), *x.shape[1:]), value)])


def stack(parts: Sequence[Matrix]) -> Matrix:
    """Matrices of one kind, one above the other."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    same = [part for part in parts if isinstance(part, Quantized) and part.kind == first.kind]
    if len(same) < len(parts):
        raise ModelError(
            "matrices that are joined have different kinds of weights",
            fix="bring them to one kind first",
            zh="要合并的矩阵权重类型不同，请先统一类型",
        )
    return first.joined(same, lambda tensors: torch.cat(list(tensors)))


def with_rows(matrix: Matrix, rows: int) -> Matrix:
    """The same with more rows, all zero."""
    if isinstance(matrix, Tensor):
        return filled(matrix, rows)
    integers, scales = filled(matrix.integers_NGI, rows, OFFSETS[matrix.kind]), filled(matrix.scales_NG, rows)
    minima = None if matrix.minima_NG is None else filled(matrix.minima_NG, rows)
    return Quantized(matrix.kind, integers, scales, minima, matrix.inputs)


def alternate(first: Matrix, second: Matrix) -> Matrix:
    """Sixteen rows of the one, sixteen of the other, and so on: a gate stands beside what it multiplies."""
    if isinstance(first, Tensor):
        assert isinstance(second, Tensor)
        return alternated([first, second])
    both = [part for part in (first, second) if isinstance(part, Quantized) and part.kind == first.kind]
    if len(both) < 2:
        raise ModelError(
            "a gate and what it multiplies have different kinds of weights",
            fix="bring them to one kind first",
            zh="门控矩阵与所乘矩阵的权重类型不同，请先统一类型",
        )
    return first.joined(both, alternated)


def alternated(parts: Sequence[Tensor]) -> Tensor:
    """Panels of tensors by turns."""
    return torch.stack([part.reshape(-1, PANEL, *part.shape[1:]) for part in parts], 1).flatten(0, 2)


def panels_of(count: int) -> int:
    """How many panels so many outputs take."""
    return -(-count // PANEL)


def pack(matrix: Quantized) -> Packed:
    """Bring integers into panels: ``[panel][group][step][output][input]``, two steps in a byte at 4 bits."""
    (N, K), P = matrix.size, panels_of(matrix.size[0])
    q = filled(matrix.integers_NGI, P * PANEL, OFFSETS[matrix.kind]).contiguous().view(torch.int32)  # a step each
    steps_PGSO = q.view(P, PANEL, -(-K // GROUP), GROUP // STEP).permute(0, 2, 3, 1)
    values = torch.empty(shapes_of_packed(matrix.kind, N, K)["values"][1], dtype=torch.uint8)
    count = max(1, CHUNK // (PANEL * K))
    for start in range(0, P, count):
        steps = steps_PGSO[start : start + count]
        if matrix.kind not in ("int8", "int8-wide"):
            steps = steps[:, :, 0::2] | (steps[:, :, 1::2] << 4)
        values[start : start + count].view(torch.int32).squeeze(-1).copy_(steps)
    scales = panel_scales(matrix.scales_NG, P)
    if matrix.minima_NG is not None:
        scales = torch.stack([scales, panel_scales(matrix.minima_NG, P)], dim=2)
    return Packed(matrix.kind, N, K, values, scales)


def shapes_of_packed(kind: str, outputs: int, inputs: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of the tensors of a packed matrix: "values", and "scales" where it has any."""
    P, G = panels_of(outputs), -(-inputs // GROUP)
    if kind in FLOAT_TYPES:
        return {"values": (FLOAT_TYPES[kind], (P, inputs, PANEL))}
    steps = GROUP // STEP // (1 if kind in ("int8", "int8-wide") else 2)
    if kind == "int8-wide":
        return {
            "values": (torch.uint8, (P, G, steps, PANEL, STEP)),
            "scales": (torch.float16, (P, -(-G // WIDE), PANEL)),
        }
    scales = (P, G, 2, PANEL) if kind == "int4-minimum" else (P, G, PANEL)
    return {"values": (torch.uint8, (P, G, steps, PANEL, STEP)), "scales": (torch.float16, scales)}


def panel_scales(scales_NG: Tensor, panels: int) -> Tensor:
    """``[panel][group][output]``."""
    return filled(scales_NG, panels * PANEL).view(panels, PANEL, -1).transpose(1, 2).contiguous()


def pack_floats(weights_NK: Tensor, kind: str = "fp32") -> Packed:
    """Bring floats into panels: ``[panel][input][output]``."""
    N, K = weights_NK.shape
    values = (
        filled(weights_NK.to(FLOAT_TYPES[kind]), panels_of(N) * PANEL).view(-1, PANEL, K).transpose(1, 2).contiguous()
    )
    return Packed(kind, N, K, values, torch.empty(0, dtype=torch.float16))


def unpack(packed: Packed) -> Tensor:
    """The weights of a packed matrix, float32 ``[N, K]``."""
    N, K = packed.outputs, packed.inputs
    if packed.kind in ("fp32", "fp16"):
        return packed.values.float().transpose(1, 2).reshape(-1, K)[:N]
    values, scales, minima = packed.values, packed.scales, None
    if packed.kind not in ("int8", "int8-wide"):
        values = torch.stack([values & 15, values >> 4], dim=3).flatten(2, 3)
    if packed.kind == "int4-minimum":
        scales, minima = packed.scales[:, :, 0], packed.scales[:, :, 1]
    P, G = values.shape[:2]
    q = values.view(P, G, GROUP // STEP, PANEL, STEP).permute(0, 3, 1, 2, 4).reshape(P * PANEL, G, GROUP)
    back = [None if s is None else s.transpose(1, 2).reshape(P * PANEL, -1)[:N] for s in (scales, minima)]
    assert back[0] is not None
    return Quantized(packed.kind, q[:N], back[0], back[1]).dequantize()[:, :K]
