"""``--devices N``: start N processes on this machine, start them again when one dies, and end them together.

torchrun does this on many machines. On one machine this supervisor knows more: it restarts after a crash (a killed or
faulty process) but not after an error that would come again, such as unusable data; it passes Ctrl-C on, so that the
run ends with one checkpoint; and the processes meet through a file, so no port can be taken.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from hanmo.errors import Interrupted, ResourceError, UsageError
from hanmo.language import pick
from hanmo.settings import notice

LAUNCHER = "HANMO_LAUNCHER"  # process id of the supervisor
LAUNCH = "HANMO_LAUNCH"  # names one start with all its restarts
RENDEZVOUS = "HANMO_RENDEZVOUS"  # the file through which the processes meet
RESTARTS = "HANMO_RESTARTS"
MAX_RESTARTS = 3
HEALTHY_SECONDS = 3600.0  # a process that dies after this long gets all its restarts again
STOP_SECONDS = 60.0  # for the others to end after Ctrl-C, once one has ended
DEATH_SECONDS = 30.0  # for the supervisor to end a process that lost another one
FIRST_SECONDS = 5.0  # for the first process to tell an error that all have
ANSWERS = (2, 3, 4, 5, 6, 130)  # exit codes of errors that a restart would only repeat; see hanmo/errors.py
TAIL_LINES = 30


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def restarts() -> int:
    """How often a launcher (ours or torchrun) started the processes again."""
    for name in (RESTARTS, "TORCHELASTIC_RESTART_COUNT"):
        value = os.environ.get(name, "")
        if value.isascii() and value.isdigit():
            return int(value)
    return 0


def launch_id() -> str:
    """What all restarts of one start have in common; empty for a process that nobody launched."""
    return os.environ.get(LAUNCH) or os.environ.get("TORCHELASTIC_RUN_ID", "")


def is_worker() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1")


def is_follower() -> bool:
    """Whether another process of the run talks to the user."""
    return is_worker() and os.environ.get("RANK", "0").strip() != "0"


def leave(code: int) -> NoReturn:
    """End the program with an exit code.

    A process that is one of several leaves at once: while Python ends, threads of a connection that the others still
    hold can abort it (seen with gloo, also after a success), and the launcher would take that for a crash.
    """
    if is_worker():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Let the first process tell an error that all have, and end the others; one that only another has is told by it.

    Both launchers end the others when the first has failed, so a moment is all that it takes.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        if is_follower():
            leave(Interrupted.exit_code)
        raise
    except Exception:
        if is_follower():
            time.sleep(FIRST_SECONDS)
        raise


def die_with_launcher() -> None:
    """Let Linux stop this process (with a checkpoint) when its launcher is killed; nothing on other systems."""
    parent = os.environ.get(LAUNCHER, "")
    if not launch_id() or sys.platform != "linux":
        return
    import ctypes

    set_death_signal = 1
    ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGTERM)
    if parent and os.getppid() != int(parent):  # it died before
        raise Interrupted("the launcher is gone", zh="启动进程已不存在")


def command() -> list[str]:
    """The command line that started this program, for processes that are to do the same.

    Like the installed command, and unlike ``python -m``, they do not look for modules in the current folder, where a
    text may be called random.py.
    """
    safe = [] if Path(sys.argv[0]).name == "__main__.py" else ["-P"]
    return [sys.executable, *safe, "-m", "hanmo", *sys.argv[1:]]


def check_devices(count: int, device: str) -> None:
    """Make sure that every process gets a GPU of its own, or a core.

    Raises:
        UsageError: not a number of processes.
        ResourceError: there are fewer devices.
    """
    if count < 1:
        raise UsageError(f"--devices must be at least 1, not {count}", zh=f"--devices 至少为 1，而不是 {count}")
    from hanmo.models.device import choose_device  # imports torch

    if choose_device(device).type == "cuda":
        import torch

        present, kind, kind_zh = torch.cuda.device_count(), "GPUs", "块 GPU"
    else:
        present, kind, kind_zh = cores(), "processor cores", "个处理器核"
    if count > present:
        raise ResourceError(
            f"--devices {count} is more than this machine has: {present} {kind}",
            fix=f"give --devices {present} or less; several machines are started with torchrun (docs/scaling.md)",
            zh=f"--devices {count} 超过本机的 {present} {kind_zh}。请减小该值；多台机器用 torchrun 启动",
        )


@dataclass
class Workers:
    """The processes of one attempt."""

    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)

    def codes(self) -> list[int | None]:
        """Exit code of each; None while it runs."""
        return [process.poll() for process in self.processes]

    def send(self, number: int) -> None:
        """Send a signal to all that still run."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)

    def kill(self) -> None:
        """End all at once: what is on the disk is always whole."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def tail(self, rank: int) -> str:
        """The last lines that a process other than the first wrote."""
        if rank == 0:
            return ""  # they stand on the terminal
        lines = self.logs[rank].read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


def start(count: int, command: list[str], folder: Path, attempt: int, name: str) -> Workers:
    """Start all processes; the first talks to the terminal, the others write to files in ``folder``."""
    workers = Workers()
    shared = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        LAUNCHER: str(os.getpid()),
        LAUNCH: name,
        RESTARTS: str(attempt),
        RENDEZVOUS: str(folder / f"meeting-{attempt}"),
    }
    if not os.environ.get("HANMO_THREADS", "").strip():
        shared["OMP_NUM_THREADS"] = shared["MKL_NUM_THREADS"] = str(max(1, cores() // count))
    for rank in range(count):
        log = folder / f"process-{rank}-{attempt}.log"
        workers.logs.append(log)
        with contextlib.ExitStack() as stack:
            output = None if rank == 0 else stack.enter_context(log.open("wb"))
            process = subprocess.Popen(
                command,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=None if rank == 0 else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches them through us, once
            )
        workers.processes.append(process)
    return workers


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The signals that arrived, instead of what they usually do."""
    arrived: list[int] = []
    names = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    previous = {number: signal.signal(number, lambda got, _: arrived.append(got)) for number in names}
    try:
        yield arrived
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def watch(workers: Workers, arrived: list[int]) -> tuple[int, int]:
    """Wait until all have ended well, one has failed, or all have ended after a signal.

    Returns:
        Rank and exit code of the process that decides; 0 and 0 if all ended well.
    """
    passed_on, deadline = 0, float("inf")
    while True:
        codes = workers.codes()
        while passed_on < len(arrived):
            passed_on += 1
            workers.send(signal.SIGKILL if passed_on > 2 else signal.SIGINT)
        if all(code == 0 for code in codes):
            return 0, 0
        if passed_on:
            if any(code is not None for code in codes):
                deadline = min(deadline, time.monotonic() + STOP_SECONDS)
            if all(code is not None for code in codes) or time.monotonic() > deadline:
                workers.kill()
                return 0, workers.processes[0].returncode
        elif any(codes):
            time.sleep(0.3)  # one that dies because of another may be seen first
            return decisive(workers.codes())
        time.sleep(0.05)


def decisive(codes: list[int | None]) -> tuple[int, int]:
    """The process that explains the failure: a killed one, else one with an error of its own, else any."""
    failed = [(rank, code) for rank, code in enumerate(codes) if code]
    return min(failed, key=lambda item: (item[1] > 0, item[1] not in ANSWERS, item[0]))


def launch(count: int, command: list[str], *, max_restarts: int = MAX_RESTARTS) -> int:
    """Run a command in ``count`` processes to its end, and again from the newest checkpoint when one of them dies.

    The processes find their place in the variables that torchrun sets (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``); see
    :func:`hanmo.training.distributed.joined`.

    Returns:
        The exit code of the run.
    """
    attempt, name, left = 0, secrets.token_hex(8), max_restarts
    with tempfile.TemporaryDirectory(prefix="hanmo-") as folder, caught_signals() as arrived:
        while True:
            began = time.monotonic()
            workers = start(count, command, Path(folder), attempt, name)
            try:
                rank, code = watch(workers, arrived)
            finally:
                workers.kill()
            if code == 0 or arrived:
                return code if code >= 0 else Interrupted.exit_code
            if tail := workers.tail(rank):
                notice(pick(f"from process {rank}:", f"进程 {rank} 的输出：") + "\n" + tail)
            if code in ANSWERS:
                return code
            left = max_restarts if time.monotonic() - began > HEALTHY_SECONDS else left
            if not left:
                notice(died(rank, code) + pick("; it was restarted often enough", "；已达到重启次数上限"))
                return 1 if code > 0 else ResourceError.exit_code
            left, attempt = left - 1, attempt + 1
            notice(
                died(rank, code)
                + pick(
                    f"; all {count} start again from the newest checkpoint ({left} more times if it happens again)",
                    f"；全部 {count} 个进程从最新检查点重新开始（还可重启 {left} 次）",
                )
            )


def died(rank: int, code: int) -> str:
    """What happened to a process."""
    if code > 0:
        return pick(f"process {rank} failed with exit code {code}", f"进程 {rank} 失败，退出码 {code}")
    hint = pick(" (often because memory ran out)", "（常因内存耗尽）") if code == -signal.SIGKILL else ""
    return pick(f"process {rank} was ended by signal {-code}{hint}", f"进程 {rank} 被信号 {-code} 终止{hint}")
