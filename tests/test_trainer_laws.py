"""Laws of the trainer: nothing changes the result but what the recipe says, and no failure loses a checkpoint."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hanmo.errors import DataError, ModelError, ResourceError
from hanmo.models.adapters import LoraConfig, add_adapter, load_adapter, save_adapter, train_only
from hanmo.models.kernels import native
from hanmo.models.recurrent import RecurrentConfig, RecurrentModel
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.training import checkpoint as checkpoints
from hanmo.training.checkpoint import TrainingState, load_newest, save_checkpoint
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.objectives import CausalLanguageModeling, TruncatedBackpropagation
from hanmo.training.objectives.base import Objective, Share
from hanmo.training.objectives.instructions import AnswerRow, InstructionTuning
from hanmo.training.optimizer import OptimizerSettings
from hanmo.training.processes import Processes
from hanmo.training.schedule import Schedule

CPU = torch.device("cpu")
CONFIG = TransformerConfig(61, 16, 2, 2, 1, 8, 24, 32, qk_norm=True, model_type="qwen3", dropout=0.1)
ADAMW = OptimizerSettings(muon=False, embedding_rate=0.01)


def tokens(length: int = 1200) -> np.ndarray:
    noise = np.random.default_rng(7).integers(0, 61, length)
    return np.where(noise < 40, (3 * np.arange(length) + 7) % 61, noise).astype(np.uint16)


def pretraining(micro_batch: int = 2, batch_size: int = 4, kind: Any = CausalLanguageModeling) -> Any:
    """Packed documents; an epoch is 15 steps."""
    return kind(
        tokens()[:1000], tokens()[1000:], context=16, batch_size=batch_size, micro_batch=micro_batch, seed=3,
        separator=0,
    )  # fmt: skip


def instructions(examples: int = 11, micro_batch: int = 2) -> InstructionTuning:
    """Packed conversations of which only the end counts."""
    generator, rows = np.random.default_rng(2), []
    for number in range(examples):
        ids = generator.integers(1, 61, int(generator.integers(4, 14)))
        targets = np.where(np.arange(len(ids)) < 2, -1, (ids * 3) % 61)
        rows.append(AnswerRow(ids.astype(np.int64), targets.astype(np.int64), f"chats.jsonl:{number + 1}"))
    return InstructionTuning(rows, rows, context=16, batch_size=4, micro_batch=micro_batch, seed=3)


def streams(micro_batch: int = 2) -> TruncatedBackpropagation:
    return TruncatedBackpropagation(
        tokens()[:1000], tokens()[1000:], context=12, batch_size=4, micro_batch=micro_batch, start_id=0, seed=3
    )


def trainer(
    run: Path,
    goal: Objective[Any, Any] | None = None,
    model: nn.Module | None = None,
    *,
    optimizer: OptimizerSettings | None = None,
    resume: bool = False,
    processes: Processes | None = None,
    trackers: tuple[Any, ...] = (),
    **settings: Any,
) -> Trainer[Any]:
    if model is None:
        model = Transformer(CONFIG)
        model.initialize(5)
    made = FitSettings(optimizer or OptimizerSettings(), recipe="r", **{"validation_tokens": 64, **settings})
    return Trainer(
        model, goal or pretraining(), made, run, device=CPU, resume=resume, processes=processes, trackers=trackers
    )


def adapted(rank: int = 4, config: TransformerConfig = CONFIG) -> Transformer:
    model = Transformer(config)
    model.initialize(5)
    add_adapter(model, "default", LoraConfig(rank=rank, dropout=0.1), seed=1)
    return model


def last_layer() -> Transformer:
    model = Transformer(CONFIG)
    model.initialize(5)
    train_only(model, last_layers=1)
    return model


def recurrent() -> RecurrentModel:
    torch.manual_seed(4)
    return RecurrentModel(RecurrentConfig("lstm", 61, 12, 12, 1, dropout=0.1))


def values(run: Trainer[Any]) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in run.weights.values()])


def logged(run: Path, name: str = "loss") -> dict[int, float]:
    """The last value of each step; what was repeated after a resumption counts once."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    return {entry["step"]: entry[name] for entry in entries if name in entry}


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


# Killed at every place -----------------------------------------------------------------------------------------------

KILLED_RUNS: dict[str, Callable[..., Trainer[Any]]] = {
    "pretraining": lambda run, **options: trainer(
        run, max_steps=150, checkpoint_every=2, evaluations=50, keep_best=2, average=0.9, **options
    ),
    "adapters": lambda run, **options: trainer(
        run, instructions(), adapted(), optimizer=ADAMW, max_steps=60, checkpoint_every=2, evaluations=30, **options
    ),
}


@pytest.mark.parametrize(("variant", "kills"), [("pretraining", 50), ("adapters", 12)])
def test_kills_at_every_place_change_nothing(variant: str, kills: int, tmp_path: Path) -> None:
    """Before or after a random call of each function that writes, evaluates or steps: see ``trainer_kills.py``."""
    torch.set_num_threads(1)
    whole = KILLED_RUNS[variant](tmp_path / "whole")
    whole.fit()
    script, run = Path(__file__).with_name("trainer_kills.py"), tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, str(script), variant, str(run), str(kills)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    places = json.loads(done.stdout)
    assert sum(places.values()) == kills, places
    assert len(places) == 12  # every one of them
    final = KILLED_RUNS[variant](run, resume=True)
    final.fit()
    assert torch.equal(values(whole), values(final))
    assert whole.state.kept == final.state.kept
    for name in ("loss", "validation_loss", "gradient_norm", "learning_rate"):
        assert logged(run, name) == logged(tmp_path / "whole", name)
    assert not [path for path in run.rglob("*.tmp-*") if path.is_dir()]


# Resumption in the middle of a step, for every way to train --------------------------------------------------------

WAYS: dict[str, Callable[[Path, bool], Trainer[Any]]] = {
    "muon": lambda run, resume: trainer(run, average=0.8, resume=resume, max_steps=20, checkpoint_every=4),
    "adamw": lambda run, resume: trainer(run, optimizer=ADAMW, resume=resume, max_steps=20, checkpoint_every=4),
    "last layer": lambda run, resume: trainer(run, model=last_layer(), resume=resume, max_steps=20, checkpoint_every=4),
    "adapters": lambda run, resume: trainer(
        run, instructions(), adapted(), optimizer=ADAMW, average=0.8, resume=resume, max_steps=20, checkpoint_every=4
    ),
    "streams": lambda run, resume: trainer(
        run, streams(), recurrent(), optimizer=ADAMW, resume=resume, max_steps=30, checkpoint_every=4
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_stop_between_two_micro_batches_changes_nothing(way: str, tmp_path: Path) -> None:
    whole = WAYS[way](tmp_path / "whole", False)
    whole.fit()
    first = WAYS[way](tmp_path / "parts", False)
    original, calls = first.objective.loss, iter(range(1000))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if model.training and first.state.step >= 13 and next(calls) == 1:
            raise KeyboardInterrupt
        return original(model, batch)

    first.objective.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = WAYS[way](tmp_path / "parts", True)
    second.fit()
    assert torch.equal(values(whole), values(second))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_only_trained_layers_are_in_a_checkpoint(tmp_path: Path) -> None:
    run = WAYS["last layer"](tmp_path, False)
    run.fit()
    found = load_newest(tmp_path / "checkpoints")
    assert found is not None and set(found.model) == set(run.weights)
    assert not any(".layers.0." in name or "embed" in name for name in found.model)


# Accumulation: the average and clipping do not depend on it --------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_average_and_clipping_do_not_depend_on_the_micro_batch(micro_batch: int, clip: float, tmp_path: Path) -> None:
    runs = []
    for size in (4, micro_batch):
        model = Transformer(replace(CONFIG, dropout=0.0)).double()
        model.initialize(5)
        runs.append(trainer(tmp_path / str(size), pretraining(size), model, max_steps=6, clip=clip, average=0.7))
        runs[-1].fit()
    for one, other in zip(runs[0].average.values(), runs[1].average.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert runs[0].average and runs[0].average.keys() == runs[1].average.keys()


def test_the_gradient_is_clipped_to_its_limit(tmp_path: Path) -> None:
    run, norms = trainer(tmp_path, max_steps=3, clip=0.05), []
    original = run.optimizer.step

    def step(scale: float) -> None:
        gradients = [p.grad.flatten() for p in run.weights.values() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        original(scale)

    run.optimizer.step = step  # type: ignore[method-assign]
    run.fit()
    assert norms == pytest.approx([0.05] * 3, rel=1e-3)
    assert min(logged(tmp_path, "gradient_norm").values()) > 0.05  # what it was before


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(warmup_steps=0, cooldown=1.0, final=0.0), [1.0, 0.75, 0.5, 0.25]),
        (Schedule(warmup_steps=2, cooldown=0.5, final=0.1), [0.5, 1.0, 1.0, 0.5]),
        (Schedule(warmup_steps=0, warmup=0.5, cooldown=0.5, final=0.1), [0.02, 0.5, 1.0, 0.5]),
    ],
)
def test_the_rate_follows_its_schedule(schedule: Schedule, expected: list[float], tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, schedule=schedule).fit()
    rates = [rate / OptimizerSettings().peak_rate for rate in logged(tmp_path, "learning_rate").values()]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_the_average_is_what_is_validated_and_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=8, average=0.5, evaluations=2, validation_tokens=10_000)
    original, seen = run.evaluate, []

    def evaluate(due: int) -> None:
        seen.append({name: value.clone() for name, value in run.average.items()})
        original(due)
        assert all(not torch.equal(run.weights[name], value) for name, value in run.average.items())

    run.evaluate = evaluate  # type: ignore[method-assign]
    run.fit()
    kept = load_file(tmp_path / "best" / "step-00000004" / "model.safetensors")
    assert len(seen) == 1 and all(torch.equal(kept[name], value) for name, value in seen[0].items())
    other = trainer(tmp_path / "other")
    other.put(kept)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [entry["validation_loss"] for entry in entries if "validation_loss" in entry and "whole" not in entry]
    assert losses == [round(other.validate(10_000)["loss"], 6)]


# Damaged and full disks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "hanmo.json"])
@pytest.mark.parametrize("place", [0.0, 0.5])
def test_after_a_damaged_checkpoint_the_run_goes_on_from_the_one_before(
    name: str, place: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"max_steps": 10, "checkpoint_every": 3, "evaluations": 5}
    whole = trainer(tmp_path / "whole", **options)
    whole.fit()
    run = trainer(tmp_path / "parts", **options)
    run.finish = lambda *_: None  # type: ignore[method-assign, assignment, return-value]
    run.fit()
    newest = tmp_path / "parts" / "checkpoints" / "step-00000010"
    flip(newest / name, place)
    second = trainer(tmp_path / "parts", resume=True, **options)
    second.fit()
    assert "passed over" in (told := capsys.readouterr().err) and "step-00000010" in told
    assert torch.equal(values(whole), values(second))


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    """Two are kept: the one that was passed over must not be one of them."""
    for step in (2, 20):
        save_checkpoint(tmp_path, {"w": torch.full((3,), float(step))}, {}, TrainingState(step=step))
    flip(tmp_path / "step-00000020" / "state.json", 0.0)
    for step in (4, 6):
        assert load_newest(tmp_path) is not None
        save_checkpoint(tmp_path, {"w": torch.full((3,), float(step))}, {}, TrainingState(step=step))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000006"]


def test_an_older_checkpoint_that_is_damaged_does_not_stop_the_run(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=8, checkpoint_every=2).fit()
    for folder in checkpoints.step_folders(tmp_path / "checkpoints")[:-1]:
        (folder / "state.json").write_text("{")
    assert trainer(tmp_path, max_steps=8, checkpoint_every=2, resume=True).fit().steps == 8


def test_all_damaged_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, checkpoint_every=2).fit()
    for path in (tmp_path / "checkpoints").rglob("model.safetensors"):
        flip(path)
    with pytest.raises(ModelError, match="all 2 checkpoints are damaged") as failure:
        trainer(tmp_path, max_steps=4, resume=True).fit()
    assert "--out" in str(failure.value)


@pytest.mark.parametrize("folder", ["best", "checkpoints"])
def test_a_full_disk_stops_the_run_and_loses_nothing(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_steps": 12, "checkpoint_every": 3, "evaluations": 6}
    whole = trainer(tmp_path / "whole", **options)
    whole.fit()
    original, writes = checkpoints.write_safetensors, iter(range(1000))

    def full(path: Path, given: Any) -> None:
        if path.parent.parent.name == folder and next(writes) >= 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_safetensors", full)
        with pytest.raises(ResourceError, match="No space left"):
            trainer(tmp_path / "parts", **options).fit()
    found = load_newest(tmp_path / "parts" / "checkpoints")
    assert found is not None and found.state.step == (6 if folder == "best" else 3)
    assert not list((tmp_path / "parts").rglob(".step-*"))
    second = trainer(tmp_path / "parts", resume=True, **options)
    second.fit()
    assert torch.equal(values(whole), values(second))


# Values that are no numbers ----------------------------------------------------------------------------------------


def test_the_micro_batch_that_is_not_finite_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path, instructions(), adapted(), optimizer=ADAMW, max_steps=10, checkpoint_every=2)
    original, before = run.objective.loss, {}

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        before.setdefault("calls", -1)
        if not model.training or run.state.step != 3:
            return original(model, batch)
        before["calls"] += 1
        before.setdefault("weights", values(run))
        return original(model, batch) * (math.inf if before["calls"] == 1 else 1.0)

    run.objective.loss = loss  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="at step 3") as failure:
        run.fit()
    assert "chats.jsonl:" in str(failure.value) and "micro-batch 1" in str(failure.value)
    assert torch.equal(values(run), before["weights"])


def test_a_gradient_that_is_no_number_stops_before_the_weights_change(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=10, checkpoint_every=2)
    name = next(iter(run.weights))
    before: list[torch.Tensor] = []

    def poisoned(gradient: torch.Tensor) -> torch.Tensor:
        if run.state.step != 5:
            return gradient
        before.append(values(run))
        return gradient * math.nan

    run.weights[name].register_hook(poisoned)
    with pytest.raises(ModelError, match="norm of its gradient nan at step 5") as failure:
        run.fit()
    assert "windows of 16 tokens" in str(failure.value)
    assert torch.equal(values(run), before[0])
    assert 6 not in logged(tmp_path)
    found = load_newest(tmp_path / "checkpoints")
    assert found is not None and found.state.step == 4


def test_a_validation_loss_that_is_no_number_is_never_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, max_steps=8, evaluations=4)
    results = iter([math.nan, 2.0, 3.0, math.nan, 2.0])
    run.validate = lambda _=None: {"loss": next(results)}  # type: ignore[method-assign, assignment]
    result = run.fit()
    assert run.state.kept == [(2.0, 4)]
    assert result.best_step == 4 and result.validation_loss == 2.0
    assert "cannot be read" not in capsys.readouterr().err


# Memory --------------------------------------------------------------------------------------------------------------


def out_of_memory_once(run: Trainer[Any], at: int, call: int) -> None:
    """Let memory run out in one micro-batch of one step."""
    original, calls = run.objective.loss, iter(range(1000))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        result = original(model, batch)
        if model.training and run.state.step >= at and next(calls) == call:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you ..."
            )
        return result

    run.objective.loss = loss  # type: ignore[method-assign]


def test_less_memory_gives_the_same_result_and_resumption_keeps_the_smaller_micro_batch(tmp_path: Path) -> None:
    model = Transformer(replace(CONFIG, dropout=0.0)).double()
    model.initialize(5)
    short = trainer(tmp_path / "short", pretraining(4), model, max_steps=6, checkpoint_every=2)
    out_of_memory_once(short, 1, 0)
    short.fit()
    model = Transformer(replace(CONFIG, dropout=0.0)).double()
    model.initialize(5)
    whole = trainer(tmp_path / "whole", pretraining(4), model, max_steps=6)
    whole.fit()
    torch.testing.assert_close(values(short), values(whole), rtol=1e-5, atol=1e-7)
    again = trainer(tmp_path / "short", pretraining(4), max_steps=6, resume=True)
    again.model.double()
    again.restore()
    assert again.objective.micro_batch == again.state.micro_batch == 2


@pytest.mark.parametrize("call", [0, 1])
def test_resumption_after_memory_ran_out_changes_nothing(call: int, tmp_path: Path) -> None:
    """Dropout on: its noise depends on the micro-batches, so that these have to be the same after the stop."""

    def start(path: Path, resume: bool = False) -> Trainer[Any]:
        return trainer(path, pretraining(2, 4), max_steps=12, checkpoint_every=3, resume=resume)

    whole = start(tmp_path / "whole")
    out_of_memory_once(whole, 2, call)
    whole.fit()
    first = start(tmp_path / "parts")
    out_of_memory_once(first, 2, call)
    original = first.step

    def step(done: float) -> float:
        if first.state.step == 8:
            raise KeyboardInterrupt
        return original(done)

    first.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = start(tmp_path / "parts", resume=True)
    second.fit()
    assert second.objective.micro_batch == 1
    assert torch.equal(values(whole), values(second))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_streams_begin_a_repeated_step_where_they_began_it_before(tmp_path: Path) -> None:
    """What the first micro-batches carried on before memory ran out must not be carried on twice."""
    runs = []
    for name, micro_batch in (("short", 2), ("whole", 1)):
        torch.manual_seed(4)
        model = RecurrentModel(RecurrentConfig("lstm", 61, 12, 12, 1))
        runs.append(trainer(tmp_path / name, streams(micro_batch), model, optimizer=ADAMW, max_steps=12))
    out_of_memory_once(runs[0], 5, 1)  # in the second micro-batch: the state of the first has moved on
    for run in runs:
        run.fit()
    assert runs[0].objective.micro_batch == 1
    torch.testing.assert_close(values(runs[0]), values(runs[1]), rtol=1e-3, atol=1e-4)
    losses = [logged(tmp_path / name) for name in ("short", "whole")]
    assert list(losses[0].values()) == pytest.approx(list(losses[1].values()), abs=2e-4)


def test_memory_that_runs_out_in_an_evaluation_halves_the_micro_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, instructions(micro_batch=4), max_steps=4, evaluations=2)
    original = run.objective.measure

    def measure(model: nn.Module, batch: Any) -> dict[str, tuple[float, float]]:
        if len(batch.ids) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(model, batch)

    run.objective.measure = measure  # type: ignore[method-assign]
    assert math.isfinite(run.fit().validation_loss)
    assert "micro-batch 2 -> 1" in capsys.readouterr().err


# Signals -------------------------------------------------------------------------------------------------------------

STOPPED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_trainer_laws import trainer
torch.set_num_threads(1)
trainer(Path(sys.argv[1]), max_steps=1_000_000).fit()
"""


def test_sigterm_saves_and_the_run_can_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STOPPED, str(tmp_path), str(Path(__file__).parent)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "log.jsonl", time.monotonic() + 50
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=50)
    assert process.returncode == 1 and "a checkpoint was saved" in told, told
    found = load_newest(tmp_path / "checkpoints")
    assert found is not None and found.state.step == max(logged(tmp_path))


# Little data, other recipes and bases, and who is told --------------------------------------------------------------


def test_fewer_examples_than_a_batch_are_one_batch(tmp_path: Path) -> None:
    goal = instructions(1)
    assert goal.batch_size == 1
    result = trainer(tmp_path, goal, max_steps=30, optimizer=ADAMW).fit()
    losses = list(logged(tmp_path).values())
    assert losses[-1] < losses[0] and math.isfinite(result.validation_loss)


def test_a_corpus_of_one_window_trains(tmp_path: Path) -> None:
    text = tokens()[:17]
    goal = CausalLanguageModeling(text, text, context=16, batch_size=8, micro_batch=8, seed=0)
    assert trainer(tmp_path, goal, max_steps=3).fit().tokens == 3 * 8 * 16


def test_no_examples_are_an_error_that_names_the_split() -> None:
    rows = [AnswerRow(np.array([1, 2]), np.array([-1, 3]))]
    with pytest.raises(DataError, match="no validation example"):
        InstructionTuning(rows, [], context=16, batch_size=4, micro_batch=2, seed=0)
    with pytest.raises(DataError, match="no training example"):
        InstructionTuning([], rows, context=16, batch_size=4, micro_batch=2, seed=0)
    with pytest.raises(DataError, match="validation split is empty"):
        TruncatedBackpropagation(tokens(), tokens()[:0], context=4, batch_size=2, micro_batch=2, start_id=0, seed=0)


def test_validation_data_without_an_example_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.objective.validation_batches = lambda *_: iter(())  # type: ignore[method-assign]
    with pytest.raises(DataError, match="no example"):
        run.fit()


def test_best_weights_that_are_gone_are_told_and_the_last_ones_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tmp_path, max_steps=8, evaluations=4)
    results = iter([1.0, 2.0, 3.0, 4.0])
    run.validate = lambda _=None: {"loss": next(results)}  # type: ignore[method-assign, assignment]
    original = run.finish

    def finish(tokens: int, seconds: float) -> Any:
        shutil.rmtree(tmp_path / "best")
        return original(tokens, seconds)

    run.finish = finish  # type: ignore[method-assign]
    assert run.fit().best_step == 8
    assert "cannot be read" in capsys.readouterr().err


def test_an_adapter_of_another_base_names_both(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", adapted(), "default", base="模型/甲")
    wider = Transformer(replace(CONFIG, hidden_size=32))
    with pytest.raises(ModelError, match="does not fit this network") as failure:
        load_adapter(tmp_path / "adapter", wider, base="models/b")
    assert "模型/甲" in str(failure.value) and "models/b" in str(failure.value)
    same_shape = Transformer(CONFIG)
    same_shape.initialize(6)
    with pytest.raises(ModelError, match="trained on other weights"):
        load_adapter(tmp_path / "adapter", same_shape)
    assert not any(".adapters." in name for name, _ in same_shape.named_parameters())


def test_only_the_main_process_tells_trackers_and_writes_the_log(tmp_path: Path) -> None:
    class Second(Processes):
        share = Share(1, 2)

        def on_main(self, action: Callable[[], Any]) -> Any: ...

    class Listener:
        def log(self, entry: Any) -> None:
            raise AssertionError(entry)

        def close(self) -> None: ...

    run = trainer(tmp_path, max_steps=2, processes=Second(), trackers=(Listener(),))
    run.validate = lambda _=None: {"loss": 1.0}  # type: ignore[method-assign, assignment]
    run.fit()
    assert not (tmp_path / "log.jsonl").exists() and not (tmp_path / "checkpoints").exists()


# Packing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_the_gradient_of_a_packed_window_is_that_of_its_documents(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and every gradient; native kernels on and off."""
    if not fast:
        monkeypatch.setattr(native, "usable", lambda *_: False)
    model = Transformer(replace(CONFIG, dropout=0.0))
    model.initialize(5)
    with torch.no_grad():  # output projections start at zero and would hide the attention
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    lengths = (5, 1, 9, 12)
    documents = [torch.randint(1, 61, (size,), generator=torch.Generator().manual_seed(size)) for size in lengths]
    stream = torch.cat([torch.cat((torch.tensor([0]), document)) for document in documents])
    text = stream.numpy().astype(np.uint16)
    goal = CausalLanguageModeling(
        text, text, context=len(text) - 1, batch_size=1, micro_batch=1, seed=0, separator=0
    )  # fmt: skip
    (batch,) = goal.micro_batches(0)
    packed = goal.loss(model, batch)
    packed.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    alone = torch.zeros(())
    for number, document in enumerate(documents):
        row = torch.cat((torch.tensor([0]), document, torch.tensor([0])))[None]
        row = row[:, :-1] if number == len(documents) - 1 else row
        alone = alone + model.loss(row[:, :-1], row[:, 1:])
    alone.backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)
    for one, parameter in zip(gradients, [p for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-3, atol=1e-4)
