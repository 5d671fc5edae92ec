"""What is measured of a reply: rules that a program can check, overlap with a reference, likelihood of the reference.

=============  =======================================================================================================
answered       it is not blank
ended          the model ended it, not the limit of its length
language       Chinese where Chinese is expected, English where English is: in the language of the reference, else of
               the question
no_loop        no stretch stands four times in a row, and less than half of its runs of four repeat earlier ones
no_echo        it does not repeat the whole question
instructions   each instruction that the record lists (:mod:`hanmo.tasks.instructions`), else each that the question
               states (:mod:`hanmo.tasks.stated`)
=============  =======================================================================================================

A blank reply obeys none of them. Which of them a record has follows from the record alone, so that all systems face the
same. Of two replies to one record the one that obeys more wins; where both obey equally many, the one with the higher
ROUGE-L does.

Letters in names: N records, K numbers of a record.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hanmo.data.tasks.splits import canonical
from hanmo.data.tasks.types import Check, Dialogue, Message
from hanmo.errors import DataError
from hanmo.tasks.diversity import number, repetition, units
from hanmo.tasks.instructions import check_instructions, obeyed, obeyed_loosely
from hanmo.tasks.metric import Floats, Metric, ratio
from hanmo.tasks.rouge import Rouge
from hanmo.tasks.stated import stated_instructions
from hanmo.text.language import identify
from hanmo.text.which_language import is_language, language_of

RULES = ("answered", "ended", "language", "no_loop", "no_echo")
VERSION = 1  # of these rules: two numbers of different versions cannot be compared
SHORTEST_ECHO = 4  # units of a question: a greeting may be returned
LONGEST_PERIOD, TIMES, SHORTEST_LOOP = 40, 4, 8  # units of a stretch, how often in a row, units of all of it
MOST_REPEATED, LEAST_UNITS = 0.5, 40  # share of repeated runs of four, in a text of so many units
RULES_OF_LINES = re.compile(r"[-=_*.|#~+·—…]")  # signs that tables and rules are drawn with
OTHER_LANGUAGE = re.compile(
    r"translat|\bin (?:english|chinese|french|german|spanish)|[译翻]|[英中法德日俄韩]文|[英汉法德日俄韩]语",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reply:
    """What a system answered.

    Args:
        text: the reply.
        ended: whether it ended by itself.
        nats: the negative log-likelihood of the reference, with the token that ends it; None where there is none.
        tokens: of the reference, that one included.
    """

    text: str
    ended: bool = True
    nats: float | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Exchange:
    """A record as it is measured: everything before the last turn of the assistant, and that turn.

    Args:
        prompt: ends with what is to be answered.
        reference: empty where there is none.
        given: instructions about the form of the reply that the record lists.
    """

    prompt: tuple[Message, ...]
    reference: str
    given: tuple[Check, ...]

    @property
    def listed(self) -> bool:
        """Whether the record lists instructions itself."""
        return bool(self.given)

    @functools.cached_property
    def checks(self) -> tuple[Check, ...]:
        """Instructions about the form of the reply: those listed, else those that the question states."""
        return self.given or stated_instructions(self.question)

    @property
    def question(self) -> str:
        """The last words of the user."""
        return next(item["content"] for item in reversed(self.prompt) if item["role"] == "user")


def exchange_of(record: Dialogue) -> Exchange:
    """The prompt and the reference of a conversation; what follows its last answer is left out.

    Raises:
        DataError: nothing of the user stands before the last answer, or an instruction cannot be verified.
    """
    messages = record.messages
    last = max((place for place, item in enumerate(messages) if item["role"] == "assistant"), default=len(messages))
    if record.checks and messages[-1]["role"] == "user":
        last = len(messages)  # the question is still open
    prompt, reference = messages[:last], messages[last]["content"] if last < len(messages) else ""
    if not any(item["role"] == "user" for item in prompt):
        raise DataError(
            "the user says nothing before the last answer of the assistant",
            where=record.where,
            fix="leave the record out, or add the question that is answered",
            zh="助手的最后一个回答之前没有用户的消息；请删去该记录，或补上问题",
        )
    check_instructions(record.checks, record.where)
    return Exchange(prompt, reference, record.checks)


def expected_language(exchange: Exchange) -> str:
    """zh or en; empty where neither can be expected."""
    if any(check["id"].startswith(("language:", "change_case:english")) for check in exchange.checks):
        return ""
    told = OTHER_LANGUAGE.search(exchange.question)
    own = identify(exchange.reference)
    if own == "zh" or (own == "en" and (not told or language_of(exchange.reference) == "en")):
        return own
    asked = identify(exchange.question)
    return asked if asked in ("zh", "en") and not told else ""


def in_language(reply: str, wanted: str) -> bool:
    """Is a reply in Chinese, or in English? Numbers, single foreign names and programs are in both."""
    found = identify(reply)
    if found == "code":
        return True
    if wanted == "en":
        return found not in ("zh", "mixed") and is_language(reply, "en")
    return found in ("zh", "mixed") or is_language(reply, "zh") or len(re.findall("[A-Za-z]+", reply)) == 1


def loops(reply: str) -> bool:
    """Does a text repeat itself as models do that cannot get away from a phrase?

    >>> loops("I do not know. " * 5), loops("好的，好的，我明白了。")
    (True, False)
    """
    found = [unit for unit in units(reply) if not RULES_OF_LINES.fullmatch(unit)]
    codes = number([found])[0]
    for period in range(1, min(LONGEST_PERIOD, len(codes) // TIMES) + 1):
        same = np.concatenate([[0], (codes[period:] == codes[:-period]).astype(np.int64), [0]])
        edges = np.flatnonzero(np.diff(same))
        longest = int((edges[1::2] - edges[::2]).max(initial=0)) + period
        if longest >= max(TIMES * period, SHORTEST_LOOP):
            return True
    return len(found) >= LEAST_UNITS and float(repetition([found])[0]) > MOST_REPEATED


def echoes(reply: str, exchange: Exchange) -> bool:
    """Does a reply repeat the whole question, although the reference does not?"""
    asked = canonical(exchange.question)
    if len(units(asked)) < SHORTEST_ECHO or asked in canonical(exchange.reference):
        return False
    return asked in canonical(reply) and not any(
        check["id"] == "combination:repeat_prompt" for check in exchange.checks
    )


def verdicts(exchange: Exchange, reply: Reply) -> dict[str, bool | None]:
    """Which of the rules a reply obeys, a blank one none; None where a rule does not apply to the record."""
    wanted, said = expected_language(exchange), bool(reply.text.strip())
    return {
        "answered": said,
        "ended": said and reply.ended,
        "language": said and in_language(reply.text, wanted) if wanted else None,
        "no_loop": said and not loops(reply.text),
        "no_echo": said and not echoes(reply.text, exchange),
    }


class ReplyMetric(Metric[Dialogue, Reply]):
    """Overlap with the reference, its likelihood, and the share of the rules that replies obey.

    ``rougeL`` is the mean F of ROUGE-L over Chinese characters and words; in ``sound_rougeL`` a reply that breaks a
    rule counts 0, so that neither an echo nor a text without end is worth anything. ``loss`` is in nats per token, and
    ``bits_per_byte`` can be compared between tokenizers. Where records list instructions, as those of IFEval do:
    ``prompt_strict`` is the share of records of which all are obeyed, ``instruction_strict`` the share of instructions,
    and the loose ones forgive a first or a last line and Markdown. Blank replies obey nothing.

    The first of these that the records allow is the primary measure: sound_rougeL, prompt_strict, checks.
    """

    lower = frozenset({"loss", "bits_per_byte"})

    def __init__(self, records: Sequence[Dialogue]) -> None:
        found = [exchange_of(record) for record in records]
        self.references = any(exchange.reference for exchange in found)
        self.listed = any(exchange.listed for exchange in found)
        self.rouge = Rouge(chinese=True) if self.references else None
        self.primary = "sound_rougeL" if self.references else "prompt_strict" if self.listed else "checks"
        self.compared = ("loss",) if self.references else ()
        shown = [f"{kind}:{name}" for name in (*RULES, "instructions") for kind in ("has", "obeys")]
        self.columns = [
            "one",
            "has_reference",
            "rougeL",
            "sound_rougeL",
            "nats",
            "tokens",
            "bytes",
            "scored",
            "obeyed",
            *shown,
        ]
        self.columns += ["listed", "strict", "loose", "instructions", "obeyed_strict", "obeyed_loose"]
        self.place = {name: column for column, name in enumerate(self.columns)}
        if self.primary == "prompt_strict":  # right or wrong as a whole: McNemar's test
            self.right = lambda sums_NK: sums_NK[:, self.place["strict"]] > 0

    def statistics(self, records: Sequence[Dialogue], answers: Sequence[Reply]) -> Floats:
        """The numbers of :attr:`columns`."""
        rows = [self.row(exchange_of(record), reply) for record, reply in zip(records, answers, strict=True)]
        return np.array([[row.get(name, 0.0) for name in self.columns] for row in rows], dtype=np.float64).reshape(
            len(rows), len(self.columns)
        )

    def row(self, exchange: Exchange, reply: Reply) -> dict[str, float]:
        """The numbers of one reply, by column; 0 where none is named."""
        row = {"one": 1.0}
        if exchange.reference and self.rouge is not None:
            row |= {
                "has_reference": 1.0,
                "rougeL": self.rouge.scores([exchange.reference], reply.text)["rougeL"].fmeasure,
            }
            if reply.nats is not None:
                size = len(exchange.reference.encode("utf-8", "replace"))
                row |= {"nats": reply.nats, "tokens": reply.tokens, "bytes": size, "scored": 1.0}
        for name, holds in verdicts(exchange, reply).items():
            if holds is not None:
                row |= {f"has:{name}": 1.0, f"obeys:{name}": float(holds)}
        strict = [obeyed(check, reply.text) for check in exchange.checks]
        row |= {"has:instructions": float(len(strict)), "obeys:instructions": float(sum(strict))}
        if exchange.listed:
            loose = [obeyed_loosely(check, reply.text) for check in exchange.checks]
            row |= {"listed": 1.0, "strict": float(all(strict)), "loose": float(all(loose))}
            row |= {"instructions": len(strict), "obeyed_strict": sum(strict), "obeyed_loose": sum(loose)}
        faced = sum(value for name, value in row.items() if name.startswith("has:"))
        row["obeyed"] = sum(value for name, value in row.items() if name.startswith("obeys:"))
        row["sound_rougeL"] = row.get("rougeL", 0.0) * (row["obeyed"] == faced)
        return row

    def measures(self, sums: Floats) -> dict[str, Floats]:
        """Means and shares; NaN where there is nothing to measure."""

        def share(above: str, *below: str) -> Floats:
            divisor = sum(np.asarray(sums[..., self.place[name]]) for name in below)
            return np.where(np.asarray(divisor) > 0, ratio(sums[..., self.place[above]], divisor), np.nan)

        rules = (*RULES, "instructions")
        found: dict[str, Floats] = {}
        if self.references:
            found = {name: share(name, "has_reference") for name in ("sound_rougeL", "rougeL")}
            found["loss"] = share("nats", "tokens")
            found["bits_per_byte"] = share("nats", "bytes") / np.log(2)
        if self.listed:
            found |= {"prompt_strict": share("strict", "listed"), "prompt_loose": share("loose", "listed")}
            found["instruction_strict"] = share("obeyed_strict", "instructions")
            found["instruction_loose"] = share("obeyed_loose", "instructions")
        found["checks"] = share("obeyed", *(f"has:{name}" for name in rules))
        return {**found, **{name: share(f"obeys:{name}", f"has:{name}") for name in rules}}

    def wins(self, first_NK: Floats, second_NK: Floats) -> Floats:
        """Of each record 1 where the first reply wins, 0 where the second does, 0.5 where neither, ``[N]``."""
        points = np.full(len(first_NK), 0.5)
        for name in ("rougeL", "obeyed"):  # what is decided later decides
            difference = first_NK[:, self.place[name]] - second_NK[:, self.place[name]]
            points = np.where(difference == 0, points, (difference > 0).astype(np.float64))
        return points

    def signature(self) -> Mapping[str, Any]:
        """Tokens of ROUGE, version of the rules, which turn is answered."""
        return {"turn": "last", "rules": VERSION, **({"tok": "characters"} if self.references else {})}

    def details(self, records: Sequence[Dialogue], answers: Sequence[Reply]) -> dict[str, Any]:
        """Of how many references the likelihood is known; how many replies break each listed instruction."""
        broken: dict[str, dict[str, int]] = {}
        for record, reply in zip(records, answers, strict=True):
            exchange = exchange_of(record)
            for check in exchange.checks:
                counts = broken.setdefault(check["id"], {"n": 0, "obeyed": 0})
                counts["n"] += 1
                counts["obeyed"] += obeyed(check, reply.text)
        scored = sum(reply.nats is not None for reply in answers)
        return {"scored": scored, "labels": dict(sorted(broken.items()))}
