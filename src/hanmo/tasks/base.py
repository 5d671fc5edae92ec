"""What a task is, and what answers its records.

A task names the kind of its records, its metric, the baselines that are shown beside every score, and how a model of
any kind is put to it. It never reads a file and never loads a model: it is given records and models.

A *system* answers records: a constant, a rule, a classical model, a network with a head, a language model with a
prompt. Those that learn do so from records that they are given. Everything that measures and compares (``evaluation``)
knows systems only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from hanmo.data.tasks.types import Record
from hanmo.errors import ModelError, UsageError, nearest
from hanmo.language import pick
from hanmo.settings import flag
from hanmo.tasks.metric import Metric

if TYPE_CHECKING:
    from hanmo.data.readers import Document

R = TypeVar("R", bound=Record)
A = TypeVar("A")

KINDS = ("baseline", "classical", "recurrent", "encoder", "encoder-decoder", "decoder", "remote")


class System(ABC, Generic[R, A]):
    """Something that answers the records of a task.

    Attributes:
        name: for people, in their language.
        kind: one of :data:`KINDS`.
        learns: whether :meth:`fit` has to be called before :meth:`answer`.
        key: the name under which ``hanmo finetune --base`` teaches and keeps it; empty where nothing is kept.
    """

    name: str
    kind: str = "baseline"
    learns: bool = False
    key: str = ""

    def fit(self, train: Sequence[R], validation: Sequence[R] = ()) -> None:
        """Learn from records; again from the beginning, if it is called again."""

    @abstractmethod
    def answer(self, records: Sequence[R]) -> list[A]:
        """One answer for each record, in their order. What the records say is right is not looked at."""

    def weigh(self, records: Sequence[R], answers: Sequence[A]) -> list[A]:
        """The answers with what more a metric wants to know, such as how likely the system finds the right ones.

        It is asked for once the answers are there, and its time is not counted as theirs.
        """
        del records
        return list(answers)

    def save(self, folder: Path) -> Path | None:
        """Write it to a new folder that ``hanmo.load`` reads, and return that; None where there is nothing to write."""
        del folder
        return None

    def signature(self) -> Mapping[str, Any]:
        """What its answers depend on besides the model: prompt, shots, settings."""
        return {}


@dataclass(frozen=True)
class Form:
    """How records are shown to a prompted model: the hash of the prompt stands in the signature of a score.

    Args:
        shots: worked examples before the question.
        seed: which examples.
        instruction: instead of the task's own words.
        labels: labels, or types of spans, that may be answered besides those of the records.
    """

    shots: int = 0
    seed: int = 0
    instruction: str | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ground:
    """What questions are about, for tasks that answer from texts.

    Args:
        context: one text for all of them.
        documents: in which passages are searched.
        records: whose texts are searched.
        encoder: its vectors help the search; a :class:`~hanmo.inference.encoder.TextEncoder`.
        top: how many passages are read.
        threshold: by how much the score of an answer must be above that of none.
    """

    context: str | None = None
    documents: Sequence[Document] | None = None
    records: Sequence[Any] = ()
    encoder: Any = None
    top: int = 5
    threshold: float = 0.0


class Task(ABC, Generic[R, A]):
    """One task.

    Attributes:
        name: as in ``--task``.
        aliases: other names of the same task.
        kind: of its records, for :func:`hanmo.data.tasks.read_records`.
        training: the task of ``hanmo finetune`` that teaches it to a network.
        inputs: the names of the texts that make a record, for :meth:`record_from`; ``text`` is always one of them.
        settings: names of what can be set of this task alone, such as ``samples``.
        whole: whether a plain file, or standard input, is one text rather than a text a line.
        shows_untuned: whether the model that a tuned one was made from is measured beside it.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str]
    training: ClassVar[str]
    help: ClassVar[str]
    help_zh: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ("text",)
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **given: Any) -> None:
        """Settings that this task knows beside the usual ones; those left out have its own values.

        Raises:
            UsageError: one that the task does not have.
        """
        for name in given:
            if name not in self.settings:
                known = ", ".join(map(flag, self.settings)) or pick("none", "无")
                raise UsageError(
                    f"the task {self.name} has no setting {flag(name)}",
                    fix=f"leave it out; settings of this task alone: {known}",
                    zh=f"任务 {self.name} 没有设置 {flag(name)}，请去掉；该任务专有的设置：{known}",
                )
        self.given = given

    shows_untuned: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    @abstractmethod
    def metric(self, records: Sequence[R]) -> Metric[R, A]:
        """What is measured of answers to these records (their language may decide, or their labels)."""

    @abstractmethod
    def baselines(self, records: Sequence[R]) -> list[System[R, A]]:
        """What is shown beside every score, the simplest first; ``records`` as for :meth:`metric`."""

    @abstractmethod
    def system(self, model: Any, train: Sequence[R] = (), form: Form | None = None) -> System[R, A]:
        """A loaded model as a system.

        Args:
            model: what ``hanmo.load`` returned.
            train: records whose labels and examples a prompt may show.

        Raises:
            ModelError: a model of this kind cannot do this task.
        """

    @abstractmethod
    def record(self, text: str) -> R:
        """The record of a text that a person typed; nothing is known of its answer.

        Raises:
            UsageError: it lacks something, such as the question of question answering.
        """

    def record_from(self, data: Mapping[str, str]) -> R:
        """The record of texts with the names of :attr:`inputs`, as programs give them; nothing is known of its answer.

        Raises:
            UsageError: one that is needed is missing.
        """
        return self.record(data["text"])

    @abstractmethod
    def as_data(self, answer: A) -> dict[str, Any]:
        """An answer as plain data, for JSON."""

    def row(self, record: R, answer: A) -> dict[str, Any]:
        """The same with the tokens to which it refers, where the record has tokens."""
        tokens = getattr(record, "tokens", None)
        return {**({} if tokens is None else {"tokens": list(tokens)}), **self.as_data(answer)}

    @abstractmethod
    def describe(self, record: R, answer: A) -> str:
        """An answer for people: one line, or a few."""

    def yardsticks(self, records: Sequence[R]) -> list[System[R, A]]:
        """What ``hanmo evaluate`` shows for orientation though nobody could use it, such as the answers of people."""
        del records
        return []

    def candidates(self, records: Sequence[R]) -> list[System[R, A]]:
        """What ``hanmo compare`` trains besides the baselines: classical models and small networks, cheapest first."""
        del records
        return []

    def learner(self, key: str, records: Sequence[R]) -> System[R, A]:
        """The system that is taught under this name.

        Raises:
            UsageError: there is none.
        """
        found = {system.key: system for system in (*self.baselines(records), *self.candidates(records)) if system.key}
        if key not in found:
            hint = nearest(key, tuple(found))
            raise UsageError(
                f"{self.name} has no '{key}' that learns from records alone",
                fix=hint,
                zh=f"{self.name} 没有可直接从记录训练的 '{key}'。{hint}",
            )
        return found[key]

    def chance(self, records: Sequence[R]) -> dict[str, float]:
        """What blind guessing reaches, by measure, where that can be said."""
        del records
        return {}

    def ground(self, ground: Ground) -> None:
        """What questions are about, before anything else is asked of the task.

        Raises:
            UsageError: the task answers from nothing but its records.
        """
        del ground
        raise UsageError(
            f"{self.name} is about its texts alone",
            fix="leave out --context, --documents, --open-book and the like; they are for question-answering",
            zh=f"{self.name} 不需要另给文本：--context、--documents、--open-book 等只用于问答",
        )

    def cannot(self, model: Any, fix: str = "", zh: str = "") -> ModelError:
        """The error for a model that cannot do this task."""
        return ModelError(
            f"'{getattr(model, 'name', type(model).__name__)}' ({type(model).__name__}) cannot do {self.name}",
            fix=fix or f"take another kind of model, or teach it: hanmo finetune --task {self.name}",
            zh=zh or f"该模型（{type(model).__name__}）不能用于 {self.name}；请换用其他模型，或先微调",
        )
