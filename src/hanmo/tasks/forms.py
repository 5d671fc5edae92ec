"""The forms of written texts, checked rule by rule: Chinese regulated verse, English verse, letters.

Each check says which rules hold and which do not, with the lines that break them, in English and Chinese. The rules
are those that a reader checks with the ear and the finger: lines, lengths, rhymes, greeting and closing. The tones
within a line (平仄), parallel couplets and all of a poem's worth are not judged.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from hanmo.errors import UsageError, nearest
from hanmo.language import pick
from hanmo.tasks.rhyme_groups import is_level
from hanmo.tasks.rhymes import commonest, line_syllables, modern, pingshui, rhymes, words

VERSE_ENDS = re.compile(r"[，。！？；：、,.!?;:\n\r\u2028\u2029…—]+")
NOTE = re.compile(r"（[^（）]*）|\([^()]*\)|【[^【】]*】|［[^［］]*］|\[[^\[\]]*\]")
SHOWN_CHARACTERS = 12


@dataclass(frozen=True)
class Rule:
    """One rule of a form.

    Args:
        name: ``lines``, ``length``, ``script``, ``rhyme``, ``rhyme words``, ``syllables``, ``greeting``, ``body``,
            ``closing`` or ``signature``.
        holds: whether the text keeps it.
        en: what is asked and what was found.
        zh: the same in Chinese.
        lines: the lines that break it, counted from 1; empty where it holds or the text as a whole breaks it.
    """

    name: str
    holds: bool
    en: str
    zh: str
    lines: tuple[int, ...] = ()

    def __str__(self) -> str:
        mark = "✓" if self.holds else "✗"
        place = ", ".join(map(str, self.lines))
        place = pick(f" (line {place})", f"（第 {place.replace(', ', '、')} 行）") if place else ""
        return f"{mark} {pick(self.en, self.zh)}{place}"


@dataclass(frozen=True)
class Report:
    """The rules of one form, for one text.

    Args:
        form: the name of the form.
        rules: in the order in which a reader would check them.
    """

    form: str
    rules: tuple[Rule, ...]

    @property
    def holds(self) -> bool:
        """Whether every rule holds."""
        return all(rule.holds for rule in self.rules)

    @property
    def share(self) -> float:
        """The share of the rules that hold, 0.0 to 1.0."""
        return sum(rule.holds for rule in self.rules) / len(self.rules)

    def rule(self, name: str) -> Rule:
        return next(rule for rule in self.rules if rule.name == name)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rules))


def verses(text: str) -> list[str]:
    """The lines of a Chinese poem: what stands between marks, without spaces, quotation marks, a title and notes.

    A first line in 《》 is a title; what stands in round or square brackets is a note of the edition.

    >>> verses("《静夜思》\\n床前明月光，疑是地上霜。")
    ['床前明月光', '疑是地上霜']
    """
    text = re.sub(r"\A\s*(?:#+\s*)?[《〈][^》〉\n]*[》〉][ \t\r]*(?=\n|\Z)", "", text)
    text = NOTE.sub("", text)
    kept = "".join(sign for sign in text if sign == "\n" or not inaudible(sign))
    return [line for line in VERSE_ENDS.split(kept) if line]


def inaudible(sign: str) -> bool:
    """Spaces, brackets, quotation marks and invisible signs; the marks that end a verse are kept."""
    if VERSE_ENDS.match(sign):
        return False
    return unicodedata.category(sign) in ("Zs", "Ps", "Pe", "Pi", "Pf", "Cf", "Cc", "Mn") or sign in "\"'*_#·"


def is_han(sign: str) -> bool:
    name = unicodedata.name(sign, "")
    return name.startswith("CJK UNIFIED") or name.startswith("CJK COMPAT") or sign in "々〇"


def off(found: Sequence[bool]) -> tuple[int, ...]:
    """The numbers, from 1, of the lines that do not keep a rule."""
    return tuple(number for number, holds in enumerate(found, 1) if not holds)


def regulated(text: str, form: str, count: int, length: int, rhyme: str = "either") -> Report:
    """A poem of ``count`` lines with ``length`` characters each, the even lines in one rhyme.

    Args:
        rhyme: ``pingshui`` (平水韻; eight lines ask for a level tone, four may have any, as in 春晓), ``modern``
            (中华新韵, whatever the tone) or ``either``: one of the two.
    """
    lines = verses(text)
    right = [len(line) == length for line in lines]
    script = [all(map(is_han, line)) for line in lines]
    lengths = "、".join(str(len(line)) for line in lines[:SHOWN_CHARACTERS])
    rules = [
        Rule(
            "lines", len(lines) == count, f"{count} lines, found {len(lines)}", f"应为 {count} 句，实为 {len(lines)} 句"
        ),
        Rule(
            "length",
            bool(lines) and all(right),
            f"{length} characters a line, found {lengths.replace('、', ', ') or 'none'}",
            f"每句应为 {length} 字，实为 {lengths or '无'}",
            off(right),
        ),
        Rule("script", all(script), "Chinese characters only", "只用汉字", off(script)),
        *chinese_rhyme(lines, rhyme, level=count > 4),
    ]
    return Report(form, tuple(rules))


def chinese_rhyme(lines: Sequence[str], system: str, level: bool) -> list[Rule]:
    """The last characters of the even lines: in one rhyme, and each another character."""
    ends = {number: line[-1] for number, line in enumerate(lines, 1) if number % 2 == 0}
    shown = "、".join(list(ends.values())[:SHOWN_CHARACTERS]) or "—"
    names = {"pingshui": ("平水韵",), "modern": ("中华新韵",), "either": ("平水韵", "中华新韵")}[system]
    tried = [(name, *common_rhyme(list(ends.values()), name, level)) for name in names]
    name, group, fits = max(tried, key=lambda entry: (all(entry[2]), sum(entry[2])))
    broken = tuple(number for number, fit in zip(ends, fits, strict=True) if not fit)
    holds = len(ends) >= 2 and not broken
    en = f"the even lines rhyme: {shown} ({name} {group or '—'})"
    zh = f"偶数句押韵：{shown}（{name}{'·' + group if group else ''}）"
    again = tuple(number for number, end in ends.items() if end in list(ends.values())[: number // 2 - 1])
    return [
        Rule("rhyme", holds, en, zh, broken),
        Rule("rhyme words", not again, "no rhyme word stands twice", "韵脚不重复", again),
    ]


def common_rhyme(ends: Sequence[str], system: str, level: bool) -> tuple[str, list[bool]]:
    """The rhyme that most of the characters share, and which of them do."""
    if system == "平水韵":
        choices = [frozenset(name for name in pingshui(end) if is_level(name) or not level) for end in ends]
    else:
        choices = [modern(end) for end in ends]
    group = commonest(choices)
    return group, [group in choice and bool(group) for choice in choices]


def english_lines(text: str) -> list[str]:
    """The lines that hold a word."""
    return [line.strip() for line in text.splitlines() if words(line)]


def count_rule(lines: Sequence[str], count: int) -> Rule:
    found = len(lines)
    return Rule("lines", found == count, f"{count} lines, found {found}", f"应为 {count} 行，实为 {found} 行")


def syllable_rule(lines: Sequence[str], wanted: Sequence[tuple[int, int]]) -> Rule:
    """Each line within its least and greatest number of syllables; lines beyond the form's are left to ``lines``."""
    counts = [line_syllables(line) for line in lines[: len(wanted)]]
    fits = [any(low <= n <= high for n in found) for found, (low, high) in zip(counts, wanted, strict=False)]
    asked = "-".join(str(low) if low == high else f"{low}to{high}" for low, high in wanted).replace("to", "…")
    shown = "-".join(str(min(found)) for found in counts) or "0"
    holds = len(lines) >= len(wanted) and all(fits)
    return Rule("syllables", holds, f"{asked} syllables, found {shown}", f"音节应为 {asked}，实为 {shown}", off(fits))


def english_rhyme(lines: Sequence[str], scheme: str) -> Rule:
    """The last words of lines with the same letter in the scheme rhyme with the first of them."""
    ends = [words(line)[-1] for line in lines[: len(scheme)]]
    broken = tuple(
        number
        for number, end in enumerate(ends, 1)
        if scheme.index(scheme[number - 1]) < number - 1
        and not all(
            rhymes(other, end)
            for other, letter in zip(ends[: number - 1], scheme, strict=False)
            if letter == scheme[number - 1]
        )
    )
    shown = ", ".join(ends)
    holds = len(ends) == len(scheme) and not broken
    return Rule("rhyme", holds, f"the rhymes go {scheme}: {shown}", f"韵式应为 {scheme}：{shown}", broken)


def haiku(text: str, form: str = "haiku") -> Report:
    """Three lines of 5, 7 and 5 syllables."""
    lines = english_lines(text)
    return Report(form, (count_rule(lines, 3), syllable_rule(lines, [(5, 5), (7, 7), (5, 5)])))


def couplet(text: str, form: str = "couplet") -> Report:
    """Two lines that rhyme."""
    lines = english_lines(text)
    return Report(form, (count_rule(lines, 2), english_rhyme(lines, "AA")))


def limerick(text: str, form: str = "limerick") -> Report:
    """Five lines, AABBA, the third and fourth shorter: 7 to 10 syllables and 5 to 7."""
    lines = english_lines(text)
    wanted = [(7, 10), (7, 10), (5, 7), (5, 7), (7, 10)]
    return Report(form, (count_rule(lines, 5), syllable_rule(lines, wanted), english_rhyme(lines, "AABBA")))


GREETING = {
    "en": re.compile(
        r"^(?:dear|hi|hello|hey|greetings|to whom it may concern|good (?:morning|afternoon|evening))\b", re.I
    ),
    "zh": re.compile(
        r"^(?:亲爱的|親愛的|尊敬的|敬爱的|敬愛的|致[：:]?|"
        r".{0,20}(?:您好|你好|大家好|钧鉴|鈞鑒|台鉴|台鑒|惠鉴|惠鑒|如晤)"
        r"|[^，。！？,.!?]{1,20}[：:]$)"
    ),
}
CLOSING = {
    "en": re.compile(
        r"^(?:(?:yours|sincerely|best|kind|warm|many thanks|with|regards|cheers|thanks|thank you|respectfully|"
        r"cordially|love|take care|all the best)\b[^.!?]{0,40}[,.!]?|looking forward\b.*)$",
        re.I,
    ),
    "zh": re.compile(
        r"^(?:此致.*|敬礼[！!]?|敬禮[！!]?|(?:顺颂|順頌|顺祝|順祝|敬祝|敬颂|敬頌|恭祝|即颂|即頌|谨祝|謹祝|祝|盼复|盼覆|"
        r"专此|專此|谨启|謹啟|再次感谢|再次感謝).{0,30}|.{1,20}(?:敬上|谨上|謹上|谨启|謹啟|拜上|上))$"
    ),
}
DATE = re.compile(r"^[\d〇一二三四五六七八九十廿]+\s*(?:年|[-/.]).*\d?.*$")
HEADER = re.compile(r"^(?:subject|to|from|cc|date|主题|主題|收件人|发件人|發件人|日期|标题|標題)\s*[：:]", re.I)
CLOSING_LINES = 6  # a closing stands among the last lines
SIGNATURE_LENGTH = 40


def letter(text: str, form: str, language: str) -> Report:
    """A letter or mail: a greeting at its head, something said, a closing, and a name below it.

    Header lines (``Subject:``, ``主题：``) before the greeting are passed over, and a date after the name.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    while lines and HEADER.match(lines[0][1]):
        lines.pop(0)
    greeted = bool(lines) and bool(GREETING[language].match(lines[0][1]))
    tail = range(max(1, len(lines) - CLOSING_LINES), len(lines))
    closing = next((place for place in tail if CLOSING[language].match(lines[place][1])), None)
    body = lines[1 if greeted else 0 : closing]
    after = [line for _, line in lines[closing + 1 :]] if closing is not None else []
    signed = [line for line in after if not CLOSING[language].match(line) and not DATE.match(line)]
    named_in_closing = any(re.search(r".(?:敬上|谨上|謹上|谨启|謹啟|拜上|上)$", line) for _, line in lines[-2:])
    signature = any(len(line) <= SIGNATURE_LENGTH for line in signed) or (language == "zh" and named_in_closing)
    first = (lines[0][0],) if lines and not greeted else ()
    rules = (
        Rule("greeting", greeted, "a greeting in the first line", "首行有称呼", first),
        Rule("body", bool(body), "a text between greeting and closing", "称呼与结语之间有正文"),
        Rule("closing", closing is not None, "a closing near the end", "结尾有祝颂语或结语"),
        Rule("signature", signature, "a name after the closing", "结语后有署名"),
    )
    return Report(form, rules)


FORMS: dict[str, Callable[[str], Report]] = {
    "五言绝句": partial(regulated, form="五言绝句", count=4, length=5),
    "七言绝句": partial(regulated, form="七言绝句", count=4, length=7),
    "五言律诗": partial(regulated, form="五言律诗", count=8, length=5),
    "七言律诗": partial(regulated, form="七言律诗", count=8, length=7),
    "haiku": haiku,
    "couplet": couplet,
    "limerick": limerick,
    "letter": partial(letter, form="letter", language="en"),
    "书信": partial(letter, form="书信", language="zh"),
}
OTHER_NAMES = {
    "jueju5": "五言绝句",
    "jueju7": "七言绝句",
    "lvshi5": "五言律诗",
    "lvshi7": "七言律诗",
    "五绝": "五言绝句",
    "七绝": "七言绝句",
    "五律": "五言律诗",
    "七律": "七言律诗",
    "五言絕句": "五言绝句",
    "七言絕句": "七言绝句",
    "五言律詩": "五言律诗",
    "七言律詩": "七言律诗",
    "mail": "letter",
    "邮件": "书信",
}


VERSES = {"五言绝句": (4, 5), "七言绝句": (4, 7), "五言律诗": (8, 5), "七言律诗": (8, 7)}  # lines, characters of a line


def form_name(form: str, where: str = "") -> str:
    """The name of a form, of which another name may be given.

    >>> form_name("七绝")
    '七言绝句'

    Raises:
        UsageError: there is no such form.
    """
    name = OTHER_NAMES.get(form.strip(), form.strip())
    if name not in FORMS:
        hint = nearest(name, [*FORMS, *OTHER_NAMES])
        raise UsageError(f"unknown form '{form}'", where=where, fix=hint, zh=f"未知的体裁 '{form}'。{hint}")
    return name


def form_like(text: str) -> str:
    """The Chinese form whose lines and lengths a text has; empty where it has none's."""
    lengths = [len(line) for line in verses(text)]
    shape = (len(lengths), lengths[0]) if lengths and len(set(lengths)) == 1 else None
    return next((name for name, wanted in VERSES.items() if wanted == shape), "")


def check(text: str, form: str) -> Report:
    """Check a text against a form.

    Args:
        form: a name in ``FORMS`` or ``OTHER_NAMES``.

    Raises:
        UsageError: an unknown form.
        ResourceError: the dictionary that the form needs is not installed (extras ``writing`` and ``rhyme``).

    >>> check("床前明月光，疑是地上霜。举头望明月，低头思故乡。", "五言绝句").holds
    True
    """
    return FORMS[form_name(form)](text)
