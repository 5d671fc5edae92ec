"""Sentences with a tag for each token: CoNLL columns, IOB files, CoNLL-U, jsonl of tokens and tags."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.formats import JSON_FORMATS
from hanmo.data.tasks.named import Column, Roles, ambiguous, named_rows, names, no_name
from hanmo.data.tasks.schemes import SPAN_TAG, detect_scheme, split_tag, to_iob2
from hanmo.data.tasks.spans import read_spans
from hanmo.data.tasks.types import Tagged
from hanmo.language import pick
from hanmo.text.normalize import SURROGATE

CONLLU = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
TAGS = "tags ner_tags ner labels label bio bio_tags tag pos_tags upos pos xpos 标签 标注"
ROLES = Roles(("tokens", "tags"), (), (names(tokens="tokens words chars characters text 字 词 分词", tags=TAGS),))
SAMPLED_LINES = 2000
BLANKS = " \t\r\ufeff"  # the white space between columns; others, such as U+3000, can be tokens
TEXT_COMMENT = re.compile(r"#\s*text\s*=\s*(.*)")
RANGE_ID = re.compile(r"(\d+)-(\d+)")


@dataclass(slots=True)
class Sentence:
    """A sentence while it is read: its tags are still those of the file."""

    line: int
    tokens: list[str]
    tags: list[str]
    spaces: list[bool] | None = None
    text: str = ""


def read_tagged(file: RecordFile, relabel: Mapping[str, str]) -> Iterator[Tagged]:
    """The sentences of a file; tags of spans in IOB2.

    Args:
        relabel: other names for types of spans (or for plain tags); ``"O"`` takes the spans of a type away.

    Raises:
        DataError: it cannot be told which column or key is what, or a type to rename does not occur.
    """
    if file.format in JSON_FORMATS or file.format == "parquet":
        if holds_spans(file.sample_objects(100), file.fields):
            sentences = [
                Sentence(record.line, list(record.tokens), list(record.tags), list(record.spaces or ()))
                for record in read_spans(file)
            ]
        else:
            sentences = list(token_objects(file))
    else:
        sentences = list(column_sentences(file))
    yield from finished(file, sentences, relabel)


def finished(file: RecordFile, sentences: list[Sentence], relabel: Mapping[str, str]) -> Iterator[Tagged]:
    """The records, with the scheme told and converted."""
    if not sentences:
        return
    scheme = detect_scheme(sentence.tags for sentence in sentences)
    plain = scheme.name == "plain"
    file.report.scheme = scheme.name + (f" ({scheme.reason})" if scheme.reason else "")
    if not plain and scheme.name != "IOB2":
        file.report.scheme += pick("; made into IOB2", "；已转换为 IOB2")
    if scheme.repaired:
        note = pick(f"a tag that {scheme.name} does not allow there was repaired", f"修复了不合 {scheme.name} 的标签")
        file.report.notes[note] += scheme.repaired
    counts = Counter(tag for sentence in sentences for tag in sentence.tags)
    for tag, count in counts.items():
        if plain or split_tag(tag)[0] != "O":
            file.report.kinds[tag if plain else split_tag(tag)[1]] += count
        if not plain and tag != "O" and split_tag(tag)[0] == "O":
            file.report.notes[pick(f"the tag '{tag}' was read as O", f"标签 '{tag}' 按 O 处理")] += count
    for old, new in relabel.items():
        if file.report.kinds[old]:
            note = pick(f"the type of a tag was renamed from '{old}' to '{new}'", f"标签类型 '{old}' 改为 '{new}'")
            file.report.notes[note] += file.report.kinds[old]
    converted = {tag: renamed(tag, relabel, plain) for tag in counts}
    for sentence in sentences:
        yield Tagged(
            tuple(sentence.tokens),
            tuple(map(sys.intern, to_iob2([converted[tag] for tag in sentence.tags], scheme.name))),
            tuple(sentence.spaces) if sentence.spaces is not None else None,
            file=file.name,
            line=sentence.line,
        )


def renamed(tag: str, relabel: Mapping[str, str], plain: bool) -> str:
    """A tag with the new name of its type."""
    if plain:
        return relabel.get(tag, tag)
    prefix, kind = split_tag(tag)
    new = relabel.get(kind, kind)
    return "O" if prefix == "O" or new == "O" else f"{prefix}-{new}" if new else prefix


# ---- jsonl


def holds_spans(first: list[tuple[int, Any]], fields: Mapping[str, str]) -> bool:
    """Whether these objects have a text and spans in it, rather than tokens and a tag for each."""
    if "spans" in fields or "tags" in fields:
        return "spans" in fields
    objects = [value for _, value in first if isinstance(value, dict)]
    has_text = any(isinstance(value.get("text"), str) for value in objects)
    lists = any(isinstance(value.get(key), list) for value in objects for key in ("tokens", "words", "chars"))
    return has_text and not lists and not any(is_tag_list(value.get(key)) for value in objects for key in value)


def is_tag_list(value: Any) -> bool:
    """Whether a value is a list of strings or numbers."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, (str, int)) for item in value)


def token_objects(file: RecordFile) -> Iterator[Sentence]:
    """The sentences of ``{"tokens": [...], "tags": [...]}``."""
    check_one_tag_key(file)
    for row in named_rows(file, ROLES, None):
        tokens, tags = row.values["tokens"], row.values["tags"]
        if isinstance(tokens, str):
            tokens = list(tokens)
        if isinstance(tags, str):
            tags = tags.split()
        if not isinstance(tokens, list) or not isinstance(tags, list) or not all(map(is_word, [*tokens, *tags])):
            what = pick("tokens or tags are not a list of strings", "词或标签不是字符串列表")
            file.bad(row.line, what, row.raw, '{"tokens": ["..."], "tags": ["..."]}')
        elif not tokens or len(tokens) != len(tags):
            what = pick(f"{len(tokens)} tokens and {len(tags)} tags", f"{len(tokens)} 个词，{len(tags)} 个标签")
            file.bad(row.line, what, row.raw, pick("a tag for each token, at least one", "每个词一个标签，至少一个"))
        else:
            cleaned = [SURROGATE.sub("\ufffd", str(token)) for token in tokens]
            yield Sentence(row.line, cleaned, [str(tag) for tag in tags])


def is_word(value: Any) -> bool:
    """Whether a value can be a token or tag."""
    return (isinstance(value, str) and value != "") or (isinstance(value, int) and not isinstance(value, bool))


def check_one_tag_key(file: RecordFile) -> None:
    """Refuse records with several lists that could be the tags.

    Raises:
        DataError: naming them.
    """
    if "tags" in file.fields:
        return
    for line, value in file.sample_objects(1):
        keys = [key for key in value if key.lower() in TAGS.split()] if isinstance(value, dict) else []
        if len(keys) > 1:
            listed = ", ".join(f"'{key}'" for key in keys)
            raise file.error(
                line,
                f"the records have several keys that can be the tags: {listed}",
                value,
                pick("one of them to be chosen", "指定其中之一"),
                f"--fields tags={keys[0]}",
                f"记录中有多个可能的标签键：{listed}",
            )


# ---- columns


@dataclass(frozen=True)
class Layout:
    """Which columns (from 0) hold what; ``misc`` is the one that tells of blanks, ``ids`` the numbers of tokens."""

    tokens: int
    tags: int
    width: int
    tabs: bool
    ids: int | None = None
    misc: int | None = None

    def split(self, text: str) -> list[str]:
        """The columns of a line."""
        return text.split("\t") if self.tabs else re.split("[ \t]+", text.strip(BLANKS))

    def is_comment(self, text: str) -> bool:
        """Whether a line is no token: a token "#" has as many columns as others."""
        return text.startswith("#") and (self.ids is not None or len(self.split(text)) < self.width)


def column_sentences(file: RecordFile) -> Iterator[Sentence]:
    """The sentences of a file with a token per line and blank lines between sentences."""
    lines = ((number, text.rstrip("\r\n")) for number, text in file.lines())
    first = list(islice(lines, SAMPLED_LINES))
    layout = find_layout(file, [text for _, text in first])
    tells_blanks = False
    sentences = []
    for block in blocks(chain(first, lines)):
        file.seen += 1
        sentence = read_block(file, block, layout)
        if sentence is None:
            continue
        tells_blanks = tells_blanks or (sentence.spaces is not None and not all(sentence.spaces[:-1]))
        sentences.append(sentence)
    for sentence in sentences:
        # a file in which no word is joined to the next does not tell, unless the text itself stands beside it
        if not tells_blanks:
            sentence.spaces = None
        if sentence.spaces is None and sentence.text:
            sentence.spaces = spaces_from_text(sentence.tokens, sentence.text)
        yield sentence


def blocks(lines: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """The lines between blank lines."""
    block: list[tuple[int, str]] = []
    for number, text in lines:
        if text.strip(BLANKS):
            block.append((number, text))
        elif block:
            yield block
            block = []
    if block:
        yield block


def read_block(file: RecordFile, block: list[tuple[int, str]], layout: Layout) -> Sentence | None:
    """One sentence; None if there is no token, or a line is bad (then the whole sentence is left out)."""
    tokens, tags, spaces = [], [], []
    text, begin, joined_until = "", 0, ("", True)
    for number, line in block:
        if layout.is_comment(line):
            found = TEXT_COMMENT.match(line)
            text = found[1].strip() if found else text
            continue
        cells = layout.split(line)
        if cells[0].startswith("-DOCSTART-"):
            continue
        if file.damaged(number, line):
            return None
        if layout.ids is not None:
            number_range = RANGE_ID.fullmatch(cells[layout.ids])
            if number_range:  # several words in one token of the text, such as "don't": the words follow
                follows = layout.misc is None or "SpaceAfter=No" not in cells[-1].split("|")
                joined_until = (number_range[2], follows)
            if number_range or "." in cells[layout.ids]:  # 5.1 is a word that is not in the text
                continue
        if max(layout.tokens, layout.tags) >= len(cells) or not cells[layout.tokens] or not cells[layout.tags].strip():
            what = pick(f"the line has {len(cells)} columns, or an empty one", f"该行有 {len(cells)} 列，或有空列")
            need = f"{layout.tokens + 1} 列（词）与 {layout.tags + 1} 列（标签）"
            file.bad(
                number,
                what,
                line,
                pick(f"a token in column {layout.tokens + 1} and its tag in column {layout.tags + 1}", f"第 {need}"),
                pick("leave a blank line between sentences only", "空行只用于分隔句子"),
            )
            return None
        begin = begin or number
        tokens.append(cells[layout.tokens])
        tags.append(sys.intern(cells[layout.tags].strip()))
        if layout.misc is not None and layout.ids is not None:
            inside = joined_until[0] != ""
            last = cells[layout.ids] == joined_until[0]
            own = len(cells) <= layout.misc or "SpaceAfter=No" not in cells[layout.misc].split("|")
            spaces.append(joined_until[1] if last else own and not inside)
            joined_until = ("", True) if last else joined_until
    if not tokens:
        return None
    return Sentence(begin, tokens, tags, spaces if layout.misc is not None else None, text)


def find_layout(file: RecordFile, lines: Sequence[str]) -> Layout:
    """Tell the columns from the first lines.

    Raises:
        DataError: it is not a file of columns, or it is not clear which column holds the tags.
        Unusable: the first, of a file found in a folder.
    """
    content = [line for line in lines if line.strip(BLANKS)]
    tabs = sum("\t" in line for line in content if not line.startswith("#")) > 0
    split = Layout(0, 0, 0, tabs).split
    rows = [split(line) for line in content if not re.match(r"#\s|#.*=|-DOCSTART-", line)]
    is_conllu = file.suffix == "conllu" or (tabs and sum(len(row) == len(CONLLU) for row in rows) > 0.9 * len(rows))
    widths = Counter(map(len, rows))
    width = len(CONLLU) if is_conllu and tabs else usable_width(widths)
    if width < 2 or len(rows) < 1:
        file.refuse(
            pick("this is not a file with a token and its tag on each line", "这不是每行一个词及其标签的文件")
            + f": {file.preview.strip()[:60]!r}",
            "write columns (token, tag) with blank lines between sentences, or jsonl of tokens and tags",
            "请写成列格式（词、标签，句间空行），或 tokens、tags 的 jsonl",
            why="expected CoNLL columns, CoNLL-U, or jsonl",
        )
    file.report.format = "CoNLL-U" if is_conllu else pick(f"columns ({width})", f"列格式（{width} 列）")
    if is_conllu:
        return conllu_layout(file, rows)
    whole = [row for row in rows if len(row) >= width]
    columns = [Column(i + 1, [row[i] for row in whole]) for i in range(width)]
    ids = 0 if width > 2 and columns[0].cells[0] == "1" and all(map(is_id, columns[0].cells)) else None
    given = {role: column_number(file, role, name, width, whole[0]) for role, name in file.fields.items()}
    tokens = given.get("tokens", 0 if ids is None else 1)
    if "tags" in given:
        tags, reason = given["tags"], pick("as named", "按指定")
    else:
        tags, reason = tag_column(file, columns, {tokens} | ({ids} if ids is not None else set()))
    column = pick("column ", "列 ")
    file.report.taken.update(tokens=f"{column}{tokens + 1}", tags=f"{column}{tags + 1} ({reason})")
    return Layout(tokens, tags, width, tabs, ids)


def usable_width(widths: Counter[int]) -> int:
    """The number of columns that nearly all lines have at least; 0 where lines are of all lengths, as in texts."""
    total = sum(widths.values())
    if not total or len([n for n, count in widths.items() if count > 0.02 * total]) > 3:
        return 0
    return max(width for width in widths if sum(c for n, c in widths.items() if n >= width) >= 0.95 * total)


def is_id(cell: str) -> bool:
    """Whether this is the number of a token: 3, 3-4, 3.1."""
    return cell.replace("-", "").replace(".", "").isdigit()


def column_number(file: RecordFile, role: str, name: str, width: int, row: list[str]) -> int:
    """The column (from 0) that the user named by its number."""
    if not name.isdigit() or not 1 <= int(name) <= width:
        raise no_name(file, role, name, [str(number + 1) for number in range(width)], (1, row))
    return int(name) - 1


def tag_column(file: RecordFile, columns: list[Column], taken: set[int]) -> tuple[int, str]:
    """The column of the tags (from 0) and why.

    Raises:
        DataError: several columns could be it.
    """
    rest = [column for column in columns if column.number - 1 not in taken]
    spans = [
        column
        for column in rest
        if all(SPAN_TAG.fullmatch(cell) for cell in column.values) and not column.values <= {"-", "_"}
    ]
    if spans:
        reason = pick("its tags are those of spans", "其标签为片段标签")
        return spans[-1].number - 1, reason if len(spans) == 1 else reason + pick("; the last such", "；取最后一列")
    if len(rest) == 1:
        return rest[0].number - 1, pick("the only other column", "唯一的其余列")
    raise ambiguous(file, columns, ("tokens", "tags"))


def conllu_layout(file: RecordFile, rows: list[list[str]]) -> Layout:
    """The columns of CoNLL-U: forms, and universal parts of speech unless another column is named."""
    places = {name: number for number, name in enumerate(CONLLU)}
    chosen = {"tokens": "form", "tags": "upos", **{role: name.lower() for role, name in file.fields.items()}}
    for role, name in chosen.items():
        if name.isdigit() and 1 <= int(name) <= len(CONLLU):
            chosen[role] = CONLLU[int(name) - 1]
        elif name not in places:
            raise no_name(file, role, name, CONLLU, (1, rows[0]))
    file.report.taken.update(tokens=chosen["tokens"].upper(), tags=chosen["tags"].upper())
    return Layout(places[chosen["tokens"]], places[chosen["tags"]], len(CONLLU), True, 0, places["misc"])


def spaces_from_text(tokens: Sequence[str], text: str) -> list[bool] | None:
    """Whether white space follows each token in the text; None where the text is not made of the tokens.

    >>> spaces_from_text(["American", "forces", "."], "American forces.")
    [True, False, False]
    """
    spaces = []
    at = 0
    for token in tokens:
        if not text.startswith(token, at):
            return None
        at += len(token)
        after = at
        while after < len(text) and text[after].isspace():
            after += 1
        spaces.append(after > at)
        at = after
    return spaces if at == len(text) else None
