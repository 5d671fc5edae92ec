"""The format of a file of records, told from its content first and its name second."""

from __future__ import annotations

import json
import re
from pathlib import Path

ARRAY_START = re.compile(r'\s*\[\s*[\[{"\]]')
OBJECT_START = re.compile(r'\{\s*["}]')
TMX_START = re.compile(r"(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!DOCTYPE tmx\b|<tmx\b)", re.DOTALL)
SEPARATOR = re.compile(r"[\s,:]*")
INNER_ARRAY = re.compile(r"\[\s*[\[{]")
SNIFFED_LINES = 200
FORMAT_NAMES = {
    "json": "JSON array",
    "json-object": "JSON object with an array",
    "jsonl": "JSON lines",
    "csv": "csv",
    "tsv": "tsv",
    "tmx": "TMX",
    "parquet": "parquet",
    "fasttext": "fastText",
    "lines": "plain lines",
}
JSON_FORMATS = ("json", "json-object", "jsonl")


def sniff(preview: str, suffix: str) -> str:
    """The format of a text from its beginning, and from the name where that leaves it open.

    >>> sniff('[{"a": 1}]', "txt"), sniff('{"a": 1}', ""), sniff("a\\tb\\nc\\td", "txt"), sniff("a,b", "csv")
    ('json', 'jsonl', 'tsv', 'csv')
    """
    begin = preview.lstrip()
    if ARRAY_START.match(begin):
        first, _, rest = begin.partition("\n")
        is_line = suffix in ("jsonl", "ndjson") or (rest.lstrip().startswith("[") and suffix != "json")
        return "jsonl" if is_line and first.rstrip().endswith("]") else "json"
    if suffix in ("jsonl", "ndjson"):
        return "jsonl"
    if OBJECT_START.match(begin):
        return sniff_object(begin, suffix)
    if suffix == "tmx" or TMX_START.match(begin):
        return "tmx"
    if suffix == "csv":
        return "csv"
    if begin.startswith("__label__"):
        return "fasttext"
    if suffix in ("tsv", "tab"):
        return "tsv"
    lines = [line for line in preview.split("\n")[:SNIFFED_LINES] if line.strip()]
    tabs = [line.count("\t") for line in lines]
    usual = max(set(tabs), key=tabs.count)
    return "tsv" if usual and tabs.count(usual) >= 0.9 * len(tabs) else "lines"


def sniff_object(begin: str, suffix: str) -> str:
    """``jsonl``, or ``json-object`` for one object over the whole file."""
    first, _, rest = begin.partition("\n")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        is_broken_line = array_in_object(begin) is None and rest.lstrip().startswith("{")
        return "jsonl" if is_broken_line else "json-object"
    is_whole = not rest.strip() and any(
        isinstance(item, list) and item and all(isinstance(one, dict) for one in item) for item in value.values()
    )
    return "json-object" if is_whole and suffix == "json" else "jsonl"


def array_in_object(preview: str) -> tuple[str, int] | None:
    """Key and place of the first array of objects or arrays among the values of a JSON object.

    >>> array_in_object('{"version": "1", "data": [{"a": 1}]}')
    ('data', 25)
    """
    decoder = json.JSONDecoder()
    at = preview.find("{") + 1
    while True:
        separator = SEPARATOR.match(preview, at)
        at = separator.end() if separator else at
        try:
            key, at = decoder.raw_decode(preview, at)
            separator = SEPARATOR.match(preview, at)
            at = separator.end() if separator else at
            if INNER_ARRAY.match(preview, at):
                return str(key), at
            _, at = decoder.raw_decode(preview, at)
        except (ValueError, RecursionError):
            return None


def stem_of(path: Path) -> str:
    """The name without ``.gz`` and the last suffix.

    >>> stem_of(Path("a/train.en.gz"))
    'train'
    """
    name = path.name.removesuffix(".gz")
    return name.rpartition(".")[0] or name
