"""How the processes of a run find their places and meet: the launcher's variables, devices, connections."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from hanmo.errors import ResourceError, UsageError
from hanmo.models.device import choose_device, set_threads
from hanmo.training.launch import DEATH_SECONDS, LAUNCHER, RENDEZVOUS, cores, restarts

MEETING = timedelta(minutes=10)  # for all processes to come together, and in a step for each to answer


@dataclass(frozen=True)
class Place:
    """Where this process stands among all of them, and among those of its machine."""

    rank: int
    count: int
    local_rank: int
    local_count: int
    restarts: int = 0

    @property
    def restarted(self) -> bool:
        """Whether a launcher started the processes again after one of them died: go on as with ``--resume``."""
        return self.restarts > 0


def from_environment() -> Place | None:
    """The place that torchrun, Slurm's wrapper script or ``--devices`` gave this process; None if it is alone.

    Raises:
        UsageError: the variables are incomplete or contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name].strip() for name in names if os.environ.get(name, "").strip()}
    if not {"RANK", "WORLD_SIZE"} & set(given):
        return None
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in given]
    if missing or not all(value.isascii() and value.isdigit() for value in given.values()):
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(
            f"the variables of a distributed run are incomplete: {', '.join(missing) or found}",
            where="environment",
            why="they say which of how many processes this is",
            fix="start it with  torchrun --nproc-per-node N -m hanmo ...  or with --devices N, or unset them",
            zh=f"分布式训练的环境变量不完整（{found}）。请用 torchrun 或 --devices N 启动，或清除这些变量",
        )
    rank, count, local = (int(given[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= count:
        raise UsageError(
            f"RANK={rank} is not below WORLD_SIZE={count}", where="environment", zh="RANK 必须小于 WORLD_SIZE"
        )
    return None if count == 1 else Place(rank, count, local, int(given.get("LOCAL_WORLD_SIZE", 1)), restarts())


def device_of(place: Place, name: str) -> torch.device:
    """The device of this process: its own GPU, or the processors that all share.

    Raises:
        ResourceError: there are more processes than GPUs.
        UsageError: a device that processes cannot share or talk over.
    """
    device = choose_device(name)
    if device.type == "mps" and name == "auto":
        device = torch.device("cpu")
    if device.type == "mps" or device.index is not None:
        raise UsageError(
            f"several processes cannot share the device '{name}'",
            where="--device",
            fix="write cuda (each process takes its own GPU) or cpu",
            zh=f"多个进程不能共用设备 '{name}'；请写 cuda（每个进程一块 GPU）或 cpu",
        )
    if device.type == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise ResourceError(
                f"process {place.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
                fix=f"start {torch.cuda.device_count()} processes per machine (--devices, --nproc-per-node)",
                zh=f"本机只有 {torch.cuda.device_count()} 块 GPU，少于进程数；请减少 --devices 或 --nproc-per-node",
            )
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    return device


def divide_threads(place: Place) -> None:
    """Give each process of a machine its part of the cores; ``HANMO_THREADS`` overrides it."""
    if os.environ.get("HANMO_THREADS", "").strip():
        set_threads()
    else:
        torch.set_num_threads(max(1, cores() // place.local_count))


def meet(place: Place, device: torch.device) -> None:
    """Wait for all processes and connect them: gloo for tensors in memory, NCCL for those on GPUs.

    Raises:
        ResourceError: some never came, or the port of the meeting is taken.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    address = os.environ.get(RENDEZVOUS, "")
    where = address or f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{address}" if address else "env://",
            rank=place.rank,
            world_size=place.count,
            timeout=MEETING,
        )
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0][:300]
        taken = "EADDRINUSE" in str(error) or "in use" in str(error)
        raise ResourceError(
            f"the port of the meeting is taken: {where}" if taken else f"the {place.count} processes did not meet",
            where="" if taken else where,
            why=text,
            fix="give torchrun another --master-port"
            if taken
            else "check that every machine started, runs the same command and reaches this address (MASTER_ADDR)",
            zh=f"端口已被占用（{where}），请用 torchrun --master-port 换一个"
            if taken
            else f"{place.count} 个进程未能会合（{where}）。请检查每台机器是否都已启动并能访问该地址",
        ) from error


def code_fingerprint() -> str:
    """A hash of Hanmo's own source, and torch's version: all processes must compute the same."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"hanmo {digest.hexdigest()[:12]}, torch {torch.__version__}"


def model_fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes, types and training flags of all parameters."""
    parts = [(n, list(p.shape), str(p.dtype), p.requires_grad) for n, p in model.named_parameters()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextmanager
def connected() -> Iterator[None]:
    """Turn a broken connection, wherever in the block it shows, into an error that says what it means.

    Under our launcher the process then waits to be ended by it, so that the process that failed is seen first.

    Raises:
        ResourceError: another process ended, or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_connection_error(error):
            raise
        if os.environ.get(LAUNCHER):
            time.sleep(DEATH_SECONDS)
        why = str(error).splitlines()[0][:200]
        if "timed out" in str(error).lower():
            minutes = MEETING.total_seconds() / 60
            raise ResourceError(
                f"another process of this run did not answer for {minutes:g} minutes",
                why=why,
                fix="look for what holds it up (a disk, a GPU, the network); then start again with --resume",
                zh=f"本次运行的另一个进程 {minutes:g} 分钟没有响应。请检查其磁盘、GPU 或网络，再用 --resume 继续",
            ) from error
        raise ResourceError(
            "another process of this run has ended",
            why=why,
            fix="its own message says why; start again with --resume, the checkpoints are intact",
            zh="本次运行的另一个进程已结束；原因见它自己的报错。检查点完好，可用 --resume 继续",
        ) from error


def is_connection_error(error: RuntimeError) -> bool:
    """Whether an error is of the connection between processes; gloo's and those inside a backward pass have no type."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error) or "NCCL" in str(error)
