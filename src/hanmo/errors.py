"""Every error a user can see: what is wrong, where, why it matters, and what to do next.

The exit codes are part of the interface and never change their meaning:

=====  =======================================================
0      success
1      a defect in Hanmo itself (a traceback is shown)
2      usage: an unknown flag, key, verb or value
3      data: the user's text or records cannot be used
4      model: a model, tokenizer or checkpoint cannot be used
5      resources: disk, memory, port, missing optional package
6      network: offline, or a download failed
130    stopped by Ctrl-C
=====  =======================================================
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from hanmo.language import language, pick

if TYPE_CHECKING:
    from collections.abc import Iterable


SHOWN_NAMES = 24  # of a list of known names; more would bury the message


class HanmoError(Exception):
    """An error with everything a person needs to go on.

    Args:
        what: one sentence that says what is wrong.
        where: the place, as ``file:line``, a path, or a key.
        why: why it matters or how it came about.
        fix: what to type or change instead.
        zh: the whole message in Chinese (what and fix), shown to users who read Chinese.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "", zh: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix
        self.zh = zh

    def __str__(self) -> str:
        if self.zh and language() == "zh":
            return f"{self.where}: {self.zh}" if self.where else self.zh
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class UsageError(HanmoError):
    """An unknown flag, recipe key, verb or value."""

    exit_code = 2


class DataError(HanmoError):
    """The user's text or records cannot be used as they are."""

    exit_code = 3


class ModelError(HanmoError):
    """A model, tokenizer or checkpoint is missing, damaged or of an unknown kind."""

    exit_code = 4


class ResourceError(HanmoError):
    """The machine lacks disk, memory, a free port or an optional package."""

    exit_code = 5


class NetworkError(HanmoError):
    """Something had to be fetched and could not be."""

    exit_code = 6


class Interrupted(HanmoError):
    """The user stopped the work with Ctrl-C; what was finished is kept."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'?"`` for the known name closest to ``name``, else the list of names.

    >>> nearest("sede", ["seed", "size"])
    "did you mean 'seed'?"
    """
    names = sorted(known)
    shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return pick(f"did you mean '{close[0]}'?", f"是否想写 '{close[0]}'？")
    return pick("known: ", "可用：") + shown


def missing_package(package: str, extra: str, purpose: str) -> ResourceError:
    """The error for an optional package that a feature needs and that is not installed.

    Args:
        purpose: what needs it, in the user's language.
    """
    return ResourceError(
        f"the package '{package}' is not installed, and {purpose} needs it",
        fix=f"pip install 'hanmo[{extra}]'",
        zh=f"缺少软件包 '{package}'（{purpose}）。请运行：pip install 'hanmo[{extra}]'",
    )
