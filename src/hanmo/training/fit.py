"""The trainer: one loop for every objective.

A run has a *horizon*, a number of steps or a time, and everything that changes during training (rate, evaluations) is
a function of the fraction of it that is done. With a number of steps a run is a function of its seed: stopping, or
killing, and resuming it gives the same weights bit for bit. With a time, the clock decides how many steps fit.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from hanmo.errors import Interrupted, ModelError
from hanmo.language import pick
from hanmo.progress import Progress, RunLog
from hanmo.training.checkpoint import TrainingState, load_newest, save_checkpoint
from hanmo.training.objectives import Objective
from hanmo.training.optimizer import Optimizer, OptimizerSettings

EVALUATIONS = 20  # per run, evenly over its horizon
WARMUP_STEPS = 20  # short: the blocks start as identities, so full rates are safe early
COOLDOWN = 0.6  # the last share of the horizon, in which the rate falls linearly
FINAL_RATE = 0.02  # of the peak
CHECKPOINT_SECONDS = 60.0
BEST, CARRIED = "best.", "carried."  # what stands before the names of these tensors in a checkpoint
FINAL_TOKENS = 500_000  # the closing evaluation must not outlast the training; most validation splits are smaller

ModelT = TypeVar("ModelT", bound=nn.Module)


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
    """

    optimizer: OptimizerSettings
    max_steps: int | None = None
    budget_seconds: float | None = None
    max_tokens: float = math.inf
    clip: float = 1.0
    checkpoint_every: int | None = None
    validation_tokens: int = 32_768
    recipe: str = ""


@dataclass
class FitResult:
    """What training ended with.

    Args:
        validation_loss: nats per token of the weights that were kept, on the whole validation split, or on 500,000
            tokens spread over a larger one.
        best_step: the step those weights are from.
        steps, tokens, seconds: of the whole run, all sessions together.
        tokens_per_second: of this session.
    """

    validation_loss: float
    best_step: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float


def rate_scale(fraction: float, step: int) -> float:
    """Share of the peak rate: warm-up, a plateau, and a linear fall (WSD; Hu et al. 2024).

    >>> rate_scale(0.3, 500), round(rate_scale(1.0, 900), 2)
    (1.0, 0.02)
    """
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cool = min(1.0, (1 - fraction) / COOLDOWN)
    return warm * max(FINAL_RATE, cool)


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


def named(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class Trainer(Generic[ModelT]):
    """One run: model, objective and settings, and the folder that holds its log and checkpoints.

    Args:
        run: folder of the run; ``log.jsonl`` and ``checkpoints/`` are written there.
        resume: go on from the newest valid checkpoint, if there is one.
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
    ) -> None:
        self.model, self.objective, self.settings = model.to(device), objective, settings
        self.run, self.device, self.resume = run, device, resume
        self.checkpoints = run / "checkpoints"
        self.optimizer = Optimizer(model, settings.optimizer)
        self.state = TrainingState(recipe=settings.recipe)
        self.best: dict[str, torch.Tensor] = {}

    def fit(self) -> FitResult:
        """Train to the end of the horizon; the model is left with the weights of the best evaluation.

        Raises:
            Interrupted: Ctrl-C; a checkpoint was written first.
            ModelError: the loss is not finite, or the checkpoint belongs to another recipe.
        """
        with stop_on_interrupt() as asked_to_stop:
            if self.resume:
                self.restore()
            self.log = RunLog(self.run / "log.jsonl")
            try:
                return self.loop(asked_to_stop)
            finally:
                self.log.close()

    def restore(self) -> None:
        """Take over the newest valid checkpoint, if there is one."""
        checkpoint = load_newest(self.checkpoints)
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
        self.model.load_state_dict({name: checkpoint.model[name] for name in self.model.state_dict()})
        self.best = named(checkpoint.model, BEST)
        self.objective.load_state_tensors(
            {name: value.to(self.device) for name, value in named(checkpoint.model, CARRIED).items()}
        )
        self.optimizer.load_state_tensors(checkpoint.optimizer)

    def fraction(self, elapsed: float) -> float:
        """The share of the horizon that is done."""
        if self.settings.max_steps is not None:
            return self.state.step / self.settings.max_steps
        assert self.settings.budget_seconds is not None
        return max(elapsed / self.settings.budget_seconds, self.state.tokens / self.settings.max_tokens)

    def loop(self, asked_to_stop: Callable[[], bool]) -> FitResult:
        """Step, evaluate and save until the horizon is reached."""
        state, start = self.state, time.monotonic() - self.state.elapsed
        saved_at = state.elapsed
        seen_before, began = state.tokens, time.monotonic()
        with Progress(pick("training", "训练"), unit="tokens") as progress:
            while (done := self.fraction(state.elapsed)) < 1:
                loss = self.step(done)
                state.step += 1
                state.tokens += self.objective.tokens_per_step()
                state.elapsed = time.monotonic() - start
                rate = (state.tokens - seen_before) / (time.monotonic() - began)
                progress.update(state.tokens, self.note(loss, rate), fraction=self.fraction(state.elapsed))
                due = math.floor(self.fraction(state.elapsed) * EVALUATIONS)
                if due > state.evaluations and due < EVALUATIONS:
                    self.evaluate(due)
                    state.elapsed = time.monotonic() - start
                if self.checkpoint_due(state.elapsed - saved_at):
                    self.save()
                    state.elapsed = saved_at = time.monotonic() - start
                if asked_to_stop():
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
        """One optimizer step; returns its loss in nats per token."""
        self.model.train()
        total, tokens = 0.0, self.objective.tokens_per_step()
        for batch in self.objective.micro_batches(self.state.step):
            batch.ids, batch.targets = batch.ids.to(self.device), batch.targets.to(self.device)
            summed = self.objective.loss(self.model, batch)
            (summed / tokens).backward()  # type: ignore[no-untyped-call]
            total += float(summed.detach())
        loss = total / tokens
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ModelError(
                f"the loss is {loss} and the norm of its gradient {norm} at step {self.state.step}",
                where=str(self.run),
                why="the training diverged; the checkpoints hold the weights from before",
                fix="start anew with --overwrite and half the --learning-rate",
                zh=f"第 {self.state.step} 步训练发散（损失 {loss}）；检查点仍是此前的权重。"
                "请用 --overwrite 并把 --learning-rate 减半重新开始",
            )
        scale = rate_scale(done, self.state.step)
        self.optimizer.step(scale)
        self.log.write(
            step=self.state.step + 1,
            tokens=self.state.tokens + tokens,
            loss=round(loss, 6),
            rate=round(self.settings.optimizer.matrix_rate * scale, 6),
            elapsed=round(self.state.elapsed, 3),
        )
        return loss

    def note(self, loss: float, rate: float) -> str:
        """The end of the progress line."""
        best = f"  best {self.state.best_loss:.3f}" if self.state.best_step >= 0 else ""
        return f"step {self.state.step}  loss {loss:.3f}{best}  {rate:,.0f} tok/s"

    def evaluate(self, due: int) -> None:
        """Score a part of the validation split and keep the weights if they are the best so far."""
        state = self.state
        state.evaluations = due
        self.model.eval()
        loss = self.objective.validate(self.model, self.device, self.settings.validation_tokens)
        if loss < state.best_loss:
            state.best_loss, state.best_step = loss, state.step
            self.best = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.log.write(
            step=state.step, tokens=state.tokens, validation_loss=round(loss, 6), elapsed=round(state.elapsed, 3)
        )

    def checkpoint_due(self, seconds: float) -> bool:
        """Whether it is time for a checkpoint."""
        every = self.settings.checkpoint_every
        return self.state.step % every == 0 if every else seconds >= CHECKPOINT_SECONDS

    def save(self) -> None:
        """Write a checkpoint: weights, the best weights so far, what the objective carries, optimizer and state."""
        tensors = dict(self.model.state_dict())
        tensors.update({BEST + name: value for name, value in self.best.items()})
        tensors.update({CARRIED + name: value for name, value in self.objective.state_tensors().items()})
        save_checkpoint(self.checkpoints, tensors, self.optimizer.state_tensors(), self.state)

    def finish(self, tokens: int, seconds: float) -> FitResult:
        """Choose between the last and the best weights, on the whole validation split (or a large part of it)."""
        self.model.eval()
        final = self.objective.validate(self.model, self.device, FINAL_TOKENS)
        best_step = self.state.step
        if self.best and self.state.best_step < self.state.step:
            last = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self.best)
            loss = self.objective.validate(self.model, self.device, FINAL_TOKENS)
            if loss < final:
                final, best_step = loss, self.state.best_step
            else:
                self.model.load_state_dict(last)
        self.log.write(
            step=best_step,
            tokens=self.state.tokens,
            validation_loss=round(final, 6),
            whole=True,
            elapsed=round(self.state.elapsed, 3),
        )
        return FitResult(
            final, best_step, self.state.step, self.state.tokens, self.state.elapsed, tokens / max(seconds, 1e-9)
        )
