"""As many threads as the process has processors, by affinity and control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hanmo.models import device
from hanmo.models.device import processors, set_threads


def tree(root: Path, files: dict[str, str]) -> Path:
    """A folder that looks like the system's."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "190000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "1600000 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.service\n",
                "sys/fs/cgroup/a.slice/b.service/cpu.max": "600000 100000\n",
                "sys/fs/cgroup/a.slice/cpu.max": "250000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "12:cpuset:/x\n4:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (  # seen from inside a container, whose own group stands at the top
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "500000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, 8),
        ({"proc/self/cgroup": "0::/../../etc\n\nrubbish\n", "etc/cpu.max": "100000 100000\n"}, 8),
    ],
)
def test_quotas_of_control_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert processors(tree(tmp_path, files)) == expected


def test_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert processors(tree(tmp_path, files)) == 2


def test_threads_are_no_more_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("HANMO_THREADS", raising=False)
    try:
        for there, expected in ((8, 3), (2, 2), (1, 1)):
            torch.set_num_threads(3)
            monkeypatch.setattr(device, "processors", lambda there=there: there)
            set_threads()
            assert torch.get_num_threads() == expected
        monkeypatch.setenv("HANMO_THREADS", "3")
        set_threads()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
