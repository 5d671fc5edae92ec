"""What the tests of several processes share: a small training, ways to end it, and programs that the processes run."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hanmo.errors import HanmoError, UsageError
from hanmo.models.adapters import LoraConfig, add_adapter
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.training.acceleration import checkpoint_blocks
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.launch import launch, leave
from hanmo.training.objectives import CausalLanguageModeling
from hanmo.training.optimizer import OptimizerSettings

CONFIG = TransformerConfig(61, 32, 3, 4, 2, 8, 48, 32, qk_norm=True, model_type="qwen3", dropout=0.1)
CPU = torch.device("cpu")
STEPS = 12


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
    run: Path,
    processes: Any,
    *,
    resume: bool = False,
    muon: bool = True,
    batch_size: int = 10,
    config: TransformerConfig = CONFIG,
    lora: bool = False,
    recompute: bool = False,
    **settings: Any,
) -> Trainer[Any]:
    model = Transformer(config)
    model.initialize(5 if processes.main else 6)  # the first process's weights are what counts
    if lora:
        add_adapter(model, "default", LoraConfig(4, 8.0), 0)
    if recompute:
        checkpoint_blocks(model)
    usual = {"max_steps": STEPS, "checkpoint_every": 4, "recipe": "r", "evaluations": 3, "clip": 0.5}
    fit = FitSettings(OptimizerSettings(muon=muon, eps=1e-6), **{**usual, **settings})
    goal = objective(batch_size=batch_size)
    return Trainer(model, goal, fit, run, device=CPU, resume=resume, processes=processes)


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


def program(module: str, scenario: str, root: Path) -> list[str]:
    """The command line of a process that runs ``scenario_<name>`` of a test module."""
    folder = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {folder!r}); from tests.distributed_cases import main; main()"
    return [sys.executable, "-c", code, module, scenario, str(root)]


def start(module: str, scenario: str, root: Path, **options: Any) -> int:
    """Run a scenario in two processes."""
    return launch(2, program(module, scenario, root), **options)


def main() -> None:
    """One process of a scenario; its exit code is that of the command line."""
    module, scenario, root = sys.argv[1:]
    leave(finished(lambda: vars(importlib.import_module(f"tests.{module}"))[f"scenario_{scenario}"](Path(root))))


def finished(scenario: Callable[[], None]) -> int:
    """The exit code of a scenario."""
    with contextlib.suppress(KeyError):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        scenario()
    except HanmoError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:  # a check failed: the launcher must not try again
        traceback.print_exc()
        return UsageError.exit_code
    return 0
