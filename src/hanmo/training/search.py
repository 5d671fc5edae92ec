"""A search over settings before a run: short trials of the same recipe, the worse half of which is given up early.

Successive halving (Jamieson and Talwalkar 2016; asynchronous as in Li et al. 2020, from the package ``optuna``): every
trial is the whole run on a shorter horizon, its schedule compressed into it. After a quarter and after a half of it the
validation loss is compared with that of the trials before at the same place, and only the better half goes on. New
values are proposed by a tree-structured Parzen estimator (Bergstra et al. 2011). The first trial is the run as it would
have been; the winner is the best of those that reached the end, so it is never worse than the default *on the horizon
of a trial*.

That horizon is the catch. The longer a training, the lower its best learning rate (Bjorck et al. 2024), and the larger
the batch that it bears (McCandlish et al. 2018); a comparison before the rate has fallen flatters low rates (Wu et al.
2018). Hence trials get their own whole schedule and as long a horizon as the time allows, and values stay near those of
the scaling rules: short trials may lower the rate further than they may raise it.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

from hanmo.errors import Interrupted, ModelError, ResourceError, UsageError
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.settings import notice
from hanmo.training.fit import FitResult, FitSettings, Trainer, is_out_of_memory, stop_on_interrupt
from hanmo.training.objectives.base import Objective
from hanmo.training.search_record import (
    COMPLETE,
    FAILED,
    PRUNED,
    UNFINISHED,
    SearchRecord,
    Trial,
    Values,
    describe_trial,
)
from hanmo.training.search_space import Dimension, require_optuna

RATIO = 2  # of the trials that reach a rung, one in two goes on
PARTS = RATIO**2  # of a trial; rungs are the powers of RATIO below
WHOLE_TRIALS = (8, 4)  # unpruned trials that the time should hold; fewer where they would have too few steps
LEAST_STEPS = 20  # fewer tell nothing about the run
WARMUP_SHARE = 0.1  # of the steps of a trial, at most
VALIDATION_SHARE = 0.2  # of the time of a trial
FINAL_FACTOR = 4  # times as many tokens are scored at its end, where the winner is found, as at each of two rungs
LEAST_VALIDATION = 1024  # tokens
FIRST_RANDOM = 6  # trials before the estimator has something to learn from
PROPOSALS = 20  # of values that were tried already, before chance decides
PACE_SHARE, PACE_SECONDS = 0.02, 3.0  # of the time, and at most, to measure how fast a step is
OVERTIME = 0.05  # share of the time after which a trial that has not ended is given up

ModelT = TypeVar("ModelT", bound=nn.Module)
Build = Callable[[Values], tuple[nn.Module, Objective[Any, Any], FitSettings]]
Dimensions = Callable[[float], list[Dimension]]


class Ended(Exception):
    """A trial ends before its horizon, in this state."""

    def __init__(self, state: str, reason: str = "") -> None:
        super().__init__(state)
        self.state, self.reason = state, reason


class TrialTrainer(Trainer[ModelT]):
    """A run that leaves nothing on the disk, and asks at every rung whether to go on.

    Args:
        give_up: told the rung and the loss there; whether the trial ends.
        deadline: when it ends in any case, on the monotonic clock.
    """

    def __init__(
        self,
        model: ModelT,
        objective: Objective[ModelT, Any],
        settings: FitSettings,
        *,
        device: torch.device,
        number: int,
        give_up: Callable[[int, float], bool],
        deadline: float,
    ) -> None:
        super().__init__(model, objective, settings, Path(), device=device)
        self.number, self.give_up, self.deadline = number, give_up, deadline

    def progress(self) -> Progress:
        shown = Progress(pick(f"search, trial {self.number}", f"参数搜索，试验 {self.number}"), unit="tokens")
        shown.quiet |= not shown.terminal  # elsewhere a line for each trial at its end is enough
        return shown

    def fit(self) -> FitResult:
        with stop_on_interrupt() as asked_to_stop:
            return self.loop(asked_to_stop)

    def step(self, done: float) -> float:
        if time.monotonic() > self.deadline:
            raise Ended(UNFINISHED, pick("the time was over", "时间用尽"))
        return super().step(done)

    def save(self) -> None:
        """Nothing is kept."""

    def checkpoint_due(self, seconds: float) -> bool:
        del seconds
        return False

    def record(self, **entry: float | bool) -> None:
        """Neither the log nor trackers are told."""

    def score(self, tokens: int) -> float:
        """The loss on so many tokens of the validation data.

        Raises:
            Ended: it is no number.
        """
        with self.averaged():
            loss = self.validate(tokens)["loss"]
        if not math.isfinite(loss):
            raise Ended(FAILED, pick(f"the validation loss is {loss}", f"验证损失为 {loss}"))
        return loss

    def evaluate(self, due: int) -> None:
        rungs = [RATIO**power for power in range(PARTS) if self.state.evaluations < RATIO**power <= due]
        self.state.evaluations = due
        if rungs and self.give_up(rungs[-1], self.score(self.settings.validation_tokens)):
            raise Ended(PRUNED)

    def finish(self, tokens: int, seconds: float) -> FitResult:
        state, loss = self.state, self.score(FINAL_FACTOR * self.settings.validation_tokens)
        return FitResult(loss, state.step, state.step, state.tokens, seconds, tokens / max(seconds, 1e-9))


class Study:
    """What was tried, in the eyes of optuna; it is rebuilt from the record after an interruption."""

    def __init__(self, dimensions: list[Dimension], seed: int) -> None:
        self.optuna = require_optuna()
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        self.dimensions, self.seed = dimensions, seed
        # places in the lists of values, whose order means something
        self.places = {
            item.name: self.optuna.distributions.IntDistribution(0, len(item.values) - 1) for item in dimensions
        }
        pruner = self.optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=RATIO)
        self.study = self.optuna.create_study(direction="minimize", pruner=pruner)
        self.tried: list[Values] = []

    def ask(self, values: Values | None = None) -> tuple[Any, Values] | None:
        """The next trial with these values, or with new ones; None where everything was tried.

        What is proposed follows from the seed and from what was tried before.
        """
        for attempt in range(PROPOSALS + 1):
            if attempt == PROPOSALS:  # the estimator repeats itself
                values = self.untried()
                if values is None:
                    break
            if values is not None:
                places = {item.name: item.values.index(values[item.name]) for item in self.dimensions}
                self.study.enqueue_trial(places)
            seed = (self.seed * 1009 + len(self.tried)) * PROPOSALS + attempt
            self.study.sampler = self.optuna.samplers.TPESampler(
                seed=seed % 2**32, n_startup_trials=FIRST_RANDOM, constant_liar=False
            )
            trial = self.study.ask(self.places)
            found = {item.name: item.values[trial.params[item.name]] for item in self.dimensions}
            if values is not None or found not in self.tried:
                self.tried.append(found)
                return trial, found
            self.drop(trial)
        return None

    def untried(self) -> Values | None:
        """Some values that were not tried, by chance."""
        names = [item.name for item in self.dimensions]
        every = product(*(item.values for item in self.dimensions))
        left = [found for values in every if (found := dict(zip(names, values, strict=True))) not in self.tried]
        return random.Random(self.seed * 1009 + len(self.tried)).choice(left) if left else None

    def drop(self, trial: Any) -> None:
        """Forget a trial that is not begun."""
        self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)

    def give_up(self, trial: Any, rung: int, loss: float) -> bool:
        """Whether a trial with this loss at a rung belongs to the worse half."""
        trial.report(loss, rung)
        return bool(trial.should_prune())

    def tell(self, trial: Any, result: Trial) -> None:
        """How a trial ended."""
        states = self.optuna.trial.TrialState
        if result.state == COMPLETE:
            self.study.tell(trial, result.loss)
        else:
            self.study.tell(trial, state=states.PRUNED if result.state == PRUNED else states.FAIL)

    def replay(self, results: list[Trial]) -> None:
        """Take over what an interrupted search found."""
        for result in results:
            asked = self.ask(result.values)
            assert asked is not None
            for rung, loss in result.rungs.items():
                self.give_up(asked[0], int(rung), loss)
            self.tell(asked[0], result)


def search(
    path: Path, dimensions: Dimensions, build: Build, *, minutes: float, seed: int, device: torch.device
) -> SearchRecord:
    """Try values for the given minutes, or go on with a search that was interrupted.

    Args:
        path: of ``search.json``, written after every trial.
        dimensions: what is varied, given the share of the whole run that a trial gets.
        build: a new model, its objective and the settings of the whole run with some values; the others are the run's.
        seed: decides what is proposed.

    Raises:
        Interrupted: Ctrl-C; the trials so far are kept.
        UsageError: the time is too short for trials that tell something.
        ResourceError: optuna is not installed.
    """
    require_optuna()
    began, total = time.monotonic(), minutes * 60
    record = SearchRecord.read(path) or prepare(dimensions, build, minutes, device)
    record.minutes, before = minutes, record.seconds
    study, firsts = Study(record.dimensions, seed), first_values(record.dimensions)
    study.replay(record.trials)
    while True:
        number = len(record.trials)
        record.seconds = before + time.monotonic() - began
        if number and not time_for_another(record, total - record.seconds):
            break
        asked = study.ask(firsts[number] if number < len(firsts) else None)
        if asked is None:
            break
        trial, values = asked
        cost = math.prod(values[item.name] / item.default for item in record.dimensions if item.lengthens)
        if number and expected_seconds(record) * cost > total - record.seconds:
            study.drop(trial)  # it could not win, a shorter one could
            continue
        result = Trial(number, values)
        deadline = time.monotonic() + total * (1 + OVERTIME) - record.seconds
        try:
            run_trial(result, build, record, study, trial, device, deadline)
        except Interrupted as error:
            raise Interrupted(
                f"the search was stopped after {number} trials, which are kept",
                where=str(path),
                fix="go on with the same command and --resume",
                zh=f"参数搜索已停止，完成的 {number} 次试验已保存；用同一命令加 --resume 继续",
            ) from error
        study.tell(trial, result)
        record.trials.append(result)
        record.seconds = before + time.monotonic() - began
        record.write(path)
        notice(describe_trial(result))
    record.finished = True
    record.write(path)
    return record


def prepare(dimensions: Dimensions, build: Build, minutes: float, device: torch.device) -> SearchRecord:
    """Measure how long a step takes, and settle how much of the run a trial is.

    Raises:
        UsageError: so little that it would tell nothing.
    """
    began, total = time.monotonic(), minutes * 60
    record = SearchRecord(minutes, 1.0, 0, 0, PARTS, [])
    model, objective, settings = build({})
    trainer = TrialTrainer(
        model, objective, settings, device=device, number=0, give_up=lambda *_: False, deadline=math.inf
    )
    pace, tokens = measure_pace(trainer, min(total * PACE_SHARE, PACE_SECONDS))
    whole = whole_seconds(settings, pace, tokens)
    left = total - (time.monotonic() - began)
    for trials in WHOLE_TRIALS:
        record.share = min(1.0, max(left, 0.0) / trials / whole)
        if record.share == 1.0 or record.share * whole >= LEAST_STEPS * pace:
            break
    else:
        needed = math.ceil(10 * LEAST_STEPS * pace * WHOLE_TRIALS[-1] * 1.2 / 60) / 10
        raise UsageError(
            f"{minutes:g} minutes are too short for a search",
            where="--search",
            why=f"a step takes {pace:.2g} s, and a trial of fewer than {LEAST_STEPS} steps tells nothing",
            fix=f"give --search {needed:g} at least, or leave it out",
            zh=f"{minutes:g} 分钟不足以搜索：每步需 {pace:.2g} 秒。请至少给 --search {needed:g}，或去掉它",
        )
    record.steps = max(1, round(record.share * whole / pace))
    read = VALIDATION_SHARE * record.share * whole * 3 * tokens / pace  # a token that is only read costs a third
    record.validation_tokens = int(min(settings.validation_tokens, max(LEAST_VALIDATION, read / (2 + FINAL_FACTOR))))
    record.dimensions = dimensions(record.share)
    return record


def measure_pace(trainer: Trainer[Any], seconds: float) -> tuple[float, float]:
    """Seconds and tokens of a step; the first one, which takes longer, does not count."""
    trainer.step(0.0)
    count, tokens, began = 0, 0, time.monotonic()
    while count < 3 or time.monotonic() - began < seconds:
        trainer.state.step += 1
        trainer.step(0.0)
        tokens += trainer.objective.tokens_in(trainer.state.step)
        count += 1
        if time.monotonic() - began > 10 * seconds:  # steps are long: one says enough
            break
    return (time.monotonic() - began) / count, tokens / count


def whole_seconds(settings: FitSettings, pace: float, tokens: float) -> float:
    """How long the run will take."""
    if settings.max_steps is not None:
        return settings.max_steps * pace
    assert settings.budget_seconds is not None
    return min(settings.budget_seconds, settings.max_tokens / max(tokens, 1.0) * pace)


def compressed(settings: FitSettings, record: SearchRecord) -> FitSettings:
    """The run on the horizon of a trial; its schedule is a function of the share that is done.

    Only a warm-up that is counted in steps has to be shortened: most of a short trial would train at low rates.
    """
    share, schedule = record.share, settings.schedule
    warmup = min(schedule.warmup_steps, max(1, round(WARMUP_SHARE * record.steps))) if share < 1 else None
    return replace(
        settings,
        max_steps=None if settings.max_steps is None else max(1, round(settings.max_steps * share)),
        budget_seconds=None if settings.budget_seconds is None else settings.budget_seconds * share,
        max_tokens=settings.max_tokens * share,
        validation_tokens=record.validation_tokens,
        schedule=schedule if warmup is None else replace(schedule, warmup_steps=warmup),
        evaluations=PARTS,
        patience=None,
    )


def first_values(dimensions: list[Dimension]) -> list[Values]:
    """What is tried first: the defaults, then half and twice their learning rate, which matters most."""
    defaults = {item.name: item.default for item in dimensions}
    tried = [defaults]
    for item in dimensions:
        if item.name == "learning_rate":
            place = item.values.index(item.default)
            tried += [
                {**defaults, item.name: item.values[at]}
                for at in (place - 2, place + 2)  # neighbours differ by the square root of two
                if 0 <= at < len(item.values)
            ]
    return tried


def expected_seconds(record: SearchRecord) -> float:
    """How long a whole trial takes: as long as those that reached their end, in the middle."""
    return median([trial.seconds for trial in record.trials if trial.state == COMPLETE] or [0.0])


def time_for_another(record: SearchRecord, seconds: float) -> bool:
    """Whether a trial could reach its end; one that cannot win is not begun."""
    return seconds > 0 and expected_seconds(record) <= seconds


def run_trial(
    result: Trial,
    build: Build,
    record: SearchRecord,
    study: Study,
    trial: Any,
    device: torch.device,
    deadline: float,
) -> None:
    """Train with some values; what goes wrong with them is the trial's failure, not the run's."""
    began = time.monotonic()

    def give_up(rung: int, loss: float) -> bool:
        result.rungs[str(rung)] = round(loss, 6)
        return study.give_up(trial, rung, result.rungs[str(rung)])

    trainer: TrialTrainer[Any] | None = None
    try:
        model, objective, settings = build(result.values)
        trainer = TrialTrainer(
            model,
            objective,
            compressed(settings, record),
            device=device,
            number=result.number,
            give_up=give_up,
            deadline=deadline,
        )
        result.loss = round(trainer.fit().validation_loss, 6)
        result.state = COMPLETE
    except Ended as end:
        result.state, result.reason = end.state, end.reason
    except (ModelError, ResourceError) as error:
        if trainer is None:  # not the values are to blame
            raise
        result.state, result.reason = FAILED, error.what
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result.state, result.reason = FAILED, pick("memory ran out", "内存不足")
    if result.loss is None and result.rungs and result.state != FAILED:
        result.loss = [*result.rungs.values()][-1]
    result.steps = trainer.state.step if trainer else 0
    result.seconds = round(time.monotonic() - began, 3)
    del trainer  # its memory is the next one's
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
