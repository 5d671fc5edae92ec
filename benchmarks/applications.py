"""What the tasks reach on public data, with the commands that a user types; writes the tables of docs/results.md.

    python benchmarks/applications.py DATA [NAME ...] [--work FOLDER]

DATA is a folder with the sets below (each with its licence beside it; none is part of the project). Every experiment
divides what has no test set of its own (no text on two sides), runs ``hanmo finetune`` and ``hanmo evaluate``, and puts
what came out into results/applications.json; experiments that are not named keep their last result. Numbers are never
typed: the tables are written from that file.

    spam           SMS spam, a tenth held out                      offence   COLD, Chinese, dev
    topics         CSL, titles of Chinese papers, dev              roles     PropBank of English Web Treebank, dev
    names-en       Universal NER, English EWT, dev                 names-zh  Universal NER, Chinese GSDSIMP, dev
    questions      SQuAD, a fifth of passages held out             summaries SciTLDR, dev
    translation    Tatoeba and LibreOffice, 565 sentences of Tatoeba held out (takes two hours)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hanmo.data.tasks import Shares, read_records, split_records

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "applications.json"
PAGES = {"en": HERE.parent / "docs" / "results.md", "zh": HERE.parent / "docs" / "results.zh.md"}
SMALL = "all-minilm-l6-v2"

Files = dict[str, str]


@dataclass(frozen=True)
class Experiment:
    """What is run and what was asked of it.

    Args:
        task: of ``hanmo evaluate``.
        titles: of the data, English and Chinese.
        measure: the number that is shown.
        prepare: writes or names the files: ``train``, ``test`` and others that commands name in braces.
        teach: arguments of ``hanmo finetune`` for each model, by its title.
        models: further models that are only measured, by title.
        asked: of a title (or ``*``, the best one) so much above another one (above nothing: ``""``).
        directions: files that are measured in turn, each with what is asked of it in turn; default only ``test``.
    """

    task: str
    titles: tuple[str, str]
    measure: str
    prepare: Callable[[Path, Path], Files]
    teach: dict[str, str]
    models: dict[str, str]
    asked: tuple[tuple[str, str, float], ...] = ()
    directions: tuple[str, ...] = ("test",)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def files(train: str, test: str) -> Callable[[Path, Path], Files]:
    """Files that are there already."""
    return lambda data, _: {"train": str(data / train), "test": str(data / test)}


def spam(data: Path, work: Path) -> Files:
    """A tenth of the messages is held out; messages that repeat one stand on one side."""
    split = split_records(list(read_records("labelled", data / "sms-spam" / "sms.tsv")), Shares(0.0, 0.1), 0)
    rows = {part: [{"text": r.text, "label": r.labels[0]} for r in getattr(split, part)] for part in ("train", "test")}
    return {part: write_lines(work / f"{part}.jsonl", found) for part, found in rows.items()}


def questions(data: Path, work: Path) -> Files:
    """A fifth of the passages is held out, with all their questions (the data name no articles)."""
    lines = (data / "squad-cs224n-val" / "squad_val.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = sorted({row["context"] for row in rows}, key=lambda text: hashlib.sha256(text.encode()).digest())
    held = set(texts[::5])
    parts = {"train": [row for row in rows if row["context"] not in held]}
    parts["test"] = [row for row in rows if row["context"] in held]
    return {name: write_lines(work / f"{name}.jsonl", part) for name, part in parts.items()}


def translation(data: Path, work: Path) -> Files:
    """Pairs that share a sentence stand on one side; all of LibreOffice is training."""
    fields = {"source": "1", "target": "2"}
    records = list(read_records("pair", data / "tatoeba-cmn-eng" / "cmn.txt", fields=fields))
    split = split_records(records, Shares(0.0, 0.05), 0)
    held = list(split.test)
    random.Random(0).shuffle(held)
    half = len(held) // 2
    parts = {"tatoeba": split.train, "dev": held[:half], "test": held[half:]}
    made = {}
    for name, part in parts.items():
        made[name] = str(work / f"{name}.tsv")
        Path(made[name]).write_text("".join(f"{r.source}\t{r.target}\n" for r in part), encoding="utf-8")
    for name in ("tatoeba", "test"):
        made[f"{name}-back"] = str(work / f"{name}.zh-en.tsv")
        back = "".join(f"{r.target}\t{r.source}\n" for r in parts[name])
        Path(made[f"{name}-back"]).write_text(back, encoding="utf-8")
    folder = data / "parallel-debian"
    made["office"] = " ".join(str(folder / f"libreoffice_{part}.en-zh.tsv") for part in ("help", "ui"))
    return {**made, "train": made["tatoeba"], "train-back": made["tatoeba-back"]}


EXPERIMENTS = {
    "spam": Experiment(
        "spam",
        ("SMS spam, 10 % held out", "垃圾短信（SMS），留出 10 %"),
        "accuracy",
        spam,
        {"nb-logistic": "{train} --task classification --base nb-logistic"},
        {},
        (("*", "", 0.985),),
    ),
    "offence": Experiment(
        "offensiveness",
        ("COLD dev, offensive language, zh", "COLD 验证集，中文冒犯性语言"),
        "accuracy",
        files("cold-zh/train.csv", "cold-zh/dev.csv"),
        {"nb-logistic": "{train} --task classification --base nb-logistic"},
        {},
        (("*", "", 0.80),),
    ),
    "topics": Experiment(
        "topic",
        ("CSL dev, 13 subjects of papers, zh", "CSL 验证集，论文学科（13 类）"),
        "accuracy",
        files("csl/cls_ctg/train.tsv", "csl/cls_ctg/dev.tsv"),
        {"nb-logistic": "{train} --task classification --base nb-logistic"},
        {},
        (("nb-logistic", "TF-IDF + logistic regression", 0.0),),
    ),
    "names-en": Experiment(
        "ner",
        ("Universal NER, English EWT, dev", "Universal NER 英文 EWT 验证集"),
        "f1",
        files("uner-en/en_ewt-ud-train.history-236914d9.iob2", "uner-en/en_ewt-ud-dev.iob2"),
        {
            "CRF": "{train} --task tagging --base crf",
            "MiniLM, fine-tuned": "{train} --task tagging --base " + SMALL + " --truncate",
        },
        {},
        (("CRF", "", 0.60), ("MiniLM, fine-tuned", "CRF", 0.10)),
    ),
    "names-zh": Experiment(
        "ner",
        ("Universal NER, Chinese GSDSIMP, dev", "Universal NER 中文 GSDSIMP 验证集"),
        "f1",
        files("uner-zh/zh_gsdsimp-ud-train.iob2", "uner-zh/zh_gsdsimp-ud-dev.iob2"),
        {
            "CRF": "{train} --task tagging --base crf",
            "BiLSTM-CRF": "{train} --task tagging --base bilstm-crf",
        },
        {},
        (("CRF", "", 0.70),),
    ),
    "roles": Experiment(
        "semantic-roles",
        ("PropBank roles, English EWT, dev", "PropBank 语义角色，英文 EWT 验证集"),
        "f1",
        files("srl-ewt-propbank/train.jsonl", "srl-ewt-propbank/dev.jsonl"),
        {"CRF": "{train} --task semantic-roles --base crf"},
        {},
        (),
    ),
    "summaries": Experiment(
        "summarization",
        ("SciTLDR dev: abstract to one sentence", "SciTLDR 验证集：摘要到一句话"),
        "rougeL",
        files("scitldr/train.jsonl", "scitldr/dev.jsonl"),
        {},
        {"central sentences (MiniLM)": SMALL},
        (("*", "lead-1", 0.0),),
    ),
    "questions": Experiment(
        "qa",
        ("SQuAD, 4,285 questions, a fifth of the passages held out", "SQuAD，4,285 个问题，留出五分之一的段落"),
        "f1",
        questions,
        {"MiniLM, fine-tuned": "{train} --task qa --base " + SMALL},
        {},
        (("MiniLM, fine-tuned", "", 0.60),),
    ),
    "translation": Experiment(
        "translation",
        ("Tatoeba, held out", "Tatoeba 留出句对"),
        "bleu",
        translation,
        {
            "Transformer from nothing": "{tatoeba} {office} --validation {dev} --task seq2seq --base new --both-ways "
            "--skip-long --context 40 --budget 2h"
        },
        {},
        (("Transformer from nothing", "", 18.0), ("Transformer from nothing", "", 15.0)),
        ("test", "test-back"),
    ),
}


def hanmo(*arguments: str) -> dict[str, Any]:
    """What a command says as JSON."""
    command = [sys.executable, "-m", "hanmo", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, "LANG": "C"})
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run(experiment: Experiment, data: Path, work: Path) -> dict[str, Any]:
    """Teach the models, measure them beside the baselines."""
    work.mkdir(parents=True, exist_ok=True)
    found = experiment.prepare(data, work)
    models, commands, seconds = dict(experiment.models), [], {}
    for title, text in experiment.teach.items():
        out = str(work / title.replace(" ", "-").replace(",", "").lower())
        arguments = [part for item in text.split() for part in item.format_map(found).split()]
        began = time.monotonic()
        hanmo("finetune", *arguments, "--out", out, "--no-baseline", "--overwrite")
        seconds[title] = round(time.monotonic() - began, 1)
        commands.append(shown("finetune", arguments, data, work))
        models[title] = out
    parts = {}
    for part in experiment.directions:
        train = found["train" + part.removeprefix("test")]
        systems: dict[str, Any] = {}
        for title, model in [*models.items()] or [("", "")]:
            arguments = ["--task", experiment.task, "--data", found[part], "--train", train]
            arguments += ["--model", model] if model else []
            arguments += ["--no-baseline"] if systems else []
            result = hanmo("evaluate", *arguments)
            commands.append(shown("evaluate", arguments, data, work))
            for score in result["scores"]:
                clean = (score.get("without_leaks") or {}).get(experiment.measure, {}).get("value")
                measured = {**score["measures"][experiment.measure], "without_leaks": clean}
                systems[title if score["name"] == model else score["name"]] = measured
        parts[part] = {"n": result["n"], "leaked": result["leaked"], "chance": result["chance"], "systems": systems}
    return {
        "task": experiment.task,
        "titles": experiment.titles,
        "measure": experiment.measure,
        "parts": parts,
        "seconds": seconds,
        "asked": [list(item) for item in experiment.asked],
        "commands": commands,
        "machine": f"{cpu_name()}, {len(os.sched_getaffinity(0))} processors, Python {platform.python_version()}, "
        f"torch {version('torch')}, hanmo {version('hanmo')}",
    }


def cpu_name() -> str:
    """The processor's own name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def shown(verb: str, arguments: Sequence[str], data: Path, work: Path) -> str:
    """A command without the folders of this machine."""
    line = " ".join(["hanmo", verb, *arguments])
    return line.replace(f"{work}/", "").replace(f"{data}/", "")


# The page -------------------------------------------------------------------------------------------------------------

HEADS = {
    "en": """# What the tasks reach

[中文](results.zh.md)

Measured by `python benchmarks/applications.py DATA NAME ...`, which also writes this page: the commands below, on
public data, with nothing tuned by hand for one of them. In brackets 95 % intervals (bootstrap over the records).

| data | measure | records | systems | asked |
|---|---|---|---|---|
""",
    "zh": """# 各任务达到的水平

[English](results.md)

由 `python benchmarks/applications.py 数据目录 名称 ...` 测得并写成本页：命令见下，数据均为公开数据，
没有单独为哪一项调参。方括号内为 95 % 置信区间（对记录做自助法）。

| 数据 | 指标 | 记录数 | 系统 | 要求 |
|---|---|---|---|---|
""",
}
WORDS = {
    "reached": ("reached", "达到"),
    "missed": ("missed", "未达到"),
    "leaked": ("{} of them also in train; without them {}", "其中 {} 条也在训练集中；去除后为 {}"),
    "commands": ("Commands", "命令"),
    "took": ("learning took", "训练用时"),
    "back": ("zh to en", "中译英"),
    "there": ("en to zh", "英译中"),
}


def number(measure: str, value: float) -> str:
    """BLEU has one place, shares have three."""
    return f"{value:.1f}" if measure in ("bleu", "chrf") else f"{value:.3f}"


def demand(result: dict[str, Any], part: dict[str, Any], asked: Sequence[Any], word: Callable[[str], str]) -> str:
    """What was asked, and whether it was reached."""
    title, base, more = asked
    values = {name: item["value"] for name, item in part["systems"].items()}
    value = max(values.values()) if title == "*" else values[title]
    bound = (values[base] if base else 0.0) + more
    told = number(result["measure"], bound)
    return f"{told}: {word('reached' if (value > bound if base and not more else value >= bound) else 'missed')}"


def cell(result: dict[str, Any], part: dict[str, Any], word: Callable[[str], str]) -> str:
    """The systems of a row, each with its interval."""
    lines = []
    measure = result["measure"]
    for name, item in part["systems"].items():
        low, high = (number(measure, end) for end in item["interval"])
        line = f"{name} **{number(measure, item['value'])}** [{low}, {high}]"
        if name in result["seconds"]:
            line += f" ({word('took')} {result['seconds'][name] / 60:.1f} min)"
        lines.append(line)
    return "<br>".join(lines)


def render(results: dict[str, Any], language: str) -> str:
    """The page in a language."""
    place = list(PAGES).index(language)

    def word(name: str) -> str:
        return WORDS[name][place]

    text = HEADS[language]
    for result in results.values():
        several = len(result["parts"]) > 1
        for number_of, (name, part) in enumerate(result["parts"].items()):
            asked = result["asked"][number_of : number_of + 1] if several else result["asked"]
            title = result["titles"][place]
            if several:
                title += ", " + word("back" if name.endswith("back") else "there")
            count = f"{part['n']:,}"
            if part["leaked"]:
                best = max(part["systems"].values(), key=lambda item: item["value"])
                count += ": " + word("leaked").format(part["leaked"], number(result["measure"], best["without_leaks"]))
            demands = "<br>".join(demand(result, part, item, word) for item in asked)
            text += f"| {title} | {result['measure']} | {count} | {cell(result, part, word)} | {demands} |\n"
    text += f"\n## {word('commands')}\n"
    for name, result in results.items():
        commands = "\n".join(result["commands"])
        text += f"\n**{name}** ({result['machine']})\n\n```sh\n{commands}\n```\n"
    return text


def write_pages(results: dict[str, Any]) -> None:
    """The page in each language."""
    for language, page in PAGES.items():
        page.write_text(render(results, language), encoding="utf-8")


def main() -> None:
    """Run what is named, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--work", type=Path, default=Path("runs/applications"))
    given = parser.parse_args()
    if unknown := set(given.names) - EXPERIMENTS.keys():
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(EXPERIMENTS)}")
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name in given.names:
        print(f"== {name}", file=sys.stderr)
        results[name] = run(EXPERIMENTS[name], given.data.resolve(), (given.work / name).resolve())
        ordered = {key: results[key] for key in EXPERIMENTS if key in results}
        RESULTS.write_text(json.dumps(ordered, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        write_pages(ordered)
    write_pages(results)


if __name__ == "__main__":
    main()
