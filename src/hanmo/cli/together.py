"""Several processes that walk the road together: starting them, and who of them prepares what the others read."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.road import choose_out, open_run
from hanmo.errors import HanmoError, Interrupted, UsageError
from hanmo.folder import read_json
from hanmo.training.launch import check_devices, is_follower, is_worker, launch, launch_id, leave
from hanmo.training.settings import LoopSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hanmo.training.processes import Processes


FIRST_SECONDS = 3.0  # for the first process to tell an error that all have


def start_workers(settings: LoopSettings) -> None:
    """With ``--devices N``, run the same command in N processes and leave with their exit code.

    Raises:
        UsageError: sharding or several processes where there is only one.
        ResourceError: there are fewer devices.
    """
    if is_worker():
        return
    if settings.shard and settings.devices == 1:
        raise UsageError(
            "--shard divides a model between several processes",
            fix="add --devices N, or start with torchrun",
            zh="--shard 需要多个进程：请加 --devices N，或用 torchrun 启动",
        )
    if settings.devices > 1:
        check_devices(settings.devices, settings.device)
        raise SystemExit(launch(settings.devices, [sys.executable, "-m", "hanmo", *sys.argv[1:]]))


@contextmanager
def run_together(paths: list[str], settings: Any) -> Iterator[tuple[Path, Processes, torch.device]]:
    """The run's folder, the processes that train in it, and the device of this one, while the block lasts.

    The first process holds the folder; after a crash all go on from the newest checkpoint.

    Raises:
        HanmoError: the folder is taken, or the processes do not come together.
    """
    from hanmo.models.device import set_threads
    from hanmo.training.distributed import DataParallel, Distributed, joined
    from hanmo.training.meeting import Place

    settings.check()
    set_threads()

    def make(place: Place, device: torch.device) -> Distributed:
        if not settings.shard:
            return DataParallel(place, device)
        from hanmo.training.sharded import FullySharded

        recompute = settings.activation_checkpointing
        return FullySharded(place, device, precision=settings.precision, recompute=recompute)

    with told_once(), joined(settings.device, make) as (processes, device), ExitStack() as stack:
        processes.on_main(lambda: refuse_recurrent(settings, processes))
        folder = choose_out(settings, paths)
        if processes.restarted and (folder / "settings.json").is_file():
            settings.resume = settings.resume or read_json(folder / "settings.json").get("launch") == launch_id()
        processes.on_main(lambda: stack.enter_context(open_run(paths, settings)))
        processes.check_folder(folder)
        yield folder, processes, device


@contextmanager
def told_once() -> Iterator[None]:
    """Let the first process tell an error that all have, and end the others; one that only another has is told by it.

    Both launchers end the others when the first has failed, so a moment is all that it takes.
    """
    try:
        yield
    except HanmoError as error:
        if is_follower():
            if isinstance(error, Interrupted):
                leave(error.exit_code)
            time.sleep(FIRST_SECONDS)
        raise


def refuse_recurrent(settings: Any, processes: Processes) -> None:
    """Refuse to divide recurrent training, before any text is read.

    Raises:
        UsageError: the objective carries a state from step to step.
    """
    if processes.share.count > 1 and getattr(settings, "architecture", "transformer") != "transformer":
        from hanmo.training.distributed import carried_state

        raise carried_state()


def prepare_model(model: nn.Module, settings: LoopSettings, device: torch.device, seconds: float | None) -> None:
    """What is applied to a network from outside before it is trained: recomputation, compilation on a GPU."""
    from hanmo.training.acceleration import checkpoint_blocks, compile_blocks

    if settings.activation_checkpointing and not settings.shard:
        checkpoint_blocks(model)
    if not settings.shard:
        compile_blocks(model, device, seconds)
