"""Fine-tuning in two processes: the losses of one, whatever the task, and a resumption with another number of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from .finetune_cases import CHATS, LABELLED, lines, make_bases
from .test_together import losses, succeed

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)


@pytest.mark.parametrize(
    ("task", "base", "records", "extra"),
    [
        ("classification", "encoder", LABELLED, []),
        ("instructions", "decoder", CHATS, ["--context", "64", "--learning-rate", "0.01"]),
    ],
    ids=["classification", "instructions"],
)
def test_two_processes_learn_what_one_learns(
    task: str, base: str, records: list[dict[str, Any]], extra: list[str], tmp_path: Path
) -> None:
    bases = make_bases(tmp_path / "bases")
    lines(tmp_path / "data.jsonl", records)
    command = ["finetune", "data.jsonl", "--task", task, "--base", bases[base], "--max-steps", "6", *extra]
    command += ["--batch-size", "4", "--micro-batch", "1", "--checkpoint-every", "2"]
    one = succeed(tmp_path, *command, "--out", "one")
    two = succeed(tmp_path, *command, "--out", "two", "--devices", "2")
    first, second = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(first) == list(second) == list(range(1, 7))
    assert all(abs(first[step] - second[step]) < 1e-5 for step in first)
    assert abs(one["validation_loss"] - two["validation_loss"]) < 1e-5
    assert one["baselines"] and [score["measures"] for score in one["baselines"]] == [
        {name: pytest.approx(value, abs=1e-5) for name, value in score["measures"].items()}
        for score in two["baselines"]
    ]
    for newest in sorted((tmp_path / "two/checkpoints").iterdir())[1:]:  # as if what is newer had been lost
        shutil.rmtree(newest)
    again = succeed(tmp_path, *command, "--out", "two", "--resume")
    assert abs(again["validation_loss"] - two["validation_loss"]) < 1e-5
