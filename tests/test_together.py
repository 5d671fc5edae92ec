"""Several processes through the command line: they give what one gives, go on after a crash, and talk once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

TEXT = "the cat sat on a mat and saw another dog run over hills while birds sang songs about rain"
WORDS = TEXT.split()
SHAPE = ["--size", "nano", "--tokenizer", "char", "--context", "32", "--batch-size", "8", "--micro-batch", "2"]
LIMIT = 300  # seconds for one command on a busy machine

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)


def environment(**more: str) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HANMO_THREADS": "1", "HANMO_LANG": "en", **more}


def hanmo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hanmo", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=LIMIT)


def succeed(folder: Path, *arguments: str) -> dict[str, Any]:
    done = hanmo(folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


def losses(run: Path) -> dict[int, float]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, records, and a run ``one`` of one process."""
    folder = tmp_path_factory.mktemp("together")
    chosen = np.random.default_rng(1)
    (folder / "texts").mkdir()
    for number in range(20):
        lines = [" ".join(chosen.choice(WORDS, 10)) + ".\n" for _ in range(20)]
        (folder / "texts" / f"{number}.txt").write_text("".join(lines))
    records = [{"text": " ".join(chosen.choice(WORDS, 4)), "label": "ab"[n % 2]} for n in range(40)]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    succeed(folder, "pretrain", "texts", *SHAPE, "--max-steps", "10", "--out", "one")
    command = ["pretrain", "texts", *SHAPE, "--max-steps", "10", "--checkpoint-every", "3"]
    result = succeed(folder, *command, "--devices", "2", "--out", "two")
    (folder / "two.json").write_text(json.dumps(result))
    shutil.copy(folder / "two/model/model.safetensors", folder / "calm.safetensors")
    return folder


def test_two_processes_give_the_losses_of_one_and_change_their_number(place: Path) -> None:
    command = ["pretrain", "texts", *SHAPE, "--max-steps", "10", "--checkpoint-every", "3"]
    result = json.loads((place / "two.json").read_text())
    one, two = losses(place / "one"), losses(place / "two")
    assert list(two) == list(one) == list(range(1, 11))  # the log is written once
    assert all(abs(two[step] - one[step]) < 1e-5 for step in one)
    assert (place / "two/report.html").is_file()
    final = result["validation_loss"]
    for devices in ("1", "2"):  # go back to step 6 or 9, as if what is newer had been lost
        for newest in sorted((place / "two/checkpoints").iterdir())[1:]:
            shutil.rmtree(newest)
        again = succeed(place, *command, "--devices", devices, "--out", "two", "--resume")
        assert abs(again["validation_loss"] - final) < 1e-5


def test_an_error_is_told_once(place: Path) -> None:
    done = hanmo(place, "pretrain", "nowhere", *SHAPE, "--devices", "2", "--out", "error", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["exit_code"] == 3
    assert done.stderr.count("there is no 'nowhere'") == 1 and "Traceback" not in done.stderr


def test_what_cannot_be_divided_is_refused_before_any_work(place: Path) -> None:
    for more in (["--architecture", "lstm"], ["--architecture", "ngram"]):
        done = hanmo(place, "pretrain", "texts", "--devices", "2", "--out", "refused", *more)
        assert done.returncode == 2 and not (place / "refused").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes through /proc")
def test_a_killed_process_is_restarted_with_the_same_result(place: Path) -> None:
    command = ["pretrain", "texts", *SHAPE, "--max-steps", "10", "--checkpoint-every", "3", "--devices", "2"]
    full = [sys.executable, "-m", "hanmo", *command, "--out", "killed", "--json"]
    process = subprocess.Popen(
        full, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + LIMIT
    while not list((place / "killed/checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    assert "start again from the newest checkpoint" in errors
    calm, killed = load_file(place / "calm.safetensors"), load_file(place / "killed/model/model.safetensors")
    assert all(torch.equal(calm[name], killed[name]) for name in calm)


def test_a_sharded_run_leaves_a_model_that_transformers_reads(place: Path) -> None:
    transformers = pytest.importorskip("transformers")
    result = succeed(place, "pretrain", "texts", *SHAPE, "--max-steps", "10", "--devices", "2", "--shard", "--out", "s")
    one, sharded = losses(place / "one"), losses(place / "s")
    assert all(abs(sharded[step] - one[step]) < 1e-5 for step in one)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(place / result["model"])(ids).logits
        first = transformers.AutoModelForCausalLM.from_pretrained(place / "one/model")(ids).logits
    torch.testing.assert_close(theirs, first, rtol=1e-3, atol=1e-3)


def test_adapters_of_two_processes_are_those_of_one(place: Path) -> None:
    command = ["finetune", "records.jsonl", "--task", "classification", "--base", "one/model", "--lora", "--truncate"]
    command += ["--max-steps", "6", "--batch-size", "8", "--micro-batch", "2", "--rank", "4"]
    one = succeed(place, *command, "--out", "adapter-1")
    two = succeed(place, *command, "--out", "adapter-2", "--devices", "2")
    first, second = losses(place / "adapter-1"), losses(place / "adapter-2")
    assert len(first) == 6 and all(abs(first[step] - second[step]) < 1e-5 for step in first)
    assert abs(one["validation_loss"] - two["validation_loss"]) < 1e-5
    assert (place / "adapter-2/adapter/adapter_model.safetensors").is_file()
