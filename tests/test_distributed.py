"""Training with several processes: the laws of scale, restarts, and what happens when one process fails.

The processes run this file as a program; each start costs seconds, so that one start checks many things.
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
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from hanmo.errors import DataError, HanmoError, ModelError, ResourceError, UsageError
from hanmo.folder import MANIFEST, verify
from hanmo.models.packed import packed_attention
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.training import launch as launching
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
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.launch import decisive, launch, leave
from hanmo.training.meeting import Place, from_environment
from hanmo.training.objectives import CausalLanguageModeling, TruncatedBackpropagation
from hanmo.training.optimizer import OptimizerSettings, orthogonalize
from hanmo.training.processes import Processes

if TYPE_CHECKING:
    from hanmo.training.sharded import FullySharded  # otherwise where it is needed: it imports for seconds

CONFIG = TransformerConfig(61, 32, 3, 4, 2, 8, 48, 32, qk_norm=True, model_type="qwen3", dropout=0.1)
CPU = torch.device("cpu")
STEPS = 12
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def objective(micro_batch: int = 2, batch_size: int = 10) -> CausalLanguageModeling:
    """Five micro-batches a step: an odd number for two processes. Some windows hold several texts."""
    generator = np.random.default_rng(7)
    tokens = [1, 2]
    for noise in generator.integers(0, 61, 3000):
        tokens.append((3 * tokens[-1] + 7) % 61 if noise < 50 else int(noise))
    ids = np.array(tokens, dtype=np.uint16)
    return CausalLanguageModeling(
        ids[:2600], ids[2600:], context=16, batch_size=batch_size, micro_batch=micro_batch, seed=3, separator=5
    )


def make_trainer(
    run: Path, processes: Any, *, resume: bool = False, muon: bool = True, batch_size: int = 10, steps: int = STEPS
) -> Trainer[Any]:
    model = Transformer(CONFIG)
    model.initialize(5 if processes.main else 6)  # the first process's weights are what counts
    settings = FitSettings(
        OptimizerSettings(muon=muon, eps=1e-6), max_steps=steps, checkpoint_every=4, recipe="r", evaluations=3, clip=0.5
    )
    goal: Any = objective(batch_size=batch_size)
    if isinstance(processes, Distributed):
        goal = processes.adapt(goal)
    return Trainer(model, goal, settings, run, device=CPU, resume=resume, processes=processes)


def stop_after(trainer: Trainer[Any], steps: int) -> None:
    """Train so many steps, and end as a crash would."""
    original, done = trainer.step, iter(range(10_000))

    def step(fraction: float) -> float:
        if next(done) == steps:
            raise KeyboardInterrupt
        return original(fraction)

    trainer.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def entries(run: Path) -> dict[int, dict[str, float]]:
    """What was logged for each step; the last time it was made."""
    found: dict[int, dict[str, float]] = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["step"], {}).update({k: v for k, v in entry.items() if k not in ("elapsed", "whole")})
    return found


def assert_same_losses(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    first, second = entries(a), entries(b)
    assert first.keys() == second.keys() and len(first) == STEPS
    for step, entry in first.items():
        assert entry.keys() == second[step].keys()
        for name, value in entry.items():
            assert second[step][name] == pytest.approx(value, rel=tolerance, abs=tolerance), (step, name)


# What the processes do ------------------------------------------------------------------------------------------------


def scenario_laws(root: Path) -> None:
    """Everything that one meeting of two processes can check, asserts included; then the second process is killed.

    What is started again goes on with the run in which that happened, and with what needs another meeting.
    """
    from hanmo.training.sharded import FullySharded

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
            train_and_die(root, processes)
    with joined("cpu", lambda place, device: FullySharded(place, device, recompute=True)) as (processes, _):
        assert isinstance(processes, FullySharded)
        other = DataParallel(place, CPU)
        make_trainer(root / "killed", other, resume=processes.place.restarted).fit()
        make_trainer(root / "moved", other, resume=True).fit()
        check_sharding(root, processes)


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
    goal = processes.adapt(objective())
    assert processes.adapt(goal) is goal


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


def check_sharding(root: Path, processes: FullySharded) -> None:
    """FSDP2 on CPUs."""
    trainer = make_trainer(root / "sharded", processes, muon=False)
    trainer.fit()
    local = sum(p.to_local().numel() for p in trainer.model.parameters())
    assert local < 0.6 * sum(p.numel() for p in trainer.model.parameters())
    whole = processes.gathered(trainer.model.state_dict())
    assert bool(whole) == processes.main
    check_muon(processes)
    check_sharded_checkpoint(processes, trainer, root)
    sparing = type(processes)(processes.place, CPU, sparing=True)
    make_trainer(root / "starved-sharded", sparing, muon=False, batch_size=2).fit()
    stop_after(make_trainer(root / "moved-sharded", sparing, muon=False), 6)


def check_muon(processes: FullySharded) -> None:
    """Whole matrices in turn: more of them than processes, an odd number of rows."""
    from torch.distributed.tensor import distribute_tensor

    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(7, 4, generator=generator) for _ in range(3)]
    spread = [distribute_tensor(m, processes.mesh, [shard()]) for m in matrices]
    results = processes.orthogonalized(spread)
    for matrix, result in zip(matrices, results, strict=True):
        torch.testing.assert_close(result.full_tensor(), orthogonalize(matrix[None])[0])  # type: ignore[attr-defined]


def shard() -> Any:
    from torch.distributed.tensor import Shard

    return Shard(0)


def check_sharded_checkpoint(processes: FullySharded, trainer: Trainer[Any], root: Path) -> None:
    """Both processes write; the files are whole tensors, verified, and come back to the same rows."""
    weights = {name: value.detach() for name, value in trainer.weights.items()}
    moments = trainer.optimizer.state_tensors()
    target = root / "parts" / "step-00000012"
    for step in (3, 4, 12, 12):  # the last replaces the one before it
        processes.save(root / "parts", weights, moments, dataclasses.replace(trainer.state, step=step))
    assert [folder.name for folder in sorted(target.parent.iterdir())] == ["step-00000004", "step-00000012"]
    assert json.loads((target / "state.json").read_text())["best_loss"] == trainer.state.best_loss
    assert len(list(target.glob("model-0000?-of-00002.safetensors"))) == 2
    processes.verify(target)
    read = read_group(target, "model")
    back = processes.scattered(read, trainer.weights)
    for name, value in weights.items():
        assert torch.equal(back[name].to_local(), value.to_local())  # type: ignore[attr-defined]
    moments_back = processes.scattered(read_group(target, "optimizer"), trainer.optimizer.layout())
    assert moments_back.keys() == moments.keys()
    blocked = root / "blocked"
    if processes.main:
        blocked.write_text("a file")
    processes.exchange(None)
    with pytest.raises(ResourceError):
        processes.save(blocked, weights, moments, trainer.state)


def read_group(folder: Path, group: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob(f"{group}*.safetensors")):
        tensors |= load_file(path)
    return tensors


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


def scenario_endless(root: Path) -> None:
    with joined("cpu") as (processes, _):
        make_trainer(root / "endless", processes, steps=100_000).fit()


def start(name: str, root: Path, **options: Any) -> int:
    return launch(2, [sys.executable, __file__, name, str(root)], **options)


@pytest.fixture(scope="module")
def laws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left, and the same with one."""
    root = tmp_path_factory.mktemp("laws")
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        code = start("laws", root)
    assert code == 0, shown.getvalue()
    (root / "shown").write_text(shown.getvalue())
    make_trainer(root / "one", Processes()).fit()
    make_trainer(root / "starved-one", Processes(), batch_size=2).fit()
    make_trainer(root / "one-adamw", Processes(), muon=False).fit()
    make_trainer(root / "starved-one-adamw", Processes(), muon=False, batch_size=2).fit()
    make_trainer(root / "moved-sharded", Processes(), resume=True, muon=False).fit()
    return root


# Laws -----------------------------------------------------------------------------------------------------------------


def test_two_processes_and_one_give_the_same_losses(laws: Path) -> None:
    assert_same_losses(laws / "one", laws / "two")


def test_a_process_without_a_micro_batch_changes_nothing(laws: Path) -> None:
    assert_same_losses(laws / "starved-one", laws / "starved")
    assert_same_losses(laws / "starved-one-adamw", laws / "starved-sharded")


def test_resuming_with_two_then_one_then_two_processes(laws: Path) -> None:
    assert_same_losses(laws / "one", laws / "moved")


def test_a_sharded_model_gives_the_same_losses(laws: Path) -> None:
    assert_same_losses(laws / "one-adamw", laws / "sharded")


def test_one_process_goes_on_with_what_a_sharded_run_began(laws: Path) -> None:
    assert_same_losses(laws / "one-adamw", laws / "moved-sharded")


def test_sharded_files_load_in_one_process(laws: Path) -> None:
    folder = laws / "parts" / "step-00000012"
    verify(folder)
    assert json.loads((folder / MANIFEST).read_text())["kind"] == "checkpoint"
    whole = load_newest(laws / "sharded" / "checkpoints")
    assert whole is not None
    for group, tensors in (("optimizer", whole.optimizer), ("model", whole.model)):
        read = read_group(folder, group)
        assert read.keys() == tensors.keys()
        if group == "optimizer":  # the model may hold the weights of an earlier, better step
            assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert not list(laws.glob("**/.step-*"))


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
    assert start("failing", tmp_path) == 3
    assert time.monotonic() - began < 100
    shown = capfd.readouterr().err
    assert "texts:7: record 7 cannot be used" in shown and "start again" not in shown


def test_ctrl_c_ends_all_with_one_checkpoint(tmp_path: Path) -> None:
    program = f"import sys; from hanmo.training.launch import launch; sys.exit(launch(2, {[sys.executable, __file__]!r}"
    program += f" + ['endless', {str(tmp_path)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
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
    assert compile_blocks(model, cuda, None, backend="eager")
    torch.testing.assert_close(model.loss(ids[:, :-1], ids[:, 1:]), plain)


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


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 5), (False, 3)])
def test_packed_attention_equals_each_text_alone(causal: bool, window: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, heads, 24, 16, generator=generator) for heads in (4, 2, 2))
    segments = torch.tensor([[1] * 9 + [2] * 15, [1] * 4 + [2] * 3 + [3] * 10 + [0] * 7])
    results = [
        packed_attention(q, k, v, segments, causal=causal, window=window, scale=0.2, flex=flex)
        for flex in (False, True, None)
    ]
    for row, numbers in enumerate(segments):
        for number in (1, 2, 3):
            at = (numbers == number).nonzero().flatten()
            if not len(at):
                continue
            texts = [x[row : row + 1, :, at] for x in (q, k, v)]
            alone = packed_attention(*texts, torch.ones(1, len(at)), causal=causal, window=window, scale=0.2)
            for result in results:
                torch.testing.assert_close(result[row, :, at], alone[0], rtol=1e-4, atol=1e-5)


def main() -> int:
    """One process of a scenario; its exit code is that of the command line."""
    with contextlib.suppress(KeyError):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        globals()[f"scenario_{sys.argv[1]}"](Path(sys.argv[2]))
    except HanmoError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:  # a check failed: the launcher must not try again
        traceback.print_exc()
        return UsageError.exit_code
    return 0


if __name__ == "__main__":
    leave(main())
