"""``hanmo compare``: which model is enough for a task, from the most frequent answer to fine-tuned networks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.outcome import Outcome
from hanmo.cli.records import RecordSettings
from hanmo.data.settings import DataSettings
from hanmo.errors import UsageError
from hanmo.inference.settings import EngineSettings
from hanmo.language import pick
from hanmo.progress import human_time
from hanmo.settings import CommonSettings, notice, option, parse_duration

if TYPE_CHECKING:
    from hanmo.evaluation.trials import Candidate, Parts, Trial

HELP = "which model is enough for a task: quality, speed, memory, energy and cost side by side"
HELP_ZH = "哪个模型足够完成任务：并列比较质量、速度、内存、能耗与费用"
TRAINED_ON = ("classification", "tagging", "question-answering", "seq2seq")  # that networks are fine-tuned for
FEW = 1000  # records of which a share would be too small a test: they are cross-validated
ROWS = ("labelled", "tagged", "pair", "question_answer")  # records that can be written for them
CROSSED = ("labelled", "tagged", "roles")  # what is cross-validated: its answers are short
LEARNED = "learned"  # folder of what the candidates have learned, until one is recommended
SHARE_OF_BUDGET = 0.45  # of what is left, for one fine-tuning


@dataclass
class CompareSettings(CommonSettings, EngineSettings, RecordSettings, DataSettings):
    """Settings of ``hanmo compare``."""

    task: str = option("classification", "the task: classification, tagging, translation and others", zh="任务名")
    data: list[str] = option(
        [],
        "records; divided into training, validation and test; may be repeated",
        zh="记录文件，自动划分；可重复给出",
        metavar="FILE",
    )
    test: str | None = option(
        None, "records to test on; default: a share of the data", zh="测试记录；默认取数据的一部分", metavar="FILE"
    )
    models: list[str] = option(
        [],
        "further candidates: a model that can do the task, or finetune:BASE to teach it first; may be repeated",
        zh="更多候选：能完成任务的模型，或 finetune:基础模型（先微调）；可重复给出",
        metavar="MODEL",
    )
    limits: str | None = option(
        None,
        'bounds, e.g. "latency<20ms, memory<500MB, quality>0.9"; also p99, throughput, size, train, energy, cost',
        zh="限制条件，如 latency<20ms, memory<500MB, quality>0.9；另有 p99、throughput、size、train、energy、cost",
        metavar="LIMITS",
    )
    budget: str = option(
        "5min", "time for everything, e.g. 90s, 2min, 1h", zh="总时间，如 90s、2min、1h", metavar="TIME"
    )
    shots: int = option(4, "worked examples that prompts show", zh="提示中的示例数")
    limit: int | None = option(None, "at most so many test records", zh="最多使用多少条测试记录")
    out: str | None = option(
        None, "folder of the page and the numbers; default: runs/compare-TASK", zh="结果目录；默认 runs/compare-任务"
    )

    def check(self) -> None:
        """Raise UsageError for values that cannot work, before any file is read."""
        super().check()
        if not self.data:
            raise UsageError(
                "there are no records",
                fix=f"hanmo compare --task {self.task} --data FILE",
                zh=f"没有记录：hanmo compare --task {self.task} --data 文件",
            )


def run(settings: CompareSettings) -> Outcome:
    """Measure the candidates one after the other, the cheapest first, and recommend one."""
    from hanmo.evaluation.choice import as_row, choose, pareto, parse_limits
    from hanmo.evaluation.compare_report import comparison_page, render_comparison
    from hanmo.folder import write_json
    from hanmo.tasks.registry import find_task

    settings.check()
    end = time.monotonic() + parse_duration(settings.budget)
    limits, task = parse_limits(settings.limits or ""), find_task(settings.task)
    parts = divide(settings, task)
    out = Path(settings.out or f"runs/compare-{task.name}")
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / LEARNED, ignore_errors=True)
    (out / LEARNED).mkdir()
    with tempfile.TemporaryDirectory(prefix="hanmo-compare-") as work:
        found = candidates(settings, task, parts)
        trials = [measured(candidate, settings, task, parts, end, Path(work), out) for candidate in found]
    metric = task.metric(parts.test)
    fronts = pareto(trials, metric.primary in metric.lower)
    choice = choose(trials, metric, limits)
    use = keep_model(trials, choice.recommended, task.name, out)
    name, count = f"hanmo compare · {task.name}", len(parts.test)
    html = comparison_page(name, trials, fronts, choice, limits, metric.primary, count)
    (out / "compare.html").write_text(html, encoding="utf-8")
    data: dict[str, Any] = {
        "task": task.name,
        "primary": metric.primary,
        "folds": parts.folds,
        "records": {"train": len(parts.train), "validation": len(parts.validation), "test": len(parts.test)},
        "chance": task.chance(parts.test),
        "limits": [limit.text for limit in limits],
        "rows": [as_row(trial, front, limits) for trial, front in zip(trials, fronts, strict=True)],
        "recommended": None if choice.recommended is None else choice.recommended.name,
        "reason": choice.reason,
        "model": None if choice.recommended is None else choice.recommended.model,
        "difference": None if choice.difference is None else choice.difference.as_data(),
        "page": str(out / "compare.html"),
    }
    write_json(out / "compare.json", data)
    text = render_comparison(trials, fronts, choice, limits, metric.primary, len(parts.test))
    return Outcome(data, "\n".join(filter(None, (text, use, str(out / "compare.html")))))


def keep_model(trials: list[Trial], recommended: Trial | None, task: str, out: Path) -> str:
    """Keep what the recommended candidate has learned, and throw the others away; says how to use it."""
    kept = out / "model"
    if recommended is not None and recommended.model and Path(recommended.model).parent == out / LEARNED:
        shutil.rmtree(kept, ignore_errors=True)
        shutil.move(recommended.model, kept)
        recommended.model = str(kept)
    shutil.rmtree(out / LEARNED, ignore_errors=True)
    for trial in trials:
        trial.model = "" if trial.model and Path(trial.model).parent == out / LEARNED else trial.model
    if recommended is None or not recommended.model:
        return ""
    command = f"hanmo {task} --model {recommended.model} TEXT"
    return pick(f"use it:  {command}", f"使用：{command}")


def divide(settings: CompareSettings, task: Any) -> Parts:
    """Records to learn from, to choose by, and to test on, without a text on two sides; few records make folds."""
    from hanmo.cli.measuring import chosen
    from hanmo.data.tasks import Shares, split_records
    from hanmo.evaluation.cross import FOLDS
    from hanmo.evaluation.trials import Parts

    records, *others = settings.read(task.kind, settings.data, *([[settings.test]] if settings.test else []))
    if others:
        test = others[0]
        split = split_records(records, Shares(validation=0.1, test=0.0), settings.seed)
    elif len(records) < FEW and task.kind in CROSSED:
        notice(
            pick(
                f"{len(records):,} records: each is answered by what has learned from the other {FOLDS - 1} of "
                f"{FOLDS} parts",
                f"共 {len(records):,} 条记录：分为 {FOLDS} 份，轮流用其余 {FOLDS - 1} 份训练来回答",
            )
        )
        few = chosen(records, settings.limit)
        return Parts(few, [], few, FOLDS)
    else:
        split = split_records(records, Shares(validation=0.1, test=0.2), settings.seed)
        test = list(split.test)
    notice(
        pick(
            f"{len(split.train):,} records to learn from, {len(split.validation):,} to validate, {len(test):,} to test",
            f"训练 {len(split.train):,} 条，验证 {len(split.validation):,} 条，测试 {len(test):,} 条",
        )
    )
    return Parts(list(split.train), list(split.validation), chosen(test, settings.limit))


def candidates(settings: CompareSettings, task: Any, parts: Parts) -> list[Candidate]:
    """The baselines, classical models, small networks that are here, those that the user names."""
    from hanmo import catalog
    from hanmo.evaluation.trials import Candidate
    from hanmo.tasks.base import Form

    found = [
        Candidate(how, system.name, number)
        for how, systems in (("baseline", task.baselines(parts.test)), ("candidate", task.candidates(parts.test)))
        for number, system in enumerate(systems)
    ]
    options = {**settings.engine_options(), "offline": settings.offline}
    form = Form(min(settings.shots, len(parts.train)), settings.seed)
    named = list(settings.models)
    if not named:
        here = [entry.name for entry in catalog.ENTRIES if catalog.is_cached(entry.name)]
        can_learn = task.training in ("classification", "tagging", "question-answering") and task.kind in ROWS
        named += [f"finetune:{name}" for name in here if "minilm" in name and can_learn]
        named += [name for name in here if "instruct" in name]
    for name in named:
        kind, _, base = name.rpartition("finetune:")
        del kind
        found.append(Candidate("finetune" if name.startswith("finetune:") else "model", base, 0, options, form))
    return found


def measured(
    candidate: Candidate, settings: CompareSettings, task: Any, parts: Parts, end: float, work: Path, out: Path
) -> Trial:
    """One candidate, as long as there is time."""
    from dataclasses import replace

    from hanmo.evaluation.trials import Trial, run_trial

    left = end - time.monotonic()
    title = (
        pick(f"fine-tuned {candidate.name}", f"微调 {candidate.name}")
        if candidate.how == "finetune"
        else candidate.name
    )
    if left < 1:
        return Trial(title, problem=pick("no time was left", "时间已用完"))
    notice(pick(f"measuring: {title} ({human_time(left)} left)", f"正在评测：{title}（剩余 {human_time(left)}）"))
    if candidate.how != "finetune":
        return run_trial(candidate, task.name, parts, left, out / LEARNED / f"{candidate.how}-{candidate.number}")
    began = time.monotonic()
    try:
        of_folds = fine_tune_folds(candidate, settings, task, parts, SHARE_OF_BUDGET * left, left, work)
        learning = time.monotonic()
        budget = SHARE_OF_BUDGET * left / (parts.folds + 1)
        model = fine_tune(candidate, settings, task, parts, budget, left - (learning - began), work, out)
    except UsageError as error:
        return Trial(title, problem=error.what)
    learned = time.monotonic() - learning
    taught = replace(candidate, how="model", name=str(model), learned=learned, of_folds=of_folds)
    trial = run_trial(taught, task.name, parts, end - time.monotonic())
    trial.name = title
    if trial.score is not None:
        trial.score.name = title
    return trial


def fine_tune_folds(
    candidate: Candidate, settings: CompareSettings, task: Any, parts: Parts, budget: float, left: float, work: Path
) -> tuple[str, ...]:
    """For cross-validation, a model for each fold, taught without it; none otherwise.

    Args:
        budget: seconds to learn in, all of them and the final model together.
        left: seconds until it has to be over.

    Raises:
        UsageError: one failed, or took too long.
    """
    from dataclasses import replace

    from hanmo.evaluation.cross import folds_of

    if not parts.folds:
        return ()
    end, models = time.monotonic() + left, []
    folds_N = folds_of(parts.test, parts.folds)
    for fold in range(int(folds_N.max()) + 1):
        others = [record for record, own in zip(parts.test, folds_N, strict=True) if own != fold]
        model = fine_tune(
            candidate,
            settings,
            task,
            replace(parts, train=others),
            budget / (parts.folds + 1),
            end - time.monotonic(),
            work,
            work / f"fold-{fold}",
        )
        models.append(str(model))
    return tuple(models)


def fine_tune(
    candidate: Candidate,
    settings: CompareSettings,
    task: Any,
    parts: Parts,
    budget: float,
    left: float,
    work: Path,
    out: Path,
) -> Path:
    """Teach a base model the task, with ``hanmo finetune`` in a process of its own.

    Raises:
        UsageError: it failed, or took too long.
    """
    files = {}
    for name, records in (("train", parts.train), ("validation", parts.validation)):
        if not records:
            continue
        files[name] = work / f"{name}.jsonl"
        with files[name].open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(as_row(record), ensure_ascii=False) + "\n" for record in records)
    run = out / f"finetune-{candidate.name.replace('/', '-')}"
    command = [sys.executable, "-m", "hanmo", "finetune", str(files["train"])]
    command += ["--validation", str(files["validation"])] if "validation" in files else []
    command += ["--task", task.training, "--base", candidate.name, "--out", str(run), "--overwrite", "--no-baseline"]
    command += ["--budget", f"{max(5, int(budget))}s", "--seed", str(settings.seed), "--truncate", "--json"]
    train: Any = parts.train
    if task.training == "classification" and any(len(record.labels) != 1 for record in train):
        command.append("--multi-label")
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=left,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )
    except subprocess.TimeoutExpired:
        raise UsageError("it was not ready in time", zh="未能在时限内完成") from None
    if done.returncode:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-4:]
        raise UsageError(" ".join(last)[:300] or "fine-tuning failed", zh=" ".join(last)[:300] or "微调失败")
    return Path(json.loads(done.stdout)["model"])


def as_row(record: Any) -> dict[str, Any]:
    """A record as a JSON line that :func:`hanmo.data.tasks.read_records` reads."""
    row = {name: value for name, value in asdict(record).items() if name not in ("file", "line") and value is not None}
    if "question" in row:
        row["answers"] = [{"text": text, "answer_start": start} for text, start in row["answers"]]
    if len(labels := row.get("labels", ())) == 1:
        del row["labels"]
        row["label"] = labels[0]
    return row
