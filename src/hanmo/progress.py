"""Progress on standard error and the run's log as JSON lines; standard output belongs to results."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any


def human_bytes(count: float) -> str:
    """``1536`` -> ``1.5 KB`` (units of 1,000).

    >>> human_bytes(98_500_000)
    '98.5 MB'
    """
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """``13_900_000`` -> ``13.9 M``.

    >>> human_count(13_900_000)
    '13.9 M'
    """
    for unit in ("", " k", " M", " G", " T"):
        if abs(count) < 1000:
            return f"{count:.0f}{unit}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} P"


def human_time(seconds: float) -> str:
    """``75`` -> ``1:15``; hours are shown from one hour on.

    >>> human_time(75), human_time(3675)
    ('1:15', '1:01:15')
    """
    if not math.isfinite(seconds):
        return "?"
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


SILENT = threading.local()  # whether this thread shows how far its work is


@contextmanager
def no_progress() -> Iterator[None]:
    """Nobody watches what this thread does inside: no bars."""
    before = getattr(SILENT, "now", False)
    SILENT.now = True
    try:
        yield
    finally:
        SILENT.now = before


class Progress:
    """One line that says how far the work is: a bar with ETA on a terminal, a line now and then elsewhere.

    Args:
        label: what is being done.
        total: amount of work in ``unit``, or None if unknown.
        unit: ``"bytes"``, ``"steps"``, ``"documents"``...
    """

    def __init__(self, label: str, total: float | None = None, unit: str = "") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0.0
        self.start = time.monotonic()
        self.last = -math.inf
        self.stream: IO[str] = sys.stderr
        self.terminal = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.quiet = bool(os.environ.get("HANMO_QUIET")) or getattr(SILENT, "now", False)

    def update(self, done: float, note: str = "", *, fraction: float | None = None) -> None:
        """Show that ``done`` units are finished; ``fraction`` replaces ``done / total`` for the bar and the ETA."""
        self.done = done
        now = time.monotonic()
        if self.quiet or now - self.last < (0.1 if self.terminal else 10.0):
            return
        self.last = now
        self.write(self.line(note, fraction))

    def line(self, note: str, fraction: float | None = None) -> str:
        """The text of the progress line."""
        seconds = time.monotonic() - self.start
        amount = human_bytes(self.done) if self.unit == "bytes" else f"{human_count(self.done)} {self.unit}".rstrip()
        if fraction is None and self.total:
            fraction = self.done / self.total
        text = f"{self.label}: {amount}"
        if fraction is not None:
            share = min(1.0, fraction)
            filled = int(24 * share)
            eta = seconds / share - seconds if share > 0 else math.inf
            text = f"{self.label} [{'#' * filled}{'.' * (24 - filled)}] {share:4.0%} {amount}  ETA {human_time(eta)}"
        return f"{text}  {note}".rstrip()

    def write(self, text: str) -> None:
        """Replace the line on a terminal; print a new one elsewhere."""
        if self.terminal:
            self.stream.write("\r\x1b[K" + text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def close(self, note: str = "") -> None:
        """End the line with the amount and the time it took."""
        if self.quiet:
            return
        amount = human_bytes(self.done) if self.unit == "bytes" else f"{human_count(self.done)} {self.unit}".rstrip()
        seconds = time.monotonic() - self.start
        self.write(f"{self.label}: {amount} in {seconds:.1f} s  {note}".rstrip() + ("\n" if self.terminal else ""))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self.terminal and not self.quiet:
            self.stream.write("\n")


class RunLog:
    """The log of a run: one JSON object per line, flushed as it is written, so that a killed run keeps its log."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")  # a kill cut off the last line
        self.stream = path.open("a", encoding="utf-8")
        if torn:
            self.stream.write("\n")

    def write(self, **entry: Any) -> None:
        """Append one entry."""
        self.stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.stream.flush()

    def close(self) -> None:
        """Close the file."""
        self.stream.close()


def display_width(text: str) -> int:
    """Columns that ``text`` takes in a terminal: Chinese characters take two, combining marks none.

    >>> display_width("模型 a")
    6
    """
    wide = sum(1 for char in text if unicodedata.east_asian_width(char) in "WF")
    marks = sum(1 for char in text if unicodedata.combining(char))
    return len(text) + wide - marks
