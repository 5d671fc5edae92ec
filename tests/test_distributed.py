"""Training with several processes: the laws of scale, restarts, and what happens when one process fails.

The processes run scenarios of this file; each start costs seconds, so that one start checks many things.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hanmo.cli.main import main as cli
from hanmo.errors import DataError, ModelError, ResourceError, UsageError
from hanmo.models.transformer import Transformer
from hanmo.training import launch as launching
from hanmo.training import meeting
from hanmo.training.acceleration import (
    autocast,
    checkpoint_blocks,
    compile_blocks,
    even_micro_batch,
    flops_utilization,
    peak_flops,
)
from hanmo.training.checkpoint import load_newest
from hanmo.training.distributed import DataParallel, Distributed, joined
from hanmo.training.launch import decisive, launch
from hanmo.training.meeting import Place, from_environment
from hanmo.training.objectives import TruncatedBackpropagation
from hanmo.training.objectives.distillation import Distillation
from hanmo.training.processes import Processes

from .distributed_cases import (
    CONFIG,
    CPU,
    STEPS,
    assert_same_losses,
    make_trainer,
    objective,
    program,
    start,
    stop_after,
)

MODULE = "test_distributed"
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


# What the processes do ------------------------------------------------------------------------------------------------


def scenario_laws(root: Path) -> None:
    """Everything that one meeting of two processes can check, asserts included; then the second process is killed.

    What is started again goes on with the run in which that happened, and with what needs another meeting.
    """
    place = from_environment()
    assert place is not None
    if not place.restarted:
        with joined("cpu") as (processes, device):
            assert isinstance(processes, DataParallel) and device == CPU and processes.share.count == 2
            make_trainer(root / "two", processes).fit()
            make_trainer(root / "starved", processes, batch_size=2).fit()  # nothing for the second process
            stop_after(make_trainer(root / "moved", processes), 4)
            processes.on_main(lambda: stop_after(make_trainer(root / "moved", Processes(), resume=True), 5))
            check_messages(processes, processes.share.rank, root)
            check_gradients(processes, processes.share.rank)
            check_refusal(processes)
            check_divergence(root, processes)
            train_and_die(root, processes)
    with joined("cpu") as (processes, _):
        assert processes.restarted
        make_trainer(root / "killed", processes, resume=True).fit()
        make_trainer(root / "moved", processes, resume=True).fit()


def train_and_die(root: Path, processes: Distributed) -> None:
    """Train; the second process is killed in its seventh step."""
    trainer = make_trainer(root / "killed", processes)
    original = trainer.step

    def step(fraction: float) -> float:
        if processes.share.rank == 1 and trainer.state.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(fraction)

    trainer.step = step  # type: ignore[method-assign]
    trainer.fit()


def check_refusal(processes: Distributed) -> None:
    streams = TruncatedBackpropagation(
        np.arange(99) % 7, np.arange(20) % 7, context=4, batch_size=2, micro_batch=2, start_id=0, seed=0
    )
    with pytest.raises(UsageError, match="cannot be divided"):
        processes.adapt(streams)
    teacher, student = Transformer(CONFIG), Transformer(CONFIG)
    goal = processes.adapt(Distillation(objective(), teacher, student))
    assert processes.adapt(goal) is goal


def check_divergence(root: Path, processes: Distributed) -> None:
    """The loss of one process is no number: all of them name its micro-batch."""
    trainer = make_trainer(root / "diverging", processes)
    original = trainer.objective.loss

    def loss(model: Any, batch: Any) -> Any:
        return original(model, batch) * (float("nan") if processes.share.rank == 1 else 1.0)

    trainer.objective.loss = loss  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="the loss is nan") as caught:
        trainer.fit()
    assert "(micro-batch 1)" in caught.value.where


def check_messages(processes: Distributed, rank: int, root: Path) -> None:
    assert processes.exchange({"文": "字" * 2000 * rank}) == [{"文": ""}, {"文": "字" * 2000}]
    assert processes.sums({"a": 0.1} if rank else {}) == {"a": 0.1}
    assert processes.sums({"a": 1e300, "b": rank + 0.5}) == {"a": 2e300, "b": 2.0}
    assert processes.decide(rank + 7.25) == 7.25 and processes.any(rank == 1) and not processes.any(False)
    with pytest.raises(ModelError, match="differ in the recipe"):
        processes.agree("recipe", f"r{rank}")

    def failing() -> None:
        raise DataError("没有数据", where="texts:3", fix="add some")

    with pytest.raises(DataError) as caught:
        processes.on_main(failing)
    assert ("process 0" in caught.value.where) == (rank == 1) and caught.value.fix == "add some"
    assert processes.on_main(lambda: 5) == (5 if rank == 0 else None)
    order = root / "order.txt"
    assert processes.first_main(lambda: order.write_text("a"), lambda: order.read_text()) == (1 if rank == 0 else "a")
    processes.check_folder(root)
    alone = root / f"alone-{rank}"
    alone.mkdir()
    with pytest.raises(ResourceError, match="does not see"):
        processes.check_folder(alone)
    damaged = root / "two-damaged"
    newest = max((root / "two" / "checkpoints").glob("step-*"))
    processes.verify(newest)
    if rank == 0:
        shutil.copytree(newest, damaged)
        data = bytearray((damaged / "optimizer.safetensors").read_bytes())
        data[-5] ^= 1
        (damaged / "optimizer.safetensors").write_bytes(data)
    processes.exchange(None)
    with pytest.raises(ModelError, match="SHA-256"):
        processes.verify(damaged)


def check_gradients(processes: DataParallel, rank: int) -> None:
    """Sums, zeros for a process without a gradient, None where no process has one; in several buckets."""
    model = nn.ParameterList([nn.Parameter(torch.full((3, size), float(rank))) for size in (2, 4, 5, 1)])
    processes.prepare(model)
    assert all(bool((p == 0).all()) for p in model)
    for overlapped in (False, True):
        processes.begin_backward(overlapped)
        loss = model[0].sum() * (rank + 1)
        if rank:
            loss = loss + model[2].sum() * 5
        loss.backward()
        processes.reduce_gradients(model)
        assert [None if p.grad is None else float(p.grad.mean()) for p in model] == [3.0, None, 5.0, None]
        for parameter in model:
            parameter.grad = None


def scenario_failing(root: Path) -> None:
    """An error in one process, while the other waits for it."""
    with joined("cpu") as (processes, _):
        assert isinstance(processes, DataParallel)
        trainer = make_trainer(root / "failing", processes)
        original = trainer.objective.loss

        def loss(model: Any, batch: Any) -> Any:
            if trainer.state.step == 2 and processes.share.rank == int((root / "who").read_text()):
                raise DataError("record 7 cannot be used", where="texts:7")
            return original(model, batch)

        trainer.objective.loss = loss  # type: ignore[method-assign]
        trainer.fit()


def scenario_hanging(root: Path) -> None:
    """One process stands still; the other does not wait for ever."""
    meeting.MEETING, meeting.DEATH_SECONDS = timedelta(seconds=3), 0.1
    with joined("cpu") as (processes, _):
        processes.exchange(str(root))
        if processes.share.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        processes.any(True)


def scenario_endless(root: Path) -> None:
    with joined("cpu") as (processes, _):
        make_trainer(root / "endless", processes, max_steps=100_000).fit()


@pytest.fixture(scope="module")
def laws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, and the same with one."""
    root = tmp_path_factory.mktemp("laws")
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        code = start(MODULE, "laws", root)
    assert code == 0, shown.getvalue()
    (root / "shown").write_text(shown.getvalue())
    make_trainer(root / "one", Processes()).fit()
    make_trainer(root / "starved-one", Processes(), batch_size=2).fit()
    return root


# Laws -----------------------------------------------------------------------------------------------------------------


def test_two_processes_and_one_give_the_same_losses(laws: Path) -> None:
    assert_same_losses(laws / "one", laws / "two")


def test_a_process_without_a_micro_batch_changes_nothing(laws: Path) -> None:
    assert_same_losses(laws / "starved-one", laws / "starved")


def test_resuming_with_two_then_one_then_two_processes(laws: Path) -> None:
    assert_same_losses(laws / "one", laws / "moved")


def test_a_killed_process_is_restarted_and_nothing_is_lost(laws: Path) -> None:
    shown = (laws / "shown").read_text()
    assert "process 1 was ended by signal 9" in shown and shown.count("start again") == 1
    ends = [load_newest(laws / name / "checkpoints") for name in ("two", "killed")]
    assert ends[0] is not None and ends[1] is not None and ends[1].state.step == STEPS
    assert all(torch.equal(value, ends[1].model[name]) for name, value in ends[0].model.items())
    assert_same_losses(laws / "two", laws / "killed", 0.0)


@pytest.mark.parametrize("who", [0, 1])
def test_an_error_in_one_process_ends_both_and_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], who: int
) -> None:
    (tmp_path / "who").write_text(str(who))
    began = time.monotonic()
    assert start(MODULE, "failing", tmp_path) == 3
    assert time.monotonic() - began < 100
    shown = capfd.readouterr().err
    assert "texts:7: record 7 cannot be used" in shown and "start again" not in shown


def test_a_process_that_stands_still_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(MODULE, "hanging", tmp_path) == 5
    assert "did not answer for 0.05 minutes" in capfd.readouterr().err


def test_ctrl_c_ends_all_with_one_checkpoint(tmp_path: Path) -> None:
    command = program(MODULE, "endless", tmp_path)
    code = f"import sys; from hanmo.training.launch import launch; sys.exit(launch(2, {command!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    log = tmp_path / "endless" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 6):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130 and "a checkpoint was saved" in shown.decode(), shown.decode()
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    newest = load_newest(tmp_path / "endless" / "checkpoints")
    assert newest is not None and newest.state.step == last


# The launcher and the environment -------------------------------------------------------------------------------------


def test_restarts_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    counter = tmp_path / "starts"
    body = (
        f"open({str(counter)!r}, 'a').write('x'); raise SystemExit(1 if __import__('os').environ['RANK'] == '1' else 0)"
    )
    assert launch(2, [sys.executable, "-c", body], max_restarts=1) == 1
    assert len(counter.read_text()) == 4
    assert "restarted often enough" in capfd.readouterr().err


def test_workers_get_their_place_and_their_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HANMO_THREADS", raising=False)
    body = "import os, json; json.dump(dict(os.environ), open(os.path.join({!r}, os.environ['RANK']), 'w'))"
    assert launch(2, [sys.executable, "-c", body.format(str(tmp_path))]) == 0
    found = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert [item["LOCAL_RANK"] for item in found] == ["0", "1"] and {item["WORLD_SIZE"] for item in found} == {"2"}
    assert found[0]["OMP_NUM_THREADS"] == str(max(1, launching.cores() // 2))
    assert found[0]["HANMO_LAUNCH"] == found[1]["HANMO_LAUNCH"] and found[0]["HANMO_RESTARTS"] == "0"


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([1, -9], (1, -9)), ([1, 3], (1, 3)), ([None, 5], (1, 5)), ([1, 1], (0, 1)), ([0, -11], (1, -11))],
)
def test_the_process_that_explains_a_failure(codes: list[int | None], expected: tuple[int, int]) -> None:
    assert decisive(codes) == expected


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(3, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "LOCAL_RANK"),
        ({"RANK": "一", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "incomplete"),
        ({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "not below"),
    ],
)
def test_the_environment(variables: dict[str, str], expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            from_environment()
    else:
        assert from_environment() == expected
    if not variables:
        with joined("cpu") as (processes, device):
            assert type(processes) is Processes and device == CPU


def test_bad_devices_and_a_taken_port(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from hanmo.training.meeting import device_of, meet

    with pytest.raises(ResourceError, match="more than this machine has"):
        launching.check_devices(4097, "cpu")
    with pytest.raises(UsageError, match="at least 1"):
        launching.check_devices(0, "cpu")
    launching.check_devices(1, "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="no device 'cuda'"):
            launching.check_devices(2, "cuda")
        with pytest.raises(ResourceError):
            device_of(Place(0, 2, 0, 2), "cuda")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ResourceError, match="port of the meeting is taken"):
            meet(Place(0, 2, 0, 2), CPU)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_all_is_left_to_the_first_process(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(launching.time, "sleep", waited.append)
    assert cli(["pretrain", "--batch-size", "0"]) == UsageError.exit_code
    assert waited == [launching.FIRST_SECONDS] * rank  # the launcher ends the second one meanwhile


def test_processes_do_not_look_for_modules_among_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text("a text")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hanmo", "--version"])
    done = subprocess.run(launching.command(), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["/somewhere/hanmo/__main__.py", "--version"])
    assert launching.command() == [sys.executable, "-m", "hanmo", "--version"]


# One process ----------------------------------------------------------------------------------------------------------


def test_recomputed_blocks_give_the_same_gradient_with_dropout() -> None:
    gradients, kept = [], []
    for recompute in (False, True):
        model = Transformer(CONFIG)
        model.initialize(1)
        assert not recompute or (checkpoint_blocks(model), checkpoint_blocks(model)) == (3, 0)
        torch.manual_seed(9)
        ids = torch.randint(0, 61, (3, 17))
        saved: list[int] = []

        def pack(tensor: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        kept.append(sum(saved))
        assert list(model.state_dict()) == list(Transformer(CONFIG).state_dict())
    assert torch.equal(*gradients)
    assert kept[1] < 0.6 * kept[0]


def test_bfloat16_and_compiled_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    model = Transformer(dataclasses.replace(CONFIG, dropout=0.0))
    model.initialize(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    ids = torch.randint(0, 61, (3, 17), generator=torch.Generator().manual_seed(0))
    plain = model.loss(ids[:, :-1], ids[:, 1:])
    with autocast(CPU, "fp32"):
        assert torch.equal(model.loss(ids[:, :-1], ids[:, 1:]), plain)
    with autocast(CPU, "bf16"):
        half = model.loss(ids[:, :-1], ids[:, 1:])
    assert half.dtype == torch.float32 and not torch.equal(half, plain)
    torch.testing.assert_close(half, plain, rtol=0.02, atol=0)
    assert not compile_blocks(model, CPU, 1e6)
    cuda = torch.device("cuda")
    assert not compile_blocks(model, cuda, 20.0) and "too short" in capsys.readouterr().err
    programs: list[Any] = []

    def backend(program: Any, inputs: Any) -> Any:
        del inputs
        programs.append(program)
        return program.forward

    assert compile_blocks(model, cuda, None, backend=backend)
    torch.testing.assert_close(model.loss(ids[:, :-1], ids[:, 1:]), plain)
    assert len(programs) == 1  # of all blocks; a compiler gives up on a function that needs more than a few


def test_utilization_and_peaks() -> None:
    cuda = torch.device("cuda")
    names = {"NVIDIA H200": 989.4, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA L4": 121.0}
    names |= {"NVIDIA GeForce RTX 4090": 165.2, "NVIDIA L40S": 362.0, "NVIDIA RTX 6000 Ada Generation": 364.2}
    for name, peak in names.items():
        found = peak_flops(cuda, name)
        assert found is not None and found / 1e12 == pytest.approx(peak), name
    assert peak_flops(cuda, "NVIDIA of tomorrow") is None
    assert (peak_flops(CPU) or 0) > 1e8
    assert flops_utilization(6e9, 1e5, 1e15, devices=2) == pytest.approx(0.3)


@pytest.mark.parametrize("batch", [1, 3, 16, 37])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_an_even_micro_batch_leaves_no_process_behind(batch: int, processes: int) -> None:
    for largest in (1, 4, 64):
        size = even_micro_batch(batch, largest, processes)
        pieces = [min(size, batch - at) for at in range(0, batch, size)]
        loads = [sum(pieces[rank::processes]) for rank in range(processes)]
        assert 1 <= size <= largest and max(loads) <= -(-batch // processes) + size - 1
