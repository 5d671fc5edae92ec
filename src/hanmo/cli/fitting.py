"""The training stage of the road: what the dial chooses for an architecture, the fit, and the model folder."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hanmo.cli.road import Prepared, RoadSettings, Texts, TrainedRun, versions
from hanmo.errors import UsageError
from hanmo.language import pick
from hanmo.settings import Resolution, notice

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hanmo.training.fit import FitResult, FitSettings
    from hanmo.training.objectives import Objective
    from hanmo.training.optimizer import OptimizerSettings
    from hanmo.training.plan import Machine, Plan
    from hanmo.training.processes import Processes
    from hanmo.training.settings import LoopSettings
    from hanmo.training.trackers import Tracker


EVALUATION_SHARE = 0.05  # of the time of a run, for the evaluations on the way
EVALUATION_TOKENS = (8192, 32_768)  # fewer are too noisy to choose weights by, more tell little more


class Described(Protocol):
    """What can be told before a run."""

    def describe(self, *, colour: bool = False) -> str: ...


def choose_size(settings: RoadSettings, resolution: Resolution, machine: Machine, vocab_size: int | None) -> str:
    """Settle the size of the network by the dial of its architecture; ``vocab_size`` where it is known already."""
    from hanmo.training import plan, plan_recurrent

    if settings.architecture == "transformer":
        return plan.choose_size(settings, resolution, machine, vocab_size=vocab_size)
    return plan_recurrent.choose_recurrent_size(settings, resolution, machine, vocab_size=vocab_size)


def make_plan(
    settings: RoadSettings, resolution: Resolution, texts: Texts, machine: Machine, device: torch.device
) -> Plan:
    """Settle what is open by the dial of the architecture."""
    from hanmo.training import plan, plan_recurrent

    tokens = texts.tokens
    sizes = {split: len(tokens.tokens(split)) for split in ("train", "validation", "test")}
    if settings.architecture == "transformer":
        return plan.make_plan(
            settings,
            resolution,
            vocab_size=tokens.vocab_size,
            train_tokens=sizes["train"],
            held_out_tokens=min((sizes[split] for split in ("validation", "test") if sizes[split]), default=0),
            machine=machine,
            device=device,
        )
    return plan_recurrent.make_recurrent_plan(
        settings,
        resolution,
        vocab_size=tokens.vocab_size,
        train_tokens=sizes["train"],
        words=texts.corpus is None,
        machine=machine,
        device=device,
    )


def make_goal(settings: RoadSettings, plan: Plan, texts: Texts) -> tuple[nn.Module, Objective[Any, Any]]:
    """A new model and what it learns."""
    from hanmo.data.tokens import TokenCorpus
    from hanmo.models.recurrent import RecurrentConfig, RecurrentModel
    from hanmo.models.transformer import Transformer
    from hanmo.training.objectives import CausalLanguageModeling, TruncatedBackpropagation
    from hanmo.training.objectives.masked import MaskedLanguageModeling
    from hanmo.training.objectives.words import mark_words

    tokens = texts.tokens
    assert settings.context is not None
    train, validation = tokens.tokens("train"), tokens.tokens("validation")
    sizes: dict[str, int] = {
        "context": settings.context,
        "batch_size": plan.batch_size,
        "micro_batch": plan.micro_batch,
        "seed": settings.seed,
    }
    if isinstance(plan.config, RecurrentConfig):
        recurrent = RecurrentModel(plan.config)
        recurrent.initialize(settings.seed)
        return recurrent, TruncatedBackpropagation(train, validation, start_id=tokens.eos_id, **sizes)
    model = Transformer(plan.config)
    model.initialize(settings.seed)
    separator = tokens.eos_id if isinstance(tokens, TokenCorpus) else None  # sentences of a word corpus are one text
    if settings.objective == "masked":
        assert texts.corpus is not None and isinstance(tokens, TokenCorpus)
        marks = [mark_words(texts.corpus, tokens, texts.tokenizer, split) for split in ("train", "validation")]
        return model, MaskedLanguageModeling.over_corpus(
            (train, marks[0]), (validation, marks[1]), texts.tokenizer, separator=separator, **sizes
        )
    return model, CausalLanguageModeling(train, validation, separator=separator, **sizes)


def fit(
    run: Path,
    settings: RoadSettings,
    prepared: Prepared,
    processes: Processes,
    device: torch.device,
    trackers: tuple[Tracker, ...],
) -> tuple[nn.Module, FitResult]:
    """Train a new model, or go on with the run's newest checkpoint."""
    from hanmo.cli.together import prepare_model
    from hanmo.training.fit import Trainer
    from hanmo.training.preflight import wants_colour

    plan = prepared.plan
    model, goal = processes.first_main(lambda: make_goal(settings, plan, prepared.texts))
    notice(preflight_of(settings, prepared, goal, device).describe(colour=wants_colour(sys.stderr)))
    use_precision(model, settings.precision, device)
    prepare_model(model, settings, device, plan.expected_seconds)
    recipe = prepared.record["recipe"]
    loop = loop_settings(settings, plan.optimizer, recipe, plan.steps, plan.seconds, plan.max_tokens, plan.tokens)
    trainer = Trainer(
        model, goal, loop, run, device=device, resume=settings.resume, processes=processes, trackers=trackers
    )
    return model, trainer.fit()


def preflight_of(
    settings: RoadSettings, prepared: Prepared, goal: Objective[Any, Any], device: torch.device
) -> Described:
    """What a run will take, and for a decoder one window as it will see it.

    Raises:
        DataError: no document is closed, so that the model would never learn to stop.
        ResourceError: it will not fit into memory.
    """
    from hanmo.data.tokens import TokenCorpus
    from hanmo.models.device import available_memory
    from hanmo.models.recurrent import RecurrentConfig
    from hanmo.training.energy import power_of
    from hanmo.training.estimates import estimate
    from hanmo.training.plan import LADDER, model_config, work_of
    from hanmo.training.preflight import Preflight, check_separator, preview
    from hanmo.training.settings import SIZES

    plan, texts = prepared.plan, prepared.texts
    if isinstance(plan.config, RecurrentConfig):
        return plan
    assert settings.context is not None and settings.size is not None
    smaller = {
        f"--size {size}": model_config(size, plan.config.vocab_size, LADDER[size].context, settings.objective)
        for size in reversed(SIZES[: SIZES.index(settings.size)])
    }
    work = work_of(settings, plan.config, goal.micro_batch, device)
    expected = estimate(
        work,
        tokens=plan.tokens,
        tokens_per_second=plan.tokens_per_second,
        available=available_memory(device),
        power=power_of(device),
        seconds=plan.expected_seconds,
        smaller=smaller,
    )
    expected.require_memory()
    if settings.objective == "masked" or not isinstance(texts.tokens, TokenCorpus):
        return Preflight(expected)
    separator = texts.tokens.eos_id
    check_separator(texts.tokens.tokens("train"), separator, texts.tokenizer)
    return Preflight(expected, preview(goal, texts.tokenizer, {separator}, must_stop=False))


def loop_settings(
    settings: LoopSettings,
    optimizer: OptimizerSettings,
    recipe: str,
    steps: int | None,
    seconds: float | None,
    max_tokens: float = math.inf,
    expected_tokens: float = math.inf,
    **schedule: float,
) -> FitSettings:
    """What the loop of a run needs, from the user's settings.

    Args:
        steps, seconds: the horizon; exactly one is given.
        expected_tokens: of the whole run; evaluations take about a twentieth of its time (a token that is only read
            costs a third of one that is learned).
        schedule: fields of :class:`~hanmo.training.schedule.Schedule` that differ from its defaults.
    """
    from hanmo.training.fit import EVALUATIONS, FitSettings
    from hanmo.training.schedule import Schedule

    if settings.cooldown is not None:
        schedule["cooldown"] = settings.cooldown
    share = EVALUATION_SHARE * 3 * min(expected_tokens, 1e12)
    evaluations = int(min(EVALUATIONS, max(4, share // EVALUATION_TOKENS[0])))
    return FitSettings(
        optimizer=optimizer,
        max_steps=steps,
        budget_seconds=seconds,
        max_tokens=max_tokens,
        clip=settings.clip,
        checkpoint_every=settings.checkpoint_every,
        recipe=recipe,
        schedule=Schedule(**schedule),  # type: ignore[arg-type]
        seed=settings.seed,
        evaluations=evaluations,
        validation_tokens=int(min(EVALUATION_TOKENS[1], max(EVALUATION_TOKENS[0], share // evaluations))),
        precision=settings.precision,
        patience=settings.patience,
        keep_best=settings.keep_best,
        average=settings.average,
    )


def use_precision(model: nn.Module, precision: str, device: torch.device) -> None:
    """Let the products inside the blocks have a precision, and say so where it gains nothing.

    Raises:
        UsageError: this device has no such products.
    """
    from hanmo.models.kernels.int8 import reason_against
    from hanmo.models.kernels.products import set_precision

    if precision == "fp32":
        return
    if (precision == "int8") != (device.type == "cpu"):
        fits = "int8" if device.type == "cpu" else "bf16"
        raise UsageError(
            f"--precision {precision} is not for the device '{device.type}'",
            why="8-bit products are made for CPUs, bfloat16 for GPUs",
            fix=f"give --precision {fits}, or leave it out",
            zh=f"--precision {precision} 不适用于 {device.type}；请改用 {fits} 或去掉",
        )
    if precision == "int8":
        set_precision(model, "int8")
        if reason := reason_against():
            notice(pick(f"int8 will not be faster here: {reason}", f"int8 在本机不会更快：{reason}"))


def provenance_of(texts: Texts, record: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """The entries of the model folder's ``hanmo.json``."""
    tokenizer = texts.tokenizer
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return {
        "kind": "model",
        "prompt_prefix": [] if start is None else [start],
        "settings": record["settings"],
        "data": texts.record(),
        "metrics": metrics,
        **versions(),
    }


def save_model(trained: TrainedRun, model: nn.Module, processes: Processes) -> None:
    """Write the model folder with its provenance; of several processes, the first one does."""
    weights = processes.gathered(model.state_dict())
    processes.on_main(lambda: write_model(trained, model, weights))


def write_model(trained: TrainedRun, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Write the model folder."""
    from hanmo.models.checkpoints.recurrent import save_recurrent
    from hanmo.models.checkpoints.save import save_folder
    from hanmo.models.recurrent import RecurrentModel
    from hanmo.models.transformer import Transformer, build

    result = trained.result
    metrics = {"validation_loss": result.validation_loss, "steps": result.steps, "tokens": result.tokens}
    provenance = provenance_of(trained.texts, trained.record, metrics)
    if isinstance(model, RecurrentModel):
        save_recurrent(trained.model_folder, model, trained.tokenizer, provenance)
    else:
        assert isinstance(model, Transformer)
        whole = build(model.config, {name: value.cpu() for name, value in weights.items()}, checked=True)
        save_folder(trained.model_folder, whole, trained.tokenizer, provenance=provenance)
