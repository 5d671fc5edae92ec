"""How many real Tang poems pass the checks of classical forms, and how many would by chance.

    python benchmarks/forms.py POEMS

POEMS is tang.jsonl of chinese-poetry (MIT). A poem is counted under a form when all its lines have the form's length
and it has the form's number of lines, by a plain count of marks that shares no code with the checks; poems with notes,
gaps or variants in the text (anything but Chinese characters, commas and full stops) are left out and counted.
Chance is the rate of rhyme when the even lines of all poems of a form are dealt out anew (seed 1).

Figures: lines, length, script (each must be 1), rhyme by 平水韵, by 中华新韵 and by either, the share whose rhyme word
stands twice, and chance. "oblique" is the share of poems that fail by 平水韵 as regulated verse only because they
rhyme in an oblique tone: old-style verse of eight lines, which this collection does not tell apart.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

from hanmo.tasks.forms import Report, chinese_rhyme, regulated

FORMS = {(4, 5): "五言绝句", (4, 7): "七言绝句", (8, 5): "五言律诗", (8, 7): "七言律诗"}


def chosen(path: Path) -> tuple[dict[tuple[int, int], list[str]], int, int]:
    """The poems by number and length of lines, how many were left out, and how many there are."""
    found: dict[tuple[int, int], list[str]] = defaultdict(list)
    left_out = total = 0
    for row in path.read_text(encoding="utf-8").splitlines():
        text = "".join(json.loads(row)["paragraphs"])
        total += 1
        lengths = [len(part) for part in re.split("[，。]", text) if part]
        if len(set(lengths)) != 1 or (len(lengths), lengths[0]) not in FORMS:
            continue
        if re.fullmatch(r"[\u3400-\u9fff\U00020000-\U0003ffff，。]+", text):
            found[len(lengths), lengths[0]].append(text)
        else:
            left_out += 1
    return found, left_out, total


def dealt(texts: list[str]) -> list[list[str]]:
    """The lines of all poems with their even lines dealt out anew."""
    poems = [[part for part in re.split("[，。]", text) if part] for text in texts]
    even = [line for poem in poems for line in poem[1::2]]
    random.Random(1).shuffle(even)
    return [[even.pop() if place % 2 else line for place, line in enumerate(poem)] for poem in poems]


def figures(texts: list[str], count: int, length: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for text in texts:
        for system in ("pingshui", "modern", "either"):
            report: Report = regulated(text, FORMS[count, length], count, length, system)
            found[system] += report.rule("rhyme").holds
        found.update(rule.name for rule in report.rules if rule.holds and rule.name != "rhyme")
        found["form"] += report.holds
        lines = [part for part in re.split("[，。]", text) if part]
        strict = chinese_rhyme(lines, "pingshui", level=True)[0].holds
        found["oblique"] += chinese_rhyme(lines, "pingshui", level=False)[0].holds and not strict
    for lines in dealt(texts):
        for system in ("pingshui", "either"):
            found[f"chance {system}"] += chinese_rhyme(lines, system, level=count > 4)[0].holds
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    began = time.perf_counter()
    poems, left_out, total = chosen(Path(sys.argv[1]))
    print(f"{total} poems; {left_out} of a regular shape left out for notes, gaps or other marks")
    print(f"python {sys.version.split()[0]}, pypinyin {version('pypinyin')}")
    for (count, length), texts in sorted(poems.items()):
        found = figures(texts, count, length)
        shares = "  ".join(f"{name} {number / len(texts):.4f}" for name, number in found.items())
        print(f"{FORMS[count, length]} n={len(texts)}  {shares}")
    print(f"{time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
