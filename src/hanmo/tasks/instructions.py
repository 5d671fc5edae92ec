"""Instructions whose obedience a program can verify: "at least 300 words", "no commas", "in JSON".

The names and arguments are those of IFEval (Zhou et al. 2023, *Instruction-Following Evaluation for Large Language
Models*), so that its file is read as it is; what each demands follows the published description. Chinese is measured as
well: a word is a Chinese character or a run of other letters, and ，is a comma, too. A few more names, which IFEval
lacks, are marked below.

Where IFEval asks nltk and langdetect, this asks Hanmo's own division of sentences and
:mod:`hanmo.text.which_language`; counts of sentences and guesses of languages may differ there for odd texts.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hanmo.errors import DataError, nearest
from hanmo.tasks.diversity import HAN
from hanmo.text.sentences import split_sentences
from hanmo.text.which_language import LANGUAGES, is_language

WORD = re.compile(rf"[{HAN}]|(?:(?![{HAN}])\w)+")
TOKEN = re.compile(r"\w+(?:[-'’.]\w+)*")  # for capitals: a hyphenated word is one
ITEM = re.compile(r"^[ \t]*(?:[-*+•·●▪◦]|[0-9０-９]{1,3}[.)、．）]|[（(][0-9一二三四五六七八九十]{1,3}[）)]"
                  r"|[一二三四五六七八九十]{1,3}[、.．])[ \t]*\S", re.MULTILINE)  # fmt: skip
RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": operator.ge,
    "less than": operator.lt,
    "at most": operator.le,
    "more than": operator.gt,
    "exactly": operator.eq,
}
FENCE = re.compile(r"^```(?:json)?|```$", re.IGNORECASE)
POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

Arguments = Mapping[str, Any]


# What an argument may be ----------------------------------------------------------------------------------------------


def whole(value: Any) -> int:
    """A number of things; ValueError where it is none."""
    if isinstance(value, bool) or float(value) != int(float(value)) or float(value) < 0:
        raise ValueError
    return int(float(value))


def text(value: Any) -> str:
    """A text that is not blank; ValueError where it is none."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value.strip()


def texts(value: Any) -> list[str]:
    """Some texts; ValueError where there are none."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError
    return [text(item) for item in value]


def relation(value: Any) -> Callable[[int, int], bool]:
    """How two numbers are compared; KeyError where it is not known."""
    return RELATIONS[str(value)]


def language(value: Any) -> str:
    """The code of a language; ValueError where it is not known."""
    if value not in LANGUAGES:
        raise ValueError
    return str(value)


WANTED: dict[Callable[[Any], Any], str] = {
    whole: "a whole number",
    text: "a text",
    texts: "a list of texts",
    relation: ", ".join(RELATIONS),
    language: ", ".join(LANGUAGES),
}


# What is counted and found --------------------------------------------------------------------------------------------


def count_words(reply: str) -> int:
    """Words: a Chinese character is one.

    >>> count_words("我用 machine-learning，很好。")
    6
    """
    return len(WORD.findall(reply))


def count_phrase(reply: str, phrase: str) -> int:
    """How often a phrase stands in a text, in whatever case."""
    return reply.lower().count(phrase.lower())


def has_word(reply: str, word: str) -> bool:
    """Whether a text has a word: not as part of another one, unless it is Chinese."""
    first, last = ("" if re.match(rf"[{HAN}]|\W", end) else r"\b" for end in (word[0], word[-1]))
    return bool(re.search(first + re.escape(word) + last, reply, re.IGNORECASE))


def parts(reply: str, pattern: str) -> list[str] | None:
    """What stands between separators; the first and the last may be empty, another empty one gives None."""
    found = re.split(pattern, reply)
    if any(not part.strip() for part in found[1:-1]):
        return None
    return [part for part in found if part.strip()]


def is_json(reply: str) -> bool:
    """Is it all JSON, perhaps in a fence of Markdown?"""
    try:
        json.loads(FENCE.sub("", FENCE.sub("", reply.strip()).strip()).strip())
    except (ValueError, RecursionError):
        return False
    return True


def first_word(reply: str, paragraphs: int, nth: int, word: str) -> bool:
    """So many paragraphs, divided by blank lines, and with which word one of them begins."""
    found = [part.strip() for part in reply.split("\n\n")]
    kept = [part for part in found if part]
    if len(kept) != paragraphs or not 1 <= nth <= len(found) or not found[nth - 1]:
        return False
    start = found[nth - 1].lower().lstrip("'\"“‘「")
    wanted = word.lower()
    if re.match(rf"[{HAN}]", wanted):
        return start.startswith(wanted)
    return re.split(r"[\s.,?!'\"，。？！：；、”]", start)[0] == wanted


def highlights(reply: str) -> int:
    """Stretches in ``*single*`` or ``**double**`` stars."""
    single = [found for found in re.findall(r"\*([^\n*]*)\*", reply) if found.strip()]
    return len(single) + len([found for found in re.findall(r"\*\*([^\n*]*)\*\*", reply) if found.strip()])


def postscript(reply: str, marker: str) -> bool:
    """Does a postscript begin somewhere?"""
    pattern = POSTSCRIPTS.get(marker) or re.escape(marker.lower())
    return bool(re.search(pattern + r".*$", reply.lower(), re.MULTILINE))


def two_responses(reply: str) -> bool:
    """Two different texts with six stars between them."""
    found = parts(reply, re.escape("******"))
    return found is not None and len(found) == 2 and found[0].strip() != found[1].strip()


def paragraphs(reply: str) -> int:
    """How many texts stand between lines of three stars; -1 where one of them is empty."""
    found = parts(reply, r"\s?\*\*\*\s?")
    return -1 if found is None else len(found)


def sections(reply: str, splitter: str) -> int:
    """How many numbered sections begin, such as "Section 1" or "第1章"."""
    if splitter == "第":
        return len(re.findall(r"第\s?[0-9０-９一二三四五六七八九十]+", reply))
    return len(re.findall(rf"{re.escape(splitter)}\s?\d+", reply))


def bullets(reply: str) -> int:
    """Items of lists that begin with * or -."""
    return len(re.findall(r"^\s*\*[^*].*$", reply, re.MULTILINE)) + len(re.findall(r"^\s*-.*$", reply, re.MULTILINE))


def ends_with(reply: str, phrase: str) -> bool:
    """Is that its end, but for quotation marks?"""
    return reply.strip().strip('"”').lower().endswith(phrase.lower())


def starts_with(reply: str, phrase: str) -> bool:
    """Is that its beginning, but for quotation marks?"""
    return reply.strip().lstrip("\"'“‘「").lower().startswith(phrase.lower())


def capital_words(reply: str) -> int:
    """Words in capital letters."""
    return sum(word.isupper() for word in TOKEN.findall(reply))


# The instructions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """What is demanded.

    Args:
        obeyed: from a reply, and the values of the arguments in their order, to whether it is.
        needs: the names of the arguments, and what turns each into a value.
    """

    obeyed: Callable[..., bool]
    needs: Mapping[str, Callable[[Any], Any]]


def rule(obeyed: Callable[..., bool], **needs: Callable[[Any], Any]) -> Instruction:
    """A shorter way to write one."""
    return Instruction(obeyed, needs)


INSTRUCTIONS: dict[str, Instruction] = {
    "keywords:existence": rule(lambda r, some: all(count_phrase(r, word) for word in some), keywords=texts),
    "keywords:frequency": rule(
        lambda r, word, many, how: how(count_phrase(r, word), many), keyword=text, frequency=whole, relation=relation
    ),
    "keywords:forbidden_words": rule(lambda r, some: not any(has_word(r, w) for w in some), forbidden_words=texts),
    "keywords:letter_frequency": rule(
        lambda r, letter, many, how: how(count_phrase(r, letter), many),
        letter=text,
        let_frequency=whole,
        let_relation=relation,
    ),
    "language:response_language": rule(is_language, language=language),
    "length_constraints:number_sentences": rule(
        lambda r, many, how: how(len(split_sentences(r)), many), num_sentences=whole, relation=relation
    ),
    "length_constraints:number_paragraphs": rule(lambda r, many: paragraphs(r) == many, num_paragraphs=whole),
    "length_constraints:number_words": rule(
        lambda r, many, how: how(count_words(r), many), num_words=whole, relation=relation
    ),
    "length_constraints:nth_paragraph_first_word": rule(
        first_word, num_paragraphs=whole, nth_paragraph=whole, first_word=text
    ),
    "detectable_content:number_placeholders": rule(
        lambda r, many: len(re.findall(r"\[.*?\]", r)) >= many, num_placeholders=whole
    ),
    "detectable_content:postscript": rule(postscript, postscript_marker=text),
    "detectable_format:number_bullet_lists": rule(lambda r, many: bullets(r) == many, num_bullets=whole),
    "detectable_format:constrained_response": rule(lambda r: any(option in r for option in OPTIONS)),
    "detectable_format:number_highlighted_sections": rule(lambda r, many: highlights(r) >= many, num_highlights=whole),
    "detectable_format:multiple_sections": rule(
        lambda r, splitter, many: sections(r, splitter) >= many, section_spliter=text, num_sections=whole
    ),
    "detectable_format:json_format": rule(is_json),
    "detectable_format:title": rule(lambda r: any(t.strip("<> ") for t in re.findall(r"<<[^\n]+>>|《[^\n》]+》", r))),
    "combination:two_responses": rule(two_responses),
    "combination:repeat_prompt": rule(
        lambda r, prompt: r.strip().lower().startswith(prompt.lower()), prompt_to_repeat=text
    ),
    "startend:end_checker": rule(ends_with, end_phrase=text),
    "startend:quotation": rule(lambda r: len(r.strip()) > 1 and r.strip()[0] in '"“' and r.strip()[-1] in '"”'),
    "change_case:capital_word_frequency": rule(
        lambda r, many, how: how(capital_words(r), many), capital_frequency=whole, capital_relation=relation
    ),
    "change_case:english_capital": rule(lambda r: r.isupper() and is_language(r, "en")),
    "change_case:english_lowercase": rule(lambda r: r.islower() and is_language(r, "en")),
    "punctuation:no_comma": rule(lambda r: not re.search("[,，]", r)),
    # not of IFEval
    "startend:start_checker": rule(starts_with, start_phrase=text),
    "detectable_format:number_items": rule(
        lambda r, many, how: how(len(ITEM.findall(r)), many), num_items=whole, relation=relation
    ),
    "change_case:capital": rule(lambda r: r == r.upper()),
    "change_case:lowercase": rule(lambda r: r == r.lower()),
}
DEFAULTS = {"relation": "exactly", "let_relation": "at least", "capital_relation": "at least"}


def arguments_of(check: Arguments, where: str = "") -> tuple[Instruction, list[Any]]:
    """An instruction and the values of its arguments.

    Raises:
        DataError: there is no such instruction, or an argument is missing or of another kind; it names them.
    """
    name = str(check.get("id"))
    found = INSTRUCTIONS.get(name)
    if found is None:
        hint = nearest(name, INSTRUCTIONS)
        raise DataError(f"unknown instruction '{name}'", where=where, fix=hint, zh=f"未知的指令检查项 '{name}'：{hint}")
    values = []
    for argument, convert in found.needs.items():
        given = check.get(argument, DEFAULTS.get(argument))
        try:
            values.append(convert(given))
        except (ValueError, TypeError, KeyError, OverflowError):
            wanted = WANTED[convert]
            raise DataError(
                f"the instruction '{name}' has {argument} = {given!r}",
                where=where,
                fix=f"it has to be: {wanted}",
                zh=f"指令检查项 '{name}' 的 {argument} 为 {given!r}；应为：{wanted}",
            ) from None
    return found, values


def obeyed(check: Arguments, reply: str) -> bool:
    """Whether a reply obeys an instruction; a blank one never does.

    >>> obeyed({"id": "length_constraints:number_words", "relation": "at most", "num_words": 5}, "今天天气好。")
    True

    Raises:
        DataError: as :func:`arguments_of`.
    """
    instruction, values = arguments_of(check)
    return bool(reply.strip()) and instruction.obeyed(reply, *values)


def obeyed_loosely(check: Arguments, reply: str) -> bool:
    """The same where the first line ("Sure, here it is:"), the last, and the stars of Markdown may be left out."""
    lines = reply.split("\n")
    forms = [reply, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(obeyed(check, form) for form in (*forms, *(form.replace("*", "") for form in forms)))


def check_instructions(checks: Sequence[Arguments], where: str = "") -> None:
    """Refuse what cannot be verified.

    Raises:
        DataError: as :func:`arguments_of`.
    """
    for check in checks:
        arguments_of(check, where)
