"""Programs that a model writes: answers cut to the function, tests run, pass@k.

The problems are those of HumanEval (Chen et al. 2021, *Evaluating Large Language Models Trained on Code*) and of MBPP
(Austin et al. 2021, *Program Synthesis with Large Language Models*), or files of one's own in either form.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from hanmo.data.tasks.problems import defines
from hanmo.data.tasks.types import Problem
from hanmo.errors import UsageError
from hanmo.tasks.sandbox import Limits, Result, run

# Where a continuation of a HumanEval prompt has left the function (the stop sequences of Chen et al., section 3.1).
FUNCTION_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_END = "[DONE]"  # closes an answer in the few-shot prompt of Austin et al.
MBPP_BEGIN = "[BEGIN]"
FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


def question(problem: Problem) -> str:
    """The prompt as the paper words it; MBPP's shows the tests, and its answer ends with ``[DONE]``."""
    if problem.continues:
        return problem.prompt
    shown = "\n".join(problem.asserts)
    tests = f" Your code should pass these tests:\n\n{shown}" if shown else ""
    return f"You are an expert Python programmer, and here is your task: {problem.prompt}{tests}\n{MBPP_BEGIN}\n"


def candidate(problem: Problem, answer: str) -> str:
    """The program that an answer of a model makes: continuation, chat answer with a code fence, or whole program.

    >>> candidate(Problem("t", "def f():\\n", "", entry_point="f"), "    return 1\\n\\nprint(f())")
    'def f():\\n    return 1\\n'
    """
    answer = answer.replace("\r\n", "\n")
    fenced = fenced_code(answer)
    code = answer if fenced is None else fenced
    if not problem.continues:
        code = code.split(MBPP_END)[0]
        return code.split(MBPP_BEGIN, 1)[-1].strip("\n") + "\n"
    if defines(code, problem.entry_point):  # the prompt's imports and helpers stay; the later definition is the one
        return problem.prompt.rstrip() + "\n\n\n" + code.strip("\n") + "\n"
    return problem.prompt + cut_function(code)


def program(problem: Problem, answer: str) -> str:
    """The whole text for the sandbox: the candidate, then the tests."""
    return candidate(problem, answer) + "\n\n" + problem.tests


def reference_program(problem: Problem) -> str:
    """The reference solution with the tests, uncut; the proof that the problem itself is sound."""
    return (problem.prompt if problem.continues else "") + problem.reference + "\n\n" + problem.tests


def fenced_code(answer: str) -> str | None:
    """The code between the fences of a chat answer: the first block that is Python or names no language.

    An unclosed fence (the answer was cut off) reaches to the end. ``None`` where there is no such block.
    """
    for found in FENCE.finditer(answer):
        if found[2].lower() in ("", "python", "python3", "py", "py3"):
            return str(found[3])
    return None


def cut_function(continuation: str) -> str:
    """The continuation up to the line where the function has ended (the stop sequences of HumanEval)."""
    ends = [continuation.find(stop) for stop in FUNCTION_STOPS]
    end = min((place for place in ends if place >= 0), default=len(continuation))
    return continuation[:end].rstrip() + "\n"


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
    programs = [
        [program(problem, answer) for answer in given] for problem, given in zip(problems, answers, strict=True)
    ]
    distinct = list(dict.fromkeys(text for row in programs for text in row))
    return_of = dict(zip(distinct, run_all(distinct, limits, workers, done), strict=True))
    return [[return_of[text] for text in row] for row in programs]


def run_all(
    programs: Sequence[str],
    limits: Limits | None = None,
    workers: int | None = None,
    done: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Run programs side by side; the results are in the order of the programs."""
    results = []
    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        for result in pool.map(lambda text: run(text, limits), programs):
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
