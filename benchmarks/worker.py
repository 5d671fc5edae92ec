"""A program that waits for commands: how benchmarks keep what they compare in processes of their own.

Both sides speak JSON, one object a line. The first answer comes without a command and tells what there is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def answer_commands(begin: Callable[[], tuple[Answer, Callable[[Answer], Answer]]]) -> None:
    """Be the program: ``begin`` gives the first answer and what answers commands. Ends when nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints does not get into the answers
    answer, follow = begin()
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        command = sys.stdin.readline()
        if not command:
            return
        answer = follow(json.loads(command))


class Worker:
    """Such a program as the one who compares sees it.

    Raises:
        RuntimeError: it has ended.
    """

    def __init__(self, command: Sequence[str | Path], threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen([*map(str, command)], text=True, env=environment, **pipes)
        self.about = self.answer()

    def answer(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError((self.errors.read().strip().splitlines() or ["it ended"])[-1])
        result: Answer = json.loads(line)
        return result

    def ask(self, do: str, **given: Any) -> Answer:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
