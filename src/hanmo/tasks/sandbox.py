"""Run a Python program that nobody has read, such as one that a model wrote, and say whether it ran to its end.

The program runs in processes of its own with limits on time, memory, disk and processes, in an empty folder that is
removed afterwards, without the network, the standard input or our environment. What enforces this depends on the
system; ``Result.protections`` and ``protections()`` say what is in force on the machine at hand:

==========  ====================================================================================================
Linux       namespaces (network, processes, mounts) where the system allows them, to root or to any user; Landlock
            for files (Linux 5.13); seccomp refuses every socket; resource limits
macOS       resource limits, the process group is killed, Python's sockets raise an error; files are not confined
            (not tried by us)
Windows     nothing: the sandbox refuses; use WSL, which is Linux
==========  ====================================================================================================

What it does not do: the tests of a program run in the program's own interpreter, so a program written to deceive its
tests can (an object equal to everything passes every assertion). It keeps mistakes and the usual mischief of generated
code away from the machine; it is no home for programs of a determined attacker, for which a virtual machine is.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO

from hanmo.errors import ResourceError, UsageError

JAIL = Path(__file__).with_name("jail.py")
MEBIBYTE = 1 << 20
GRACE = 2.0  # seconds that Python may take to start and to lock itself in, on top of the program's own
REPORT_LIMIT = 1 << 16
OUTCOMES = ("passed", "failed", "timeout", "memory", "killed", "not compiled")


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds: of the clock on the wall.
        cpu_seconds: of computing, of each process, rounded up to whole seconds.
        memory: bytes of address space, of each process.
        disk: bytes of the files it writes.
        files: open at one time.
        processes: that it may start, threads among them, where the system can count them.
        output: bytes of its output that are kept; the rest is thrown away.
    """

    seconds: float = 5.0
    cpu_seconds: float = 5.0
    memory: int = 1024 * MEBIBYTE
    disk: int = 32 * MEBIBYTE
    files: int = 64
    processes: int = 8
    output: int = 16 * 1024

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0 and not (name in ("processes", "output") and value == 0):
                raise UsageError(
                    f"the limit must be above zero, and it is {value}",
                    where=name,
                    fix="leave it out to take the default",
                    zh=f"限制必须大于零，现在是 {value}；不写则用默认值",
                )


@dataclass(frozen=True)
class Result:
    """What became of a program.

    Args:
        outcome: ``passed`` (it ran to its last line), ``failed`` (an exception, or it ended itself), ``timeout``,
            ``memory``, ``killed`` (a signal ended it) or ``not compiled``.
        message: the error with its line in the program; empty when it passed.
        seconds: from start to end on the wall clock, the start of Python included.
        output: the beginning of what it printed.
        protections: what was in force while it ran.
    """

    outcome: str
    message: str
    seconds: float
    output: str = ""
    protections: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def run(program: str, limits: Limits | None = None) -> Result:
    """Run a program and its tests.

    Args:
        program: the whole text, the assertions that it must hold at its end.
        limits: the defaults if left out.

    Raises:
        ResourceError: the sandbox itself cannot start, or the system is Windows.

    >>> run("assert 1 + 1 == 3").message
    'line 1: AssertionError'
    """
    limits = limits or Limits()
    if os.name != "posix":
        raise ResourceError(
            "programs of a model cannot be run safely on this system",
            fix="run Hanmo under Linux or in WSL",
            zh="在此系统上无法安全运行模型写出的程序。请在 Linux 或 WSL 中运行",
        )
    try:
        text = program.encode("utf-8")
    except UnicodeEncodeError:
        return Result("not compiled", "the program holds half a surrogate pair, which is no character", 0.0)
    with tempfile.TemporaryDirectory(prefix="hanmo-", ignore_cleanup_errors=True) as folder:
        return observe(text, Path(folder).resolve(), limits)


@cache
def protections() -> tuple[str, ...]:
    """What the sandbox enforces on this machine, found by running an empty program once."""
    return run("").protections


def observe(text: bytes, folder: Path, limits: Limits) -> Result:
    secret = secrets.token_hex(16)
    reading, writing = os.pipe()
    began = time.monotonic()
    try:
        process = start(folder, limits, writing)
    except OSError as error:
        os.close(reading)
        raise ResourceError(
            f"the sandbox cannot start a process: {error}",
            fix="end other programs and try again",
            zh=f"沙箱无法启动进程：{error}。请关闭其他程序后重试",
        ) from error
    finally:
        os.close(writing)
    feeder = threading.Thread(target=feed, args=(process, secret.encode() + b"\n" + text), daemon=True)
    feeder.start()
    try:
        output, report, late = collect(process, reading, limits, began)
    finally:
        end(process)
        os.close(reading)
        feeder.join(1.0)
    outcome, message, found = verdict(report, secret, process.returncode, late)
    shown = output.decode("utf-8", "replace")
    if not found and outcome == "killed":
        message = f"{message}; {shown[-500:]}" if shown else message
    return Result(outcome, message, time.monotonic() - began, shown, found)


def start(folder: Path, limits: Limits, report: int) -> subprocess.Popen[bytes]:
    settings = asdict(limits) | {"folder": str(folder), "report": report, "cpu": max(1, -int(-limits.cpu_seconds // 1))}
    place = {name: str(folder) for name in ("HOME", "TMPDIR", "TEMP", "TMP")}
    place |= {"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PATH": os.defpath}
    return subprocess.Popen(
        [sys.executable, "-I", "-B", "-X", "utf8", str(JAIL), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=place,
        start_new_session=True,
        pass_fds=(report,),
    )


def feed(process: subprocess.Popen[bytes], text: bytes) -> None:
    """Hand the program over; it may be longer than a pipe holds."""
    assert process.stdin is not None
    with contextlib.suppress(OSError, ValueError):
        process.stdin.write(text)
    with contextlib.suppress(OSError, ValueError):
        process.stdin.close()


def collect(process: subprocess.Popen[bytes], report: int, limits: Limits, began: float) -> tuple[bytes, bytes, bool]:
    """Read the output and the report until the program ends or its time is over.

    Returns:
        The output (cut off), the report, and whether the time was over. The program's own time starts with the first
        line of the report, when Python has started and is locked in.
    """
    assert process.stdout is not None
    kept = {"output": bytearray(), "report": bytearray()}
    room = {"output": limits.output, "report": REPORT_LIMIT}
    deadline, running = began + GRACE + limits.seconds, False
    with selectors.DefaultSelector() as waiting:
        waiting.register(process.stdout, selectors.EVENT_READ, "output")
        waiting.register(report, selectors.EVENT_READ, "report")
        while waiting.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(kept["output"]), bytes(kept["report"]), True
            for key, _ in waiting.select(min(left, 0.5)):
                data = os.read(key.fd, 1 << 16)
                kept[key.data] += data[: max(0, room[key.data] - len(kept[key.data]))]
                if not data:
                    waiting.unregister(key.fileobj)
            if not running and kept["report"]:
                deadline, running = time.monotonic() + limits.seconds, True
            if process.poll() is not None:  # what the program left behind may hold the pipes open
                drain(waiting, kept, room)
                break
    return bytes(kept["output"]), bytes(kept["report"]), False


def drain(waiting: selectors.BaseSelector, kept: dict[str, bytearray], room: dict[str, int]) -> None:
    """What already stands in the pipes, at most a pipe's worth of each."""
    for _ in range(8):
        ready = waiting.select(0)
        for key, _mask in ready:
            data = os.read(key.fd, 1 << 16)
            kept[key.data] += data[: max(0, room[key.data] - len(kept[key.data]))]
            if not data:
                waiting.unregister(key.fileobj)
        if not ready or not waiting.get_map():
            return


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group; a PID namespace, where there is one, goes with it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stdin):
        close(stream)


def close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.close()


def verdict(report: bytes, secret: str, code: int, late: bool) -> tuple[str, str, tuple[str, ...]]:
    """The outcome, its message and the protections, from the report; a line without the secret word is not ours."""
    found: tuple[str, ...] = ()
    for line in report.split(b"\n"):
        with contextlib.suppress(ValueError, AttributeError):
            entry = json.loads(line)
            if entry.get("secret") != secret:
                continue
            if "outcome" in entry:
                return str(entry["outcome"]), str(entry["message"]), found
            found = tuple(entry["protections"])
    code = code - 128 if code > 128 else -code if code < 0 else 0
    if late or code == getattr(signal, "SIGXCPU", -1):
        return "timeout", "the time limit was reached", found
    if code:
        name = signal.Signals(code).name if code in set(signal.Signals) else str(code)
        return "killed", f"ended by the signal {name}", found
    return "failed", "the program ended itself before its last line", found
