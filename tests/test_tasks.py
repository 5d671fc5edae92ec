"""Tasks: metrics as sums over records, classification, scores with intervals, comparisons, leaks, prompts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from hanmo.data.tasks.types import Labelled, Pair, QuestionAnswer, Tagged
from hanmo.errors import DataError, ModelError, UsageError
from hanmo.evaluation.cross import CrossFitted
from hanmo.evaluation.leaks import find_leaks
from hanmo.evaluation.scoring import difference, mcnemar, score
from hanmo.evaluation.task_table import render_details, render_scores
from hanmo.tasks.base import Form, System
from hanmo.tasks.classification import Classification, LabelMetric, Linear, Usual, Verdict
from hanmo.tasks.prompted_labels import PromptedLabels
from hanmo.tasks.prompts import Prompt, choose_shots, mostly_chinese
from hanmo.tasks.registry import ALIASES, MODULES, find_task

TASK = Classification()


def labelled(labels: list[str]) -> list[Labelled]:
    return [Labelled(f"text {number}", (label,), file="x.tsv", line=number) for number, label in enumerate(labels, 1)]


class Fixed(System[Labelled, Verdict]):
    """Answers that were settled before."""

    def __init__(self, name: str, verdicts: list[Verdict]) -> None:
        self.name, self.verdicts = name, verdicts

    def answer(self, records: Any) -> list[Verdict]:
        return self.verdicts[: len(records)]


def verdict(label: str, sure: float = 0.8) -> Verdict:
    return Verdict((label,), {label: sure, "other": 1 - sure})


LABELS = st.sampled_from("abc")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=40))
def test_measures_are_those_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    true, found = [a for a, _ in pairs], [b for _, b in pairs]
    records, answers = labelled(true), [verdict(label) for label in found]
    metric = LabelMetric(records)
    values = metric.measures(metric.statistics(records, answers).sum(0))
    assert values["accuracy"] == pytest.approx(accuracy_score(true, found), abs=1e-12)
    labels = sorted(set(true))
    assert values["macro_f1"] == pytest.approx(
        f1_score(true, found, average="macro", labels=labels, zero_division=0), abs=1e-12
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sets(LABELS), st.sets(LABELS)), min_size=1, max_size=30))
def test_several_labels_have_the_micro_f1_of_scikit_learn(pairs: list[tuple[set[str], set[str]]]) -> None:
    records = [Labelled("t", tuple(sorted(true))) for true, _ in pairs]
    answers = [Verdict(tuple(sorted(found))) for _, found in pairs]
    metric = LabelMetric(records)
    values = metric.measures(metric.statistics(records, answers).sum(0))
    if not metric.multi_label:
        return
    true_NL, found_NL = (
        [[int(label in side) for label in "abc"] for side in sides] for sides in zip(*pairs, strict=True)
    )
    known = f1_score(true_NL, found_NL, average="micro", zero_division=0)
    assert metric.primary == "micro_f1"
    given_labels = {label for record in records for label in record.labels}
    assert values["micro_f1"] == pytest.approx(known, abs=1e-12)
    assert set(metric.labels) == given_labels


def test_calibration_error_by_hand() -> None:
    records = labelled(["a", "a", "b", "b"])
    answers = [Verdict(("a",), {"a": sure, "b": 1 - sure}) for sure in (0.95, 0.95, 0.95, 0.55)]
    metric = LabelMetric(records)
    ece = metric.measures(metric.statistics(records, answers).sum(0))["ece"]
    assert ece == pytest.approx((abs(3 * 0.95 - 2) + abs(0.55 - 0)) / 4)


def test_a_label_that_the_records_lack_is_wrong_and_shown() -> None:
    records = labelled(["a", "b", "b"])
    result = score(TASK, Fixed("f", [verdict("a"), verdict("new"), Verdict(())]), records)
    assert result.main.value == pytest.approx(1 / 3) and result.main.interval is None  # three records say nothing
    assert result.details["confusion"] == [[1, 0, 0], [0, 0, 2]]
    assert "其他" in render_details(result.details) or "other" in render_details(result.details)


def test_score_has_intervals_signature_and_leaks_apart() -> None:
    truth = ["a", "b"] * 50
    records = labelled(truth)
    answers = [verdict(label if number % 5 else "b") for number, label in enumerate(truth)]
    leaked = np.zeros(100, bool)
    leaked[:20] = True
    result = score(TASK, Fixed("f", answers), records, leaked=leaked)
    interval = result.main.interval
    assert interval is not None and interval.low < result.main.value < interval.high
    assert result.without_leaks is not None
    right = [answer.labels[0] == label for answer, label in zip(answers[20:], truth[20:], strict=True)]
    assert result.without_leaks["accuracy"].value == pytest.approx(np.mean(right))
    assert "n:100" in result.signature and "task:classification" in result.signature
    assert result.signature == score(TASK, Fixed("f", answers), labelled(truth)).signature
    assert result.signature != score(TASK, Fixed("f", answers), records[:99]).signature
    text = render_scores([result], chance=TASK.chance(records))
    assert "0.5000" in text and result.signature in text and text.count("f ") >= 2


def test_no_records_are_refused() -> None:
    with pytest.raises(DataError, match="no records"):
        score(TASK, Fixed("f", []), [])


def test_difference_is_significant_only_where_it_is() -> None:
    truth = ["a", "b"] * 100
    records, generator = labelled(truth), np.random.default_rng(0)

    def system(name: str, errors: float) -> Any:
        wrong = generator.random(200) < errors
        other = {"a": "b", "b": "a"}
        return score(
            TASK, Fixed(name, [verdict(other[t] if w else t) for t, w in zip(truth, wrong, strict=True)]), records
        )

    good, bad, same = system("good", 0.05), system("bad", 0.4), system("same", 0.06)
    metric = TASK.metric(records)
    far, near = difference(metric, good, bad), difference(metric, good, same)
    assert far.significant and far.better > 0 and far.p is not None and far.p < 1e-6
    assert not near.significant and "no significant difference" in near.sentence()
    assert difference(metric, bad, good).sentence().startswith("good is better")
    with pytest.raises(DataError, match="same records"):
        difference(metric, good, score(TASK, Fixed("x", good.answers[:50]), records[:50]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test(only_first: int, only_second: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    first = np.array([True] * only_first + [False] * only_second + [True], dtype=bool)
    second = np.array([False] * only_first + [True] * only_second + [True], dtype=bool)
    known = stats.binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
    assert mcnemar(first, second) == pytest.approx(known, rel=1e-9)


def test_leaks_are_found_by_what_a_record_asks() -> None:
    train = [Labelled("Ｈello  World", ("a",)), Tagged(("I", "am"), ("O", "O"))]
    assert find_leaks(train, [Labelled("hello world", ("b",)), Labelled("other", ("a",))]).tolist() == [True, False]
    assert find_leaks(train, [Tagged(("I", "AM"), ("O", "O"))]).tolist() == [True]
    assert find_leaks([Pair("你好", "hi")], [Pair("你好", "hello"), Pair("再见", "hi")]).tolist() == [True, False]
    ask = QuestionAnswer("1", "The sky is blue.", "What is blue?", (("The sky", 0),))
    other = QuestionAnswer("2", "The sky is blue.", "Which colour?", (("blue", 11),))
    assert find_leaks([ask], [ask, other]).tolist() == [True, False]


def test_cross_fitting_never_answers_what_was_learned() -> None:
    seen: list[tuple[set[str], set[str]]] = []

    class Spy(Usual):
        def fit(self, train: Any, validation: Any = ()) -> None:
            super().fit(train, validation)
            self.learned = {record.text for record in train}

        def answer(self, records: Any) -> list[Verdict]:
            seen.append((self.learned, {record.text for record in records}))
            return super().answer(records)

    records = [*labelled(["a", "b", "b"] * 10), Labelled("text 1", ("b",))]
    answers = CrossFitted(Spy()).answer(records)
    assert len(answers) == 31 and all(answer.labels for answer in answers)
    assert len(seen) == 5 and not any(learned & asked for learned, asked in seen)
    assert set().union(*(asked for _, asked in seen)) == {record.text for record in records}
    with pytest.raises(DataError, match="all records ask the same"):
        CrossFitted(Usual()).answer([Labelled("t", ("a",)), Labelled("T", ("b",))])


def test_linear_and_usual_learn_chinese_and_empty_texts() -> None:
    texts = ["这部电影太好看了", "很喜欢，推荐", "非常精彩", "太难看了", "浪费时间，不推荐", "无聊透顶"] * 4
    records = [Labelled(text, ("好" if place % 6 < 3 else "差",)) for place, text in enumerate(texts)]
    linear, usual = Linear(C=1.0), Usual()
    for system in (linear, usual):
        system.fit(records)
    odd = [Labelled("", ()), Labelled("😀ＡＢＣ１２３", ()), Labelled("好看 " * 10_000, ()), Labelled("精彩，推荐", ())]
    answers = linear.answer(odd)
    assert answers[3].labels == ("好",) and all(math.isclose(sum(a.probabilities.values()), 1) for a in answers)
    assert [answer.labels for answer in usual.answer(odd)] == [usual.verdict.labels] * 4
    assert TASK.describe(odd[3], answers[3]).startswith("好 0.")
    assert list(TASK.as_data(answers[3])["probabilities"]) == ["好", "差"]


def test_one_class_only_is_refused_by_what_learns() -> None:
    with pytest.raises(DataError):
        Linear(C=1.0).fit(labelled(["a"] * 8))


def test_every_task_and_alias_is_found() -> None:
    assert set(ALIASES.values()) <= set(MODULES)
    for name in MODULES:
        task = find_task(name)
        assert task.name == name and task.help and task.help_zh
    with pytest.raises(UsageError, match="unknown task 'clasification'"):
        find_task("clasification")


def test_models_that_cannot_do_it_are_refused() -> None:
    class Vectors:
        name = "vectors"

    with pytest.raises(ModelError, match="'vectors'"):
        TASK.system(Vectors())


# Prompts --------------------------------------------------------------------------------------------------------------


def test_prompts_as_conversation_and_as_text() -> None:
    prompt = Prompt("Do it.", "Text: c", (("Text: a", "A"), ("Text: b", "B")), "Label:")
    assert [message["role"] for message in prompt.messages()] == ["user", "assistant"] * 2 + ["user"]
    assert prompt.messages()[0]["content"] == "Do it.\n\nText: a" and prompt.messages()[-1]["content"] == "Text: c"
    assert prompt.text() == "Do it.\n\nText: a\nLabel: A\n\nText: b\nLabel: B\n\nText: c\nLabel:"
    assert mostly_chinese(["今天天气很好。", "你好，世界。", "fine"]) and not mostly_chinese(
        ["fine", "", "It is good."]
    )
    records = labelled(["a", "b", "c", "d"])
    assert choose_shots(records, 2, 1) == choose_shots(records, 2, 1) and len(choose_shots(records, 9, 0)) == 4
    with pytest.raises(UsageError, match="--train"):
        choose_shots([], 1, 0)


class Remote:
    """A remote model that writes what it is told to."""

    name, is_chat, context_length = "remote", True, None

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[Any]()

    def generate(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a chat model is asked in a conversation")

    def chat(self, messages: Any, **options: Any) -> Any:
        self.asked.append((messages, options))

        class Written:
            text = self.answers.pop(0)

        return [Written()]


def test_remote_models_write_their_label() -> None:
    train = [Labelled("x", ("ham",)), Labelled("y", ("spam",)), Labelled("z", ("spam, certainly",))]
    model = Remote("Spam.", "It is ham!", "spam, certainly", "no idea")
    system = TASK.system(model, train, Form(shots=2))
    answers = system.answer([Labelled(text, ()) for text in "abcd"])
    assert [answer.labels for answer in answers] == [("spam",), ("ham",), ("spam, certainly",), ()]
    assert len(model.asked[0][0]) == 5 and model.asked[0][1]["temperature"] == 0
    assert system.kind == "remote" and system.signature()["shots"] == 2
    with pytest.raises(UsageError, match="2 to 64 labels"):
        PromptedLabels(Remote(), train[:1], Form())


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_chat_model() -> Any:
    """A small random decoder that holds conversations."""
    from hanmo.inference.language_model import LanguageModel
    from hanmo.models.transformer import Transformer
    from hanmo.text.training import train_bpe

    from .native_cases import decoder

    texts = ["春眠不觉晓，处处闻啼鸟。", "The quick brown fox jumps over the lazy dog. yes no, never"] * 4
    tokenizer = train_bpe(texts, 320, chat_template=TEMPLATE)
    model = decoder("llama", vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    assert isinstance(model, Transformer)
    return LanguageModel(model.eval(), tokenizer, name="tiny")


def test_local_models_give_probabilities_of_labels(tiny_chat_model: Any) -> None:
    train = [Labelled("good", ("yes",)), Labelled("bad", ("no, never",))]
    system = TASK.system(tiny_chat_model, train, Form())
    answers = system.answer([Labelled("fine", ()), Labelled("word " * 3000, ()), Labelled("", ())])
    for answer in answers:
        assert set(answer.probabilities) == {"yes", "no, never"}
        assert sum(answer.probabilities.values()) == pytest.approx(1.0)
    # by hand: the sum of the logarithms of an answer's tokens, the end included
    model, prompt = tiny_chat_model, system.speaker.prompt(system.prompt("fine"))
    ends = sorted(model.eos_ids)[:1]
    logs = []
    for label in system.labels:
        answer = [*model.tokenizer.encode(label), *ends]
        logprobs_TV = model.logits([*prompt, *answer])[-len(answer) - 1 : -1].double().log_softmax(-1)
        logs.append(float(logprobs_TV[range(len(answer)), answer].sum()))
    odds = np.exp(np.array(logs) - max(logs))
    assert system.probabilities("fine") == pytest.approx(odds / odds.sum(), rel=1e-4)
