"""Texts that a language model is free to write: several for each prompt, drawn or the likeliest, held to a form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hanmo.errors import UsageError
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.settings import notice
from hanmo.tasks.prompts import Prompt, Speaker

BATCH = 32  # texts that are written together
MOST_CHOICES = 16  # of one prompt that an engine writes in one request
SEEDS = 1000  # from one prompt to the next: none of their texts is drawn with the same numbers
GAP = "\n…\n"  # in the place of what was cut out of a prompt


class Drafter:
    """A language model that writes.

    Args:
        model: local or remote.
        most: tokens of a text at most.
        stops: texts at which a continuation ends, where there is no conversation.
    """

    def __init__(self, model: Any, *, most: int, stops: Sequence[str] = ()) -> None:
        self.model, self.speaker = model, Speaker(model)
        self.kind, self.chats, self.remote = self.speaker.kind, self.speaker.chats, self.speaker.remote
        self.most, self.stops = most, list(stops)
        limit = model.context_length
        self.reserved = most if limit is None else max(1, min(most, int(limit) * 2 // 3))  # of a small context

    def size(self, prompt: Prompt | str) -> int:
        """Tokens of a prompt; of a remote model about so many."""
        if isinstance(prompt, Prompt):
            return self.speaker.size(prompt)
        if self.remote:
            return len(prompt.encode("utf-8", "replace")) // 3
        return len(self.model.prompt_prefix) + len(self.model.tokenizer.encode(prompt)) + len(self.model.prompt_suffix)

    def fits(self, prompt: Prompt | str) -> bool:
        """Is there room for the prompt and its text?"""
        limit = self.model.context_length
        return limit is None or self.size(prompt) + self.reserved <= int(limit)

    def fitted(self, text: str, prompt: Any) -> Any:
        """The prompt of a text; of one that is too long, the middle is left out, and that is told.

        Args:
            prompt: makes a prompt of a text.

        Raises:
            UsageError: there is no room for even a few characters.
        """
        if self.fits(prompt(text)):
            return prompt(text)
        low, high = 0, len(text)  # characters that are kept: low fit, high do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(prompt(shortened(text, middle))) else (low, middle)
        if low < min(16, len(text)):
            raise UsageError(
                "the prompt leaves no room for a text",
                where=self.model.name,
                fix="fewer worked examples (--shots), or a model with a longer context",
                zh="提示过长，没有空间写作；请减少示例（--shots）或换用上下文更长的模型",
            )
        notice(
            pick(
                f"a prompt of {len(text):,} characters is longer than the context: {low:,} of them are read",
                f"提示有 {len(text):,} 个字符，超出上下文，只读其中 {low:,} 个",
            )
        )
        return prompt(shortened(text, low))

    def ids(self, prompt: Prompt | str) -> list[int]:
        """What a local model reads."""
        if isinstance(prompt, Prompt):
            ids: list[int] = self.model.encode_prompt(self.speaker.prompt(prompt))
            return ids
        return list(self.model.encode_prompt(prompt))

    def write(
        self, prompts: Sequence[Any], count: int, *, label: str, seeds: Sequence[int], **options: Any
    ) -> list[list[str]]:
        """So many texts for each prompt.

        Args:
            seeds: of the first text of each prompt; the next ones have those that follow.
            options: of :class:`~hanmo.inference.sampling.Sampling`.
        """
        options = {"max_new_tokens": self.reserved if self.remote else self.most, **options}
        if not self.chats and self.stops:
            options["stop"] = self.stops
        written: list[list[str]] = [[] for _ in prompts]
        if not prompts:
            return written
        bar = Progress(label, len(prompts) * count, "texts")
        for begin in range(0, count, MOST_CHOICES):
            n = min(MOST_CHOICES, count - begin)
            step = max(1, BATCH // n)
            for first in range(0, len(prompts), step):
                some = prompts[first : first + step]
                own = [seed + begin for seed in seeds[first : first + step]]
                for place, texts in enumerate(self.choices(some, own, {**options, "n": n})):
                    written[first + place] += texts
                bar.update(begin * len(prompts) + n * (first + len(some)))
        bar.close()
        return written

    def choices(self, prompts: Sequence[Any], seeds: Sequence[int], options: dict[str, Any]) -> list[list[str]]:
        """``n`` texts for each of a few prompts; those of a local model are written together."""
        if self.remote:
            return [self.told(prompt, seed, options) for prompt, seed in zip(prompts, seeds, strict=True)]
        found: list[list[str]] = [[] for _ in prompts]
        given = [self.speaker.prompt(prompt) if isinstance(prompt, Prompt) else prompt for prompt in prompts]
        for item in self.model.generate(given, seeds=seeds, **options):
            found[item.index].append(item.text)
        return found

    def told(self, prompt: Any, seed: int, options: dict[str, Any]) -> list[str]:
        """``n`` texts of a remote model."""
        if isinstance(prompt, Prompt):
            return [item.text for item in self.model.chat(prompt.messages(), seed=seed, **options)]
        return [item.text for item in self.model.generate(prompt, seed=seed, **options)]


def shortened(text: str, size: int) -> str:
    """The beginning and the end of a text, so many characters together.

    >>> shortened("abcdefgh", 4)
    'ab\\n…\\ngh'
    """
    tail = size // 2
    return text[: size - tail] + GAP + (text[-tail:] if tail else "")


def learnt_model(texts: Sequence[str], order: int, name: str) -> Any:
    """An n-gram model of the characters of texts, which writes as any other language model does.

    Raises:
        UsageError: there is no text to learn from.
    """
    from hanmo.inference.language_model import LanguageModel
    from hanmo.models.ngram import NGramModel
    from hanmo.text.training import train_char

    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(
            "there are no texts that the n-gram model could learn from",
            fix="give records with references, as --data or --train",
            zh="没有可供 n-gram 模型学习的文本；请提供带参考文本的记录",
        )
    tokenizer = train_char(texts)
    end = tokenizer.eos_id
    assert end is not None
    documents = ([*tokenizer.encode(text), end] for text in texts)
    model = NGramModel.train(documents, order, tokenizer.vocab_size, bos_id=end, eos_id=end)
    unknown = tokenizer.special_tokens.get("<|unk|>")
    forbidden = [] if unknown is None else [unknown]
    return LanguageModel(model, tokenizer, name=name, prompt_prefix=[end], forbidden_ids=forbidden)
