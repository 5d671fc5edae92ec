"""What a search over settings found, as ``search.json`` in the run's folder holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hanmo.errors import ModelError
from hanmo.folder import read_json, write_json
from hanmo.language import pick
from hanmo.progress import human_time
from hanmo.training.search_space import Dimension

FILE = "search.json"
NOISE, NOISE_NATS = 0.005, 0.01  # a smaller part of the loss, and fewer nats, are no difference: a seed changes more
COMPLETE, PRUNED, FAILED, UNFINISHED = "complete", "pruned", "failed", "unfinished"

Values = dict[str, Any]


@dataclass
class Trial:
    """What came of one combination of values.

    Args:
        state: "complete", "pruned" (given up at a rung), "failed" (no number, or out of memory), or "unfinished" (the
            time was over).
        loss: on the validation data where it ended; None where it was never measured.
        rungs: the loss after so many parts of the horizon, by their number.
    """

    number: int
    values: Values
    state: str = UNFINISHED
    loss: float | None = None
    rungs: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass
class SearchRecord:
    """All of a search, as ``search.json`` holds it.

    Args:
        minutes: that were given; ``seconds`` were used so far.
        finished: False where it was interrupted.
        share: of the run's horizon that a trial gets; ``steps`` of the default, as far as the measured pace tells.
        validation_tokens: scored at each rung; more at the end.
        parts: of a trial, in which its rungs are counted.
    """

    minutes: float
    share: float
    steps: int
    validation_tokens: int
    parts: int
    dimensions: list[Dimension]
    seconds: float = 0.0
    finished: bool = False
    trials: list[Trial] = field(default_factory=list)

    @property
    def defaults(self) -> Values:
        """What the run would have without a search."""
        return {dimension.name: dimension.default for dimension in self.dimensions}

    @property
    def winner(self) -> Trial | None:
        """The best of those that reached the end; the default where no other is clearly better."""
        whole = [(trial.loss, trial) for trial in self.trials if trial.state == COMPLETE and trial.loss is not None]
        if not whole:
            return None
        loss, best = min(whole, key=lambda pair: pair[0])
        first_loss, first = whole[0]
        return first if first.number == 0 and first_loss <= loss * (1 + NOISE) + NOISE_NATS else best

    @property
    def chosen(self) -> Values:
        """The values that the run gets."""
        return self.winner.values if self.winner else self.defaults

    def count(self, state: str) -> int:
        """How many trials ended so."""
        return sum(trial.state == state for trial in self.trials)

    def describe(self) -> str:
        """The outcome in one line, in the user's language."""
        trials, pruned, failed = len(self.trials), self.count(PRUNED), self.count(FAILED)
        percent = f"{100 * self.share:.3g} %"
        took = pick(
            f"search: {trials} trials over {percent} of the run each, {pruned} pruned"
            + (f", {failed} failed" if failed else "")
            + f", in {human_time(self.seconds)}: ",
            f"参数搜索：{trials} 次试验（每次为全程的 {percent}），其中 {pruned} 次提前终止"
            + (f"、{failed} 次失败" if failed else "")
            + f"，用时 {human_time(self.seconds)}：",
        )
        if self.winner is None:
            return took + pick("none came to its end, so the defaults are kept", "没有一次完成，保留默认值")
        loss = f"{self.winner.loss:.4f}"
        if self.winner.values == self.defaults:
            return took + pick(f"the defaults won with a loss of {loss}", f"默认值最好，损失 {loss}")
        shown = ", ".join(f"{name} = {value:g}" for name, value in self.winner.values.items())
        first = self.trials[0].loss
        before = pick("none (failed)", "无（失败）") if first is None else f"{first:.4f}"
        return took + pick(
            f"loss {loss} with {shown}; the defaults: {before}", f"{shown}，损失 {loss}；默认值 {before}"
        )

    def reason(self) -> str:
        """Why a setting has its value."""
        trials = len(self.trials)
        if self.winner is None or self.winner.values == self.defaults:
            return pick(f"search: the default won {trials} trials", f"参数搜索：{trials} 次试验中默认值最好")
        return pick(
            f"search: best of {trials} trials, loss {self.winner.loss:.4f}",
            f"参数搜索：{trials} 次试验中最好，损失 {self.winner.loss:.4f}",
        )

    @classmethod
    def read(cls, path: Path) -> SearchRecord | None:
        """The search of a run's folder; None where there was none.

        Raises:
            ModelError: the file is damaged.
        """
        if not path.is_file():
            return None
        try:
            raw = read_json(path)
            dimensions = [
                Dimension(**{**item, "values": tuple(item["values"])})  # JSON knows no tuples
                for item in raw.pop("dimensions")
            ]
            trials = [Trial(**item) for item in raw.pop("trials")]
            return cls(**raw, dimensions=dimensions, trials=trials)
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"the record of the search is damaged ({error})",
                where=str(path),
                fix="remove it, and the search begins anew",
                zh="参数搜索的记录已损坏；删除它即可重新搜索",
            ) from error

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, asdict(self))


def describe_trial(trial: Trial) -> str:
    """A trial in one line, in the user's language."""
    states = {
        COMPLETE: pick("complete", "完成"),
        PRUNED: pick("pruned", "提前终止"),
        FAILED: pick("failed", "失败"),
        UNFINISHED: pick("unfinished", "未完成"),
    }
    shown = "  ".join(f"{name} {value:g}" for name, value in trial.values.items())
    loss = "" if trial.loss is None else pick(f"loss {trial.loss:.4f}", f"损失 {trial.loss:.4f}") + "  "
    why = f" ({trial.reason})" if trial.reason else ""
    steps = pick(f"{trial.steps} steps", f"{trial.steps} 步")
    return f"  {trial.number:>3}  {shown}  {loss}{states[trial.state]}{why}  {steps}, {trial.seconds:.1f} s"
