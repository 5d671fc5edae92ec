"""``hanmo finetune --base logistic`` and its like: models that learn from records alone, without weights before."""

from __future__ import annotations

import shutil
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hanmo.cli.outcome import Outcome
from hanmo.errors import UsageError
from hanmo.folder import write_json
from hanmo.language import pick
from hanmo.progress import human_time
from hanmo.settings import Resolution, flag, notice
from hanmo.training.settings import LoopSettings

if TYPE_CHECKING:
    from hanmo.cli.finetune import FinetuneSettings

LEARNERS = {  # by task, what learns from records alone
    "classification": ("logistic", "svm", "naive-bayes", "nb-logistic", "lstm"),
    "tagging": ("crf", "bilstm-crf"),
    "semantic-roles": ("crf",),
}
COMMON = ("seed", "device")  # settings of a training in steps that do no harm here


def is_learner(settings: FinetuneSettings) -> bool:
    """Whether the base is the name of a model that learns from records alone."""
    return settings.base in LEARNERS.get(settings.task, ())


def check_learner(settings: FinetuneSettings) -> None:
    """Raise UsageError for settings of a training in steps."""
    usual = type(settings)()
    for item in fields(LoopSettings):
        if item.name not in COMMON and getattr(settings, item.name) != getattr(usual, item.name):
            raise UsageError(
                f"{flag(item.name)} means nothing for --base {settings.base}",
                why="it learns from all records at once, or knows itself how long to learn",
                fix="leave it out",
                zh=f"{flag(item.name)} 对 --base {settings.base} 不起作用，请去掉",
            )
    for name in ("lora", "last_layers", "teacher", "crf", "balanced"):
        if getattr(settings, name) != getattr(usual, name):
            raise UsageError(
                f"{flag(name)} belongs to a base that is a network",
                fix="leave it out, or take a base of hanmo models",
                zh=f"{flag(name)} 只用于神经网络基础模型；请去掉，或换用 hanmo models 中的模型",
            )


def teach(settings: FinetuneSettings) -> Outcome:
    """Let it learn, measure it beside the baselines on the validation data, and keep it at ``<run>/model``.

    Raises:
        HanmoError: nothing can be learned from the files, or a package is missing; an earlier run is then intact.
    """
    from hanmo.cli.measuring import scored
    from hanmo.cli.road import open_run, versions
    from hanmo.cli.splits import read_splits
    from hanmo.evaluation.scoring import difference
    from hanmo.evaluation.task_table import render_details, render_scores
    from hanmo.models.device import set_threads
    from hanmo.tasks.registry import find_task

    task: Any = find_task(settings.task)
    set_threads()
    with open_run(settings.paths, settings) as run:
        splits = read_splits(run, settings, follower=False)
        system = task.learner(settings.base, splits.train)
        others = [item for item in task.baselines(splits.train) if item.key != settings.base] * settings.baseline
        scores = [scored(task, item, splits.train, splits.validation, None) for item in others]
        notice(pick(f"learning: {system.name}", f"正在训练：{system.name}"))
        began = time.monotonic()
        system.fit(splits.train, splits.validation)
        seconds = time.monotonic() - began
        system.learns = False
        scores.append(scored(task, system, [], splits.validation, None))
        target = run / "model"
        shutil.rmtree(target, ignore_errors=True)
        system.save(target)
        write_json(run / "settings.json", {**Resolution().record(settings), **versions()})
    metric = task.metric(splits.validation)
    differences = [difference(metric, scores[-1], item) for item in scores[:-1]]
    data = {
        "run": str(run),
        "model": str(target),
        "seconds": seconds,
        "records": {"train": len(splits.train), "validation": len(splits.validation)},
        "measures": scores[-1].as_data()["measures"],
        "baselines": [item.as_data() for item in scores[:-1]],
    }
    table = render_scores(scores, differences, chance=task.chance(splits.validation))
    if details := render_details(scores[-1].details):
        table += f"\n\n{scores[-1].name}:\n{details}"
    took = human_time(seconds)
    head = pick(f"on the validation data, after learning for {took}:", f"验证结果（训练用时 {took}）：")
    return Outcome(data, f"{head}\n{table}\n\n" + pick(f"model:  {target}", f"模型：{target}"))
