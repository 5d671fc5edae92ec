"""Question answering: the rules of SQuAD and CMRC 2018, readers of all kinds, odd and long texts."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hanmo.cli.finetune import FinetuneSettings
from hanmo.cli.main import main
from hanmo.data.tasks import read_records
from hanmo.data.tasks.types import QuestionAnswer
from hanmo.errors import DataError, ModelError, UsageError
from hanmo.evaluation.scoring import difference, score
from hanmo.inference.remote import connect
from hanmo.inference.spans import Answer
from hanmo.settings import parse
from hanmo.tasks.answers import AnswerMetric, Passage, Reply, cmrc_tokens
from hanmo.tasks.base import Form, Ground
from hanmo.tasks.question_answering import QuestionAnswering
from hanmo.tasks.readers import BestSentence, OpenBook, PromptedReader, SpanReader, best_of, cleaned, in_context
from hanmo.tasks.registry import find_task
from hanmo.tasks.retrieval import PassageIndex, sentences_in
from hanmo.text.rows import OVERLAP

from .finetune_cases import lines, make_bases
from .serving_fakes import FakeModel, running_server

pytest.importorskip("bm25s")

ODD = [
    "",
    " \r\n ",
    "😀😀🎉",
    "ＡＢＣ１２３",
    "我用 machine learning 做翻译。\r\nSecond line.",
    "\u200b\ufeff",
    "a" * 3000,
]


def asked(question: str, context: str, *answers: str) -> QuestionAnswer:
    return QuestionAnswer("", context, question, tuple((text, max(0, context.find(text))) for text in answers))


# The metric -----------------------------------------------------------------------------------------------------------


def squad_by_hand(truths: Sequence[str], given: str) -> tuple[float, float]:
    """The rules as the papers of SQuAD put them, written once more."""

    def tokens(text: str) -> list[str]:
        kept = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
        return [word for word in re.split(r"\s+", re.sub(r"\b(a|an|the)\b", " ", kept)) if word]

    exact = f1 = 0.0
    for truth in [truth for truth in truths if tokens(truth)] or [""]:
        right, found = tokens(truth), tokens(given)
        exact = max(exact, float(right == found))
        same = sum(min(right.count(word), found.count(word)) for word in set(right))
        if not right or not found:
            f1 = max(f1, float(right == found))
        elif same:
            f1 = max(f1, 2 * (same / len(found)) * (same / len(right)) / (same / len(found) + same / len(right)))
    return exact, f1


def cmrc_by_hand(truths: Sequence[str], given: str) -> tuple[float, float]:
    """The rules of CMRC's script, with its longest common string found by trying them all."""
    from nltk.tokenize import NLTKWordTokenizer

    marks = set("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")

    def tokens(text: str) -> list[str]:
        kept = "".join(sign for sign in text.lower().strip() if sign not in marks)
        found: list[str] = []
        for piece in re.split(r"([\u4e00-\u9fa5])", kept):
            found += [piece] if re.fullmatch(r"[\u4e00-\u9fa5]", piece) else NLTKWordTokenizer().tokenize(piece)
        return found

    exact = f1 = 0.0
    for truth in truths:
        right, found = tokens(truth), tokens(given)
        plain = ["".join(s for s in text.lower().strip() if s not in marks) for text in (truth, given)]
        exact = max(exact, float(plain[0] == plain[1]))
        runs = {tuple(right[i:j]) for i in range(len(right)) for j in range(i + 1, len(right) + 1)}
        common = max(
            (j - i for i in range(len(found)) for j in range(i, len(found) + 1) if tuple(found[i:j]) in runs), default=0
        )
        if common:
            precision, recall = common / len(found), common / len(right)
            f1 = max(f1, 2 * precision * recall / (precision + recall))
    return exact, f1


@pytest.mark.parametrize("chinese", [False, True])
def test_scores_are_those_of_the_scripts_to_the_digit(chinese: bool) -> None:
    rng = np.random.default_rng(5)
    words = (
        ["长", "江", "《", "三", "体", "》", "，", "A", "NBA", " cup", "1999", "年", "-", "’", "·", "U.S. navy's "]
        if chinese
        else ["The", "a", "an", "moon", "Moon's", "3.5", "$", "km.", "and", "-", "theory", "U.S.", "  ", "Ａ", "é"]
    )
    question = "这是哪一条河流？" if chinese else "Which river is it?"

    def draw() -> str:
        picked = [words[i] for i in rng.integers(0, len(words), rng.integers(0, 7))]
        return ("" if chinese else " ").join(picked)

    truths = [[draw() for _ in range(rng.integers(1, 4))] for _ in range(400)]
    given = [draw() for _ in truths]
    records = [QuestionAnswer("", "x", question, tuple((text, 0) for text in some)) for some in truths]
    metric = AnswerMetric(records)
    assert metric.chinese is chinese
    rows = metric.statistics(records, [Reply(text) for text in given])
    by_hand = cmrc_by_hand if chinese else squad_by_hand
    expected = [by_hand(some, text) for some, text in zip(truths, given, strict=True)]
    assert rows[:, 1].tolist() == [exact for exact, _ in expected]
    assert rows[:, 2] == pytest.approx([f1 for _, f1 in expected], abs=1e-15)
    assert 0 < rows[:, 1].mean() < rows[:, 2].mean() < 1
    values = metric.measures(rows.sum(0))
    assert float(values["f1"]) == pytest.approx(np.mean([f1 for _, f1 in expected]), abs=1e-12)


@pytest.mark.parametrize(
    ("truth", "answer", "exact", "f1"),
    [
        ("the Apollo program", "Apollo Program.", 1, 1),
        ("Apollo 11", "in Apollo 11 and 12", 0, 2 * 0.4 * 1 / 1.4),
        ("cat cat dog", "cat", 0, 0.5),
        ("the", "a", 1, 1),
        ("moon", "", 0, 0),
    ],
)
def test_answers_in_english(truth: str, answer: str, exact: float, f1: float) -> None:
    assert AnswerMetric([]).best(asked("What?", "x", truth), answer) == (exact, pytest.approx(f1))


@pytest.mark.parametrize(
    ("truth", "answer", "exact", "f1"),
    [
        ("《三体》", "三体", 1, 1),
        ("1999年7月", "1999年", 0, 2 * 1 * 0.5 / 1.5),
        ("中国科学院", "科学院中国", 0, 0.6),  # a run, not a subsequence
        ("NBA冠军", "nba 冠军", 0, 1),
        ("北京", "", 0, 0),
    ],
)
def test_answers_in_chinese(truth: str, answer: str, exact: float, f1: float) -> None:
    metric = AnswerMetric([asked("哪里？", "x")])
    assert metric.best(asked("哪里？", "x", truth), answer) == (exact, pytest.approx(f1))
    assert cmrc_tokens("😀北京 ok") == ["😀", "北", "京", "ok"]


def test_questions_without_an_answer_are_right_or_wrong() -> None:
    records = [asked("Q?", "one two", "one"), asked("Q?", "one two"), asked("Q?", "one two")]
    metric = AnswerMetric(records)
    answers = [Reply("one two"), Reply(""), Reply("two")]
    rows = metric.statistics(records, answers)
    values = {name: float(value) for name, value in metric.measures(rows.sum(0)).items()}
    assert values == {
        "f1": pytest.approx((2 / 3 + 1) / 3),
        "exact_match": pytest.approx(1 / 3),
        "has_answer_f1": pytest.approx(2 / 3),
        "has_answer_exact_match": 0.0,
        "no_answer_accuracy": 0.5,
    }
    assert metric.right(rows).tolist() == [False, True, False]
    assert np.isnan(metric.measures(rows[1:].sum(0))["has_answer_f1"])
    assert metric.details(records, answers) == {"with_answer": 1, "answered": 2}
    assert metric.signature()["rules"] == "squad2"


def test_recall_counts_the_right_passage_or_one_that_tells() -> None:
    records = [asked("Q?", "Ann is here.", "Ann"), asked("Q?", "none of it")]
    own = [Passage("Other."), Passage("Ann is here.")]
    from_files = [Passage("Anna came.", "a.txt", 1), Passage("Then Ann, too.", "a.txt", 2)]
    for found, ranks in (
        (own, (0, 1, 1)),
        (from_files, (0, 1, 1)),
        (from_files[1:], (1, 1, 1)),
        (own[:1], (0, 0, 0)),
        ([], (0, 0, 0)),
    ):
        metric = AnswerMetric(records)
        rows = metric.statistics(records, [Reply("", found=tuple(found))] * 2)
        values = metric.measures(rows.sum(0))
        assert tuple(float(values[f"recall@{k}"]) for k in (1, 5, 20)) == ranks
    assert "recall@1" not in metric.measures(metric.statistics(records, [Reply("")] * 2).sum(0))


# Readers --------------------------------------------------------------------------------------------------------------


def test_the_best_sentence_has_the_words_of_the_question() -> None:
    text = "Ann lives in Paris. Bob has two\ncats and a dog. 长江发源于青藏高原。黄河流经九个省区。"
    replies = BestSentence().answer([asked("How many cats has Bob?", text), asked("黄河流经几个省？", text)])
    assert [reply.text for reply in replies] == ["Bob has two\ncats and a dog.", "黄河流经九个省区。"]
    assert all(text[reply.start or 0 :].startswith(reply.text) for reply in replies)
    assert "".join(part for _, part in sentences_in(text)).replace(" ", "") == text.replace(" ", "")


class FakeSpans:
    """A network whose scores are told: of each context an answer, its score and that of none."""

    task, name, max_length = "span-extraction", "fake", 40

    def __init__(self, told: dict[str, tuple[str, float, float]]) -> None:
        self.told, self.seen = told, list[str]()
        self.tokenizer = SimpleNamespace(
            encode_with_offsets=lambda text: ([], [match.span() for match in re.finditer(r"\S+", text)])
        )
        self.wrapping = SimpleNamespace(overhead=lambda pair: 4 * pair)

    def answer(self, question: str, context: str) -> Answer:
        self.seen.append(question)
        text, own, none = self.told.get(context, ("", float("-inf"), 0.0))
        start = context.find(text)
        return Answer(text, start, start + len(text), own, none, 0.5)


def test_no_answer_is_given_where_it_scores_higher() -> None:
    spans = FakeSpans({"sure one": ("one", 9.0, 2.0), "perhaps one": ("one", 4.0, 3.0), "not one": ("one", 1.0, 5.0)})
    records = [asked("Q?", text) for text in ("sure one", "perhaps one", "not one", "")]
    given = [reply.text for reply in SpanReader(spans).answer(records)]
    assert given == ["one", "one", "", ""]
    assert [reply.text for reply in SpanReader(spans, threshold=2.0).answer(records)] == ["one", "", "", ""]
    always = SpanReader(spans, always=True).answer(records)
    assert [reply.text for reply in always] == ["one", "one", "one", ""]
    assert always[0].start == 5 and always[0].score == 7.0 and always[0].passage == Passage("sure one")
    assert SpanReader(spans).signature() == {"threshold": 0.0}


def test_a_question_that_leaves_no_room_is_cut() -> None:
    spans = FakeSpans({})
    reader = SpanReader(spans)
    reader.answer([asked("word " * 10_000, "x"), asked("Why so?", "x")])
    assert len(spans.seen[0].split()) <= 18 and spans.seen[1] == "Why so?"
    assert reader.cut == 1


def test_of_many_passages_the_best_answer_is_given() -> None:
    index = PassageIndex([Passage("moon one", "a.txt", 3), Passage("moon two", "b.txt", 9), Passage("sun", "c.txt", 1)])
    spans = FakeSpans({"moon one": ("one", 3.0, 1.0), "moon two": ("two", 6.0, 1.0), "sun": ("sun", 99.0, 0.0)})
    (reply,) = OpenBook(SpanReader(spans), index, 2).answer([asked("Which moon?", "")])
    assert reply.text == "two" and reply.passage is not None and reply.passage.where == "b.txt:9"
    assert [passage.file for passage in reply.found] == ["a.txt", "b.txt"]
    nothing = OpenBook(SpanReader(spans), index, 2).answer([asked("星星？", "")])
    assert nothing == [Reply("", None, None, None, ())]
    assert best_of({0: Reply("x"), 1: Reply("y")}, index.passages).text == "x"
    near = {0: Reply("x", score=5.0), 1: Reply("y", score=6.0), 2: Reply("z", score=9.0)}
    assert best_of(near, index.passages).text == "z"  # 9 - 3 log 3 = 5.7
    assert best_of({0: near[0], 1: near[1]}, index.passages).text == "x"  # 6 - 3 log 2 = 3.9
    assert best_of({0: Reply(""), 1: Reply("y")}, index.passages).passage == index.passages[1]


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("1851", "1851"),
        (' "in 1851".\n\nBecause', "in 1851"),
        ("Answer: Paris.", "Paris"),
        ("The answer is Paris", "Paris"),
        ("No answer.", ""),
        ("no-answer", ""),
        ("No one came", "No one came"),
        ("无答案。", ""),
        ("答案：北京。", "北京"),
        ("the U.S.", "the U.S."),
        ("", ""),
        ("\n\n", ""),
    ],
)
def test_what_models_write_around_an_answer(written: str, answer: str) -> None:
    assert cleaned(written) == answer


def test_answers_are_found_again_in_the_text() -> None:
    text = "He met Ann\nSmith in (Paris)."
    assert in_context("Paris", text).start == 21
    assert in_context("ann smith", text) == Reply("Ann\nSmith", 7, None, Passage(text))
    assert in_context("France", text) == Reply("France", None, None, Passage(text))


def test_prompts_show_text_question_and_examples() -> None:
    train = [asked("Where is Ann?", "Ann is in Paris. " + "x " * 900, "Paris"), asked("Who is Bob?", "nothing here")]
    with running_server(FakeModel(context_length=4000)) as base:
        system = QuestionAnswering().system(connect(f"openai:fake@{base}", offline=True), train, Form(shots=2))
        assert isinstance(system, PromptedReader) and system.kind == "remote"
        prompt = system.prompt("Where is Eve?", "Eve is in Rome.")
        assert prompt.question == "Text: Eve is in Rome.\nQuestion: Where is Eve?"
        assert {answer for _, answer in prompt.shots} == {"Paris", "no answer"}
        assert all(len(question) < 800 for question, _ in prompt.shots)
        (reply, empty) = system.answer([asked("Where is Eve?", "Eve is in Rome."), asked("Q?", "")])
        assert reply.text and empty.text == ""
        plain = PromptedReader(connect(f"openai:fake@{base}", offline=True), (), Form())
        assert "无答案" in plain.prompt("夏娃在哪里？", "夏娃在罗马。").instruction
        assert "no answer" in plain.prompt("Where is Eve?", "夏娃在罗马。").instruction


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_bases(tmp_path_factory.mktemp("bases"))


def test_of_a_long_text_a_language_model_reads_what_the_question_is_about(bases: dict[str, str]) -> None:
    from hanmo.inference.loading import load

    reader = PromptedReader(load(bases["decoder"]), (), Form(instruction="Answer."))
    text = "\n\n".join([*("Nobody was there." for _ in range(4000)), "Anna lives in Paris.", "The end."])
    question, shown = reader.readable(asked("Where lives Anna?", text))
    assert "Anna lives in Paris." in shown and len(shown) < 400 and question == "Where lives Anna?"
    assert reader.fits(question, shown)
    assert len(reader.answer([asked("Where?", text), asked("word " * 10_000, "Anna."), asked("Q?", "x" * 9999)])) == 3


# The whole way --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny network that has learnt where somebody lives, and the file of its questions."""
    folder = tmp_path_factory.mktemp("questions")
    names, places = ["Anna", "Ben", "Carl"], ["Paris", "Rome", "Oslo"]
    rows: list[dict[str, Any]] = []
    for number in range(18):
        name, place = names[number % 3], places[number // 3 % 3]
        context = f"{name} lives in {place} {number}"
        rows.append({"context": context, "question": "Where ?", "answers": [{"text": place}], "title": "a"})
        rows.append({"context": context, "question": "When ?", "answers": [], "is_impossible": True})
    data = lines(folder / "train.jsonl", rows)
    run = folder / "run"
    command = ["finetune", data, "--task", "qa", "--base", bases["encoder"], "--out", str(run), "--max-steps", "60"]
    assert main([*command, "--learning-rate", "3e-3", "--batch-size", "12"]) == 0
    return str(run), data


def test_a_network_learns_spans_and_when_there_are_none(trained: tuple[str, str]) -> None:
    from hanmo.inference.loading import load

    task = find_task("qa")
    records = read_records("question_answer", trained[1])
    system = task.system(load(trained[0]), records, Form())
    assert isinstance(system, SpanReader) and not system.always
    found = score(task, system, records)
    floor = score(task, task.baselines(records)[0], records)
    assert found.main.value > 0.8 > floor.main.value
    assert found.measures["no_answer_accuracy"].value > 0.8 and found.answers[0].start is not None
    assert difference(task.metric(records), found, floor).significant
    with_answers = [record for record in records if record.answers]
    assert task.system(load(trained[0]), with_answers).always  # type: ignore[attr-defined]


def test_long_and_odd_texts(trained: tuple[str, str]) -> None:
    from hanmo.inference.loading import load

    model = load(trained[0])
    task = find_task("qa")
    text = "good film . " * 5000 + "Anna lives in Paris 3 " + "bad film . " * 5000
    records = [asked("Where ?", text), *(asked("Where ?", odd) for odd in ODD), asked("word " * 10_000, "Anna lives")]
    assert len(text.split()) > 10_000 > OVERLAP
    for system in (task.system(model), task.system(model, records[:0]), task.baselines(records)[0]):
        replies = system.answer(records)
        assert len(replies) == len(records)
        for record, reply in zip(records, replies, strict=True):
            if reply.text and reply.start is not None:
                assert record.context[reply.start :].startswith(reply.text)
            json.dumps(task.row(record, reply))
    assert task.baselines(records)[0].answer(records)[0].text


def test_qa_on_the_command_line(
    trained: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "one.txt").write_bytes("\ufeffIntro.\r\n\r\nAnna lives in Paris 3\r\n".encode())
    (folder / "two.md").write_text("# Two\n\nBen lives in Rome 4\n", encoding="utf-8")
    model = trained[0]
    capsys.readouterr()

    def ask(*arguments: str) -> Any:
        code = main(["qa", "--model", model, *arguments, "--json"])
        out = capsys.readouterr()
        assert code == 0, out.err
        return json.loads(out.out)["answers"]

    (row,) = ask("--context", "Anna lives in Paris 3", "Where ?")
    assert row["answer"] == "Paris" and (row["start"], row["end"]) == (14, 19) and "passage" not in row
    (row,) = ask("--context", str(folder / "one.txt"), "--threshold", "-1000", "Where ?")
    assert row["answer"] and "\r" not in row["answer"]
    (row,) = ask("Where ?\tBen lives in Rome 4")
    assert row["answer"] == "Rome"
    (row,) = ask("--documents", str(folder), "Where lives Ben ?", "--top", "1")
    assert (row["file"], row["line"], row["passage"]) == ("two.md", 1, "# Two\n\nBen lives in Rome 4")
    (row,) = ask("--documents", str(folder / "one.txt"), "--threshold", "1000", "Where lives Anna ?")
    assert row["answer"] is None
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert main(["qa", "--model", model, "--documents", str(folder), "--threshold", "1000", "Where lives Anna ?"]) == 0
    assert "没有答案" in capsys.readouterr().out


def test_evaluate_with_and_without_a_search(
    trained: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = trained
    for more, measures in (([], {"no_answer_accuracy"}), (["--open-book"], {"recall@1", "recall@20"})):
        capsys.readouterr()
        assert main(["evaluate", "--task", "questions", "--data", data, "--model", model, "--json", *more]) == 0
        scores = json.loads(capsys.readouterr().out)["scores"]
        assert len(scores) == 2 and all(measures <= set(row["measures"]) for row in scores)
        assert ("passages:18" in scores[-1]["signature"]) is bool(more)
    (tmp_path / "notes.txt").write_text("Someone lives in Paris. Where?\n\nNobody knows where.", encoding="utf-8")
    command = ["evaluate", "--task", "qa", "--data", data, "--model", model, "--json", "--limit", "12"]
    assert main([*command, "--documents", str(tmp_path / "notes.txt"), "--top", "1"]) == 0
    measures = json.loads(capsys.readouterr().out)["scores"][-1]["measures"]
    assert 0 < measures["recall@1"]["value"] < 1


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_mistakes_are_told(trained: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n", encoding="utf-8")
    (tmp_path / "none").mkdir()
    cases = [
        (["Where ?"], 2, "no text that the question is about"),
        (["  ", "--context", "x"], 2, "the question is empty"),
        (["Q?", "--context", " "], 3, "there is no text in it"),
        (["Q?", "--context", str(tmp_path / "blank.txt")], 3, "there is no text in it"),
        (["Q?", "--documents", str(tmp_path / "none")], 3, "no file was found"),
        (["Q?", "--documents", str(tmp_path / "blank.txt")], 3, "there is no text in the documents"),
        (["Q?", "--documents", str(tmp_path), "--context", "x"], 2, "answers to one question"),
        (["Q?", "--context", "x", "--top", "3"], 2, "--top is for a search"),
        (["Q?", "--documents", trained[1], "--top", "0"], 2, "--top must be at least 1"),
    ]
    for arguments, code, message in cases:
        capsys.readouterr()
        assert main(["qa", "--model", trained[0], *arguments]) == code, arguments
        assert message in capsys.readouterr().err
    assert main(["spam", "--model", trained[0], "--context", "x", "text"]) == 2
    assert "is about its texts alone" in capsys.readouterr().err


def test_answers_that_are_not_in_the_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    article = {"paragraphs": [{"context": "Ann is here.", "qas": [{"id": "q7", "question": "Who?", "answers": []}]}]}
    article["paragraphs"][0]["qas"][0]["answers"] = [{"text": "Bob", "answer_start": 0}]  # type: ignore[index]
    path.write_text(json.dumps({"data": [article]}, indent=1), encoding="utf-8")
    with pytest.raises(DataError, match=r"question q7: the answer 'Bob' is not in the context") as error:
        read_records("question_answer", path)
    assert re.fullmatch(r".*bad\.json:\d+", error.value.where)
    path.write_text(json.dumps({"context": "x", "question": " ", "answers": []}), encoding="utf-8")
    with pytest.raises(DataError, match="the question or its context is empty"):
        read_records("question_answer", path)


def test_models_that_cannot_answer(bases: dict[str, str]) -> None:
    from hanmo.inference.loading import load

    with pytest.raises(ModelError, match="cannot do question-answering"):
        find_task("qa").system(load(bases["encoder"]))
    with pytest.raises(UsageError, match="is about its texts alone"):
        find_task("spam").ground(Ground("x"))


def test_names_of_tasks_are_understood_by_finetune() -> None:
    names = {"qa": "question-answering", "ner": "tagging", "translate": "seq2seq", "sentiment": "classification"}
    for name, training in names.items():
        assert parse(FinetuneSettings, ["x", "--task", name], "hanmo finetune").task == training
    with pytest.raises(UsageError, match="--task cannot be 'qaa'"):
        parse(FinetuneSettings, ["x", "--task", "qaa"], "hanmo finetune")


def test_chance_is_the_mean_of_all_sentences() -> None:
    task = QuestionAnswering()
    assert task.chance([asked("Who?", "Ann is here. Bob left.", "Ann")]) == {"f1": pytest.approx((2 * 1 / 4 + 0) / 2)}
    assert task.chance([]) == {}


def test_drcd_in_its_own_layout(shared_data: Path) -> None:
    path = shared_data / "drcd" / "DRCD_dev.json"
    if not path.exists():
        pytest.skip("DRCD is not here")
    records = read_records("question_answer", path)[:200]
    task = find_task("qa")
    task.ground(Ground(records=records))
    found = score(task, task.baselines(records)[0], records)
    assert found.measures["recall@1"].value > 0.9 and "cmrc2018" in found.signature
    right = [Reply(record.answers[0][0]) for record in records]
    assert AnswerMetric(records).statistics(records, right)[:, 1:3].min() == 1.0
    assert Counter(bool(record.answers) for record in records) == {True: 200}


def test_records_are_written_as_they_are_read(tmp_path: Path) -> None:
    from hanmo.cli.compare import as_row

    records = [asked("Who?", "Ann is Ann.", "Ann"), asked("Why?", "Ann is here.")]
    records[0] = QuestionAnswer("q1", "Ann is Ann.", "Who?", (("Ann", 7), ("Ann", 0)), "T")
    path = lines(tmp_path / "rows.jsonl", [as_row(record) for record in records])
    back = read_records("question_answer", path)
    assert [(item.context, item.question, item.answers) for item in back] == [
        (item.context, item.question, item.answers) for item in records
    ]
