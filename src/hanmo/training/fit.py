"""The trainer: one loop for every objective.

A run has a *horizon*, a number of steps or a time, and everything that changes during training (rate, evaluations) is
a function of the fraction of it that is done. With a number of steps a run is a function of its seed: stopping, or
killing, and resuming it gives the same weights bit for bit. With a time, the clock decides how many steps fit.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hanmo.errors import DataError, Interrupted, ModelError, ResourceError
from hanmo.language import pick
from hanmo.progress import Progress, RunLog
from hanmo.settings import notice
from hanmo.training.acceleration import autocast
from hanmo.training.checkpoint import (
    TrainingState,
    keep_weights,
    load_newest,
    load_weights,
    prune_weights,
    step_folders,
)
from hanmo.training.objectives.base import Objective
from hanmo.training.optimizer import Optimizer, OptimizerSettings
from hanmo.training.processes import Processes
from hanmo.training.schedule import Schedule
from hanmo.training.trackers import Tracker

EVALUATIONS = 20  # per run, evenly over its horizon
CHECKPOINT_SECONDS = 60.0
CARRIED, AVERAGE = "carried.", "average."  # what stands before the names of these tensors in a checkpoint
FINAL_TOKENS = 500_000  # the closing evaluation must not outlast the training; most validation splits are smaller

ModelT = TypeVar("ModelT", bound=nn.Module)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class FitSettings:
    """What the loop itself needs to know.

    Args:
        max_steps: train so many steps; or
        budget_seconds: train for so long, evaluations and checkpoints on the way included.
        max_tokens: end a budget early after so many tokens, however fast the machine is.
        clip: largest gradient norm; 0 turns clipping off.
        checkpoint_every: steps between checkpoints; None: once a minute.
        validation_tokens: tokens scored by the evaluations during training.
        recipe: fingerprint of everything that decides the run's result; a checkpoint of another one is refused.
        seed: decides the noise of dropout.
        evaluations: how often the validation data is scored, evenly over the horizon.
        patience: stop after so many evaluations without a better one; None: never.
        keep_best: how many of the best weights are kept as folders, beside the newest checkpoints.
        precision: "bf16": products in bfloat16 on an accelerator; anything else is up to the network's layers.
        average: decay per step of an exponential moving average of the weights, which is then what is validated and
            kept (Polyak and Juditsky 1992); 0: none.
    """

    optimizer: OptimizerSettings
    max_steps: int | None = None
    budget_seconds: float | None = None
    max_tokens: float = math.inf
    clip: float = 1.0
    checkpoint_every: int | None = None
    validation_tokens: int = 32_768
    recipe: str = ""
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    evaluations: int = EVALUATIONS
    patience: int | None = None
    keep_best: int = 1
    average: float = 0.0
    precision: str = "fp32"


@dataclass
class FitResult:
    """What training ended with.

    Args:
        validation_loss: nats per token (or example, or pair) of the weights that were kept, on the whole validation
            split, or on 500,000 tokens spread over a larger one.
        best_step: the step those weights are from.
        steps, tokens, seconds: of the whole run, all sessions together.
        tokens_per_second: of this session.
        measures: everything measured on the validation split, the loss included.
    """

    validation_loss: float
    best_step: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    measures: dict[str, float] = field(default_factory=dict)


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a question the loop can ask; the second one stops at once."""
    asked = False

    def handler(number: int, frame: object) -> None:  # noqa: ARG001 - the signature is Python's
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            previous[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread: the caller handles signals
            break
    try:
        yield lambda: asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def trained_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name: frozen weights are those of the base model and are never stored again."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get memory, on whatever device."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text


class Trainer(Generic[ModelT]):
    """One run: model, objective and settings, and the folder that holds its log and checkpoints.

    Args:
        run: folder of the run; ``log.jsonl``, ``checkpoints/`` and ``best/`` are written there.
        resume: go on from the newest valid checkpoint, if there is one.
        processes: those that train together.
        trackers: what else is told every measure, besides the log.
    """

    def __init__(
        self,
        model: ModelT,
        objective: Objective[ModelT, Any],
        settings: FitSettings,
        run: Path,
        *,
        device: torch.device,
        resume: bool = False,
        processes: Processes | None = None,
        trackers: tuple[Tracker, ...] = (),
    ) -> None:
        self.model, self.settings = model.to(device), settings
        self.run, self.device, self.resume = run, device, resume
        self.processes = processes or Processes()
        self.trackers = trackers if self.processes.main else ()
        self.checkpoints, self.kept = run / "checkpoints", run / "best"
        self.processes.prepare(self.model)
        self.objective = self.processes.adapt(objective)
        self.processes.agree("recipe", settings.recipe)
        self.weights = trained_weights(self.model)
        self.optimizer = Optimizer(self.model, settings.optimizer, self.processes.orthogonalized)
        self.state = TrainingState(recipe=settings.recipe, micro_batch=objective.micro_batch)
        self.average = {name: value.detach().clone() for name, value in self.weights.items() if settings.average}

    def fit(self) -> FitResult:
        """Train to the end of the horizon; the model is left with the weights of the best evaluation.

        Raises:
            Interrupted: Ctrl-C; a checkpoint was written first.
            ModelError: the loss is not finite, or the checkpoint belongs to another recipe.
            ResourceError: not even one example at a time fits into memory.
        """
        with stop_on_interrupt() as asked_to_stop:
            if self.resume:
                self.restore()
            self.log = RunLog(self.run / "log.jsonl") if self.processes.main else None
            try:
                return self.loop(asked_to_stop)
            finally:
                if self.log is not None:
                    self.log.close()

    # What is stored ---------------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Take over the newest valid checkpoint, if there is one."""
        names = self.processes.same([folder.name for folder in step_folders(self.checkpoints)])
        checkpoint = load_newest(self.checkpoints, self.processes.verify, names)
        if checkpoint is None:
            return
        if checkpoint.state.recipe != self.settings.recipe:
            raise ModelError(
                "the checkpoint belongs to another recipe (data, tokenizer, model or training settings differ)",
                where=str(self.checkpoints),
                fix="give the settings of the first start, or another --out",
                zh="检查点属于另一套设置（数据、分词器、模型或训练参数不同）；请使用原来的设置或更换 --out",
            )
        self.state = checkpoint.state
        notice(
            pick(f"going on from the checkpoint of step {self.state.step}", f"从第 {self.state.step} 步的检查点继续")
        )
        if self.state.micro_batch:  # memory ran out before: what fitted then fits now
            self.objective.micro_batch = min(self.objective.micro_batch, self.state.micro_batch)
        self.put(checkpoint.model)
        average = self.processes.scattered(named(checkpoint.model, AVERAGE), self.weights)
        self.average = {name: average[name].to(self.device) for name in self.weights if self.settings.average}
        self.objective.load_state_tensors(
            {name: value.to(self.device) for name, value in named(checkpoint.model, CARRIED).items()}
        )
        self.optimizer.load_state_tensors(self.processes.scattered(checkpoint.optimizer, self.optimizer.layout()))

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Give the trained weights these values."""
        mine = self.processes.scattered({name: tensors[name] for name in self.weights}, self.weights)
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(mine[name])

    def save(self) -> None:
        """Write a checkpoint: weights, their average, what the objective carries, optimizer and state."""
        tensors: dict[str, Tensor] = {name: value.detach() for name, value in self.weights.items()}
        tensors.update({AVERAGE + name: value for name, value in self.average.items()})
        tensors.update({CARRIED + name: value for name, value in self.objective.state_tensors().items()})
        self.processes.save(self.checkpoints, tensors, self.optimizer.state_tensors(), self.state)
        self.processes.on_main(lambda: prune_weights(self.kept, self.checkpoints))

    def record(self, **entry: float | bool) -> None:
        """Tell the log and all trackers."""
        if self.log is not None:
            self.log.write(**entry)
        for tracker in self.trackers:
            tracker.log(entry)

    # The loop ---------------------------------------------------------------------------------------------------------

    def fraction(self, elapsed: float) -> float:
        """The share of the horizon that is done."""
        if self.settings.max_steps is not None:
            return self.state.step / self.settings.max_steps
        assert self.settings.budget_seconds is not None
        share = max(elapsed / self.settings.budget_seconds, self.state.tokens / self.settings.max_tokens)
        return self.processes.decide(share)

    def loop(self, asked_to_stop: Callable[[], bool]) -> FitResult:
        """Step, evaluate and save until the horizon is reached."""
        state, start = self.state, time.monotonic() - self.state.elapsed
        saved_at = state.elapsed
        seen_before, began = state.tokens, time.monotonic()
        done = self.fraction(state.elapsed)
        with self.progress() as progress:
            while done < 1 and not state.stopped:
                loss = self.step(done)
                state.step += 1
                state.tokens += self.objective.tokens_in(state.step - 1)
                state.elapsed = time.monotonic() - start
                rate = (state.tokens - seen_before) / (time.monotonic() - began)
                done = self.fraction(state.elapsed)
                progress.update(state.tokens, self.note(loss, rate), fraction=done)
                due = math.floor(done * self.settings.evaluations)
                if due > state.evaluations and due < self.settings.evaluations:
                    self.evaluate(due)
                    state.elapsed = time.monotonic() - start
                if self.checkpoint_due(state.elapsed - saved_at):
                    self.save()
                    state.elapsed = saved_at = time.monotonic() - start
                if self.processes.any(asked_to_stop()):
                    self.save()
                    raise Interrupted(
                        f"stopped at step {state.step}; a checkpoint was saved",
                        where=str(self.run),
                        fix="go on with the same command and --resume",
                        zh=f"已在第 {state.step} 步停止并保存检查点；用同一命令加 --resume 继续",
                    )
        self.save()
        return self.finish(state.tokens - seen_before, time.monotonic() - began)

    def step(self, done: float) -> float:
        """One optimizer step; returns its loss per token (or example, or pair)."""
        self.model.train()
        total, guilty = self.within_memory(self.accumulate)
        weight = self.objective.step_weight(self.state.step)
        self.processes.reduce_gradients(self.weights.values())
        loss = self.processes.sums({"loss": total})["loss"] / weight
        norm = self.processes.clip(self.weights.values(), self.settings.clip or math.inf)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self.diverged(loss, norm, guilty)
        scale = self.settings.schedule.scale(done, self.state.step)
        self.optimizer.step(scale)
        if self.average:
            decay = min(self.settings.average, (1 + self.state.step) / (10 + self.state.step))
            torch._foreach_lerp_(list(self.average.values()), [p.data for p in self.weights.values()], 1 - decay)
        self.record(
            step=self.state.step + 1,
            tokens=self.state.tokens + self.objective.tokens_in(self.state.step),
            loss=round(loss, 6),
            learning_rate=round(self.settings.optimizer.peak_rate * scale, 9),
            gradient_norm=round(norm, 6),
            elapsed=round(self.state.elapsed, 3),
        )
        return loss

    def accumulate(self) -> tuple[float, int | None]:
        """The gradient of one step's mean loss; returns this process's summed loss, and the first micro-batch whose
        loss is not finite."""
        state, weight, share = self.state, self.objective.step_weight(self.state.step), self.processes.share
        total, guilty = 0.0, None
        for index, batch in enumerate(self.objective.micro_batches(state.step, share)):
            number = share.rank + index * share.count
            seed = int(np.random.default_rng([self.settings.seed, state.step, number, 1]).integers(1 << 62))
            torch.manual_seed(seed)
            batch.to(self.device)
            with autocast(self.device, self.settings.precision):
                summed = self.objective.loss(self.model, batch)
            (summed / weight).backward()  # type: ignore[no-untyped-call]
            value = float(summed.detach())
            if guilty is None and not math.isfinite(value):
                guilty = number
            total += value
        return total, guilty

    def within_memory(self, compute: Callable[[], ResultT]) -> ResultT:
        """What a function gives; it is repeated with smaller micro-batches for as long as memory runs out.

        Raises:
            ResourceError: one example at a time is the least, or other processes cannot follow.
        """
        # the micro-batches before the one that failed have moved on what the objective carries
        carried = {name: value.clone() for name, value in self.objective.state_tensors().items()}
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error)
            self.use_less_memory(failure)  # outside of the handler, whose traceback holds the tensors
            self.objective.load_state_tensors(carried)

    def use_less_memory(self, failure: str) -> None:
        """After memory ran out: drop the gradients and halve the micro-batch, which doubles the accumulation.

        Raises:
            ResourceError: one example at a time is the least, or other processes cannot follow.
        """
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        size = self.objective.micro_batch
        if size <= 1 or self.processes.share.count > 1:
            raise ResourceError(
                f"memory ran out with a micro-batch of {size}",
                where=f"step {self.state.step}",
                why=failure.splitlines()[0][:200],
                fix="give a smaller --micro-batch, --context or model; checkpoints are intact",
                zh=f"内存不足（--micro-batch 为 {size}）：请减小 --micro-batch、--context 或模型；检查点未受影响",
            )
        self.objective.micro_batch = self.state.micro_batch = size // 2
        notice(
            pick(
                f"memory ran out at step {self.state.step}: micro-batch {size} -> {size // 2}, twice as many of them; "
                "the batch and the result stay the same",
                f"第 {self.state.step} 步内存不足：micro-batch 由 {size} 减为 {size // 2}，"
                "累积次数加倍；批大小与结果不变",
            )
        )

    def diverged(self, loss: float, norm: float, guilty: int | None) -> ModelError:
        """The error for a loss that is not a number; the weights are still those from before the step."""
        step = self.state.step
        found = self.processes.sums({} if guilty is None else {str(guilty): 1.0})
        guilty = min(map(int, found), default=None)
        where = self.objective.origin(step) + ("" if guilty is None else f" (micro-batch {guilty})")
        return ModelError(
            f"the loss is {loss} and the norm of its gradient {norm} at step {step}",
            where=where,
            why=f"the training diverged; the checkpoints in {self.run} hold the weights from before",
            fix="look at this batch; or start anew with --overwrite and half the --learning-rate",
            zh=f"第 {step} 步训练发散（损失 {loss}），批次：{where}；检查点仍是此前的权重。"
            "请检查这批数据，或用 --overwrite 并把 --learning-rate 减半重新开始",
        )

    def progress(self) -> Progress:
        """What shows how far the training is."""
        return Progress(pick("training", "训练"), unit="tokens")

    def note(self, loss: float, rate: float) -> str:
        """The end of the progress line."""
        best = f"  best {self.state.best_loss:.3f}" if self.state.best_step >= 0 else ""
        return f"step {self.state.step}  loss {loss:.3f}{best}  {rate:,.0f} tok/s"

    # Validation -------------------------------------------------------------------------------------------------------

    def validate(self, limit: int | None = None) -> dict[str, float]:
        """Every measure on the held-out data, or on about ``limit`` tokens of it; the loss is among them.

        Raises:
            DataError: there is nothing to measure.
            ResourceError: not even one example at a time fits into memory.
        """
        self.model.eval()
        sums = self.processes.sums(self.within_memory(lambda: self.measured(limit)))
        if "loss/weight" not in sums:
            raise DataError(
                "the validation data has no example", fix="add records to it", zh="验证数据中没有样本，请补充"
            )
        return {
            name: value / max(sums[name + "/weight"], 1e-12) for name, value in sums.items() if name + "/weight" in sums
        }

    @torch.no_grad()
    def measured(self, limit: int | None) -> dict[str, float]:
        """This process's sum and weight of every measure."""
        sums: dict[str, float] = {}
        self.objective.begin_validation()
        try:
            for batch in self.objective.validation_batches(limit, self.processes.share):
                batch.to(self.device)
                with autocast(self.device, self.settings.precision):
                    measured = self.objective.measure(self.model, batch)
                for name, (value, weight) in measured.items():
                    sums[name] = sums.get(name, 0.0) + value
                    sums[name + "/weight"] = sums.get(name + "/weight", 0.0) + weight
        finally:
            self.objective.end_validation()
        return sums

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the model's place, if there are any."""
        if not self.average:
            yield
            return
        mine = [parameter.detach().clone() for parameter in self.weights.values()]
        with torch.no_grad():
            self.overwrite(self.average.values())
        try:
            yield
        finally:
            with torch.no_grad():
                self.overwrite(mine)

    @torch.no_grad()
    def overwrite(self, values: Iterable[Tensor]) -> None:
        """Give the trained weights these values, in their order; one by one, for divided tensors know no other way."""
        for parameter, value in zip(self.weights.values(), values, strict=True):
            parameter.copy_(value)

    def evaluate(self, due: int) -> None:
        """Score a part of the validation split and keep the weights if they are among the best so far."""
        state = self.state
        state.evaluations = due
        with self.averaged():
            measures = self.validate(self.settings.validation_tokens)
            loss = measures["loss"]
            better = loss < state.best_loss
            # what is no number cannot be ranked: it would stay the first for ever
            found = [(loss, state.step)] if math.isfinite(loss) else []
            ranked = sorted([*state.kept, *found])[: self.settings.keep_best]
            if (loss, state.step) in ranked:
                whole = self.processes.gathered({name: value.detach() for name, value in self.weights.items()})
                self.processes.on_main(lambda: keep_weights(self.kept, state.step, whole))
                state.kept = ranked
        if better:
            state.best_loss, state.best_step, state.waited = loss, state.step, 0
        else:
            state.waited += 1
        state.stopped = self.settings.patience is not None and state.waited >= self.settings.patience
        self.record(
            step=state.step,
            tokens=state.tokens,
            **{f"validation_{name}": round(value, 6) for name, value in measures.items()},
            elapsed=round(state.elapsed, 3),
        )

    def checkpoint_due(self, seconds: float) -> bool:
        """Whether it is time for a checkpoint."""
        every = self.settings.checkpoint_every
        due = self.state.step % every == 0 if every else seconds >= CHECKPOINT_SECONDS
        return due if every else bool(self.processes.decide(due))

    def finish(self, tokens: int, seconds: float) -> FitResult:
        """Choose between the last and the best weights, on the whole validation split (or a large part of it)."""
        state = self.state
        if self.average:
            with torch.no_grad():
                self.overwrite(self.average.values())
        final = self.validate(FINAL_TOKENS)
        best_step = state.step
        if state.best_step >= 0 and state.best_step < state.step:
            last = {name: value.detach().clone() for name, value in self.weights.items()}
            try:
                self.put(load_weights(self.kept, state.best_step, self.processes.verify))
                measures = self.validate(FINAL_TOKENS)
            except ModelError as error:
                notice(
                    pick(
                        f"the best weights cannot be read, the last ones are kept: {error}",
                        f"最佳权重无法读取，保留最后的权重：{error}",
                    )
                )
                measures = {"loss": math.inf}
            if math.isfinite(measures["loss"]) and not measures["loss"] >= final["loss"]:  # the last may be no number
                final, best_step = measures, state.best_step
            else:
                with torch.no_grad():
                    for name, value in last.items():
                        self.weights[name].copy_(value)
        self.record(
            step=best_step,
            tokens=state.tokens,
            **{f"validation_{name}": round(value, 6) for name, value in final.items()},
            whole=True,
            elapsed=round(state.elapsed, 3),
        )
        speed = tokens / max(seconds, 1e-9)
        return FitResult(final["loss"], best_step, state.step, state.tokens, state.elapsed, speed, final)
