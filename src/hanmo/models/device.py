"""Where a model computes: the device and the number of threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from pathlib import Path

import torch

from hanmo.errors import ResourceError, UsageError

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of mallopt(3)


def choose_device(name: str) -> torch.device:
    """The device for a name; "auto" takes the fastest one present.

    Raises:
        UsageError: not the name of a device.
        ResourceError: this machine has no such device.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", name):
        raise UsageError(
            f"'{name}' is not a device", fix="write auto, cpu, cuda, cuda:1 or mps", zh=f"'{name}' 不是设备名"
        )
    device = torch.device(name)
    if (device.type == "cuda" and (device.index or 0) >= cuda) or (device.type == "mps" and not mps):
        raise ResourceError(
            f"this machine has no device '{name}' that torch can use",
            fix="use --device auto or --device cpu; hanmo doctor shows what there is",
            zh=f"本机没有 torch 可用的设备 '{name}'，请用 --device auto 或 --device cpu",
        )
    return device


def available_memory(device: torch.device | None = None) -> int:
    """Bytes of memory that may still be taken: of an accelerator, or of the machine within its control group."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            limits = [int(fields["MemAvailable"].split()[0]) * 1024]
    group = Path("/sys/fs/cgroup")
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (value := limit.read_text().strip()).isdigit():
        limits.append(max(0, int(value) - int(used.read_text())))
    return min(limits)


def keep_freed_memory() -> None:
    """Let the C library keep large blocks for the next request instead of giving each back to the system.

    A training step asks for the same large tensors again and again. When each is mapped anew, the kernel clears its
    pages every time: a product with a result of 134 MB then runs at 285 instead of 443 GFLOP/s (two Zen 5 cores).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def set_threads() -> None:
    """Prepare the CPU for computing: keep freed memory, and use as many threads as ``HANMO_THREADS`` says.

    Raises:
        UsageError: the value is not a positive whole number.
    """
    keep_freed_memory()
    value = os.environ.get("HANMO_THREADS", "").strip()
    if not value:
        return
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 1024:
        raise UsageError(f"HANMO_THREADS must be a whole number from 1 to 1024, not {value!r}", where="environment")
    torch.set_num_threads(int(value))
