"""Programs that a model writes: problems read, answers cut to the function, tests run, pass@k.

The problems are those of HumanEval (Chen et al. 2021, *Evaluating Large Language Models Trained on Code*) and of MBPP
(Austin et al. 2021, *Program Synthesis with Large Language Models*), or files of one's own in either form.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.data.problems import excerpt
from hanmo.errors import DataError, UsageError
from hanmo.tasks.sandbox import Limits, Result, run

# Where a continuation of a HumanEval prompt has left the function (the stop sequences of Chen et al., section 3.1).
FUNCTION_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_END = "[DONE]"  # closes an answer in the few-shot prompt of Austin et al.
MBPP_BEGIN = "[BEGIN]"
FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
FORMS = "a HumanEval record (task_id, prompt, test, entry_point) or an MBPP record (task_id, text or prompt, test_list)"


@dataclass(frozen=True)
class Problem:
    """One problem.

    Args:
        name: the task's id.
        prompt: what the model continues (HumanEval) or is asked (MBPP).
        tests: program text that runs after the candidate and raises an error when it is wrong.
        reference: a correct answer; empty where the file has none.
        entry_point: the function that the tests call; empty where the file does not name it (MBPP).
        asserts: the assertions that are shown to the model in MBPP's prompt; empty for HumanEval.
    """

    name: str
    prompt: str
    tests: str
    reference: str = ""
    entry_point: str = ""
    asserts: tuple[str, ...] = ()

    @property
    def continues(self) -> bool:
        """Whether the answer continues the prompt (HumanEval) or stands by itself (MBPP)."""
        return bool(self.entry_point)

    def question(self) -> str:
        """The prompt as the paper words it; MBPP's shows the tests, and its answer ends with ``[DONE]``."""
        if self.continues:
            return self.prompt
        shown = "\n".join(self.asserts)
        return (
            f"You are an expert Python programmer, and here is your task: {self.prompt} "
            f"Your code should pass these tests:\n\n{shown}\n{MBPP_BEGIN}\n"
        )

    def candidate(self, answer: str) -> str:
        """The program that an answer of a model makes: continuation, chat answer with a code fence, or whole program.

        >>> Problem("t", "def f():\\n", "", entry_point="f").candidate("    return 1\\n\\nprint(f())")
        'def f():\\n    return 1\\n'
        """
        answer = answer.replace("\r\n", "\n")
        fenced = fenced_code(answer)
        code = answer if fenced is None else fenced
        if not self.continues:
            code = code.split(MBPP_END)[0]
            return code.split(MBPP_BEGIN, 1)[-1].strip("\n") + "\n"
        if defines(code, self.entry_point):  # the prompt's imports and helpers stay; the later definition is the one
            return self.prompt.rstrip() + "\n\n\n" + code.strip("\n") + "\n"
        return self.prompt + cut_function(code)

    def program(self, answer: str) -> str:
        """The whole text for the sandbox: the candidate, then the tests."""
        return self.candidate(answer) + "\n\n" + self.tests

    def reference_program(self) -> str:
        """The reference solution with the tests, uncut; the proof that the problem itself is sound."""
        return (self.prompt if self.continues else "") + self.reference.replace("\r\n", "\n") + "\n\n" + self.tests


def fenced_code(answer: str) -> str | None:
    """The code between the fences of a chat answer: the first block that is Python or names no language.

    An unclosed fence (the answer was cut off) reaches to the end. ``None`` where there is no such block.
    """
    for found in FENCE.finditer(answer):
        if found[2].lower() in ("", "python", "python3", "py", "py3"):
            return str(found[3])
    return None


def defines(code: str, name: str) -> bool:
    return re.search(rf"^(async\s+)?def\s+{re.escape(name)}\s*\(", code, re.MULTILINE) is not None


def cut_function(continuation: str) -> str:
    """The continuation up to the line where the function has ended (the stop sequences of HumanEval)."""
    ends = [continuation.find(stop) for stop in FUNCTION_STOPS]
    end = min((place for place in ends if place >= 0), default=len(continuation))
    return continuation[:end].rstrip() + "\n"


def read_problems(path: Path | str) -> list[Problem]:
    """Read HumanEval- or MBPP-style problems, one JSON object a line; both forms may stand in one file.

    Raises:
        DataError: the file cannot be read, holds no problem, or a line is not a problem; file, line and what was
            expected are named.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"cannot read the problems: {error.strerror or error}", where=str(path), zh=f"无法读取题目文件：{error}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not UTF-8 text (byte {error.start})",
            where=str(path),
            fix="save it as UTF-8",
            zh=f"文件不是 UTF-8 文本（第 {error.start} 字节）。请另存为 UTF-8",
        ) from error
    problems: list[Problem] = []
    places: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a record may hold U+2028
        if not line.strip():
            continue
        problem = parse(line, f"{path}:{number}")
        if problem.name in places:
            raise wrong(f"the task_id {problem.name} stands in line {places[problem.name]} already", f"{path}:{number}")
        places[problem.name] = number
        problems.append(problem)
    if not problems:
        raise DataError("the file holds no problem", where=str(path), why=f"expected {FORMS}", zh="文件中没有题目")
    return problems


def wrong(what: str, where: str, record: str = "", expected: str = FORMS) -> DataError:
    shown = f": {excerpt(record)}" if record else ""
    return DataError(
        f"{what}{shown}",
        where=where,
        why=f"expected {expected}",
        fix="correct the line, or take it out",
        zh=f"{what}{shown}（应为：{expected}）。请改正或删去这一行",
    )


def parse(line: str, where: str) -> Problem:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise wrong("the line is not JSON", where, line) from error
    if not isinstance(record, dict):
        raise wrong("the line is not a JSON object", where, line)
    if "task_id" not in record or isinstance(record["task_id"], (dict, list, bool, type(None))):
        raise wrong("task_id is missing or is neither a number nor a text", where, line)
    name = str(record["task_id"])
    if "test_list" in record:
        return mbpp(name, record, where)
    if "entry_point" in record or "test" in record:
        return human_eval(name, record, where)
    raise wrong("neither test nor test_list is there", where, line)


def text_of(record: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if not isinstance(value, str):
        raise wrong(f"{key} is missing or is not a text", where, json.dumps(record, ensure_ascii=False))
    return value.replace("\r\n", "\n")


def texts_of(record: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = record.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        shown = json.dumps(record, ensure_ascii=False)
        raise wrong(f"{key} is not a list of texts", where, shown, f"{key}: a list of Python statements")
    return tuple(item.replace("\r\n", "\n") for item in value)


def human_eval(name: str, record: dict[str, Any], where: str) -> Problem:
    entry_point = text_of(record, "entry_point", where)
    if not entry_point.isidentifier():
        raise wrong(f"entry_point is not a name of a function: {entry_point!r}", where)
    prompt, test = text_of(record, "prompt", where), text_of(record, "test", where)
    if not defines(test, "check"):
        raise wrong("test does not define check(candidate)", where, test)
    reference = text_of(record, "canonical_solution", where, "")
    return Problem(name, prompt, f"{test}\n\ncheck({entry_point})\n", reference, entry_point)


def mbpp(name: str, record: dict[str, Any], where: str) -> Problem:
    asserts = texts_of(record, "test_list", where)
    if not any(test.strip() for test in asserts):
        raise wrong("test_list is empty: every program would pass", where)
    prompt = text_of(record, "text" if "text" in record else "prompt", where)
    setup = [*texts_of(record, "test_imports", where), text_of(record, "test_setup_code", where, "")]
    tests = "\n".join([*(part for part in setup if part), *asserts]) + "\n"
    return Problem(name, prompt, tests, text_of(record, "code", where, ""), asserts=asserts)


def check(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str]],
    limits: Limits | None = None,
    workers: int | None = None,
    done: Callable[[int, int], None] | None = None,
) -> list[list[Result]]:
    """Run every answer of every problem in the sandbox, as many at a time as there are cores.

    Args:
        answers: for each problem, the model's answers; equal programs run once.
        done: is told after each program how many are done, of how many.

    Returns:
        For each problem, the result of each answer, in order.
    """
    if len(problems) != len(answers):
        raise UsageError(
            f"{len(problems)} problems, but answers to {len(answers)}",
            fix="give one list of answers for each problem",
            zh=f"有 {len(problems)} 道题，却有 {len(answers)} 组答案；每道题须对应一组答案",
        )
    programs = [[problem.program(answer) for answer in given] for problem, given in zip(problems, answers, strict=True)]
    distinct = list(dict.fromkeys(program for row in programs for program in row))
    return_of = dict(zip(distinct, run_all(distinct, limits, workers, done), strict=True))
    return [[return_of[program] for program in row] for row in programs]


def run_all(
    programs: Sequence[str],
    limits: Limits | None = None,
    workers: int | None = None,
    done: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Run programs side by side; the results are in the order of the programs."""
    results = []
    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        for result in pool.map(lambda program: run(program, limits), programs):
            results.append(result)
            if done:
                done(len(results), len(programs))
    return results


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of ``k`` answers drawn from ``samples`` passes, when ``correct`` of them do.

    The unbiased estimate 1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (equation 1), as a product without large numbers.

    Raises:
        UsageError: ``k`` is below one or above the number of samples, or the counts do not fit.

    >>> round(pass_at_k(5, 2, 1), 6), round(pass_at_k(5, 2, 2), 6)
    (0.4, 0.7)
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise UsageError(
            f"pass@{k} cannot be told from {samples} samples, {correct} of them correct",
            fix=f"draw at least {k} samples per problem, or ask for a smaller k",
            zh=f"{samples} 个样本（其中 {correct} 个正确）无法计算 pass@{k}；请增加每题的样本数，或减小 k",
        )
    if samples - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def passes_at(results: Sequence[Sequence[Result]], k: int) -> NDArray[np.float64]:
    """pass@k of each problem; its mean is the score, and its rows are what a bootstrap draws from.

    Returns:
        float64, one number per problem.
    """
    return np.array([pass_at_k(len(row), sum(result.passed for result in row), k) for row in results], dtype=np.float64)
