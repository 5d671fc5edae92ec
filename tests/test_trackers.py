"""Trackers: the names and values of the log reach TensorBoard, Weights & Biases and MLflow, each step once."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hanmo.cli.main import main
from hanmo.errors import Interrupted, ResourceError, UsageError
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.training import trackers
from hanmo.training.fit import FitSettings, Trainer
from hanmo.training.objectives import CausalLanguageModeling
from hanmo.training.optimizer import OptimizerSettings
from hanmo.training.processes import Processes
from hanmo.training.trackers import open_trackers

CONFIG = TransformerConfig(61, 16, 1, 2, 1, 8, 24, 32, qk_norm=True, model_type="qwen3")
STEPS = 12
SETTINGS = {"seed": 0, "note": "x" * 900, "resume": False}


def trainer(run: Path, told: tuple[Any, ...], **options: Any) -> Trainer[Transformer]:
    model = Transformer(CONFIG)
    model.initialize(1)
    tokens = np.random.default_rng(0).integers(0, 61, 900).astype(np.uint16)
    goal = CausalLanguageModeling(tokens[:700], tokens[700:], context=16, batch_size=2, micro_batch=2, seed=0)
    settings = FitSettings(OptimizerSettings(), max_steps=STEPS, checkpoint_every=4, evaluations=3, recipe="r")
    return Trainer(model, goal, settings, run, device=torch.device("cpu"), trackers=told, **options)


def train(run: Path, *names: str, stop_at: int | None = None, resume: bool = False) -> None:
    """Train with trackers; ``stop_at``: the process dies at that step, after its last checkpoint."""
    told = open_trackers(list(names), run, {**SETTINGS, "resume": resume}, offline=True)
    run_of = trainer(run, told, resume=resume)
    original = run_of.step

    def step(done: float) -> float:
        if run_of.state.step == stop_at:
            raise Interrupted("killed")
        return original(done)

    run_of.step = step  # type: ignore[method-assign]
    try:
        run_of.fit()
    except Interrupted:
        assert stop_at is not None
    finally:
        for tracker in told:
            tracker.close()


def expected(run: Path) -> dict[str, dict[int, float]]:
    """The curves that the log describes: each step once, the closing measure where the training ended."""
    curves: dict[str, dict[int, float]] = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        step = STEPS if entry.get("whole") else entry["step"]
        also = ("step", "whole") if "loss" in entry else ("step", "whole", "tokens", "elapsed")
        for name, value in entry.items():
            if name not in also:
                curves.setdefault(name, {})[step] = value
    return curves


def same(found: Mapping[str, Mapping[int, float]], run: Path) -> None:
    wanted = expected(run)
    assert set(found) == set(wanted) >= {"loss", "learning_rate", "gradient_norm", "tokens", "validation_loss"}
    for name, points in wanted.items():
        if name != "elapsed":  # steps that were done again took another time
            assert found[name] == pytest.approx(points, rel=1e-6), name
        assert sorted(found[name]) == sorted(points)


# TensorBoard, for real -----------------------------------------------------------------------------------------------


def event_curves(run: Path) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    """Curves in the event files as TensorBoard shows them, and how many points each has."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    curves = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert events.Tags()["tensors"] == ["settings/text_summary"]
    return curves, {name: len(events.Scalars(name)) for name in curves}


def test_tensorboard_has_the_names_and_values_of_the_log(tmp_path: Path) -> None:
    train(tmp_path, "tensorboard")
    curves, counts = event_curves(tmp_path)
    same(curves, tmp_path)
    assert counts["loss"] == STEPS and counts["validation_loss"] == 3


def test_a_resumed_run_has_each_step_once_in_tensorboard(tmp_path: Path) -> None:
    train(tmp_path, "tensorboard", stop_at=7)  # the newest checkpoint is of step 4
    train(tmp_path, "tensorboard", resume=True)
    curves, counts = event_curves(tmp_path)
    same(curves, tmp_path)
    assert counts["loss"] == STEPS and counts["validation_loss"] == 3
    train(tmp_path, "tensorboard", resume=True)  # nothing is left to do: the closing measure is not told again
    assert event_curves(tmp_path)[1] == counts


def test_a_run_that_starts_anew_hides_the_old_curves(tmp_path: Path) -> None:
    train(tmp_path, "tensorboard")
    (tmp_path / "log.jsonl").unlink()
    train(tmp_path, "tensorboard", stop_at=7)
    curves, _ = event_curves(tmp_path)
    assert max(curves["loss"]) == 7


# Weights & Biases and MLflow, with the calls that the packages take ---------------------------------------------------


class FakeWandb(types.ModuleType):
    """What ``wandb`` 0.31 takes: ``init`` with keywords gives a run; a step below the last one is dropped there."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)  # installed, as far as Python can tell
        self.begun: list[dict[str, Any]] = []
        self.curves: dict[str, dict[str, dict[int, float]]] = {}
        self.points: list[tuple[str, int, str]] = []
        self.finished = 0
        self.broken_from: int | None = None

    def init(self, *, dir: str, id: str, resume: str, **more: Any) -> Any:
        assert set(more) <= {"project", "name", "config", "mode"} and resume == "allow" and Path(dir).is_dir()
        self.begun.append({"id": id, **more})
        return types.SimpleNamespace(log=lambda data, step: self.log(id, data, step), finish=self.finish)

    def log(self, id: str, data: dict[str, float], step: int) -> None:
        if self.broken_from is not None and step >= self.broken_from:
            raise ConnectionError("the network is down\nmore lines")
        for name, value in data.items():
            self.curves.setdefault(id, {}).setdefault(name, {})[step] = value
            self.points.append((id, step, name))

    def finish(self) -> None:
        self.finished += 1


class FakeMlflow(types.ModuleType):
    """What ``mlflow`` 3's client takes. Like the real one it keeps every point, and refuses to change a parameter."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = ModuleSpec("mlflow", None)
        self.entities = types.SimpleNamespace(
            Metric=lambda key, value, timestamp, step: types.SimpleNamespace(
                key=key, value=value, timestamp=timestamp, step=step
            ),
            Param=lambda key, value: (key, value),
        )
        self.runs: dict[str, list[Any]] = {}
        self.params: dict[tuple[str, str], str] = {}
        self.status: dict[str, str] = {}
        self.addresses: list[str] = []
        self.experiments: dict[str, str] = {}
        self.batches: list[int] = []

    def MlflowClient(self, tracking_uri: str) -> Any:
        self.addresses.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return types.SimpleNamespace(experiment_id="1") if name in self.experiments else None

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        self.experiments[name] = artifact_location or ""
        return "1"

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        assert experiment_id == "1" and run_name
        id = f"run-{len(self.runs)}"
        self.runs[id], self.status[id] = [], "RUNNING"
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=id))

    def update_run(self, run_id: str, status: str) -> None:
        self.status[run_id] = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000 and len(params) <= 100
        for key, value in params:
            assert len(value) <= 6000 and self.params.setdefault((run_id, key), value) == value
        self.batches.append(len(metrics))
        self.runs[run_id] += metrics

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [metric for metric in self.runs[run_id] if metric.key == key]

    def set_terminated(self, run_id: str) -> None:
        self.status[run_id] = "FINISHED"

    def curves(self, run_id: str) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for metric in self.runs[run_id]:
            assert metric.step not in found.get(metric.key, {}), f"{metric.key} has step {metric.step} twice"
            found.setdefault(metric.key, {})[metric.step] = metric.value
        return found


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return fake


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path: Path, wandb: FakeWandb) -> None:
    train(tmp_path, "wandb", stop_at=7)
    train(tmp_path, "wandb", resume=True)
    first, second = wandb.begun
    assert first["id"] == second["id"] and first["project"] == "hanmo" and first["name"] == tmp_path.name
    assert first["mode"] == "offline" and first["config"]["seed"] == 0
    same(wandb.curves[first["id"]], tmp_path)
    assert len(wandb.points) == len(set(wandb.points)) and wandb.finished == 2
    (tmp_path / trackers.MEMORY).unlink()  # what a run that starts anew does
    (tmp_path / "log.jsonl").unlink()
    train(tmp_path, "wandb", stop_at=2)
    assert wandb.begun[2]["id"] != first["id"] and len(wandb.curves[wandb.begun[2]["id"]]["loss"]) == 2


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, mlflow: FakeMlflow) -> None:
    train(tmp_path, "mlflow", stop_at=7)
    assert mlflow.status == {"run-0": "FINISHED"} and mlflow.params[("run-0", "note")] == "x" * trackers.LONGEST
    train(tmp_path, "mlflow", resume=True)  # with resume=True, which the run's parameters must not be told
    assert list(mlflow.runs) == ["run-0"] and mlflow.status == {"run-0": "FINISHED"}
    same(mlflow.curves("run-0"), tmp_path)
    train(tmp_path, "mlflow", resume=True)
    same(mlflow.curves("run-0"), tmp_path)
    assert len([size for size in mlflow.batches if size]) == 2  # not one request for each step
    assert mlflow.addresses[0] == f"sqlite:///{tmp_path.resolve()}/mlflow/runs.db"
    assert mlflow.experiments == {"hanmo": (tmp_path.resolve() / "mlflow/files").as_uri()}


def test_mlflow_fills_what_a_killed_session_did_not_send(
    tmp_path: Path, mlflow: FakeMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trackers.MLflow, "close", lambda _self: None)  # killed: what waits is lost
        train(tmp_path, "mlflow", stop_at=7)
    assert not mlflow.runs["run-0"]
    train(tmp_path, "mlflow", resume=True)
    assert sorted(mlflow.curves("run-0")["loss"]) == list(range(5, STEPS + 1))  # from the checkpoint on


def test_mlflow_uses_the_server_that_is_named(
    tmp_path: Path, mlflow: FakeMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "poems")
    train(tmp_path, "mlflow", stop_at=2)
    assert mlflow.addresses == ["http://tracking.example:5000"] and mlflow.experiments == {"poems": ""}
    assert not (tmp_path / "mlflow").exists()


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_left_out_and_told_once(
    tmp_path: Path, wandb: FakeWandb, mlflow: FakeMlflow, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.broken_from = 5
    train(tmp_path, "wandb", "mlflow")
    told = capsys.readouterr().err
    assert told.count("the tracker wandb failed and is left out") == 1
    assert "ConnectionError: the network is down" in told and "more lines" not in told
    assert len(wandb.curves[wandb.begun[0]["id"]]["loss"]) == 4
    same(mlflow.curves("run-0"), tmp_path)  # the others go on, and so does the training


def test_a_tracker_that_cannot_be_opened_says_so_and_closes_the_others(
    tmp_path: Path, wandb: FakeWandb, mlflow: FakeMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_options: Any) -> None:
        raise ValueError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(ResourceError, match="wandb cannot be opened: api_key not configured"):
        open_trackers(["mlflow", "wandb"], tmp_path, SETTINGS)
    assert mlflow.status == {"run-0": "FINISHED"}


def test_only_the_first_process_writes(tmp_path: Path, wandb: FakeWandb) -> None:
    class Second(Processes):
        @property
        def main(self) -> bool:
            return False

    told = open_trackers(["wandb"], tmp_path, SETTINGS)
    trainer(tmp_path, told, processes=Second()).fit()
    assert not wandb.points and not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_missing_package_is_named_with_what_to_type(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError) as caught:
        open_trackers([name], tmp_path, SETTINGS)
    assert f"pip install {name}" in str(caught.value)
    assert main(["pretrain", str(tmp_path), "--out", str(tmp_path / "run"), "--track", name]) == 2
    assert f"pip install {name}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # told before any work
