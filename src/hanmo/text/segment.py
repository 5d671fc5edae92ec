"""Words of Chinese, English and mixed text, for bag-of-words models, word vectors and taggers.

Runs of Han characters are cut by jieba (dictionary, then a hidden Markov model for unknown words); everything else by
one regular expression. Each word is a slice of the text, in order, and only whitespace is left out.

jieba keeps its dictionary as a marshal file under a fixed name in the folder for temporary files and trusts whatever
lies there; on a machine with several users anybody may put one there first. Hanmo reads the dictionary from the
package instead (half a second, once in a process) and neither reads nor writes that file.
"""

from __future__ import annotations

import functools
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hanmo.errors import UsageError, missing_package, nearest
from hanmo.language import pick

LANGUAGES = ("zh", "en")
# CJK ideographs with extension A, compatibility forms, the supplementary planes, and the signs 々 and 〇
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
MARKS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff\u0e31-\u0e4e"  # signs that belong to the letter before
LETTER = rf"(?:[^\W{HAN}]|[{MARKS}])"  # letters, digits and _ of every script but Han
CLOSE = "，。；！？、（）“”‘’《》「」"  # Chinese marks never belong to an address in running text
# Every repetition is bounded or cannot be entered in two ways, so that no text makes the search slower than linear.
WORD = re.compile(
    rf"""
    [{HAN}]+                                                            # a run for jieba
    | (?:https?://|www\.) [^\s<>"'{HAN}{CLOSE}]* [^\s<>"'{HAN}{CLOSE}.,;:!?)\]]
    | [A-Za-z0-9_.+-]{{1,64}} @ [A-Za-z0-9-]{{1,63}} (?:\.[A-Za-z0-9-]{{1,63}})+          # e-mail
    | (?:[A-Za-z]\.){{2,}} (?:[A-Za-z](?!{LETTER}))?                                    # U.S., e.g., a.m.
    | [0-9]+ (?:[.,][0-9]+)* (?!{LETTER})                                               # 3.14, 1,000
    | {LETTER}+ (?:['’]{LETTER}+)*                                                      # don't, rock'n'roll
    | \.{{2,}} | …+ | —+ | -{{2,}}                                                      # a mark of several signs
    | \S
    """,
    re.VERBOSE,
)
FIRST_HAN = re.compile(f"[{HAN}]")
PIECE = 512  # characters given to jieba at once: its model's time grows with the square of a run's length
TOKENIZER_LOCK = threading.Lock()


def segment(text: str, language: str | None = None) -> list[str]:
    """Return the words of a text in order; punctuation marks are words, whitespace is not.

    Args:
        text: Chinese (simplified or traditional), English, or both in any mixture.
        language: ``"en"`` makes each Han character a word of its own and never needs jieba; ``"zh"`` and None cut
            runs of Han characters with jieba, which is imported when the first one is met.

    Raises:
        ResourceError: there are Han characters and the package ``jieba`` is not installed.
        UsageError: an unknown language.

    >>> segment("Don't pay $3.14, write to me@example.org!")
    ["Don't", 'pay', '$', '3.14', ',', 'write', 'to', 'me@example.org', '!']
    >>> segment("我们在2024年学习machine learning。")
    ['我们', '在', '2024', '年', '学习', 'machine', 'learning', '。']
    """
    if language not in (None, *LANGUAGES):
        raise unknown_language(language)
    pieces = WORD.findall(text)
    if text.isascii() or not FIRST_HAN.search(text):
        return pieces
    cut = list if language == "en" else cutter()
    words: list[str] = []
    for piece in pieces:
        if len(piece) == 1 or not FIRST_HAN.match(piece):
            words.append(piece)
        else:
            for begin in range(0, len(piece), PIECE):
                words.extend(cut(piece[begin : begin + PIECE]))
    return words


def stop_words(language: str) -> frozenset[str]:
    """Function words that say little about the topic of a text: lower-case English, or Chinese in both scripts.

    Raises:
        UsageError: an unknown language.

    >>> "the" in stop_words("en"), "的" in stop_words("zh"), "天气" in stop_words("zh")
    (True, True, False)
    """
    from hanmo.text.stopwords import CHINESE, ENGLISH  # data that only this function needs

    if language not in LANGUAGES:
        raise unknown_language(language)
    return frozenset((CHINESE if language == "zh" else ENGLISH).split())


def unknown_language(language: str) -> UsageError:
    """The error for a language without words."""
    return UsageError(
        f"unknown language {language!r}", fix=nearest(language, LANGUAGES), zh=f"未知语言 {language!r}，可用：zh、en"
    )


def cutter() -> Callable[[str], Iterable[str]]:
    """The function that cuts a run of Han characters into words.

    Raises:
        ResourceError: the package ``jieba`` is not installed.
    """
    with TOKENIZER_LOCK:  # two threads would read the dictionary twice
        return load_cutter()


@functools.cache
def load_cutter() -> Callable[[str], Iterable[str]]:
    """jieba's tokenizer with the dictionary of its package, without its log and without its cache file.

    Traditional characters are looked up as simplified ones, which the dictionary has.
    """
    from hanmo.text.traditional import SIMPLIFIED  # data that only this function needs

    tokenizer = load_jieba(pick("cutting Chinese text into words", "中文分词")).Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True  # so that it does not look for its cache file

    def cut(run: str) -> Iterator[str]:
        begin = 0
        for word in tokenizer.cut(run.translate(SIMPLIFIED)):  # one character for one, so that the lengths stay
            yield run[begin : begin + len(word)]
            begin += len(word)

    return cut


def load_jieba(purpose: str) -> Any:
    """The package, without its log.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own old idioms, nothing a user could change
            import jieba
    except ImportError:
        raise missing_package("jieba", "classical", purpose) from None
    logging.getLogger("jieba").setLevel(logging.ERROR)
    return jieba


@functools.cache
def word_classes() -> dict[str, str]:
    """The words of jieba's dictionary with their classes: ``n`` noun, ``ns`` place, ``nr`` person, ``nt`` organisation.

    Raises:
        ResourceError: the package ``jieba`` is not installed.

    >>> word_classes()["北京"], word_classes()["学习"]
    ('ns', 'v')
    """
    jieba = load_jieba(pick("looking up Chinese words", "查中文词典"))
    with jieba.Tokenizer().get_dict_file() as file:
        rows = (line.split() for line in file.read().decode("utf-8").splitlines())
        return {row[0]: sys.intern(row[2]) for row in rows if len(row) == 3}
