"""Cutting a long text into sections, so that a single book still has something to hold out."""

from __future__ import annotations

import re
import unicodedata

BLANK_LINE = re.compile(r"\n[ \t\u3000]*\n+")
SECTION_BYTES = 8192
SMALLEST_SECTION = 200
WANTED_SECTIONS = 64


def section_bytes(total_bytes: int) -> int:
    """The size of a section: 8 KB, less in a corpus so small that it would not give 64 sections.

    >>> section_bytes(10_000_000), section_bytes(64_000), section_bytes(1000)
    (8192, 1000, 200)
    """
    return max(SMALLEST_SECTION, min(SECTION_BYTES, total_bytes // WANTED_SECTIONS))


def cut_sections(text: str, size: int) -> list[str]:
    """Cut a text into sections of about ``size`` characters (0.75 to 1.5 times).

    A cut goes after a blank line where there is one in reach, else after a line end, else before any character that
    does not combine with the one before it. The sections joined give the text; a text of up to ``1.5 * size`` is one.

    >>> cut_sections("one\\n\\ntwo\\n\\nthree", 5)
    ['one\\n\\n', 'two\\n\\n', 'three']
    """
    sections = []
    start = 0
    while len(text) - start > size + size // 2:
        end = section_end(text, start + max(1, size * 3 // 4), start + size + size // 2, start + size)
        sections.append(text[start:end])
        start = end
    if start < len(text):
        sections.append(text[start:])
    return sections


def section_end(text: str, low: int, high: int, target: int) -> int:
    """Where to cut between ``low`` and ``high``: a blank line, a line end, or about ``target``."""
    blank = BLANK_LINE.search(text, low - 1, high)
    if blank:
        return blank.end()
    line = text.find("\n", low - 1, high)
    return line + 1 if line >= 0 else safe_cut(text, target, target - low)


def safe_cut(text: str, target: int, reach: int = 1000) -> int:
    """The last place at or before ``target`` where a text can be cut so that both sides normalise on their own.

    That is before a character that neither composes with its neighbour nor is a control character, and not inside
    ``\\r\\n``. Where ``reach`` characters hold no such place (no real text does that), it is ``target``.
    """
    for place in range(min(target, len(text) - 1), max(0, target - reach), -1):
        following = text[place]
        if " " <= following <= "~" or "\u4e00" <= following <= "\u9fff":
            return place
        if unicodedata.category(following)[0] not in "MC" and not "\u1160" <= following <= "\u11ff":
            return place  # besides marks, only Korean vowels and finals compose with what precedes them
    return target
