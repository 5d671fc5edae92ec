"""Tagging: spans counted as seqeval counts them, ways to answer, and input that is not as it should be."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanmo.data.tasks import Tagged, read_records
from hanmo.errors import DataError, HanmoError, ModelError, UsageError
from hanmo.evaluation.scoring import difference, score
from hanmo.evaluation.task_baselines import tagging_scores
from hanmo.models.crf_tagger import CRFTagger
from hanmo.models.heads import HeadConfig
from hanmo.models.linear import LinearClassifier
from hanmo.tasks.base import Form
from hanmo.tasks.prompted_spans import PromptedSpans, locate, mentions
from hanmo.tasks.recurrent import RecurrentTagger
from hanmo.tasks.registry import find_task
from hanmo.tasks.tagging import Field, Network, Tagging, TagMetric, UsualTag, in_iob2

from .finetune_cases import WORDS

TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER", "B-a-b", "I-a-b", "B", "I"]
TRAIN = [
    Tagged(("Ann", "lives", "in", "Paris"), ("B-PER", "O", "O", "B-LOC")),
    Tagged(("Bob", "Ray", "left", "Rome"), ("B-PER", "I-PER", "O", "B-LOC")),
    Tagged(("in", "New", "York", "it", "rains"), ("O", "B-LOC", "I-LOC", "O", "O")),
] * 4
PLAIN = [Tagged(("she", "runs"), ("PRON", "VERB")), Tagged(("dogs", "run"), ("NOUN", "VERB"))] * 4
ZH = [
    Tagged(tuple("王小明在北京"), ("B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC")),
    Tagged(tuple("李红去上海"), ("B-PER", "I-PER", "O", "B-LOC", "I-LOC")),
] * 4
CUT = [Tagged(tuple("我们学习"), ("B", "I", "B", "I")), Tagged(tuple("他学习"), ("B", "B", "I"))] * 4


def blank(record: Tagged) -> Tagged:
    return Tagged(record.tokens, ())


def measured(records: list[Tagged], answers: list[tuple[str, ...]]) -> dict[str, float]:
    metric = TagMetric(records)
    return {name: float(v) for name, v in metric.measures(metric.statistics(records, answers).sum(0)).items()}


# ---- the metric


@settings(deadline=None, max_examples=300)
@given(
    pairs=st.lists(
        st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), max_size=8), min_size=1, max_size=6
    )
)
def test_spans_are_counted_as_seqeval_counts_them(pairs: list[list[tuple[str, str]]]) -> None:
    """Ill-formed sequences on both sides, sentences without tokens, types that only one side has."""
    seqeval = pytest.importorskip("seqeval.metrics")
    true, found = [[tuple(tag[side] for tag in sentence) for sentence in pairs] for side in (0, 1)]
    records = [Tagged(("w",) * len(tags), tags) for tags in true]
    metric = TagMetric(records)
    if not metric.spans:
        assert not any(tag.startswith("B") for tags in true for tag in tags)
        return
    ours = measured(records, found)
    lists = [list(map(list, side)) for side in (true, found)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where nothing was found it warns
        for name, function in (("precision", "precision_score"), ("recall", "recall_score"), ("f1", "f1_score")):
            assert ours[name] == pytest.approx(getattr(seqeval, function)(*lists), abs=1e-15), name
        assert ours["accuracy"] == pytest.approx(seqeval.accuracy_score(*lists), abs=1e-15)
        report = seqeval.classification_report(*lists, output_dict=True)
    for kind, row in metric.details(records, found)["types"].items():
        theirs = report["_" if kind == "word" else kind]
        for ours_name, their_name in (("precision",) * 2, ("recall",) * 2, ("f1", "f1-score"), ("n", "support")):
            assert row[ours_name] == pytest.approx(theirs[their_name], abs=1e-15), (kind, ours_name)


@settings(deadline=None, max_examples=100)
@given(
    pairs=st.lists(
        st.lists(st.tuples(st.sampled_from("NVAX"), st.sampled_from("NVAXY")), min_size=1, max_size=6), min_size=1
    )
)
def test_tags_without_spans_are_counted_as_scikit_learn_counts_them(pairs: list[list[tuple[str, str]]]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    true, found = [[tuple(tag[side] for tag in sentence) for sentence in pairs] for side in (0, 1)]
    ours = measured([Tagged(("w",) * len(tags), tags) for tags in true], found)
    flat = [[tag for tags in side for tag in tags] for side in (true, found)]
    assert ours["accuracy"] == pytest.approx(sklearn.accuracy_score(*flat), abs=1e-15)
    labels = sorted(set(flat[0]))
    macro = sklearn.f1_score(*flat, labels=labels, average="macro", zero_division=0)
    assert ours["macro_f1"] == pytest.approx(macro, abs=1e-12)


def test_words_are_spans_in_segmentation() -> None:
    """Three of four words right: of "我们 学习" one is cut in two."""
    answers = [("B", "I", "B", "I"), ("B", "B", "B")]
    values = measured(CUT[:2], answers)
    assert values["precision"] == pytest.approx(3 / 5) and values["recall"] == pytest.approx(3 / 4)
    assert set(TagMetric(CUT).details(CUT[:2], answers)["types"]) == {"word"}


def test_an_answer_with_too_few_tags_is_a_defect() -> None:
    with pytest.raises(ValueError, match="2 tags for 4 tokens"):
        TagMetric(TRAIN).statistics(TRAIN[:1], [("O", "O")])


def test_sentences_without_spans_and_no_tokens_have_finite_numbers() -> None:
    records = [Tagged(("a", "b"), ("O", "O")), Tagged((), ())]
    values = measured(records, [("O", "B-LOC"), ()])
    assert values == {"accuracy": 0.5, "macro_f1": pytest.approx(2 / 3)}


# ---- ways to answer


def test_the_task_is_found_by_its_names() -> None:
    assert {find_task(name).name for name in ("tagging", "ner", "pos", "segmentation")} == {"tagging"}


@pytest.mark.parametrize("train", [TRAIN, PLAIN, ZH, CUT], ids=["names", "plain", "chinese", "words"])
def test_baselines_learn_and_are_measured_with_intervals(train: list[Tagged], tmp_path: Path) -> None:
    task = Tagging()
    scores = []
    for system in task.baselines(train):
        system.fit(train)
        scores.append(score(task, system, train, resamples=50))
        folder = system.save(tmp_path / "model")
    assert scores[1].main.value == 1.0 and scores[1].main.interval is not None
    assert folder is not None
    again = task.system(CRFTagger.load(folder))
    assert again.answer(list(map(blank, train))) == scores[1].answers  # what is right is not looked at
    assert difference(task.metric(train), scores[0], scores[1], resamples=50).value <= 0
    for system in task.candidates(train):
        if system.kind == "classical":
            system.fit(train)
            assert score(task, system, train, resamples=50).main.value > 0.5


def test_fine_tuning_is_compared_with_the_same_systems() -> None:
    names = [item.name for item in tagging_scores(TRAIN, TRAIN)]
    assert names == [system.name for system in Tagging().baselines(TRAIN)]


def test_a_field_of_another_scheme_answers_in_iob2() -> None:
    tagger = CRFTagger.train(["我们学习", "他学习"] * 3, [list("BEBE"), list("SBE")] * 3)
    assert Tagging().system(tagger).answer(CUT[:2]) == [("B", "I", "B", "I"), ("B", "B", "I")]
    assert in_iob2([["B-X", "I-X"]], ["B-X", "I-X", "O"]) == [("B-X", "I-X")]


def test_a_network_reads_odd_tokens_and_long_sentences() -> None:
    import torch

    from hanmo.inference.encoder import TextEncoder
    from hanmo.models.recurrent import RecurrentConfig, RecurrentEncoder
    from hanmo.text.training import train_bpe

    tokenizer = train_bpe(WORDS * 5, 300)
    config = RecurrentConfig("lstm", tokenizer.vocab_size, 8, 8, 1, tie_embeddings=False, bidirectional=True)
    torch.manual_seed(0)
    model = RecurrentEncoder(config, HeadConfig("token-classification", ("O", "B-LOC", "I-LOC"), crf=True))
    model.initialize(0)
    system = Tagging().system(TextEncoder(model, tokenizer))
    assert isinstance(system, Network) and system.kind == "recurrent"
    records = [Tagged(("a", "\ud800", "😀", "２０２４", "\u3000"), ()), Tagged((), ()), Tagged(("word",) * 10_000, ())]
    assert list(map(len, system.answer(records))) == [5, 0, 10_000]


def test_a_recurrent_network_learns_and_is_found_again(tmp_path: Path) -> None:
    import hanmo

    task = Tagging()
    system = task.candidates(TRAIN)[-1]
    assert isinstance(system, RecurrentTagger) and system.learns
    odd = Tagged(("x",), ("B-ORG",))  # a label that training lacks is no reason to stop
    system.fit(TRAIN, [*TRAIN[:3], odd])
    result = score(task, system, TRAIN, resamples=50)
    assert result.main.value > 0.9 and result.kind == "recurrent"
    again = task.system(hanmo.load(system.save(tmp_path / "model")))
    assert again.answer(list(map(blank, TRAIN))) == result.answers
    only = RecurrentTagger()
    only.fit([Tagged(("a", "b"), ("O", "O"))])
    assert only.answer([Tagged(("a", "\ud800", "😀"), ()), Tagged((), ())]) == [("O",) * 3, ()]


def test_models_that_cannot_tag_are_refused() -> None:
    classifier = LinearClassifier()
    classifier.fit(["good", "bad"] * 4, ["a", "b"] * 4)
    with pytest.raises(ModelError, match="cannot do tagging"):
        Tagging().system(classifier)


# ---- a language model that lists entities


class Speaking(SimpleNamespace):
    """A remote model whose answers are given."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__(name="fake", is_chat=False, context_length=400, answers=answers, asked=[])

    def generate(self, prompts: list[str], **_: Any) -> list[Any]:
        self.asked += prompts
        return [SimpleNamespace(index=i, text=self.answers[i % len(self.answers)]) for i in range(len(prompts))]


@pytest.mark.parametrize(
    "answer",
    [
        "LOC: New York\nPER: Ann",
        "1. per: Ann\n2. LOC： 'new york'.",
        '[{"type": "LOC", "text": "New York"}, {"label": "PER", "entity": "Ann"}]',
        'Sure:\n```json\n{"LOC": ["New York"], "PER": "Ann", "ORG": []}\n```',
        '[["PER", "Ann"], ["LOC", "New York"], ["LOC", "Nowhere"]]',
    ],
)
def test_what_a_model_lists_is_found_again_in_the_text(answer: str) -> None:
    record = Tagged(("Ann", "left", "New", "York", "."), ())
    system = PromptedSpans(Speaking([answer]), TRAIN, Form(shots=2))
    assert system.answer([record]) == [("B-PER", "O", "B-LOC", "I-LOC", "O")]
    assert "LOC: " in system.speaker.model.asked[0] and system.signature()["shots"] == 2


@pytest.mark.parametrize("answer", ["", "none", "{", "[[[[", "LOC:", "FOO: Ann", "PER: An", "LOC: ork"])
def test_what_is_no_answer_gives_no_spans(answer: str) -> None:
    record = Tagged(("Ann", "left", "New", "York", "."), ())
    assert PromptedSpans(Speaking([answer]), TRAIN, Form()).answer([record]) == [("O",) * 5]


@settings(deadline=None)
@given(answer=st.text(max_size=60), tokens=st.lists(st.text(min_size=1, max_size=4), max_size=6))
def test_no_answer_breaks_the_parser(answer: str, tokens: list[str]) -> None:
    record = Tagged(tuple(tokens), ())
    assert len(locate(record, mentions(answer + "\nLOC: " + "".join(tokens), ["LOC"]))) == len(tokens)


def test_chinese_is_asked_in_chinese_and_long_sentences_in_pieces() -> None:
    model = Speaking(["PER: 王小明"])
    system = PromptedSpans(model, ZH, Form())
    assert system.answer([ZH[0]])[0][:3] == ("B-PER", "I-PER", "I-PER") and "实体" in model.asked[0]
    assert len(system.answer([Tagged(tuple("好") * 1000, ())])[0]) == 1000 and len(model.asked) > 5


@pytest.mark.parametrize("train", [PLAIN, CUT, []], ids=["plain", "words", "nothing"])
def test_only_named_spans_can_be_asked_for(train: list[Tagged]) -> None:
    with pytest.raises(UsageError, match="types of spans"):
        PromptedSpans(Speaking([""]), train, Form())


# ---- texts that people type


def test_a_typed_sentence_is_cut_and_described() -> None:
    task = Tagging()
    record = task.record("Ann met New  York.")
    assert record.tokens == ("Ann", "met", "New", "York", ".") and record.text == "Ann met New York."
    answer = ("B-PER", "O", "B-LOC", "I-LOC", "O")
    assert task.describe(record, answer) == "PER: Ann\nLOC: New York"
    assert task.as_data(answer)["spans"][1] == {"start": 2, "end": 4, "type": "LOC"}
    assert task.record("我爱北京").tokens == tuple("我爱北京")
    assert task.describe(CUT[0], CUT[0].tags) == "我们 学习"
    assert task.describe(PLAIN[0], PLAIN[0].tags) == "she/PRON runs/VERB"
    task.system(CRFTagger.train([["我", "爱", "北京"]] * 2, [["O", "O", "B-LOC"]] * 2, template="zh-words"))
    assert task.record("我爱北京").tokens == ("我", "爱", "北京")


@pytest.mark.parametrize(
    "text", ["", " \n", "😀👍🏽 𝒜 ２０２４年", "a\ud800b", "中文 mixed, 1,000.5 テスト", "x " * 10_000]
)
def test_whatever_is_typed_gets_as_many_tags_as_tokens(text: str) -> None:
    task = Tagging()
    for train in (TRAIN, ZH):
        for system in task.baselines(train):
            system.fit(train)
            record = task.record(text)
            answer = system.answer([record])[0]
            assert len(answer) == len(record.tokens)
            assert isinstance(task.describe(record, answer), str) and json.dumps(task.as_data(answer))


# ---- files and records that are not as they should be


def test_a_tag_sequence_shorter_than_its_tokens_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    rows = [{"tokens": ["a", "b"], "tags": ["O", "O"]}, {"tokens": ["a", "b"], "tags": ["O"]}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match="2 tokens and 1 tags") as raised:
        read_records("tagged", path, skip_bad=False)
    assert raised.value.where.endswith("short.jsonl:2")


def test_crlf_and_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    text = "Ann B-PER\nleft O\n\n２０２４ O\n年 O\n"
    for name, data in (("a.iob2", text.encode()), ("b.iob2", b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())):
        (tmp_path / name).write_bytes(data)
    first, second = (list(read_records("tagged", tmp_path / name)) for name in ("a.iob2", "b.iob2"))
    assert (
        [record.tokens for record in first]
        == [record.tokens for record in second]
        == [("Ann", "left"), ("２０２４", "年")]
    )


def test_labels_that_training_lacks_cost_but_do_not_break() -> None:
    task, records = Tagging(), [Tagged(("Ann", "paid", "Acme"), ("B-PER", "O", "B-ORG"))]
    for system in task.baselines(TRAIN):
        system.fit(TRAIN)
        result = score(task, system, records)
        assert result.measures["recall"].value == 0.5 and result.details["types"]["ORG"]["recall"] == 0


@pytest.mark.parametrize("system", [UsualTag, Field])
def test_one_class_only_is_learnt_and_nothing_is_refused(system: Any) -> None:
    only = [Tagged(("a", "b"), ("O", "O"))] * 3
    learnt = system()
    learnt.fit(only)
    assert learnt.answer([Tagged(("x", "a", "y"), ()), Tagged((), ())]) == [("O", "O", "O"), ()]
    with pytest.raises(HanmoError, match="no sentences"):
        system().fit([Tagged((), ())])


def test_a_sentence_of_ten_thousand_words() -> None:
    long = Tagged(("Ann", "lives", "in", "Paris") * 2500, ("B-PER", "O", "O", "B-LOC") * 2500)
    task = Tagging()
    field = task.baselines(TRAIN)[1]
    field.fit(TRAIN)
    assert score(task, field, [long]).main.value > 0.9
    assert np.isfinite(score(task, field, [long] * 2).sums).all()
