"""What makes training cheaper, applied from outside: recomputing, bfloat16, compiling; and how well it went."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hanmo.errors import ResourceError
from hanmo.language import pick
from hanmo.models.transformer import Block
from hanmo.settings import notice

COMPILE_SECONDS = 90.0  # what compiling the blocks of a network takes, at most, on a GPU machine
COMPILE_GAIN = 0.15  # of the time, at least

# Dense bfloat16 TFLOP/s with float32 sums, from the makers' data sheets (without sparsity); the longest name that a
# device's name contains counts.
PEAKS = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A6000": 154.8,
    "L40S": 362.0,
    "L40": 181.0,
    "L20": 119.5,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
    "MI250X": 383.0,
}


def blocks(model: nn.Module) -> list[Block]:
    """The blocks of all stacks of a model."""
    return [module for module in model.modules() if isinstance(module, Block)]


def checkpoint_blocks(model: nn.Module) -> int:
    """Keep only the input of each block for the backward pass, and compute the rest again (Chen et al. 2016).

    Memory for activations falls to one hidden state per layer plus one layer's activations; a step takes about a third
    longer. The result is the same, dropout included.

    Returns:
        How many blocks there are; a model without any is left as it is.
    """
    found = [block for block in blocks(model) if "forward" not in vars(block)]  # others are wrapped already
    for block in found:
        block.forward = recomputing(block, block.forward)  # type: ignore[method-assign]
    return len(found)


def recomputing(block: Block, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a block that forgets its activations while it trains."""

    def run(*inputs: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            return checkpoint(forward, *inputs, use_reentrant=False)
        return forward(*inputs)

    return run


def compile_blocks(model: nn.Module, device: torch.device, seconds: float | None, backend: str = "inductor") -> bool:
    """Compile the blocks if the run is long enough to win the time back, and say so.

    On CPUs our own kernels do what a compiler would, so nothing is compiled there.

    Args:
        seconds: expected length of the run; None: not known, taken as long.

    Returns:
        Whether the blocks will be compiled, which happens in the first steps.
    """
    if device.type != "cuda" or not blocks(model):
        return False
    least = COMPILE_SECONDS / COMPILE_GAIN
    if seconds is not None and seconds < least:
        notice(
            pick(
                f"not compiled: a run of {seconds:.0f} s is too short to win back the time (from {least:.0f} s on)",
                f"未编译：运行仅 {seconds:.0f} 秒，编译得不偿失（{least:.0f} 秒以上才编译）",
            )
        )
        return False
    # one by one, for they share what is compiled; not the call, to which sharding adds hooks that do not compile
    for block in blocks(model):
        block.forward = torch.compile(block.forward, backend=backend)  # type: ignore[method-assign]
    notice(
        pick(
            f"the blocks are compiled in the first steps, which takes up to {COMPILE_SECONDS:.0f} s",
            f"前几步会编译网络块，最多约 {COMPILE_SECONDS:.0f} 秒",
        )
    )
    return True


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 while weights and sums stay in float32 (``bf16``), or nothing (``fp32``).

    Raises:
        ResourceError: the GPU has no bfloat16.
    """
    if precision != "bf16":
        return nullcontext()
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ResourceError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16",
            where="--precision bf16",
            fix="train with --precision fp32",
            zh="该 GPU 不支持 bfloat16，请用 --precision fp32",
        )
    return torch.autocast(device.type, torch.bfloat16)


def peak_flops(device: torch.device, name: str | None = None) -> float | None:
    """Operations per second that a device can do at best: of a GPU in bfloat16, of a CPU measured in float32.

    Args:
        name: the device's name; None: asked of the device.

    Returns:
        None for a GPU that is not in the table.

    >>> peak_flops(torch.device("cuda"), "NVIDIA H100 PCIe") / 1e12
    756.0
    """
    if device.type == "cuda":
        name = name or torch.cuda.get_device_name(device)
        known = [key for key in PEAKS if all(word in name.replace("-", " ").split() for word in key.split())]
        return PEAKS[max(known, key=len)] * 1e12 if known else None
    return measured_flops() if device.type == "cpu" else None


def measured_flops(size: int = 768, repetitions: int = 8) -> float:
    """Operations per second of this machine's best float32 product, with the threads that torch uses now."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(repetitions):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def flops_utilization(flops_per_token: float, tokens_per_second: float, peak: float, devices: int = 1) -> float:
    """Model FLOPs utilisation (Chowdhery et al. 2022): needed operations per second over the devices' peak.

    Args:
        flops_per_token: forward and backward, without recomputation; see
            :func:`hanmo.models.cost.training_flops_per_token`.
        tokens_per_second: of all devices together.
        peak: operations per second of one device.
    """
    return flops_per_token * tokens_per_second / (peak * devices)


def even_micro_batch(batch_size: int, micro_batch: int, processes: int) -> int:
    """The largest micro-batch up to ``micro_batch`` with which all processes get equally much, as nearly as possible.

    >>> even_micro_batch(16, 16, 2), even_micro_batch(16, 6, 2), even_micro_batch(3, 8, 4)
    (8, 4, 1)
    """
    share = max(1, -(-batch_size // processes))
    return -(-share // -(-share // min(micro_batch, share)))
