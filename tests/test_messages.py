"""Messages speak of flags that exist: every ``--flag`` in a text of the sources is one of some verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import hanmo
from hanmo.cli.main import VERBS, load_verb, settings_class
from hanmo.settings import build_parser

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w(])")
STYLE = re.compile(r"var\(--[a-z-]+\)|--[a-z-]+:\s")  # variables of style sheets look like flags
FOREIGN = {
    "pip": "--disable-pip-version-check --no-cache-dir --no-deps --no-input --only-binary --dest --progress-bar "
    "--quiet --retries --timeout",
    "nvidia-smi": "--query-gpu --format --id",
    "torchrun": "--nproc-per-node --master-port",
}


def known_flags() -> set[str]:
    known = {"--help", "--version", *(flag for flags in FOREIGN.values() for flag in flags.split())}
    for name in VERBS:
        parser = build_parser(settings_class(load_verb(name)), name, "")
        known |= {flag for action in parser._actions for flag in action.option_strings}
    return known


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a file and their lines, documentation left out; of an f-string its fixed parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def test_every_flag_that_a_message_names_exists() -> None:
    root, known = Path(hanmo.__file__).parent, known_flags()
    named: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.py")):
        for line, text in texts(path):
            for flag in FLAG.findall(STYLE.sub("", text)):
                named.setdefault(flag, []).append(f"{path.relative_to(root)}:{line}")
    assert {"--fields", "--truncate", "--skip-bad", "--encoding", "--resume"} <= set(named)  # the search finds them
    unknown = {flag: places for flag, places in named.items() if flag not in known}
    assert not unknown


def test_flags_of_documents_exist() -> None:
    """Commands in README.md and docs/ can be typed as they stand."""
    root = Path(__file__).parents[1]
    command = re.compile(r"^hanmo (\w+)(.*(?:\\\n.*)*)", re.MULTILINE)
    seen = 0
    for path in [*root.glob("README*.md"), *(root / "docs").glob("*.md")]:
        for verb, rest in command.findall(path.read_text(encoding="utf-8")):
            if verb not in VERBS:
                continue
            parser = build_parser(settings_class(load_verb(verb)), verb, "")
            known = {flag for action in parser._actions for flag in action.option_strings}
            given = set(FLAG.findall(rest.partition("#")[0] if "\\\n" not in rest else rest))
            assert given <= known, f"{path.name}: hanmo {verb}: {given - known}"
            seen += 1
    assert seen > 20
