"""Code problems: reading, cutting, running, pass@k."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanmo.data.tasks import Problem, read_records
from hanmo.errors import DataError, UsageError
from hanmo.tasks.programs import (
    candidate,
    check,
    cut_function,
    fenced_code,
    pass_at_k,
    passes_at,
    question,
    reference_program,
    run_all,
)
from hanmo.tasks.sandbox import Limits

MBPP = Path("/work/shared/data/mbpp/mbpp.jsonl")
HUMAN_EVAL = {
    "task_id": "Test/0",
    "prompt": 'import math\n\ndef helper(x):\n    return x\n\ndef area(r):\n    """The area of a circle."""\n',
    "canonical_solution": "    return math.pi * helper(r) ** 2\n",
    "test": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-4\n    assert candidate(0) == 0\n",
    "entry_point": "area",
}
SUM = {
    "task_id": 1,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\r\n    return a + b",
    "test_setup_code": "",
    "test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
}


def read(path: Path) -> list[Problem]:
    return list(read_records("problem", path))


def written(path: Path, *records: object, form: str = "\n") -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_bytes(form.join(lines).encode())
    return path


def test_both_forms_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", "\ufeff" + json.dumps(HUMAN_EVAL), "", SUM, form="\r\n")
    first, second = read(path)
    assert (first.name, first.entry_point, first.continues) == ("Test/0", "area", True)
    assert (second.name, second.asserts[0], second.continues) == ("1", "assert add(1, 2) == 3", False)
    assert "\r" not in second.reference
    assert question(second).endswith("assert add(-1, 1) == 0\n[BEGIN]\n")
    results = run_all([reference_program(first), reference_program(second)])
    assert [result.outcome for result in results] == ["passed", "passed"]


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[1]", "not a JSON object"),
        ({**SUM, "task_id": None}, "task_id"),
        ({"task_id": 1, "text": "x"}, "neither test nor test_list"),
        ({**SUM, "test_list": []}, "every program would pass"),
        ({**SUM, "test_list": "assert"}, "test_list is not a list"),
        ({**SUM, "text": 3}, "text is missing or is not a text"),
        ({**SUM, "text": " "}, "text is empty"),
        ({**HUMAN_EVAL, "entry_point": "a b"}, "entry_point"),
        ({**HUMAN_EVAL, "prompt": None}, "prompt is missing"),
        ({**HUMAN_EVAL, "test": "assert 1"}, "check(candidate)"),
        (SUM, "stands in line 1 already"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, record: object, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "p.jsonl", SUM, record)
    with pytest.raises(DataError) as caught:
        read_records("problem", path, skip_bad=False)
    assert part in str(caught.value)
    assert f"{path}:2" in str(caught.value)
    assert "expected" in str(caught.value)
    monkeypatch.setenv("HANMO_LANG", "zh")
    with pytest.raises(DataError, match="应为"):
        read_records("problem", path, skip_bad=False)


def test_a_bad_line_among_many_is_counted(tmp_path: Path) -> None:
    found = read_records("problem", written(tmp_path / "p.jsonl", SUM, {"task_id": 2}, HUMAN_EVAL))
    assert len(found) == 2 and found.report.problems.count == 1
    told = found.report.describe()
    assert "1 x MBPP" in told and "1 x HumanEval" in told and f"{tmp_path / 'p.jsonl'}:2" in told


def test_columns_of_another_name(tmp_path: Path) -> None:
    row = {"id": "a", "question": "Add.", "asserts": ["assert add(1, 2) == 3"], "answer": "def add(a, b): return a + b"}
    fields = {"name": "id", "prompt": "question", "tests": "asserts", "reference": "answer"}
    (found,) = read_records("problem", written(tmp_path / "p.jsonl", row), fields=fields)
    assert (found.name, found.prompt, found.asserts) == ("a", "Add.", ("assert add(1, 2) == 3",))


def test_files_that_are_no_problems(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="empty"):
        read(written(tmp_path / "empty.jsonl", "", ""))
    with pytest.raises(DataError, match="no problems"):
        read(written(tmp_path / "p.csv", "a,b", "1,2"))


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("    return math.pi * r * r\n\nprint(area(1))", "passed"),
        ("    return math.pi * r * r\ndef other(:", "passed"),
        ("    return 3.14159 * r * r\n# Test\nassert False", "passed"),
        ("```python\ndef area(r):\n    return math.pi * helper(r) ** 2\n```\nThis works.", "passed"),
        ("Sure!\n\n```py\n    return math.pi * r * r\n```", "passed"),
        ("from math import pi\ndef area(r):\n    return pi * r * r", "passed"),
        ("```python\ndef area(r):\n    return math.pi * r * r", "passed"),
        ("```bash\nls\n```\n```\ndef area(r):\n    return math.pi * r * r\n```", "passed"),
        ("    return r", "failed"),
        ("", "failed"),
        ("    import sys; sys.exit(0)", "failed"),
        ("    return (", "not compiled"),
        ("    while True: pass", "timeout"),
        ("    return '\ud800'", "not compiled"),
    ],
)
def test_answers_to_a_prompt_that_is_continued(tmp_path: Path, answer: str, outcome: str) -> None:
    problems = read(written(tmp_path / "p.jsonl", HUMAN_EVAL))
    assert check(problems, [[answer]], Limits(seconds=1, cpu_seconds=1))[0][0].outcome == outcome


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("def add(a, b):\r\n    return a + b\r\n[DONE]\n\nYou are an expert", "passed"),
        ("[BEGIN]\ndef add(a, b):\n    return a + b\n[DONE]", "passed"),
        ("加法如下：\n```python\ndef add(a, b):\n    return a + b  # 求和\n```", "passed"),
        ("from __future__ import annotations\ndef add(a: X, b: X) -> X:\n    return a + b", "passed"),
        ("def add(a, b):\n    return a - b", "failed"),
        ("def plus(a, b):\n    return a + b", "failed"),
        ("I do not know.", "not compiled"),
    ],
)
def test_answers_that_stand_by_themselves(tmp_path: Path, answer: str, outcome: str) -> None:
    problems = read(written(tmp_path / "p.jsonl", SUM))
    assert check(problems, [[answer]])[0][0].outcome == outcome


def test_results_keep_their_order_and_equal_programs_run_once(tmp_path: Path) -> None:
    problems = read(written(tmp_path / "p.jsonl", SUM, HUMAN_EVAL))
    right, bad = "def add(a, b):\n    return a + b", "def add(a, b):\n    return 0"
    told: list[tuple[int, int]] = []
    results = check(problems, [[right, bad, right], ["    return 0"]], done=lambda now, all_: told.append((now, all_)))
    assert [[result.passed for result in row] for row in results] == [[True, False, True], [False]]
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert passes_at(results[:1], 1).tolist() == pytest.approx([2 / 3])
    with pytest.raises(UsageError, match="answers to 1"):
        check(problems, [[right]])


def test_cutting() -> None:
    assert cut_function("    return 1\n    # inside\n\n\nclass A:") == "    return 1\n    # inside\n"
    assert cut_function("    if x:\n        return 1\nif __name__") == "    if x:\n        return 1\n"
    assert fenced_code("no code") is None
    assert fenced_code("~~~\na\n~~~") == "a\n"
    assert candidate(Problem("n", "p", ""), "x = 1") == "x = 1\n"


@given(st.integers(1, 60), st.data())
def test_pass_at_k_equals_the_binomials(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    exact = 1 - comb(samples - correct, k) / comb(samples, k)
    assert pass_at_k(samples, correct, k) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_of_many_samples_and_of_bad_counts() -> None:
    assert pass_at_k(100_000, 1, 100) == pytest.approx(0.001)
    assert np.isfinite(pass_at_k(100_000, 50_000, 50_000))
    for samples, correct, k in ((0, 0, 1), (3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)):
        with pytest.raises(UsageError, match="pass@"):
            pass_at_k(samples, correct, k)


@pytest.mark.skipif(not MBPP.exists(), reason="needs the MBPP problems")
def test_references_of_mbpp_pass_and_broken_ones_fail() -> None:
    """Every tenth problem, to be short; and the same answers with the function misnamed."""
    problems = read(MBPP)
    assert len(problems) == 374
    some = problems[::10]
    right = check(some, [[problem.reference] for problem in some])
    assert [problem.name for problem, row in zip(some, right, strict=True) if not row[0].passed] == []
    broken = check(some, [[problem.reference.replace("def ", "def not_")] for problem in some])
    assert not any(row[0].passed for row in broken)
