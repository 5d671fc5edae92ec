"""The tasks by their names; a task's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hanmo.errors import UsageError, nearest

if TYPE_CHECKING:
    from hanmo.tasks.base import Task

MODULES = {  # name: class; its module has the name of the task
    "classification": "Classification",
    "tagging": "Tagging",
    "semantic-roles": "SemanticRoles",
    "summarization": "Summarization",
    "translation": "Translation",
    "dialogue": "Dialogues",
}
ALIASES = {
    "sentiment": "classification",
    "spam": "classification",
    "topic": "classification",
    "offensiveness": "classification",
    "intent": "classification",
    "ner": "tagging",
    "pos": "tagging",
    "segmentation": "tagging",
    "srl": "semantic-roles",
    "mt": "translation",
    "translate": "translation",
    "summary": "summarization",
    "summarisation": "summarization",
    "summarize": "summarization",
    "assistant": "dialogue",
    "instruction-following": "dialogue",
}


def task_name(name: str) -> str:
    """The name of a task, of which an alias may be given.

    Raises:
        UsageError: there is no such task.
    """
    name = ALIASES.get(name, name)
    if name not in MODULES:
        hint = nearest(name, (*MODULES, *ALIASES))
        raise UsageError(f"unknown task '{name}'", fix=hint, zh=f"未知任务 '{name}'，{hint}")
    return name


def find_task(name: str) -> Task[Any, Any]:
    """The task of that name.

    >>> find_task("spam").name
    'classification'

    Raises:
        UsageError: there is no such task.
    """
    name = task_name(name)
    module = importlib.import_module(f"hanmo.tasks.{name.replace('-', '_')}")
    task: Task[Any, Any] = getattr(module, MODULES[name])()
    return task
