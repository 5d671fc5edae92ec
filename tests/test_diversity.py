"""Diversity, repetition and copying, against numbers counted by hand and by slow, plain programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanmo.errors import ResourceError, UsageError
from hanmo.tasks.diversity import Training, distinct, repetition, self_bleu, suffix_array, units

TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=6)


def plain_grams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def test_units() -> None:
    assert units("") == []
    assert units("春风 ＡＢ 12.5元，好！") == ["春", "风", "ａｂ", "12", ".", "5", "元", "，", "好", "！"]
    assert units("It’s we'll_x") == ["it’s", "we'll", "_", "x"]
    assert units("cafe\u0301 𠀀𠀁 😀") == ["café", "𠀀", "𠀁", "😀"]
    assert units("GPT模型") == ["gpt", "模", "型"]


def test_distinct_by_hand() -> None:
    texts = [units("the cat sat on the mat"), units("the cat ran")]  # 9 words, 6 different; 7 pairs, 6 different
    assert distinct(texts, 1) == pytest.approx(6 / 9)
    assert distinct(texts, 2) == pytest.approx(6 / 7)
    assert distinct([units("好好好好")], 2) == pytest.approx(1 / 3)
    assert distinct([], 2) == distinct([["a"]], 2) == 0.0
    assert distinct([["a"], ["b"], ["a", "b"]], 2) == 1.0  # no pair across two texts


def test_repetition_by_hand() -> None:
    texts = [units("a b a b a"), units("春眠不觉晓"), []]  # pairs ab ba ab ba: two of four stood before
    assert repetition(texts, 2).tolist() == [0.5, 0.0, 0.0]


@given(TEXTS, st.integers(1, 14))
def test_counts_equal_a_plain_program(texts: list[list[str]], n: int) -> None:
    every = [gram for text in texts for gram in plain_grams(text, n)]
    assert distinct(texts, n) == pytest.approx(len(set(every)) / len(every) if every else 0.0)
    for text, rate in zip(texts, repetition(texts, n), strict=True):
        found = plain_grams(text, n)
        assert rate == pytest.approx(1 - len(set(found)) / len(found) if found else 0.0)


def test_long_grams_of_many_units_stay_exact() -> None:
    text = [str(number) for number in range(50_000)]
    assert distinct([text, text], 12) == pytest.approx(0.5)
    assert repetition([text + text], 12)[0] == pytest.approx((50_000 - 11) / (100_000 - 11))


def test_self_bleu_is_that_of_sacrebleu() -> None:
    bleu = pytest.importorskip("sacrebleu").metrics.BLEU
    texts = ["the cat sat on the mat", "the cat sat on the rug", "a dog ran over the hill today"]
    metric = bleu(effective_order=True)
    expected = [metric.sentence_score(text, [x for x in texts if x != text]).score for text in texts]
    found = self_bleu(texts)
    assert found.scores.tolist() == pytest.approx(expected)
    assert found.score == pytest.approx(sum(expected) / 3)
    assert "tok:13a" in found.signature
    assert self_bleu(["春眠不觉晓处处", "春眠不觉晓处处"], "zh").score == pytest.approx(100)
    assert "tok:zh" in self_bleu(["春", "秋"], "zh").signature
    assert self_bleu(["春眠不觉晓", "白日依山尽"], "zh").score < 1


def test_self_bleu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="there are 1"):
        self_bleu(["one"])
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    with pytest.raises(ResourceError, match="sacrebleu"):
        self_bleu(["one", "two"])


def test_copying_by_hand() -> None:
    training = Training([units("床前明月光，疑是地上霜。"), units("举头望明月，低头思故乡。")])
    found = training.copied(
        [units("他说床前明月光很亮"), units("明月，低头"), units("新写的一句"), [], units("霜。举头")], 3
    )
    assert found.longest.tolist() == [5, 5, 0, 0, 2]  # 霜。 and 举头 stand in two documents
    assert found.share.tolist() == pytest.approx([3 / 7, 1.0, 0.0, 0.0, 0.0])
    assert found.stretch == ("床", "前", "明", "月", "光")


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_copying_equals_a_plain_program(known: list[list[str]], texts: list[list[str]], n: int) -> None:
    found = Training(known).copied(texts, n)
    seen = {gram for text in known for length in range(1, 13) for gram in plain_grams(text, length)}
    for text, share, longest in zip(texts, found.share, found.longest, strict=True):
        own = plain_grams(text, n)
        assert share == pytest.approx(sum(gram in seen for gram in own) / len(own) if own else 0.0)
        assert longest == max(
            [k for k in range(1, len(text) + 1) for g in plain_grams(text, k) if g in seen], default=0
        )


@given(st.lists(st.integers(0, 3), max_size=40))
def test_the_suffix_array_is_sorted(codes: list[int]) -> None:
    expected = sorted(range(len(codes)), key=lambda place: codes[place:])
    assert suffix_array(np.array(codes, dtype=np.int64)).tolist() == expected


def test_bad_orders() -> None:
    for measure in (distinct, repetition, Training([]).copied):
        with pytest.raises(UsageError, match="1 or more"):
            measure([["a"]], 0)
    assert Training([]).copied([["a"]]).longest.tolist() == [0]


def test_a_thousand_texts_take_seconds() -> None:
    draw = np.random.default_rng(1)
    texts = [[str(word) for word in draw.zipf(1.3, 200) % 5000] for _ in range(1000)]
    began = time.monotonic()
    assert 0 < distinct(texts, 4) <= 1
    assert repetition(texts).shape == (1000,)
    assert Training(texts[:500]).copied(texts).longest[0] == 200
    assert self_bleu([" ".join(text) for text in texts], sample=30).score > 0
    assert time.monotonic() - began < 60
