"""``hanmo pretrain``: train a language model from the beginning on texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from hanmo.cli.outcome import Outcome
from hanmo.cli.road import RoadSettings, open_run, train_run
from hanmo.language import pick
from hanmo.progress import human_time
from hanmo.settings import argument

HELP = "train a language model from the beginning on texts"
HELP_ZH = "用文本从零训练一个语言模型"


@dataclass
class PretrainSettings(RoadSettings):
    """Settings of ``hanmo pretrain``."""

    paths: list[str] = argument(
        "files, folders or globs, or a folder that 'hanmo data' wrote; default: Python's standard library",
        zh="文件、文件夹、通配符，或 hanmo data 的输出；默认为 Python 标准库",
        many=True,
    )


def run(settings: PretrainSettings) -> Outcome:
    """Train and tell how it ended."""
    with open_run(settings.paths, settings) as folder:
        trained = train_run(folder, settings.paths, settings)
    result = trained.result
    data = {"run": str(trained.run), "model": str(trained.model_folder), **asdict(result)}
    loss = f"{result.validation_loss:.4f}"
    text = pick(
        f"validation loss {loss} nats per token after {result.steps:,} steps in "
        f"{human_time(result.seconds)}\nmodel: {trained.model_folder}",
        f"验证损失 {loss} 纳特/词元，共 {result.steps:,} 步，用时 {human_time(result.seconds)}\n"
        f"模型：{trained.model_folder}",
    )
    return Outcome(data, text)
