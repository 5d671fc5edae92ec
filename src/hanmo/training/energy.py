"""What a machine draws while it trains: measured, limited by its maker, or assumed, and always said which.

Watts are those of the processor or the accelerator; memory, fans and the power supply come on top.
"""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from hanmo.language import pick

POWERCAP = Path("/sys/class/powercap")
RANGE = "max_energy_range_uj"  # where a counter begins anew
WATTS_PER_THREAD, WATTS_OF_GPU, WATTS_OF_LAPTOP = 10.0, 300.0, 30.0  # where nothing can be asked


@dataclass(frozen=True)
class Power:
    """What a machine draws while it trains.

    Attributes:
        watts: of the processor or the accelerator, the rest of the machine left out.
        source: where the number is from, in the user's language.
        measured: read from a meter; else a limit or an assumption.
    """

    watts: float
    source: str
    measured: bool = False

    def watt_hours(self, seconds: float) -> float:
        """The energy of so long a run."""
        return self.watts * seconds / 3600


def packages(root: Path = POWERCAP) -> list[Path]:
    """The processor packages that Linux's power capping knows (Intel and AMD), without their parts."""
    found = [zone for zone in root.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", zone.name)]
    return [zone for zone in sorted(found) if "package" in (read_text(zone / "name") or "package")]


def read_text(path: Path) -> str | None:
    """What a file of the system says; None where it cannot be read (many are for the administrator alone)."""
    try:
        return path.read_text().strip()
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """The whole number in a file of the system."""
    text = read_text(path)
    return int(text) if text and text.isdigit() else None


class EnergyMeter:
    """The energy that all processor packages use while a block runs, from their own counters (RAPL).

    Attributes:
        joules: None where the counters cannot be read.
        seconds: how long the block took.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self.zones = packages(root)
        self.joules: float | None = None
        self.seconds = 0.0
        self.before: list[int | None] = []

    def counters(self) -> list[int | None]:
        """Microjoules of every package, from an arbitrary beginning."""
        return [read_number(zone / "energy_uj") for zone in self.zones]

    def __enter__(self) -> EnergyMeter:
        self.before, self.began = self.counters(), time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self.began
        used = 0
        for zone, before, after in zip(self.zones, self.before, self.counters(), strict=True):
            if before is None or after is None:
                return
            used += after - before if after >= before else after - before + (read_number(zone / RANGE) or 0)
        self.joules = used / 1e6 if self.zones else None

    @property
    def watts(self) -> float | None:
        """The mean power while the block ran."""
        return None if self.joules is None or not self.seconds else self.joules / self.seconds


def power_of(
    device: torch.device, measured: float | None = None, *, threads: int | None = None, root: Path = POWERCAP
) -> Power:
    """What a device draws under load.

    Args:
        measured: watts of the processor that an :class:`EnergyMeter` found under load.
        threads: that compute; default: torch's.
    """
    if device.type == "cuda":
        return power_of_gpu(device.index or 0)
    if device.type == "mps":
        return Power(WATTS_OF_LAPTOP, pick("assumed for such a laptop", "按此类笔记本假定"))
    if measured:
        return Power(measured, pick("measured on the whole processor", "整个处理器的实测值"), measured=True)
    limits = [read_number(zone / "constraint_0_power_limit_uw") for zone in packages(root)]
    if limits and all(limits):
        watts = sum(limit or 0 for limit in limits) / 1e6
        return Power(watts, pick("the processor's own limit", "处理器的功耗上限"))
    threads = threads or torch.get_num_threads()
    return Power(
        WATTS_PER_THREAD * threads,
        pick(
            f"assumed: {WATTS_PER_THREAD:g} W for each of {threads} threads",
            f"假定：{threads} 个线程，每个 {WATTS_PER_THREAD:g} W",
        ),
    )


def power_of_gpu(index: int) -> Power:
    """The power limit that the driver of an NVIDIA card enforces, or an assumption."""
    query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        watts = float(done.stdout.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return Power(WATTS_OF_GPU, pick("assumed for a GPU", "按一块 GPU 假定"))
    return Power(watts, pick("the GPU's own limit", "GPU 的功耗上限"))
