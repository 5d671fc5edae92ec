"""Summarization: ROUGE to rouge-score's digit, sentences chosen from texts, models with maps and reductions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from hanmo.data.tasks.types import Pair
from hanmo.errors import ModelError
from hanmo.evaluation.scoring import difference, score
from hanmo.inference.loading import load
from hanmo.inference.remote import connect
from hanmo.tasks.base import Form
from hanmo.tasks.extractive import Extractive, Lead, Ranker, TextRank, choose, text_rank, word_vectors
from hanmo.tasks.registry import find_task
from hanmo.tasks.rouge import LONGEST, TYPES, Characters, Rouge, SummaryMetric
from hanmo.tasks.summarization import Summarization, Summarizer
from hanmo.text.sentences import split_sentences

from .serving_fakes import FakeModel, running_server

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

ODD = [
    "",
    " \r\n ",
    "😀😀🎉",
    "ＡＢＣ１２３",
    "我用 machine learning。\r\nSecond line. 第三句！",
    "word " * 10_000,
    "。" * 500,
]
TOPICS = ("rain", "bread", "music", "snow", "chess", "gardens", "trains", "poems", "birds", "glass", "paint", "honey")


def texts_with_a_key() -> list[Pair]:
    """The summary is the sentence that says what was found, which is never the first."""
    pairs = []
    for number, topic in enumerate(TOPICS * 4):
        key = f"We show that {topic} helps {TOPICS[number // 4 % 12]} in {number} ways."
        others = [
            f"There is much talk about {topic}.",
            "Many people have tried before.",
            f"The weather was fine on day {number}.",
        ]
        place = 1 + number % 3
        pairs.append(Pair(" ".join([*others[:place], key, *others[place:]]), key))
    return pairs


# The metric -----------------------------------------------------------------------------------------------------------


def test_rouge_is_that_of_rouge_score_to_the_digit() -> None:
    rng = np.random.default_rng(1)
    words = ["the", "running", "dogs", "Ran", "3.5", "cats,", "houses.", "Were", "don't"]

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(1, 25))).capitalize()

    records = [Pair("x", text(), tuple(text() for _ in range(rng.integers(0, 3)))) for _ in range(50)]
    answers = [text() for _ in records]
    answers[3], answers[4] = "", "今天"
    metric = SummaryMetric(records)
    found = metric.measures(metric.statistics(records, answers).sum(0))
    scorer = rouge_scorer.RougeScorer(list(TYPES), use_stemmer=True)
    rows = [
        scorer.score_multi(
            ["\n".join(split_sentences(reference)) for reference in (record.target, *record.references)],
            "\n".join(split_sentences(answer)),
        )
        for record, answer in zip(records, answers, strict=True)
    ]
    plain = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for kind in TYPES:
        assert float(found[kind]) == pytest.approx(math.fsum(row[kind].fmeasure for row in rows) / 50, abs=1e-12)
    for kind in TYPES[:3]:  # sentences on lines of their own change only ROUGE-Lsum
        whole = [
            plain.score_multi([record.target, *record.references], answer)[kind].fmeasure
            for record, answer in zip(records, answers, strict=True)
        ]
        assert float(found[kind]) == pytest.approx(math.fsum(whole) / 50, abs=1e-12)
    assert metric.signature()["tok"] == "words-porter" and metric.signature()["nrefs"] == "var"


def test_chinese_has_characters_as_tokens() -> None:
    tokens = Characters().tokenize("用ＢＥＲＴ-base得到９２.5分，😀don't")
    assert tokens == ["用", "bert", "base", "得", "到", "92.5", "分", "don", "t"]
    records = [Pair("x", "我们提出新的方法。")]
    metric = SummaryMetric(records)
    assert metric.signature()["tok"] == "characters"
    found = metric.measures(metric.statistics(records, ["我们提出方法"]).sum(0))
    assert float(found["rouge1"]) == pytest.approx(2 * 6 / (6 + 8))
    assert float(found["rouge2"]) == pytest.approx(2 * 4 / (5 + 7))
    assert float(found["rougeL"]) == pytest.approx(12 / 14)
    assert metric.details(records, ["我们提出方法"])["rouge1"] == {"precision": 1.0, "recall": 0.75}


def test_the_best_reference_counts_and_long_texts_are_cut() -> None:
    record = Pair("x", "nothing alike", ("the right answer", "other words"))
    metric = SummaryMetric([record])
    assert float(metric.measures(metric.statistics([record], ["the right answer"]).sum(0))["rougeL"]) == 1.0
    rouge = Rouge(chinese=True)
    cut = rouge.on_lines("第一句话说得很清楚。" * 1000)
    assert abs(rouge.length(cut) - LONGEST) <= 9
    assert rouge.on_lines("短句。" * 900).count("\n") == 899


# Choosing sentences ---------------------------------------------------------------------------------------------------


def test_text_rank_is_pagerank_of_the_cosines() -> None:
    sentences = split_sentences(
        "The cat sat. The cat slept well. A dog sat. Rain fell on hills. The cat and dog slept."
    )
    for vectors in (word_vectors(sentences), dense := np.random.default_rng(0).normal(size=(5, 3))):
        if vectors is dense:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            cosines = (vectors @ vectors.T + 1) / 2
        else:
            cosines = (vectors @ vectors.T).toarray()
        np.fill_diagonal(cosines, 0)
        sums = cosines.sum(1, keepdims=True)
        step = np.where(sums > 1e-9, cosines / np.where(sums > 1e-9, sums, 1), 1 / 5)
        rank = np.full(5, 0.2)
        for _ in range(200):
            rank = 0.03 + 0.85 * step.T @ rank
        assert text_rank(vectors) == pytest.approx(rank, abs=1e-6)


def test_a_choice_does_not_repeat_itself() -> None:
    sentences = ["cats like warm milk", "cats like warm milk", "trains run late", "birds sing"]
    vectors = word_vectors(sentences)
    assert choose(np.array([1.0, 0.99, 0.5, 0.1]), vectors, 2) == [0, 2]
    assert choose(np.array([1.0, 0.99, 0.5, 0.1]), vectors, 9) == [0, 1, 2, 3]
    assert choose(np.array([0.0]), vectors[:1], 1) == [0]


def test_the_ranker_learns_what_summaries_look_like() -> None:
    pairs, task = texts_with_a_key(), Summarization()
    train, held_out = pairs[:36], pairs[36:]
    lead, ranker = Lead(1), Ranker()
    ranker.fit(train)
    assert ranker.answer(held_out) == [pair.target for pair in held_out]
    first, second = score(task, ranker, held_out), score(task, lead, held_out)
    assert difference(task.metric(held_out), first, second).significant
    assert "sentences:1" in first.signature


def test_lengths_are_learnt() -> None:
    sentences = [f"Sentence {word} tells of {word}." for word in ("one", "two", "three", "four")]
    lead = Lead()
    lead.fit([Pair(" ".join(sentences), " ".join(sentences[:2]))] * 6)
    assert (lead.count, lead.cut) == (2, None)
    titles = [Pair("本文针对河流污染的监测问题进行了详细的研究与讨论,并提出了一种新的方法.", "河流污染的监测问题")] * 6
    lead.fit(titles)
    assert lead.count == 1 and lead.cut is not None
    assert len(lead.answer([Pair("我" * 100, "")])[0]) == lead.cut
    rank = TextRank()
    rank.fit(titles)
    assert rank.clauses and "clauses:" in str(rank.signature()).replace("'", "")


@pytest.mark.parametrize("make", [lambda: Lead(1), lambda: Lead(3), TextRank, Ranker])
def test_odd_texts_are_borne(make: type[Extractive]) -> None:
    system = make()
    if system.learns:
        system.fit([*texts_with_a_key()[:8], *(Pair(text, "x") for text in ODD)])
    records = [Pair(text, "摘要") for text in ODD]
    answers = system.answer(records)
    assert answers[0] == answers[1] == "" and answers[3] and answers[4]
    assert len(score(Summarization(), system, records, resamples=10).answers) == len(ODD)


def test_one_text_is_not_enough_to_learn_from_but_no_error() -> None:
    ranker = Ranker()
    ranker.fit([Pair("Only one sentence", "one sentence")])
    assert ranker.answer([Pair("First. Second. Third.", "")])[0].startswith("First")


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from .finetune_cases import make_bases

    return make_bases(tmp_path_factory.mktemp("bases"))


def test_an_encoder_tells_central_sentences(bases: dict[str, str]) -> None:
    system = Summarization().system(load(bases["encoder"], device="cpu"), texts_with_a_key()[:6])
    assert system.kind == "encoder" and not system.learns
    (answer,) = system.answer([Pair("One cat. Two dogs. Three birds. Four fish. Five ants. Six bees.", "")])
    assert answer and answer in "One cat. Two dogs. Three birds. Four fish. Five ants. Six bees."


@pytest.mark.parametrize("kind", ["decoder", "both"])
def test_language_models_summarize_long_texts_in_parts(bases: dict[str, str], kind: str) -> None:
    system = Summarization().system(load(bases[kind], device="cpu"), (), Form(instruction="Sum:"))
    text = " ".join(f"good film number {i}." for i in range(60))
    answers = system.answer([Pair(text, ""), Pair("", ""), Pair("好 的 电影", "")])
    assert len(answers) == 3 and answers[1] == ""
    assert ("prompt" if kind == "decoder" else "prefix") in system.signature()


def test_ten_thousand_words_are_brought_to_the_length_of_a_context() -> None:
    with running_server(FakeModel(context_length=6400)) as base:
        remote = connect(f"openai:fake@{base}", offline=True)
        system = Summarizer(remote, texts_with_a_key(), Form())
        assert not system.rewriter.fits("word " * 10_000)
        asked: list[list[str]] = []
        write = system.rewriter.write
        system.rewriter.write = lambda texts, label: asked.append(list(texts)) or write(texts, label)  # type: ignore
        (answer,) = system.answer([Pair("The film was good. " * 2500, "")])
    assert answer and len(asked) >= 2 and len(asked[0]) > 5 and len(asked[-1]) == 1
    assert all(system.rewriter.fits(text) for texts in asked for text in texts)


def test_prompts_follow_the_language_and_show_examples() -> None:
    with running_server(FakeModel()) as base:
        remote = connect(f"openai:fake@{base}", offline=True)
        english = Summarizer(remote, texts_with_a_key(), Form(shots=2))
        assert "at most" in english.prompt("x").instruction and len(english.shots) == 2
        chinese = Summarizer(remote, [Pair("我们今天研究一种方法。" * 9, "研究一种方法")], Form())
        assert "不超过" in chinese.prompt("x").instruction
        unknown = Summarizer(remote, (), Form())
        assert "概括" in unknown.prompt("今天下雨了").instruction and "Summarize" in unknown.prompt("Rain.").instruction


def test_the_task_is_found_and_says_what_it_cannot_use() -> None:
    task = find_task("summary")
    assert task.name == "summarization" and task.record("x") == Pair("x", "")
    assert [system.kind for system in task.baselines([])] == ["baseline"] * 2
    assert [system.kind for system in task.candidates([])] == ["classical"] * 2
    with pytest.raises(ModelError, match="cannot do summarization"):
        task.system(object())
    assert task.as_data("x") == {"summary": "x"} and task.describe(Pair("a", ""), "b") == "b"


def test_figures_on_scitldr(shared_data: Path) -> None:
    """Small, so that it is quick: the ranker of 150 papers is better than the first sentence."""
    from hanmo.data.tasks import read_records

    train = list(read_records("pair", shared_data / "scitldr" / "train.jsonl"))[:150]
    held_out = list(read_records("pair", shared_data / "scitldr" / "dev.jsonl"))[:120]
    ranker = Ranker()
    ranker.fit(train)
    better = score(Summarization(), ranker, held_out, resamples=50).main.value
    assert better > score(Summarization(), Lead(1), held_out, resamples=50).main.value + 0.02


def test_a_file_is_one_text_and_so_is_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from hanmo.cli.predict import PredictSettings, given_texts

    for name, text in (
        ("a.txt", "第一段。\r\n\r\nSecond paragraph.\r\n"),
        ("b.txt", "\n \n"),
        ("c.txt", "one\n" * 50_000),
    ):
        (tmp_path / name).write_bytes(text.encode())
    settings = PredictSettings(file=[str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")])
    first, last = given_texts(settings, whole=Summarization.whole)
    assert first.text.split() == ["第一段。", "Second", "paragraph."] and first.where.endswith("a.txt:1")
    assert last.text.split() == ["one"] * 50_000
    assert len(list(given_texts(settings))) == 2 + 50_000
    for text, count in (("a\n\nb\n", 1), (" \n", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert len(list(given_texts(PredictSettings(), whole=True))) == count
