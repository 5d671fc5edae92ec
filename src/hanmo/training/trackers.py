"""Where the measures of a run go besides its own log: TensorBoard, Weights & Biases, MLflow, where they are installed.

Every tracker gets the same names as ``log.jsonl``: loss, learning_rate, gradient_norm, tokens, elapsed, and
validation_loss with the other measures of the validation data. Nothing is sent anywhere unless a tracker was asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hanmo.errors import UsageError, nearest

TRACKERS = ("tensorboard", "wandb", "mlflow")


class Tracker(Protocol):
    """Something that is told every measure, under the names that the log has."""

    def log(self, entry: Mapping[str, float | bool]) -> None:
        """Take one entry; ``step`` is among its names."""

    def close(self) -> None:
        """End the run."""


def measures(entry: Mapping[str, float | bool]) -> dict[str, float]:
    """The numbers of an entry, without the step."""
    return {name: float(value) for name, value in entry.items() if name != "step" and not isinstance(value, bool)}


class TensorBoard:
    """Event files under ``<run>/tensorboard``."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        require("tensorboard", "tensorboard")
        self.writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(run / "tensorboard"))
        table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{table}", 0)

    def log(self, entry: Mapping[str, float | bool]) -> None:
        """Add a point to every curve."""
        for name, value in measures(entry).items():
            self.writer.add_scalar(name, value, int(entry["step"]))

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases; offline its files lie under ``<run>/wandb`` and can be sent with ``wandb sync``."""

    def __init__(self, run: Path, settings: Mapping[str, Any], *, offline: bool) -> None:
        wandb = require("wandb", "wandb")
        mode = {"mode": "offline"} if offline else {}
        self.run = wandb.init(
            dir=str(run), name=run.name, project="hanmo", config=dict(settings), id=run_id(run), resume="allow", **mode
        )

    def log(self, entry: Mapping[str, float | bool]) -> None:
        """Send an entry."""
        self.run.log(measures(entry), step=int(entry["step"]))

    def close(self) -> None:
        """End the run."""
        self.run.finish()


class MLflow:
    """A run at the server that ``MLFLOW_TRACKING_URI`` names; without one, a database under ``<run>/mlflow``."""

    def __init__(self, run: Path, settings: Mapping[str, Any]) -> None:
        import os

        self.mlflow = require("mlflow", "mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            (run / "mlflow").mkdir(parents=True, exist_ok=True)
            self.mlflow.set_tracking_uri(f"sqlite:///{(run / 'mlflow' / 'runs.db').resolve()}")
        self.mlflow.set_experiment("hanmo")
        self.run = self.mlflow.start_run(run_name=run.name)
        self.mlflow.log_params({name: str(value)[:500] for name, value in settings.items() if value is not None})

    def log(self, entry: Mapping[str, float | bool]) -> None:
        """Send an entry."""
        self.mlflow.log_metrics(measures(entry), step=int(entry["step"]))

    def close(self) -> None:
        """End the run."""
        self.mlflow.end_run()


def run_id(run: Path) -> str:
    """The same short name for the same folder, so that a resumed run goes on where it was."""
    import hashlib

    return hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]


def require(module: str, package: str) -> Any:
    """An optional package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"--track {module} needs the package {package}, which is not installed ({error})",
            fix=f"pip install {package}; the log and report.html are written in any case",
            zh=f"--track {module} 需要安装 {package}：pip install {package}。日志与 report.html 总会生成",
        ) from error


def check_trackers(names: list[str]) -> None:
    """Refuse a name that is no tracker.

    Raises:
        UsageError: naming it and the nearest one.
    """
    for name in names:
        if name not in TRACKERS:
            raise UsageError(
                f"there is no tracker '{name}'",
                fix=f"known: {', '.join(TRACKERS)}. {nearest(name, TRACKERS)}",
                zh=f"没有名为 '{name}' 的跟踪器；可用：{'、'.join(TRACKERS)}",
            )


def open_trackers(
    names: list[str], run: Path, settings: Mapping[str, Any], *, offline: bool = False
) -> tuple[Tracker, ...]:
    """The trackers of these names.

    Raises:
        UsageError: an unknown name, or a package that is not installed.
    """
    check_trackers(names)
    made: list[Tracker] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            made.append(TensorBoard(run, settings))
        elif name == "wandb":
            made.append(WeightsAndBiases(run, settings, offline=offline))
        else:
            made.append(MLflow(run, settings))
    return tuple(made)
