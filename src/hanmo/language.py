"""The language in which Hanmo speaks to the user: English or Chinese."""

from __future__ import annotations

import os


def language() -> str:
    """Return ``"zh"`` or ``"en"``: ``HANMO_LANG`` decides, else the locale of the process."""
    for variable in ("HANMO_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(variable, "")
        if value:
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


def pick(en: str, zh: str) -> str:
    """Return the text of the user's language; ``en`` where no Chinese text is given."""
    return zh if zh and language() == "zh" else en
