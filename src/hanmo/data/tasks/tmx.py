"""TMX, the exchange format of translation memories (LISA TMX 1.4b), read as a stream.

Nothing outside the file is ever fetched, and a file that declares entities is refused: a few lines of such
declarations can expand to gigabytes, or name other files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.parsers import expat

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.types import Pair
from hanmo.errors import DataError
from hanmo.language import pick

CODES = frozenset(["bpt", "ept", "ph", "it", "ut"])  # native formatting codes inside a segment: no text
XML_DECLARATION = re.compile(r"\s*<\?xml[^>]*\?>")
Unit = tuple[int, dict[str, str]]  # line, and the text in each language


class Forbidden(Exception):
    """The file declares entities."""


class UnitParser:
    """Collects translation units from the events of the XML parser."""

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self.source_language = ""
        self.language = ""
        self.line = 0
        self.texts: dict[str, str] = {}
        self.segment: list[str] | None = None
        self.inside_codes = 0
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.data
        self.parser.EntityDeclHandler = self.refuse
        self.parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
        self.parser.buffer_text = True

    def refuse(self, *declaration: object) -> None:
        """Stop at a declaration of an entity."""
        raise Forbidden(str(declaration[0]))

    def start(self, name: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        if name == "header":
            self.source_language = attributes.get("srclang", "")
        elif name == "tu":
            self.line, self.texts = self.parser.CurrentLineNumber, {}
        elif name == "tuv":
            self.language = attributes.get("xml:lang", attributes.get("lang", ""))
        elif name == "seg":
            self.segment, self.inside_codes = [], 0
        elif self.segment is not None and name in CODES:
            self.inside_codes += 1

    def end(self, name: str) -> None:
        """An element ends."""
        if name == "tu":
            self.units.append((self.line, self.texts))
        elif name == "seg" and self.segment is not None:
            self.texts.setdefault(self.language, "".join(self.segment))
            self.segment = None
        elif self.segment is not None and name in CODES:
            self.inside_codes -= 1

    def data(self, text: str) -> None:
        """Text inside an element."""
        if self.segment is not None and not self.inside_codes:
            self.segment.append(text)


def read_units(file: RecordFile, parser: UnitParser) -> Iterator[Unit]:
    """The translation units of a file as they are read.

    Raises:
        DataError: not well-formed, undecodable bytes, or entities are declared.
    """
    first = True
    try:
        for piece in file.stream.pieces():
            line = parser.parser.CurrentLineNumber
            if file.stream.bad and file.damaged(line, piece):
                raise undecodable(file, line)
            if first:  # the text is decoded: what the file says about its encoding no longer holds
                found = XML_DECLARATION.match(piece)
                piece = "\n" * piece.count("\n", 0, found.end()) + piece[found.end() :] if found else piece
                first = False
            parser.parser.Parse(piece, False)
            yield from parser.units
            parser.units.clear()
        parser.parser.Parse("", True)
        yield from parser.units
    except Forbidden as error:
        raise DataError(
            f"the file declares the entity '{error}'",
            where=f"{file.name}:{parser.parser.CurrentLineNumber}",
            why="entities can expand without end or name other files, so they are never read",
            fix="remove the <!ENTITY ...> declarations",
            zh=f"文件声明了实体 '{error}'；实体可能无限展开或引用其他文件，因此不予读取。请删去 <!ENTITY ...> 声明",
        ) from None
    except expat.ExpatError as error:
        what = expat.errors.messages[error.code]
        raise DataError(
            f"not well-formed XML: {what} (column {error.offset + 1})",
            where=f"{file.name}:{error.lineno}",
            why='expected TMX: <tu><tuv xml:lang="en"><seg>...</seg></tuv> ...</tu>',
            fix="export the file again; it may be cut off",
            zh=f"XML 格式有误：{what}（第 {error.offset + 1} 列）。文件可能不完整，请重新导出",
        ) from error


def undecodable(file: RecordFile, line: int) -> DataError:
    """The error for bytes that the encoding does not have."""
    return DataError(
        "the file has bytes that are not text in its encoding",
        where=f"{file.name}:{line}",
        fix="convert it to UTF-8",
        zh="文件含有无法解码的字节，请先转换为 UTF-8",
    )


def read_tmx(file: RecordFile) -> Iterator[Pair]:
    """The pairs of a translation memory.

    The source is the language that the user names (``fields``: source, target), else the ``srclang`` of the header,
    else the language that comes first.

    Raises:
        DataError: as :func:`read_units`, or there are more than two languages and none was named.
    """
    parser = UnitParser()
    chosen: tuple[str, str] | None = None
    for line, texts in read_units(file, parser):
        if chosen is None and len(texts) > 1:
            chosen = choose_languages(file, line, list(texts), parser.source_language)
        found = [matching(list(texts), language) for language in chosen or ("", "")]
        source, target = (" ".join(texts[language].split()) if language else "" for language in found)
        if not source or not target:
            what = pick("the unit does not have both languages", "该单元缺少一种语言")
            file.bad(
                line, what, " | ".join(texts.values()), " + ".join(chosen or ()) or pick("two languages", "两种语言")
            )
            continue
        yield Pair(source, target, file=file.name, line=line)


def choose_languages(file: RecordFile, line: int, languages: list[str], declared: str) -> tuple[str, str]:
    """Source and target language.

    Raises:
        DataError: a named language is not there, or several could be the target.
    """
    found: dict[str, str] = {}
    for role in ("source", "target"):
        wanted = file.fields.get(role)
        if wanted is not None:
            match = matching(languages, wanted)
            if match is None:
                what = f"the unit has no text in '{wanted}', which was named for {role}"
                listed = ", ".join(languages)
                fix = f"--fields {role}={languages[0]}"
                zh = f"该单元没有为 {role} 指定的语言 '{wanted}'"
                raise file.error(line, what, " ", listed, fix, zh)
            found[role] = match
    rest = [language for language in languages if language not in found.values()]
    if "source" not in found and len(rest) > 0:
        found["source"] = (matching(rest, declared) if "target" not in found or len(rest) > 1 else None) or rest[0]
        rest.remove(found["source"])
    if "target" not in found:
        if len(rest) != 1:
            listed = ", ".join(languages)
            what = f"the units are in {len(languages)} languages: {listed}"
            fix = f"say which: --fields source={languages[0]} --fields target={languages[1]}"
            raise file.error(line, what, " ", "two languages", fix, f"翻译单元有 {len(languages)} 种语言：{listed}")
        found["target"] = rest[0]
    file.report.taken.update(source=found["source"], target=found["target"])
    return found["source"], found["target"]


def matching(languages: list[str], wanted: str) -> str | None:
    """The language of the list that is meant: ``en`` and ``en-US`` mean each other, ``zh-CN`` and ``zh-TW`` do not.

    >>> matching(["EN-us", "zh-CN"], "en"), matching(["zh-TW"], "zh-CN")
    ('EN-us', None)
    """
    lowered = {language.lower().replace("_", "-"): language for language in reversed(languages)}
    key = wanted.lower().replace("_", "-")
    if key in lowered:
        return lowered[key]
    primary, _, region = key.partition("-")
    for name, full in lowered.items():
        if primary and name.partition("-")[0] == primary and not (region and "-" in name):
            return full
    return None
