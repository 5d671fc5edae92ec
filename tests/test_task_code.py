"""Code as a task: what models are given and what becomes of what they write, good, bad and malicious."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hanmo.cli.main import main
from hanmo.data.tasks import Problem, Shares, read_records, split_records
from hanmo.errors import DataError, ModelError, UsageError
from hanmo.evaluation.cross import CrossFitted
from hanmo.evaluation.leaks import find_leaks
from hanmo.evaluation.scoring import difference, score
from hanmo.evaluation.task_table import render_details, render_scores
from hanmo.inference.remote import connect
from hanmo.tasks.base import Form
from hanmo.tasks.code import Code, Coder, NGramCoder, PassMetric, References
from hanmo.tasks.drafting import learnt_model
from hanmo.tasks.registry import find_task
from hanmo.tasks.sandbox import Limits

from .serving_fakes import FakeModel, running_server

SHORT = Limits(seconds=1.0, cpu_seconds=1.0)


def adder(number: int, name: str = "add") -> Problem:
    return Problem(
        str(number),
        f"Write a function that adds {number} to a number.",
        f"assert {name}{number}(1) == {number + 1}\nassert {name}{number}(0) == {number}\n",
        f"def {name}{number}(x):\n    return x + {number}\n",
        asserts=(f"assert {name}{number}(1) == {number + 1}", f"assert {name}{number}(0) == {number}"),
    )


PROBLEMS = [adder(number) for number in range(10, 18)]
AREA = Problem(
    "area",
    'import math\n\n\ndef area(r):\n    """The area of a circle."""\n',
    "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-4\n\ncheck(area)\n",
    "    return math.pi * r * r\n",
    "area",
)


class Scripted:
    """A local model with or without a chat template that answers what it was told to."""

    name, reads_source, prompt_prefix, prompt_suffix = "scripted", False, (), ()
    network = object()

    def __init__(self, answers: list[str], *, chat: bool = True, context: int | None = 4000) -> None:
        self.answers, self.context_length = answers, context
        self.tokenizer = SimpleNamespace(chat_template="{{ messages }}" if chat else "", encode=lambda text: list(text))
        self.seen: list[Any] = []
        self.options: dict[str, Any] = {}

    def chat_ids(self, messages: list[dict[str, str]]) -> list[str]:
        return list("\n".join(message["content"] for message in messages))

    def generate(self, prompts: Any, *, seeds: Any = None, n: int = 1, **options: Any) -> list[Any]:
        self.seen += ["".join(prompt) for prompt in prompts]
        self.options = {**options, "seeds": list(seeds), "n": n}
        start = len(self.seen) - len(prompts)
        return [
            SimpleNamespace(index=i, choice=c, text=self.answers[(start + i + c) % len(self.answers)])
            for i in range(len(prompts))
            for c in range(n)
        ]


# The metric -----------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_mean_of_the_unbiased_estimates() -> None:
    right, wrong = "def add10(x): return x + 10", "def add10(x): return x"
    answers = [(right, wrong, wrong, right, wrong), (wrong,) * 5, (right,) * 5]
    records = [PROBLEMS[0]] * 3
    metric = PassMetric(5, SHORT)
    statistics = metric.statistics(records, answers)
    values = metric.measures(statistics.sum(0))
    assert values["pass@1"] == pytest.approx((2 / 5 + 0 + 1) / 3)
    assert values["pass@5"] == pytest.approx((1 - comb(3, 5) / comb(5, 5) + 0 + 1) / 3)
    assert len(metric.known) == 2 and metric.right is None
    assert set(values) == {"pass@1", "pass@5"}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("def add10(x):\n    return x + 10", "passed"),
        ("def add10(x):\n    return x", "a test failed"),
        ("def other(x):\n    return x", "raised an exception"),
        ("Sorry, I can not.", "does not compile"),
        ("", "no program"),
        ("def add10(x):\n    while True: pass", "ran out of time"),
        ("def add10(x):\n    return bytearray(1 << 40)", "ran out of memory"),
        ("import os\nos._exit(0)", "ended itself or was killed"),
        ("# 😀 ＡＢＣ１２３\ndef add10(x):\n    return x + １０", "does not compile"),
        ("def add10(数):\n    return 数 + 10  # 加十 😀", "passed"),
    ],
)
def test_what_went_wrong_is_counted(answer: str, told: str) -> None:
    details = PassMetric(1, SHORT).details(PROBLEMS[:1], [(answer,)])
    assert details["counts"] == {told: 1}
    assert render_details(details) == f"{told}: 1"
    assert bool(details["first"]) == (told != "passed")


def test_programs_that_loop_fork_or_write_files_are_contained(tmp_path: Path) -> None:
    target = tmp_path / "written.txt"
    wicked = [
        "import os\nwhile True:\n    os.fork()",
        f"open({str(target)!r}, 'w').write('x')\ndef add11(x): return x + 11",
        "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)\ndef add12(x): return x + 12",
        "while True: pass",
    ]
    metric = PassMetric(1, SHORT)
    values = metric.measures(metric.statistics(PROBLEMS[:4], [(text,) for text in wicked]).sum(0))
    assert values["pass@1"] == 0.0
    assert not target.exists()


# What models read -----------------------------------------------------------------------------------------------------


def test_a_model_that_chats_is_asked_and_its_block_is_taken_out() -> None:
    model = Scripted([f"Sure!\n```python\n{PROBLEMS[0].reference}```\nDone.", "no block of code here"])
    system = Code().system(model)
    found = score(Code(), system, PROBLEMS[:2])
    assert "adds 10 to a number" in model.seen[0] and "assert add10(1) == 11" in model.seen[0]
    assert found.main.value == 0.5
    assert found.details["counts"] == {"passed": 1, "does not compile": 1}
    assert model.options["temperature"] == 0.0 and model.options["seeds"] == [0, 1000]
    assert "samples:1" in found.signature and "sandbox:5s/1024MiB" in found.signature and "prompt:" in found.signature


def test_a_model_that_does_not_chat_goes_on_with_the_prompts_of_the_papers() -> None:
    model = Scripted(["    return math.pi * r * r\n", "def add10(x):\n    return x + 10\n"], chat=False)
    system = Code().system(model, [PROBLEMS[1]], Form(shots=1))
    answers = system.answer([PROBLEMS[0], AREA])
    continued, asked = model.seen
    assert continued.endswith(AREA.prompt) and asked.endswith("assert add10(0) == 10\n[BEGIN]\n")
    assert "def add11(x):" in asked and "[DONE]" in asked  # the worked example
    metric = PassMetric(1, SHORT)
    assert metric.measures(metric.statistics([PROBLEMS[0], AREA], answers).sum(0))["pass@1"] == 1.0


def test_chinese_problems_are_asked_in_chinese() -> None:
    model = Scripted(["x"])
    Code().system(model).answer([Problem("1", "写一个函数，返回列表中所有数的和。", "assert 1\n")])
    assert "只用一个 Python 代码块" in model.seen[0]


def test_several_samples_are_drawn() -> None:
    task = find_task("humaneval", samples=20)
    model = Scripted(["def add10(x): return x + 10", "x"])
    found = score(task, task.system(model), PROBLEMS[:1])
    assert len(found.answers[0]) == 20 and model.options["temperature"] == 0.8
    assert set(found.measures) == {"pass@1", "pass@10", "pass@20"}
    assert found.measures["pass@1"].value == pytest.approx(0.5) and found.measures["pass@20"].value == 1.0
    for samples in (0, 10_000):
        with pytest.raises(UsageError, match="--samples"):
            find_task("code", samples=samples).metric([])


def test_a_prompt_of_ten_thousand_words_is_shortened_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = Scripted(["x"], context=2000)
    long = Problem("long", "word " * 10_000 + "the end", "assert 1\n")
    Code().system(model).answer([long])
    assert len(model.seen[0]) < 2000 and "…" in model.seen[0] and model.seen[0].rstrip().endswith("the end")
    assert "longer than the context" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no room"):
        Code().system(Scripted(["x"], context=100)).answer([long])


def test_remote_models_are_asked_one_by_one() -> None:
    with running_server(FakeModel(context_length=4000)) as base:
        system = Code().system(connect(f"openai:fake@{base}", offline=True))
        assert isinstance(system, Coder) and system.kind == "remote"
        assert all(len(texts) == 1 and texts[0] for texts in system.answer(PROBLEMS[:2]))


# Beside it ------------------------------------------------------------------------------------------------------------


def test_the_ngram_baseline_learns_from_others_only() -> None:
    records = PROBLEMS
    (system,) = Code().baselines(records)
    answers = CrossFitted(system).answer(records)
    assert all(
        texts[0].startswith(f"def {record.asserts[0][7:12]}(") for record, texts in zip(records, answers, strict=True)
    )
    assert any("return x" in texts[0] for texts in answers)
    assert Code().baselines([Problem("1", "a", "b")]) == []
    with pytest.raises(UsageError, match="no texts"):
        NGramCoder().fit([Problem("1", "a", "b")])


def test_references_pass_and_both_are_compared() -> None:
    records = [*PROBLEMS, AREA]
    task = Code()
    (people,) = task.yardsticks(records)
    best = score(task, people, records)
    worst = score(task, task.system(Scripted(["pass"])), records)
    assert best.main.value == 1.0 and isinstance(people, References)
    told = difference(task.metric(records), best, worst)
    assert told.significant and told.p is not None and told.p < 0.01
    assert "pass@1" in render_scores([best, worst], [told])
    assert task.yardsticks([Problem("1", "a", "b")]) == []


def test_leaks_and_splits_know_problems() -> None:
    assert find_leaks(PROBLEMS[:2], PROBLEMS[1:3]).tolist() == [True, False]
    split = split_records(PROBLEMS * 2, Shares(validation=0.2, test=0.2))
    assert len(split.train) + len(split.validation) + len(split.test) == 16


# A person's text ------------------------------------------------------------------------------------------------------


def test_a_typed_prompt_is_a_problem_without_tests() -> None:
    task = Code()
    assert task.record("写一个函数 😀 ＡＢＣ") == Problem("", "写一个函数 😀 ＡＢＣ", "")
    assert task.record("def f(x):\n    # double").entry_point == "f"
    for text in ("", " \n\t"):
        with pytest.raises(UsageError, match="prompt is empty"):
            task.record(text)
    record = task.record("Add two numbers.")
    assert task.describe(record, ("```python\nx = 1\n```", "y = 2")).startswith("x = 1\n\n# ---")
    assert task.row(record, ("```\nx = 1\n```",))["programs"] == ["x = 1\n"]
    with pytest.raises(ModelError, match="cannot do code"):
        task.system(object())
    with pytest.raises(UsageError, match="has no setting --tries"):
        find_task("code", tries=3)


def test_the_verbs_read_problems_and_show_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = learnt_model([record.reference for record in PROBLEMS], 6, "learnt")
    monkeypatch.setattr("hanmo.inference.loading.load", lambda *_args, **_options: model)
    data = tmp_path / "p.jsonl"
    rows = [{"task_id": p.name, "text": p.prompt, "code": p.reference, "test_list": list(p.asserts)} for p in PROBLEMS]
    data.write_text("\r\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    assert main(["evaluate", "--task", "mbpp", "--data", str(data), "--model", "x", "--limit", "6", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [item["kind"] for item in shown["scores"]] == ["baseline", "baseline", "decoder"]
    exact = 0.025 ** (1 / 6)  # all of six: a bootstrap would be certain
    assert shown["scores"][1]["measures"]["pass@1"] == {"value": 1.0, "interval": [pytest.approx(exact), 1.0]}
    assert main(["code", "--model", "x", "def add10(x):"]) == 0
    assert capsys.readouterr().out.startswith("def add10(x):")
    assert main(["code", "--model", "x", "--form", "haiku", "y"]) == 2
    data.write_text(json.dumps({**rows[0], "test_list": []}), encoding="utf-8")
    assert main(["evaluate", "--task", "code", "--data", str(data), "--model", "x"]) == 3
    assert f"{data}:1" in capsys.readouterr().err


def test_figures_on_mbpp(shared_data: Path) -> None:
    """A few problems: the references pass, the n-gram model solves next to none."""
    records = list(read_records("problem", shared_data / "mbpp" / "mbpp.jsonl"))[::20]
    task = Code()
    assert score(task, task.yardsticks(records)[0], records, resamples=20).main.value == 1.0
    baseline = score(task, CrossFitted(task.baselines(records)[0]), records, resamples=20)
    assert baseline.main.value < 0.2 and np.isfinite(baseline.seconds)


def test_a_file_without_problems_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Write a function.\nAnother one.\n", encoding="utf-8")
    with pytest.raises(DataError, match="no problems"):
        read_records("problem", tmp_path / "p.txt")
