"""Instructions about the form of an answer that a prompt states in plain words, in Chinese or English.

Only what is said unmistakably is taken ("in at most 50 words", "不超过50字", "in three sentences", "包含“雪”字"):
what is overlooked costs nothing, what is misread would punish good replies. Names and arguments of what is found are
those of :mod:`hanmo.tasks.instructions`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from hanmo.data.tasks.types import Check

WINDOW = 400  # characters at either end of a long prompt that are read: instructions stand there, material between
ENGLISH = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
TENS = {"十": 10, "百": 100, "千": 1000}

N = rf"(?P<n>\d{{1,5}}|{'|'.join(ENGLISH[1:])})"
ZH = r"(?P<n>\d{1,5}|[一二两三四五六七八九十百千零]+)"
QUOTED = r"[\"“‘'「『](?P<w>[^\"”’」』\n]{1,40}?)[\"”’'」』](?![A-Za-z])"
TELL = r"\b(?:answer|respond|reply|write|output|return|give|provide|format|explain|describe|say)\b[^.?!\n]{0,60}?\b"
COUNTED = r"[- ](?P<unit>words?|sentences?|paragraphs?|bullet(?:ed)?(?: points?)?|bullets)\b"
MOST, LESS = (
    r"(?:at most|no more than|not more than|up to|a maximum of|within)",
    r"(?:less than|fewer than|under|below)",
)
LEAST, MORE = r"(?:at least|no fewer than|no less than|not less than|a minimum of)", r"(?:more than|over)"
TONGUES = {
    "english": "en", "chinese": "zh", "mandarin": "zh", "french": "fr", "german": "de", "spanish": "es",
    "italian": "it", "portuguese": "pt", "japanese": "ja", "korean": "ko", "russian": "ru", "arabic": "ar",
    "英文": "en", "英语": "en", "中文": "zh", "汉语": "zh", "法语": "fr", "法文": "fr", "德语": "de", "德文": "de",
    "日语": "ja", "日文": "ja", "韩语": "ko", "韩文": "ko", "俄语": "ru", "俄文": "ru", "西班牙语": "es",
    "阿拉伯语": "ar",
}  # fmt: skip
EN_TONGUE = "|".join(name for name in TONGUES if name.isascii())
ZH_TONGUE = "|".join(name for name in TONGUES if not name.isascii())
NOT_ZH = r"(?:不要|不得|不能|不可|不许|禁止|避免|请勿|勿|别)"


def number(text: str) -> int:
    """A number in digits or words.

    >>> number("３"), number("two"), number("一百二十"), number("十五")
    (3, 2, 120, 15)
    """
    text = text.lower()
    if text in ENGLISH:
        return ENGLISH.index(text)
    if text.isdigit():
        return int(text)
    total = current = 0
    for character in text:
        if character in TENS:
            total += max(current, 1) * TENS[character]
            current = 0
        else:
            current = DIGITS[character]
    return total + current


def counted(relation: str) -> Callable[[re.Match[str]], Check]:
    """A number of words, sentences or items."""

    def build(match: re.Match[str]) -> Check:
        unit, many = match.groupdict().get("unit") or "word", number(match["n"])
        if unit.startswith("word") or unit == "字":
            return {"id": "length_constraints:number_words", "relation": relation, "num_words": many}
        if unit.startswith("sentence") or unit == "句":
            return {"id": "length_constraints:number_sentences", "relation": relation, "num_sentences": many}
        if unit.startswith("paragraph"):
            return {}  # how they are to be divided is not said
        return {"id": "detectable_format:number_items", "relation": relation, "num_items": many}

    return build


def fixed(name: str) -> Callable[[re.Match[str]], Check]:
    """An instruction without arguments."""
    return lambda _: {"id": name}


def worded(name: str, argument: str, several: bool = False) -> Callable[[re.Match[str]], Check]:
    """An instruction about words in quotation marks."""

    def build(match: re.Match[str]) -> Check:
        word = match["w"].strip(" .,;，。；、")  # American quotation marks take in the comma after the word
        return {"id": name, argument: [word] if several else word} if word else {}

    return build


def spoken(match: re.Match[str]) -> Check:
    """The language of the answer."""
    return {"id": "language:response_language", "language": TONGUES[match["l"].lower()]}


EXISTENCE = worded("keywords:existence", "keywords", True)
FORBIDDEN = worded("keywords:forbidden_words", "forbidden_words", True)
JSON, LOWER, UPPER = (
    fixed(name) for name in ("detectable_format:json_format", "change_case:lowercase", "change_case:capital")
)
PATTERNS: list[tuple[str, Callable[[re.Match[str]], Check]]] = [
    # what is found is taken out of the text, so that the more special comes first: 不超过 before 超过
    (rf"\b{N}{COUNTED} or (?:less|fewer)", counted("at most")),
    (rf"\b{N}{COUNTED} or more", counted("at least")),
    (rf"\b{MOST} {N}{COUNTED}", counted("at most")),
    (rf"\b{LESS} {N}{COUNTED}", counted("less than")),
    (rf"\b{LEAST} {N}{COUNTED}", counted("at least")),
    (rf"\b{MORE} {N}{COUNTED}", counted("more than")),
    (rf"\b(?:exactly|(?:in|with|using) (?:just |only |exactly )?(?=[a-z]+ sentence|\d sentence)) ?{N}{COUNTED}",
     counted("exactly")),
    (rf"\b(?:in|as|with|using|of) (?:exactly )?{N}[- ](?P<unit>bullet(?:ed)?(?: points?)?|bullets)\b",
     counted("exactly")),
    (rf"(?:不超过|不多于|最多|至多|控制在){ZH}个?(?P<unit>字|句)(?:话|以内|之内)?", counted("at most")),
    (rf"(?:少于|不到|低于)(?<!不少于)(?<!不低于){ZH}个?(?P<unit>字|句)", counted("less than")),
    (rf"(?:至少|不少于|不低于){ZH}个?(?P<unit>字|句)", counted("at least")),
    (rf"(?<!不)超过{ZH}个?(?P<unit>字|句)", counted("more than")),
    (rf"{ZH}个?(?P<unit>字|句)话?(?:以内|之内|以下)", counted("at most")),
    (rf"{ZH}个?(?P<unit>字|句)话?以上", counted("at least")),
    (rf"[用以]{ZH}(?P<unit>句)话", counted("exactly")),
    (rf"(?:分成|分为|分|列出|给出|用|以){ZH}(?P<unit>点|条|个要点|条要点|条建议)(?:来|说明|回答|建议|理由|列出|概括|总结|介绍|[，。：]|$)",
     counted("exactly")),
    (rf"{TELL}JSON\b", JSON),
    (r"(?:以|用|按|按照|输出|返回)(?:合法的|有效的)?\s?JSON\s?(?:格式|对象|数组)?", JSON),
    (rf"{TELL}(?:in|using) (?:all |only )?(?:lower-?case|small letters)", LOWER),
    (rf"{TELL}(?:in|using) (?:all |only )?(?:upper-?case|capitals?\b|all[- ]caps)", UPPER),
    (r"(?:全部|全|都|只|一律)(?:使用|用)(?:英文)?小写", LOWER),
    (r"(?:全部|全|都|只|一律)(?:使用|用)(?:英文)?大写", UPPER),
    (rf"\b(?:do not|don't|never|without|avoid|not) (?:to )?(?:use|using|include|including|mention|mentioning|contain"
     rf"|containing|say|saying)? ?(?:the )?(?:words?|phrases?|keywords?|letters?) {QUOTED}", FORBIDDEN),
    (rf"\b(?:include|including|use|using|contain|containing|mention|mentioning) (?:the )?(?:words?|phrases?|keywords?)"
     rf" {QUOTED}", EXISTENCE),
    (rf"{NOT_ZH}(?:使用|用到|用|出现|包含|含有|提到|提及|写)(?:关键词|词语|短语|字|词)?\s?{QUOTED}", FORBIDDEN),
    (rf"(?:包含|含有|使用|用上|提到|提及|出现)(?:关键词|词语|短语|字|词)?\s?{QUOTED}", EXISTENCE),
    (rf"\bend (?:your|the) (?:answer|reply|response|text) with (?:the )?(?:words?|phrase|sentence)? ?{QUOTED}",
     worded("startend:end_checker", "end_phrase")),
    (rf"(?:sentence|answer|reply|response|text) (?:to|that|which) (?:start|begin)s? with (?:the word )?{QUOTED}",
     worded("startend:start_checker", "start_phrase")),
    (rf"\b(?:start|begin) (?:your|the) (?:answer|reply|response|text|sentence) with (?:the words? )?{QUOTED}",
     worded("startend:start_checker", "start_phrase")),
    (rf"以{QUOTED}(?:结尾|结束|收尾)", worded("startend:end_checker", "end_phrase")),
    (rf"以{QUOTED}(?:开头|开始)", worded("startend:start_checker", "start_phrase")),
    (rf"{TELL}in (?P<l>{EN_TONGUE})\b", spoken),
    (rf"(?:用|以|使用)(?P<l>{ZH_TONGUE})(?:来)?(?:回答|回复|作答|答复|写|说明|解释|介绍|描述)", spoken),
]  # fmt: skip
COMPILED = [(re.compile(pattern, re.IGNORECASE), build) for pattern, build in PATTERNS]


def stated_instructions(prompt: str) -> tuple[Check, ...]:
    """What a prompt says about the form of its answer, as far as it can be verified.

    >>> stated_instructions("介绍杭州，不超过５０字，不要出现“西湖”。")[0]["num_words"]
    50
    >>> [check["id"] for check in stated_instructions("Name three animals in exactly two sentences, in JSON.")]
    ['length_constraints:number_sentences']
    """
    text = prompt if len(prompt) <= 2 * WINDOW else f"{prompt[:WINDOW]}\n{prompt[-WINDOW:]}"
    text = "".join(unicodedata.normalize("NFKC", c) if c.isdecimal() or "Ａ" <= c <= "ｚ" else c for c in text)
    found: list[Check] = []
    for pattern, build in COMPILED:
        for match in list(pattern.finditer(text)):
            check = build(match)
            if check and check not in found:
                found.append(check)
        text = pattern.sub(" ", text)
    if any(check["id"] == "detectable_format:json_format" for check in found):  # its items stand in an array
        found = [check for check in found if check["id"] != "detectable_format:number_items"]
    return tuple(found)
