"""Dialogue and instruction following: the reply to a conversation.

Of a conversation in several turns the last answer of the assistant is asked for, given the turns before it as they
stand in the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from hanmo.data.tasks.types import Dialogue, Message
from hanmo.errors import DataError, HanmoError, UsageError
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.settings import notice
from hanmo.tasks.base import Form, System, Task
from hanmo.tasks.prompts import Prompt, Speaker, choose_shots, mark_of, mostly_chinese
from hanmo.tasks.replies import Exchange, Reply, ReplyMetric, exchange_of

BATCH = 64  # replies that are written together
LEAST, USUAL, MOST = 64, 512, 1280  # tokens of a reply
KEPT = 0.6  # of the room of a question that is too long, for its beginning; its end has the rest


# Baselines ------------------------------------------------------------------------------------------------------------


class Echo(System[Dialogue, Reply]):
    """The question itself: what repeating names and words is worth."""

    def __init__(self) -> None:
        self.name = pick("the question itself", "照抄问题")

    def answer(self, records: Sequence[Dialogue]) -> list[Reply]:
        """The last words of the user."""
        return [Reply(exchange_of(record).question) for record in records]


class Nearest(System[Dialogue, Reply]):
    """The answer to the most similar question that was seen, by the words and characters they share (TF-IDF)."""

    learns = True

    def __init__(self) -> None:
        self.name = pick("the answer to the most similar question", "最相似问题的回答")
        self.answers: list[str] = []

    def fit(self, train: Sequence[Dialogue], validation: Sequence[Dialogue] = ()) -> None:
        """Remember questions and answers; records without an answer are passed over."""
        del validation
        known = [exchange for exchange in map(exchange_of, train) if exchange.reference]
        self.answers = [exchange.reference for exchange in known]
        self.index: dict[str, int] = {}
        rows = [counts(exchange, self.index, grow=True) for exchange in known]
        seen = np.zeros(len(self.index))
        for places, _ in rows:
            seen[places] += 1
        self.weights = np.log((1 + len(rows)) / (1 + seen)) + 1
        self.holding: list[list[tuple[int, float]]] = [[] for _ in self.index]
        for number, row in enumerate(rows):
            for place, value in self.weighted(row):
                self.holding[place].append((number, value))

    def weighted(self, row: tuple[list[int], list[int]]) -> list[tuple[int, float]]:
        """Terms of a question with their weights; the length of the vector is 1."""
        values = np.array(row[1], dtype=np.float64) * self.weights[row[0]]
        length = float(np.linalg.norm(values)) or 1.0
        return list(zip(row[0], (values / length).tolist(), strict=True))

    def answer(self, records: Sequence[Dialogue]) -> list[Reply]:
        """One for each; of equally similar questions the first."""
        return [Reply(self.nearest(exchange_of(record))) for record in records]

    def nearest(self, exchange: Exchange) -> str:
        """The answer that was given to what is most like it; nothing where there was none."""
        if not self.answers:
            return ""
        scores = np.zeros(len(self.answers))
        for place, value in self.weighted(counts(exchange, self.index, grow=False)):
            for number, other in self.holding[place]:
                scores[number] += value * other
        return self.answers[int(scores.argmax())]


def counts(exchange: Exchange, index: dict[str, int], *, grow: bool) -> tuple[list[int], list[int]]:
    """The terms of a question by their numbers, and how often it has each: units, and pairs of them."""
    from hanmo.tasks.diversity import units

    found = units(exchange.question)
    terms: dict[int, int] = {}
    for term in (*found, *(f"{one} {other}" for one, other in pairwise(found))):
        place = index.setdefault(term, len(index)) if grow else index.get(term)
        if place is not None:
            terms[place] = terms.get(place, 0) + 1
    return list(terms), list(terms.values())


# Language models ------------------------------------------------------------------------------------------------------


class Assistant(System[Dialogue, Reply]):
    """A language model that answers: in the form of its chat template, or as the next words of a script.

    Replies are written greedily. What does not fit into the context goes: first worked examples, then the oldest
    turns, then the middle of the last question.

    Args:
        model: local or remote.
        train: conversations that tell how long a reply may be, and the worked examples.
        form: how many examples; its instruction stands before the first message of the user.
    """

    def __init__(self, model: Any, train: Sequence[Dialogue], form: Form) -> None:
        self.name, self.model, self.given = model.name, model, form.instruction
        self.speaker = Speaker(model)
        self.kind = self.speaker.kind
        self.most = longest_reply(train)
        self.shots: tuple[tuple[str, str], ...] = ()
        if form.shots:
            found = [exchange for exchange in map(exchange_of, train) if exchange.reference]
            chosen: list[Exchange] = choose_shots(found, form.shots, form.seed)  # type: ignore[arg-type]
            self.shots = tuple((exchange.question, exchange.reference) for exchange in chosen)
        self.shortened = 0

    # The prompt -------------------------------------------------------------------------------------------------------

    def messages(self, prompt: Sequence[Message], shots: Sequence[tuple[str, str]]) -> list[Message]:
        """A conversation with the examples before it and the instruction in its first question."""
        head = list(prompt[:1]) if prompt[0]["role"] == "system" else []
        talk = [dict(item) for item in prompt[len(head) :]]
        for question, answer in reversed(shots):
            talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *talk]
        if self.given:
            first = next(item for item in talk if item["role"] == "user")
            first["content"] = f"{self.given}\n\n{first['content']}"
        return [*head, *talk]

    def written(self, messages: list[Message]) -> Any:
        """What the model reads: ids, or a text."""
        return self.model.chat_ids(messages) if self.speaker.chats and not self.speaker.remote else script(messages)

    def size(self, messages: list[Message]) -> int:
        """Tokens of a conversation; of a remote model about so many."""
        if self.speaker.remote:
            return sum(len(item["content"].encode("utf-8", "replace")) // 3 + 8 for item in messages)
        written = self.written(messages)
        if isinstance(written, list):
            return len(written)
        return len(self.model.prompt_prefix) + len(self.model.tokenizer.encode(written))

    def fitted(self, prompt: Sequence[Message]) -> list[Message]:
        """A conversation that leaves room for its reply."""
        limit = self.model.context_length
        talk, shots = list(prompt), list(self.shots)
        messages = self.messages(talk, shots)
        if limit is None:
            return messages
        room = int(limit) - min(self.most, int(limit) // 2)
        self.shortened += self.size(messages) > room
        while self.size(messages) > room:
            if shots:
                shots.pop()
            elif not drop_oldest(talk):
                return self.cut(messages, room)
            messages = self.messages(talk, shots)
        return messages

    def cut(self, messages: list[Message], room: int) -> list[Message]:
        """As much of the beginning and the end of the last question as fits; halving finds how much."""
        place = max(number for number, item in enumerate(messages) if item["role"] == "user")
        text = messages[place]["content"]

        def shorter(kept: int) -> list[Message]:
            head = int(kept * KEPT)
            content = f"{text[:head]} … {text[len(text) - (kept - head) :]}"
            return [*messages[:place], {"role": "user", "content": content}, *messages[place + 1 :]]

        low, high = 0, len(text) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.size(shorter(middle)) <= room else (low, middle - 1)
        return shorter(low)

    # Replies ----------------------------------------------------------------------------------------------------------

    def answer(self, records: Sequence[Dialogue]) -> list[Reply]:
        """The replies; those to prompts of about one length are written together."""
        exchanges = [exchange_of(record) for record in records]
        self.shortened = 0
        asked = []
        for record, exchange in zip(records, exchanges, strict=True):
            try:
                asked.append(self.fitted(exchange.prompt))
            except DataError as error:  # what the template refuses
                error.where = ": ".join(place for place in (record.line and record.where, error.where) if place)
                raise
        if self.shortened:
            notice(
                pick(
                    f"{self.shortened:,} conversations were longer than the context and have been shortened",
                    f"{self.shortened:,} 段对话超出上下文，已截短",
                )
            )
        order = sorted(range(len(asked)), key=lambda i: sum(len(item["content"]) for item in asked[i]))
        replies: dict[int, Reply] = {}
        bar = Progress(pick("answering", "回答"), len(order), "replies")
        for begin in range(0, len(order), BATCH):
            some = order[begin : begin + BATCH]
            replies.update(zip(some, self.replies([asked[i] for i in some]), strict=True))
            bar.update(begin + len(some))
        bar.close()
        return [replies[i] for i in range(len(records))]

    def replies(self, asked: list[list[Message]]) -> list[Reply]:
        """A few replies at once."""
        options: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": self.most}
        if self.speaker.remote and self.speaker.chats:
            from hanmo.inference.remote import in_parallel

            def work(number: int) -> Any:
                return self.model.chat(asked[number], **options)[0]

            found = in_parallel(work, range(len(asked)), self.model.max_parallel)
        else:
            if not self.speaker.chats:
                options["stop"] = [f"\n{names[role]}" for names in NAMES for role in ("user", "assistant")]
            found = self.model.generate([self.written(messages) for messages in asked], **options)
            found = sorted(found, key=lambda item: item.index)
        return [Reply(item.text.strip(), item.finish_reason == "stop") for item in found]

    def weigh(self, records: Sequence[Dialogue], answers: Sequence[Reply]) -> list[Reply]:
        """The replies with the likelihood of the references; without it where a model tells none."""
        if self.speaker.remote:
            return list(answers)
        weighed = []
        bar = Progress(pick("weighing the references", "计算参考回答的似然"), len(records), "replies")
        try:
            for number, (record, reply) in enumerate(zip(records, answers, strict=True), 1):
                nats, tokens = self.likelihood(exchange_of(record))
                weighed.append(Reply(reply.text, reply.ended, nats, tokens))
                bar.update(number)
        except HanmoError as error:  # a template that cannot be trained on
            notice(pick(f"no likelihoods of {self.name}: {error.what}", f"{self.name} 没有似然：{error.zh}"))
            return list(answers)
        finally:
            bar.close()
        return weighed

    def likelihood(self, exchange: Exchange) -> tuple[float | None, int]:
        """Nats of a reference with the token that ends it, and its tokens; None where it is not there or too long."""
        from hanmo.text.chat_targets import ChatTargets, completion_row

        if not exchange.reference.strip():
            return None, 0
        messages, model = self.fitted(exchange.prompt), self.model
        if self.speaker.chats:
            answered = [*messages, {"role": "assistant", "content": exchange.reference}]
            row = ChatTargets(model.tokenizer).rows(answered, last_only=True)[-1]
        else:
            prompt = script(messages)
            said = exchange.reference if prompt.endswith("：") else f" {exchange.reference}"
            row = completion_row(model.tokenizer, prompt, said, model.prompt_prefix)
        begin = row.trained.index(True)
        if len(row.ids) > model.context_length:
            return None, 0
        scores = model.choice_logprobs(row.ids[:begin], [row.ids[begin:]])[0]
        return -float(scores.double().sum()), len(row.ids) - begin

    def signature(self) -> Mapping[str, Any]:
        """The form of the prompt, its examples, and the limit of a reply."""
        mark = mark_of(Prompt(self.given or "", "", self.shots), len(self.shots))
        return {**mark, "form": "template" if self.speaker.chats else "script", "max_new_tokens": self.most}


def drop_oldest(talk: list[Message]) -> bool:
    """Forget the oldest question and what follows it up to the next; False where only one is left."""
    asked = [place for place, item in enumerate(talk) if item["role"] == "user"]
    if len(asked) < 2:
        return False
    del talk[talk[0]["role"] == "system" : asked[1]]
    return True


NAMES = (
    {"user": "User:", "assistant": "Assistant:", "tool": "Tool:"},
    {"user": "用户：", "assistant": "助手：", "tool": "工具："},
)


def script(messages: Sequence[Message]) -> str:
    """A conversation as a text that ends where the assistant is to speak: for models without a template."""
    names = NAMES[mostly_chinese([item["content"] for item in messages])]
    lines = [f"{names[m['role']]} {m['content']}" if m["role"] in names else m["content"] for m in messages]
    return "\n".join([*lines, names["assistant"]])


def longest_reply(train: Sequence[Dialogue]) -> int:
    """How many tokens a reply may have: the bytes of nearly all references, which no tokenizer needs more than.

    Bytes, so that models with different tokenizers have the same limit.
    """
    sizes = [len(exchange_of(record).reference.encode("utf-8", "replace")) for record in train[:5000]]
    sizes = [size for size in sizes if size]
    if not sizes:
        return MOST if train else USUAL
    return int(np.clip(np.percentile(sizes, 95), LEAST, MOST))


# The task -------------------------------------------------------------------------------------------------------------


class Dialogues(Task[Dialogue, Reply]):
    """Replies to conversations and instructions."""

    name, kind, training = "dialogue", "dialogue", "instructions"
    aliases = ("assistant", "instruction-following")
    help = "replies to conversations and instructions; the untuned model stands beside a tuned one"
    help_zh = "对话与指令遵循：微调后的模型旁边列出微调前的模型"
    shows_untuned = True

    def metric(self, records: Sequence[Dialogue]) -> ReplyMetric:
        """Overlap, likelihood and rules; what the records have decides."""
        return ReplyMetric(records)

    def baselines(self, records: Sequence[Dialogue]) -> list[System[Dialogue, Reply]]:
        """The question itself; the answer to the most similar one, where there are answers."""
        answered = [bool(exchange_of(record).reference) for record in records]
        return [Echo(), Nearest()] if sum(answered) > 1 else [Echo()]

    def system(self, model: Any, train: Sequence[Dialogue] = (), form: Form | None = None) -> System[Dialogue, Reply]:
        """A decoder with a chat template or without one, or a remote model."""
        if not hasattr(model, "generate") or getattr(model, "reads_source", False):
            raise self.cannot(
                model,
                fix="take a decoder: smollm2-135m-instruct, a run of hanmo finetune --task dialogue, "
                "or openai:MODEL@ADDRESS",
                zh="该模型不能对话；请使用解码器模型：smollm2-135m-instruct、hanmo finetune --task dialogue 的结果，"
                "或 openai:模型@地址",
            )
        return Assistant(model, train, form or Form())

    def record(self, text: str) -> Dialogue:
        """One question, without an answer.

        Raises:
            UsageError: it is blank.
        """
        if not text.strip():
            raise UsageError("the question is empty", fix="say something", zh="问题为空，请输入内容")
        return Dialogue(({"role": "user", "content": text},))

    def as_data(self, answer: Reply) -> dict[str, Any]:
        """The reply, and whether it ended by itself."""
        more = {} if answer.nats is None else {"nats": answer.nats, "reference_tokens": answer.tokens}
        return {"reply": answer.text, "ended": answer.ended, **more}

    def describe(self, record: Dialogue, answer: Reply) -> str:
        """The reply."""
        del record
        return answer.text
