"""Dialogue: what a program can verify of replies, who wins, likelihoods, records of all layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hanmo.cli.main import main
from hanmo.data.tasks import read_records
from hanmo.data.tasks.types import Dialogue
from hanmo.errors import DataError, ModelError, UsageError
from hanmo.evaluation.scoring import difference, score, win_rate
from hanmo.inference.language_model import LanguageModel
from hanmo.inference.loading import base_of
from hanmo.inference.remote import connect
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.tasks.base import Form, System
from hanmo.tasks.dialogue import Assistant, Dialogues, Echo, Nearest, longest_reply, script
from hanmo.tasks.instructions import INSTRUCTIONS, obeyed, obeyed_loosely
from hanmo.tasks.registry import find_task, training_of
from hanmo.tasks.replies import Reply, ReplyMetric, echoes, exchange_of, expected_language, in_language, loops
from hanmo.tasks.stated import stated_instructions
from hanmo.text.chat import CHATML_TEMPLATE
from hanmo.text.chat_targets import ChatTargets
from hanmo.text.training import train_bpe
from hanmo.text.which_language import LANGUAGES, is_language, language_of

from .serving_fakes import FakeModel, running_server

pytest.importorskip("rouge_score")

TEXTS = [
    "What is the colour of snow? It is white.",
    "雪是什么颜色？白色。你好，请问今天天气怎么样？",
    "User: Assistant:",
]


def asked(question: str, reference: str = "", *checks: dict[str, Any], **more: Any) -> Dialogue:
    """One question and its answer."""
    said = ({"role": "assistant", "content": reference},) if reference else ()
    return Dialogue(({"role": "user", "content": question}, *said), checks, **more)


RECORDS = [
    asked("What is the colour of snow?", "Snow is white."),
    asked("雪是什么颜色？", "雪是白色的。"),
    asked("Name a fruit in one sentence.", "An apple is a fruit."),
    asked("用一句话介绍苹果。", "苹果是一种水果。"),
    asked("How many legs has a cat?", "A cat has four legs."),
    asked("猫有几条腿？", "猫有四条腿。"),
]


class Says(System[Dialogue, Reply]):
    """Answers what it was told to."""

    def __init__(self, name: str, replies: list[Reply]) -> None:
        self.name, self.replies = name, replies

    def answer(self, records: Any) -> list[Reply]:
        return self.replies[: len(records)]


def model_of(template: str | None = CHATML_TEMPLATE, context: int = 160, seed: int = 0) -> LanguageModel:
    """A small random network."""
    tokenizer = train_bpe(TEXTS, 300, chat_template=template)
    torch.manual_seed(seed)
    config = TransformerConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, context)
    return LanguageModel(Transformer(config).eval(), tokenizer, name="random")


# Instructions ---------------------------------------------------------------------------------------------------------

CASES: list[tuple[dict[str, Any], str, str]] = [  # instruction, a reply that obeys, one that does not
    ({"id": "keywords:existence", "keywords": ["Snow", "ice"]}, "Ice and snow.", "Only ice."),
    ({"id": "keywords:existence", "keywords": ["雪", "冰"]}, "冰雪世界", "只有冰"),
    ({"id": "keywords:frequency", "keyword": "snow", "frequency": 2, "relation": "at least"}, "Snow on snow", "snow"),
    ({"id": "keywords:frequency", "keyword": "雪", "frequency": 2, "relation": "less than"}, "雪", "雪，雪"),
    ({"id": "keywords:forbidden_words", "forbidden_words": ["art"]}, "a party starts", "Art!"),
    ({"id": "keywords:forbidden_words", "forbidden_words": ["西湖"]}, "杭州很美", "在西湖边"),
    ({"id": "keywords:letter_frequency", "letter": "q", "let_frequency": 2, "let_relation": "at least"}, "Qq", "q"),
    ({"id": "language:response_language", "language": "de"}, "Das ist nicht der Hund.", "This is not the dog."),
    ({"id": "language:response_language", "language": "zh"}, "今天天气很好。", "The weather is fine today."),
    ({"id": "length_constraints:number_sentences", "num_sentences": 2, "relation": "less than"}, "One.", "One. Two."),
    ({"id": "length_constraints:number_sentences", "num_sentences": 2, "relation": "at least"}, "一。二！", "一。"),
    ({"id": "length_constraints:number_paragraphs", "num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    ({"id": "length_constraints:number_words", "num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ({"id": "length_constraints:number_words", "num_words": 5, "relation": "at most"}, "今天天气好，", "今天天气很好"),
    (
        {"id": "length_constraints:nth_paragraph_first_word", "num_paragraphs": 2, "nth_paragraph": 2,
         "first_word": "Snow"},
        "A.\n\n\"Snow, falls.", "A.\n\nThe snow.",
    ),
    (
        {"id": "length_constraints:nth_paragraph_first_word", "num_paragraphs": 2, "nth_paragraph": 1,
         "first_word": "春天"},
        "春天来了。\n\n好。", "春天来了。",
    ),
    ({"id": "detectable_content:number_placeholders", "num_placeholders": 2}, "[name], [address]", "[name]"),
    ({"id": "detectable_content:postscript", "postscript_marker": "P.S."}, "Bye.\nP. S. Write!", "Bye. PS"),
    ({"id": "detectable_content:postscript", "postscript_marker": "附言"}, "再见。\n附言：多保重", "再见"),
    ({"id": "detectable_format:number_bullet_lists", "num_bullets": 2}, "* a\n- b", "* a\n- b\n- c"),
    ({"id": "detectable_format:constrained_response"}, "My answer is yes.", "Yes."),
    ({"id": "detectable_format:number_highlighted_sections", "num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    (
        {"id": "detectable_format:multiple_sections", "section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na",
    ),
    ({"id": "detectable_format:multiple_sections", "section_spliter": "第", "num_sections": 2}, "第一 第2", "第一"),
    ({"id": "detectable_format:json_format"}, '```json\n{"颜色": ["白"]}\n```', '{"a": 1} is JSON'),
    ({"id": "detectable_format:title"}, "<<Snow>>\nIt falls.", "<< >>"),
    ({"id": "detectable_format:title"}, "《雪》\n下雪了", "雪"),
    ({"id": "combination:two_responses"}, "a\n******\nb", "a\n******\na"),
    ({"id": "combination:repeat_prompt", "prompt_to_repeat": "你好？"}, "你好？很好。", "很好。你好？"),
    ({"id": "startend:end_checker", "end_phrase": "The end."}, 'It is. the end."', "The end. Or not"),
    ({"id": "startend:end_checker", "end_phrase": "谢谢"}, "就这样，谢谢", "谢谢你"),
    ({"id": "startend:quotation"}, '"Yes."', '"Yes".'),
    ({"id": "startend:quotation"}, "“好的。”", "“好的"),
    (
        {"id": "change_case:capital_word_frequency", "capital_frequency": 2, "capital_relation": "less than"},
        "A well-known fact", "NO WAY",
    ),
    ({"id": "change_case:english_capital"}, "THIS IS IT.", "This is it."),
    ({"id": "change_case:english_lowercase"}, "this is it.", "This is it."),
    ({"id": "punctuation:no_comma"}, "no; never", "no, never"),
    ({"id": "punctuation:no_comma"}, "春天来了。花开了。", "春天来了，花开了。"),
    ({"id": "startend:start_checker", "start_phrase": "Although"}, "'Although it rained", "It rained although"),
    ({"id": "detectable_format:number_items", "num_items": 2}, "1. a\n2) b", "1. a\n2. b\n3. c"),
    ({"id": "detectable_format:number_items", "num_items": 3}, "一、甲\n二、乙\n（3）丙", "甲乙丙"),
    ({"id": "change_case:capital"}, "PARIS 巴黎", "Paris"),
    ({"id": "change_case:lowercase"}, "paris 1", "Paris"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "good", "bad"), CASES)
def test_an_instruction_is_obeyed_or_not(check: dict[str, Any], good: str, bad: str) -> None:
    assert obeyed(check, good) and not obeyed(check, bad) and not obeyed(check, " \n")


def test_every_instruction_has_a_case_and_relations_compare() -> None:
    assert {check["id"] for check, _, _ in CASES} == set(INSTRUCTIONS)
    words = {"id": "length_constraints:number_words", "num_words": 2.0}
    found = {
        relation: [obeyed({**words, "relation": relation}, reply) for reply in ("a", "a b", "a b c")]
        for relation in ("at least", "less than", "at most", "more than", "exactly")
    }
    assert found == {
        "at least": [False, True, True],
        "less than": [True, False, False],
        "at most": [True, True, False],
        "more than": [False, False, True],
        "exactly": [False, True, False],
    }


def test_loosely_a_first_line_a_last_one_and_stars_are_forgiven() -> None:
    check = {"id": "detectable_format:json_format"}
    for reply in ("Sure:\n{}", "{}\nI hope it helps.", "当然：\n{}\n还有吗？", "**{}**"):
        assert obeyed_loosely(check, reply) and not obeyed(check, reply)
    assert not obeyed_loosely(check, "Sure, {}")


@pytest.mark.parametrize(
    ("check", "named"),
    [
        ({"id": "keywords:existance"}, "keywords:existence"),
        ({"id": "keywords:existence", "keywords": []}, "keywords"),
        ({"id": "length_constraints:number_words", "num_words": "many"}, "num_words"),
        ({"id": "length_constraints:number_words", "num_words": 3, "relation": "about"}, "at least"),
        ({"id": "language:response_language", "language": "tlh"}, "zh"),
        ({"id": "startend:end_checker"}, "end_phrase"),
    ],
)
def test_what_cannot_be_verified_is_named_with_its_line(check: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError) as caught:
        exchange_of(asked("hi", "", check, file="d.jsonl", line=4))
    assert caught.value.where == "d.jsonl:4" and check["id"] in caught.value.what and check["id"] in caught.value.zh
    assert named in caught.value.what + caught.value.fix


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Explain rain in at most 30 words.", {"id": "length_constraints:number_words", "num_words": 30,
                                               "relation": "at most"}),
        ("介绍杭州，不超过５０字。", {"id": "length_constraints:number_words", "num_words": 50, "relation": "at most"}),
        ("写一篇一百二十字以上的短文", {"id": "length_constraints:number_words", "num_words": 120,
                                        "relation": "at least"}),
        ("Describe it in three sentences.", {"id": "length_constraints:number_sentences", "num_sentences": 3,
                                             "relation": "exactly"}),
        ("用两句话概括。", {"id": "length_constraints:number_sentences", "num_sentences": 2, "relation": "exactly"}),
        ("Summarize it in 3 bullet points.", {"id": "detectable_format:number_items", "num_items": 3,
                                              "relation": "exactly"}),
        ("分三点说明", {"id": "detectable_format:number_items", "num_items": 3, "relation": "exactly"}),
        ("Return the result as a JSON object.", {"id": "detectable_format:json_format"}),
        ("请以 JSON 格式输出", {"id": "detectable_format:json_format"}),
        ("Answer in all lowercase.", {"id": "change_case:lowercase"}),
        ("答案全部使用大写字母", {"id": "change_case:capital"}),
        ("Make a sentence using the word 'gregarious.'", {"id": "keywords:existence", "keywords": ["gregarious"]}),
        ("写一首诗，包含“雪”字", {"id": "keywords:existence", "keywords": ["雪"]}),
        ("Tell me without using the word \"very\".", {"id": "keywords:forbidden_words", "forbidden_words": ["very"]}),
        ("介绍杭州，不要提到“西湖”", {"id": "keywords:forbidden_words", "forbidden_words": ["西湖"]}),
        ("Rewrite the sentence to start with 'Although'.", {"id": "startend:start_checker",
                                                            "start_phrase": "Although"}),
        ("请以“谢谢”结尾", {"id": "startend:end_checker", "end_phrase": "谢谢"}),
        ("用英文回答：你好", {"id": "language:response_language", "language": "en"}),
        ("Please answer in Chinese.", {"id": "language:response_language", "language": "zh"}),
    ],
)  # fmt: skip
def test_what_a_prompt_states_is_found(prompt: str, expected: dict[str, Any]) -> None:
    assert stated_instructions(prompt) == (expected,)
    assert stated_instructions(f"{prompt}\n{'filler ' * 300}") == (expected,)


@pytest.mark.parametrize(
    "prompt",
    ["What is JSON?", "Name three animals that start with 'b'.", "他超过了我", "How many words are in a sentence?",
     "Convert the name to lowercase: ANNA", "“西湖”在哪里？", "翻译成英文：你好", "", "😀"],
)  # fmt: skip
def test_what_a_prompt_does_not_state_is_not_found(prompt: str) -> None:
    assert stated_instructions(prompt) == ()


def test_languages_are_told_and_doubted_only_where_another_is_clear() -> None:
    told = {
        "en": "The dog is not in the house.", "zh": "今天天气很好。", "ja": "これは犬です。", "ko": "이것은 개입니다",
        "ru": "Это не собака, мы знаем", "uk": "Це не собака і її дім", "ar": "هذا هو الكلب", "hi": "यह एक कुत्ता है और",
        "fr": "Il est dans la maison et je ne sais pas", "es": "El perro no está en la casa", "th": "นี่คือสุนัข",
        "vi": "Đây là một con chó và không có", "el": "αυτό είναι", "he": "זה כלב", "fa": "این یک سگ است",
    }  # fmt: skip
    assert {code: language_of(text) for code, text in told.items()} == {code: code for code in told}
    assert set(told) <= set(LANGUAGES)
    for text in ("42", "😀", "", "Te amo"):
        assert is_language(text, "en")
    assert not is_language(told["fr"], "en") and not is_language(told["zh"], "en") and not is_language(told["ru"], "uk")


# The rules ------------------------------------------------------------------------------------------------------------


def test_loops_and_echoes() -> None:
    for text in ("I do not know. " * 5, "我不知道，" * 6, "。" * 500, "a b c d e f g " * 30, "😀" * 20):
        assert loops(text)
    for text in ("", "ha ha ha", "| - | - | - | - |\n" + "-" * 80, "One. Two. Three.", "行行行，好的好的。"):
        assert not loops(text)
    question = exchange_of(asked("Fix the grammar: He go home.", "He goes home."))
    assert echoes("OK. fix the grammar:  He go home.", question) and not echoes("He goes home.", question)
    assert not echoes("hello", exchange_of(asked("Hello", "Hi")))
    repeat = asked("Say: one two three", "", {"id": "combination:repeat_prompt", "prompt_to_repeat": "one"})
    assert not echoes("Say: one two three", exchange_of(repeat))


def test_a_reply_is_expected_in_the_language_of_its_reference_or_question() -> None:
    assert [expected_language(exchange_of(record)) for record in RECORDS[:2]] == ["en", "zh"]
    assert (
        expected_language(exchange_of(asked("Translate 'I love books' into Spanish.", "Me encantan los libros."))) == ""
    )
    assert expected_language(exchange_of(asked("翻译成中文：I love books.", "我爱书。"))) == "zh"
    assert expected_language(exchange_of(asked("用英文回答：你好", "Hello there, my friend."))) == ""
    check = {"id": "punctuation:no_comma"}
    assert expected_language(exchange_of(asked("你好吗？", "", check))) == "zh"
    assert in_language("好的", "zh") and not in_language("All right, sir.", "zh") and in_language("42", "zh")
    assert in_language("All right", "en") and not in_language("好的，先生。", "en") and not in_language("Это не", "en")


# Measures -------------------------------------------------------------------------------------------------------------


def test_sums_give_means_and_shares_and_no_likelihood_is_nan() -> None:
    metric = ReplyMetric(RECORDS)
    right = [Reply(exchange_of(record).reference, True, 6.0, 3) for record in RECORDS]
    found = metric.measures(metric.statistics(RECORDS, right).sum(0))
    assert (
        metric.primary == "sound_rougeL"
        and float(found["sound_rougeL"]) == 1.0 == float(found["rougeL"])
        and float(found["checks"]) == 1.0
    )
    size = sum(len(exchange_of(record).reference.encode()) for record in RECORDS)
    assert float(found["loss"]) == 2.0 and float(found["bits_per_byte"]) == pytest.approx(36 / size / math.log(2))
    wrong = [
        Reply("", False),
        Reply("It is white.", False),
        *[Reply("one two " * 9)] * 2,
        Reply("4"),
        Reply("猫有几条腿？"),
    ]
    found = metric.measures(metric.statistics(RECORDS, wrong).sum(0))
    shares = {name: round(float(found[name]) * 6, 6) for name in ("answered", "ended", "no_loop", "no_echo")}
    assert shares == {"answered": 5, "ended": 4, "no_loop": 3, "no_echo": 4}
    assert float(found["language"]) == pytest.approx(3 / 6) and float(found["instructions"]) == 1.0
    assert math.isnan(float(found["loss"])) and math.isnan(float(found["bits_per_byte"]))


def test_strict_and_loose_accuracy_of_listed_instructions() -> None:
    checks = [{"id": "punctuation:no_comma"}, {"id": "detectable_format:json_format"}]
    records = [asked("q", "", *checks), asked("q", "", checks[0])]
    metric = ReplyMetric(records)
    assert metric.primary == "prompt_strict" and "rougeL" not in metric.measures(np.zeros(len(metric.columns)))
    replies = [Reply("Sure:\n{}"), Reply("no, never")]
    found = metric.measures(metric.statistics(records, replies).sum(0))
    names = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    assert [round(float(found[name]), 4) for name in names] == [0.0, 0.5, 0.3333, 0.6667]
    scores = [
        score(Dialogues(), Says(name, said), records) for name, said in (("a", replies), ("b", [Reply("{}")] * 2))
    ]
    assert difference(metric, scores[1], scores[0]).p == 0.5 and not hasattr(ReplyMetric(RECORDS), "right")
    details = metric.details(records, replies)["labels"]
    assert details["punctuation:no_comma"] == {"n": 2, "obeyed": 1}


def test_more_rules_win_and_overlap_decides_between_equals() -> None:
    good = Says("good", [Reply(exchange_of(record).reference) for record in RECORDS])
    near = Says("near", [*good.replies[:2], Reply("An apple."), *good.replies[3:]])
    cut = Says("cut", [Reply(reply.text, False) for reply in good.replies])
    task, metric = Dialogues(), ReplyMetric(RECORDS)
    scores = {system.name: score(task, system, RECORDS) for system in (good, near, cut)}
    points = metric.wins(scores["near"].sums, scores["good"].sums)
    assert points.tolist() == [0.5, 0.5, 0, 0.5, 0.5, 0.5]
    rate = win_rate(metric, scores["near"], scores["cut"])
    assert rate is not None and (rate.value, rate.won, rate.lost) == (1.0, 6, 0)
    assert rate.p == pytest.approx(2 * 0.5**6) and "significant" in rate.sentence()
    even = win_rate(metric, scores["good"], scores["near"])
    assert even is not None and even.value == pytest.approx(7 / 12) and "no significant" in even.sentence()
    assert difference(metric, scores["good"], scores["cut"]).value == 1.0  # what has no end counts 0
    assert scores["cut"].measures["rougeL"].value == 1.0
    echo = score(task, Echo(), RECORDS)
    assert echo.main.value == 0.0 < echo.measures["rougeL"].value
    with pytest.raises(DataError, match="not measured on the same"):
        win_rate(metric, scores["good"], score(task, good, RECORDS[:3]))


# Systems --------------------------------------------------------------------------------------------------------------


def test_the_baselines() -> None:
    assert [system.name for system in Dialogues().baselines(RECORDS)] == [Echo().name, Nearest().name]
    assert len(Dialogues().baselines([asked("q", "", {"id": "punctuation:no_comma"})])) == 1
    nearest = Nearest()
    nearest.fit([*RECORDS, asked("q", "", {"id": "punctuation:no_comma"})])
    questions = [asked("the colour of snow, please"), asked("小猫有几条腿呢"), asked("😀")]
    found = [
        nearest.answer([Dialogue((*q.messages, {"role": "assistant", "content": "?"}))])[0].text for q in questions
    ]
    assert found == ["Snow is white.", "猫有四条腿。", "Snow is white."]
    nearest.fit([])
    assert nearest.answer(RECORDS[:1]) == [Reply("")]


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, None])
def test_a_model_answers_and_its_likelihoods_are_those_of_its_own_form(template: str | None) -> None:
    model = model_of(template)
    system = Dialogues().system(model, RECORDS)
    assert isinstance(system, Assistant) and system.most == 64
    answers = system.answer(RECORDS)
    weighed = system.weigh(RECORDS, answers)
    assert [reply.text for reply in answers] == [reply.text for reply in weighed] and answers[0].nats is None
    for record, reply in zip(RECORDS, weighed, strict=True):
        exchange = exchange_of(record)
        if template:
            row = ChatTargets(model.tokenizer).rows(list(record.messages))[0]
            ids, begin = row.ids, row.trained.index(True)
        else:
            prompt = script(list(exchange.prompt))
            assert prompt.endswith(("Assistant:", "助手："))
            gap = "" if prompt.endswith("：") else " "
            start = model.tokenizer.encode(prompt)
            ids = [*start, *model.tokenizer.encode(gap + exchange.reference), int(model.tokenizer.eos_id or 0)]
            begin = len(start)
        expected = -float(model.score(np.array([ids]))[0, begin - 1 :].sum())
        assert reply.nats == pytest.approx(expected, rel=1e-4) and reply.tokens == len(ids) - begin
    alone = system.answer(RECORDS[1:2])[0]
    assert alone == answers[1]
    assert system.signature()["form"] == ("template" if template else "script")


def test_examples_and_an_instruction_stand_before_the_question() -> None:
    system = Assistant(model_of(context=400), RECORDS, Form(shots=2, instruction="Be brief."))
    talk = system.fitted(({"role": "system", "content": "s"}, {"role": "user", "content": "你好"}))
    assert [item["role"] for item in talk] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert talk[1]["content"].startswith("Be brief.\n\n") and talk[-1]["content"] == "你好"
    assert system.signature()["shots"] == 2 and system.signature() != Assistant(model_of(), RECORDS, Form()).signature()
    short = Assistant(model_of(context=160), RECORDS, Form(shots=2, instruction="Be brief."))
    long = short.fitted(({"role": "user", "content": "snow " * 40},))
    assert len(long) < 5 and long[0]["content"].startswith("Be brief.")


def test_a_long_conversation_loses_its_oldest_turns_and_a_long_question_its_middle(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_of()
    system = Assistant(model, RECORDS, Form())
    turns = [{"role": role, "content": f"{n} snow"} for n in range(30) for role in ("user", "assistant")]
    talk = system.fitted([{"role": "system", "content": "s"}, *turns, {"role": "user", "content": "你好"}])
    assert [item["role"] for item in talk[:2]] == ["system", "user"] and talk[-1]["content"] == "你好"
    assert 2 < len(talk) < 40 and system.size(talk) <= 160 - 64
    assert "shortened" not in capsys.readouterr().err
    words = "BEGIN " + "word " * 10_000 + "END"
    cut = system.fitted([{"role": "user", "content": words}])
    assert cut[0]["content"].startswith("BEGIN") and cut[0]["content"].endswith("END") and " … " in cut[0]["content"]
    assert 80 < system.size(cut) <= 96
    record = asked(words, "It is white.")
    (reply,) = system.weigh([record], system.answer([record]))
    assert reply.nats is not None and reply.nats > 0 and "1 conversations" in capsys.readouterr().err
    too_long = asked("你好", "white " * 400)
    assert system.weigh([too_long], [Reply("")])[0].nats is None


def test_a_remote_model_answers_without_likelihoods() -> None:
    with running_server(FakeModel(context_length=4000)) as base:
        system = Dialogues().system(connect(f"openai:fake@{base}", offline=True))
        assert system.kind == "remote"
        found = score(Dialogues(), system, RECORDS)
    assert all("春眠" in reply.text and reply.ended for reply in found.answers)
    assert len({reply.text for reply in found.answers}) == 6 and math.isnan(found.measures["loss"].value)
    assert found.as_data()["measures"]["loss"]["value"] is None


def test_models_that_cannot_and_texts_that_are_empty() -> None:
    with pytest.raises(ModelError, match="cannot do dialogue"):
        Dialogues().system(object())
    with pytest.raises(UsageError, match="empty"):
        Dialogues().record(" \n")
    assert longest_reply([]) == 512 and longest_reply([asked("q", "", {"id": "punctuation:no_comma"})]) == 1280
    assert longest_reply([asked("q", "x" * 200)]) == 200


# Records --------------------------------------------------------------------------------------------------------------

ODD = ["😀😀", "ＡＢＣ１２３", "我用 machine learning 写 code", "word " * 10_000, "。", "a\r\nb"]


def test_odd_questions_and_replies_are_measured() -> None:
    records = [asked(question, "42") for question in ODD]
    metric = ReplyMetric(records)
    for replies in (ODD, ODD[::-1], [""] * len(ODD)):
        rows = metric.statistics(records, [Reply(text) for text in replies])
        assert np.isfinite(rows).all()
    system = Assistant(model_of(), records, Form())
    assert len(system.weigh(records, system.answer(records))) == len(ODD)


def test_ifeval_and_checks_are_read_from_every_layout(tmp_path: Path) -> None:
    path = tmp_path / "ifeval.jsonl"
    kwargs = [{"num_words": 3, "relation": "at least", "keywords": None}, {}]
    row = {"key": 1, "prompt": "Write.", "instruction_id_list": ["length_constraints:number_words",
           "punctuation:no_comma"], "kwargs": kwargs}  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf" + (json.dumps(row) + "\r\n").encode() * 3)
    (record, *_) = read_records("dialogue", path)
    assert record.messages == ({"role": "user", "content": "Write."},) and record.where.endswith(":1")
    assert record.checks == ({"id": "length_constraints:number_words", "num_words": 3, "relation": "at least"},
                             {"id": "punctuation:no_comma"})  # fmt: skip
    rows: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": "写雪"}],
            "checks": [{"id": "keywords:existence", "keywords": ["雪"]}],
        },
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "checks": []},
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    first, second = read_records("dialogue", path)
    assert first.checks[0]["keywords"] == ["雪"] and second.checks == ()
    alpaca = {"instruction": "写诗", "input": "", "output": "雪，", "checks": ["punctuation:no_comma"]}
    path.write_text(json.dumps(alpaca), encoding="utf-8")
    (record,) = read_records("dialogue", path)
    assert exchange_of(record).reference == "雪，" and record.checks == ({"id": "punctuation:no_comma"},)
    metric = ReplyMetric([record])
    found = metric.measures(metric.statistics([record], [Reply("雪，")]).sum(0))
    assert (
        metric.primary == "sound_rougeL"
        and float(found["rougeL"]) == 1 > float(found["sound_rougeL"])
        and float(found["prompt_strict"]) == 0
    )


@pytest.mark.parametrize("checks", [3, [3], [{"name": "x"}], {"a": 1}, ["a", 1]])
def test_bad_checks_and_records_without_an_answer_are_named(tmp_path: Path, checks: Any) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "q", "checks": checks}), encoding="utf-8")
    with pytest.raises(DataError, match="checks are not a list") as caught:
        read_records("dialogue", path, skip_bad=False)
    assert "d.jsonl:1" in caught.value.where
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}]}), encoding="utf-8")
    with pytest.raises(DataError, match="assistant says nothing"):
        read_records("dialogue", path, skip_bad=False)


def test_the_last_answer_is_the_reference_and_something_must_stand_before_it() -> None:
    user, bot = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    last = {"role": "assistant", "content": "b"}
    found = exchange_of(Dialogue((bot, user, bot, user, last, user)))
    assert found.prompt == (bot, user, bot, user) and found.reference == "b" and found.question == "q"
    with pytest.raises(DataError, match="user says nothing") as caught:
        exchange_of(Dialogue((bot, user), file="d", line=2))
    assert caught.value.where == "d:2"


# The command ----------------------------------------------------------------------------------------------------------


def test_names_of_tasks_are_understood_by_finetune() -> None:
    assert [training_of(name) for name in ("dialogue", "assistant", "spam", "ner", "mt", "text")] == [
        "instructions", "instructions", "classification", "tagging", "seq2seq", "text"]  # fmt: skip
    assert find_task("instruction-following").name == "dialogue"


def test_a_tuned_model_stands_beside_the_untuned_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from .finetune_cases import make_bases

    bases = make_bases(tmp_path)
    rows = [{"instruction": f"what is {n}?", "output": f"it is {n}"} for n in range(24)]
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run = tmp_path / "run"
    arguments = [str(data), "--task", "dialogue", "--base", bases["decoder"], "--max-steps", "2", "--lora"]
    assert main(["finetune", *arguments, "--no-baseline", "--out", str(run), "--json"]) == 0
    capsys.readouterr()
    assert base_of(str(run)) == bases["decoder"] == base_of(str(run / "adapter"))
    assert base_of("openai:x@http://127.0.0.1:1") is None and base_of(bases["decoder"]) is None
    limited = ["evaluate", "--task", "dialogue", "--data", str(data), "--limit", "6", "--json"]
    assert main([*limited, "--model", str(run / "adapter")]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in found["scores"]]
    assert names[2] == f"{bases['decoder']} (untuned)" and len(names) == 4
    losses = [row for row in found["differences"] if row["measure"] == "loss"]
    assert [row["second"] for row in losses] == [names[2]] and losses[0]["difference"] != 0
    assert (
        len(found["wins"]) == 3 and found["wins"][0]["won"] + found["wins"][0]["lost"] + found["wins"][0]["even"] == 6
    )
    assert main(["dialogue", "--model", str(run), "你好，😀 what is 3?", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["answers"]
    assert set(row) == {"text", "reply", "ended"}
