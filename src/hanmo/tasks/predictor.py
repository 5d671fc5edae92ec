"""A task with a model that does it, ready to be called: what notebooks use, and what the server answers with."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from hanmo.errors import UsageError
from hanmo.tasks.base import Form, System, Task
from hanmo.tasks.registry import find_task

Given = str | Mapping[str, str]  # a text, or the texts of one record by their names


class Predictor:
    """A task with what answers it.

    Args:
        task: what is done.
        system: what does it.
    """

    def __init__(self, task: Task[Any, Any], system: System[Any, Any]) -> None:
        self.task, self.system = task, system

    @overload
    def __call__(self, texts: Given) -> dict[str, Any]: ...  # type: ignore[overload-overlap]  # a str is a sequence
    @overload
    def __call__(self, texts: Sequence[Given]) -> list[dict[str, Any]]: ...
    def __call__(self, texts: Given | Sequence[Given]) -> dict[str, Any] | list[dict[str, Any]]:
        """The answer to one text, or the answers to several; see :meth:`predict`."""
        if isinstance(texts, (str, Mapping)):
            return self.predict([texts])[0]
        return self.predict(texts)

    def predict(self, texts: Sequence[Given]) -> list[dict[str, Any]]:
        """One answer for each text, as plain data in their order.

        Args:
            texts: texts, or for records of several texts objects such as ``{"text": ..., "pair": ...}``.

        Raises:
            UsageError: something that is neither, or a text that the task cannot use.
        """
        if isinstance(texts, (str, Mapping)):
            raise UsageError(
                "give a list of texts, or call the predictor itself", zh="请给出文本列表，或直接调用该对象"
            )
        return self.rows([self.record(given, number) for number, given in enumerate(texts)])

    def rows(self, records: Sequence[Any]) -> list[dict[str, Any]]:
        """The answers to records, as plain data."""
        answers = self.system.answer(records)
        return [self.task.row(record, answer) for record, answer in zip(records, answers, strict=True)]

    def record(self, given: Any, number: int) -> Any:
        """The record of a text, or of several by their names; ``number`` is its place in errors.

        Raises:
            UsageError: it is neither, or the task cannot use it.
        """
        names = self.task.inputs
        data = {"text": given} if isinstance(given, str) else given
        right = isinstance(data, Mapping) and "text" in data
        if not right or not all(name in names and isinstance(text, str) for name, text in data.items()):
            wanted = ", ".join(names)
            raise UsageError(
                f"text {number} is no text, nor an object of texts with the names: {wanted}",
                zh=f"第 {number} 项（从 0 起）既不是文本，也不是由文本构成的对象（可用的键：{wanted}）",
            )
        try:
            return self.task.record_from(data)
        except UsageError as error:
            error.where = error.where or f"text {number}"
            raise


def task(
    name: str,
    model: Any,
    *,
    labels: Sequence[str] = (),
    examples: str | Path | Sequence[Mapping[str, Any]] = (),
    shots: int | None = None,
    instruction: str | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Predictor:
    """A task with a model that does it.

    Args:
        name: of the task, or an alias: "spam", "ner", "translation".
        model: a name or folder, as for :func:`hanmo.load`; or what that returned.
        labels: what a language model may answer: the labels of texts, the types of spans.
        examples: records with right answers, for a language model that is asked: a file, or objects as in jsonl.
        shots: how many of the examples it is shown; None: all that are given as objects, none of a file.
        instruction: what it is told, instead of the task's own words.
        seed: which examples of a file.
        settings: of this task alone, such as ``{"form": "五言绝句"}`` for writing.
        options: of :func:`hanmo.load`.

    Raises:
        UsageError: there is no such task, or what a prompt needs is missing.
        DataError: the examples cannot be used.
        ModelError: there is no such model, or it cannot do this task.

    >>> spam = task("spam", "runs/my-spam")                          # doctest: +SKIP
    >>> spam("You won a prize, call now!")["labels"]                 # doctest: +SKIP
    ['spam']
    """
    found = find_task(name, **(settings or {}))
    train = read_examples(found.kind, examples)
    if shots is None:
        shots = 0 if isinstance(examples, (str, Path)) else len(train)
    if isinstance(model, (str, Path)):
        from hanmo.inference.loading import load

        model = load(model, **options)
    return Predictor(found, found.system(model, train, Form(shots, seed, instruction, tuple(labels))))


def read_examples(kind: str, examples: str | Path | Sequence[Mapping[str, Any]]) -> list[Any]:
    """The records of a file, or of objects as they would stand in a jsonl file.

    Raises:
        DataError: one is no record of this kind; it is named by its line, from 1.
    """
    from hanmo.data.tasks import read_records

    if isinstance(examples, (str, Path)):
        return list(read_records(kind, examples))
    if not examples:
        return []
    with tempfile.TemporaryDirectory(prefix="hanmo-examples-") as folder:
        file = Path(folder, "examples.jsonl")
        lines = (json.dumps(dict(example)) + "\n" for example in examples)
        file.write_text("".join(lines), encoding="utf-8")
        return list(read_records(kind, file, skip_bad=False))
