"""What a verb hands back: one result, for programs and for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Outcome:
    """The result of a verb: ``data`` is printed with ``--json``, ``text`` otherwise."""

    data: dict[str, Any]
    text: str
