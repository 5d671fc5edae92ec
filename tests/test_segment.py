"""Cutting Chinese, English and mixed text into words."""

from __future__ import annotations

import itertools
import marshal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanmo.errors import ResourceError, UsageError
from hanmo.text import segment as module
from hanmo.text.segment import segment, stop_words
from hanmo.text.traditional import SIMPLIFIED

MIXED = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("中国人在學習的，。aB3.,'’@/:-_ \n\u3000"))
)


@settings(deadline=None)
@given(MIXED)
def test_words_are_the_text_without_whitespace(text: str) -> None:
    for language in (None, "zh", "en"):
        words = segment(text, language)
        assert "".join(words) == "".join(text.split())
        assert all(words)
        position = 0
        for word in words:  # slices of the text, in order
            found = text.index(word, position)
            assert not text[position:found].strip()
            position = found + len(word)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \n\t\u3000", []),
        ("It's 3.14, not 1,000.", ["It's", "3.14", ",", "not", "1,000", "."]),
        ("the U.S. e.g. x", ["the", "U.S.", "e.g.", "x"]),
        ("Mail a.b+c@mail.example.org.", ["Mail", "a.b+c@mail.example.org", "."]),
        ("(see https://example.org/a?b=c).", ["(", "see", "https://example.org/a?b=c", ")", "."]),
        ("rock’n’roll 5th wait... x--y", ["rock’n’roll", "5th", "wait", "...", "x", "--", "y"]),
        ("'quoted' well-known", ["'", "quoted", "'", "well", "-", "known"]),
        ("cafe\u0301 naïve Привет", ["cafe\u0301", "naïve", "Привет"]),
        ("今天天气很好。", ["今天天气", "很", "好", "。"]),
        ("我来到北京清华大学", ["我", "来到", "北京", "清华大学"]),
        ("他会Python3，写了3.5万行……", ["他会", "Python3", "，", "写", "了", "3.5", "万行", "……"]),
        ("网址是http://a.cn/x，谢谢", ["网址", "是", "http://a.cn/x", "，", "谢谢"]),
        (
            "為了學習中國歷史，他寫了一本著名的書",
            ["為了", "學習", "中國", "歷史", "，", "他", "寫", "了", "一本", "著名", "的", "書"],
        ),
        ("😀!!", ["😀", "!", "!"]),
    ],
)
def test_examples(text: str, words: list[str]) -> None:
    assert segment(text) == words


def test_english_mode_gives_characters_and_needs_no_jieba() -> None:
    assert segment("China 中国 ok", "en") == ["China", "中", "国", "ok"]


def test_pure_english_does_not_import_jieba_and_chinese_is_quiet(tmp_path: Path) -> None:
    # A file that another user of the machine laid under jieba's fixed name must be neither read nor replaced.
    planted = tmp_path / "jieba.cache"
    planted.write_bytes(marshal.dumps(({"北京清华": 10**9, "北": 0, "北京": 0, "北京清": 0}, 10**9)))
    before = planted.read_bytes()
    script = (
        "import sys; from hanmo.text.segment import segment, stop_words\n"
        "segment('Plain English, 3.14 of it.'); segment('日本', 'en'); stop_words('zh')\n"
        "assert 'jieba' not in sys.modules and 'hanmo.text.segment' in sys.modules\n"
        "assert segment('我来到北京清华大学') == ['我', '来到', '北京', '清华大学']\n"
        "assert 'jieba' in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"TMPDIR": str(tmp_path), "PATH": ""}
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert planted.read_bytes() == before
    assert list(tmp_path.iterdir()) == [planted]


def test_missing_jieba_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module.load_cutter.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert segment("no Chinese here") == ["no", "Chinese", "here"]
    with pytest.raises(ResourceError, match="jieba") as caught:
        segment("中文句子")
    assert "hanmo[classical]" in caught.value.fix


@pytest.mark.parametrize("call", [lambda: segment("x", "fr"), lambda: stop_words("english")])
def test_unknown_language(call) -> None:
    with pytest.raises(UsageError, match="unknown language") as caught:
        call()
    assert "zh" in caught.value.zh


@pytest.mark.parametrize(
    "unit", ["a.", "a-", "a@", "1,", "http://", "a'", "龘", "中国", "a\u0301", "www.", "a@b.", "-", "1"]
)
def test_long_hostile_runs_end(unit: str) -> None:
    """A search or a model that takes quadratic time would not end within the patience of anybody."""
    text = unit * (60_000 // len(unit))
    assert "".join(segment(text)) == text


def test_stop_words_are_words_of_the_segmenter() -> None:
    english, chinese = stop_words("en"), stop_words("zh")
    assert {"the", "of", "it's"} <= english and {"的", "因为", "因為"} <= chinese
    assert 200 < len(english) < 500 and 300 < len(chinese) < 900
    assert not {"not", "no", "never", "不", "没", "没有", "沒有"} & (english | chinese)  # they turn a meaning round
    assert all(word == word.lower() and segment(word) == [word] for word in english)
    assert all(segment(word) == [word] for word in chinese)


def test_traditional_characters_have_one_simplified_one_each() -> None:
    assert len(SIMPLIFIED) > 1500 and not set(SIMPLIFIED) & set(SIMPLIFIED.values())
    assert all(module.FIRST_HAN.match(chr(code)) for pair in SIMPLIFIED.items() for code in pair)
    convert = pytest.importorskip("opencc").OpenCC("t2s").convert
    assert all(convert(chr(old)) == chr(new) for old, new in SIMPLIFIED.items())


def test_agrees_with_the_treebanks(shared_data: Path) -> None:
    """Word F1 on the Chinese treebank: above single characters (0.40), and 0.74 without the traditional table."""
    for name, least in (("zh_gsdsimp-ud-dev.conllu", 0.75), ("zh-ud-train.history-4f2c5f41.conllu", 0.76)):
        text = (shared_data / "ud-zh-gsd" / name).read_text(encoding="utf-8")
        right = gold = found = 0
        for block in text.split("\n\n")[:400]:
            words = [line.split("\t")[1] for line in block.splitlines() if line.split("\t")[0].isdigit()]
            ours, theirs = spans(segment("".join(words))), spans(words)
            right, gold, found = right + len(ours & theirs), gold + len(theirs), found + len(ours)
        assert 2 * right / (gold + found) > least


def spans(words: list[str]) -> set[tuple[int, int]]:
    """The begin and end of each word."""
    ends = [0]
    for word in words:
        ends.append(ends[-1] + len(word))
    return set(itertools.pairwise(ends))
