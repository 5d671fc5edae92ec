"""``--search MINUTES``: what the verbs that train let a search vary, and how its winner becomes the run's settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.road import Prepared, RoadSettings, recipe_fingerprint
from hanmo.errors import UsageError
from hanmo.folder import write_json
from hanmo.language import pick
from hanmo.settings import Resolution, notice
from hanmo.training.settings import LoopSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hanmo.cli.bases import Base
    from hanmo.cli.finetune import FinetuneSettings
    from hanmo.cli.goals import Goal
    from hanmo.training.fit import FitSettings
    from hanmo.training.objectives import Objective
    from hanmo.training.search import Build
    from hanmo.training.search_record import SearchRecord
    from hanmo.training.search_space import Dimension


def find_values(
    run: Path,
    settings: LoopSettings,
    dimensions: Callable[[float], list[Dimension]],
    build: Build,
    device: torch.device,
) -> SearchRecord | None:
    """The search of this run: the one that it has, or a new one; None where the training has begun without one.

    Raises:
        HanmoError: see :func:`hanmo.training.search.search`; or the user has chosen everything.
    """
    from hanmo.training.search import search
    from hanmo.training.search_record import FILE, SearchRecord

    assert settings.search is not None
    record = SearchRecord.read(run / FILE)
    if record is not None and record.finished:
        return record
    if (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir()):
        notice(
            pick(
                "this training has begun without a search, which would change its settings: --search is passed over",
                "该训练开始时没有搜索，此时搜索会改变设置：忽略 --search",
            )
        )
        return None
    if not dimensions(1.0):
        raise UsageError(
            "--search has nothing to vary",
            why="learning rate, batch size and the others were all given",
            fix="leave one of them out, or --search",
            zh="--search 没有可搜索的设置：学习率、批大小等均已给出。请去掉其中一个，或去掉 --search",
        )
    record = search(run / FILE, dimensions, build, minutes=settings.search, seed=settings.seed, device=device)
    notice(record.describe())
    return record


def adopt(settings: LoopSettings, record: dict[str, Any], found: SearchRecord) -> dict[str, Any]:
    """Give the settings the winner's values, and the run's record the search as their reason."""
    take(settings, found.chosen)
    reasons = dict.fromkeys(found.chosen, found.reason())
    return {**record, "settings": asdict(settings), "computed": {**record["computed"], **reasons}}


def take(settings: LoopSettings, values: dict[str, Any]) -> None:
    """Give the settings these values; a micro-batch is no larger than its batch."""
    for name, value in values.items():
        setattr(settings, name, value)
    if settings.micro_batch is not None and settings.batch_size is not None:
        settings.micro_batch = min(settings.micro_batch, settings.batch_size)


@contextmanager
def varied(settings: LoopSettings, values: dict[str, Any]) -> Iterator[None]:
    """The settings with other values, while the block lasts."""
    before = {name: getattr(settings, name) for name in (*values, "micro_batch")}
    take(settings, values)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def prepare_trial(model: nn.Module, settings: LoopSettings) -> None:
    """What is applied to the network of a trial: nothing that takes time to pay."""
    from hanmo.models.kernels.products import set_precision
    from hanmo.training.acceleration import checkpoint_blocks

    if settings.precision == "int8":
        set_precision(model, "int8")
    if settings.activation_checkpointing:
        checkpoint_blocks(model)


def search_pretraining(run: Path, settings: RoadSettings, prepared: Prepared, device: torch.device) -> Prepared:
    """What stands before the training, with the values that a search has found, if one was asked for."""
    from hanmo.cli.fitting import loop_settings, make_goal, make_plan, preflight_of, use_precision
    from hanmo.training.search_space import usual_dimensions

    if settings.search is None:
        return prepared
    texts, computed = prepared.texts, prepared.record["computed"]
    assert settings.context is not None
    windows = len(texts.tokens.tokens("train")) // settings.context

    def dimensions(share: float) -> list[Dimension]:
        return usual_dimensions(settings, computed, share, most_examples=max(1, windows // 4))

    def build(values: dict[str, Any]) -> tuple[nn.Module, Objective[Any, Any], FitSettings]:
        with varied(settings, values):
            plan = make_plan(settings, Resolution(), texts, prepared.machine, device)
            model, goal = make_goal(settings, plan, texts)
            prepare_trial(model, settings)
            horizon = (plan.steps, plan.seconds, plan.max_tokens, plan.tokens)
            return model, goal, loop_settings(settings, plan.optimizer, "", *horizon)

    model, goal = make_goal(settings, prepared.plan, texts)  # a mistake must be told before minutes are spent
    preflight_of(settings, prepared, goal, device)
    use_precision(model, settings.precision, device)
    del model, goal
    found = find_values(run, settings, dimensions, build, device)
    if found is None:
        return prepared
    record = adopt(settings, prepared.record, found)
    plan = make_plan(settings, Resolution(), texts, prepared.machine, device)
    record["recipe"] = recipe_fingerprint(settings, texts.tokens, plan)
    write_json(run / "settings.json", record)
    return replace(prepared, plan=plan, record=record)


def search_tuning(
    run: Path,
    settings: FinetuneSettings,
    record: dict[str, Any],
    base: Base,
    goal: Goal,
    device: torch.device,
    recipe: Callable[[], str],
) -> dict[str, Any]:
    """The record of a fine-tuning with the values that a search has found; the settings and the base follow them.

    Args:
        recipe: its fingerprint with the settings that are then in force.
    """
    from hanmo.cli.tuning import loop_of, settle_horizon, with_teacher
    from hanmo.training.search_space import usual_dimensions

    rank = settings.rank
    base.model.to(device)

    def dimensions(share: float) -> list[Dimension]:
        examples = max(1, goal.examples)
        return usual_dimensions(settings, record["computed"], share, most_examples=examples, adapters=settings.lora)

    def build(values: dict[str, Any]) -> tuple[nn.Module, Objective[Any, Any], FitSettings]:
        with varied(settings, values):
            own = replace(base, model=copy.deepcopy(base.model))
            if settings.rank != rank:
                change_rank(own, settings)
            prepare_trial(own.model, settings)
            objective = with_teacher(settings, goal.build(), own.model, device)
            horizon = settle_horizon(settings, Resolution(), base, goal)
            return own.model, objective, loop_of(settings, base, horizon, "")

    found = find_values(run, settings, dimensions, build, device)
    if found is None:
        return record
    record = adopt(settings, record, found)
    if settings.rank != rank:
        change_rank(base, settings)
    record["recipe"] = recipe()
    write_json(run / "settings.json", record)
    return record


def change_rank(base: Base, settings: FinetuneSettings) -> None:
    """Replace the adapters, which have learned nothing yet, by those of another rank."""
    from hanmo.cli.bases import ADAPTER, choose_weights
    from hanmo.models.adapters import remove_adapter

    remove_adapter(base.model, ADAPTER)
    choose_weights(base, settings)
