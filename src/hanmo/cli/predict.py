"""``hanmo TASK``: what a model answers to texts, one or a file of them; ``hanmo predict --task TASK`` is the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hanmo.cli.grounds import GroundSettings
from hanmo.cli.outcome import Outcome
from hanmo.cli.records import RecordSettings
from hanmo.cli.task_options import TaskOptions
from hanmo.data.settings import DataSettings
from hanmo.errors import UsageError
from hanmo.inference.settings import EngineSettings
from hanmo.language import pick
from hanmo.settings import CommonSettings, argument, notice, option

HELP = "let a model do a task: hanmo TASK --model M TEXT is the same"
HELP_ZH = "让模型完成任务；也可写作 hanmo 任务 --model 模型 文本"
BLOCK = 256  # texts that are answered together


@dataclass
class PredictSettings(CommonSettings, EngineSettings, RecordSettings, TaskOptions, DataSettings, GroundSettings):
    """Settings of ``hanmo predict``."""

    texts: list[str] = argument(
        "texts; '-' or none reads them from standard input, a line each",
        zh="文本；'-' 或留空则从标准输入读取，每行一条",
        many=True,
    )
    task: str = option("classification", "what to do: classification, tagging, translation and others", zh="任务名")
    model: str = option("", "a model that can do it: a run, a folder, a name, or openai:MODEL@ADDRESS", zh="模型")
    file: list[str] = option(
        [],
        "files of texts instead: the lines of txt, a column of csv, tsv, jsonl or parquet (--text-field NAME); may be "
        "repeated",
        zh="改为读取文件：txt 的各行，或 csv、tsv、jsonl、parquet 的一列（--text-field 列名）；可重复给出",
        metavar="FILE",
    )
    train: str | None = option(
        None,
        "records that a prompt takes its labels and examples from",
        zh="提示所用标签与示例的来源",
        metavar="FILE",
    )
    shots: int = option(0, "worked examples that a prompt shows", zh="提示中的示例数")
    instruction: str | None = option(
        None, "what a prompt says, instead of the task's own words", zh="自定的提示指令", metavar="TEXT"
    )
    out: str | None = option(
        None, "write the answers to this file, a JSON line each", zh="把回答写入该文件，每行一个 JSON", metavar="FILE"
    )


@dataclass(frozen=True)
class Given:
    """A text, and where it is from."""

    text: str
    where: str


def given_texts(settings: PredictSettings, *, whole: bool = False) -> Iterator[Given]:
    """The texts of the command line, of files, or of standard input.

    Args:
        whole: a plain file and standard input are one text each, not a text a line.

    Raises:
        UsageError: there are none.
        DataError: a file cannot be read.
    """
    if settings.file:
        yield from texts_of_files(settings, whole=whole)
    elif settings.texts and settings.texts != ["-"]:
        yield from (Given(text, "") for text in settings.texts)
    elif sys.stdin.isatty() and not settings.texts:
        raise UsageError(
            "there is no text",
            fix=f'hanmo {settings.task} --model MODEL "text", or --file FILE',
            zh=f'没有文本：hanmo {settings.task} --model 模型 "文本"，或用 --file 文件',
        )
    elif whole:
        if (text := sys.stdin.read()).strip():
            yield Given(text, "stdin")
    else:
        lines = (line.rstrip("\r\n") for line in sys.stdin)
        yield from (Given(line, f"stdin:{number}") for number, line in enumerate(lines, 1) if line.strip())


def texts_of_files(settings: PredictSettings, *, whole: bool) -> Iterator[Given]:
    """The records of tables, and of plain texts the lines or the whole."""
    from hanmo.data.readers import Reader
    from hanmo.data.sources import find_sources

    reader = Reader(find_sources(settings.file).sources, settings, whole=True)
    line, rest, file = 1, "", ""
    for document in reader.documents():
        if document.is_record:
            yield Given(document.text, f"{document.file}:{document.line}")
            continue
        if not document.continued:
            if rest.strip():
                yield Given(rest, f"{file}:{line}")
            line, rest, file = document.line, "", document.file
        *lines, rest = [rest + document.text] if whole else (rest + document.text).split("\n")
        for text in lines:
            if text.strip():
                yield Given(text, f"{file}:{line}")
            line += 1
    if rest.strip():
        yield Given(rest, f"{file}:{line}")


def run(settings: PredictSettings) -> Outcome | None:
    """Answer the texts; those of files in blocks, so that any number of them needs little memory."""
    from hanmo.inference.loading import load
    from hanmo.tasks.base import Form
    from hanmo.tasks.registry import find_task

    task = find_task(settings.task, **settings.task_options())
    if not settings.model:
        raise UsageError(
            "--model is missing",
            fix=f"hanmo {task.name} --model MODEL; teach one with hanmo finetune --task {task.training}",
            zh=f"缺少 --model；可先用 hanmo finetune --task {task.training} 训练一个",
        )
    settings.ground(task)
    texts = given_texts(settings, whole=task.whole)
    train = settings.read(task.kind, [settings.train])[0] if settings.train else []
    model = load(settings.model, **settings.engine_options(), offline=settings.offline)
    system = task.system(model, train, Form(settings.shots, settings.seed, settings.instruction))
    if settings.out is not None:
        count = write_lines(Path(settings.out), task, system, texts)
        done = pick(f"{count:,} answers: {settings.out}", f"{count:,} 条回答：{settings.out}")
        return Outcome({"task": task.name, "model": settings.model, "answers": count, "out": settings.out}, done)
    rows, lines = [], []
    for block in blocks(texts):
        for given, record, answer in answered(task, system, block):
            if settings.json:
                rows.append({"text": given.text, **task.row(record, answer)})
            else:
                lines.append((given.text, task.describe(record, answer)))
    if settings.json:
        return Outcome({"task": task.name, "model": settings.model, "answers": rows}, "")
    if not lines:
        notice(pick("there was no text", "没有文本"))
        return None
    alone = len(lines) == 1
    return Outcome({}, "\n".join(answer if alone else f"{shortened(text)}\t{answer}" for text, answer in lines))


def blocks(texts: Iterator[Given]) -> Iterator[list[Given]]:
    """So many at a time."""
    while block := list(islice(texts, BLOCK)):
        yield block


def answered(task: Any, system: Any, block: list[Given]) -> Iterator[tuple[Given, Any, Any]]:
    """Texts, their records and the answers."""
    records = []
    for given in block:
        try:
            records.append(task.record(given.text))
        except UsageError as error:
            error.where = error.where or given.where
            raise
    yield from zip(block, records, system.answer(records), strict=True)


def write_lines(path: Path, task: Any, system: Any, texts: Iterator[Given]) -> int:
    """Write every block as it is answered; returns how many there were."""
    count = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for block in blocks(texts):
            for given, record, answer in answered(task, system, block):
                row = {"where": given.where, "text": given.text, **task.row(record, answer)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
    return count


def shortened(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
