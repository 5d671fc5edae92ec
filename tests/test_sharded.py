"""A model that is divided between processes: the laws of scale, and checkpoints that several processes write.

The processes run scenarios of this file; each start costs seconds, so that one start checks many things.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import Shard, distribute_tensor

from hanmo.errors import ResourceError
from hanmo.folder import MANIFEST, verify
from hanmo.training.checkpoint import load_newest, load_tensors
from hanmo.training.distributed import DataParallel, joined
from hanmo.training.fit import Trainer
from hanmo.training.optimizer import orthogonalize
from hanmo.training.processes import Processes

from .distributed_cases import CONFIG, CPU, assert_same_losses, make_trainer, start, stop_after

if TYPE_CHECKING:
    from hanmo.training.sharded import FullySharded  # otherwise where it is needed: it imports for seconds

# A run each, in two processes and in one. "muon": separate embeddings, an average, a norm that is always cut;
# "starved": nothing for the second process to do.
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"muon": False},
    "muon": {
        "config": dataclasses.replace(CONFIG, tie_embeddings=False),
        "average": 0.9,
        "clip": 0.01,
        "recompute": True,
    },
    "lora": {"lora": True, "muon": False, "clip": 0.0},
    "starved": {"muon": False, "batch_size": 2},
}
MODULE = "test_sharded"
TORN = {"average": 0.9, "checkpoint_every": 2}


# What the processes do ------------------------------------------------------------------------------------------------


def scenario_laws(root: Path) -> None:
    """Everything that one meeting can check; then the second process is killed while both write a checkpoint.

    What is started again goes on with that run, whose newest checkpoint is damaged meanwhile.
    """
    from hanmo.training.sharded import FullySharded

    with joined("cpu", FullySharded) as (processes, _):
        assert isinstance(processes, FullySharded)
        if processes.restarted:
            processes.on_main(lambda: damage(root / "torn" / "checkpoints" / "step-00000006"))
            with contextlib.redirect_stderr(io.StringIO()) as told:
                make_trainer(root / "torn", processes, resume=True, **TORN).fit()
            processes.on_main(lambda: (root / "told").write_text(told.getvalue()))
            return
        for name, case in CASES.items():
            sparing = FullySharded(processes.place, CPU, sparing=True) if name == "starved" else processes
            trainer = make_trainer(root / name, sparing, **case)
            trainer.fit()
            if name == "adamw":
                check_sharding(processes, trainer, root)
        check_muon(processes)
        copies = DataParallel(processes.place, CPU)
        stop_after(make_trainer(root / "moved", copies, average=0.9), 4)
        stop_after(make_trainer(root / "moved", processes, average=0.9, resume=True), 4)
        die_while_writing(root, processes)


def damage(folder: Path) -> None:
    """Change one bit of the second process's part."""
    path = folder / "model-00002-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def die_while_writing(root: Path, processes: FullySharded) -> None:
    """Train; the second process is killed when half of its part of the fourth checkpoint is on the disk."""
    from hanmo.training import sharded

    trainer, write = make_trainer(root / "torn", processes, **TORN), sharded.write_part

    def write_part(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        if trainer.state.step == 8 and processes.share.rank == 1:
            (folder / name).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(folder, name, tensors)

    sharded.write_part = write_part
    trainer.fit()


def check_sharding(processes: FullySharded, trainer: Trainer[Any], root: Path) -> None:
    """Each process has its rows only; both write whole tensors, which are verified and come back to the same rows."""
    local = sum(p.to_local().numel() for p in trainer.model.parameters())
    assert local < 0.6 * sum(p.numel() for p in trainer.model.parameters())
    whole = processes.gathered(trainer.model.state_dict())
    assert bool(whole) == processes.main
    weights = {name: value.detach() for name, value in trainer.weights.items()}
    moments = trainer.optimizer.state_tensors()
    target = root / "parts" / "step-00000012"
    for step in (30, 3, 4, 12, 12):  # the first is later than what a run goes on from; the last replaces its like
        processes.save(root / "parts", weights, moments, dataclasses.replace(trainer.state, step=step))
    assert [folder.name for folder in sorted(target.parent.iterdir())] == ["step-00000004", "step-00000012"]
    assert json.loads((target / "state.json").read_text())["best_loss"] == trainer.state.best_loss
    assert len(list(target.glob("model-0000?-of-00002.safetensors"))) == 2
    processes.verify(target)
    back = processes.scattered(load_tensors(target, "model"), trainer.weights)
    for name, value in weights.items():
        assert torch.equal(back[name].to_local(), value.to_local())  # type: ignore[attr-defined]
    moments_back = processes.scattered(load_tensors(target, "optimizer"), trainer.optimizer.layout())
    assert moments_back.keys() == moments.keys()
    blocked = root / "blocked"
    if processes.main:
        blocked.write_text("a file")
    processes.exchange(None)
    with pytest.raises(ResourceError):
        processes.save(blocked, weights, moments, trainer.state)


def check_muon(processes: FullySharded) -> None:
    """Whole matrices in turn: more of them than processes, an odd number of rows."""
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(7, 4, generator=generator) for _ in range(3)]
    results = processes.orthogonalized([distribute_tensor(m, processes.mesh, [Shard(0)]) for m in matrices])
    for matrix, result in zip(matrices, results, strict=True):
        torch.testing.assert_close(result.full_tensor(), orthogonalize(matrix[None])[0])  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def laws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    root = tmp_path_factory.mktemp("laws")
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        code = start(MODULE, "laws", root)
    assert code == 0, shown.getvalue()
    (root / "shown").write_text(shown.getvalue())
    return root


# Laws -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
def test_a_sharded_model_gives_the_losses_of_one_process(laws: Path, name: str) -> None:
    make_trainer(laws / f"one-{name}", Processes(), **CASES[name]).fit()
    assert_same_losses(laws / f"one-{name}", laws / name)


def test_a_run_goes_on_after_a_kill_in_the_middle_of_a_checkpoint_and_from_the_newest_whole_one(
    laws: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = (laws / "shown").read_text()
    assert "process 1 was ended by signal 9" in shown
    log = [json.loads(line) for line in (laws / "torn" / "log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in log if "loss" in entry]
    assert steps == [*range(1, 9), *range(5, 13)]  # the checkpoint of step 8 was never whole, that of step 6 is damaged
    told = (laws / "told").read_text()
    assert "step-00000006/model-00002-of-00002.safetensors: the content does not match" in told
    assert [path.name for path in sorted((laws / "torn" / "checkpoints").iterdir())] == [
        "step-00000010",
        "step-00000012",
    ]
    make_trainer(laws / "one-torn", Processes(), **TORN).fit()
    assert_same_losses(laws / "one-torn", laws / "torn")
    # whole copies in each process, then parts, then one process
    make_trainer(laws / "moved", Processes(), average=0.9, resume=True).fit()
    assert "going on from the checkpoint of step 8" in capfd.readouterr().err
    assert_same_losses(laws / "one-torn", laws / "moved")


def test_checkpoints_are_tensors_and_json_that_one_process_reads(laws: Path) -> None:
    folder = laws / "parts" / "step-00000012"
    verify(folder)
    assert json.loads((folder / MANIFEST).read_text())["kind"] == "checkpoint"
    whole = load_newest(laws / "adamw" / "checkpoints")
    assert whole is not None
    for group, tensors in (("optimizer", whole.optimizer), ("model", whole.model)):
        read = load_tensors(folder, group)
        assert read.keys() == tensors.keys()
        if group == "optimizer":  # the model may hold the weights of an earlier, better step
            assert all(torch.equal(read[name], value) for name, value in tensors.items())
    for path in (path for path in laws.rglob("step-*/*") if path.is_file()):
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            with safe_open(path, "pt") as tensors_of:
                assert path.suffix == ".safetensors" and tensors_of.keys() and load_file(path)
    assert not list(laws.glob("**/.step-*"))
