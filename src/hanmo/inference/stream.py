"""From token bytes to text that can be shown at once: whole characters only, never a part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class IncrementalDecoder:
    """Decode UTF-8 that arrives in pieces, and end at the first stop string.

    Bytes of an unfinished character are kept until the rest arrives; bytes that can never become a character turn into
    U+FFFD, exactly as ``bytes.decode("utf-8", "replace")`` of the whole does. Text that may be the beginning of a stop
    string is kept until that is decided. Whatever the cuts, the pieces returned add up to the same text.

    The stop string that is *complete first* wins; of those that end at the same character, the longest. It is cut from
    the text together with everything after it.

    Args:
        stop: stop strings, none of them empty.

    >>> decoder = IncrementalDecoder(stop=["。"])
    >>> [decoder.feed(piece) for piece in (b"\\xe6", b"\\x98\\xa5", b"\\xe3\\x80", b"\\x82x")]
    ['', '春', '', '']
    >>> decoder.finish(), decoder.stop_string
    ('', '。')
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = tuple(stop)
        self.stop_string: str | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # the longest end of the text so far that begins a stop string

    def feed(self, piece: bytes) -> str:
        """Take the bytes of the next token and return the text that is now certain (often empty)."""
        return self._advance(self._utf8.decode(piece))

    def finish(self) -> str:
        """Return what was kept back: no more bytes will come."""
        text = self._advance(self._utf8.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _advance(self, text: str) -> str:
        if self.stop_string is not None:
            return ""
        if not self.stop or not text:
            return text
        text = self._held + text
        found = [(start + len(stop), start, stop) for stop in self.stop if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.stop_string = min(found)
            self._held = ""
            return text[:start]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` with which some stop string begins."""
        longest = max(len(stop) for stop in self.stop) - 1
        for size in range(min(longest, len(text)), 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self.stop):
                return size
        return 0
