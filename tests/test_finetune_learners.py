"""Models that learn from records alone, by ``hanmo finetune --base logistic``; and what a comparison keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hanmo.cli.learners import LEARNERS
from hanmo.cli.main import main
from hanmo.data.tasks.types import Proposition, Tagged
from hanmo.tasks.registry import find_task

from .finetune_cases import failed, finetune, lines

TEXTS = [
    {"text": text, "label": label}
    for text, label in (
        *((f"好看，喜欢这部电影 {number}", "好") for number in range(30)),
        *((f"terrible and boring film {number}", "坏") for number in range(30)),
    )
]
SENTENCES = [
    {"tokens": ["小明", "去", city, "见", name], "tags": ["B-PER", "O", "B-LOC", "O", "B-PER"]}
    for city in ("北京", "上海", "London", "Paris", "东京")
    for name in ("李雷", "Anna", "Bob", "韩梅", "王芳")
]


@pytest.mark.parametrize("base", LEARNERS["classification"])
def test_classifiers(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = lines(tmp_path / "texts.jsonl", TEXTS), tmp_path / "run"
    result = finetune(capsys, data, "--task", "classification", "--base", base, "--out", str(run))
    assert result["measures"]["accuracy"]["value"] == 1.0
    assert len(result["baselines"]) >= 1 and result["records"]["validation"] > 0
    assert main(["predict", "--task", "spam", "--model", str(run), "boring film", "喜欢这部电影", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["labels"] for answer in answers] == [["坏"], ["好"]]
    assert main(["evaluate", "--task", "sentiment", "--data", data, "--model", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"][-1]["measures"]["accuracy"]["value"] == 1.0


@pytest.mark.parametrize("base", LEARNERS["tagging"])
def test_taggers(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = lines(tmp_path / "tagged.jsonl", SENTENCES), tmp_path / "run"
    result = finetune(capsys, data, "--task", "tagging", "--base", base, "--out", str(run), "--no-baseline")
    assert result["measures"]["f1"]["value"] > 0.9 and result["baselines"] == []
    assert main(["evaluate", "--task", "ner", "--data", data, "--model", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"][-1]["measures"]["f1"]["value"] > 0.9


def test_roles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"tokens": [who, verb, what], "frames": [{"predicate": 1, "args": [["ARG0", 0, 0], ["ARG1", 2, 2]]}]}
        for who in ("Anna", "Bob", "她", "他")
        for verb in ("eats", "sees", "吃", "看")
        for what in ("bread", "fish", "鱼")
    ]
    data, run = lines(tmp_path / "roles.jsonl", rows), tmp_path / "run"
    result = finetune(capsys, data, "--task", "semantic-roles", "--base", "crf", "--out", str(run))
    assert result["measures"]["f1"]["value"] > 0.9
    assert main(["evaluate", "--task", "srl", "--data", data, "--model", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"][-1]["measures"]["f1"]["value"] > 0.9


def test_the_names_are_those_of_the_tasks() -> None:
    records: dict[str, list[Any]] = {
        "tagging": [Tagged(("a",), ("B-X",))],
        "semantic-roles": [Proposition(("a", "b"), 0, ())],
    }
    for name, keys in LEARNERS.items():
        task = find_task(name)
        for key in keys:
            assert task.learner(key, records.get(name, [])).key == key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "classification", "--base", "svm", "--epochs", "3"), "--epochs means nothing for --base svm"),
        (("--task", "classification", "--base", "svm", "--lora"), "--lora belongs to a base that is a network"),
        (("--task", "tagging", "--base", "svm"), "not a name of the catalog"),
    ],
)
def test_what_they_do_not_have_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    data = lines(tmp_path / "d.jsonl", SENTENCES if "tagging" in arguments else TEXTS)
    assert message in failed(capsys, data, *arguments, "--out", str(tmp_path / "run"))[1]


def test_an_earlier_run_stays_when_nothing_can_be_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = lines(tmp_path / "texts.jsonl", TEXTS), tmp_path / "run"
    arguments = ("--task", "classification", "--base", "naive-bayes", "--out", str(run))
    finetune(capsys, data, *arguments)
    assert "this folder holds an earlier run" in failed(capsys, data, *arguments)[1]
    single = lines(tmp_path / "single.jsonl", [{"text": f"t {n}", "label": "x"} for n in range(20)])
    failed(capsys, single, *arguments, "--overwrite")
    assert (run / "model" / "config.json").is_file()


def test_a_comparison_keeps_what_it_recommends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = lines(tmp_path / "texts.jsonl", TEXTS), tmp_path / "out"
    test = lines(tmp_path / "test.jsonl", TEXTS[::7])
    arguments = ["compare", "--task", "sentiment", "--data", data, "--test", test, "--budget", "2min"]
    arguments += ["--out", str(out)]
    assert main([*arguments, "--limits", "quality>0.9", "--models", "none-such", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == str(out / "model") and not (out / "learned").exists()
    assert [row["model"] for row in result["rows"] if row["name"] == result["recommended"]] == [result["model"]]
    assert main(["sentiment", "--model", result["model"], "boring film"]) == 0
    assert "坏" in capsys.readouterr().out
