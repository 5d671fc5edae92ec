"""Tasks over HTTP: which of them the served model can do, and the work of one request.

A request is answered in blocks of texts, so that between two blocks, and for language models at every token, the work
ends when its client has left.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from hanmo.errors import DataError, ModelError, UsageError
from hanmo.inference.language_model import Completion
from hanmo.progress import no_progress
from hanmo.serving.problems import ApiError
from hanmo.tasks.base import Form
from hanmo.tasks.predictor import Predictor, read_examples
from hanmo.tasks.registry import ALIASES, MODULES, find_task

if TYPE_CHECKING:
    from torch import Tensor

    from hanmo.serving.schema import TaskRequest
    from hanmo.tasks.base import Task

BLOCK = 32  # texts that are answered together
ASKED_BLOCK = 8  # the same for language models, which take longer
PREDICTORS = 16  # prompts that are kept: their prior probabilities have been measured
TOLD = ("labels", "examples", "shots", "instruction", "seed", "settings")  # fields of a request that make a prompt
ROLE = re.compile(r"[BIES]-(?:[CR]-)?A(?:RG)?[0-5]")  # the tags of semantic roles as PropBank and CPB name them
LABELS = ("labelled", "tagged", "roles")  # kinds of records whose answers are labels


class GoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Watch:
    """What the worker and the event loop tell each other about one request."""

    gone: threading.Event = field(default_factory=threading.Event)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def check(self) -> None:
        """Stop here where nobody waits.

        Raises:
            GoneError: nobody does.
        """
        if self.gone.is_set():
            raise GoneError


class Watched:
    """A language model that counts its tokens for the request of its thread, and stops where nobody waits for it.

    Args:
        model: a :class:`~hanmo.inference.language_model.LanguageModel`, whose methods and attributes this has, too.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.current = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @property
    def watch(self) -> Watch:
        """Of the request that this thread works for."""
        found: Watch | None = getattr(self.current, "watch", None)
        return found or Watch()

    def generate(self, prompts: Any, **options: Any) -> list[Completion]:
        """As that of the model."""
        watch, done = self.watch, {}
        watch.check()
        with contextlib.closing(self.model.stream(prompts, **options)) as chunks:
            for chunk in chunks:
                key = (chunk.index, chunk.choice)
                if key not in done:
                    done[key] = Completion("", [], "length", chunk.prompt_tokens, *key)
                    watch.prompt_tokens += chunk.prompt_tokens
                done[key].text += chunk.text
                done[key].ids += chunk.ids
                done[key].finish_reason = chunk.finish_reason or "length"
                done[key].stop_string = chunk.stop_string
                watch.completion_tokens += len(chunk.ids)
                watch.check()
        return [done[key] for key in sorted(done)]

    def choice_logprobs(self, prompt: Any, choices: Sequence[Sequence[int]]) -> list[Tensor]:
        """As that of the model."""
        watch = self.watch
        watch.check()
        ids = self.model.encode_prompt(prompt)
        watch.prompt_tokens += len(ids) + sum(map(len, choices))
        scores: list[Tensor] = self.model.choice_logprobs(prompt, choices)
        return scores


@dataclass(frozen=True)
class Ability:
    """A task that the served model can do.

    Args:
        task: what is done.
        asked: it is done by a prompt, which a request may change.
        needs_labels: it cannot be done before a request tells the labels.
    """

    task: Task[Any, Any]
    asked: bool
    needs_labels: bool = False


class TaskTable:
    """The tasks of the served model, and the work of requests for them.

    Args:
        model: what ``hanmo.load`` returned.
        name: of the model, for messages.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.name = name
        self.asked = hasattr(model, "generate")
        self.model = Watched(model) if self.asked else model
        self.labels = list(getattr(model, "labels", None) or ())
        # Requests to a language model share its steps; other models answer one request after the other.
        self.alone: Any = contextlib.nullcontext() if self.asked else threading.Lock()
        self.predictors: OrderedDict[str, Predictor] = OrderedDict()
        self.changing = threading.Lock()
        found = {name: self.ability(find_task(name)) for name in MODULES}
        self.abilities = {name: ability for name, ability in found.items() if ability is not None}

    def ability(self, task: Task[Any, Any]) -> Ability | None:
        """Whether the model can do a task: its network must be of the kind, and have learned it where it has a head."""
        kind = getattr(self.model, "task", None)  # of a network that reads
        if task.kind in ("tagged", "roles") and (kind == "token-classification" or hasattr(self.model, "template")):
            marked = getattr(self.model, "template", None) == "roles" or any(map(ROLE.match, self.labels))
            if marked != (task.kind == "roles"):
                return None
        if task.kind == "pair" and kind is not None and kind.endswith(("-classification", "-extraction")):
            return None
        try:
            task.system(self.model, (), Form())
        except ModelError:
            return None
        except UsageError:  # a prompt that lacks something
            try:
                task.system(self.model, (), Form(labels=("A", "B")))
            except (ModelError, UsageError):
                return None
            return Ability(task, self.asked, needs_labels=True)
        return Ability(task, self.asked)

    def cards(self) -> list[dict[str, Any]]:
        """The tasks as ``GET /v1/tasks`` lists them."""
        return [self.card(ability) for ability in self.abilities.values()]

    def card(self, ability: Ability) -> dict[str, Any]:
        """A task: what it reads, what it may be told, and the labels it answers with, where those are known."""
        task = ability.task
        return {
            "id": task.name,
            "object": "task",
            "model": self.name,
            "aliases": list(task.aliases),
            "description": task.help,
            "description_zh": task.help_zh,
            "input": list(task.inputs),
            "asked": ability.asked,
            "needs_labels": ability.needs_labels,
            "settings": list(task.settings),
            "labels": self.labels if task.kind in LABELS and self.labels else None,
        }

    def find(self, name: str) -> Ability:
        """The task of that name, or of that alias.

        Raises:
            ApiError: there is none, or the model cannot do it.
        """
        known = (*MODULES, *ALIASES)
        if name not in known:
            close = get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(MODULES)
            raise ApiError(f"there is no task '{name[:80]}'; {hint}", status=404, param="task", code="task_not_found")
        name = ALIASES.get(name, name)
        if name not in self.abilities:
            raise ApiError(
                f"the model '{self.name}' cannot do {name}; it can do: {', '.join(self.abilities) or 'no task'}",
                param="task",
                code="task_not_supported",
            )
        return self.abilities[name]

    def plan(self, name: str, request: TaskRequest) -> TaskPlan:
        """Check a request against the task; reads its examples, so call it off the event loop.

        Raises:
            ApiError: no such task, a field that this model does not use, or a text that the task cannot use.
        """
        ability = self.find(name)
        predictor = self.predictor(ability, request)
        records = []
        for number, data in enumerate(request.input):
            place = f"input[{number}]"
            unknown = [key for key in data if key not in ability.task.inputs]
            if unknown:
                raise ApiError(
                    f"unknown field '{place}.{unknown[0]}'; known: {', '.join(ability.task.inputs)}",
                    param=f"{place}.{unknown[0]}",
                    code="unknown_parameter",
                )
            try:
                records.append(predictor.task.record_from(data))
            except UsageError as error:
                message = " ".join(part for part in (f"{place}: {error.what}", error.fix) if part)
                raise ApiError(message, param=place, code="invalid_value") from None
        return TaskPlan(self, ability, predictor, records)

    def predictor(self, ability: Ability, request: TaskRequest) -> Predictor:
        """What answers a request; that of the same prompt as before, where it is still known."""
        told = request.model_dump(include=set(TOLD), exclude_none=True)
        told = {key: value for key, value in told.items() if value not in ([], {}) and key in request.model_fields_set}
        if told and not ability.asked:
            param = next(iter(told))
            raise ApiError(
                f"'{param}' is for language models that are asked; '{self.name}' has learned what to answer",
                param=param,
                code="unsupported_parameter",
            )
        if ability.needs_labels and not (request.labels or request.examples):
            raise ApiError(
                f"a language model has to be told what it may answer: 'labels': [...], or 'examples' with labels, "
                f"records as in a jsonl file for {ability.task.name}",
                param="labels",
                code="missing_required_parameter",
            )
        if request.shots and not request.examples:
            raise ApiError("'shots' needs 'examples' to take them from", param="shots")
        key = ability.task.name + json.dumps(told, sort_keys=True)
        with self.changing:
            if key in self.predictors:
                self.predictors.move_to_end(key)
                return self.predictors[key]
        predictor = self.new_predictor(ability.task, request)
        with self.changing:
            self.predictors[key] = predictor
            while len(self.predictors) > PREDICTORS:
                self.predictors.popitem(last=False)
        return predictor

    def new_predictor(self, task: Task[Any, Any], request: TaskRequest) -> Predictor:
        """What answers a request.

        Raises:
            ApiError: the examples are no records of the task, or the labels are too few or too many.
        """
        try:
            train = read_examples(task.kind, request.examples)
        except DataError as error:
            place = error.where.rpartition("/")[2]
            message = "; ".join(part for part in (f"{place}: {error.what}", error.why) if part)
            raise ApiError(message, param="examples", code="invalid_value") from None
        shots = len(train) if request.shots is None else request.shots
        form = Form(shots, request.seed, request.instruction, tuple(request.labels))
        try:
            task = find_task(task.name, **request.settings) if request.settings else task
            return Predictor(task, task.system(self.model, train, form))
        except (UsageError, TypeError, ValueError) as error:
            param = "settings" if request.settings else "labels"
            what = error.what if isinstance(error, UsageError) else f"a setting cannot be used: {error}"
            raise ApiError(what, param=param, code="invalid_value") from None


@dataclass
class TaskPlan:
    """What the model has to do for one request.

    Attributes:
        watch: tells the worker that nobody waits any more, and the event loop how many tokens were read and written.
    """

    table: TaskTable
    ability: Ability
    predictor: Predictor
    records: list[Any]
    watch: Watch = field(default_factory=Watch)

    def run(self) -> Iterator[list[dict[str, Any]]]:
        """The answers, block by block; called in a worker thread."""
        size = ASKED_BLOCK if self.table.asked else BLOCK
        for begin in range(0, len(self.records), size):
            with self.table.alone:
                if self.watch.gone.is_set():
                    return
                with no_progress():
                    rows = self.answers(self.records[begin : begin + size])
            yield rows

    def answers(self, records: list[Any]) -> list[dict[str, Any]]:
        """The answers to a block; none where nobody waits."""
        if not self.table.asked:
            return self.predictor.rows(records)
        self.table.model.current.watch = self.watch
        try:
            return self.predictor.rows(records)
        except GoneError:
            return []
        finally:
            self.table.model.current.watch = None

    def whole(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer as it is sent."""
        usage = {"texts": len(self.records)}
        if self.table.asked:
            read, written = self.watch.prompt_tokens, self.watch.completion_tokens
            usage |= {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return {
            "object": "list",
            "task": self.ability.task.name,
            "model": self.table.name,
            "data": [{"index": number, **row} for number, row in enumerate(rows)],
            "usage": usage,
        }
