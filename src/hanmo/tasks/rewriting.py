"""A text from a text by a language model: translations and summaries; long texts go in pieces, as sentences allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hanmo.errors import UsageError
from hanmo.progress import Progress
from hanmo.tasks.prompts import Prompt, Speaker
from hanmo.text.sentences import halves, join_words, sentences_of

BATCH = 64  # texts that are written together, of about one length
LEAST_NEW = 24  # tokens


def bare(text: str) -> str:
    """Nothing stands before a text."""
    del text
    return ""


class Rewriter:
    """A language model that is given a text and writes another one.

    An encoder-decoder reads the bare text; others are asked.

    Args:
        model: a language model, local or remote.
        prompt: how a text is asked about.
        growth: tokens that are written at most for each that is read.
        most: tokens of an answer at most.
        prefix: what stands before a text that an encoder-decoder reads, such as "summarize: ".
    """

    def __init__(
        self,
        model: Any,
        prompt: Callable[[str], Prompt],
        *,
        growth: float,
        most: int = 512,
        prefix: Callable[[str], str] = bare,
    ) -> None:
        self.speaker, self.prompt, self.growth, self.most, self.prefix = Speaker(model), prompt, growth, most, prefix
        self.model = model
        self.bare = self.speaker.kind == "encoder-decoder"

    def tokens(self, text: str) -> int:
        """How long a text is; for a remote model about so long."""
        return len(text.encode("utf-8", "replace")) // 3 if self.speaker.remote else len(self.encode(text))

    def encode(self, text: str) -> list[int]:
        """The ids of a text by itself."""
        ids: list[int] = self.model.tokenizer.encode(text)
        return ids

    def wanted(self, text: str) -> int:
        """Tokens that an answer may have."""
        return min(self.most, LEAST_NEW + int(self.growth * self.tokens(text)))

    def fits(self, text: str) -> bool:
        """Is there room for the text and its answer?"""
        limit = self.model.context_length
        if limit is None:
            return self.tokens(text) <= 2 * self.most
        if self.bare:
            read = self.tokens(self.prefix(text) + text) + len(self.model.prompt_prefix) + len(self.model.prompt_suffix)
            return bool(self.model.room(read) >= LEAST_NEW + int(self.growth * self.tokens(text)))
        answer = LEAST_NEW + int(self.growth * self.tokens(text))
        return self.speaker.size(self.prompt(text)) + min(answer, self.most) <= int(limit)

    def pieces(self, text: str, most: int) -> Iterator[str]:
        """A text as runs of whole sentences.

        Args:
            most: tokens of a run; one sentence may have four times as many, then it is cut.

        Raises:
            UsageError: not even one character fits.
        """

        def fits(sentence: str) -> bool:
            return self.tokens(sentence) <= 4 * most and self.fits(sentence)

        held = ""
        for sentence in sentences_of(text):
            joined = join_words([held, sentence])
            if held and self.tokens(joined) <= most and self.fits(joined):
                held = joined
                continue
            if held:
                yield held
            *cut, held = self.cut(sentence, fits)
            yield from cut
        if held:
            yield held

    def cut(self, sentence: str, fits: Callable[[str], bool]) -> list[str]:
        """A sentence in as many parts as it takes."""
        if fits(sentence):
            return [sentence]
        if len(sentence) < 2:
            raise UsageError(
                "the prompt leaves no room for a text",
                where=self.model.name,
                fix="fewer worked examples (--shots), or a model with a longer context",
                zh="提示过长，没有空间放入文本；请减少示例（--shots）或换用上下文更长的模型",
            )
        return [part for half in halves(sentence) if half.strip() for part in self.cut(half.strip(), fits)]

    def write(self, texts: Sequence[str], label: str) -> list[str]:
        """What the model writes about each text; nothing about a blank one."""
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: len(texts[i]))
        answers = [""] * len(texts)
        bar = Progress(label, len(order), "texts")
        for begin in range(0, len(order), BATCH):
            some = order[begin : begin + BATCH]
            for i, answer in zip(some, self.written([texts[i] for i in some]), strict=True):
                answers[i] = answer
            bar.update(begin + len(some))
        bar.close()
        return answers

    def written(self, texts: list[str]) -> list[str]:
        """A few answers at once."""
        new = max(map(self.wanted, texts))
        if not self.bare:
            return self.speaker.write([self.prompt(text) for text in texts], max_new_tokens=new)
        prompts = [self.prefix(text) + text for text in texts]
        written = self.model.generate(prompts, temperature=0.0, max_new_tokens=new)
        return [completion.text.strip() for completion in sorted(written, key=lambda item: item.index)]
