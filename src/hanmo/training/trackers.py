"""Where the measures of a run go besides its own log: TensorBoard, Weights & Biases, MLflow, where they are installed.

Every tracker gets the same names as ``log.jsonl``: loss, learning_rate, gradient_norm, tokens, elapsed, and
validation_loss with the other measures of the validation data. Nothing is sent anywhere unless a tracker was asked for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hanmo.errors import ResourceError, UsageError, nearest
from hanmo.folder import read_json, write_json
from hanmo.language import pick
from hanmo.settings import notice

TRACKERS = ("tensorboard", "wandb", "mlflow")
MEMORY = "trackers.json"  # in the run's folder: the names under which the trackers know the run
WHOLE = "whole"  # what marks the closing measure in the log
EXPERIMENT = "hanmo"
FLUSH_SECONDS = 5  # between two writes: a request to MLflow costs as much as a small step
BATCH = 1000  # measures that MLflow takes at a time
PARAMETERS = 100  # and settings
LONGEST = 500  # characters of a setting


class Tracker(Protocol):
    """Something that is told every measure, under the names that the log has."""

    def log(self, entry: Mapping[str, float | bool]) -> None:
        """Take one entry; ``step`` is among its names."""

    def close(self) -> None:
        """End the run."""


def measures(entry: Mapping[str, float | bool]) -> dict[str, float]:
    """The numbers of an entry by name, without the step, and without what the same step's training entry says too."""
    said = {"step"} if kind_of(entry) == "loss" else {"step", "tokens", "elapsed"}
    return {name: float(value) for name, value in entry.items() if name not in said and not isinstance(value, bool)}


class Curves(ABC):
    """What all trackers have in common: curves over steps, to which each step adds a point once.

    The closing measure, of the weights that are kept, is shown where the training ended, as the last point of its
    curve, even if those weights are from an earlier step.
    """

    def __init__(self, run: Path) -> None:
        self.logged = last_steps(run)  # of each kind of entry, before this session
        self.told = {kind: step for kind, step in self.logged.items() if kind == WHOLE}

    def log(self, entry: Mapping[str, float | bool]) -> None:
        """Add a point to every curve, unless it is there: a resumed run does some steps again."""
        step, kind = int(entry["step"]), kind_of(entry)
        if kind == WHOLE:
            step = max(step, *self.logged.values(), *self.told.values())
        if step > self.told.get(kind, -1):
            self.told[kind] = step
            self.send(step, measures(entry))

    @abstractmethod
    def send(self, step: int, values: dict[str, float]) -> None:
        """Add these points."""

    @abstractmethod
    def close(self) -> None:
        """End the run."""


def kind_of(entry: Mapping[str, Any]) -> str:
    """What an entry is about: training, validation, or the closing measure of it; they share steps."""
    return WHOLE if WHOLE in entry else "validation_loss" if "validation_loss" in entry else "loss"


class TensorBoard(Curves):
    """Event files under ``<run>/tensorboard``; a resumed run hides what stands there from its first step on."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(run)
        require("tensorboard")
        self.folder, self.settings = run / "tensorboard", settings
        self.writer: Any = None

    def send(self, step: int, values: dict[str, float]) -> None:
        if self.writer is None:
            make: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self.writer = make(str(self.folder), purge_step=step, flush_secs=FLUSH_SECONDS)
            table = "\n".join(f"| {name} | {value} |" for name, value in self.settings.items())
            self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}", step)
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases(Curves):
    """A run at Weights & Biases; offline its files lie under ``<run>/wandb`` and can be sent with ``wandb sync``."""

    def __init__(self, run: Path, settings: Mapping[str, Any], *, offline: bool) -> None:
        super().__init__(run)
        wandb = require("wandb")
        known = recall(run, "wandb")
        if known is not None:
            self.told = dict(self.logged)
        id = known or secrets.token_hex(6)
        mode = {"mode": "offline"} if offline else {}
        self.run = wandb.init(
            dir=str(run), name=run.name, project=EXPERIMENT, config=dict(settings), id=id, resume="allow", **mode
        )
        remember(run, "wandb", id)

    def send(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow(Curves):
    """A run at the server that ``MLFLOW_TRACKING_URI`` names; without one, a database under ``<run>/mlflow``."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(run)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own seven hold the training up for minutes
        self.mlflow = require("mlflow")
        address, files = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not address:
            folder = (run / "mlflow").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            address, files = f"sqlite:///{folder / 'runs.db'}", (folder / "files").as_uri()
        self.client = self.mlflow.MlflowClient(tracking_uri=address)
        self.waiting: list[Any] = []
        self.sent_at = time.monotonic()
        known = recall(run, "mlflow")
        if known is None:
            known = self.begin(run.name, settings, files)
            remember(run, "mlflow", known)
        else:
            self.client.update_run(known, status="RUNNING")
            for kind in ("loss", "validation_loss"):
                history = self.client.get_metric_history(known, kind)
                self.told[kind] = max((point.step for point in history), default=-1)
        self.id: str = known

    def begin(self, name: str, settings: Mapping[str, Any], files: str | None) -> str:
        """Make a run and tell it the settings, which MLflow lets nobody change; returns its id."""
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = self.client.get_experiment_by_name(title)
        experiment = found.experiment_id if found else self.client.create_experiment(title, artifact_location=files)
        id: str = self.client.create_run(experiment, run_name=name).info.run_id
        shown = [self.mlflow.entities.Param(key, str(value)[:LONGEST]) for key, value in settings.items()]
        for at in range(0, len(shown), PARAMETERS):
            self.client.log_batch(id, params=shown[at : at + PARAMETERS])
        return id

    def send(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.waiting += [self.mlflow.entities.Metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() - self.sent_at > FLUSH_SECONDS or len(self.waiting) > BATCH // 2:
            self.flush()

    def flush(self) -> None:
        """Send what waits."""
        waiting, self.waiting = self.waiting, []
        for at in range(0, len(waiting), BATCH):
            self.client.log_batch(self.id, metrics=waiting[at : at + BATCH])
        self.sent_at = time.monotonic()

    def close(self) -> None:
        self.flush()
        self.client.set_terminated(self.id)


class Guarded:
    """A tracker whose failures do not stop the training: the first one is told, and it is left out from then on."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker, self.failed = name, tracker, False

    def log(self, entry: Mapping[str, float | bool]) -> None:
        """Take one entry."""
        self.attempt(lambda: self.tracker.log(entry))

    def close(self) -> None:
        """End the run."""
        self.attempt(self.tracker.close)

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something, unless the tracker has failed before."""
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # whatever a foreign package raises
            self.failed = True
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            notice(
                pick(
                    f"the tracker {self.name} failed and is left out; the training goes on ({reason})",
                    f"跟踪器 {self.name} 出错，之后不再使用；训练继续（{reason}）",
                )
            )


def recall(run: Path, tracker: str) -> str | None:
    """The name under which a tracker knows this run from an earlier session; None for a new one."""
    path = run / MEMORY
    known = read_json(path) if path.is_file() else {}
    return known.get(tracker) if isinstance(known, dict) else None


def remember(run: Path, tracker: str, id: str) -> None:
    """Keep a name for the next session."""
    path = run / MEMORY
    write_json(path, {**(read_json(path) if path.is_file() else {}), tracker: id})


def last_steps(run: Path) -> dict[str, int]:
    """The last step of each kind in the run's log."""
    found: dict[str, int] = {}
    path = run / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # a kill cut it off
            continue
        kind = kind_of(entry)
        step = max(entry["step"], *found.values(), 0) if kind == WHOLE else entry["step"]
        found[kind] = max(step, found.get(kind, -1))
    return found


def require(name: str) -> Any:
    """An optional package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise not_installed(name) from error


def not_installed(name: str) -> UsageError:
    """The error for a tracker whose package is not there."""
    return UsageError(
        f"--track {name} needs the package {name}, which is not installed",
        fix=f"pip install {name}; the log and report.html are written in any case",
        zh=f"--track {name} 需要安装 {name}：pip install {name}。日志与 report.html 总会生成",
    )


def check_trackers(names: list[str]) -> None:
    """Refuse, before any work, a name that is no tracker or whose package is not there.

    Raises:
        UsageError: naming it, and the nearest one or what to install.
    """
    for name in names:
        if name not in TRACKERS:
            raise UsageError(
                f"there is no tracker '{name}'",
                fix=f"known: {', '.join(TRACKERS)}. {nearest(name, TRACKERS)}",
                zh=f"没有名为 '{name}' 的跟踪器；可用：{'、'.join(TRACKERS)}",
            )
        if importlib.util.find_spec(name) is None:
            raise not_installed(name)


def open_trackers(
    names: list[str], run: Path, settings: Mapping[str, Any], *, offline: bool = False
) -> tuple[Tracker, ...]:
    """The trackers of these names.

    Raises:
        UsageError: an unknown name, or a package that is not installed.
        ResourceError: a tracker cannot be reached or does not take the run.
    """
    check_trackers(names)
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run, settings),
        "wandb": lambda: WeightsAndBiases(run, settings, offline=offline),
        "mlflow": lambda: MLflow(run, settings),
    }
    made: list[Tracker] = []
    for name in dict.fromkeys(names):
        try:
            made.append(Guarded(name, makers[name]()))
        except Exception as error:  # whatever a foreign package raises
            for tracker in made:
                tracker.close()
            if isinstance(error, UsageError):
                raise
            raise ResourceError(
                f"the tracker {name} cannot be opened: {error}",
                where=f"--track {name}",
                fix="mend it, or leave it out; the log and report.html are written in any case",
                zh=f"无法打开跟踪器 {name}：{error}。请修复或去掉它；日志与 report.html 总会生成",
            ) from error
    return tuple(made)
