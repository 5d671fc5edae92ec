"""Writing as a task: forms kept by construction or by tries, variety as exact sums, bits per character, odd prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanmo.cli.main import main
from hanmo.data.tasks import Prompted, read_records
from hanmo.errors import DataError, ModelError, UsageError
from hanmo.evaluation.cross import CrossFitted
from hanmo.evaluation.leaks import find_leaks
from hanmo.evaluation.scoring import difference, score
from hanmo.evaluation.task_table import render_scores
from hanmo.inference.constraints import Verses
from hanmo.inference.language_model import LanguageModel
from hanmo.inference.remote import connect
from hanmo.models.ngram import NGramModel
from hanmo.tasks.base import Form
from hanmo.tasks.diversity import distinct, self_bleu, units
from hanmo.tasks.drafting import learnt_model
from hanmo.tasks.forms import check, form_like, form_name, verses
from hanmo.tasks.registry import find_task
from hanmo.tasks.writing import Writer, Writing, begin_of
from hanmo.tasks.writing_metric import WritingMetric, Written, variety
from hanmo.text.training import train_bpe

from .serving_fakes import FakeModel, running_server
from .test_task_code import Scripted

pytest.importorskip("sacrebleu")
pytest.importorskip("pypinyin")

POEMS = [
    ("靜夜思", "牀前明月光，疑是地上霜。\n舉頭望明月，低頭思故鄉。"),
    ("登鸛雀樓", "白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。"),
    ("相思", "紅豆生南國，春來發幾枝。\n願君多采擷，此物最相思。"),
    ("鹿柴", "空山不見人，但聞人語響。\n返景入深林，復照青苔上。"),
    ("江雪", "千山鳥飛絕，萬徑人蹤滅。\n孤舟蓑笠翁，獨釣寒江雪。"),
    ("早發白帝城", "朝辭白帝彩雲間，千里江陵一日還。\n兩岸猿聲啼不住，輕舟已過萬重山。"),
]
RECORDS = [Prompted(title, "", poem, file="poems.jsonl", line=n) for n, (title, poem) in enumerate(POEMS, 1)]
ODD = ["😀🎉", "春雨 and rain", "１２３ＡＢＣ", "\u200b春\ufeff", "雨" * 300, "a\tb"]


@pytest.fixture(scope="module")
def decoder() -> LanguageModel:
    """Characters of the poems, as any decoder."""
    model: LanguageModel = learnt_model([begin_of(form_like(poem), title) + poem for title, poem in POEMS], 3, "poet")
    return model


# Records --------------------------------------------------------------------------------------------------------------


def test_prompts_are_read_from_every_usual_file(tmp_path: Path) -> None:
    rows = [{"title": title, "author": "x", "paragraphs": poem.split("\n")} for title, poem in POEMS]
    (tmp_path / "tang.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    found = read_records("prompted", tmp_path / "tang.json")
    assert [(r.prompt, r.reference) for r in found] == POEMS and not found[0].form
    (tmp_path / "p.csv").write_bytes('\ufeff题目,体裁\r\n春雨,五绝\r\n"春,\n雨",七绝\r\n'.encode())
    assert [(r.prompt, r.form) for r in read_records("prompted", tmp_path / "p.csv")] == [
        ("春雨", "五绝"),
        ("春,\n雨", "七绝"),
    ]
    (tmp_path / "p.txt").write_text("春雨\n\n秋風\n", encoding="utf-8")
    assert [(r.prompt, r.line) for r in read_records("prompted", tmp_path / "p.txt")] == [("春雨", 1), ("秋風", 3)]
    (tmp_path / "p.tsv").write_text("A fox\tOnce there was a fox.\nA hen\tOnce there was a hen.\n", encoding="utf-8")
    assert read_records("prompted", tmp_path / "p.tsv")[1].reference == "Once there was a hen."
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"p\.jsonl:2.*the prompt is empty"):
        read_records("prompted", tmp_path / "p.jsonl", skip_bad=False)


def test_forms_have_names_and_shapes() -> None:
    assert form_name(" 七绝 ") == "七言绝句" and form_like(POEMS[0][1]) == "五言绝句"
    assert [form_like(text) for text in ("", "春雨", POEMS[5][1], "a\nb\nc\nd")] == ["", "", "七言绝句", ""]
    with pytest.raises(UsageError, match="五言绝句"):
        find_task("poems", form="五言绝居").baselines([])
    record = Prompted("x", "sonet", file="p.csv", line=7)
    with pytest.raises(UsageError, match=r"p\.csv:7: unknown form 'sonet'"):
        Writing().metric([record])


# The constraint -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [264, 330, 600])
def test_verses_hold_whatever_the_tokens_are(vocabulary: int) -> None:
    """Byte pairs: from single bytes of characters to several characters a token."""
    texts = [poem for _, poem in POEMS] * 3 + ["plain English text, too."]
    tokenizer = train_bpe(texts, vocabulary)
    end = tokenizer.eos_id
    assert end is not None
    documents = ([*tokenizer.encode(text), end] for text in texts)
    model = LanguageModel(
        NGramModel.train(documents, 2, tokenizer.vocab_size, bos_id=end, eos_id=end), tokenizer, prompt_prefix=[end]
    )
    constraint = Verses(model, 4, 5)
    options: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 200, "n": 8, "seed": 5}
    for item in model.generate("《春雨》", constraint=constraint, **options):
        assert [len(line) for line in verses(item.text)] == [5] * 4
        assert item.text.count("\n") == 1 and item.text.endswith("。") and item.finish_reason == "stop"
        assert check(item.text, "五言绝句").rule("script").holds
    free = model.generate("《春雨》", **options)
    assert not all([len(line) for line in verses(item.text)] == [5] * 4 for item in free)


def test_verses_allow_all_that_fits_and_nothing_else(decoder: LanguageModel) -> None:
    constraint = Verses(decoder, 2, 2)
    encode = decoder.tokenizer.encode
    first = {decoder.tokenizer.decode([id]) for id in constraint.allowed([])}
    known = {sign for title, poem in POEMS for sign in title + poem + "五言绝句七"}
    assert first == {sign for sign in known if "\u4e00" <= sign <= "\u9fff"}
    assert constraint.allowed(encode("明月")) == encode("，")
    assert constraint.allowed(encode("明月，山人")) == encode("。")
    assert constraint.allowed(encode("明月，山人。")) == sorted(decoder.eos_ids)
    assert constraint.allowed(encode("明，")) == []


def test_a_model_without_chinese_is_refused() -> None:
    with pytest.raises(UsageError, match="no tokens for Chinese"):
        Verses(learnt_model(["only English"], 2, "english"), 4, 5)


# Writing --------------------------------------------------------------------------------------------------------------


def test_lines_and_lengths_hold_by_construction_and_rhymes_by_tries(decoder: LanguageModel) -> None:
    records = [Prompted(title, "五绝") for title in ("春雨", "秋風", "江上", "山中", "送人")]
    task = find_task("poems", temperature=1.5)
    once = score(task, task.system(decoder), records)
    assert once.measures["lines"].value == once.measures["length"].value == 1.0
    many = find_task("poems", tries=64, temperature=1.5)
    best = score(many, many.system(decoder), records)
    assert best.main.value > once.main.value
    tries = [answer.tries for answer in best.answers]
    assert max(tries) > 1 and best.details["counts"] == {"texts drawn": sum(tries)}
    assert all(check(a.text, a.form).holds for a in best.answers if a.tries < 64)
    assert "tries:64" in best.signature and "form:held" in best.signature
    assert len({answer.text for answer in once.answers}) > 1  # no two prompts are drawn with the same numbers
    assert [a.text for a in task.system(decoder).answer(records)] == [a.text for a in once.answers]


def test_each_prompt_may_have_a_seed_of_its_own(decoder: LanguageModel) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "max_new_tokens": 12}
    together = [item.text for item in decoder.generate(["山", "山", "月"], seeds=[3, 4, 3], **options)]
    alone = [decoder.generate(text, seed=seed, **options)[0].text for text, seed in (("山", 3), ("山", 4), ("月", 3))]
    assert together == alone and together[0] != together[1]


def test_a_form_may_be_left_free(decoder: LanguageModel) -> None:
    task = find_task("writing", free_form=True, temperature=3.0, form="七律")
    found = score(task, task.system(decoder), [Prompted(title) for title in ODD])
    assert found.measures["length"].value < 1.0 and "form:free" in found.signature
    assert {answer.form for answer in found.answers} == {"七言律诗"}


def test_odd_prompts_are_written_about(decoder: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writing().system(decoder)
    texts = writer.answer([Prompted(text) for text in ODD])
    assert len(texts) == len(ODD) and not any(answer.form for answer in texts)
    model = Scripted(["好。"], context=1000)
    Writing().system(model).answer([Prompted("雨" * 10_000, "haiku")])
    assert len(model.seen[0]) < 1000 and "longer than the context" in capsys.readouterr().err


def test_models_that_chat_are_told_the_form_and_see_examples() -> None:
    model = Scripted(["春雨"])
    writer = Writing().system(model, RECORDS, Form(shots=2))
    writer.answer([Prompted("春雨", "书信"), Prompted("rain", "letter"), Prompted("Write a story about a fox.")])
    letter, mail, story = model.seen
    assert "先称呼" in letter and "题目：春雨" in letter and "。\n" in letter
    assert "a greeting, the text" in mail and "Topic: rain" in mail
    assert story.endswith("Write a story about a fox.") and "题目" in story
    base = Scripted(["x"], chat=False)
    Writing().system(base, (), Form(instruction="<{form}>{prompt}:")).answer([Prompted("rain", "haiku")])
    assert base.seen == ["<haiku>rain:"] and base.options["stop"] == ["\n\n"]


def test_remote_models_write_without_likelihoods() -> None:
    with running_server(FakeModel(context_length=4000)) as base:
        writer = Writing().system(connect(f"openai:fake@{base}", offline=True))
        assert isinstance(writer, Writer) and writer.kind == "remote"
        (answer,) = writer.answer([Prompted("春雨", "五绝", POEMS[0][1])])
        assert answer.text and (answer.bits, answer.characters) == (0.0, 0)
        assert "form:free" in "|".join(f"{k}:{v}" for k, v in writer.signature().items())


# The metric -----------------------------------------------------------------------------------------------------------


def test_variety_is_exact_though_it_is_a_sum() -> None:
    texts = [poem for _, poem in POEMS] + [POEMS[0][1], "春春春", "", "the fox and the hen"]
    for n in (1, 2, 3):
        different, every = variety(texts, n).sum(axis=0)
        assert different / every == pytest.approx(distinct([units(text) for text in texts], n), abs=1e-12)
    records = [Prompted("x") for _ in texts]
    metric = WritingMetric([""] * len(texts), "zh")
    values = metric.measures(metric.statistics(records, [Written(text) for text in texts]).sum(0))
    assert values["self_bleu"] == pytest.approx(self_bleu(texts, "zh").score)
    assert metric.primary == "distinct_2" and "form" not in values and math.isnan(values["bits_per_character"])


def test_one_text_and_no_text_are_measured() -> None:
    metric = WritingMetric(["五言绝句"], "zh")
    values = metric.measures(metric.statistics(RECORDS[:1], [Written("")]).sum(0))
    assert math.isnan(values["self_bleu"]) and values["form"] == values["distinct_1"] == 0.0


def test_bits_per_character_are_those_of_the_model(decoder: LanguageModel) -> None:
    (found,) = Writing().system(decoder).answer(RECORDS[:1])
    title, poem = POEMS[0]
    ids = decoder.tokenizer.encode(begin_of("五言绝句", title) + poem)
    logprobs = np.asarray(decoder.logprobs(ids))[-len(poem) :]
    assert found.bits == pytest.approx(-logprobs.sum() / math.log(2), rel=1e-5) and found.characters == len(poem)


def test_people_keep_forms_and_the_baseline_learns_from_others(decoder: LanguageModel) -> None:
    task = Writing()
    (people,) = task.yardsticks(RECORDS)
    theirs = score(task, people, RECORDS)
    assert theirs.main.value == 1.0 and "people" in people.name
    assert math.isnan(theirs.measures["bits_per_character"].value)
    (ngram,) = task.baselines(RECORDS)
    learnt = score(task, CrossFitted(ngram), RECORDS)
    model = score(task, task.system(decoder), RECORDS)
    known, unknown = (item.measures["bits_per_character"].value for item in (model, learnt))
    assert known < unknown  # the decoder has seen these poems, the n-gram model the others
    shown = render_scores([learnt, theirs, model], [difference(task.metric(RECORDS), model, theirs)])
    assert "form kept" in shown and "bits/character" in shown
    assert task.yardsticks([Prompted("x")]) == []
    ngram.fit([Prompted("only", ""), Prompted("prompts", "")])
    assert len(ngram.answer([Prompted("春雨")])) == 1


def test_the_same_poem_below_another_title_is_a_leak() -> None:
    again = Prompted("無題", "", POEMS[0][1])
    assert find_leaks(RECORDS[:1], [again, RECORDS[1]]).tolist() == [True, False]


# A person's text ------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused() -> None:
    for given in ({"tries": 0}, {"tries": 1000}, {"tries": 4, "temperature": 0.0}):
        with pytest.raises(UsageError, match="--tries"):
            find_task("writing", **given).baselines([])
    with pytest.raises(UsageError, match="has no setting --samples"):
        find_task("writing", samples=2)
    with pytest.raises(ModelError, match="cannot do writing"):
        Writing().system(object())
    for text in ("", " \u3000"):
        with pytest.raises(UsageError, match="prompt is empty"):
            Writing().record(text)


def test_the_verbs_write_and_measure(
    decoder: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanmo.inference.loading.load", lambda *_args, **_options: decoder)
    assert main(["poems", "--model", "x", "--form", "五绝", "--tries", "8", "春雨"]) == 0
    shown = capsys.readouterr().out
    assert "五言绝句, " in shown and "✓ 4 lines, found 4" in shown and "even lines rhyme" in shown
    assert main(["poems", "--model", "x", "--form", "五绝", "春雨", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["answers"]
    assert row["rules"]["lines"] and row["tries"] == 1 and row["form"] == "五言绝句"
    assert main(["poems", "--model", "x", "--form", "七言绝据", "春雨"]) == 2
    assert "七言绝句" in capsys.readouterr().err
    data = tmp_path / "p.jsonl"
    rows = [{"title": title, "paragraphs": poem.split("\n")} for title, poem in POEMS]
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert main(["evaluate", "--task", "writing", "--data", str(data), "--model", "x", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [item["measures"]["length"]["value"] for item in scores] == [1.0, 1.0, 1.0]
    assert scores[1]["measures"]["form"]["value"] == 1.0
