"""``hanmo build``: from texts to a model folder and a report, in one command."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hanmo.cli.outcome import Outcome
from hanmo.cli.road import RoadSettings, train_run, versions
from hanmo.cli.together import run_together
from hanmo.errors import UsageError
from hanmo.folder import write_json
from hanmo.language import pick
from hanmo.settings import argument, notice
from hanmo.training.launch import is_worker

if TYPE_CHECKING:
    import torch

    from hanmo.data.corpus import Corpus
    from hanmo.data.tokens import TokenCorpus
    from hanmo.evaluation.comparison import Comparison
    from hanmo.evaluation.report import Sample
    from hanmo.inference.language_model import LanguageModel
    from hanmo.training.plan import Plan
    from hanmo.training.processes import Processes

HELP = "own texts -> data, tokenizer, training, evaluation, model folder and report"
HELP_ZH = "一条命令：数据、分词器、训练、评测、模型文件夹与报告"
SAMPLES = 4
SAMPLE_CHARACTERS = 240
FAR_BEHIND = 0.5  # bits per byte; beyond, the rule of thumb for longer budgets says nothing


@dataclass
class BuildSettings(RoadSettings):
    """Settings of ``hanmo build``."""

    paths: list[str] = argument(
        "files, folders or globs of your texts; default: the sources of Python's standard library",
        zh="你的文本：文件、文件夹或通配符；默认为 Python 标准库源代码",
        many=True,
    )


def write_samples(model: LanguageModel, corpus: Corpus, tokens: TokenCorpus) -> list[Sample]:
    """Continue the beginnings of some held-out documents."""
    from hanmo.evaluation.report import Sample

    split = "test" if corpus.num_documents("test") else "validation"
    length = max(4, min(32, model.context_length // 4))
    prompts = []
    for document in islice(corpus.documents(split), SAMPLES):
        ids = model.tokenizer.encode(document[:2000])[:length]
        prompts.append(model.tokenizer.decode(ids).rstrip("\ufffd"))  # a cut may fall inside a character
    wanted = int(SAMPLE_CHARACTERS / tokens.report["characters_per_token"])
    room = min(wanted, model.context_length - 2 * length)
    completions = model.generate(prompts, max_new_tokens=max(8, room), temperature=0.7, top_p=0.95, seed=0)
    return [Sample(prompts[completion.index], completion.text) for completion in completions]


def advice(comparison: Comparison, plan: Plan) -> str:
    """What to change where the 5-gram model is clearly better than the model; empty where it is not."""
    from hanmo.training.plan import enough_seconds

    if comparison.difference <= 0 or not comparison.significant or plan.seconds is None:
        return ""
    if plan.capped:
        return pick(
            "There is too little text for a neural model of its own: add text, or use the 5-gram model.",
            "文本太少，不足以单独训练神经模型：请增加文本，或使用 5 元模型。",
        )
    if comparison.difference > FAR_BEHIND:
        return pick(
            "This budget is far too short for this text: give hours instead of minutes.",
            "这个预算对这些文本来说远远不够：请以小时而非分钟计。",
        )
    minutes = math.ceil(enough_seconds(plan.seconds, comparison.difference) / 60) + 1
    return pick(
        f"The text is too large for this budget: try --budget {minutes}min.",
        f"这个预算对这些文本来说太短：请试试 --budget {minutes}min。",
    )


def run(settings: BuildSettings) -> Outcome:
    """Walk the whole road and write the report."""
    if settings.architecture == "ngram" or settings.tokenizer == "words":
        words = settings.tokenizer == "words"
        strange = "--tokenizer words" if words else "--architecture ngram"
        more = f"{strange} --validation valid.txt --architecture {settings.architecture}" if words else strange
        command = " ".join(["hanmo pretrain", *settings.paths, more])
        raise UsageError(
            f"{strange} belongs to hanmo pretrain",
            where="hanmo build",
            why="the report compares a trained network of your texts with an n-gram model, on texts that it divides",
            fix=command,
            zh=f"{strange} 请用于 hanmo pretrain：{command}",
        )
    if settings.devices > 1 or is_worker():
        raise UsageError(
            "several processes belong to hanmo pretrain",
            where="hanmo build",
            why="its report is made by one process",
            fix="hanmo pretrain --devices N, then hanmo evaluate",
            zh="--devices 请用于 hanmo pretrain，然后用 hanmo evaluate 评测",
        )
    with run_together(settings.paths, settings) as (folder, processes, device):
        return build(folder, settings, processes, device)


def build(folder: Path, settings: BuildSettings, processes: Processes, device: torch.device) -> Outcome:
    """Train, evaluate and report in the folder that this process holds."""
    from hanmo.evaluation.baselines import evaluate_with_baselines
    from hanmo.evaluation.report import ReportContent, read_log, render
    from hanmo.inference.loading import load
    from hanmo.text.report import tokenizer_report
    from hanmo.training.search_record import FILE, SearchRecord

    start = time.monotonic()
    trained = train_run(folder, settings.paths, settings, processes, device)
    trained_at = time.monotonic()
    model = load(trained.model_folder)
    corpus, tokens = trained.texts.corpus, cast("TokenCorpus", trained.texts.tokens)
    assert corpus is not None  # word-level corpora were refused
    split = "test" if corpus.num_documents("test") else "validation"
    evaluation = evaluate_with_baselines(model, trained.run.name, model.tokenizer, corpus, tokens, split)
    evaluated_at = time.monotonic()
    samples = write_samples(model, corpus, tokens)
    result = trained.result
    hint = advice(evaluation.comparison, trained.plan)
    verdict = f"{evaluation.comparison.sentence()}. {hint}".strip()
    search = SearchRecord.read(trained.run / FILE)
    searched = search.seconds if search else 0.0
    timings = {
        pick("data and tokenizer", "数据与分词器"): max(0.0, trained_at - start - result.seconds - searched),
        **({pick("search over settings", "参数搜索"): searched} if searched else {}),
        pick("training", "训练"): result.seconds,
        pick("evaluation", "评测"): evaluated_at - trained_at,
        pick("samples", "样例"): time.monotonic() - evaluated_at,
    }
    content = ReportContent(
        name=trained.run.name,
        data=corpus.report,
        tokens=tokens.report,
        tokenizer=tokenizer_report(model.tokenizer)["texts"],
        plan=trained.plan.rows() | {pick("measured speed", "实测速度"): f"{result.tokens_per_second:,.0f} tok/s"},
        log=read_log(trained.run / "log.jsonl"),
        evaluation=evaluation.as_dict(),
        verdict=verdict,
        samples=samples,
        timings=timings,
        settings=trained.record["settings"],
        computed=trained.record["computed"],
        versions=versions(),
        search=search,
    )
    page = trained.run / "report.html"
    page.write_text(render(content), encoding="utf-8")
    write_json(trained.run / "evaluation.json", evaluation.as_dict())
    notice(evaluation.describe())
    if hint:
        notice(hint)
    data = {
        "run": str(trained.run),
        "model": str(trained.model_folder),
        "report": str(page),
        "training": asdict(result),
        "evaluation": evaluation.as_dict(),
    }
    text = pick(
        f"model:  {trained.model_folder}\nreport: {page}\n"
        f"next:   hanmo chat {trained.run}    hanmo serve {trained.run}",
        f"模型：{trained.model_folder}\n报告：{page}\n下一步：hanmo chat {trained.run}    hanmo serve {trained.run}",
    )
    return Outcome(data, text)
