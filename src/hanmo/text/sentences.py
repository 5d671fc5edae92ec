"""The sentences of running text in Chinese, English, or both, and words put together to a text again.

A sentence ends with a mark and the quotes and brackets that close behind it. A Chinese mark ends one wherever it
stands; a full stop, question mark or exclamation mark of ASCII only before white space, or where Chinese goes on
without any. A full stop after an abbreviation or an initial ends nothing, nor does one before a lower-case letter. A
line ends a sentence, too, unless the next one begins in lower case, as lines do that were broken at a width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hanmo.text.segment import HAN

CLOSERS = "\"'”’」』）)】》\\]"
END = re.compile(
    rf"""
    [。！？｡]+ [{CLOSERS}]*                                 # Chinese marks
    | [；;] (?=\s*[{HAN}])                                  # parts one long Chinese sentence
    | …+ [{CLOSERS}]* (?=\s|$|[{HAN}“「『])
    | [.!?]+ [{CLOSERS}]* (?=\s+ | $ | (?<![0-9].) [{HAN}])
    """,
    re.VERBOSE,
)
ABBREVIATION = re.compile(
    r"""(?: ^ | [\s(\["“‘] ) (?: [A-Za-z] | (?:[A-Za-z]\.)+[A-Za-z]
    | Mr | Mrs | Ms | Dr | Prof | St | Sen | Gov | Gen | Col | Capt | Sgt | Rev | Hon | Jr | Sr | Inc | Ltd | Co | Corp
    | Fig | Figs | Eq | Eqs | Sec | Tab | Ref | Refs | No | Nos | Vol | pp | p | ch | ed | eds | al | vs | cf | ca
    | resp | etc | approx | dept | est | Jan | Feb | Mar | Apr | Jun | Jul | Aug | Sep | Sept | Oct | Nov | Dec ) $""",
    re.VERBOSE | re.IGNORECASE,
)
CLAUSE_END = re.compile(r"(?<=[，；：])|(?<=[,;:])(?![0-9])")
MARKS = " \t,.;:，。；："
LEAST_CLAUSE = 5  # characters
LOOK_BACK = 16  # characters before a full stop that may be an abbreviation
LINE = re.compile(r"\r\n?|\n|\u2028|\u2029|\x85")
NO_BLANK_BEFORE = frozenset(",.!?;:%)]}…'’”") | frozenset("，。！？；：、）】》」』％")
NO_BLANK_AFTER = frozenset("([{“‘$#") | frozenset("（【《「『￥")
WIDE = re.compile(f"[{HAN}\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65…—]")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text in order, without white space at their ends; none of them is empty.

    >>> split_sentences("Dr. Li paid 3.50 yuan. Why? 他说：“走吧。”我们走了！")
    ['Dr. Li paid 3.50 yuan.', 'Why?', '他说：“走吧。”', '我们走了！']
    """
    return [sentence for paragraph in paragraphs(text) for sentence in sentences_of(paragraph)]


def split_clauses(text: str) -> list[str]:
    """The clauses of a text, without the marks at their ends; very short ones stay with the one before.

    >>> split_clauses("针对管理制度不完善的问题,提出了一种新的方法，结果表明，该方法有效。")
    ['针对管理制度不完善的问题', '提出了一种新的方法，结果表明', '该方法有效']
    """
    clauses: list[str] = []
    for sentence in split_sentences(text):
        held = ""
        for part in CLAUSE_END.split(sentence):
            if held and min(len(part.strip(MARKS)), len(held)) < LEAST_CLAUSE:
                held += part
                continue
            clauses.append(held)
            held = part
        clauses.append(held)
    return [clause for clause in (clause.strip(MARKS) for clause in clauses) if clause]


def paragraphs(text: str) -> list[str]:
    """The lines of a text; one that begins in lower case belongs to the line before, unless that is blank."""
    joined: list[str] = []
    after_blank = True
    for line in map(str.strip, LINE.split(text)):
        if line and line[:1].islower() and line[:1].isascii() and not after_blank and joined[-1][-1] not in ".!?。！？":
            joined[-1] += " " + line
        elif line:
            joined.append(line)
        after_blank = not line
    return joined


def sentences_of(line: str) -> list[str]:
    """The sentences of one line."""
    found, begin = [], 0
    for match in END.finditer(line):
        if match[0][0] == "." and not ends_with_stop(line, match):
            continue
        found.append(line[begin : match.end()].strip())
        begin = match.end()
    return [sentence for sentence in (*found, line[begin:].strip()) if sentence]


def ends_with_stop(line: str, match: re.Match[str]) -> bool:
    """Whether a full stop ends a sentence: not after an abbreviation, and not before a lower-case letter."""
    after = line[match.end() : match.end() + 8].lstrip()
    if after[:1].islower() and after[:1].isascii():
        return False
    before = line[max(0, match.start() - LOOK_BACK) : match.start()]
    return not (after and ABBREVIATION.search(before))


def halves(text: str) -> tuple[str, str]:
    """A text in two, near its middle: after a sentence, else after a clause, else at a blank, else anywhere.

    >>> halves("我来，我见，我胜")
    ('我来，', '我见，我胜')
    """
    middle = len(text) // 2
    for pattern in (r"[。！？.!?；;\n]+", r"[，,：:、）)]+", r"\s+"):
        ends = [found.end() for found in re.finditer(pattern, text) if found.end() < len(text)]
        best = min(ends, key=lambda end: abs(end - middle), default=0)
        if len(text) // 5 <= best <= len(text) - len(text) // 5 and best:
            return text[:best], text[best:]
    return text[:middle], text[middle:]


def join_words(words: Sequence[str]) -> str:
    """A text from its words: blanks stand between words of letters, none beside Chinese characters and closing marks.

    >>> join_words(["我", "用", "machine", "learning", "。"]), join_words(["Well", ",", "no", "(", "!", ")"])
    ('我用machine learning。', 'Well, no (!)')
    """
    text = ""
    for word in words:
        if not word:
            continue
        tight = not text or word[0] in NO_BLANK_BEFORE or text[-1] in NO_BLANK_AFTER
        text += word if tight or WIDE.match(text[-1]) or WIDE.match(word[0]) else f" {word}"
    return text
