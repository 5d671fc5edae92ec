"""Which tokens of a conversation a model learns to write: the assistant's words and the token that ends the turn.

What is trained must be what the model meets in use. There, it is given the ids of the conversation so far with the
beginning of an answer (``render_chat(messages[:i])``), and writes the rest. So a training row is exactly such a prompt,
of which nothing is learned, followed by the answer up to and including the token that stops generation, of which all is
learned. The next answer goes on in the same row where its own prompt begins with that row. Where it does not, because
the template rewrites what was said (Qwen 3 leaves the thoughts of earlier answers out), it gets a row of its own.

This needs no knowledge of a template beyond what it renders. Where the stop token stands is found out with a probe: an
answer that ends in a character that nothing else has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from hanmo.errors import DataError, ModelError
from hanmo.text.chat import (
    CHATML_TEMPLATE,
    check_messages,
    choose_stand_ins,
    control_pattern,
    encode_marked,
    render_marked,
)
from hanmo.text.tokenizer import Tokenizer

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
ANCHORS = ("\n", ".", "。")  # texts that nothing after them is joined with


@dataclass
class TrainedRow:
    """Token ids of a text, and for each whether the model learns to write it."""

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], trained: bool) -> None:
        """Put tokens at the end."""
        self.ids += ids
        self.trained += [trained] * len(ids)


@dataclass(frozen=True)
class Form:
    """How one model writes conversations: its tokenizer, and the pattern of its control tokens."""

    tokenizer: Tokenizer
    control: re.Pattern[str]

    def ids(self, marked: str, stand_ins: dict[int, str]) -> list[int]:
        """The ids of a rendered text; for a whole conversation those of :func:`hanmo.text.chat.render_chat`."""
        return encode_marked(self.tokenizer, self.control, marked, stand_ins)


@dataclass(frozen=True)
class Frame:
    """What a template writes round an answer: between its prompt and the content, and after it to the stop token."""

    before: str
    after: str
    stop: str

    def holds(self, rest: str, content: str) -> bool:
        """Whether the rest of a rendered conversation begins with this content, whole or trimmed, in this frame."""
        return any(rest.startswith(self.before + text + self.after) for text in (content, content.strip()))


class Conversation:
    """One conversation while its rows are made; the stand-ins are the same in all that is rendered of it."""

    def __init__(self, form: Form, messages: list[dict[str, str]], stand_ins: dict[int, str] | None = None) -> None:
        self.form, self.messages = form, messages
        if stand_ins is None:
            texts = [value for message in messages for key, value in message.items() if key != "role"]
            template = form.tokenizer.chat_template or ""
            stand_ins = choose_stand_ins(form.tokenizer.special_tokens, [template, *texts])
        self.stand_ins = stand_ins
        self.originals = {ord(twin): chr(point) for point, twin in self.stand_ins.items()}
        self.pieces: dict[str, list[int]] = {}  # what stands between control tokens, and its ids
        self.separable = False

    def render(self, count: int, *, prompt: bool) -> str:
        """The first ``count`` messages, with stand-ins; ``prompt``: and the beginning of an answer."""
        text, own = render_marked(self.form.tokenizer, self.messages[:count], prompt)
        if own == self.stand_ins:
            return text
        # A later message uses a private-use character itself.
        return text.translate({ord(twin): self.stand_ins[point] for point, twin in own.items()})

    def ids(self, marked: str) -> list[int]:
        """The ids of a part of what was rendered."""
        return self.joined(marked) if self.separable else self.form.ids(marked, self.stand_ins)

    def joined(self, marked: str) -> list[int]:
        """The same, each piece between two control tokens encoded by itself, and only once."""
        ids: list[int] = []
        at = 0
        for match in self.form.control.finditer(marked):
            ids += self.piece(marked[at : match.start()])
            ids.append(self.form.tokenizer.special_tokens[match[0]])
            at = match.end()
        return ids + self.piece(marked[at:])

    def piece(self, marked: str) -> list[int]:
        """The ids of a text without control tokens."""
        if marked not in self.pieces:
            self.pieces[marked] = self.form.tokenizer.encode(marked.translate(self.originals))
        return self.pieces[marked]

    def try_pieces(self, whole: str) -> None:
        """See whether control tokens part the text for this tokenizer; then a long conversation is encoded once."""
        self.separable = self.joined(whole) == self.form.ids(whole, self.stand_ins)

    def content(self, turn: int) -> str:
        """The content of a message with its stand-ins."""
        return self.messages[turn]["content"].translate(self.stand_ins)

    def frame(self, turn: int, prompt: str) -> Frame:
        """What the template writes round an answer, found with one that nothing else contains.

        Raises:
            ModelError: it writes no control token after it, or does not begin with the prompt.
        """
        texts = {character for message in self.messages for value in message.values() for character in value}
        probe = next(chr(point) for point in range(0xE000, 0xF8FF) if chr(point) not in texts)
        asked = [*self.messages[:turn], {**self.messages[turn], "content": probe}]
        text = Conversation(self.form, asked, self.stand_ins).render(turn + 1, prompt=False)
        if not text.startswith(prompt):
            raise other_beginning()
        before, found, after = text[len(prompt) :].rpartition(probe)
        stop = self.form.control.search(after) if found else None
        if stop is None:
            raise unended()
        return Frame(before, after[: stop.end()], stop[0])

    def answer(self, prompt: str, following: str, stop: str) -> list[int]:
        """The ids of an answer from the end of its prompt to its stop token, which lies in ``following``.

        Raises:
            ModelError: what follows does not begin with the prompt, or never stops.
        """
        if not following.startswith(prompt):
            raise other_beginning()
        start, control = len(prompt), self.form.control
        end = next((match.end() for match in control.finditer(following, start) if match[0] == stop), None)
        if end is None:
            raise unended()
        asked, whole = self.ids(prompt), self.ids(following[:end])
        if whole[: len(asked)] == asked:
            return whole[len(asked) :]
        # The end of the prompt and the beginning of the answer share a token of the whole text. In use they cannot.
        first = control.search(following, start)
        assert first is not None  # the stop token at the latest
        head = encode_inside(self.form.tokenizer, following[start : first.start()].translate(self.originals))
        return head + self.ids(following[first.start() : end])


class ChatTargets:
    """Finds the trained tokens of conversations in the form of one model.

    Args:
        tokenizer: its ``chat_template`` is used; see :func:`with_chat_tokens` for a model that has none.
        last_only: learn only the last answer of each conversation.

    Attributes:
        stop_ids: the tokens that were found to end an answer, so far. Generation must stop at them.
        rewritten: conversations so far whose template rewrote earlier turns, so that they became several rows.

    Raises:
        ModelError: the tokenizer has no control tokens, so no answer could end.
    """

    def __init__(self, tokenizer: Tokenizer, *, last_only: bool = False) -> None:
        if tokenizer.chat_template and not tokenizer.special_tokens:
            raise unended()
        self.form = Form(tokenizer, control_pattern(tokenizer.special_tokens))
        self.last_only = last_only
        self.stop_ids: set[int] = set()
        self.rewritten = 0
        self.frames: dict[tuple[str, ...], Frame] = {}  # by the roles up to an answer

    def rows(self, messages: Sequence[dict[str, str]], *, last_only: bool = False) -> list[TrainedRow]:
        """The rows of one conversation, usually a single one; none where there is no answer to learn.

        Args:
            messages: what follows the last answer is left out; answers that nothing comes before, and blank ones, are
                read, but not learned.
            last_only: learn only the last answer, whatever holds for other conversations.

        Raises:
            DataError: a message is malformed, or the template refuses the conversation.
            ModelError: there is no template, it does not end an answer with a control token, or it writes answers in
                another way than the prompt for one begins.
        """
        chat = list(messages)
        check_messages(chat)
        turns = [
            index
            for index, message in enumerate(chat)
            if index and message["role"] == "assistant" and message["content"].strip()
        ]
        if last_only or self.last_only:
            turns = turns[-1:]
        conversation = Conversation(self.form, chat)
        rows: list[TrainedRow] = []
        if not turns:
            return rows
        prompts = [conversation.render(turn, prompt=True) for turn in turns]
        whole = conversation.render(turns[-1] + 1, prompt=False)
        conversation.try_pieces(whole)
        for turn, prompt, following in zip(turns, prompts, [*prompts[1:], whole], strict=True):
            frame = self.frame(conversation, turn, prompt)
            kept = following.startswith(prompt) and frame.holds(following[len(prompt) :], conversation.content(turn))
            if turn != turns[-1] and not kept:  # the template writes this answer otherwise when it is an earlier one
                following = conversation.render(turn + 1, prompt=False)
            answer = conversation.answer(prompt, following, frame.stop)
            extend(rows, conversation.ids(prompt), answer)
        self.rewritten += len(rows) > 1
        return rows

    def frame(self, conversation: Conversation, turn: int, prompt: str) -> Frame:
        """What stands round an answer; remembered by the roles of the messages up to it."""
        roles = tuple(message["role"] for message in conversation.messages[: turn + 1])
        if roles not in self.frames:
            self.frames[roles] = conversation.frame(turn, prompt)
            self.stop_ids.add(self.form.tokenizer.special_tokens[self.frames[roles].stop])
        return self.frames[roles]


def extend(rows: list[TrainedRow], prompt: list[int], answer: list[int]) -> None:
    """Let the last row go on with a turn where the prompt begins with it, or begin another row."""
    if not rows or prompt[: len(rows[-1].ids)] != rows[-1].ids:
        rows.append(TrainedRow())
    rows[-1].add(prompt[len(rows[-1].ids) :], False)
    rows[-1].add(answer, True)


def other_beginning() -> ModelError:
    """The error for a template whose answers do not begin as its prompts for an answer end."""
    return ModelError(
        "the chat template writes an answer in another way than the prompt for one begins",
        where="chat template",
        why="the model would be trained on texts that it never meets in use",
        fix="let what the template writes for add_generation_prompt be exactly how an assistant message begins",
        zh="对话模板中，助手消息的写法与生成提示（add_generation_prompt）的开头不一致，"
        "训练内容与使用时不符；请修改模板使两者一致",
    )


def unended() -> ModelError:
    """The error for a template after which a model could not learn to stop."""
    return ModelError(
        "the chat template does not end an answer with a control token",
        where="chat template",
        why="the model would never learn to stop",
        fix="let the template write the end-of-turn or EOS token after the content of an assistant message, and see "
        "that the tokenizer lists it as a special token",
        zh="对话模板没有用控制符号结束助手的回答，模型将学不会停止；"
        "请在模板的助手消息之后写出结束符号，并确认分词器把它列为特殊符号",
    )


def encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that stands after another one, so that no space is put before it."""
    if tokenizer.adds_prefix_space:
        for anchor in ANCHORS:
            before, both = tokenizer.encode(anchor), tokenizer.encode(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
    return tokenizer.encode(text)


def completion_row(tokenizer: Tokenizer, prompt: str, completion: str, prefix: Sequence[int] = ()) -> TrainedRow:
    """A prompt, of which nothing is learned, and its completion with EOS: for models without a chat template.

    Args:
        prefix: the control tokens that generation puts before a prompt (``LanguageModel.prompt_prefix``).

    Raises:
        ModelError: the tokenizer has no EOS, so the model could not learn to stop.
        DataError: a text has a lone surrogate.
    """
    if tokenizer.eos_id is None:
        raise ModelError(
            "the tokenizer has no EOS token",
            where="tokenizer_config.json",
            why="the model would never learn to stop",
            fix="name one of its control tokens as eos_token",
            zh="分词器没有 EOS 符号，模型将学不会停止；请在 tokenizer_config.json 中指定 eos_token",
        )
    row = TrainedRow()
    row.add([*prefix, *tokenizer.encode(prompt)], False)
    answer = encode_inside(tokenizer, completion) if prompt else tokenizer.encode(completion)
    row.add([*answer, tokenizer.eos_id], True)
    return row


def with_chat_tokens(tokenizer: Tokenizer) -> tuple[Tokenizer, list[str]]:
    """A tokenizer that can hold conversations: itself if it has a template, else with the one of ChatML.

    Returns:
        The tokenizer, and the control tokens that had to be added to its vocabulary. The network needs a row of its
        embedding for each id below ``vocab_size``; see :func:`hanmo.training.objectives.instructions.widen`.
    """
    if tokenizer.chat_template:
        return tokenizer, []
    definition = json.loads(tokenizer.to_json())
    taken = definition.get("added_tokens") or []
    added = [token for token in CHATML_TOKENS if token not in tokenizer.special_tokens]
    known = tokenizer.words
    if clash := [token for token in added if token in known]:
        raise DataError(
            f"'{clash[0]}' is an ordinary token of this tokenizer, not a control token",
            fix="mark it as special in tokenizer.json",
            zh=f"'{clash[0]}' 在该分词器中是普通词元而非控制符号，请在 tokenizer.json 中标记为 special",
        )
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for place, token in enumerate(added):
        taken = [*taken, {"id": tokenizer.vocab_size + place, "content": token, **flags}]
    definition["added_tokens"] = taken
    names = {id: token for token, id in tokenizer.special_tokens.items()}

    def name(id: int | None) -> str | None:
        return None if id is None else names.get(id)

    text = json.dumps(definition, ensure_ascii=False)
    made = Tokenizer.from_json(
        text,
        bos_token=name(tokenizer.bos_id),
        eos_token=name(tokenizer.eos_id),
        pad_token=name(tokenizer.pad_id),
        cls_token=name(tokenizer.cls_id),
        sep_token=name(tokenizer.sep_id),
        mask_token=name(tokenizer.mask_id),
        chat_template=CHATML_TEMPLATE,
    )
    for token in added:
        if made.encode(token, special=True) != [made.special_tokens[token]]:
            raise ModelError(
                f"'{token}' cannot be added to this tokenizer",
                why="its vocabulary has gaps",
                fix="use a model that has a chat template",
                zh=f"无法把 '{token}' 加入该分词器（词表编号不连续），请换用带对话模板的模型",
            )
    return made, added
