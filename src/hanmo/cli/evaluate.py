"""``hanmo evaluate``: how well a model predicts held-out text, beside its baselines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.grounds import GroundSettings
from hanmo.cli.outcome import Outcome
from hanmo.cli.records import RecordSettings
from hanmo.cli.road import prepare_corpus
from hanmo.cli.task_options import TaskOptions
from hanmo.data.settings import DataSettings
from hanmo.errors import UsageError
from hanmo.folder import read_manifest
from hanmo.inference.settings import EngineSettings
from hanmo.settings import CommonSettings, argument, option

if TYPE_CHECKING:
    import numpy as np

HELP = "how well a model predicts texts, or does a task, beside its baselines"
HELP_ZH = "模型预测文本或完成任务的水平，并与基线对照"


@dataclass
class EvaluateSettings(CommonSettings, EngineSettings, RecordSettings, TaskOptions, DataSettings, GroundSettings):
    """Settings of ``hanmo evaluate``."""

    model: str = argument(
        "a run, a model folder, a GGUF or ARPA file or a name from the catalog",
        zh="运行目录、模型文件夹、GGUF 或 ARPA 文件，或目录中的名称",
        default="",
        flag="model",
    )
    paths: list[str] = argument(
        "texts, or a folder that 'hanmo data' wrote; default: the data of the run; with --task files of records",
        zh="文本，或 hanmo data 的输出；默认为该运行的数据；与 --task 合用时为记录文件",
        many=True,
        flag="data",
    )
    task: str | None = option(
        None,
        "measure this task instead of perplexity: classification, tagging, translation and others",
        zh="评测该任务而非困惑度：classification、tagging、translation 等",
    )
    train: str | None = option(
        None,
        "with --task: records that baselines learn from and prompts show; without them baselines learn four fifths of "
        "the data and answer the last, in turn",
        zh="与 --task 合用：供基线学习、供提示展示的记录；不给时基线轮流用五分之四的数据学习，回答其余五分之一",
        metavar="FILE",
    )
    shots: int = option(0, "with --task: worked examples that a prompt shows", zh="与 --task 合用：提示中的示例数")
    instruction: str | None = option(
        None,
        "with --task: what a prompt says, instead of the task's own words",
        zh="与 --task 合用：自定的提示指令",
        metavar="TEXT",
    )
    limit: int | None = option(
        None,
        "with --task: at most so many records, evenly from first to last",
        zh="与 --task 合用：最多评测多少条记录（均匀抽取）",
    )
    baseline: bool = option(True, "with --task: leave the baselines out", zh="与 --task 合用：不计算基线")
    answers: str | None = option(
        None,
        "with --task: write the model's answers to this file",
        zh="与 --task 合用：把模型的回答写入该文件",
        metavar="FILE",
    )
    open_book: bool = option(
        False,
        "question answering: the text of a question is searched among the texts of all records",
        zh="问答：在所有记录的文本中检索问题所需的段落",
    )
    part: str = option("test", "the split to score", zh="要评测的部分", choices=("test", "validation"))
    out: str | None = option(
        None,
        "where texts are prepared; default: evaluation-data (of models of words nothing is kept)",
        zh="文本的处理目录；默认 evaluation-data（词模型不保留）",
    )
    against: str | None = option(
        None,
        "compare the predictions with those of this model, in float32, instead of with baselines: what quantisation "
        "has cost (KL divergence, same best token, perplexity ratio)",
        zh="改为与该模型（以 float32 计算）的预测比较，看量化损失了多少（KL 散度、首选词元一致率、困惑度之比）",
        metavar="MODEL",
    )
    max_tokens: int = option(20_480, "with --against: tokens that are compared", zh="与 --against 合用：比较的词元数")


def own_data(settings: EvaluateSettings) -> str:
    """The corpus of the run that the model is from: it lies beside the model folder.

    Raises:
        UsageError: the model is from somewhere else, or the corpus there is not the one it was trained on.
    """
    from hanmo.data.corpus import Corpus
    from hanmo.inference.loading import find

    model = find(settings.model, offline=settings.offline)
    data = model.parent / "data"
    made_from = read_manifest(model).get("data", {}).get("corpus") if model.is_dir() else None
    if not (data / "report.json").is_file() or made_from != Corpus.open(data).fingerprint:
        raise UsageError(
            "give the texts to evaluate on",
            where="hanmo evaluate",
            fix=f"hanmo evaluate {settings.model} my-texts/",
            zh=f"请给出用于评测的文本：hanmo evaluate {settings.model} my-texts/",
        )
    return str(data)


def run(settings: EvaluateSettings) -> Outcome:
    """Score the model and its baselines."""
    if settings.task is not None:
        from hanmo.cli.measuring import evaluate_task

        return evaluate_task(settings)
    if not settings.model:
        raise UsageError(
            "MODEL is missing",
            where="hanmo evaluate",
            fix="hanmo evaluate MODEL my-texts/, or hanmo evaluate --task TASK --data FILE --model MODEL",
            zh="缺少模型：hanmo evaluate 模型 my-texts/，或 hanmo evaluate --task 任务 --data 文件 --model 模型",
        )
    from hanmo.cli.words import evaluate_words, is_word_model, refuse_data_settings
    from hanmo.evaluation.baselines import evaluate_with_baselines, held_out
    from hanmo.evaluation.words import describe_words
    from hanmo.inference.loading import find, load_language_model

    folder = find(settings.model, offline=settings.offline)
    if is_word_model(folder):
        refuse_data_settings(settings)
        rows = evaluate_words(folder, settings.paths, settings.out, part=settings.part, device=settings.device)
        return Outcome({"words": [row.as_dict() for row in rows]}, describe_words(rows))
    model = load_language_model(settings.model, **settings.engine_options(), offline=settings.offline)
    paths = settings.paths or [own_data(settings)]
    corpus = prepare_corpus(paths, settings, Path(settings.out or "evaluation-data"))
    tokens = corpus.tokenize(model.tokenizer)
    if settings.against is not None:
        return compared(model, settings, held_out(corpus, tokens, settings.part).ids[: settings.max_tokens])
    evaluation = evaluate_with_baselines(model, model.name, model.tokenizer, corpus, tokens, settings.part)
    return Outcome(evaluation.as_dict(), evaluation.describe())


def compared(model: Any, settings: EvaluateSettings, ids: np.ndarray) -> Outcome:
    """The model's predictions beside those of the reference.

    Raises:
        UsageError: models that do not predict token by token, or with other tokens.
    """
    from hanmo.evaluation.divergence import WINDOW, divergence
    from hanmo.inference.language_model import LanguageModel
    from hanmo.inference.loading import load

    reference = load(settings.against or "", device=settings.device, offline=settings.offline, precision="fp32")
    if not (isinstance(model, LanguageModel) and isinstance(reference, LanguageModel)) or model.reads_source:
        raise UsageError(
            "--against compares two language models that predict token by token",
            fix="give a decoder of the same kind",
            zh="--against 只能比较两个逐词元预测的语言模型，请给出同类的解码器",
        )
    if model.tokenizer.fingerprint != reference.tokenizer.fingerprint:
        raise UsageError(
            f"'{reference.name}' has another tokenizer than '{model.name}': their predictions cannot be compared",
            fix="give the model that this one was made from; different models are compared by bits per byte",
            zh=f"'{reference.name}' 与 '{model.name}' 的分词器不同，预测无法比较；请给出它的原模型",
        )
    window = min(WINDOW, model.context_length, reference.context_length, len(ids))
    result = divergence(reference, model, ids, window=window, progress=True)
    heading = f"{model.name} ({model.describe()})\n{reference.name} ({reference.describe()})\n"
    return Outcome({"divergence": result.as_dict(), "window": window}, heading + result.describe())
