"""The records of supervised tasks: what one example is, and the file and line it is from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, str]  # {"role": "system" | "user" | "assistant" | "tool", "content": text}
Check = dict[str, Any]  # {"id": "length_constraints:number_words", "relation": "at least", "num_words": 50}
Answer = tuple[str, int]  # text, and the character of the context where it begins


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every record has: the file, and the line it begins on (from 1; in parquet: the row)."""

    file: str = ""
    line: int = 0

    @property
    def where(self) -> str:
        """The place for messages, ``file:line``."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Text(Record):
    """A text without anything to predict but itself."""

    text: str


@dataclass(frozen=True)
class Labelled(Record):
    """A text, or two, with one label or several; no label at all is right only where there may be several.

    >>> Labelled("Win a prize!", ("spam",), file="sms.tsv", line=3).where
    'sms.tsv:3'
    """

    text: str
    labels: tuple[str, ...]
    pair: str | None = None


@dataclass(frozen=True)
class Tagged(Record):
    """Tokens with a tag each. Tags of spans are IOB2, whatever the file had.

    Attributes:
        spaces: whether white space follows each token, where the file tells.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...]
    spaces: tuple[bool, ...] | None = None

    @property
    def text(self) -> str:
        """The sentence; where blanks are not known, one stands between two tokens without Chinese characters."""
        spaces = self.spaces
        if spaces is None:
            latin = [token[-1:] < "\u2e80" for token in self.tokens]
            spaces = tuple(here and after for here, after in zip(latin, [*latin, False][1:], strict=True))
        return "".join(token + " " * space for token, space in zip(self.tokens, spaces, strict=True)).rstrip(" ")


@dataclass(frozen=True)
class Proposition(Record):
    """A predicate of a sentence and who does what to whom: its arguments, none of which overlap (PropBank).

    Attributes:
        predicate: the place of its token, from 0.
        arguments: first token, end (exclusive) and role of each, in the order of the sentence.
        sense: of the predicate, such as ``sell.01``, or its lemma; where the file tells.
    """

    tokens: tuple[str, ...]
    predicate: int
    arguments: tuple[tuple[int, int, str], ...] = ()
    sense: str = ""


@dataclass(frozen=True)
class Pair(Record):
    """A text and what it is to become: its translation, its summary.

    Attributes:
        references: further targets that are as good, for measuring.
    """

    source: str
    target: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dialogue(Record):
    """A conversation with at least one message of the assistant, or with something that can be checked of an answer.

    Attributes:
        checks: what an answer to it has to obey: the name of an instruction as ``id``, and its arguments.
    """

    messages: tuple[Message, ...]
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Preference(Record):
    """A conversation that ends with the user, an answer that is preferred, and one that is not."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class QuestionAnswer(Record):
    """A question about a text; each answer stands in it where it says. No answers: the text does not tell."""

    id: str
    context: str
    question: str
    answers: tuple[Answer, ...]
    title: str = ""


@dataclass(frozen=True)
class Similar(Record):
    """Texts that belong together, perhaps one that does not, perhaps how similar the first two are."""

    anchor: str
    positive: str
    negative: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Problem(Record):
    """A task for a program, and the tests that it has to pass.

    Attributes:
        name: the id of the problem.
        prompt: what a model continues (HumanEval) or is asked (MBPP).
        tests: program text that runs after the candidate and raises an error where that is wrong.
        reference: a right answer; empty where the file has none.
        entry_point: the function that the tests call; empty where the file does not name it (MBPP).
        asserts: the assertions that are shown to the model (MBPP); empty for HumanEval.
    """

    name: str
    prompt: str
    tests: str
    reference: str = ""
    entry_point: str = ""
    asserts: tuple[str, ...] = ()

    @property
    def continues(self) -> bool:
        """Whether the answer continues the prompt (HumanEval) or stands by itself (MBPP)."""
        return bool(self.entry_point)


@dataclass(frozen=True)
class Prompted(Record):
    """Something to write about: a title, an occasion, the beginning of a story.

    Attributes:
        form: of the text, such as 五言绝句 or letter; empty where any will do.
        reference: what a person wrote to it; empty where nobody did.
    """

    prompt: str
    form: str = ""
    reference: str = ""
