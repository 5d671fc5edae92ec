"""Checkpoints: everything a run needs to go on bit for bit, written whole or not at all.

Layout of one checkpoint, ``<run>/checkpoints/step-00000120/``: ``model.safetensors``, ``optimizer.safetensors``,
``state.json`` and ``hanmo.json`` with the size and SHA-256 of each. It appears under its name only when all of it is on
the disk (see :func:`hanmo.folder.atomic_folder`), so a killed run leaves either the old checkpoints or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hanmo.errors import ModelError, UsageError
from hanmo.folder import atomic_folder, read_json, verify, write_json
from hanmo.language import pick
from hanmo.models.checkpoints.weights import write_safetensors
from hanmo.settings import notice

KEEP = 2


@dataclass
class TrainingState:
    """Where a run stands, besides its tensors.

    Args:
        step: optimizer steps done.
        elapsed: seconds of training done, over all sessions.
        tokens: training tokens seen.
        best_loss: lowest validation loss so far, nats per token.
        best_step: the step that had it.
        evaluations: evaluations done.
        recipe: fingerprint of data and settings; a checkpoint of another recipe is refused.
        micro_batch: what fitted into memory.
        waited: evaluations since the best one.
        stopped: whether training ended early, because nothing got better.
        kept: loss and step of the weights kept under ``best/``, the best first.
    """

    step: int = 0
    elapsed: float = 0.0
    tokens: int = 0
    best_loss: float = float("inf")
    best_step: int = -1
    evaluations: int = 0
    recipe: str = ""
    micro_batch: int = 0
    waited: int = 0
    stopped: bool = False
    kept: list[tuple[float, int]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The state as JSON, which has no infinity."""
        return {**dataclasses.asdict(self), "best_loss": self.best_loss if self.best_step >= 0 else None}


@dataclass
class Checkpoint:
    """A checkpoint read back: parameter and optimizer tensors by name, and the state."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: TrainingState


def step_folders(root: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(root.glob("step-*"))


def save_checkpoint(root: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: TrainingState) -> Path:
    """Write a checkpoint and remove all but the newest two.

    Raises:
        ResourceError: the disk is full; the earlier checkpoints are intact.
    """
    target = root / f"step-{state.step:08d}"
    with atomic_folder(target, {"kind": "checkpoint", "version": 1}) as folder:
        write_safetensors(folder / "model.safetensors", model)
        write_safetensors(folder / "optimizer.safetensors", optimizer)
        write_json(folder / "state.json", state.record())
    prune_checkpoints(root, state.step)
    return target


def prune_checkpoints(root: Path, step: int) -> None:
    """After the checkpoint of a step was written: remove all but it and the one before, and what is left of killed
    writers. Later steps than this one are those of damaged checkpoints, which must not take a whole one's place."""
    newest = f"step-{step:08d}"
    earlier = [folder for folder in step_folders(root) if folder.name <= newest]
    later = [folder for folder in step_folders(root) if folder.name > newest]
    for old in [*earlier[:-KEEP], *later, *root.glob(".step-*.tmp-*")]:
        shutil.rmtree(old, ignore_errors=True)


def verify_whole(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """:func:`hanmo.folder.verify` of a folder that must have a manifest.

    Raises:
        ModelError: the folder is missing or damaged.
    """
    manifest = verify(folder, hashes=hashes)
    if not manifest:
        raise ModelError("the folder or its manifest is missing", where=str(folder), zh="文件夹或其清单缺失")
    return manifest


def load_tensors(folder: Path, group: str) -> dict[str, Tensor]:
    """The tensors of one group, from the one file of one process or from those of many."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{group}*.safetensors")):
        tensors |= load_file(path)
    return tensors


def load_newest(
    root: Path, check: Callable[[Path], object] = verify_whole, names: Sequence[str] | None = None
) -> Checkpoint | None:
    """The newest checkpoint whose hashes are right; damaged ones are named and passed over. None if there is none.

    Args:
        check: raises a ModelError for a damaged folder.
        names: of the checkpoints, oldest first; None: those that are there.

    Raises:
        ModelError: there are checkpoints, and all of them are damaged.
    """
    folders = step_folders(root) if names is None else [root / name for name in names]
    for folder in reversed(folders):
        try:
            check(folder)
            fields = read_json(folder / "state.json")
            if fields["best_loss"] is None:
                fields["best_loss"] = float("inf")
            fields["kept"] = [(float(loss), int(step)) for loss, step in fields.get("kept", [])]
            state = TrainingState(**fields)
        except (ModelError, TypeError, KeyError) as error:
            notice(pick(f"damaged checkpoint passed over: {error}", f"跳过损坏的检查点：{error}"))
            continue
        return Checkpoint(load_tensors(folder, "model"), load_tensors(folder, "optimizer"), state)
    if folders:
        raise ModelError(
            f"all {len(folders)} checkpoints are damaged",
            where=str(root),
            fix="start anew with another --out, or copy the run again",
            zh="所有检查点都已损坏；请用新的 --out 重新开始",
        )
    return None


def keep_weights(root: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Write the weights of one evaluation, ``<run>/best/step-00000120/model.safetensors`` and its manifest.

    Raises:
        ResourceError: the disk is full.
    """
    with atomic_folder(root / f"step-{step:08d}", {"kind": "weights", "version": 1}) as folder:
        write_safetensors(folder / "model.safetensors", weights)


def load_weights(root: Path, step: int, check: Callable[[Path], object] = verify_whole) -> dict[str, Tensor]:
    """What :func:`keep_weights` wrote.

    Raises:
        ModelError: it is missing or damaged.
    """
    folder = root / f"step-{step:08d}"
    check(folder)
    weights: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return weights


def prune_weights(root: Path, checkpoints: Path) -> None:
    """Remove kept weights that no checkpoint speaks of any more: resuming the older one must still find its own."""
    named: set[int] = set()
    for folder in step_folders(checkpoints):
        with contextlib.suppress(ModelError):  # damaged: no run goes on from it
            named |= {step for _, step in read_json(folder / "state.json").get("kept", [])}
    for folder in step_folders(root):
        if int(folder.name.removeprefix("step-")) not in named:
            shutil.rmtree(folder, ignore_errors=True)
    for torn in root.glob(".step-*.tmp-*"):
        shutil.rmtree(torn, ignore_errors=True)


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run's folder for one writer; the lock goes with the process, so a killed run never stays locked.

    Raises:
        UsageError: another process is training in this folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                "another process is writing to this run",
                where=str(run),
                fix="wait for it, or choose another --out",
                zh="另一个进程正在写入该目录；请等待或更换 --out",
            ) from None
        yield
    finally:
        os.close(descriptor)
