"""Settings that only some tasks have; the task itself refuses one that it does not know."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hanmo.settings import option


@dataclass
class TaskOptions:
    """What can be set of single tasks, beside what all have."""

    samples: int | None = option(
        None, "code: programs that are drawn for each problem; default 1", zh="代码：每道题生成的程序数；默认 1"
    )
    temperature: float | None = option(
        None,
        "code, writing: how freely texts are drawn; default: code 0 (with several samples 0.8), writing 0.8",
        zh="代码、写作：采样温度；默认代码为 0（多个样本时 0.8），写作为 0.8",
    )
    form: str | None = option(
        None,
        "writing: the form of a text whose record names none, e.g. haiku, letter, jueju5 (a quatrain)",
        zh="写作：记录未注明时所用的体裁，如 五言绝句、书信、haiku",
    )
    tries: int | None = option(
        None,
        "writing: texts that are drawn at most until one keeps its form; default 1",
        zh="写作：最多重写多少次以求合乎体裁；默认 1",
    )
    free_form: bool = option(
        False,
        "writing: do not hold the model to lines and lengths of a Chinese form while it writes",
        zh="写作：生成时不强制中文体裁的句数与字数",
    )

    def task_options(self) -> dict[str, Any]:
        """Those that were given, for :func:`hanmo.tasks.registry.find_task`."""
        values = {item.name: getattr(self, item.name) for item in fields(TaskOptions)}
        return {name: value for name, value in values.items() if value is not None and value is not False}
