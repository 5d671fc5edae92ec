"""The tasks by their names; a task's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hanmo.errors import UsageError, nearest

if TYPE_CHECKING:
    from hanmo.tasks.base import Task

MODULES = {  # name: class; its module has the name of the task
    "classification": "Classification",
    "code": "Code",
    "tagging": "Tagging",
    "question-answering": "QuestionAnswering",
    "semantic-roles": "SemanticRoles",
    "summarization": "Summarization",
    "translation": "Translation",
    "writing": "Writing",
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
    "qa": "question-answering",
    "questions": "question-answering",
    "reading": "question-answering",
    "srl": "semantic-roles",
    "mt": "translation",
    "translate": "translation",
    "summary": "summarization",
    "summarisation": "summarization",
    "summarize": "summarization",
    "humaneval": "code",
    "mbpp": "code",
    "programming": "code",
    "poems": "writing",
    "poetry": "writing",
    "stories": "writing",
    "mail": "writing",
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


def find_task(name: str, **given: Any) -> Task[Any, Any]:
    """The task of that name, with settings that only it has.

    >>> find_task("spam").name
    'classification'

    Raises:
        UsageError: there is no such task, or it has no such setting.
    """
    name = task_name(name)
    module = importlib.import_module(f"hanmo.tasks.{name.replace('-', '_')}")
    task: Task[Any, Any] = getattr(module, MODULES[name])(**given)
    return task


def training_of(name: str) -> str:
    """The task of ``hanmo finetune`` that teaches a task; other names stay as they are.

    >>> training_of("qa"), training_of("summary"), training_of("preferences")
    ('question-answering', 'seq2seq', 'preferences')
    """
    return find_task(name).training if name in MODULES or name in ALIASES else name
