"""How records are put to language models: as a conversation where a model has a template, else as a text to go on with.

One form for all tasks: an instruction, worked examples, the question; and what a model writes comes back as a text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hanmo.data.tasks.types import Record
from hanmo.errors import UsageError
from hanmo.text.language import identify


@dataclass(frozen=True)
class Prompt:
    """A question for a language model.

    Args:
        instruction: what to do, once for all records.
        question: the record.
        shots: questions and their right answers, shown before.
        lead: what stands before an answer where there is no conversation, such as "Label:".
    """

    instruction: str
    question: str
    shots: tuple[tuple[str, str], ...] = ()
    lead: str = ""

    def messages(self) -> list[dict[str, str]]:
        """As a conversation; the instruction stands in its first message, for not all models know a system's voice."""
        turns = [*self.shots, (self.question, "")]
        messages = []
        for number, (question, answer) in enumerate(turns):
            content = f"{self.instruction}\n\n{question}" if number == 0 and self.instruction else question
            messages.append({"role": "user", "content": content})
            if number + 1 < len(turns):
                messages.append({"role": "assistant", "content": answer})
        return messages

    def text(self) -> str:
        """As a text to go on with: the answer comes after a blank."""
        lead = self.lead or "→"
        parts = [self.instruction] if self.instruction else []
        parts += [f"{question}\n{lead} {answer}" for question, answer in self.shots]
        return "\n\n".join([*parts, f"{self.question}\n{lead}"])


class Speaker:
    """A language model that is asked, on this machine or elsewhere.

    Args:
        model: a :class:`~hanmo.inference.language_model.LanguageModel` or
            :class:`~hanmo.inference.remote.RemoteModel`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.remote = not hasattr(model, "network")
        self.kind = "remote" if self.remote else "encoder-decoder" if model.reads_source else "decoder"
        self.chats = model.is_chat if self.remote else bool(model.tokenizer.chat_template) and not model.reads_source

    def prompt(self, prompt: Prompt) -> Any:
        """What the model reads: ids of a conversation, or a text."""
        return self.model.chat_ids(prompt.messages()) if self.chats else prompt.text()

    def size(self, prompt: Prompt) -> int:
        """Tokens of a prompt; of a remote model, whose tokens are not known, about so many."""
        if self.remote:
            return sum(len(message["content"].encode()) // 3 + 8 for message in prompt.messages())
        given, model = self.prompt(prompt), self.model
        if isinstance(given, list):
            return len(given)
        return len(model.prompt_prefix) + len(model.tokenizer.encode(given)) + len(model.prompt_suffix)

    def write(self, prompts: Sequence[Prompt], *, max_new_tokens: int, **options: Any) -> list[str]:
        """The answers, written greedily unless the options say otherwise; a text goes on for one paragraph."""
        options = {"temperature": 0.0, "max_new_tokens": max_new_tokens, **options}
        if not self.chats:
            options["stop"] = [*options.get("stop", []), "\n\n"]
        if self.remote and self.chats:
            return [self.model.chat(prompt.messages(), **options)[0].text.strip() for prompt in prompts]
        written = self.model.generate([self.prompt(prompt) for prompt in prompts], **options)
        return [completion.text.strip() for completion in sorted(written, key=lambda item: item.index)]


def choose_shots(train: Sequence[Record], count: int, seed: int) -> list[Any]:
    """Worked examples, the same for the same seed; all where there are fewer.

    Raises:
        UsageError: examples are wanted, and there is nothing to take them from.
    """
    if count <= 0:
        return []
    if not train:
        raise UsageError(
            f"{count} worked examples are wanted, and there are no records to take them from",
            fix="give training data with --train, or --shots 0",
            zh=f"需要 {count} 个示例，但没有训练数据；请用 --train 给出，或用 --shots 0",
        )
    places = np.random.default_rng(seed).permutation(len(train))[:count]
    return [train[place] for place in places]


def mostly_chinese(texts: Sequence[str]) -> bool:
    """Whether the prompt should be Chinese: most of some of the texts are."""
    some = [text for text in texts[:200] if text.strip()]
    return sum(identify(text) in ("zh", "mixed") for text in some) * 2 > len(some)


def mark_of(prompt: Prompt, shots: int) -> Mapping[str, Any]:
    """What stands of a prompt in the signature of a score."""
    shape = repr((prompt.instruction, prompt.lead, prompt.shots))
    return {"prompt": hashlib.sha256(shape.encode("utf-8", "surrogatepass")).hexdigest()[:8], "shots": shots}
