"""The main road: what a resumption may change (nothing), late settings, and the advice at the end."""

from __future__ import annotations

import dataclasses
import random
import socket
from pathlib import Path

import pytest

from hanmo.cli.build import advice
from hanmo.cli.main import main
from hanmo.evaluation.comparison import Comparison
from hanmo.evaluation.intervals import Interval
from hanmo.settings import Resolution
from hanmo.training import plan as dial
from hanmo.training.settings import TrainingSettings

TRAIN = ["--max-steps", "6", "--size", "nano", "--context", "32", "--vocab-size", "300", "--checkpoint-every", "2"]


def text(path: Path, seed: int) -> Path:
    """Some paragraphs of made-up sentences."""
    generator = random.Random(seed)
    words = [
        "river",
        "stone",
        "lamp",
        "quiet",
        "walks",
        "under",
        "the",
        "old",
        "bridge",
        "and",
        "sings",
        "春天",
        "来了",
    ]
    paragraphs = [" ".join(generator.choices(words, k=60)) + "." for _ in range(60)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_refused_resumption_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other, run = text(tmp_path / "a.txt", 1), text(tmp_path / "b.txt", 2), tmp_path / "run"
    assert main(["pretrain", str(first), "--out", str(run), *TRAIN]) == 0
    before = snapshot(run)
    for arguments in ([str(other), *TRAIN], [str(first), *TRAIN[:4], "--context", "16", *TRAIN[6:]]):
        assert main(["pretrain", *arguments, "--out", str(run), "--resume"]) == 4
        assert "begun with other texts or settings" in capsys.readouterr().err
        left = {name: data for name, data in snapshot(run).items() if name in before}
        assert left == before
    assert main(["pretrain", str(first), "--out", str(run), *TRAIN, "--resume"]) == 0


def test_settings_that_come_too_late_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = tmp_path / "prepared"
    assert main(["data", str(text(tmp_path / "a.txt", 1)), "--out", str(prepared)]) == 0
    out = str(tmp_path / "run")
    assert main(["pretrain", str(prepared), "--out", out, *TRAIN, "--half-width"]) == 2
    assert "--half-width comes too late" in capsys.readouterr().err
    assert main(["pretrain", str(prepared), "--out", out, *TRAIN, "--seed", "5"]) == 0


def test_evaluation_refuses_a_corpus_that_is_not_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", str(text(tmp_path / "a.txt", 1)), "--out", str(run), *TRAIN]) == 0
    assert main(["evaluate", str(run), "--part", "validation"]) == 0
    assert main(["data", str(text(tmp_path / "b.txt", 2)), "--out", str(run / "data")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 2
    assert "give the texts" in capsys.readouterr().err


def test_the_whole_road_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("something tried to use the network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["build", str(text(tmp_path / "a.txt", 1)), "--out", str(tmp_path / "run"), *TRAIN]) == 0
    assert main(["generate", str(tmp_path / "run"), "river", "--max-new-tokens", "3"]) == 0


def comparison(difference: float, spread: float = 0.01) -> Comparison:
    interval = Interval(difference - spread, difference + spread)
    return Comparison("model", "5-gram", difference, interval, "documents", 40)


def test_advice_is_given_only_where_it_helps() -> None:
    settings = TrainingSettings(size="nano", budget="3min")
    plan = dial.make_plan(
        settings,
        Resolution(),
        vocab_size=260,
        train_tokens=10_000_000,
        held_out_tokens=100_000,
        machine=dial.Machine(200e9, dial.CPU_OVERHEAD),
        device=dial.torch.device("cpu"),
    )
    assert advice(comparison(-0.1), plan) == ""
    assert advice(comparison(0.1, spread=0.2), plan) == ""
    assert "--budget 6min" in advice(comparison(0.1), plan)
    assert "far too short" in advice(comparison(2.0), plan)
    assert "too little text" in advice(comparison(0.1), dataclasses.replace(plan, capped=True))
    assert advice(comparison(0.1), dataclasses.replace(plan, seconds=None, steps=10)) == ""
