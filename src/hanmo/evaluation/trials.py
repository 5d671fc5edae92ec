"""One candidate of a comparison, measured in a process of its own: learning, answering, memory, size and energy.

A process of its own has a peak of memory of its own, can be stopped when its time is up, and cannot take the others
with it. What a candidate has learned is saved, and read again by a second process where it can be: what serving it
takes is measured on that one, not on the one that learned.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hanmo.data.tasks.types import Record
from hanmo.errors import HanmoError
from hanmo.evaluation.cross import CrossFitted
from hanmo.evaluation.scoring import Score, score
from hanmo.tasks.base import Form, System, Task

TIMED = 100  # records that are answered one by one, for the latency
WARM = 3  # before these


@dataclass(frozen=True)
class Candidate:
    """What takes part.

    Args:
        how: "baseline" or "candidate": the task's own, by ``number``; "model": what ``hanmo.load`` finds by ``name``.
        options: for ``hanmo.load``.
        form: how a language model is asked.
        learned: seconds that it took to learn before (a fine-tuning that was done already).
        of_folds: where records are few, the models that were taught without each fold, in the order of the folds.
    """

    how: str
    name: str
    number: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    form: Form = field(default_factory=Form)
    learned: float = 0.0
    of_folds: tuple[str, ...] = ()


@dataclass
class Trial:
    """What was measured of a candidate.

    Attributes:
        problem: why it has no score, in the user's language; empty where it has.
        train_seconds: None where nothing was learned.
        latencies: seconds of answers one by one.
        throughput: answers per second, all records at once.
        peak_memory: bytes of the process that answers, its packages included.
        size: bytes on the disk; None where nothing is stored.
        joules: for one answer, all records at once.
        energy_source: where the watts are from.
        cost: of 1,000 answers of a remote model, in the currency of its prices.
        model: where ``hanmo.load`` finds what was measured; empty where nothing is stored.
    """

    name: str
    kind: str = ""
    problem: str = ""
    score: Score | None = None
    train_seconds: float | None = None
    latencies: list[float] = field(default_factory=list)
    throughput: float = 0.0
    peak_memory: int | None = None
    size: int | None = None
    joules: float | None = None
    energy_source: str = ""
    cost: float | None = None
    model: str = ""

    def latency(self, share: float) -> float | None:
        """A quantile of the latencies, in seconds."""
        return float(np.quantile(self.latencies, share)) if self.latencies else None


@dataclass(frozen=True)
class Parts:
    """The records of a comparison.

    Args:
        folds: of cross-validation; then all records are both, and each is answered by what has not seen it. 0: none.
    """

    train: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]
    folds: int = 0


def run_trial(candidate: Candidate, task: str, parts: Parts, seconds: float, keep: Path | None = None) -> Trial:
    """Measure a candidate in a process of its own, for so long at most.

    Args:
        keep: a new folder for what it has learned; it is thrown away without one.
    """
    from hanmo.language import pick

    with tempfile.TemporaryDirectory(prefix="hanmo-compare-") as folder:
        saved = keep or Path(folder) / "model"
        began = time.monotonic()
        trial = in_process(learn_and_answer, seconds, candidate, task, parts, saved)
        if trial is None:
            limit = pick(f"not ready within {seconds:.0f} s", f"在 {seconds:.0f} 秒内未完成")
            return Trial(candidate.name, problem=limit)
        left = seconds - (time.monotonic() - began)
        if saved.exists() and not trial.problem and left > 0:
            served = in_process(serve_saved, max(left, 30.0), candidate, task, parts, saved)
            if served is not None and not served.problem:
                trial.latencies, trial.peak_memory, trial.size = served.latencies, served.peak_memory, served.size
        if candidate.how == "model":
            trial.model = candidate.name
        elif keep is not None and saved.exists():
            trial.model = str(saved)
        return trial


def in_process(action: Callable[..., Trial], seconds: float, *arguments: Any) -> Trial | None:
    """What an action returns that runs in a new process; None where its time was up."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, action, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(max(1.0, seconds)):
            return None
        result: Trial = receiver.recv()
        return result
    except EOFError:  # it was killed: by the system for its memory, most likely
        from hanmo.language import pick

        return Trial(arguments[0].name, problem=pick("its process was killed (memory?)", "进程被终止（内存不足？）"))
    finally:
        if process.is_alive() and not receiver.poll(0):
            process.kill()
        process.join(10)
        if process.is_alive():
            process.kill()
        receiver.close()


def send_result(sender: Any, action: Callable[..., Trial], arguments: tuple[Any, ...]) -> None:
    """The new process: any error becomes the problem of the trial."""
    try:
        result = action(*arguments)
    except HanmoError as error:
        result = Trial(arguments[0].name, problem=str(error).split("\n", 1)[0])
    except MemoryError:
        result = Trial(arguments[0].name, problem="MemoryError")
    except Exception as error:
        traceback.print_exc()
        result = Trial(arguments[0].name, problem=f"{type(error).__name__}: {error}")
    sender.send(result)
    sender.close()


def build(candidate: Candidate, task: Task[Any, Any], parts: Parts) -> tuple[System[Any, Any], CrossFitted | None]:
    """The system that a candidate is; and, where records are few, as it is cross-validated.

    What learns, learns the other folds; a prompt shows examples of the other folds; a network is one that was taught
    without the fold.
    """
    from hanmo.inference.loading import load

    if candidate.how != "model":
        systems = (task.baselines if candidate.how == "baseline" else task.candidates)(parts.test)
        system = systems[candidate.number]
        return system, CrossFitted(system, parts.folds) if parts.folds and system.learns else None
    model = load(candidate.name, **candidate.options)
    system = task.system(model, parts.train, candidate.form)
    system.name = candidate.name
    if not parts.folds:
        return system, None

    def without(fold: int, others: list[Any]) -> System[Any, Any]:
        known = load(candidate.of_folds[fold], **candidate.options) if candidate.of_folds else model
        return task.system(known, others, candidate.form)

    return system, CrossFitted(system, parts.folds, without)


def learn_and_answer(candidate: Candidate, name: str, parts: Parts, saved: Path) -> Trial:
    """Learn, answer the test records once, and save what was learned."""
    from hanmo.tasks.registry import find_task

    task = find_task(name)
    clear_peak()
    system, crossed = build(candidate, task, parts)
    trial = Trial(system.name, system.kind, train_seconds=candidate.learned or None)
    asked = system
    if crossed is not None and (system.learns or candidate.of_folds):
        trial.score = score(task, crossed, parts.test)
    elif crossed is not None:
        asked = crossed  # a prompt takes the same time whatever examples it shows
    if system.learns:
        began = time.monotonic()
        system.fit(parts.train, parts.validation)
        trial.train_seconds = time.monotonic() - began
        clear_peak()
    usage = getattr(getattr(getattr(system, "speaker", None), "model", None), "usage", None)
    watts, trial.energy_source = measure_power(lambda: answer(trial, task, asked, parts))
    assert trial.score is not None
    trial.joules = watts * trial.score.seconds / trial.score.n
    trial.cost = None if usage is None or usage.cost is None else 1000 * usage.cost / trial.score.n
    time_answers(trial, system, parts)
    trial.peak_memory = peak_memory()
    if candidate.how == "model":
        trial.size = size_of_model(candidate.name)
    elif system.save(saved) is not None:
        trial.size = size_of(saved)
    return trial


def answer(trial: Trial, task: Task[Any, Any], system: System[Any, Any], parts: Parts) -> None:
    """Answer the test records, once; in cross-validation to see how long it takes, for the score is known."""
    from hanmo.evaluation.leaks import find_leaks

    leaked = None if parts.folds else find_leaks([*parts.train, *parts.validation], parts.test)
    found = score(task, system, parts.test, leaked=leaked)
    trial.throughput = found.n / max(found.seconds, 1e-9)
    if trial.score is None:
        trial.score = found
    trial.score.seconds = found.seconds


def serve_saved(candidate: Candidate, name: str, parts: Parts, saved: Path) -> Trial:
    """Read what was saved and answer: latency and memory of a process that only answers."""
    from hanmo.inference.loading import load
    from hanmo.tasks.registry import find_task

    clear_peak()
    system = find_task(name).system(load(str(saved)), parts.train, candidate.form)
    trial = Trial(candidate.name, system.kind, size=size_of(saved))
    time_answers(trial, system, parts)
    trial.peak_memory = peak_memory()
    return trial


def time_answers(trial: Trial, system: System[Any, Any], parts: Parts) -> None:
    """Answer records one by one, others than those of the test."""
    pool = list(parts.validation or parts.train or parts.test)
    step = max(1, len(pool) // TIMED)
    chosen = pool[::step][:TIMED]
    deadline = time.monotonic() + 20.0
    for number, record in enumerate([*chosen[:WARM], *chosen]):
        began = time.perf_counter()
        system.answer([record])
        if number >= WARM:
            trial.latencies.append(time.perf_counter() - began)
        if time.monotonic() > deadline and trial.latencies:
            break


def measure_power(action: Callable[[], Any]) -> tuple[float, str]:
    """The watts of an action and where they are from: meters where they can be read, else a limit or an assumption."""
    import torch

    from hanmo.training.energy import EnergyMeter, power_of

    with EnergyMeter() as meter:
        action()
    power = power_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"), meter.watts)
    return power.watts, power.source


def clear_peak() -> None:
    """Let the peak of memory begin here, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """The peak resident memory of this process since :func:`clear_peak`, in bytes; None where it is not told."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def size_of_model(name: str) -> int | None:
    """Bytes of a local model; None of a remote one."""
    from hanmo.inference.loading import find

    try:
        return size_of(find(name))
    except HanmoError:
        return None
