"""Problems for programs: those of HumanEval (Chen et al. 2021) and MBPP (Austin et al. 2021), or others of the kind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.formats import JSON_FORMATS
from hanmo.data.tasks.named import look_up
from hanmo.data.tasks.types import Problem
from hanmo.language import pick
from hanmo.text.normalize import SURROGATE

ROLES = ("prompt", "tests", "reference", "name")
FORMS = "a HumanEval record (task_id, prompt, test, entry_point) or an MBPP record (task_id, text or prompt, test_list)"
FORMS_ZH = "HumanEval 记录（task_id、prompt、test、entry_point）或 MBPP 记录（task_id、text 或 prompt、test_list）"


class Wrong(Exception):
    """What is wrong with a record, in the user's language."""


def read_problems(file: RecordFile) -> Iterator[Problem]:
    """The problems of a file of JSON objects or of parquet; both forms may stand in one file.

    Raises:
        DataError: the file holds something else.
    """
    if file.format not in (*JSON_FORMATS, "parquet"):
        file.refuse(
            pick("the file holds no problems", "文件中没有题目") + f" ({file.preview.strip()[:60]!r})",
            "write jsonl, a problem on each line",
            "请改为 jsonl，每行一道题",
            why=f"expected {FORMS}",
        )
    places: dict[str, int] = {}
    for line, value in file.objects():
        try:
            problem = parse(file, line, value)
            if problem.name in places:
                first = places[problem.name]
                raise Wrong(
                    pick(
                        f"the task_id {problem.name} stands in line {first} already",
                        f"task_id {problem.name} 已在第 {first} 行出现",
                    )
                )
        except Wrong as wrong:
            file.bad(line, str(wrong), value, pick(FORMS, FORMS_ZH), pick("correct the record", "请改正该记录"))
            continue
        places[problem.name] = line
        form = "HumanEval" if problem.continues else "MBPP"
        file.report.notes[form] += 1
        yield problem


def parse(file: RecordFile, line: int, value: Any) -> Problem:
    """One problem.

    Raises:
        Wrong: it is none.
    """
    if not isinstance(value, dict):
        raise Wrong(pick("the record is not a JSON object", "记录不是 JSON 对象"))
    given = {role: look_up(value, key) for role, key in file.fields.items()}
    name = given.get("name", value.get("task_id", line))
    if isinstance(name, (dict, list, bool, type(None))):
        raise Wrong(pick("task_id is neither a number nor a text", "task_id 既不是数字也不是文本"))
    if "test_list" in value or isinstance(given.get("tests"), list):
        return mbpp(str(name), value, given, file.name, line)
    if "entry_point" in value or "test" in value:
        return human_eval(str(name), value, given, file.name, line)
    raise Wrong(pick("there are no tests: neither test nor test_list", "没有测试：既无 test 也无 test_list"))


def text_of(value: Any, key: str) -> str:
    """A text with plain line ends.

    Raises:
        Wrong: it is none.
    """
    if not isinstance(value, str):
        raise Wrong(pick(f"{key} is missing or is not a text", f"缺少 {key}，或不是文本"))
    return SURROGATE.sub("\ufffd", value).replace("\r\n", "\n")


def texts_of(value: Any, key: str) -> tuple[str, ...]:
    """A list of texts.

    Raises:
        Wrong: it is none.
    """
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Wrong(pick(f"{key} is not a list of texts", f"{key} 不是文本的列表"))
    return tuple(text_of(item, key) for item in value)


def prompt_of(value: Mapping[str, Any], given: Mapping[str, Any], key: str) -> str:
    """What is asked.

    Raises:
        Wrong: nothing is.
    """
    prompt = text_of(given.get("prompt", value.get(key)), key)
    if not prompt.strip():
        raise Wrong(pick(f"{key} is empty", f"{key} 是空的"))
    return prompt


def human_eval(name: str, value: Mapping[str, Any], given: Mapping[str, Any], file: str, line: int) -> Problem:
    """A function to be continued, and a function ``check`` that tests it."""
    entry_point = text_of(value.get("entry_point"), "entry_point")
    if not entry_point.isidentifier():
        shown = repr(entry_point[:40])
        raise Wrong(pick(f"entry_point is no name of a function: {shown}", f"entry_point 不是函数名：{shown}"))
    prompt, test = prompt_of(value, given, "prompt"), text_of(given.get("tests", value.get("test")), "test")
    if not defines(test, "check"):
        raise Wrong(pick("test does not define check(candidate)", "test 没有定义 check(candidate)"))
    reference = text_of(given.get("reference", value.get("canonical_solution", "")), "canonical_solution")
    tests = f"{test}\n\ncheck({entry_point})\n"
    return Problem(name, prompt, tests, reference, entry_point, file=file, line=line)


def mbpp(name: str, value: Mapping[str, Any], given: Mapping[str, Any], file: str, line: int) -> Problem:
    """A sentence that asks for a function, and assertions."""
    asserts = texts_of(given.get("tests", value.get("test_list")), "test_list")
    if not any(test.strip() for test in asserts):
        raise Wrong(pick("test_list is empty: every program would pass", "test_list 是空的：任何程序都能通过"))
    prompt = prompt_of(value, given, "text" if "text" in value else "prompt")
    imports = texts_of(value.get("test_imports", []), "test_imports")
    setup = [*imports, text_of(value.get("test_setup_code", ""), "test_setup_code")]
    tests = "\n".join([*(part for part in setup if part), *asserts]) + "\n"
    reference = text_of(given.get("reference", value.get("code", "")), "code")
    return Problem(name, prompt, tests, reference, asserts=asserts, file=file, line=line)


def defines(code: str, name: str) -> bool:
    """Whether a program defines a function of this name.

    >>> defines("import math\\ndef area(r):", "area")
    True
    """
    return re.search(rf"^(async\s+)?def\s+{re.escape(name)}\s*\(", code, re.MULTILINE) is not None
