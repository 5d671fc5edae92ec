"""Where a model computes: the device and the number of threads."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from hanmo.errors import ResourceError, UsageError
from hanmo.settings import wanted_threads

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


def processors(root: Path = Path("/")) -> int:
    """How many processors this process may keep busy: those it may run on, within the quota of its control groups.

    Threads beyond the quota would not add speed: the kernel stops all of them for a part of each period, and where
    they meet, each waits for the one that is stopped. So a quota of 1.5 processors counts as one.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in control_groups(root) if (quota := quota_of(folder)) is not None]
    return max(1, int(min([float(allowed), *quotas])))


def control_groups(root: Path) -> list[Path]:
    """The folders of the control groups that share out processors to this process, and of those around them.

    Inside a container its own group may stand at the top while ``/proc`` has its name outside; both are looked at.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        hierarchy = root / "sys/fs/cgroup"
        if controllers:  # version 1: a hierarchy for some controllers
            hierarchy = next(
                (hierarchy / name for name in (controllers, "cpu") if (hierarchy / name).is_dir()), hierarchy
            )
        inside = Path(path.lstrip("/"))
        found += [hierarchy / part for part in (inside, *inside.parents) if ".." not in part.parts]
    return found


def quota_of(group: Path) -> float | None:
    """How many processors a control group may keep busy; None where it has no limit."""
    try:
        if (group / "cpu.max").is_file():  # version 2: "max 100000" or "150000 100000"
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()  # -1: no limit
            period = (group / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


LOADED_BY = os.getpid()


def compute_alone() -> None:
    """What a forked child does first: OpenMP would wait for ever for threads that only its parent has."""
    torch.set_num_threads(1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in this thread alone: for many operations that are so short that threads cost more than they
    save. Where other programs are at work, every operation would wait until the system lets its second thread run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=compute_alone)


def set_threads() -> None:
    """Prepare the CPU for computing: keep freed memory, and use as many threads as ``HANMO_THREADS`` says; by default
    as many as torch would, but no more than there are processors for this process. A process that was forked computes
    alone.

    Raises:
        UsageError: the value is not a positive whole number.
    """
    keep_freed_memory()
    if os.getpid() != LOADED_BY:
        return
    threads = wanted_threads()
    if threads is None and processors() < torch.get_num_threads():
        threads = processors()
    if threads is not None:
        torch.set_num_threads(threads)
