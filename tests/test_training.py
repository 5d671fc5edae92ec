"""The trainer: the laws of accumulation and resumption, checkpoints, and what it does when something goes wrong."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hanmo.errors import DataError, Interrupted, ModelError, ResourceError, UsageError
from hanmo.evaluation.report import read_log
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.progress import RunLog
from hanmo.training import checkpoint as checkpoints
from hanmo.training.checkpoint import TrainingState, load_newest, run_lock, save_checkpoint
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.objectives import CausalLanguageModeling
from hanmo.training.optimizer import Optimizer, OptimizerSettings, orthogonalize
from hanmo.training.schedule import Schedule

CONFIG = TransformerConfig(61, 32, 2, 4, 2, 8, 48, 32, qk_norm=True, model_type="qwen3")
CPU = torch.device("cpu")


def corpus(length: int = 4000) -> np.ndarray:
    """Tokens with structure: each follows from the one before it, with some noise."""
    generator = np.random.default_rng(7)
    tokens = [1, 2]
    for noise in generator.integers(0, 61, length):
        tokens.append((3 * tokens[-1] + 7) % 61 if noise < 50 else int(noise))
    return np.array(tokens, dtype=np.uint16)


def objective(micro_batch: int = 8, batch_size: int = 8) -> CausalLanguageModeling:
    tokens = corpus()
    return CausalLanguageModeling(
        tokens[:3500], tokens[3500:], context=16, batch_size=batch_size, micro_batch=micro_batch, seed=3
    )


def trainer(run: Path, *, resume: bool = False, micro_batch: int = 8, recipe: str = "r", **options: object) -> Trainer:
    model = Transformer(CONFIG)
    model.initialize(5)
    settings = FitSettings(OptimizerSettings(), recipe=recipe, **options)  # type: ignore[arg-type]
    return Trainer(model, objective(micro_batch), settings, run, device=CPU, resume=resume)


def losses(run: Path) -> dict[int, float]:
    """The logged loss of each step; a step that was repeated after a resumption counts once, its last value."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def same_weights(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# Law: accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_any_split_of_a_batch_gives_the_same_gradient(micro_batch: int) -> None:
    gradients = []
    for size in (32, micro_batch):
        model = Transformer(CONFIG).double()
        model.initialize(5)
        with torch.no_grad():  # the output projections start at zero and would hide the gradients behind them
            for parameter in model.parameters():
                parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel(), dtype=torch.float64).view_as(parameter))
        goal = objective(size, batch_size=32)
        for batch in goal.micro_batches(4):
            (goal.loss(model, batch) / goal.step_weight(4)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0.01
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_targets_that_do_not_count_change_nothing() -> None:
    model = Transformer(CONFIG)
    model.initialize(0)
    ids = torch.randint(0, 61, (2, 9))
    targets = torch.randint(0, 61, (2, 9))
    full = model.loss(ids, targets)
    masked = targets.clone()
    masked[0, 3:] = -1
    alone = model.loss(ids[1:], targets[1:]) + model.loss(ids[:1, :3], targets[:1, :3])
    torch.testing.assert_close(model.loss(ids, masked), alone, rtol=1e-5, atol=1e-4)
    assert full > alone


def test_loss_in_chunks_equals_loss_at_once() -> None:
    model = Transformer(CONFIG)
    model.initialize(0)
    ids, targets = torch.randint(0, 61, (3, 17)), torch.randint(0, 61, (3, 17))
    torch.testing.assert_close(model.loss(ids, targets, chunk=7), model.loss(ids, targets), rtol=1e-6, atol=1e-4)


# Law: resumption -----------------------------------------------------------------------------------------------------


def test_stopping_and_resuming_equals_one_run_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", max_steps=30, checkpoint_every=7)
    whole.fit()
    first = trainer(tmp_path / "parts", max_steps=30, checkpoint_every=7)
    steps = iter(range(100))
    original = first.step

    def interrupted(done: float) -> float:
        if next(steps) == 16:
            raise KeyboardInterrupt
        return original(done)

    first.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = trainer(tmp_path / "parts", max_steps=30, checkpoint_every=7, resume=True)
    second.fit()
    assert same_weights(whole.model, second.model)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_training import trainer
torch.set_num_threads(1)
trainer(Path(sys.argv[1]), max_steps=60, checkpoint_every=3, resume=True).fit()
"""


def test_kill_minus_nine_at_random_points(tmp_path: Path) -> None:
    """Start, kill, start again...: the weights and every logged loss are those of a run that nobody disturbed."""
    torch.set_num_threads(1)
    whole = trainer(tmp_path / "whole", max_steps=60, checkpoint_every=3)
    whole.fit()
    run, generator, kills = tmp_path / "killed", random.Random(11), 0
    command = [sys.executable, "-c", KILLED, str(run), str(Path(__file__).parent)]
    for _ in range(12):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        # wait until this session has written something of its own, then a random moment more
        mark = (run / "log.jsonl").stat().st_size if (run / "log.jsonl").exists() else 0
        while process.poll() is None and not (
            (run / "log.jsonl").exists() and (run / "log.jsonl").stat().st_size > mark
        ):
            time.sleep(0.002)
        time.sleep(generator.random() * 0.15)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert kills >= 1
    assert subprocess.run(command, check=False, stderr=subprocess.PIPE).returncode == 0
    final = trainer(run, max_steps=60, checkpoint_every=3, resume=True)
    final.fit()
    assert same_weights(whole.model, final.model)
    assert losses(run) == losses(tmp_path / "whole")


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, checkpoint_every=2, recipe="one").fit()
    with pytest.raises(ModelError, match="another recipe"):
        trainer(tmp_path, max_steps=4, recipe="two", resume=True).fit()


def test_a_log_with_repeated_steps_reads_as_one_run(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "validation_loss": 2.5}]
    again = [{"step": 2, "loss": 2.0}, {"step": 2, "validation_loss": 2.5}, {"step": 3, "loss": 1.0}]
    log.write_text("\n".join(json.dumps(entry) for entry in lines) + '\n{"step": 3, "lo')
    continued = RunLog(log)  # the line that the kill cut off must not swallow the next one
    for entry in again:
        continued.write(**entry)
    continued.close()
    assert read_log(log) == [lines[0], *again]


def test_batches_are_a_function_of_seed_and_step() -> None:
    a, b = objective(), objective()
    for step in (0, 40, 3):
        for left, right in zip(a.micro_batches(step), b.micro_batches(step), strict=True):
            assert torch.equal(left.ids, right.ids)
    first, second = next(iter(a.micro_batches(0))), next(iter(a.micro_batches(1)))
    assert not torch.equal(first.ids, second.ids)


def test_an_epoch_visits_every_window_once() -> None:
    goal = objective()
    starts = [goal.window_start(sample) for sample in range(goal.windows)]
    assert len(set(starts)) == goal.windows
    assert min(starts) >= 0 and max(starts) + goal.context + 1 <= len(goal.train)
    assert {start % goal.context for start in starts} == {goal.offset % goal.context}


# Checkpoints ---------------------------------------------------------------------------------------------------------


def write_two(root: Path) -> None:
    for step in (1, 2):
        save_checkpoint(root, {"w": torch.full((3,), float(step))}, {"m": torch.zeros(2)}, TrainingState(step=step))


def test_a_flipped_byte_is_found_and_the_older_checkpoint_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_two(tmp_path)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        damaged = tmp_path / f"copy-{name}"
        shutil.copytree(tmp_path / "step-00000001", damaged / "step-00000001")
        shutil.copytree(tmp_path / "step-00000002", damaged / "step-00000002")
        path = damaged / "step-00000002" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        found = load_newest(damaged)
        assert found is not None and found.state.step == 1
        assert "passed over" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_found(tmp_path: Path) -> None:
    write_two(tmp_path)
    for folder in tmp_path.iterdir():
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ModelError, match="damaged"):
        load_newest(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_two(tmp_path)

    def full(path: Path, _tensors: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    with pytest.raises(ResourceError, match="No space left"):
        save_checkpoint(tmp_path, {}, {}, TrainingState(step=3))
    found = load_newest(tmp_path)
    assert found is not None and found.state.step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_without_its_manifest_is_passed_over(tmp_path: Path) -> None:
    write_two(tmp_path)
    (tmp_path / "step-00000002" / "hanmo.json").unlink()
    found = load_newest(tmp_path)
    assert found is not None and found.state.step == 1


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.tmp-999999").mkdir(parents=True)
    write_two(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_budget_ends_after_enough_tokens(tmp_path: Path) -> None:
    assert trainer(tmp_path, budget_seconds=1e6, max_tokens=1280).fit().steps == 10


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in range(5):
        save_checkpoint(tmp_path, {"w": torch.zeros(1)}, {}, TrainingState(step=step))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000003", "step-00000004"]


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(UsageError, match="another process"), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):  # and the lock is free again
        pass


# The loop ------------------------------------------------------------------------------------------------------------


def test_training_learns_and_keeps_the_best_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=150)
    before = run.validate()["loss"]
    result = run.fit()
    assert result.validation_loss < before - 0.5
    assert abs(run.validate()["loss"] - result.validation_loss) < 1e-6
    assert result.tokens == 150 * 8 * 16


def test_overfitting_is_undone(tmp_path: Path) -> None:
    """With a validation split of another kind the loss there rises: the weights of its lowest point are kept."""
    tokens = corpus()
    goal = CausalLanguageModeling(tokens[:200], tokens[3000:], context=16, batch_size=8, micro_batch=8, seed=3)
    run = trainer(tmp_path, max_steps=200)
    run.objective = goal
    result = run.fit()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    evaluations = [entry["validation_loss"] for entry in logged if "validation_loss" in entry]
    assert result.best_step < 200
    assert abs(result.validation_loss - min(evaluations)) < 1e-5


def test_a_budget_ends_in_time(tmp_path: Path) -> None:
    start = time.monotonic()
    result = trainer(tmp_path, budget_seconds=1.0).fit()
    assert 0.9 < result.seconds < time.monotonic() - start + 0.1
    assert result.steps > 3


def test_control_c_saves_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=10_000)
    original, before = run.step, signal.getsignal(signal.SIGINT)

    def step(done: float) -> float:
        if run.state.step == 5:
            signal.raise_signal(signal.SIGINT)
        return original(done)

    run.step = step  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="checkpoint was saved"):
        run.fit()
    found = load_newest(tmp_path / "checkpoints")
    assert found is not None and found.state.step == 6
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=20, checkpoint_every=2)
    original = run.step

    def step(done: float) -> float:
        if run.state.step == 5:
            with torch.no_grad():
                run.model.model.norm.weight.fill_(float("nan"))
        return original(done)

    run.step = step  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="at step 5"):
        run.fit()
    found = load_newest(tmp_path / "checkpoints")
    assert found is not None and found.state.step == 4
    assert all(torch.isfinite(tensor).all() for tensor in found.model.values())


def test_a_split_shorter_than_a_window_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"--context"):
        CausalLanguageModeling(corpus(), corpus()[:10], context=16, batch_size=2, micro_batch=2, seed=0)


def test_schedule_warms_up_holds_and_falls() -> None:
    values = [Schedule().scale(step / 1000, step) for step in range(1001)]
    assert values[0] == pytest.approx(1 / 20) and values[100] == 1.0 and values[400] == 1.0
    assert values[1000] == pytest.approx(0.02)
    assert all(a >= b for a, b in pairwise(values[20:]))


# The optimizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 24, 24), (1, 16, 40), (3, 40, 16)])
def test_orthogonalized_updates_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.min() > 0.15 and values.max() < 1.3  # before: from near 0 to about 10


def test_optimizer_state_survives_a_round_trip() -> None:
    models = [Transformer(CONFIG) for _ in range(2)]
    optimizers = []
    goal = objective()
    for model in models:
        model.initialize(1)
        optimizers.append(Optimizer(model, OptimizerSettings()))
    for step in range(3):
        for batch in goal.micro_batches(step):
            (goal.loss(models[0], batch) / 128).backward()
        optimizers[0].step(1.0)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_tensors({k: v.clone() for k, v in optimizers[0].state_tensors().items()})
    for model, optimizer in zip(models, optimizers, strict=True):
        for batch in goal.micro_batches(3):
            (goal.loss(model, batch) / 128).backward()
        optimizer.step(0.5)
    assert same_weights(*models)


def test_every_parameter_is_trained() -> None:
    model = Transformer(dataclasses.replace(CONFIG, tie_embeddings=False, attention_bias=True, mlp_bias=True))
    model.initialize(1)
    optimizer = Optimizer(model, OptimizerSettings())
    goal = objective()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        for batch in goal.micro_batches(step):
            (goal.loss(model, batch) / 128).backward()
        optimizer.step(1.0)
    unchanged = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    # softmax does not feel a constant added to all keys; their bias has no gradient worth a step
    assert [name for name in unchanged if not name.endswith("k_proj.bias")] == []
