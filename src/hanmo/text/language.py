"""Which language a text is in, told from the statistics of its bytes: zh, en, code, mixed or other.

In UTF-8 the lead byte of a character names its script, so counting bytes is enough; ``bytes.translate`` does it at
memory speed. It is meant for the shares in a data report, where single errors do not matter.
"""

from __future__ import annotations

import re

LANGUAGES = ("zh", "en", "code", "mixed", "other")
SAMPLE = 2048  # bytes looked at from the beginning and from the middle: enough to tell, whatever the length

ASCII_LETTERS = bytes(range(0x41, 0x5B)) + bytes(range(0x61, 0x7B))
HAN = bytes(range(0xE4, 0xEA))  # U+4000..U+9FFF
ACCENTED = b"\xc3\xc4\xc5"  # Latin letters with marks
OTHER_SCRIPTS = bytes(range(0xC6, 0xE2)) + bytes(range(0xEA, 0xEE))  # Greek, Cyrillic, Arabic, Thai, Hangul...
SYMBOLS = b"{}[]()<>=_;#*/+\\|&"
STATEMENT = re.compile(
    rb"^[ \t]*(?:import |from \w|def \w+\(|class \w|return\b|self\.|#include|function |const |let |var |public )",
    re.MULTILINE,
)
FUNCTION_WORDS = (b" the ", b" of ", b" and ", b" to ")


def identify(text: str | bytes) -> str:
    """Return the language of a text (or of its UTF-8 bytes), one of :data:`LANGUAGES`.

    >>> identify("今天天气很好。"), identify("It is a fine day."), identify("for (i = 0; i < n; i++) { a[i] = b[i]; }")
    ('zh', 'en', 'code')
    """
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if len(data) > 2 * SAMPLE:
        middle = len(data) // 2
        data = data[:SAMPLE] + data[middle : middle + SAMPLE]
    letters = count(data, ASCII_LETTERS)
    ascii_only = data.isascii()
    han = others = 0
    if not ascii_only:
        han = count(data, HAN)
        others = (
            count(data, OTHER_SCRIPTS) + data.count(b"\xe3\x81") + data.count(b"\xe3\x82") + data.count(b"\xe3\x83")
        )
    words = letters / 5  # a Han character carries about as much as an English word
    if others > 0.3 * (han + words + others):
        return "other"
    if letters > 2 * han and is_code(data, letters):
        return "code"
    if han > 0.7 * (han + words):
        return "zh"
    if han > 0.1 * (han + words):
        return "mixed"
    if not letters or (not ascii_only and count(data, ACCENTED) > 0.03 * letters):
        return "other"
    if words > 60 and 60 * sum(data.count(word) for word in FUNCTION_WORDS) < words:
        return "other"  # Latin letters, but not English: every long English text has these words
    return "en"


def is_code(data: bytes, letters: int) -> bool:
    """Whether a text has many of the symbols of programs, or some of them and lines that begin like statements."""
    symbols = count(data, SYMBOLS)
    if symbols <= 0.03 * letters:
        return False
    return symbols > 0.1 * letters or len(STATEMENT.findall(data)) > 2


def count(data: bytes, wanted: bytes) -> int:
    """How many of the bytes are among ``wanted``."""
    return len(data) - len(data.translate(None, wanted))
