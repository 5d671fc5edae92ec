"""Translation: BLEU and chrF to sacreBLEU's digit, the dictionary, long and odd texts, all kinds of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanmo.data.tasks.types import Pair
from hanmo.errors import DataError, ModelError, UsageError
from hanmo.evaluation.scoring import difference, score
from hanmo.inference.remote import connect
from hanmo.models import lexical
from hanmo.models.lexical import LexicalTable
from hanmo.tasks.base import Form
from hanmo.tasks.bleu import TranslationMetric
from hanmo.tasks.registry import find_task
from hanmo.tasks.rewriting import Rewriter
from hanmo.tasks.translation import Copy, Dictionary, Translation, Translator
from hanmo.text.sentences import halves, join_words, split_clauses, split_sentences

from .serving_fakes import FakeModel, running_server

sacrebleu = pytest.importorskip("sacrebleu")

NOUNS = {"cat": "猫", "dog": "狗", "book": "书", "tree": "树", "house": "房子", "river": "河"}
VERBS = {"sees": "看见", "likes": "喜欢", "paints": "画"}
ODD = [
    "",
    " \r\n ",
    "😀😀🎉",
    "ＡＢＣ１２３",
    "我用 machine learning 做翻译。\r\nSecond line.",
    "\u200b\ufeff",
    "a" * 3000,
]


def small_pairs() -> list[Pair]:
    pairs = [
        Pair(f"The {a} {verb} the {b}.", f"{NOUNS[a]}{VERBS[verb]}{NOUNS[b]}。")
        for a in NOUNS
        for verb in VERBS
        for b in NOUNS
        if a != b
    ]
    return pairs


# The metric -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["13a", "zh"])
@pytest.mark.parametrize("references", [1, 3, "var"])
def test_bleu_and_chrf_are_those_of_sacrebleu_to_the_digit(tokens: str, references: Any) -> None:
    rng = np.random.default_rng(3)
    words = (
        list("我你他爱看书树河。，AB12") if tokens == "zh" else ["the", "cat's", "3.5", "sat", "on,", "U.S.", "mat."]
    )
    glue = "" if tokens == "zh" else " "

    def text() -> str:
        return glue.join(rng.choice(words, rng.integers(1, 12)))

    count = [int(rng.integers(0, 3)) if references == "var" else references - 1 for _ in range(60)]
    records = [Pair("x", text(), tuple(text() for _ in range(more))) for more in count]
    answers = [record.target if rng.random() < 0.3 else text() for record in records]
    answers[5] = ""
    metric = TranslationMetric(records)
    found = metric.measures(metric.statistics(records, answers).sum(0))
    width = 1 + max(count)
    streams = [[(r.target, *r.references, None, None, None)[i] for r in records] for i in range(width)]
    bleu, chrf = sacrebleu.BLEU(tokenize=tokens), sacrebleu.CHRF()
    assert float(found["bleu"]) == bleu.corpus_score(answers, streams).score > 1
    assert float(found["chrf"]) == chrf.corpus_score(answers, streams).score > 1
    signature = metric.signature()
    for part in str(bleu.get_signature()).split("|"):
        name, _, value = part.partition(":")
        assert str(signature["sacrebleu" if name == "version" else name]) == value
    assert metric.details(records, answers)["precisions"] == bleu.corpus_score(answers, streams).precisions


def test_the_interval_is_that_of_resampled_corpora() -> None:
    records = small_pairs()
    answers = [record.target if i % 3 else record.target[::-1] for i, record in enumerate(records)]
    metric = TranslationMetric(records)
    statistics = metric.statistics(records, answers)
    rows = np.random.default_rng(0).integers(0, len(records), (4, len(records)))
    drawn = metric.measures(np.stack([statistics[row].sum(0) for row in rows]))
    for place, row in enumerate(rows):
        expected = sacrebleu.BLEU(tokenize="zh").corpus_score(
            [answers[i] for i in row], [[records[i].target for i in row]]
        )
        assert drawn["bleu"][place] == expected.score
    assert metric.statistics([], []).shape == (0, statistics.shape[1])


# Sentences ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Li met J. Smith et al. in the U.S. city. Why?", ["Dr. Li met J. Smith et al. in the U.S. city.", "Why?"]),
        ("他说：“走吧。”我们走了！真的……好。", ["他说：“走吧。”", "我们走了！", "真的……", "好。"]),
        ("提出了新方法.仿真结果表明误差为3.5%.结论", ["提出了新方法.", "仿真结果表明误差为3.5%.", "结论"]),
        ("One line\r\nbroken at a width.\r\n\r\nNext", ["One line broken at a width.", "Next"]),
        (" \r\n ", []),
        ("😀. 你好", ["😀.", "你好"]),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


def test_no_letter_is_lost_by_cutting() -> None:
    text = "".join(f"第{i}句，Part {i}: value 3.{i}. " for i in range(200))
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
    assert "".join(halves(text)) == text and halves("ab") == ("a", "b")
    letters = [c for c in "".join(split_clauses(text)) if c.isalnum()]
    assert letters == [c for c in text if c.isalnum()]


def test_words_are_joined_as_their_script_wants() -> None:
    assert join_words(["我", "有", "3", "本", "English", "books", "。"]) == "我有3本English books。"
    assert join_words(["Yes", ",", "“", "no", "”", "!"]) == "Yes, “no”!"


# The dictionary -------------------------------------------------------------------------------------------------------


def test_ibm_model_1_finds_the_probabilities_of_the_textbook() -> None:
    """One round by hand: all start equal, a word shares itself out evenly among none and two source words."""
    pairs = [(["the", "house"], ["das", "haus"]), (["the", "book"], ["das", "buch"])]
    table = LexicalTable(rounds=1).fit(pairs)
    assert dict(table.translations("the")) == pytest.approx({"das": 0.5, "haus": 0.25, "buch": 0.25})
    assert dict(table.translations("house")) == pytest.approx({"das": 0.5, "haus": 0.5})
    assert dict(LexicalTable(rounds=60).fit(pairs).translations("house"))["haus"] > 0.95
    assert table.translations("unseen") == []


def test_the_dictionary_translates_both_ways() -> None:
    pairs = small_pairs()
    forward, back = Dictionary(), Dictionary()
    forward.fit(pairs)
    back.fit([Pair(pair.target, pair.source) for pair in pairs])
    assert forward.answer([Pair("dog likes tree.", "")]) == ["狗喜欢树。"]
    assert back.answer([Pair("狗喜欢河", "")]) == ["Dog likes river"]
    assert forward.answer([Pair("Quokka １２", "")]) == ["Quokka １２"]  # words never seen stay


def test_the_dictionary_beats_copying_and_differences_are_told() -> None:
    pairs, task = small_pairs(), Translation()
    copy, dictionary = task.baselines(pairs)
    dictionary.fit(pairs)
    first, second = score(task, dictionary, pairs), score(task, copy, pairs)
    assert first.main.value > 10 > second.main.value
    assert difference(task.metric(pairs), first, second).significant
    assert "tok:zh" in first.signature and "nrefs:1" in first.signature


def test_learning_keeps_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexical, "MOST_MEETINGS", 300)
    pairs = [(["a"] * 9, ["x"] * 5), (["b", "c"], ["y"])] * 20
    assert 0 < len(lexical.within_memory(pairs)) < len(pairs)
    assert LexicalTable().fit(pairs).best["a"] == "x"
    with pytest.raises(DataError, match="no pairs"):
        LexicalTable().fit([([], ["x"])])


def test_the_dictionary_bears_odd_and_long_texts() -> None:
    dictionary = Dictionary()
    dictionary.fit([*small_pairs(), Pair("", ""), Pair("a\r\nb", "甲\r\n乙")])
    answers = dictionary.answer([Pair(text, "") for text in ODD])
    assert answers[0] == "" and answers[2].replace(" ", "") == ODD[2] and len(answers[4].split("\n")) == 2
    long = dictionary.answer([Pair("the cat sees the dog. " * 2000, "")])[0]
    assert long.count("猫") == 2000


# Language models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from .finetune_cases import make_bases

    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("kind", ["decoder", "both"])
def test_language_models_translate_whatever_they_are_given(bases: dict[str, str], kind: str) -> None:
    from hanmo.inference.loading import load

    model = load(bases[kind], device="cpu")
    system = Translation().system(
        model, small_pairs(), Form(instruction="To Chinese:" if kind == "decoder" else "zh: ")
    )
    assert system.kind == ("decoder" if kind == "decoder" else "encoder-decoder")
    answers = system.answer([Pair(text, "") for text in ODD[:-1]])
    assert len(answers) == len(ODD) - 1 and answers[0] == answers[1] == ""
    result = score(Translation(), system, [Pair("the cat", "猫", ("小猫",))])
    assert result.n == 1 and ("prompt:" if kind == "decoder" else "prefix:'zh: '") in result.signature


def test_long_texts_go_in_pieces_that_fit(bases: dict[str, str]) -> None:
    from hanmo.inference.loading import load

    model = load(bases["decoder"], device="cpu")  # 128 tokens
    system = Translator(model, (), Form(instruction="T:"))
    text = "good film. " * 2500 + "x" * 400
    pieces = list(system.rewriter.pieces(text, 64))
    assert all(system.rewriter.fits(piece) for piece in pieces) and len(pieces) > 100
    assert "".join("".join(pieces).split()) == "".join(text.split())
    with pytest.raises(UsageError, match="no room"):
        list(Translator(model, (), Form(instruction="long " * 200)).rewriter.pieces("good film", 64))


def test_a_remote_model_is_asked_in_the_right_words() -> None:
    with running_server(FakeModel()) as base:
        model = connect(f"openai:fake@{base}", offline=True)
        system = Translation().system(model, small_pairs(), Form(shots=2))
        assert system.kind == "remote"
        (answer,) = system.answer([Pair("The cat.", "")])
        assert answer
        prompt = system.prompt("The cat.")  # type: ignore[attr-defined]
        assert "译成中文" in prompt.instruction and len(prompt.shots) == 2 and prompt.question == "英文：The cat."
        back = Translator(model, (), Form())
        assert "into English" in back.prompt("我们走吧").instruction and "译成中文" in back.prompt("Go!").instruction


def test_what_cannot_translate_is_told(bases: dict[str, str]) -> None:
    from hanmo.inference.loading import load

    task = find_task("mt")
    assert task.name == "translation" and task.record("hi") == Pair("hi", "")
    with pytest.raises(ModelError, match="cannot do translation"):
        task.system(load(bases["encoder"], device="cpu"))
    assert task.as_data("好") == {"translation": "好"} and task.describe(Pair("a", ""), "好") == "好"


def test_a_rewriter_writes_nothing_about_nothing(bases: dict[str, str]) -> None:
    from hanmo.inference.loading import load
    from hanmo.tasks.prompts import Prompt

    rewriter = Rewriter(load(bases["decoder"], device="cpu"), lambda text: Prompt("", text), growth=1.0)
    assert rewriter.write(["", " \n"], "testing") == ["", ""]


def test_figures_on_tatoeba(shared_data: Path) -> None:
    """Small, so that it is quick: the dictionary of 4,000 pairs is far better than copying."""
    from hanmo.data.tasks import read_records, split_records
    from hanmo.data.tasks.splits import Shares

    records = list(read_records("pair", shared_data / "tatoeba-cmn-eng" / "cmn.txt"))[::5]
    split = split_records(records, Shares(0.0, 0.1), 0)
    dictionary = Dictionary()
    dictionary.fit(split.train)
    found = score(Translation(), dictionary, split.test, resamples=50)
    assert 5 < found.main.value < 40
    assert score(Translation(), Copy(), split.test, resamples=50).main.value < 1
