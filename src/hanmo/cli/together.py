"""Several processes that walk the road together: starting them, and who of them prepares what the others read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.road import choose_out, open_run
from hanmo.errors import UsageError
from hanmo.folder import read_json
from hanmo.training.launch import check_devices, command, is_worker, launch, launch_id
from hanmo.training.settings import LoopSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hanmo.training.processes import Processes


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
        raise SystemExit(launch(settings.devices, command()))


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

        return FullySharded(place, device, precision=settings.precision)

    with joined(settings.device, make) as (processes, device), ExitStack() as stack:
        processes.on_main(lambda: refuse_several(settings, processes))
        folder = choose_out(settings, paths)
        if processes.restarted and (folder / "settings.json").is_file():
            settings.resume = settings.resume or read_json(folder / "settings.json").get("launch") == launch_id()
        processes.on_main(lambda: stack.enter_context(open_run(paths, settings)))
        processes.check_folder(folder)
        yield folder, processes, device


def refuse_several(settings: Any, processes: Processes) -> None:
    """Refuse what several processes cannot do together, before any text is read.

    Raises:
        UsageError: the objective carries a state from step to step; or settings are to be searched.
    """
    if processes.share.count == 1:
        return
    if getattr(settings, "architecture", "transformer") != "transformer":
        from hanmo.training.distributed import carried_state

        raise carried_state()
    if settings.search is not None:
        raise UsageError(
            "--search is for one process",
            why="a trial that fails in one of several would leave the others waiting",
            fix="search with one process, stop it with Ctrl-C when training begins, then go on with --resume, "
            "--devices N and without --search: what was found holds for any number of processes",
            zh="--search 只能由一个进程进行：请先用单进程搜索，训练开始后按 Ctrl-C，"
            "再去掉 --search，加上 --resume 与 --devices N 继续；搜索结果适用于任意进程数",
        )


def prepare_model(model: nn.Module, settings: LoopSettings, device: torch.device, seconds: float | None) -> None:
    """What is applied to a network from outside before it is trained: recomputation, then compilation on a GPU."""
    from hanmo.training.acceleration import checkpoint_blocks, compile_blocks

    if settings.activation_checkpointing:
        checkpoint_blocks(model)
    compile_blocks(model, device, seconds)
