"""A small deterministic stand-in for a language model, and a server for it: what the serving tests share.

Tokens are bytes, and the text that is written depends on the prompt, so that every prompt has its own right answer.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from hanmo.inference.engine import Chunk, TokenLogprobs
from hanmo.inference.sampling import Sampling
from hanmo.inference.stream import IncrementalDecoder
from hanmo.serving.app import create_app
from hanmo.serving.server import bind, make_server

EOS = 256
STORY = "春眠不觉晓，处处闻啼鸟。🌸 The quick brown fox 夜来风雨声，花落知多少。👩‍🚀 "


class ByteTokenizer:
    """Ids 0 to 255 are bytes, 256 ends a text."""

    vocab_size = 257
    eos_id = EOS
    bos_id = None

    def __init__(self, chat: bool) -> None:
        self.special_tokens = {"<end>": EOS}
        self.chat_template = "a template" if chat else None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        end = "" if skip_special else "<end>" * list(ids).count(EOS)
        return b"".join(self.token_bytes(id) for id in ids).decode("utf-8", "replace") + end


class FakeModel:
    """Writes ``expected_text`` of the prompt, then ends.

    Attributes:
        delay: seconds per token.
        fail_after: raise an error after so many tokens.
        steps: tokens generated so far, over all requests.
    """

    start_id = EOS

    def __init__(self, *, chat: bool = True, context_length: int = 400, delay: float = 0.0) -> None:
        self.tokenizer = ByteTokenizer(chat)
        self.prompt_prefix: list[int] = []
        self.prompt_suffix: list[int] = []
        self.reads_source = False
        self.context_length = context_length
        self.delay = delay
        self.fail_after: int | None = None
        self.steps = 0

    def room(self, prompt_tokens: int) -> int:
        return self.context_length - prompt_tokens

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.encode("\n".join(f"{message['role']}: {message['content']}" for message in messages))

    def stream(self, prompts: list[list[int]], **options: Any) -> Iterator[Chunk]:
        sampling = Sampling(**options)
        for index, prompt in enumerate(prompts):
            for choice in range(sampling.n):
                yield from self.one(index, prompt, choice, sampling)

    def one(self, index: int, prompt: list[int], choice: int, sampling: Sampling) -> Iterator[Chunk]:
        decoder = IncrementalDecoder(sampling.stop)
        answer = [*expected_text(prompt, choice).encode("utf-8"), EOS]
        for count, id in enumerate(answer, start=1):
            time.sleep(self.delay)
            self.steps += 1
            if self.fail_after is not None and count > self.fail_after:
                raise RuntimeError("the fake model was told to fail")
            text = decoder.feed(self.tokenizer.token_bytes(id))
            reason = (
                "stop" if id == EOS or decoder.stop_string else "length" if count == sampling.max_new_tokens else None
            )
            text += decoder.finish() if reason else ""
            scores = None if sampling.logprobs is None else [self.scores(id, sampling.logprobs)]
            yield Chunk(text, [id], reason, len(prompt), index, choice, logprobs=scores)
            if reason:
                return

    def scores(self, id: int, top: int) -> TokenLogprobs:
        return TokenLogprobs(-float(id), [(id + place, -float(id + place)) for place in range(top)])

    def prompt_logprobs(self, ids: Sequence[int], top: int = 0) -> list[TokenLogprobs | None]:
        return [None, *(self.scores(id, top) for id in ids[1:])]


def expected_text(prompt: Sequence[int], choice: int = 0) -> str:
    """The answer of the fake model: it names the prompt's checksum, so that answers cannot be mixed up."""
    return f"[{sum(prompt)}/{choice}] {STORY}"


@contextlib.contextmanager
def running_server(model: FakeModel | Any, name: str = "fake") -> Iterator[str]:
    """Serve on a free port of 127.0.0.1 in a thread; gives the address."""
    with bind(0) as listener:
        server = make_server(create_app(model, name))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(15)
            assert not thread.is_alive(), "the server did not stop"
