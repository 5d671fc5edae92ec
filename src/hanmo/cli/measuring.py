"""``hanmo evaluate --task``: a model on the records of a task, beside the task's baselines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hanmo.cli.outcome import Outcome
from hanmo.errors import HanmoError, UsageError
from hanmo.folder import write_json
from hanmo.language import pick
from hanmo.settings import notice

if TYPE_CHECKING:
    from hanmo.cli.evaluate import EvaluateSettings
    from hanmo.evaluation.scoring import Score
    from hanmo.tasks.base import System, Task


def evaluate_task(settings: EvaluateSettings) -> Outcome:
    """Score the baselines and the model on the same records."""
    from hanmo.evaluation.leaks import find_leaks
    from hanmo.evaluation.scoring import difference, win_rate
    from hanmo.evaluation.task_table import render_details, render_scores
    from hanmo.tasks.registry import find_task

    assert settings.task is not None
    task = find_task(settings.task, **settings.task_options())
    if not settings.paths:
        raise UsageError(
            "there are no records to measure on",
            fix=f"hanmo evaluate --task {settings.task} --data FILE --model MODEL",
            zh=f"没有用于评测的记录：hanmo evaluate --task {settings.task} --data 文件 --model 模型",
        )
    given, *more = settings.read(task.kind, settings.paths, *([[settings.train]] if settings.train else []))
    records, train = chosen(given, settings.limit), more[0] if more else []
    leaked = find_leaks(train, records) if train else None
    if leaked is not None and leaked.any():
        notice(
            pick(
                f"{int(leaked.sum()):,} of {len(records):,} records ask what a training record asks; "
                "scores are shown with and without them",
                f"{len(records):,} 条记录中有 {int(leaked.sum()):,} 条出现在训练数据中；将同时给出去除前后的分数",
            )
        )
    settings.ground(task, given if settings.open_book else ())
    systems = systems_of(settings, task, train, records)
    scores = [scored(task, system, train, records, leaked) for system in systems]
    metric = task.metric(records)
    others = scores[:-1] if settings.model else []
    differences = [difference(metric, scores[-1], score) for score in others]
    for name in metric.compared:
        both = [
            score for score in others if math.isfinite(scores[-1].measures[name].value + score.measures[name].value)
        ]
        differences += [difference(metric, scores[-1], score, measure=name) for score in both]
    wins = [found for score in others if (found := win_rate(metric, scores[-1], score)) is not None]
    data: dict[str, Any] = {
        "task": task.name,
        "n": len(records),
        "leaked": 0 if leaked is None else int(leaked.sum()),
        "chance": task.chance(records),
        "scores": [score.as_data() for score in scores],
        "differences": [item.as_data() for item in differences],
        **({"wins": [item.as_data() for item in wins]} if wins else {}),
    }
    if settings.answers:
        write_answers(settings.answers, task, records, scores[-1])
    text = render_scores(scores, [*differences, *wins], chance=task.chance(records))
    details = render_details(scores[-1].details)
    return Outcome(data, f"{text}\n\n{scores[-1].name}:\n{details}" if details else text)


def chosen(records: list[Any], limit: int | None) -> list[Any]:
    """At most so many records, evenly from first to last.

    Raises:
        UsageError: fewer than one is wanted.
    """
    if limit is None or limit >= len(records):
        return records
    if limit < 1:
        raise UsageError("--limit must be at least 1", zh="--limit 至少为 1")
    return [records[place * len(records) // limit] for place in range(limit)]


def systems_of(
    settings: EvaluateSettings, task: Task[Any, Any], train: list[Any], records: list[Any]
) -> list[System[Any, Any]]:
    """The baselines, then the model; those that learn and have nothing to learn from learn the other folds."""
    from hanmo.evaluation.cross import CrossFitted
    from hanmo.inference.loading import load
    from hanmo.tasks.base import Form

    systems: list[System[Any, Any]] = []
    if settings.baseline or not settings.model:
        found = task.baselines(records)
        systems += [system if train or not system.learns else CrossFitted(system) for system in found]
        systems += task.yardsticks(records)
    if settings.model:
        model = load(settings.model, **settings.engine_options(), offline=settings.offline)
        if settings.shots and not train:
            raise UsageError(
                "--shots needs records to show",
                fix="add --train FILE",
                zh="--shots 需要示例：请加上 --train 文件",
            )
        form = Form(settings.shots, settings.seed, settings.instruction)
        if settings.baseline and task.shows_untuned:
            systems += untuned(settings, task, train or records, form)
        systems.append(task.system(model, train or records, form))
        systems[-1].name = settings.model
    return systems


def untuned(settings: EvaluateSettings, task: Task[Any, Any], train: list[Any], form: Any) -> list[System[Any, Any]]:
    """The model that a tuned one was made from; none where it was not tuned, or where that model is not here."""
    from hanmo.inference.loading import base_of, load

    base = base_of(settings.model, offline=settings.offline)
    if not base:
        return []
    try:
        model = load(base, **settings.engine_options(), offline=settings.offline)
    except HanmoError as error:
        notice(
            pick(
                f"'{base}', from which {settings.model} was tuned, is left out: {error.what}",
                f"略去 {settings.model} 微调前的模型 '{base}'：{error.zh or error.what}",
            )
        )
        return []
    system = task.system(model, train, form)
    system.name = pick(f"{base} (untuned)", f"{base}（微调前）")
    return [system]


def scored(task: Task[Any, Any], system: System[Any, Any], train: list[Any], records: list[Any], leaked: Any) -> Score:
    """Let a system learn, if it does, and measure it."""
    from hanmo.evaluation.scoring import score

    notice(pick(f"measuring: {system.name}", f"正在评测：{system.name}"))
    if system.learns:
        system.fit(train)
    return score(task, system, records, leaked=leaked)


def write_answers(path: str, task: Task[Any, Any], records: list[Any], score: Score) -> None:
    """One JSON document with what was answered to which record."""
    from pathlib import Path

    rows = [
        {"where": record.where, "answer": task.row(record, answer)}
        for record, answer in zip(records, score.answers, strict=True)
    ]
    write_json(Path(path), {"signature": score.signature, "answers": rows})
