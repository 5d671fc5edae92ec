"""Which of some thirty languages a reply is in: by its script, by letters that only one has, by its commonest words.

Meant for replies of a sentence and more, to the question "is it in the language that was asked for?". Where a text says
too little (a number, a name), the answer is yes.
"""

from __future__ import annotations

import re
from collections import Counter

SCRIPTS = {  # name: ranges of its letters
    "han": "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff",
    "kana": "\u3040-\u30ff",
    "hangul": "\uac00-\ud7af\u1100-\u11ff",
    "cyrillic": "\u0400-\u04ff",
    "arabic": "\u0620-\u064a\u0671-\u06d3\u06fa-\u06ff",
    "devanagari": "\u0900-\u0963\u0971-\u097f",
    "bengali": "\u0980-\u09ff",
    "gurmukhi": "\u0a00-\u0a7f",
    "gujarati": "\u0a80-\u0aff",
    "tamil": "\u0b80-\u0bff",
    "telugu": "\u0c00-\u0c7f",
    "kannada": "\u0c80-\u0cff",
    "malayalam": "\u0d00-\u0d7f",
    "thai": "\u0e00-\u0e7f",
    "hebrew": "\u05d0-\u05ea",
    "greek": "\u0370-\u03ff",
    "latin": "A-Za-zªºÀ-ÖØ-öø-\u024f\u1e00-\u1eff",
}
SCRIPT = re.compile("|".join(f"(?P<{name}>[{letters}])" for name, letters in SCRIPTS.items()))
WEIGHT = {"han": 3, "kana": 2, "hangul": 2}  # a character says as much as so many letters
ONE_EACH = {
    "hangul": "ko",
    "bengali": "bn",
    "gurmukhi": "pa",
    "gujarati": "gu",
    "tamil": "ta",
    "telugu": "te",
    "kannada": "kn",
    "malayalam": "ml",
    "thai": "th",
    "hebrew": "he",
    "greek": "el",
}
COMMON = {  # words that nearly every paragraph has
    "en": "the of and to in is a that it for was with on are this be as i you have not or by from at we",
    "es": "el la de que y en los un una es se por con para las del no su lo como más",
    "pt": "o a de que e da em um uma os é não para com no na se por as mais dos",
    "it": "il di che e la un una è non in sono con del della si le i gli ma come più",
    "fr": "le la les de et des un une est je ne vous en que dans pour il elle pas au du ce qui sur plus nous",
    "de": "der die das und ist nicht ein eine zu in den von mit sich auf des es für dem auch ich wir",
    "nl": "de het een en van is dat niet in op te zijn voor met die er maar ook aan wij",
    "vi": "là và của có không một những được cho người trong này các với để khi đã tôi",
    "pl": "i w na nie się z to jest do że o jak ale po co tak za od przez są",
    "fi": "ja on ei se että en hän mutta oli ovat niin kun tai myös joka kuin ole voi",
    "sw": "na ya wa kwa ni katika la za kuwa hii cha yake hiyo au kama lakini watu pia",
    "hi": "है के में की और का को से हैं यह पर नहीं कि एक भी था",
    "mr": "आहे आणि च्या या मध्ये आहेत हे ते एक तो होता नाही की केले",
    "ne": "छ को र मा हो छन् गर्न भएको यो पनि लागि गरेको थियो",
}
LATIN = ("en", "es", "pt", "it", "fr", "de", "nl", "vi", "pl", "fi", "sw")
DEVANAGARI = ("hi", "mr", "ne")
TIED = {"ar": ("fa", "ur"), "ru": ("uk", "bg")}
LANGUAGES = tuple(sorted({*COMMON, *ONE_EACH.values(), "zh", "ja", "ar", "fa", "ur", "ru", "uk", "bg"}))
WORD = re.compile(r"[\u0900-\u0963]+|[^\W\d_]+")
CLEARLY = 2  # common words more than of the language that was asked for: one is chance
FEW = 4  # letters, below which a text says nothing


def language_of(text: str) -> str:
    """The code of the likeliest language; empty where the text says too little.

    >>> language_of("Der Hund ist nicht da."), language_of("今天天气很好。"), language_of("42")
    ('de', 'zh', '')
    """
    counts = Counter(str(found.lastgroup) for found in SCRIPT.finditer(text))
    weights = {name: count * WEIGHT.get(name, 1) for name, count in counts.items()}
    if sum(weights.values()) < FEW:
        return ""
    if 10 * counts["kana"] > counts["han"] + counts["kana"] and weights["kana"] * 2 > weights.get("latin", 0):
        return "ja"
    script = max(weights, key=lambda name: weights[name])
    if script in ONE_EACH:
        return ONE_EACH[script]
    if script == "han":
        return "zh"
    lowered = text.lower()
    if script == "cyrillic":
        if re.search("[іїєґ]", lowered):
            return "uk"
        return "ru" if re.search("[ыэё]", lowered) or "ъ" not in lowered else "bg"
    if script == "arabic":
        if re.search("[ٹڈڑےںھ]", lowered):
            return "ur"
        return "fa" if re.search("[پچژگیک]", lowered) else "ar"
    return by_words(lowered, LATIN if script == "latin" else DEVANAGARI)


def by_words(text: str, among: tuple[str, ...]) -> str:
    """The language whose commonest words are the most frequent; empty where there are none of them."""
    scores = {code: score(text, code) for code in among}
    best = max(among, key=lambda code: scores[code])
    return best if scores[best] else ""


def is_language(text: str, code: str) -> bool:
    """Whether a text may well be in a language: it is the likeliest, or nothing tells.

    >>> is_language("THE CAT SAT ON THE MAT", "en"), is_language("Bonjour, où est la gare ?", "en")
    (True, False)
    """
    found = language_of(text)
    if found == code:
        return True
    if not found:  # letters of another script tell, words that are not known do not
        scripts = {letter.lastgroup for letter in SCRIPT.finditer(text)}
        own = "latin" if code in LATIN else "devanagari" if code in DEVANAGARI else ""
        return not scripts or scripts == {own}
    if code not in LATIN or found not in LATIN:
        return False
    lowered = text.lower()
    return score(lowered, found) < score(lowered, code) + CLEARLY


def score(text: str, code: str) -> int:
    """How many of the commonest words of a language a text has."""
    return sum(word in COMMON[code].split() for word in WORD.findall(text))
