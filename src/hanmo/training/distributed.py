"""Several processes that train together, each with the whole model: what they tell each other, and when.

A process takes every N-th micro-batch of a step. Gradients are *summed*, for each is already a part of the gradient of
the step's mean loss, in buckets that travel while the backward pass still computes the earlier layers (Li et al. 2020).
What is not a gradient (sums, decisions, errors) goes as JSON through a group of its own, which waits as long as the
first process prepares the data. Nothing is pickled.

``sharded.py`` has the processes that divide the model among themselves.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hanmo import errors
from hanmo.errors import HanmoError, ModelError, ResourceError, UsageError
from hanmo.folder import listed_files, sha256_file
from hanmo.models.device import choose_device
from hanmo.training.adapted import Adapted
from hanmo.training.checkpoint import verify_whole
from hanmo.training.launch import die_with_launcher
from hanmo.training.meeting import (
    Place,
    code_fingerprint,
    connected,
    device_of,
    divide_threads,
    from_environment,
    meet,
    model_fingerprint,
)
from hanmo.training.objectives.base import Batch, Objective, Share
from hanmo.training.processes import Processes

BUCKET_BYTES = 25 << 20  # of gradients that travel together, as in PyTorch's DDP: large enough for full bandwidth
MESSAGE_BYTES = 1024  # messages up to this size need one exchange, longer ones two
PATIENCE = timedelta(days=7)  # for the first process to prepare a large corpus; a dead process is noticed at once

T = TypeVar("T")


class Distributed(Processes):
    """What all ways of training together have in common: messages between the processes.

    Args:
        place: of this process.
        device: where it computes.

    Raises:
        ModelError: the processes run different versions of the code.
    """

    def __init__(self, place: Place, device: torch.device) -> None:
        self.place, self.device = place, device
        self.share = Share(place.rank, place.count)
        self.restarted = place.restarted
        self.control = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.agree("version of the code", code_fingerprint())

    # Messages ---------------------------------------------------------------------------------------------------------

    def exchange(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The JSON value of every process, by rank; all must call it at the same time.

        Args:
            group: what it goes through; the default waits as long as one process works alone.
        """
        message = json.dumps(value).encode()
        size, largest = len(message), MESSAGE_BYTES
        while True:
            mine = torch.zeros(8 + largest, dtype=torch.uint8)
            mine[:8] = torch.tensor([size]).view(torch.uint8)
            part = torch.frombuffer(bytearray(message[:largest]), dtype=torch.uint8)
            mine[8 : 8 + len(part)] = part
            rows = [torch.empty_like(mine) for _ in range(self.share.count)]
            dist.all_gather(rows, mine, group=group or self.control)
            sizes = [int(row[:8].clone().view(torch.int64)) for row in rows]
            if max(sizes) <= largest:
                return [json.loads(row[8 : 8 + n].numpy().tobytes()) for row, n in zip(rows, sizes, strict=True)]
            largest = max(sizes)

    def any(self, flag: bool) -> bool:
        value = torch.tensor([int(flag)])
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def decide(self, value: float) -> float:
        decision = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(decision, 0)
        return float(decision)

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value added over all processes, in float64; a name that a process lacks counts as zero there."""
        total: dict[str, float] = {}
        for part in self.exchange(dict(values), dist.group.WORLD):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def agree(self, what: str, value: str) -> None:
        """Make sure that all processes have the same value.

        Raises:
            ModelError: they differ; in all of them.
        """
        values = self.exchange(value)
        other = next((rank for rank, found in enumerate(values) if found != values[0]), None)
        if other is not None:
            raise ModelError(
                f"the processes differ in the {what}",
                why=f"process 0 has '{values[0]}', process {other} has '{values[other]}'",
                fix="install the same version and give the same command on every machine",
                zh=f"各进程的 {what} 不同：进程 0 为 '{values[0]}'，进程 {other} 为 '{values[other]}'。"
                "请在每台机器上安装同一版本并使用同一命令",
            )

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Let the first process act while the others wait; an error in it is raised in all of them."""
        result: T | None = None
        failure: BaseException | None = None
        if self.main:
            try:
                result = action()
            except BaseException as error:
                failure = error
        self.raise_together(failure)
        return result

    def first_main(self, action: Callable[[], T], others: Callable[[], T] | None = None) -> T:
        """Let the first process prepare something on the disk, then the others read it.

        Args:
            action: what the first process does.
            others: what the others do afterwards; None: the same, and find it done.
        """
        result = self.on_main(action)
        failure: BaseException | None = None
        if not self.main:
            try:
                result = (others or action)()
            except BaseException as error:
                failure = error
        self.raise_together(failure)
        return result  # type: ignore[return-value]

    def raise_together(self, failure: BaseException | None) -> None:
        """Raise the first failure of any process in all of them; nothing happens if there is none."""
        found = self.exchange(None if failure is None else error_record(failure))
        if failure is not None:
            raise failure
        for rank, record in enumerate(found):
            if record is not None:
                raise error_of(record, rank)

    # Files ------------------------------------------------------------------------------------------------------------

    def same(self, value: T) -> T:
        """The first process's JSON value, for all."""
        return cast(T, self.exchange(value)[0])

    def check_folder(self, folder: Path) -> None:
        """Make sure that all processes see the same folder.

        Raises:
            ResourceError: a machine has a folder of its own under this name.
        """
        name = f".seen-{os.getpid()}-{time.time_ns()}" if self.main else ""
        probe = folder / self.same(name)
        self.on_main(lambda: probe.write_text(""))
        deadline = time.monotonic() + 15  # network disks show a new file late
        while not (seen := probe.exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        blind = [rank for rank, value in enumerate(self.exchange(seen)) if not value]
        self.on_main(lambda: probe.unlink(missing_ok=True))
        if blind:
            raise ResourceError(
                f"process {blind[0]} does not see the files that process 0 writes",
                where=str(folder),
                why="checkpoints are written by one process and read by all",
                fix="put --out on a disk that all machines share",
                zh=f"进程 {blind[0]} 看不到进程 0 写入的文件。请把 --out 放在所有机器共享的磁盘上",
            )

    def verify(self, folder: Path) -> dict[str, Any]:
        """Each process hashes its part of the files; damage is raised in all of them."""
        failure: Exception | None = None
        manifest: dict[str, Any] = {}
        try:
            manifest = verify_whole(folder, hashes=False)
            names = sorted(listed_files(folder, manifest))
            for name in (names[index] for index in self.share.of(len(names))):
                if sha256_file(folder / name) != manifest["files"][name]["sha256"]:
                    raise ModelError(
                        "the content does not match the SHA-256 in its manifest",
                        where=str(folder / name),
                        why="it was altered after it was written; nothing was loaded",
                        zh="文件内容与清单中的 SHA-256 不符，未加载任何内容",
                    )
        except (HanmoError, OSError) as error:
            failure = error
        self.raise_together(failure)
        return manifest

    # Models -----------------------------------------------------------------------------------------------------------

    def adapt(self, objective: Objective[Any, Any]) -> Objective[Any, Any]:
        """The objective as several processes need it.

        Raises:
            UsageError: it carries a state from step to step, so its micro-batches cannot be divided.
        """
        if isinstance(objective, Adapted):
            return objective
        if not objective.divisible:
            raise carried_state()
        return Adapted(objective, self)

    def give_weights(self, model: nn.Module) -> None:
        """Make sure that all processes have the same network, and give all of them the weights of the first."""
        self.agree("network", model_fingerprint(model))
        tensors = [tensor.data for tensor in (*model.parameters(), *model.buffers())]
        for group in buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in group])
            dist.broadcast(flat, 0)
            if not self.main:
                for tensor, piece in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
                    tensor.copy_(piece.view_as(tensor))

    def upcoming(self, batches: Iterator[Batch], spare: Callable[[], Batch]) -> Iterator[tuple[Batch, bool, bool]]:
        """A process's micro-batches: each, whether it counts, and whether it is the last one of the step."""
        del spare
        ahead = next(batches, None)
        while ahead is not None:
            batch, ahead = ahead, next(batches, None)
            yield batch, True, ahead is None

    def begin_backward(self, last: bool) -> None:
        """Called before each micro-batch of a training step."""

    def close(self) -> None:
        """Disconnect, once all have come to the end: one that is gone would look like a failure to the others."""
        self.exchange(None)
        dist.destroy_process_group()


class DataParallel(Distributed):
    """Every process has the whole model and a part of each step's micro-batches."""

    hooks: Sequence[Any] = ()

    def prepare(self, model: nn.Module) -> None:
        self.give_weights(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        # backwards: the gradients of the last layers come first
        self.buckets = [Bucket(list(group)) for group in buckets(trained[::-1])]
        self.place_of = {id(p): index for index, bucket in enumerate(self.buckets) for p in bucket.parameters}
        self.last, self.sent = False, 0
        for hook in self.hooks:  # of an earlier training: a gradient must not be counted twice
            hook.remove()
        self.hooks = [p.register_post_accumulate_grad_hook(self.arrived) for p in trained]  # type: ignore[no-untyped-call]

    def begin_backward(self, last: bool) -> None:
        self.last = last

    def arrived(self, parameter: Tensor) -> None:
        """A gradient is complete; in the last micro-batch, send what is ready, in the same order everywhere."""
        if not self.last:
            return
        self.buckets[self.place_of[id(parameter)]].waiting -= 1
        while self.sent < len(self.buckets) and self.buckets[self.sent].waiting == 0:
            self.buckets[self.sent].send()
            self.sent += 1

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add the gradients of all processes, in the parameters' type; one without a gradient counts as zero."""
        del parameters  # those of `prepare`
        for bucket in self.buckets[self.sent :]:
            bucket.send()
        for bucket in self.buckets:
            bucket.receive()
        self.last, self.sent = False, 0


class Bucket:
    """Gradients that travel together as one flat tensor, behind it one flag per parameter: whether it has any."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.sizes = [p.numel() for p in parameters]
        self.waiting = len(parameters)
        self.flat: Tensor | None = None
        self.work: Any = None

    def send(self) -> None:
        """Start the sum over all processes."""
        first = self.parameters[0]
        pieces = [p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in self.parameters]
        flags = torch.tensor([p.grad is not None for p in self.parameters]).to(first.device, first.dtype)
        self.flat = torch.cat([*pieces, flags])
        for parameter in self.parameters:  # the sum takes its place: no process holds two copies of all gradients
            parameter.grad = None
        self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self) -> None:
        """Wait for the sum and make it the gradient, without a copy."""
        assert self.flat is not None
        self.work.wait()
        *pieces, flags = torch.split(self.flat, [*self.sizes, len(self.sizes)])
        for parameter, piece, flag in zip(self.parameters, pieces, flags.tolist(), strict=True):
            parameter.grad = piece.view_as(parameter) if flag else None
        self.waiting, self.flat, self.work = len(self.parameters), None, None


def buckets(tensors: Iterable[T]) -> Iterator[list[T]]:
    """Tensors in groups of one type and about ``BUCKET_BYTES``, in their order."""
    group: list[Any] = []
    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()  # type: ignore[attr-defined]
        if group and (held + size > BUCKET_BYTES or tensor.dtype != group[0].dtype):  # type: ignore[attr-defined]
            yield group
            group, held = [], 0
        group.append(tensor)
        held += size
    if group:
        yield group


def carried_state() -> UsageError:
    """The error for a training whose micro-batches cannot be divided."""
    return UsageError(
        "this training cannot be divided among processes",
        where="--devices",
        why="a recurrent network goes on with the state of the step before, stream by stream",
        fix="train with one process, or choose --architecture transformer",
        zh="循环网络逐步延续每条文本流的状态，无法分给多个进程。请用单个进程训练，或改用 --architecture transformer",
    )


def error_record(error: BaseException) -> dict[str, str]:
    """An error as JSON."""
    if isinstance(error, HanmoError):
        names = ("what", "where", "why", "fix", "zh")
        return {"kind": type(error).__name__, **{name: getattr(error, name) for name in names}}
    kind = "Interrupted" if isinstance(error, KeyboardInterrupt) else "HanmoError"
    return {"kind": kind, "what": f"{type(error).__name__}: {error}"}


def error_of(record: dict[str, str], rank: int) -> HanmoError:
    """The error of another process."""
    kind = getattr(errors, record["kind"], HanmoError)
    where = f"process {rank}" + (f", {record['where']}" if record.get("where") else "")
    error: HanmoError = kind(
        record["what"], where=where, **{name: record[name] for name in ("why", "fix", "zh") if name in record}
    )
    return error


@contextmanager
def joined(
    device: str, make: Callable[[Place, torch.device], Distributed] = DataParallel
) -> Iterator[tuple[Processes, torch.device]]:
    """The processes of this run and the device of this one, as the environment says; one process without it.

    Args:
        device: as the user named it.
        make: how they train together: ``DataParallel``, or a ``FullySharded`` with its settings.

    Raises:
        HanmoError: whatever keeps them from coming together.
    """
    place = from_environment()
    if place is None:
        yield Processes(), choose_device(device)
        return
    die_with_launcher()
    if place.rank:
        os.environ["HANMO_QUIET"] = os.environ["HANMO_FOLLOWER"] = "1"  # progress and notices are told once
    divide_threads(place)
    chosen = device_of(place, device)
    meet(place, chosen)
    with connected():
        processes = make(place, chosen)
        yield processes, chosen
        processes.close()  # not after an error: the others may never answer
