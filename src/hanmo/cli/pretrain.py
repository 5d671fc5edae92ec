"""``hanmo pretrain``: train a language model from the beginning on texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from hanmo.cli.outcome import Outcome
from hanmo.cli.road import RoadSettings, open_run, train_run
from hanmo.cli.together import run_together, start_workers
from hanmo.errors import UsageError
from hanmo.language import pick
from hanmo.progress import human_time
from hanmo.settings import argument, option

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
    validation: str | None = option(
        None,
        "with --tokenizer words: the file that training is checked on",
        zh="与 --tokenizer words 合用：训练中用于验证的文件",
        metavar="FILE",
    )
    test: str | None = option(
        None,
        "with --tokenizer words: a file to report word perplexity on",
        zh="与 --tokenizer words 合用：报告词困惑度的文件",
        metavar="FILE",
    )

    def check(self) -> None:
        """Raise UsageError for values that cannot work, before any file is read."""
        super().check()
        given = [flag for flag, value in (("--validation", self.validation), ("--test", self.test)) if value]
        if given and self.tokenizer != "words":
            raise UsageError(
                f"{given[0]} belongs to --tokenizer words",
                why="other texts are divided into training, validation and test by document",
                fix="leave it out, or add --tokenizer words",
                zh=f"{given[0]} 只与 --tokenizer words 合用；其他文本按文档自动划分",
            )


def word_files(settings: PretrainSettings) -> dict[str, list[str]] | None:
    """The files of each split of a word-level corpus; None for other texts.

    Raises:
        UsageError: a file is missing, or settings of data preparation were given.
    """
    from hanmo.cli.words import refuse_data_settings

    if settings.tokenizer != "words":
        return None
    refuse_data_settings(settings)
    example = "hanmo pretrain train.txt --tokenizer words --validation valid.txt"
    if not settings.paths:
        raise UsageError(
            "a word-level corpus needs a training file", fix=example, zh=f"词级语料需要训练文件，例如：{example}"
        )
    if settings.validation is None and settings.architecture != "ngram":
        raise UsageError(
            "--validation is missing",
            why="training keeps the weights that predict it best; a word-level corpus is not divided",
            fix=example,
            zh=f"缺少 --validation：训练依据它保留最好的权重。例如：{example}",
        )
    held_out = {"validation": settings.validation, "test": settings.test}
    return {"train": settings.paths, **{split: [path] for split, path in held_out.items() if path}}


def run(settings: PretrainSettings) -> Outcome:
    """Train and tell how it ended."""
    settings.check()
    words = word_files(settings)
    if settings.architecture == "ngram":
        with open_run(settings.paths, settings) as folder:
            return count(folder, settings, words)
    start_workers(settings)
    with run_together(settings.paths, settings) as (folder, processes, device):
        trained = train_run(folder, settings.paths, settings, processes, device, words)
        if not processes.main:
            return Outcome({}, "")
        result = trained.result
        data = {"run": str(trained.run), "model": str(trained.model_folder), **asdict(result)}
        loss = f"{result.validation_loss:.4f}"
        text = pick(
            f"validation loss {loss} nats per token after {result.steps:,} steps in "
            f"{human_time(result.seconds)}\nmodel: {trained.model_folder}",
            f"验证损失 {loss} 纳特/词元，共 {result.steps:,} 步，用时 {human_time(result.seconds)}\n"
            f"模型：{trained.model_folder}",
        )
        if words is not None:
            text = add_words(data, folder, text)
    return Outcome(data, text)


def count(folder: Path, settings: PretrainSettings, words: dict[str, list[str]] | None) -> Outcome:
    """Count an n-gram model and tell how well it predicts."""
    from hanmo.cli.ngram import count_run, describe_heldout

    counted = count_run(folder, settings.paths, settings, words)
    data = {"run": str(folder), "model": str(counted.model_folder), "seconds": counted.seconds}
    data |= {"ngrams": counted.model.describe()}
    text = pick(f"model: {counted.model_folder}", f"模型：{counted.model_folder}")
    if words is not None:
        return Outcome(data, add_words(data, folder, text))
    data["validation"], line = describe_heldout(counted)
    return Outcome(data, f"{line}\n{text}")


def add_words(data: dict[str, object], folder: Path, text: str) -> str:
    """Add the word perplexities of a run to what is told about it."""
    from hanmo.cli.words import HELD_OUT, evaluate_run
    from hanmo.evaluation.words import describe_words

    rows = evaluate_run(folder, HELD_OUT)
    data["words"] = [row.as_dict() for row in rows]
    return f"{text}\n{describe_words(rows)}" if rows else text
