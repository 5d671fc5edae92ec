"""Feature templates for the CRF tagger: what is asked about a token and its neighbours, in English and Chinese.

A template turns a sentence into a list of strings for each token; a CRF learns a weight for each string and label.
Templates have names, because a model on disk must find the same questions again: ``en`` for words of languages with
letters (forms, affixes, shapes), ``zh-words`` for Chinese words (their characters, reduplication, surnames),
``zh-entities`` for names in them (a dictionary, too), ``zh-characters`` for taggers over single characters
(segmentation, entities) and ``roles`` for sentences of any language with a marked predicate, whose arguments are
looked for.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from hanmo.text.segment import FIRST_HAN, segment, word_classes
from hanmo.text.traditional import SIMPLIFIED

Template = Callable[[Sequence[str]], list[list[str]]]

OPEN, CLOSE = "[", "]"  # stand around a predicate
BE = frozenset("be am is are was were been being 's 're 'm get gets got getting 被 遭 受 让 叫".split())  # noqa: SIM905
ENDINGS = {  # last characters of many names of organisations and places
    "organisation": frozenset("司学院行团会党队局部社军校厂署处委府台馆协组盟"),
    "place": frozenset("省市县区镇乡村州国山河江湖海岛路街站桥寺港城湾道洲庄邨围园庙峰郡府"),
}
SIGHT = 5  # words in which a name's last one is looked for
UNKNOWN, FOREIGN = "-", "nrt"  # classes of words in a dictionary
JOINED = (2, 3, 4)  # words that are looked up together
STEPS = (1, 2, 3, 5, 9)  # distances that are told apart
OUTSIDE = "<>"  # stands for the places before and after the sentence
SINGLE_SURNAMES = frozenset(
    "王李张張刘劉陈陳杨楊黄黃赵趙吴吳周徐孙孫马馬朱胡郭何林罗羅高郑鄭梁谢謝宋唐许許韩韓邓鄧冯馮曹彭曾肖萧蕭田董潘袁蔡蒋蔣余于杜叶葉"
    "程魏苏蘇吕呂丁任卢盧姚沈钟鍾姜崔谭譚陆陸范汪廖石金韦韋贾賈夏付方邹鄒熊白孟秦邱侯江尹薛闫阎閻段雷龙龍黎史陶贺賀毛郝顾顧龚龔邵"
    "万萬覃武钱錢戴严嚴莫孔向常汤湯温溫康施牛樊葛邢安齐齊伍乔喬庞龐倪章鲁魯俞聂聶"
)
TWO_CHARACTERS = (
    "欧阳 歐陽 司马 司馬 诸葛 諸葛 上官 司徒 东方 東方 皇甫 尉迟 尉遲 公孙 公孫 慕容 令狐 宇文 长孙 長孫 夏侯"
)
DOUBLE_SURNAMES = frozenset(TWO_CHARACTERS.split())
CHINESE_NUMERALS = frozenset("〇零一二两兩三四五六七八九十百千万萬亿億廿卅")


def words_with_letters(sentence: Sequence[str]) -> list[list[str]]:
    """English and other languages with letters: form, shape, affixes, and the neighbours' forms and shapes.

    >>> [feature for feature in words_with_letters(["In", "2024"])[1] if feature.startswith("shape")]
    ['shape=9', 'shape-1=Xx', 'shape-1|0=Xx|9']
    """
    lower = [word.lower() for word in sentence]
    shapes = [shape(word) for word in sentence]
    length = len(sentence)
    rows = []
    for i, (word, form, drawn) in enumerate(zip(sentence, lower, shapes, strict=True)):
        row = ["bias", f"w={word}", f"l={form}", f"shape={drawn}"]
        row += [f"pre{n}={form[:n]}" for n in range(1, min(5, len(form) + 1))]
        row += [f"suf{n}={form[-n:]}" for n in range(1, min(5, len(form) + 1))]
        if "-" in word[1:-1]:
            row.append("hyphen")
        if len(word) > 1 and word.isupper():
            row.append("upper")
        row += [f"l{d:+}={lower[i + d]}" for d in (-2, -1, 1, 2) if 0 <= i + d < length]
        if i:
            row += [f"shape-1={shapes[i - 1]}", f"suf3-1={lower[i - 1][-3:]}", f"l-1|0={lower[i - 1]}|{form}"]
            row.append(f"shape-1|0={shapes[i - 1]}|{drawn}")
        else:
            row.append("first")
        if i + 1 < length:
            row += [f"shape+1={shapes[i + 1]}", f"suf3+1={lower[i + 1][-3:]}", f"l0|+1={form}|{lower[i + 1]}"]
            row.append(f"shape0|+1={drawn}|{shapes[i + 1]}")
        else:
            row.append("last")
        rows.append(row)
    return rows


def chinese_words(sentence: Sequence[str]) -> list[list[str]]:
    """Words of Chinese: form, characters at both ends, class, reduplication, surname, and the neighbours' forms."""
    places = [OUTSIDE, OUTSIDE, *sentence, OUTSIDE, OUTSIDE]
    rows = []
    for i, word in enumerate(sentence, start=2):
        second, before, after, second_after = places[i - 2], places[i - 1], places[i + 1], places[i + 2]
        row = ["bias", f"w={word}", f"class={word_class(word)}", f"length={min(len(word), 5)}"]
        row += [f"first={word[0]}", f"last={word[-1]}"]
        if len(word) > 1:
            row += [f"first2={word[:2]}", f"last2={word[-2:]}"]
        if pattern := reduplication(word):
            row.append(f"reduplication={pattern}")
        if word[0] in SINGLE_SURNAMES or word[:2] in DOUBLE_SURNAMES:
            row.append(f"surname={min(len(word), 5)}")
        row += [f"w-2={second}", f"w-1={before}", f"w+1={after}", f"w+2={second_after}"]
        row += [f"w-1|0={before}|{word}", f"w0|+1={word}|{after}", f"w-1|+1={before}|{after}"]
        row += [f"last-1={before[-1]}", f"first+1={after[0]}", f"last+1={after[-1]}"]
        row += [f"last-1|first={before[-1]}|{word[0]}", f"last|first+1={word[-1]}|{after[0]}"]
        row += [f"class-1={word_class(before)}", f"class+1={word_class(after)}"]
        rows.append(row)
    return rows


def chinese_entities(sentence: Sequence[str]) -> list[list[str]]:
    """Words of Chinese as in :func:`chinese_words`, and what a dictionary says of them: the class of a word and of its
    neighbours, with the characters where they meet; of what it makes together with them, for names are often cut into
    pieces; of the pieces of long and unknown words; whether its characters are those of foreign names; and how far the
    word is from one that ends names of organisations or places.

    Raises:
        ResourceError: the package ``jieba`` is not installed, whose dictionary it is.
    """
    classes, length = word_classes(), len(sentence)
    plain = [word.translate(SIMPLIFIED) for word in sentence]
    own = [OUTSIDE, *(classes.get(word, UNKNOWN) for word in plain), OUTSIDE]
    places = [OUTSIDE, *sentence, OUTSIDE]
    rows = chinese_words(sentence)
    for i, row in enumerate(rows, start=1):
        word, before, after, known = places[i], places[i - 1], places[i + 1], own[i]
        row += [f"known={known}", f"known-1={own[i - 1]}", f"known+1={own[i + 1]}"]
        row += [f"known-1|0={own[i - 1]}|{known}", f"known0|+1={known}|{own[i + 1]}"]
        row += [f"known|{part}" for part in (f"last={known}|{word[-1]}", f"first={known}|{word[0]}")]
        row += [
            f"known|w-1={known}|{before}",
            f"known|w+1={known}|{after}",
            f"known|length={known}|{min(len(word), 5)}",
        ]
        row += [f"known|last-1={known}|{before[-1]}", f"known|first+1={known}|{after[0]}"]
        row += pieces_of(plain[i - 1])
        foreign = foreignness(plain[i - 1])
        row += [f"foreign={foreign}", f"foreign|known={foreign}|{known}|{min(len(word), 4)}"]
        row += endings(plain, i - 1, known)
        for size in JOINED:
            for begin in range(max(0, i - size), min(i - 1, length - size) + 1):
                joined = classes.get("".join(plain[begin : begin + size]))
                row += [f"joined={joined}|{i - 1 - begin}|{size}"] if joined else []
    return rows


def endings(words: Sequence[str], at: int, known: str) -> list[str]:
    """Features of the nearest words, from this one on and before it, with which names of a kind end."""
    row = []
    for name, last in ENDINGS.items():
        ahead = [
            words[i][-1] in last and (i == at or len(words[i]) < 3) for i in range(at, min(at + SIGHT, len(words)))
        ]
        if any(ahead):
            row += [f"{name}+{ahead.index(True)}", f"{name}|known={min(ahead.index(True), 2)}|{known}"]
        behind = [words[i][-1] in last for i in range(at - 1, max(at - SIGHT + 1, 0) - 1, -1)]
        row += [f"{name}-{behind.index(True) + 1}"] if any(behind) else []
    return row


@functools.lru_cache(maxsize=1 << 16)
def pieces_of(word: str) -> tuple[str, ...]:
    """Features of the words that a long or unknown word is made of: the first and the last, and their classes."""
    classes = word_classes()
    if len(word) < 3 and word in classes:
        return ()
    pieces = segment(word)
    if len(pieces) < 2:
        return ()
    first, last = (classes.get(piece, UNKNOWN) for piece in (pieces[0], pieces[-1]))
    return (
        f"begins={first}",
        f"ends={last}",
        f"begins|ends={first}|{last}",
        f"piece0={pieces[0]}",
        f"piece1={pieces[-1]}",
    )


@functools.lru_cache(maxsize=1 << 16)
def foreignness(word: str) -> str:
    """How many of a word's characters commonly write the sounds of foreign names: all, most, or few.

    >>> foreignness("斯科特"), foreignness("天气")
    ('all', 'few')
    """
    share = sum(character in foreign_characters() for character in word) / len(word)
    return "few" if len(word) < 2 or share <= 0.5 else "most" if share < 1 else "all"


@functools.cache
def foreign_characters() -> frozenset[str]:
    """Characters that often stand in the names of the dictionary's class ``nrt``, transliterated ones."""
    names, words = Counter[str](), Counter[str]()
    for word, kind in word_classes().items():
        words.update(set(word))
        names.update(set(word) if kind == FOREIGN else ())
    return frozenset(c for c, count in names.items() if count >= 20 and count > 0.08 * words[c])


def chinese_characters(sentence: Sequence[str]) -> list[list[str]]:
    """Single characters: n-grams in a window of five, classes, repetition, and where a surname may begin."""
    places = [OUTSIDE, OUTSIDE, *sentence, OUTSIDE, OUTSIDE]
    classes = [character_class(place) for place in places]
    rows = []
    for i in range(2, len(sentence) + 2):
        a, b, c, d, e = places[i - 2 : i + 3]
        row = ["bias", f"c-2={a}", f"c-1={b}", f"c={c}", f"c+1={d}", f"c+2={e}"]
        row += [f"c-2-1={a}{b}", f"c-1 0={b}{c}", f"c0+1={c}{d}", f"c+1+2={d}{e}", f"c-1+1={b}{d}"]
        row += [f"c-1 0+1={b}{c}{d}", f"c-2-1 0={a}{b}{c}", f"c0+1+2={c}{d}{e}"]
        row += [f"class={classes[i]}", f"classes={'|'.join(classes[i - 1 : i + 2])}"]
        if c == b:
            row.append("same-1")
        if c == a:
            row.append("same-2")
        # a name has one or two characters after its surname
        row += [f"surname{-back}" for back in range(3) if places[i - back] in SINGLE_SURNAMES]
        row += [f"surname{-back}2" for back in range(3) if "".join(places[i - back : i - back + 2]) in DOUBLE_SURNAMES]
        rows.append(row)
    return rows


def marked_predicate(sentence: Sequence[str]) -> list[list[str]]:
    """Words of any language with a predicate between marks: form, affixes, neighbours; the predicate, how far away and
    on which side it is, whether it looks passive, and what stands between.

    >>> [name for name in marked_predicate(["He", "[", "left", "]"])[0] if name.startswith(("far=", "v="))]
    ['far=-1', 'v=left']
    """
    words = [word.lower() for word in sentence]
    places = [OUTSIDE, OUTSIDE, *words, OUTSIDE, OUTSIDE]
    pairs = zip(words, words[2:], strict=False)
    at = next((i + 1 for i, pair in enumerate(pairs) if pair == (OPEN, CLOSE)), -1)
    verb = words[at] if at >= 0 else OUTSIDE
    voice = (
        "passive" if at >= 0 and verb.endswith(("d", "n", "t")) and BE & set(words[max(0, at - 5) : at]) else "active"
    )
    marks = [not word[:1].isalnum() and word not in (OPEN, CLOSE) for word in words]
    passed = list(itertools.accumulate(marks, initial=0))  # punctuation marks before each place
    rows = []
    for i, word in enumerate(words):
        second, before, after, second_after = places[i], places[i + 1], places[i + 3], places[i + 4]
        side = "<" if i < at else ">" if i > at else "="
        away = abs(i - at) - (1 if i != at else 0)
        far = ("-" if side == "<" else "") + str(sum(away >= step for step in STEPS))
        between = min(3, abs(passed[i] - passed[at]) if at >= 0 else 3)
        path = f"{side}{between}"
        row = ["bias", f"l={word}", f"far={far}", f"v={verb}", f"path={path}", f"shape={shape(sentence[i])}"]
        row += [f"suf{n}={word[-n:]}" for n in (1, 2, 3)]
        row += [f"l-2={second}", f"l-1={before}", f"l+1={after}", f"l+2={second_after}"]
        row += [f"l-1|0={before}|{word}", f"l0|+1={word}|{after}"]
        row += [f"suf2-1={before[-2:]}", f"suf2+1={after[-2:]}"]
        row += [f"{path}|{part}" for part in (f"l={word}", f"v={verb}", f"l-1={before}", f"l+1={after}", voice)]
        row += [f"{path}|suf2={word[-2:]}", f"{path}|far={far}", f"{path}|v2={verb[-2:]}|{voice}"]
        row += [f"v|l={verb}|{word}", f"v|l-1={verb}|{before}", f"far|v={far}|{verb}", f"far|{voice}={far}"]
        row += [f"far|l={far}|{word}", f"far|l-1={far}|{before}"]
        if at >= 0:
            row += [f"round={places[at]}|{side}", f"next={places[at + 4]}|{path}", f"{path}|l-1|0={before}|{word}"]
        rows.append(row)
    return rows


TEMPLATES: dict[str, Template] = {
    "en": words_with_letters,
    "zh-words": chinese_words,
    "zh-entities": chinese_entities,
    "zh-characters": chinese_characters,
    "roles": marked_predicate,
}


def choose_template(sentences: Sequence[Sequence[str]]) -> str:
    """The template that fits the tokens: by whether they are Han characters, and whether those come one by one.

    >>> choose_template([["今", "天", "好"]]), choose_template([["今天", "好"]]), choose_template([["fine", "day"]])
    ('zh-characters', 'zh-words', 'en')
    """
    tokens = itertools.islice(itertools.chain.from_iterable(sentences), 10_000)
    sample = [token for token in tokens if isinstance(token, str)]  # anything else is refused where records are checked
    chinese = [token for token in sample if FIRST_HAN.match(token)]
    words = [token for token in sample if token[:1].isalpha()]  # Han characters are letters too
    if 2 * len(chinese) <= len(words):
        return "en"
    return "zh-characters" if sum(map(len, chinese)) < 1.05 * len(chinese) else "zh-words"


@functools.lru_cache(maxsize=1 << 16)
def shape(word: str) -> str:
    """The outline of a word: X for capitals, x for other letters, 9 for digits, runs shortened to one sign.

    >>> shape("McDonald's"), shape("COVID-19"), shape("...")
    ("XxXx'x", 'X-9', '.')
    """
    signs = ("9" if c.isdigit() else "X" if c.isupper() else "x" if c.isalpha() else c for c in word)
    return "".join(sign for sign, _ in itertools.groupby(signs))


@functools.lru_cache(maxsize=1 << 14)
def character_class(character: str) -> str:
    """Han, numeral, digit, letter, punctuation, symbol, or outside the sentence."""
    if character == OUTSIDE:
        return "outside"
    if character in CHINESE_NUMERALS:
        return "numeral"
    if FIRST_HAN.match(character):
        return "han"
    first = character[:1]
    if first.isdigit():
        return "digit"
    if first.isalpha():
        return "letter"
    return "punctuation" if unicodedata.category(first).startswith("P") else "symbol"


@functools.lru_cache(maxsize=1 << 16)
def word_class(word: str) -> str:
    """The classes of a word's characters, runs shortened to one, as in ``"digit han"`` for ``"3月"``."""
    if word == OUTSIDE:
        return "outside"
    return " ".join(name for name, _ in itertools.groupby(map(character_class, word)))


def reduplication(word: str) -> str:
    """The pattern of a word that repeats itself, of which Chinese makes verbs and adjectives; else empty.

    >>> [reduplication(word) for word in ("看看", "高高兴兴", "研究研究", "绿油油", "天气")]
    ['AA', 'AABB', 'ABAB', 'ABB', '']
    """
    names: dict[str, str] = {}
    pattern = "".join(names.setdefault(character, "ABCD"[min(len(names), 3)]) for character in word[:5])
    return pattern if pattern in ("AA", "AAB", "ABB", "ABA", "AABB", "ABAB", "ABAC") else ""
