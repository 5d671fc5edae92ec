"""Code: programs that a model writes, run against the tests of their problems in a sandbox.

pass@k is the chance that one of k programs passes all tests (Chen et al. 2021), estimated without bias from the n that
were drawn for each problem.

Letters in names: N problems, K numbers of a problem.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanmo.data.tasks.types import Problem
from hanmo.errors import UsageError
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.tasks.base import Form, System, Task
from hanmo.tasks.drafting import SEEDS, Drafter, learnt_model
from hanmo.tasks.metric import Floats, Metric, ratio
from hanmo.tasks.programs import (
    FUNCTION_STOPS,
    MBPP_END,
    candidate,
    pass_at_k,
    program,
    question,
    run_all,
)
from hanmo.tasks.prompts import Prompt, choose_shots, mark_of, mostly_chinese
from hanmo.tasks.sandbox import MEBIBYTE, Limits, Result, protections

Programs = tuple[str, ...]  # what a system wrote to one problem, as it wrote it

KS = (1, 10, 100)  # of pass@k, as far as there are samples, and as many as there are samples
MOST_SAMPLES = 200
SAMPLED = 0.8  # temperature of several samples, where none is given
NEW_TOKENS = 512
NGRAM = 8  # characters
STOPS = FUNCTION_STOPS[:4]  # an engine takes four; at the fifth the answer is cut afterwards
CALLED = re.compile(r"assert\s+(?:not\s+)?(?:\w+\()?\s*([A-Za-z_]\w*)\s*\(")
DEFINED = re.compile(r"^(?:async\s+)?def\s+([A-Za-z_]\w*)\s*\(", re.MULTILINE)
INSTRUCTIONS = {  # (Chinese?, continues?) -> instruction
    (False, False): "Write a Python program that does what is asked. Answer with one block of Python code only.",
    (False, True): "Complete the Python function. Answer with the whole function in one block of code only.",
    (True, False): "按要求写一个 Python 程序，只用一个 Python 代码块作答。",
    (True, True): "补全下面的 Python 函数，只用一个代码块给出完整的函数。",
}
OUTCOMES = {
    "passed": ("passed", "通过"),
    "assertion": ("a test failed", "测试未通过"),
    "exception": ("raised an exception", "抛出异常"),
    "syntax": ("does not compile", "语法错误"),
    "timeout": ("ran out of time", "超时"),
    "memory": ("ran out of memory", "内存超限"),
    "ended": ("ended itself or was killed", "自行退出或被终止"),
    "empty": ("no program", "没有程序"),
}


def cause(text: str, result: Result) -> str:
    """What became of a program, as a key of ``OUTCOMES``.

    Args:
        text: what the system wrote.
    """
    if result.passed or result.outcome in ("timeout", "memory"):
        return result.outcome
    if not text.strip():
        return "empty"
    if result.outcome == "not compiled":
        return "syntax"
    if result.outcome == "killed" or "ended itself" in result.message:
        return "ended"
    return "assertion" if "AssertionError" in result.message else "exception"


def solved(statistics: Floats) -> NDArray[np.bool_]:
    """Which problems the one program of each solved."""
    right: NDArray[np.bool_] = statistics[:, 1] > 0
    return right


class PassMetric(Metric[Problem, Programs]):
    """pass@k: each problem says how likely one of k of its programs passes; the measure is the mean over problems.

    Every program is run once, whatever asks for its result.

    Args:
        samples: programs for each problem.
        limits: of the sandbox.
    """

    primary = "pass@1"

    def __init__(self, samples: int = 1, limits: Limits | None = None) -> None:
        self.ks = sorted({k for k in (*KS, samples) if k <= samples})
        self.limits = limits or Limits()
        self.known: dict[str, Result] = {}
        self.right = solved if samples == 1 else None  # with one program each, a problem is solved or not

    def run(self, records: Sequence[Problem], answers: Sequence[Programs]) -> list[list[Result]]:
        """The result of each program of each problem.

        Raises:
            ResourceError: this system has no sandbox.
        """
        texts = [[program(record, text) for text in given] for record, given in zip(records, answers, strict=True)]
        new = list(dict.fromkeys(text for row in texts for text in row if text not in self.known))
        if new:
            bar = Progress(pick("running programs", "运行程序"), len(new), "programs")
            results = run_all(new, self.limits, done=lambda now, _: bar.update(now))
            bar.close()
            self.known.update(zip(new, results, strict=True))
        return [[self.known[text] for text in row] for row in texts]

    def statistics(self, records: Sequence[Problem], answers: Sequence[Programs]) -> Floats:
        """One, and pass@k for each k."""
        rows = []
        for results in self.run(records, answers):
            right = sum(result.passed for result in results)
            rows.append([1.0, *(pass_at_k(len(results), right, k) for k in self.ks)])
        return np.array(rows, dtype=np.float64).reshape(len(records), 1 + len(self.ks))

    def measures(self, sums: Floats) -> dict[str, Floats]:
        """The means."""
        return {f"pass@{k}": ratio(sums[..., 1 + place], sums[..., 0]) for place, k in enumerate(self.ks)}

    def signature(self) -> Mapping[str, Any]:
        """The limits of the sandbox."""
        return {"sandbox": f"{self.limits.seconds:g}s/{self.limits.memory // MEBIBYTE}MiB"}

    def details(self, records: Sequence[Problem], answers: Sequence[Programs]) -> dict[str, Any]:
        """How many programs came to which end, the first message of each kind of failure, and what the sandbox enforces
        on this machine."""
        counts: Counter[str] = Counter()
        first: dict[str, str] = {}
        for record, texts, results in zip(records, answers, self.run(records, answers), strict=True):
            for text, result in zip(texts, results, strict=True):
                why = cause(text, result)
                counts[why] += 1
                if not result.passed:
                    first.setdefault(why, f"{record.name}: {result.message[:200]}")
        named = {pick(*OUTCOMES[why]): counts[why] for why in OUTCOMES if counts[why]}
        return {"counts": named, "first": first, "sandbox": list(protections())}


# Ways to answer -------------------------------------------------------------------------------------------------------


class Coder(System[Problem, Programs]):
    """A language model: one with a chat template is asked, others continue the prompt of the paper.

    Args:
        model: local or remote.
        train: problems whose reference solutions are shown as worked examples.
        form: how many examples; the instruction.
        samples: programs for each problem.
        temperature: of the draws; 0 takes the likeliest token.
    """

    def __init__(self, model: Any, train: Sequence[Problem], form: Form, samples: int, temperature: float) -> None:
        self.name, self.form = model.name, form
        self.samples, self.temperature = samples, temperature
        self.drafter = Drafter(model, most=NEW_TOKENS)
        self.kind = self.drafter.kind
        solved = [record for record in train if record.reference]
        self.shots: list[Problem] = choose_shots(solved, form.shots, form.seed)

    def chat(self, record: Problem, text: str) -> Prompt:
        """How a problem is put to a model that answers conversations; ``text`` is its prompt, perhaps shortened."""
        own = INSTRUCTIONS[mostly_chinese([text]), record.continues]
        shots = tuple((asked(shot, shot.prompt), fenced(full_reference(shot))) for shot in self.shots)
        return Prompt(self.form.instruction or own, asked(record, text), shots)

    def plain(self, record: Problem, text: str) -> str:
        """What a base model goes on with."""
        begin = f"{self.form.instruction}\n\n" if self.form.instruction else ""
        shots = [question(shot) + shot.reference.rstrip() + end_of(shot) for shot in self.shots]
        return begin + "".join(shots) + question(shorter(record, text))

    def answer(self, records: Sequence[Problem]) -> list[Programs]:
        """The programs as the model wrote them."""
        answers: list[Programs] = [()] * len(records)
        for continues in (True, False):  # they end at other texts
            places = [place for place, record in enumerate(records) if record.continues is continues]
            self.drafter.stops = list(STOPS if continues else (MBPP_END,))
            prompts = [self.prompt(records[place]) for place in places]
            options: dict[str, Any] = {"label": pick("writing programs", "编写程序"), "temperature": self.temperature}
            seeds = [self.form.seed + SEEDS * place for place in places]
            found = self.drafter.write(prompts, self.samples, seeds=seeds, **options)
            for place, texts in zip(places, found, strict=True):
                answers[place] = tuple(texts)
        return answers

    def prompt(self, record: Problem) -> Any:
        """What the model reads."""
        make = self.chat if self.drafter.chats else self.plain
        return self.drafter.fitted(record.prompt, lambda text: make(record, text))

    def signature(self) -> Mapping[str, Any]:
        """Prompt, examples, samples and how they are drawn."""
        blank = Problem("", "", "")
        shown = self.chat(blank, "") if self.drafter.chats else Prompt("", self.plain(blank, ""))
        drawn = {"samples": self.samples, "temperature": f"{self.temperature:g}"}
        if self.temperature:
            drawn["seed"] = self.form.seed
        mark = {**mark_of(shown, len(self.shots)), **drawn, "tokens": self.drafter.most}
        return mark


def shorter(record: Problem, text: str) -> Problem:
    """The problem with another prompt."""
    if text == record.prompt:
        return record
    return Problem(record.name, text, record.tests, record.reference, record.entry_point, record.asserts)


def asked(record: Problem, text: str) -> str:
    """A problem as a message."""
    if record.continues:
        return fenced(text)
    tests = "\n".join(record.asserts)
    return f"{text}\n\n{fenced(tests)}" if tests else text


def fenced(code: str) -> str:
    """A block of code."""
    return f"```python\n{code.strip()}\n```"


def full_reference(record: Problem) -> str:
    """The reference solution as a whole program."""
    return record.prompt + record.reference if record.continues else record.reference


def end_of(record: Problem) -> str:
    """What closes a worked example."""
    return "\n\n\n" if record.continues else f"\n{MBPP_END}\n\n"


class NGramCoder(System[Problem, Programs]):
    """Goes on with what a program of this name usually begins with, by the characters before.

    It has learnt the reference solutions of other problems. Of a problem it sees the prompt to be continued, or else
    the name of the function that the first test calls.
    """

    kind, learns = "baseline", True

    def __init__(self, samples: int = 1, temperature: float = 0.0) -> None:
        self.name = pick(f"n-gram of {NGRAM} characters", f"{NGRAM} 元字符模型")
        self.samples, self.temperature = samples, temperature
        self.drafter: Drafter | None = None

    def fit(self, train: Sequence[Problem], validation: Sequence[Problem] = ()) -> None:
        """Count.

        Raises:
            UsageError: no record has a reference solution.
        """
        del validation
        texts = [full_reference(record).strip("\n") for record in train if record.reference]
        self.drafter = Drafter(learnt_model(texts, NGRAM, self.name), most=NEW_TOKENS)

    def answer(self, records: Sequence[Problem]) -> list[Programs]:
        """What goes on, with what it was given in front of it where the answer stands by itself."""
        assert self.drafter is not None
        begins = [record.prompt if record.continues else begin_of(record) for record in records]
        options: dict[str, Any] = {"label": self.name, "temperature": self.temperature}
        seeds = [SEEDS * place for place in range(len(records))]
        written = self.drafter.write(begins, self.samples, seeds=seeds, **options)
        return [
            tuple(text if record.continues else begin + text for text in texts)
            for record, begin, texts in zip(records, begins, written, strict=True)
        ]

    def signature(self) -> Mapping[str, Any]:
        """How the programs are drawn."""
        return {"samples": self.samples, "temperature": f"{self.temperature:g}"}


def begin_of(record: Problem) -> str:
    """The head of the function that the tests call.

    >>> begin_of(Problem("1", "Add.", "", asserts=("assert add(1, 2) == 3",)))
    'def add('
    """
    found = CALLED.search(record.asserts[0]) if record.asserts else None
    return f"def {found[1]}(" if found else "def "


class References(System[Problem, Programs]):
    """The reference solutions: what they do not reach, no model can reach here."""

    def __init__(self, samples: int = 1) -> None:
        self.name, self.samples = pick("the reference solutions", "参考答案"), samples

    def answer(self, records: Sequence[Problem]) -> list[Programs]:
        """The references, as if they had been written so often."""
        return [(record.reference,) * self.samples for record in records]


class Code(Task[Problem, Programs]):
    """Programs for problems."""

    name, kind, training = "code", "problem", "instructions"
    aliases = ("humaneval", "mbpp", "programming")
    help = "programs for problems, run against their tests in a sandbox: HumanEval, MBPP, your own"
    help_zh = "按题目写程序，在沙箱中用测试检验：HumanEval、MBPP 或自备题目"
    settings = ("samples", "temperature")

    @property
    def samples(self) -> int:
        """Programs for each problem.

        Raises:
            UsageError: fewer than one, or far too many.
        """
        samples = int(self.given.get("samples", 1))
        if not 1 <= samples <= MOST_SAMPLES:
            raise UsageError(
                f"--samples must be from 1 to {MOST_SAMPLES}, not {samples}",
                fix="1 for pass@1; 10 or more for pass@10",
                zh=f"--samples 应为 1 到 {MOST_SAMPLES}，不能是 {samples}；pass@1 用 1，pass@10 至少用 10",
            )
        return samples

    @property
    def temperature(self) -> float:
        """How freely they are drawn: the likeliest one, or several different ones."""
        return float(self.given.get("temperature", SAMPLED if self.samples > 1 else 0.0))

    def metric(self, records: Sequence[Problem]) -> PassMetric:
        """pass@k."""
        del records
        return PassMetric(self.samples)

    def baselines(self, records: Sequence[Problem]) -> list[System[Problem, Programs]]:
        """An n-gram model of the reference solutions of other problems; none where there are no references."""
        if not any(record.reference for record in records):
            return []
        return [NGramCoder(self.samples, self.temperature)]

    def yardsticks(self, records: Sequence[Problem]) -> list[System[Problem, Programs]]:
        """The reference solutions, where every problem has one."""
        return [References(self.samples)] if all(record.reference for record in records) else []

    def system(self, model: Any, train: Sequence[Problem] = (), form: Form | None = None) -> System[Problem, Programs]:
        """A language model that writes."""
        if not hasattr(model, "generate") or getattr(model, "reads_source", False):
            raise self.cannot(
                model,
                fix="take a language model that continues texts or answers, such as smollm2-135m-instruct",
                zh="该模型不能写程序；请使用能续写或对话的语言模型，如 smollm2-135m-instruct",
            )
        return Coder(model, train, form or Form(), self.samples, self.temperature)

    def record(self, text: str) -> Problem:
        """A problem without tests; a text that ends inside a function is to be continued."""
        if not text.strip():
            raise UsageError(
                "the prompt is empty",
                fix='say what the program does: hanmo code --model M "write a function that ..."',
                zh='提示是空的；请说明程序的用途：hanmo code --model 模型 "写一个函数，……"',
            )
        heads = DEFINED.findall(text)
        return Problem("", text.rstrip() + "\n" if heads else text, "", entry_point=heads[-1] if heads else "")

    def as_data(self, answer: Programs) -> dict[str, Any]:
        """What was written."""
        return {"answers": list(answer)}

    def row(self, record: Problem, answer: Programs) -> dict[str, Any]:
        """The programs that the answers make."""
        return {"name": record.name, "programs": [candidate(record, text) for text in answer], **self.as_data(answer)}

    def describe(self, record: Problem, answer: Programs) -> str:
        """The programs, one after the other."""
        texts = [candidate(record, text).strip("\n") for text in answer]
        return f"\n\n# {'-' * 76}\n\n".join(texts)
