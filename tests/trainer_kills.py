"""A run that is killed at known places again and again, for ``test_trainer_laws.py``; it prints what it did as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hanmo import folder
from hanmo.training import checkpoint, fit
from hanmo.training.fit import Trainer
from hanmo.training.objectives.base import Objective
from hanmo.training.optimizer import Optimizer
from test_trainer_laws import KILLED_RUNS

PLACES: tuple[tuple[Any, str], ...] = (
    (checkpoint, "write_safetensors"),  # of the weights, the optimizer, or the best weights
    (checkpoint, "write_json"),
    (folder, "seal"),
    (folder, "fsync_path"),
    (folder, "replace_folder"),
    (fit, "keep_weights"),
    (fit, "prune_weights"),
    (Trainer, "save"),
    (Trainer, "evaluate"),
    (Trainer, "record"),
    (Optimizer, "step"),
    (Objective, "loss"),  # in the middle of accumulation, or of an evaluation
)


def trap(run: Trainer[Any], place: tuple[Any, str], calls: int, after: bool) -> None:
    """Kill this process before or after so many calls of a function."""
    owner, name = (run.objective, "loss") if place[0] is Objective else place
    original: Callable[..., Any] = getattr(owner, name)
    left = calls

    def trapped(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, trapped)


def session(variant: str, path: Path, place: tuple[Any, str] | None, calls: int, after: bool) -> int:
    """One start of the run in a process of its own; returns how that ended, as ``os.waitpid`` tells it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        sys.stderr = (path.parent / "stderr").open("w")
        run = KILLED_RUNS[variant](path, resume=True)
        if place is not None:
            trap(run, place, calls, after)
        run.fit()
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main(variant: str, path: Path, kills: int) -> None:
    torch.set_num_threads(1)
    KILLED_RUNS[variant](path.parent / "warm")  # what is imported late is imported once, before the forks
    generator, places = np.random.default_rng(11), Counter[str]()
    for number in range(kills):
        place = PLACES[number % len(PLACES)]
        status = session(variant, path, place, int(generator.integers(1, 5)), bool(generator.integers(2)))
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            places[place[1]] += 1
        elif status:
            sys.exit((path.parent / "stderr").read_text())
    if session(variant, path, None, 0, False):
        sys.exit((path.parent / "stderr").read_text())
    print(json.dumps(places))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
