"""Progress goes to standard error and the log of a run survives a kill."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hanmo import progress as module
from hanmo.progress import Progress, RunLog, human_bytes, human_count, human_time


class Terminal(io.StringIO):
    """A standard error that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def speaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run quietly; here the output is the subject."""
    monkeypatch.delenv("HANMO_QUIET", raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves: its only element is the time."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_lines_go_to_standard_error(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with Progress("reading", 1000, "bytes") as progress:
        for done in range(0, 1001, 10):
            clock[0] += 0.15  # 15 seconds in all
            progress.update(done)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 3, "one line at first, one after ten seconds, one at the end"
    assert "\r" not in err and "\x1b" not in err
    assert lines[-1] == "reading: 1.0 KB in 15.2 s"


def test_on_a_terminal_one_line_is_replaced(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("training", 200, "steps") as progress:
        clock[0] += 10
        progress.update(50, "loss 2.1")
        progress.update(51)  # at the same moment: not shown
    text = terminal.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    first = text.split("\r\x1b[K")[1]
    assert first == "training [######..................]  25% 50 steps  ETA 0:30  loss 2.1"


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("x") as progress:
        progress.update(clock[0])
    assert "\r" not in terminal.getvalue()


def test_quiet_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HANMO_QUIET", "1")
    with Progress("x", 3) as progress:
        progress.update(3)
    assert capsys.readouterr() == ("", "")


def test_an_error_ends_the_line_without_claiming_success(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(ValueError), Progress("reading", 10) as progress:
        progress.update(5)
        raise ValueError
    assert terminal.getvalue().endswith("\n") and " in " not in terminal.getvalue()


def test_the_bar_never_passes_the_end(clock: list[float]) -> None:
    progress = Progress("x", 10)
    clock[0] += 1
    progress.done = 15
    assert "[" + "#" * 24 + "] 100%" in progress.line("")
    progress.done = 0
    assert "ETA ?" in progress.line("")
    assert "50%" in progress.line("", fraction=0.5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (98_500_000, "98.5 MB"), (3e9, "3.0 GB"), (5e12, "5.0 TB")],
)
def test_bytes(value: float, expected: str) -> None:
    assert human_bytes(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (999, "999"), (1500, "1.5 k"), (13_900_000, "13.9 M"), (2e15, "2.0 P")]
)
def test_counts(value: float, expected: str) -> None:
    assert human_count(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0:00"), (59.9, "0:59"), (75, "1:15"), (3600, "1:00:00"), (float("inf"), "?"), (float("nan"), "?")],
)
def test_times(value: float, expected: str) -> None:
    assert human_time(value) == expected


def test_the_log_appends_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    for session in range(2):
        log = RunLog(path)
        log.write(session=session, text="翰墨\n")
        assert len(path.read_text(encoding="utf-8").splitlines()) == session + 1, "a line is there before close"
        log.close()
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert entries == [{"session": 0, "text": "翰墨\n"}, {"session": 1, "text": "翰墨\n"}]


def test_a_killed_process_keeps_its_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom hanmo.progress import RunLog\n"
        "log = RunLog(Path(sys.argv[1]))\nlog.write(step=1)\nlog.write(step=2)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
