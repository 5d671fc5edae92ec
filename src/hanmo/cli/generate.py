"""``hanmo generate``: continue prompts with a model."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from hanmo.cli.outcome import Outcome
from hanmo.errors import UsageError
from hanmo.inference.settings import GenerationSettings, WriterSettings
from hanmo.settings import CommonSettings, argument, notice, option

HELP = "continue prompts with a model"
HELP_ZH = "让模型续写"


@dataclass
class GenerateSettings(CommonSettings, WriterSettings, GenerationSettings):
    """Settings of ``hanmo generate``."""

    model: str = argument(
        "a run, a model folder, a GGUF file, a name from the catalog, or openai:MODEL@ADDRESS",
        zh="运行目录、模型文件夹、GGUF 文件、目录中的名称，或 openai:模型@地址",
    )
    prompts: list[str] = argument(
        "texts to continue; '-' or none reads one from standard input",
        zh="要续写的文本；'-' 或留空则读标准输入",
        many=True,
    )
    n: int = option(1, "answers per prompt", zh="每个提示的回答数")
    ignore_eos: bool = option(False, "go on after the end-of-text token", zh="遇到结束符仍继续")


def read_prompts(given: list[str]) -> list[str]:
    """The prompts of the command line, or one from standard input.

    Raises:
        UsageError: there is neither a prompt nor a pipe.
    """
    if given and given != ["-"]:
        return given
    if sys.stdin.isatty() and not given:
        raise UsageError(
            "there is no prompt",
            where="hanmo generate",
            fix='hanmo generate MODEL "Once upon a time"',
            zh='缺少提示，例如：hanmo generate 模型 "从前有座山"',
        )
    return [sys.stdin.read().rstrip("\n")]


def run(settings: GenerateSettings) -> Outcome | None:
    """Write the continuation as it comes; several prompts or JSON are answered together."""
    from hanmo.inference.loading import load_language_model
    from hanmo.inference.remote import RemoteModel

    prompts = read_prompts(settings.prompts)
    model: Any = load_language_model(settings.model, **settings.engine_options(), offline=settings.offline)
    options = {**settings.sampling_options(), "n": settings.n, "ignore_eos": settings.ignore_eos}
    if len(prompts) == 1 and settings.n == 1 and not settings.json:
        stream = model.stream(prompts[0], **options)
        first = next(stream)  # settings that cannot work, and endpoints, refuse before anything is written
        sys.stdout.write(prompts[0])
        for chunk in chain([first], stream):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        if isinstance(model, RemoteModel):
            notice(model.describe())
        return None
    completions = model.generate(prompts, **options)
    text = "\n\n".join(prompts[completion.index] + completion.text for completion in completions)
    data: dict[str, Any] = {"completions": [asdict(completion) for completion in completions]}
    if isinstance(model, RemoteModel):
        data["usage"] = model.usage.as_dict()
        notice(model.describe())
    else:
        data["engine"] = model.describe()
    return Outcome(data, text)
