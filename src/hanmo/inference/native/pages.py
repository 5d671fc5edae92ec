"""Texts whose keys and values lie in pages, which texts that begin alike share.

A text owns a list of pages of 32 positions. Texts that part copy only the page in which they do: all pages before it
are full, and nobody writes into them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hanmo.errors import ResourceError

PAGE = 32  # positions, as in src/attention.h


class Pages:
    """Which pages are in use, and by how many texts.

    Args:
        count: pages there are.
        copy: copies the contents of one page to another.
    """

    def __init__(self, count: int, copy: Callable[[int, int], None]) -> None:
        self.free = list(range(count - 1, -1, -1))
        self.users = [0] * count
        self.copy = copy

    def take(self) -> int:
        """A page that nobody uses.

        Raises:
            ResourceError: there is none.
        """
        if not self.free:
            raise ResourceError(
                f"all {len(self.users):,} pages of the cache are in use",
                fix="fewer or shorter texts at a time",
                zh=f"缓存的 {len(self.users):,} 页已全部占用，请减少同时处理的文本",
            )
        page = self.free.pop()
        self.users[page] = 1
        return page

    def give(self, page: int) -> None:
        """One user less."""
        self.users[page] -= 1
        if not self.users[page]:
            self.free.append(page)


@dataclass(eq=False)
class PagedText:
    """A text that is being read and written: how many positions are stored, in which pages, with which adapter."""

    pages: Pages
    length: int = 0
    table: list[int] = field(default_factory=list)
    adapter: int = -1

    def reserve(self, count: int) -> None:
        """Make room for ``count`` more positions, in pages that only this text writes to."""
        first = self.length // PAGE
        if self.length % PAGE and self.pages.users[self.table[first]] > 1:
            own = self.pages.take()
            self.pages.copy(self.table[first], own)
            self.pages.give(self.table[first])
            self.table[first] = own
        while len(self.table) * PAGE < self.length + count:
            self.table.append(self.pages.take())

    def fork(self) -> PagedText:
        """A second text that begins with all that this one holds."""
        held = -(-self.length // PAGE)
        for page in self.table[:held]:
            self.pages.users[page] += 1
        return PagedText(self.pages, self.length, self.table[:held], self.adapter)

    def trim(self, length: int) -> None:
        """Forget the positions from ``length`` on."""
        self.length = min(self.length, length)
        held = -(-self.length // PAGE)
        for page in self.table[held:]:
            self.pages.give(page)
        del self.table[held:]

    def release(self) -> None:
        """Give all pages back."""
        self.trim(0)
