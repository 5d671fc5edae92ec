"""``hanmo finetune --base new``: an encoder-decoder that learns pairs from nothing, in one direction or in both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hanmo.cli.main import main
from hanmo.data.tasks.types import Pair
from hanmo.inference.loading import load
from hanmo.tasks.translation import Translation

from .finetune_cases import failed, finetune, lines

NUMBERS = ("one", "two", "three", "four", "five", "six")
CHINESE = "一二三四五六"
PAIRS = [
    {"source": f"{a} and {b}", "target": f"{CHINESE[i]}和{CHINESE[j]}"}
    for i, a in enumerate(NUMBERS)
    for j, b in enumerate(NUMBERS)
]
NEW = ("--task", "seq2seq", "--base", "new", "--size", "tiny", "--vocab-size", "300")


def test_pairs_are_learnt_from_nothing_in_both_directions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = lines(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "run"
    result = finetune(capsys, data, *NEW, "--both-ways", "--max-steps", "300", "--out", str(run))
    assert result["measures"]["loss"] < 1.5 and result["baselines"] == []
    model = load(result["model"], device="cpu")
    assert model.reads_source and model.target_prefixes == {"zh": "zh: ", "en": "en: "}
    system = Translation().system(model)
    answers = system.answer([Pair("two and five", ""), Pair("四和一", ""), Pair("", "")])
    assert answers[2] == "" and set(answers[0]) <= {*CHINESE, "和"} and " and " in answers[1]
    assert json.loads((run / "model" / "config.json").read_text())["model_type"] == "marian"


def test_one_direction_has_no_prefixes_and_a_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = lines(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "run"
    first = finetune(capsys, data, *NEW, "--max-steps", "3", "--out", str(run))
    assert load(first["model"], device="cpu").target_prefixes == {}
    settled = json.loads((run / "settings.json").read_text())["settings"]
    assert (settled["dropout"], settled["smoothing"], settled["learning_rate"]) == (0.3, 0.1, 0.02)
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["dropout"] == 0.3
    again = finetune(capsys, data, *NEW, "--max-steps", "3", "--out", str(run), "--resume")
    assert again["measures"] == first["measures"]


def test_long_pairs_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*PAIRS, {"source": "one and " * 60, "target": "一"}, {"source": "one", "target": "一和" * 60}]
    data = lines(tmp_path / "pairs.jsonl", rows)
    arguments = (*NEW, "--max-steps", "2", "--context", "24", "--validation-share", "0.2")
    code, told = failed(capsys, data, *arguments, "--out", str(tmp_path / "refused"))
    assert code and "pairs.jsonl:3" in told
    code, told = failed(capsys, data, *arguments, "--skip-long", "--out", str(tmp_path / "run"))
    assert code == 0 and "records were dropped" in told and "longer than 24 tokens" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "classification", "--base", "new"), "--base new is for --task seq2seq"),
        (("--task", "seq2seq", "--base", "new", "--lora"), "--base new is for --task seq2seq"),
        (("--task", "seq2seq", "--base", "other", "--vocab-size", "400"), "--vocab-size belongs to --base new"),
        (("--task", "seq2seq", "--base", "new", "--truncate", "--skip-long"), "--truncate and --skip-long are two"),
        (("--task", "tagging", "--base", "other", "--skip-long"), "--skip-long means nothing for --task tagging"),
        (("--task", "seq2seq", "--base", "new", "--dropout", "1"), "--dropout is a share from 0 to below 1"),
        (("--task", "seq2seq", "--base", "other", "--dropout", "0.1"), "--dropout belongs to --base new"),
        (("--task", "tagging", "--base", "other", "--both-ways"), "--both-ways means nothing for --task tagging"),
        (("--task", "seq2seq", "--base", "new", "--vocab-size", "100"), "a vocabulary of 100 is too small"),
    ],
)
def test_what_a_new_base_cannot_do_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    data = lines(tmp_path / "pairs.jsonl", PAIRS)
    code, error = failed(capsys, data, *arguments, "--out", str(tmp_path / "run"))
    assert code != 0 and message in error and "fix:" in error


def test_both_ways_needs_a_chinese_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = lines(tmp_path / "pairs.jsonl", [{"source": f"good {n}", "target": f"bon {n}"} for n in range(12)])
    code, error = failed(capsys, data, *NEW, "--both-ways", "--out", str(tmp_path / "run"))
    assert code != 0 and "--both-ways needs pairs of Chinese" in error
    assert main(["finetune", "--help"]) == 0
