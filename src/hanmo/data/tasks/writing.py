"""Things to write about: prompts with a form and, where there is one, what a person wrote."""

from __future__ import annotations

from collections.abc import Iterator

from hanmo.data.tasks.files import RecordFile
from hanmo.data.tasks.named import Column, Roles, ambiguous, as_text, named_rows, names
from hanmo.data.tasks.types import Prompted
from hanmo.language import pick

FORM = "form genre 体裁 體裁 形式"
ROLES = Roles(
    ("prompt",),
    ("form", "reference"),
    (
        names(
            prompt="prompt instruction 提示 题目 題目",
            form=FORM,
            reference="reference completion response output poem paragraphs content story body text 参考 正文 作品 诗",
        ),
        names(
            prompt="title subject topic 标题 標題 题 題 主题",
            form=FORM,
            reference="reference poem paragraphs content story body text 参考 正文 作品 诗",
        ),
        names(prompt="text input 文本", form=FORM, reference="reference poem paragraphs content output 参考 作品 诗"),
    ),
)


def read_prompts(file: RecordFile) -> Iterator[Prompted]:
    """The prompts of a file; of plain lines each is one. A list of texts is one text, a line each.

    Raises:
        DataError: it cannot be told which column or key is the prompt.
    """
    if file.format == "lines":
        file.report.taken["prompt"] = pick("every line", "每一行")
        for line, text in file.lines():
            if text.strip() and not file.damaged(line, text):
                yield Prompted(text.strip(), file=file.name, line=line)
        return
    for row in named_rows(file, ROLES, looks):
        prompt = as_text(row.values["prompt"])
        if not prompt:
            file.bad(row.line, pick("the prompt is empty", "提示是空的"), row.raw, pick("a text", "一段文本"))
            continue
        form, reference = (as_text(row.values.get(role)) or "" for role in ("form", "reference"))
        yield Prompted(prompt, form, reference, file=file.name, line=row.line)


def looks(file: RecordFile, columns: list[Column], given: dict[str, int]) -> dict[str, tuple[int, str]]:
    """The columns of a table without header: a prompt, and perhaps a reference.

    Raises:
        DataError: there are more columns than these.
    """
    found = {role: (number, pick("as named", "按指定")) for role, number in given.items()}
    rest = [column for column in columns if column.number not in given.values()]
    open_roles = [role for role in ("prompt", "reference") if role not in found]
    if "prompt" in open_roles and (not rest or len(rest) > len(open_roles)):
        raise ambiguous(file, columns, ("prompt", "form", "reference"))
    reason = pick("the texts, in their order", "按列的先后")
    found.update({role: (column.number, reason) for role, column in zip(open_roles, rest, strict=False)})
    return found
