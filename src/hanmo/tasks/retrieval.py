"""Passages of documents, and which of them a question is about: BM25, and vectors where an encoder is given.

BM25 (Robertson and Zaragoza 2009) is that of the package bm25s. Words count in lower case, full-width forms as their
usual ones; English words without their plural, Chinese as pairs of neighbouring characters, traditional ones as
simplified, which needs no dictionary and finds names that no dictionary has. Two rankings become one by the sum of
their reciprocal ranks (Cormack et al. 2009).

Letters in names: P passages, D dimensions.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hanmo.errors import DataError, missing_package
from hanmo.language import pick
from hanmo.settings import notice
from hanmo.tasks.answers import Passage
from hanmo.tasks.metric import Floats
from hanmo.text.segment import HAN, segment, stop_words
from hanmo.text.sentences import halves, sentences_of
from hanmo.text.traditional import SIMPLIFIED

if TYPE_CHECKING:
    from hanmo.data.readers import Document

PASSAGE = 900  # of a passage at most, in the width of letters
HAN_WIDTH = 3  # a Chinese character says about as much as three letters
UNCUT = 1 << 60
LEAST = 300  # from which width on a paragraph's end may end a passage
CONSTANT = 60  # of reciprocal ranks
K1, B = 1.2, 0.75
HAN_RUN = re.compile(f"[{HAN}]+")
HAN_SIGN = re.compile(f"[{HAN}]")
BLANK_LINES = re.compile(r"\n[ \t\u3000]*(?:\n[ \t\u3000]*)+")


# Words ----------------------------------------------------------------------------------------------------------------


def search_words(text: str, without: Container[str] = ()) -> list[str]:
    """What BM25 counts of a text: words and symbols, but for some; of one that has none, its marks.

    >>> search_words("The gas giants"), search_words("长江有多长？")
    (['the', 'gas', 'giant'], ['长江', '江有', '有多', '多长'])
    """
    plain = searchable(text)
    pieces = segment(HAN_RUN.sub(" ", plain), "en")
    spoken = (piece for piece in pieces if piece[0].isalnum() or unicodedata.category(piece[0]) == "So")
    words = [singular(piece) for piece in spoken if piece not in without]
    for run in HAN_RUN.findall(plain):
        words += [run[place : place + 2] for place in range(max(1, len(run) - 1))]
    return words or ([] if without else pieces)


def asked_words(question: str) -> list[str]:
    """What is looked for: the words without those that say little, unless there are no others.

    >>> asked_words("Which planets are gas giants?"), asked_words("Who is it?")
    (['planet', 'gas', 'giant'], ['who', 'is', 'it'])
    """
    return search_words(question, stop_words("en")) or search_words(question)


def searchable(text: str) -> str:
    """Usual width, lower case, simplified characters."""
    return unicodedata.normalize("NFKC", text).casefold().translate(SIMPLIFIED)


def singular(word: str) -> str:
    """An English word without the ending of a plural or a possessive (after the rules of Harman 1991)."""
    word = word.removesuffix("'s").removesuffix("’s")
    if len(word) < 4 or not word.endswith("s") or not word.isascii():
        return word
    if word.endswith("ies") and word[-4] not in "ae":
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    if word.endswith("es") and word[-3] not in "aeo":
        return word[:-1]
    return word if word.endswith(("us", "ss", "es")) else word[:-1]


# Passages -------------------------------------------------------------------------------------------------------------


def width(text: str) -> int:
    """How long a text is for a reader: its characters, Chinese ones three times."""
    return len(text) + (HAN_WIDTH - 1) * len(HAN_SIGN.findall(text))


def cut_passages(text: str, most: int = PASSAGE) -> Iterator[tuple[int, int]]:
    """Where the passages of a text begin and end: whole sentences, whole paragraphs where they are not short.

    >>> text = "One sentence. Another one.\\n\\nA new paragraph."
    >>> [text[start:end] for start, end in cut_passages(text, 30)]
    ['One sentence. Another one.', 'A new paragraph.']
    """
    begin = end = held = 0
    for paragraph in spans_between(BLANK_LINES, text):
        if held > min(LEAST, most // 3):
            yield begin, end
            held = 0
        for start, stop in sentence_spans(text, *paragraph, most):
            if held and width(text[begin:stop]) > most:
                yield begin, end
                held = 0
            begin = begin if held else start
            end, held = stop, width(text[begin:stop])
    if held:
        yield begin, end


def spans_between(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """What stands before, between and after the matches of a pattern."""
    begin = 0
    for match in pattern.finditer(text):
        yield begin, match.start()
        begin = match.end()
    yield begin, len(text)


def sentence_spans(text: str, begin: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """The sentences of a paragraph, which may be broken into lines; longer ones than a passage in parts."""
    place = begin
    paragraph = text[begin:end].replace("\n", " ")
    for sentence in sentences_of(paragraph):
        start = begin + paragraph.index(sentence, place - begin)
        place = start + len(sentence)
        yield from parts(text, start, place, most)


def sentences_in(text: str) -> list[tuple[int, str]]:
    """The sentences of a text, each with the character at which it begins.

    >>> sentences_in("He came. He\\nsaw.")
    [(0, 'He came.'), (9, 'He\\nsaw.')]
    """
    paragraphs = spans_between(BLANK_LINES, text)
    spans = (span for paragraph in paragraphs for span in sentence_spans(text, *paragraph, UNCUT))
    return [(start, text[start:end]) for start, end in spans]


def parts(text: str, start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """A span that is too wide in as many parts as it takes, without white space at their ends."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    if width(text[start:end]) <= most or end - start < 2:
        if start < end:
            yield start, end
        return
    middle = start + len(halves(text[start:end])[0])
    yield from parts(text, start, middle, most)
    yield from parts(text, middle, end, most)


def passages_of(text: str, file: str = "", line: int = 1, most: int = PASSAGE) -> Iterator[Passage]:
    """The passages of a text with their places; ``line`` is the one on which it begins."""
    counted = 0
    for start, end in cut_passages(text, most):
        line += text.count("\n", counted, start)
        counted = start
        yield Passage(text[start:end], file, line if file else 0)


def passages_of_documents(documents: Iterable[Document], most: int = PASSAGE) -> list[Passage]:
    """The passages of documents, each text once.

    Raises:
        DataError: there is no text in them.
    """
    found: dict[str, Passage] = {}
    where = ""
    for document in documents:
        where = where or document.file
        for passage in passages_of(document.text, document.file, document.line, most):
            found.setdefault(passage.text, passage)
    if not found:
        raise DataError(
            "there is no text in the documents",
            where=where,
            fix="name files or a folder with texts",
            zh="文档中没有文本，请指定含有文本的文件或文件夹",
        )
    return list(found.values())


# Search ---------------------------------------------------------------------------------------------------------------


class PassageIndex:
    """Passages that can be searched.

    Args:
        passages: at least one.
        encoder: a :class:`~hanmo.inference.encoder.TextEncoder` whose vectors are compared as well.

    Raises:
        ResourceError: bm25s is not installed.
    """

    def __init__(self, passages: Sequence[Passage], encoder: Any = None) -> None:
        self.passages, self.encoder = list(passages), encoder
        words = [search_words(passage.text) for passage in self.passages]
        self.known = frozenset(word for row in words for word in row)
        self.bm25 = build_bm25(words) if self.known else None
        self.vectors_PD: Floats | None = None
        if encoder is not None:
            notice(pick(f"vectors of {len(words):,} passages ...", f"计算 {len(words):,} 个段落的向量……"))
            self.vectors_PD = np.asarray(encoder.embed([passage.text for passage in self.passages]))

    def scores(self, question: str) -> Floats:
        """BM25 of every passage, ``[P]``; 0 where no word of the question stands."""
        words = [word for word in asked_words(question) if word in self.known]
        if self.bm25 is None or not words:
            return np.zeros(len(self.passages))
        return np.asarray(self.bm25.get_scores(words), dtype=np.float64)

    def search(self, question: str, k: int) -> list[Passage]:
        """The k passages that a question is most likely about, the best first; fewer where nothing else has a word in
        common with it and there are no vectors."""
        return [self.passages[place] for place in self.places(question, k)]

    def places(self, question: str, k: int) -> list[int]:
        """The same as their numbers."""
        scores_P = self.scores(question)
        order_P = np.argsort(-scores_P, kind="stable")
        if self.vectors_PD is None:
            return [int(place) for place in order_P[:k] if scores_P[place] > 0]
        near_P = self.vectors_PD @ np.asarray(self.encoder.embed([question]))[0]
        fused_P = np.zeros(len(scores_P))
        found = int((scores_P > 0).sum())
        fused_P[order_P[:found]] += 1 / (CONSTANT + 1 + np.arange(found))
        fused_P[np.argsort(-near_P, kind="stable")] += 1 / (CONSTANT + 1 + np.arange(len(near_P)))
        return [int(place) for place in np.argsort(-fused_P, kind="stable")[:k]]

    def signature(self) -> dict[str, Any]:
        """How it searches, and in how much."""
        from importlib.metadata import version

        vectors = {} if self.encoder is None else {"vectors": self.encoder.name, "fusion": f"rrf{CONSTANT}"}
        return {"passages": len(self.passages), "bm25s": version("bm25s"), **vectors}


def build_bm25(words: Sequence[Sequence[str]]) -> Any:
    """An index of bm25s, with Lucene's variant of the formula.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise missing_package("bm25s", "retrieval", pick("search in documents", "文档检索")) from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index([list(row) for row in words], show_progress=False)
    return index


def best_first(question: str, texts: Sequence[str]) -> list[int]:
    """Texts in the order of their BM25 for a question; those without a common word at the end, in their order."""
    scores = PassageIndex([Passage(text) for text in texts]).scores(question)
    return sorted(range(len(texts)), key=lambda place: -scores[place])
