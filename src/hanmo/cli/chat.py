"""``hanmo chat``: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from hanmo.cli.outcome import Outcome
from hanmo.errors import DataError, NetworkError, UsageError
from hanmo.inference.settings import GenerationSettings, WriterSettings
from hanmo.language import pick
from hanmo.settings import CommonSettings, argument, notice, option

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hanmo.inference.engine import Chunk
    from hanmo.inference.language_model import LanguageModel
    from hanmo.inference.remote import RemoteModel

HELP = "talk to a model in the terminal (default: SmolLM2-135M-Instruct)"
HELP_ZH = "在终端与模型对话（默认 SmolLM2-135M-Instruct）"


@dataclass
class ChatSettings(CommonSettings, WriterSettings, GenerationSettings):
    """Settings of ``hanmo chat``."""

    model: str = argument(
        "a run, a model folder, a GGUF file, a name from the catalog, or openai:MODEL@ADDRESS",
        zh="运行目录、模型文件夹、GGUF 文件、目录中的名称，或 openai:模型@地址",
        default="smollm2-135m-instruct",
    )
    system: str | None = option(None, "instructions the model gets before the conversation", zh="系统提示")
    temperature: float = option(
        0.3, "0 takes the likeliest token, higher is more varied", zh="0 为贪心，越大越多样"
    )  # small chat models lose the thread at the warmth that suits stories


class Conversation:
    """The turns so far, in the form the model was trained on: chat messages, or plain text for a base model."""

    def __init__(self, model: LanguageModel, system: str | None) -> None:
        self.model, self.system = model, system
        self.is_chat = model.tokenizer.chat_template is not None
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system and self.is_chat else []

    def stream(self, text: str, options: dict[str, Any]) -> Iterator[Chunk]:
        """Answer the user's next line."""
        room = min(options["max_new_tokens"], self.model.context_length // 2)
        return self.model.stream(self.prompt(text, room), **options)

    def prompt(self, text: str, room: int) -> str | list[int]:
        """What the model reads for the user's next line; the oldest turns go when the context is full."""
        if not self.is_chat:
            return text
        self.messages.append({"role": "user", "content": text})
        ids = self.model.chat_ids(self.messages)
        dropped = 0
        while len(ids) + room > self.model.context_length and self.drop_oldest():
            dropped += 2
            ids = self.model.chat_ids(self.messages)
        if dropped:
            self.tell_dropped(dropped)
        return ids

    def drop_oldest(self) -> bool:
        """Forget the oldest question and its answer; False where only the newest question is left."""
        first = 1 if self.messages[0]["role"] == "system" else 0
        if len(self.messages) - first <= 2:
            return False
        del self.messages[first : first + 2]
        return True

    def tell_dropped(self, dropped: int) -> None:
        """Say what the model does not see any more."""
        notice(pick(f"({dropped} oldest messages no longer fit)", f"（最早的 {dropped} 条消息已超出上下文）"))

    def take_back(self) -> None:
        """Forget a line that could not be answered."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def answered(self, text: str) -> None:
        """Remember the model's answer."""
        if self.is_chat:
            self.messages.append({"role": "assistant", "content": text})


class RemoteConversation(Conversation):
    """The same with a remote model: it is sent messages, and says itself when they are too many."""

    def __init__(self, model: RemoteModel, system: str | None) -> None:
        self.remote, self.system = model, system
        self.is_chat = model.is_chat
        self.messages = []
        self.reset()

    def stream(self, text: str, options: dict[str, Any]) -> Iterator[Chunk]:
        """Answer the user's next line; the oldest turns go when the endpoint says that the context is full."""
        from hanmo.inference.endpoint import ContextExceeded

        if not self.is_chat:
            yield from self.remote.stream(text, **options)
            return
        self.messages.append({"role": "user", "content": text})
        while True:
            try:
                yield from self.remote.stream_chat(self.messages, **options)
                return
            except ContextExceeded:
                if not self.drop_oldest():
                    raise
                self.tell_dropped(2)


def answer(conversation: Conversation, line: str, settings: ChatSettings) -> str:
    """Stream one answer and return it; Ctrl-C ends it early and keeps what was said. ``--json`` shows nothing yet."""
    shown: IO[str] = io.StringIO() if settings.json else sys.stdout
    pieces: list[str] = []
    tokens, start = 0, time.monotonic()
    stream = conversation.stream(line, settings.sampling_options())
    with contextlib.suppress(KeyboardInterrupt):
        for chunk in stream:
            tokens += len(chunk.ids)
            pieces.append(chunk.text)
            shown.write(chunk.text)
            shown.flush()
    shown.write("\n")
    conversation.answered("".join(pieces))
    if sys.stdin.isatty() and tokens:  # a remote model tells no tokens on the way
        speed = tokens / max(time.monotonic() - start, 1e-9)
        notice(f"\x1b[2m[{tokens} tokens, {speed:.0f} tok/s]\x1b[0m" if sys.stderr.isatty() else "")
    return "".join(pieces)


def run(settings: ChatSettings) -> Outcome | None:
    """Read lines, answer them, until the end of input or ``/exit``. With ``--json`` all turns are told at the end."""
    from hanmo.inference.loading import load_language_model
    from hanmo.inference.remote import RemoteModel

    model: Any = load_language_model(settings.model, **settings.engine_options(), offline=settings.offline)
    remote = isinstance(model, RemoteModel)
    conversation = RemoteConversation(model, settings.system) if remote else Conversation(model, settings.system)
    interactive = sys.stdin.isatty()
    if interactive:
        base = pick(" (a base model: it continues your text)", "（基础模型：续写你的文本）")
        kind = "" if conversation.is_chat else base
        notice(f"{model.name}{kind}" if remote else f"{model.name}{kind}: {model.describe()}")
        notice(
            pick(
                "/reset forgets the conversation, /exit leaves, Ctrl-C stops an answer",
                "/reset 清空对话，/exit 退出，Ctrl-C 停止回答",
            )
        )
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and history
    turns: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if interactive and not settings.json else "")
        except EOFError:
            break
        if line.strip() in ("/exit", "/quit"):
            break
        if line.strip() == "/reset":
            conversation.reset()
        elif line.strip():
            try:
                turns.append({"prompt": line, "answer": answer(conversation, line, settings)})
            except (UsageError, DataError, NetworkError) as error:  # neither a long line nor a bad hour ends it all
                notice(str(error))
                conversation.take_back()
    if remote:
        notice(model.describe())
    data = {"turns": turns, "usage": model.usage.as_dict()} if remote else {"turns": turns}
    return Outcome(data, "") if settings.json else None
