"""Records that a verb reads: which column is what, and the settings that only some kinds have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hanmo.errors import UsageError
from hanmo.settings import flag, notice, option

if TYPE_CHECKING:
    from hanmo.data.tasks import Records


@dataclass
class RecordSettings:
    """How files are read as records; for verbs that have ``encoding`` and ``skip_bad`` as well."""

    fields: list[str] = option(
        [],
        "which column or key is what, e.g. text=review; may be repeated",
        zh="列或键的含义，如 text=review；可重复给出",
        metavar="NAME=KEY",
    )
    label_separator: str | None = option(
        None,
        "classification: what stands between several labels in one cell, e.g. a comma",
        zh="分类：一格中多个标签之间的分隔符，如逗号",
        metavar="TEXT",
    )
    relabel: list[str] = option(
        [],
        "tagging: another name for a kind of span, e.g. LOCATION=LOC; OTH=O takes one away; may be repeated",
        zh="标注：改用另一标签名，如 LOCATION=LOC；OTH=O 表示去掉；可重复给出",
        metavar="OLD=NEW",
    )

    def field_names(self) -> dict[str, str]:
        """Which column or key is what."""
        return pairs("fields", self.fields, "NAME=KEY", "text=review", "名称=键")

    def new_names(self) -> dict[str, str]:
        """New names of kinds of spans."""
        return pairs("relabel", self.relabel, "OLD=NEW", "OTH=O", "旧名=新名")

    def read(self, kind: str, paths: Sequence[str], *, quiet: bool = False) -> Records[Any]:
        """The records of some files; what was found in them is told.

        Raises:
            DataError: a file is missing, damaged, or not of this kind; it names file and line.
        """
        from hanmo.data.tasks import read_records

        own: Any = self
        records = read_records(
            kind,
            paths,
            fields=self.field_names(),
            encoding=own.encoding,
            skip_bad=own.skip_bad,
            label_separator=self.label_separator if kind == "labelled" else None,
            relabel=self.new_names() if kind == "tagged" else None,
        )
        if not quiet:
            notice(records.report.describe())
        return records


def pairs(name: str, items: list[str], form: str, example: str, zh: str) -> dict[str, str]:
    """The values of a setting that is a list of ``A=B``.

    Raises:
        UsageError: one is not of this form.
    """
    for item in items:
        if not all(part.strip() for part in item.partition("=")):
            raise UsageError(
                f"{flag(name)} {item}: expected {form}",
                fix=f"e.g. {flag(name)} {example}",
                zh=f"{flag(name)} {item}：应写成 {zh}，例如 {flag(name)} {example}",
            )
    return dict(item.split("=", 1) for item in items)
