"""What the result of a fine-tuning is compared with: classical models of the same records, or the base as it was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hanmo.cli.finetune import NEW, FinetuneSettings
from hanmo.cli.splits import Splits
from hanmo.folder import read_json, write_json
from hanmo.language import pick
from hanmo.settings import notice

if TYPE_CHECKING:
    from hanmo.evaluation.task_baselines import Score
    from hanmo.training.processes import Processes

FILE = "baselines.json"
CLASSICAL = ("classification", "tagging", "semantic-roles")
CAN_ALREADY = ("seq2seq", "instructions", "embeddings", "text")  # the base has an answer before it learns


def find_scores(
    run: Path,
    settings: FinetuneSettings,
    splits: Splits,
    processes: Processes,
    measure_base: Callable[[], dict[str, float]],
) -> list[Score]:
    """Measure them at the first start, and tell them; a resumed run has them in its folder.

    Args:
        measure_base: what the base reaches on the validation data before it is trained; all processes take part.
    """
    from hanmo.evaluation.task_baselines import (
        Score,
        classification_scores,
        describe_scores,
        read_scores,
        tagging_scores,
    )

    path = run / FILE
    if not settings.baseline:
        return []
    if settings.resume:
        return read_scores(read_json(path)["scores"]) if path.is_file() else []
    scores: list[Score] = []
    if settings.base == NEW:
        return []
    if settings.task in CAN_ALREADY:
        scores = [Score(pick("the base, before", "训练前的基础模型"), measure_base())]
    elif settings.task in CLASSICAL:
        notice(pick("measuring what the network has to beat ...", "正在计算对照基线……"))
        if settings.task == "classification":
            action = partial(classification_scores, splits.train, splits.validation, settings.multi_label)
        else:
            template = "roles" if settings.task == "semantic-roles" else None
            action = partial(tagging_scores, splits.train, splits.validation, template=template)
        scores = processes.on_main(action) or []
    processes.on_main(lambda: write_json(path, {"scores": [score.as_dict() for score in scores]}))
    if scores:
        notice(pick("to beat, on the validation data:", "对照（同一验证数据）：") + "\n" + describe_scores(scores))
    return scores
