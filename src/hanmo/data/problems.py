"""Records that cannot be read: the first one stops the work, or all are counted and the first ones listed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hanmo.errors import DataError

LISTED = 20  # bad records and skipped files that the report names; all are counted
MARKED_BYTE = re.compile("[\udc00-\udcff]")


def excerpt(record: str, limit: int = 80) -> str:
    """The beginning of a record on one line; bytes that could not be decoded are shown as ``\\xNN``."""
    found = MARKED_BYTE.search(record[: limit * 1000])
    start = max(0, found.start() - limit // 2) if found else 0
    shown = MARKED_BYTE.sub(lambda mark: f"\\x{ord(mark[0]) - 0xDC00:02x}", record[start : start + limit])
    shown = shown.encode("utf-8", "backslashreplace").decode()
    return ("..." if start else "") + " ".join(shown.split()) + ("..." if len(record) > start + limit else "")


@dataclass
class Problems:
    """The bad records met so far.

    Args:
        skip_bad: count and list them; otherwise the first one is an error.
    """

    skip_bad: bool = False
    count: int = 0
    first: list[dict[str, str]] = field(default_factory=list)

    def bad(self, where: str, what: str, record: str = "", *, expected: str, fix: str = "") -> None:
        """Note a bad record.

        Args:
            where: ``file:line``.
            what: what is wrong with it.
            record: the record as it stands in the file; an excerpt is shown.
            expected: what should have stood there.
            fix: what to do besides ``--skip-bad``.

        Raises:
            DataError: bad records are not to be skipped.
        """
        shown = excerpt(record)
        if not self.skip_bad:
            what = f"{what}: {shown}" if shown else what
            raise DataError(
                what,
                where=where,
                why=f"expected {expected}",
                fix="; or ".join(filter(None, [fix, "--skip-bad leaves such records out, counts and lists them"])),
                zh=f"{what}（应为：{expected}）。可用 --skip-bad 跳过并列出这类记录" + (f"；或 {fix}" if fix else ""),
            )
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append({"where": where, "what": what, "record": shown})
