"""Streaming: the pieces add up to the text given at once, for any bytes, cuts and stop strings."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hanmo.inference.stream import IncrementalDecoder


def run(pieces: list[bytes], stop: list[str]) -> tuple[list[str], str | None]:
    """Feed the pieces as the engine does (it ends at a stop string) and return the chunks."""
    decoder = IncrementalDecoder(stop)
    chunks = []
    for piece in pieces:
        chunks.append(decoder.feed(piece))
        if decoder.stop_string is not None:
            break
    return [*chunks, decoder.finish()], decoder.stop_string


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Cut bytes at the given places (taken modulo the length)."""
    marks = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:stop] for start, stop in pairwise(marks)]


def at_once(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The rule, said slowly: go through the text character by character until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [word for word in stop if text[:end].endswith(word)]
        if ending:
            word = max(ending, key=len)
            return text[: end - len(word)], word
    return text, None


ALPHABET = st.text("ab。春\n👩‍👩‍👧é", max_size=14)
BYTES = st.one_of(
    ALPHABET.map(str.encode),
    st.binary(max_size=20),
    st.lists(st.sampled_from([b"\xe6\x98\xa5", b"\xe6", b"\x98", b"\xf0\x9f\x91", b"\xa9", b"\xff", b"a"])).map(
        b"".join
    ),
)
STOPS = st.lists(st.one_of(st.text("ab。春\n👩‍é", min_size=1, max_size=4), st.just("\ufffd")), max_size=4)
CUTS = st.lists(st.integers(0, 50), max_size=25)


@settings(max_examples=1500, deadline=None)
@given(BYTES, CUTS, STOPS)
@example("春。".encode(), [1, 2, 3, 4, 5], ["。"])
@example(b"ab\xe6\x98", [1, 2, 3], ["b\ufffd"])
@example(b"abcabd", [1, 2, 3, 4, 5], ["abd", "bca"])
def test_chunks_add_up_to_the_text_at_once(data: bytes, cuts: list[int], stop: list[str]) -> None:
    chunks, met = run(cut(data, cuts), stop)
    text, expected = at_once(data.decode("utf-8", "replace"), stop)
    assert "".join(chunks) == text
    assert met == expected


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20), CUTS)
def test_no_chunk_of_valid_text_holds_a_broken_character(text: str, cuts: list[int]) -> None:
    chunks, _ = run(cut(text.encode(), cuts), [])
    assert "".join(chunks) == text
    assert all("\ufffd" not in chunk for chunk in chunks) or "\ufffd" in text


@pytest.mark.parametrize(
    ("pieces", "stop", "chunks", "met"),
    [
        (["hello wor", "ld"], ["world"], ["hello ", "", ""], "world"),  # a stop string over two tokens
        (["one\n", "\ntwo"], ["\n\n"], ["one", "", ""], "\n\n"),
        (["one\n", "two"], ["\n\n"], ["one", "\ntwo", ""], None),  # a false alarm is given back
        (["abxcd"], ["x"], ["ab", ""], "x"),  # inside one token
        (["春眠不觉", "晓。处处"], ["。"], ["春眠不觉", "晓", ""], "。"),
        (["a"], ["ab"], ["", "a"], None),  # held back until the end
        (["xabc"], ["abcd", "bc"], ["xa", ""], "bc"),  # complete first wins, not begun first
        (["xabc"], ["c", "abc"], ["x", ""], "abc"),  # of two that end together, the longest
        (["aab"], ["ab"], ["a", ""], "ab"),
    ],
)
def test_stop_strings(pieces: list[str], stop: list[str], chunks: list[str], met: str | None) -> None:
    assert run([piece.encode() for piece in pieces], stop) == (chunks, met)


def test_nothing_follows_a_stop_string() -> None:
    decoder = IncrementalDecoder(["。"])
    assert decoder.feed("春。夏".encode()) == "春"
    assert decoder.feed("秋".encode()) == ""
    assert decoder.finish() == ""
