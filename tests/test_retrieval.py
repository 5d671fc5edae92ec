"""Passages of documents and their search: places, odd texts, BM25 by hand, two rankings in one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanmo.data.readers import Document, read_documents
from hanmo.errors import DataError, ResourceError
from hanmo.tasks.answers import Passage
from hanmo.tasks.retrieval import (
    HAN_WIDTH,
    PASSAGE,
    PassageIndex,
    asked_words,
    best_first,
    cut_passages,
    passages_of,
    passages_of_documents,
    search_words,
    sentences_in,
    width,
)

pytest.importorskip("bm25s")

TEXTS = st.text(st.sampled_from("ab. ,!?\n\r\t猫狗。，“”！😀Ａ１ \u3000\u200b\x85\u2028"), max_size=200)


# Passages -------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(1, 60))
def test_passages_are_slices_in_order_and_lose_nothing_but_white_space(text: str, most: int) -> None:
    end = 0
    kept = ""
    for start, stop in cut_passages(text, most):
        assert end <= start < stop <= len(text) and not text[end:start].strip()
        assert text[start:stop] == text[start:stop].strip()
        kept, end = kept + text[start:stop], stop
    assert not text[end:].strip()
    assert "".join(kept.split()) == "".join(text.split())
    assert "".join("".join(part for _, part in sentences_in(text)).split()) == "".join(text.split())


def test_passages_are_whole_sentences_of_a_size() -> None:
    text = "\n\n".join(" ".join(f"Sentence {i} of {j} says 3.5 things." for i in range(40)) for j in range(5))
    passages = list(passages_of(text, "a.txt", 7))
    assert all(300 < len(passage.text) <= PASSAGE for passage in passages)
    assert all(passage.text.endswith(".") and passage.text.startswith("Sentence") for passage in passages)
    lines = text.split("\n")
    assert all(lines[passage.line - 7].find(passage.text) >= 0 for passage in passages)
    chinese = list(passages_of("这句话有十个字左右。" * 300))
    assert all(width(passage.text) <= PASSAGE and passage.text.endswith("。") for passage in chinese)
    assert width("猫a") == HAN_WIDTH + 1 and chinese[0].where == ""


def test_lines_that_were_broken_at_a_width_are_one_sentence() -> None:
    text = "The river is very\nlong. It ends\nin the sea.\n\nNext."
    assert [part for _, part in sentences_in(text)] == ["The river is very\nlong.", "It ends\nin the sea.", "Next."]


def test_a_text_without_sentences_is_cut_anyway() -> None:
    for text in ("x" * 10_000, "好" * 10_000, "word " * 10_000, "- item\n" * 3000):
        passages = list(passages_of(text))
        assert len(passages) > 5 and all(width(passage.text) <= PASSAGE for passage in passages)
        assert "".join("".join(passage.text.split()) for passage in passages) == "".join(text.split())


def test_documents_are_read_as_files_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffFirst line.\r\n\r\nSecond ２０ part.\r\n".encode())
    (tmp_path / "b.txt").write_bytes("第一段。\n第二段。".encode("gb18030"))
    (tmp_path / "c.jsonl").write_text('{"text": "One."}\n{"text": "First line."}\n{"text": "Two."}\n', encoding="utf-8")
    (tmp_path / "d.txt").write_text("", encoding="utf-8")
    passages = passages_of_documents(read_documents([tmp_path]), 30)
    assert [(passage.text, passage.where) for passage in passages] == [
        ("First line.", "a.txt:1"),
        ("Second ２０ part.", "a.txt:3"),
        ("第一段。\n第二段。", "b.txt:1"),
        ("One.", "c.jsonl:1"),
        ("Two.", "c.jsonl:3"),
    ]
    with pytest.raises(DataError, match="there is no text in the documents"):
        passages_of_documents([Document(" \n", "x.txt", 1)])


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cities' glasses, buses and Paris's", ["the", "city", "glass", "buse", "and", "pari"]),
        ("ＡＢＣ１２３", ["abc123"]),
        ("長江", ["长江"]),
        ("猫", ["猫"]),
        ("what is it", ["what", "is", "it"]),
        ("?!", ["?", "!"]),
        ("😀", ["😀"]),
        ("", []),
    ],
)
def test_words_of_a_search(text: str, words: list[str]) -> None:
    assert search_words(text) == words


def test_words_that_say_little_are_looked_for_only_where_there_are_no_others() -> None:
    assert asked_words("What is this made of?") == ["made"]
    assert asked_words("What is this?") == ["what", "is", "thi"]
    assert asked_words("😀?") == ["😀"] and asked_words("谁？") == ["谁"] and asked_words("") == []


# Search ---------------------------------------------------------------------------------------------------------------


def test_scores_are_bm25() -> None:
    texts = ["cat dog dog", "cat cat bird mouse", "bird", "tree tree tree tree tree"]
    index = PassageIndex([Passage(text) for text in texts])
    rows = [text.split() for text in texts]
    mean = sum(map(len, rows)) / len(rows)

    def by_hand(row: list[str]) -> float:
        total = 0.0
        for word in ("dog", "cat"):
            met = sum(word in other for other in rows)
            idf = math.log(1 + (len(rows) - met + 0.5) / (met + 0.5))
            total += idf * row.count(word) / (row.count(word) + 1.2 * (1 - 0.75 + 0.75 * len(row) / mean))
        return total

    assert index.scores("dogs, cat") == pytest.approx([by_hand(row) for row in rows], rel=1e-5)
    assert index.places("dog cat", 9) == [0, 1] and index.places("dog cat", 1) == [0]
    assert best_first("bird", texts) == [2, 1, 0, 3]


def test_nothing_in_common_finds_nothing() -> None:
    index = PassageIndex([Passage("x"), Passage(""), Passage("😀 星")])
    assert index.search("y", 5) == [] and index.search("", 5) == []
    assert index.search("😀", 5) == [Passage("😀 星")]
    assert PassageIndex([Passage("")]).search("x", 5) == []


def test_a_question_of_ten_thousand_words_is_no_matter() -> None:
    index = PassageIndex([Passage("Anna lives in Paris."), Passage("Ben lives in Rome.")])
    assert index.places("who " * 10_000 + "Rome", 2) == [1]


class Vectors:
    """An encoder whose vectors are told."""

    name = "told"

    def embed(self, texts: list[str]) -> Any:
        return np.array([[len(text) == 3, len(text) != 3] for text in texts], dtype=np.float32)


def test_two_rankings_become_one() -> None:
    index = PassageIndex([Passage("cat"), Passage("a cat"), Passage("dog"), Passage("elephant")], Vectors())
    # BM25 finds the first two, vectors prefer the first and the third
    assert index.places("cat", 4)[0] == 0 and set(index.places("cat", 3)) == {0, 1, 2}
    assert len(index.places("tiger", 4)) == 4
    assert index.signature()["fusion"] == "rrf60" and index.signature()["passages"] == 4


def test_without_bm25s_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ResourceError, match=r"'bm25s' is not installed") as error:
        PassageIndex([Passage("x")])
    assert "hanmo[retrieval]" in error.value.fix
