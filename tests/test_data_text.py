"""Normalisation, language identification, sections, encodings: text before it becomes documents."""

from __future__ import annotations

import codecs
import io
import random
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hanmo.data.encodings import TextStream, detect
from hanmo.data.sections import cut_sections, safe_cut, section_bytes
from hanmo.text.language import identify
from hanmo.text.normalize import normalize

ENGLISH = "It was the best of times, it was the worst of times, and nobody had the time to read of it.\n"
CHINESE = "话说天下大势，分久必合，合久必分。他说这个事情不是我们的，也没有人知道。\n"
TRADITIONAL = "這個時候他們說的話，沒有人會知道是為什麼，國家也不過如此。\n"
HOSTILE = st.text(
    st.characters(codec=None) | st.sampled_from("\r\n\t\x00\x85\u0301\u0327\u1100\u1161\u11a8Ａ，\u3000\ufeff\ud800e")
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\n", "a\nb\nc\n"),
        ("\ufeffa\x00b\x07c\x7f\td", "abc\td"),
        ("e\u0301\u212b", "é\u00c5"),
        ("e\x00\u0301", "é"),
        ("x\ud800y", "x\ufffdy"),
        ("ＡＢ１，　“好”", "ＡＢ１，　“好”"),
        ("👩\u200d💻", "👩\u200d💻"),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected


def test_normalize_half_width() -> None:
    assert normalize("ＡＢ１２！（好）　ｘ～。、", half_width=True) == "AB12!(好) x~。、"
    assert normalize("Ａ\u0301", half_width=True) == "Á"


def test_normalize_simplify() -> None:
    pytest.importorskip("opencc")
    assert normalize("漢語語言模型", simplify=True) == "汉语语言模型"


@given(HOSTILE, st.booleans())
@settings(deadline=None, max_examples=300)
def test_normalize_is_idempotent_nfc_and_writable(text: str, half_width: bool) -> None:
    once = normalize(text, half_width=half_width)
    assert normalize(once, half_width=half_width) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\n\t" for c in once)
    once.encode("utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ENGLISH, "en"),
        (ENGLISH * 40, "en"),
        (CHINESE, "zh"),
        (CHINESE * 300, "zh"),
        ("用 Python 写的程序，运行得很快。", "zh"),
        (ENGLISH + CHINESE, "mixed"),
        ("def f(x):\n    return [x[i] for i in range(3)]\n" * 5, "code"),
        ("int main(void) { printf(\"%d\\n\", x[0]); return 0; }", "code"),
        ("吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。", "other"),
        ("Все счастливые семьи похожи друг на друга.", "other"),
        ("동해물과 백두산이 마르고 닳도록", "other"),
        ("Els éssers humans són lliures i iguals en dignitat però també són éssers", "other"),
        ("En un lugar de la Mancha, cuyo nombre no quiero acordarme, no ha mucho tiempo que vivia un hidalgo " * 8, "other"),  # noqa: E501
        ("12345 67890", "other"),
    ],
)  # fmt: skip
def test_identify(text: str, expected: str) -> None:
    assert identify(text) == expected
    assert identify(text.encode()) == expected


@given(st.text(st.sampled_from("ab 汉\n\u3000\u0301가\u1161\r"), max_size=400), st.integers(1, 60))
@settings(deadline=None, max_examples=300)
def test_sections_lose_nothing(text: str, size: int) -> None:
    sections = cut_sections(text, size)
    assert "".join(sections) == text
    assert all(sections)
    assert all(len(section) <= size * 1.5 + 1 for section in sections)


def test_sections_prefer_blank_lines_then_line_ends() -> None:
    paragraphs = "".join(f"{'line ' * 12}\n{'word ' * 12}\n\n" for _ in range(50))
    assert all(section.endswith("\n\n") for section in cut_sections(paragraphs, 500))
    lines = "".join(f"{'line ' * 12}\n" for _ in range(50))
    assert all(section.endswith("\n") for section in cut_sections(lines, 500))
    spaced = ("段落。" * 30 + "\n\u3000 \t\n") * 30
    assert all(section.endswith("\n\u3000 \t\n") for section in cut_sections(spaced, 300))


@given(
    st.text(st.sampled_from("e\u0301\u0327\u1100\u1161\u11a8\r\n a汉\u09c7\u09be"), min_size=3, max_size=60), st.data()
)
@example("a\u1100\u1161\u11a8\r", None)
@settings(deadline=None, max_examples=300)
def test_safe_cut_normalises_alike_on_both_sides(text: str, data: st.DataObject | None) -> None:
    target = data.draw(st.integers(1, len(text) - 1)) if data else len(text) - 1
    place = safe_cut(text, target)
    if place != target or unicodedata.category(text[place])[0] not in "MC":
        assert normalize(text[:place]) + normalize(text[place:]) == normalize(text) or place == target


def test_section_bytes_shrink_for_small_corpora() -> None:
    assert section_bytes(5_000_000) == 8192
    assert section_bytes(64 * 500) == 500
    assert section_bytes(10) == 200


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "utf-8"),
        (ENGLISH.encode(), "utf-8"),
        (CHINESE.encode(), "utf-8"),
        (codecs.BOM_UTF8 + ENGLISH.encode(), "utf-8-sig"),
        (CHINESE.encode("gb18030"), "gb18030"),
        (TRADITIONAL.encode("gb18030"), "gb18030"),
        ((ENGLISH * 20 + "# 这里是一个注释\n").encode("gb18030"), "gb18030"),
        (codecs.BOM_UTF16_LE + CHINESE.encode("utf-16-le"), "utf-16-le"),
        (codecs.BOM_UTF16_BE + CHINESE.encode("utf-16-be"), "utf-16-be"),
        (ENGLISH.encode("utf-16-le"), "utf-16-le"),
        (ENGLISH.encode("utf-16-be"), "utf-16-be"),
        (CHINESE.encode("utf-16-le"), "utf-16-le"),
        (CHINESE.encode("utf-16-be"), "utf-16-be"),
        (CHINESE.encode("utf-32"), "utf-32"),
        # what must not be swallowed as GB18030: latin-1 prose is text that is not valid UTF-8
        (("Brunetière, Coppée, Hauptmann, Barrès, déjà vu, naïveté. " * 20).encode("latin-1"), "utf-8"),
        (("Größe, Straße, Übermut tut selten gut. " * 20).encode("latin-1"), "utf-8"),
        (("這個時候他們說的話，沒有人會知道。" * 5).encode("big5"), "utf-8"),
        (("吾輩は猫である。名前はまだ無い。" * 5).encode("euc-jp"), "utf-8"),
        (random.Random(0).randbytes(4000), ""),
        (bytes(range(256)) * 4, ""),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", ""),
        (b"%PDF-1.7\n" + ENGLISH.encode(), ""),
        (b"\x7fELF" + bytes(60), ""),
    ],
)  # fmt: skip
def test_detect(data: bytes, expected: str) -> None:
    assert detect(data, complete=True) == expected


def test_detect_on_real_text(shared_data: Path) -> None:
    for path in sorted((shared_data / "zh-novels").glob("*.txt"))[:5]:
        text = path.read_text(encoding="utf-8")[5000:9000]
        for encoding in ("gb18030", "utf-16-le", "utf-16-be"):
            assert detect(text.encode(encoding), complete=True) in (encoding, "utf-8")
    poem = (shared_data / "chinese-poetry" / "tang.jsonl").read_text(encoding="utf-8")[:3000]
    assert detect(poem.encode("gb18030"), complete=True) == "gb18030"


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16-le", "utf-16"])
def test_stream_across_blocks(encoding: str) -> None:
    text = (CHINESE + ENGLISH) * 12_000  # several blocks, so that characters lie across their borders
    stream = TextStream(io.BytesIO(text.encode(encoding)))
    pieces = list(stream.pieces())
    assert "".join(pieces) == text
    assert len(pieces) > 1 and all(piece.endswith("\n") for piece in pieces)
    assert not stream.bad


def test_stream_finds_gb18030_after_a_long_ascii_beginning() -> None:
    text = ENGLISH * 4000 + CHINESE * 100
    stream = TextStream(io.BytesIO(text.encode("gb18030")))
    assert "".join(stream.pieces()) == text
    assert stream.encoding == "gb18030" and not stream.bad


def test_stream_marks_bad_bytes_and_keeps_the_rest() -> None:
    data = b"good\nbad \xff\xfe line\ngood \xe4\xb8\xad\n" * 3
    stream = TextStream(io.BytesIO(data))
    text = "".join(stream.pieces())
    assert stream.bad
    assert text == "good\nbad \udcff\udcfe line\ngood 中\n" * 3
    assert [number for number, line in stream_lines(data) if "\udcff" in line] == [2, 5, 8]


def stream_lines(data: bytes) -> list[tuple[int, str]]:
    return list(TextStream(io.BytesIO(data)).lines())


def test_lines_number_and_ends() -> None:
    assert stream_lines(b"a\r\nb\n\nc\xe2\x80\xa8d") == [(1, "a"), (2, "b"), (3, ""), (4, "c\u2028d")]


def test_a_line_of_50_mb_is_read_in_pieces() -> None:
    data = "一二三四五六七八九十".encode() * 1_700_000
    start = time.monotonic()
    pieces = list(TextStream(io.BytesIO(data)).pieces())
    assert sum(len(piece) for piece in pieces) == 17_000_000
    assert max(len(piece) for piece in pieces) < 3_000_000
    assert time.monotonic() - start < 10
