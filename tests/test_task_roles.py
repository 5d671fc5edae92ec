"""Semantic roles: files, roles as tags and back, what is counted, and ways to answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanmo.data.tasks import Proposition, Shares, Tagged, read_records, split_records
from hanmo.errors import DataError, ModelError, UsageError
from hanmo.evaluation.leaks import find_leaks
from hanmo.evaluation.scoring import score
from hanmo.models.crf_features import CLOSE, OPEN
from hanmo.models.crf_tagger import CRFTagger
from hanmo.tasks.registry import find_task
from hanmo.tasks.semantic_roles import Adjacent, RoleMetric, SemanticRoles, from_tags, tags_of, to_tagged

NAMES = ["Ann", "Bob", "the boy", "my old aunt", "we"]
VERBS = ["sold", "saw", "took"]
THINGS = ["a car", "the red house", "it", "two apples"]
TIMES = ["", " today", " last week"]


def sentence(who: str, verb: str, what: str, when: str) -> Proposition:
    parts = [who.split(), [verb], what.split(), when.split()]
    ends = [sum(map(len, parts[: i + 1])) for i in range(4)]
    spans = [(0, ends[0], "ARG0"), (ends[1], ends[2], "ARG1")] + ([(ends[2], ends[3], "ARGM-TMP")] if when else [])
    return Proposition(tuple(w for part in parts for w in part), ends[0], tuple(spans), f"{verb}.01", file="f", line=1)


TRAIN = [sentence(a, b, c, d) for a in NAMES for b in VERBS for c in THINGS for d in TIMES]
TEST = [sentence("the old boy", "sold", "the house", " today"), sentence("Carl", "saw", "two red apples", "")]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


# ---- files

WORDS = ["She", "sold", "the", "car"]
LAYOUTS = {
    "frames": {"tokens": WORDS, "frames": [{"predicate": 1, "args": [["ARG0", 0, 0], ["ARG1", 2, 3]]}]},
    "one": {"words": WORDS, "verb": 1, "arguments": [["ARG1", 2, 3], ["ARG0", 0, 0], ["V", 1, 1]]},
    "objects": {
        "tokens": WORDS,
        "predicate": 1,
        "args": [{"role": "ARG0", "start": 0, "end": 0}, {"role": "ARG1", "start": 2, "end": 3}],
    },
    "tags": {"tokens": WORDS, "tags": ["B-ARG0", "B-V", "B-ARG1", "I-ARG1"]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_give_the_same_record(layout: str, tmp_path: Path) -> None:
    records = read_records("roles", write(tmp_path / "a.jsonl", LAYOUTS[layout]))
    assert records[0].arguments == ((0, 1, "ARG0"), (2, 4, "ARG1")) and records[0].predicate == 1
    assert records[0].tokens == tuple(WORDS) and records[0].where.endswith("a.jsonl:1")
    assert dict(records.report.labels) == {"ARG0": 1, "ARG1": 1}


def test_a_sentence_gives_a_record_for_each_predicate(tmp_path: Path) -> None:
    frames = [{"predicate": 1, "roleset": "sell.01", "args": []}, {"predicate": 0, "args": [["A", 1, 3]]}]
    rows = [{"tokens": ["Hi"], "frames": []}, {"tokens": WORDS, "frames": frames}]
    records = read_records("roles", write(tmp_path / "a.jsonl", *rows))
    assert [(r.predicate, r.sense, r.line) for r in records] == [(1, "sell.01", 2), (0, "", 2)]
    assert "without predicate" in str(records.report.files[0].notes)


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        ({"predicate": 4, "args": []}, "the predicate 4 is no place in a sentence of 4 tokens"),
        ({"predicate": True, "args": []}, "the predicate True"),
        ({"args": []}, "the predicate None"),
        ({"predicate": 1}, "the arguments are not a list"),
        ({"predicate": 1, "args": [["A0", 0]]}, "not an argument"),
        ({"predicate": 1, "args": [["A0", 0, 4]]}, "no span of a sentence of 4 tokens"),
        ({"predicate": 1, "args": [["A0", 3, 2]]}, "no span"),
        ({"predicate": 1, "args": [["", 0, 0]]}, "without role"),
        ({"predicate": 1, "args": [["A0", 2, 3], ["A1", 3, 3]]}, "A0 and A1 overlap at token 3"),
        ({"predicate": 1, "args": [["A0", 0, 2]]}, "A0 and V overlap"),
        ({"predicate": 1, "args": [["A0", 0, 0], ["A0", 0, 0]]}, "overlap at token 0"),
    ],
)
def test_frames_that_cannot_be_are_named_with_file_and_line(frame: Any, what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LAYOUTS["frames"], {"tokens": WORDS, "frames": [frame]})
    with pytest.raises(DataError, match=what) as raised:
        read_records("roles", path, skip_bad=False)
    assert raised.value.where.endswith("a.jsonl:2") and raised.value.zh


def test_tags_shorter_than_the_tokens_and_two_predicates_are_bad(tmp_path: Path) -> None:
    for tags, what in ((["O", "B-V"], "4 tokens and 2 tags"), (["B-V", "B-V", "O", "O"], "several predicates")):
        with pytest.raises(DataError, match=what):
            read_records("roles", write(tmp_path / "a.jsonl", {"tokens": WORDS, "tags": tags}))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("tokens\tframes\na b\tx\n", encoding="utf-8")
    with pytest.raises(DataError, match="jsonl"):
        read_records("roles", tmp_path / "a.tsv")


def test_crlf_byte_order_mark_and_odd_characters(tmp_path: Path) -> None:
    row = json.dumps(
        {"tokens": ["😀", "２０２４", "卖", "\ud800"], "frames": [{"predicate": 2, "args": [["A1", 3, 3]]}]}
    )
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + (row + "\r\n" + row + "\r\n").encode())
    records = list(read_records("roles", tmp_path / "a.jsonl"))
    assert len(records) == 2 and records[1].tokens == ("😀", "２０２４", "卖", "\ufffd")


def test_predicates_of_a_sentence_stay_on_one_side() -> None:
    records = [Proposition((str(i), "a", "b"), place) for i in range(40) for place in range(3)]
    split = split_records(records, Shares(validation=0.3, test=0.0), 0)
    assert not {r.tokens for r in split.train} & {r.tokens for r in split.validation}
    assert find_leaks(split.train, split.train[:2]).all() and not find_leaks(split.train, split.validation).any()


# ---- roles as tags


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_tags_say_the_same_roles(data: st.DataObject) -> None:
    words = data.draw(st.lists(st.sampled_from(["a", OPEN, CLOSE, "中"]), min_size=1, max_size=8))
    place = data.draw(st.integers(0, len(words) - 1))
    spans, at = [], 0
    while at < len(words):
        end = at + data.draw(st.integers(1, 3))
        role = data.draw(st.sampled_from(["", "A0", "R-A0", "C-A1"]))
        if role and end <= len(words) and not at <= place < end:
            spans.append((at, end, role))
        at = end
    record = Proposition(tuple(words), place, tuple(spans))
    tagged = to_tagged(record)
    assert len(tagged.tokens) == len(tagged.tags) == len(words) + 2
    assert [i for i, word in enumerate(tagged.tokens) if word == OPEN] == [place]
    assert from_tags(record, tagged.tags) == record.arguments
    marks = data.draw(st.lists(st.sampled_from(["O", "B-A0", "I-A0", "B-V"]), min_size=len(words) + 2, max_size=20))
    for start, end, role in from_tags(record, marks[: len(words) + 2]):
        assert 0 <= start < end <= len(words) and not start <= place < end and role == "A0"


def test_rare_roles_are_left_out_where_asked() -> None:
    records = [*TRAIN[:30], Proposition(("x", "y", "z"), 0, ((1, 3, "ARG9"),))]
    assert "B-ARG9" in tags_of(records) and "B-ARG9" not in tags_of(records, 5)
    assert set(to_tagged(records[-1], tags_of(records, 5)).tags) == {"O"}


# ---- the metric


def test_the_predicate_is_not_counted_and_references_are() -> None:
    record = Proposition(("a", "b", "c", "d"), 1, ((0, 1, "A0"), (2, 3, "R-A0"), (3, 4, "C-V")))
    metric = RoleMetric([record])
    answers = [((0, 1, "A0"), (1, 2, "V"), (2, 4, "R-A0"))]
    values = metric.measures(metric.statistics([record], answers).sum(0))
    assert {name: float(value) for name, value in values.items()} == {
        "precision": 0.5, "recall": 0.5, "f1": 0.5, "exact": 0.0,
    }  # fmt: skip
    assert metric.details([record], answers)["roles"]["A0"] == {"precision": 1, "recall": 1, "f1": 1, "n": 1}
    assert metric.measures(metric.statistics([record], [record.arguments]).sum(0))["exact"] == 1


# ---- ways to answer


def test_baseline_and_field_learn_and_answer(tmp_path: Path) -> None:
    task = find_task("srl")
    assert isinstance(task, SemanticRoles)
    (nearest,), (field,) = task.baselines(TRAIN), task.candidates(TRAIN)
    reached = []
    for system in (nearest, field):
        system.fit(TRAIN)
        reached.append(score(task, system, TRAIN + TEST, resamples=50))
    assert reached[0].main.value > 0.5 and reached[1].main.value > 0.95
    assert reached[1].main.interval is not None and "ARGM-TMP" in reached[1].details["roles"]
    folder = field.save(tmp_path / "model")
    again = task.system(CRFTagger.load(folder))
    blank = [Proposition(record.tokens, record.predicate) for record in TEST]
    assert again.answer(blank) == [record.arguments for record in TEST]  # what is right is not looked at


def test_roles_that_training_lacks_cost_but_do_not_break() -> None:
    task = SemanticRoles()
    record = Proposition(("Ann", "sold", "it", "there"), 1, ((0, 1, "ARG0"), (2, 3, "ARG1"), (3, 4, "ARGM-LOC")))
    for system in (*task.baselines(TRAIN), *task.candidates(TRAIN)):
        system.fit(TRAIN)
        assert score(task, system, [record]).details["roles"]["ARGM-LOC"]["f1"] == 0


def test_one_role_or_none_at_all_is_learnt() -> None:
    task = SemanticRoles()
    for spans in ((), ((0, 1, "A0"),)):
        records = [Proposition(("we", "go", "home"), 1, spans)] * 3
        for system in (*task.baselines(records), *task.candidates(records)):
            system.fit(records)
            assert system.answer(records[:1]) == [spans]
    with pytest.raises(DataError, match="no predicates"):
        Adjacent().fit([])


def test_a_sentence_of_ten_thousand_words() -> None:
    task, long = SemanticRoles(), Proposition(("Ann", "sold", *["houses"] * 9998), 1)
    for system in (*task.baselines(TRAIN), *task.candidates(TRAIN)):
        system.fit(TRAIN)
        assert all(0 <= start < end <= 10_000 for start, end, _ in system.answer([long])[0])


def test_models_that_know_no_predicates_are_refused() -> None:
    tagger = CRFTagger.train([["a", "b"]] * 2, [["O", "B-X"]] * 2)
    with pytest.raises(ModelError, match="cannot do semantic-roles"):
        SemanticRoles().system(tagger)


# ---- texts that people type


@pytest.mark.parametrize(
    ("text", "tokens", "predicate"),
    [
        ("She [sold] the car.", ("She", "sold", "the", "car", "."), 1),
        ("[ took  off ] 😀 ２０２４", ("took off", "😀", "２０２４"), 0),
        ("她把房子[卖掉]了。", ("她", "把", "房子", "卖掉", "了", "。"), 3),
    ],
)
def test_the_predicate_stands_in_brackets(text: str, tokens: tuple[str, ...], predicate: int) -> None:
    task = SemanticRoles()
    record = task.record(text)
    assert (record.tokens, record.predicate) == (tokens, predicate)
    for system in (*task.baselines(TRAIN), *task.candidates(TRAIN)):
        system.fit(TRAIN)
        answer = system.answer([record])[0]
        assert f"V: {tokens[predicate]}" in task.describe(record, answer) and json.dumps(task.as_data(answer))


@pytest.mark.parametrize("text", ["", "She sold it.", "[] x", "a ] b [ c", "\ud800"])
def test_without_a_predicate_it_is_said_how_to_mark_one(text: str) -> None:
    with pytest.raises(UsageError, match="which word is the predicate"):
        SemanticRoles().record(text)


def test_descriptions_keep_the_order_of_the_sentence() -> None:
    record = sentence("Ann", "sold", "a car", "")
    assert SemanticRoles().describe(record, record.arguments) == "ARG0: Ann\nV: sold\nARG1: a car"
    assert isinstance(to_tagged(record), Tagged)
