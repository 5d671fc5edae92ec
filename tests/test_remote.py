"""Remote models: the contract over our own server, and everything a bad, slow or hostile endpoint can do."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanmo.cli.main import main
from hanmo.errors import DataError, HanmoError, ModelError, NetworkError, ResourceError, UsageError
from hanmo.inference import address, endpoint
from hanmo.inference.accounting import Usage
from hanmo.inference.address import parse_name
from hanmo.inference.endpoint import ContextExceeded, event_data
from hanmo.inference.remote import RemoteModel, connect, in_parallel
from hanmo.inference.replies import RemoteCompletion

from .serving_fakes import FakeModel, expected_text, running_server

KEY = "sk-secret-0123456789"
PUBLIC = "openai:m@https://api.example.com/v1"
HELLO = [{"role": "user", "content": "你好"}]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "HANMO_API_KEY", "OPENAI_BASE_URL", "HANMO_PRICES", "HANMO_ALLOW_HTTP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HANMO_OFFLINE", raising=False)


# Our own server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own() -> Iterator[str]:
    with running_server(FakeModel()) as base:
        yield base


@pytest.fixture
def model(own: str) -> RemoteModel:
    return connect(f"openai:fake@{own}", offline=True)  # this machine is allowed offline


PROMPTS = ["从前有座山", "Once upon a time", "🌸", ""]


def test_generate_and_stream_give_what_the_model_writes(model: RemoteModel) -> None:
    completions = model.generate(PROMPTS, n=2, max_new_tokens=200)
    assert [(each.index, each.choice) for each in completions] == [(i, c) for i in range(4) for c in range(2)]
    for completion in completions:
        prompt = PROMPTS[completion.index].encode() or [256]
        assert completion.text == expected_text(prompt, completion.choice)
        assert (completion.finish_reason, completion.prompt_tokens) == ("stop", len(prompt))
    for prompt in PROMPTS:
        chunks = list(model.stream(prompt, n=2, max_new_tokens=200))
        for choice in range(2):
            mine = [chunk for chunk in chunks if chunk.choice == choice]
            assert "".join(chunk.text for chunk in mine) == expected_text(prompt.encode() or [256], choice)
            assert [chunk.finish_reason for chunk in mine] == [None] * (len(mine) - 1) + ["stop"]
            assert mine[-1].prompt_tokens == max(1, len(prompt.encode()))
    assert model.route == "completions"


def test_limits_and_stop_strings(model: RemoteModel) -> None:
    (short,) = model.generate("a", max_new_tokens=7)
    assert short.finish_reason == "length"
    assert short.text == expected_text(b"a")[:7]
    (stopped,) = model.generate("a", max_new_tokens=200, stop="闻啼")
    assert stopped.text == expected_text(b"a").split("闻啼")[0]
    assert [chunk.finish_reason for chunk in model.stream("a", max_new_tokens=8)][-1] == "length"


def test_chat_and_its_stream(model: RemoteModel) -> None:
    prompt = FakeModel().chat_ids(HELLO)
    (answer,) = model.chat(HELLO, max_new_tokens=200)
    assert answer.text == expected_text(prompt)
    assert answer.prompt_tokens == len(prompt)
    chunks = list(model.stream_chat(HELLO, max_new_tokens=200))
    assert "".join(chunk.text for chunk in chunks) == answer.text
    assert chunks[-1].prompt_tokens == len(prompt)


def test_ids_can_be_prompts_of_completions(model: RemoteModel) -> None:
    ids = list("山水".encode())
    assert [each.text for each in model.generate([ids, ids[:3]], max_new_tokens=200)] == [
        expected_text(ids),
        expected_text(ids[:3]),
    ]
    assert model.generate([]) == []


def test_what_the_server_says_about_the_model(model: RemoteModel) -> None:
    assert model.context_length == 400
    assert model.is_chat
    with pytest.raises(ModelError, match="no tokenizer"):
        model.tokenizer  # noqa: B018


def test_a_base_model_is_known_as_one() -> None:
    with running_server(FakeModel(chat=False)) as base:
        model = connect(f"openai:fake@{base}")
        assert not model.is_chat
        with pytest.raises(UsageError, match="no chat template"):
            model.chat(HELLO)
        assert model.generate("a", max_new_tokens=200)[0].text == expected_text(b"a")


def test_extensions_go_to_our_server(model: RemoteModel) -> None:
    options = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "ignore_eos": False}
    assert model.generate("a", temperature=1.0, max_new_tokens=200, **options)[0].text == expected_text(b"a")


def test_log_probabilities_of_a_text_and_of_new_tokens(model: RemoteModel) -> None:
    values = model.logprobs("é!").tolist()
    assert math.isnan(values[0])
    assert values[1:] == [-0xA9, -0x21]
    assert model.logprobs(list("é!".encode())).tolist()[1:] == values[1:]
    assert model.logprobs("春眠").shape == (6,)
    assert [token.token for token in model.score_text("é!")] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    (completion,) = model.generate("a", max_new_tokens=3, logprobs=0)
    assert isinstance(completion, RemoteCompletion) and completion.logprobs is not None
    assert [token.logprob for token in completion.logprobs] == [-float(byte) for byte in completion.text.encode()]
    (completion,) = model.chat(HELLO, logprobs=2)
    assert isinstance(completion, RemoteCompletion) and completion.logprobs is not None
    first = completion.logprobs[0]
    assert (first.token, first.logprob, first.alternatives) == ("[", -91.0, {"[": -91.0, "\\": -92.0})


def test_errors_of_our_server_become_errors_of_ours(own: str, model: RemoteModel) -> None:
    with pytest.raises(ModelError) as unknown:
        connect(f"openai:fakee@{own}").generate("a")
    assert unknown.value.fix == "did you mean 'fake'?"
    with pytest.raises(ContextExceeded, match="400 tokens"):
        model.generate("山" * 200)
    with pytest.raises(ContextExceeded):
        list(model.stream("山" * 200))
    with pytest.raises(UsageError, match="frequency_penalty"):
        model.generate("a", frequency_penalty=0.5)
    assert model.usage.retries == 0


def test_the_account_of_our_server(own: str) -> None:
    model = connect(f"openai:fake@{own}", prices=(2.0, 10.0))
    whole = model.generate(["山", "水"], max_new_tokens=4)
    list(model.stream("火", max_new_tokens=4))
    assert [completion.finish_reason for completion in whole] == ["length", "length"]
    usage = model.usage
    assert (usage.requests, usage.retries, usage.uncounted) == (3, 0, 0)
    assert (usage.prompt_tokens, usage.completion_tokens) == (9, 12)
    assert usage.cost == pytest.approx((9 * 2.0 + 12 * 10.0) / 1e6)
    assert "9 + 12 tokens" in model.describe() and "cost 0.000138" in model.describe()
    closed = model.stream("火", max_new_tokens=100)
    next(closed)
    closed.close()  # the answer will not be counted by the server, so the cost is not known any more
    assert usage.uncounted == 1
    assert usage.cost is None
    assert "at least" in model.describe()


def test_generate_in_the_terminal(own: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", f"openai:fake@{own}", "从前", "--max-new-tokens", "200", "--top-k", "5"]) == 0
    out, err = capsys.readouterr()
    assert out == "从前" + expected_text("从前".encode()) + "\n"
    assert "cost unknown" in err
    assert main(["generate", f"openai:fake@{own}", "a", "b", "--json", "--max-new-tokens", "4"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [each["index"] for each in result["completions"]] == [0, 1]
    assert result["usage"]["completion_tokens"] == 8
    assert main(["generate", f"openai:other@{own}", "never shown"]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert "known: fake" in err


def test_chat_in_the_terminal(own: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["你好", "x" * 500, *["again " * 10] * 5]  # one line that never fits, then a conversation that outgrows 400
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    command = ["chat", f"openai:fake@{own}", "--system", "简短", "--max-new-tokens", "20", "--json"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    turns = json.loads(out)["turns"]
    first = FakeModel().chat_ids([{"role": "system", "content": "简短"}, {"role": "user", "content": "你好"}])
    assert turns[0]["answer"].startswith(f"[{sum(first)}/0]")
    assert [turn["prompt"] for turn in turns] == [line for line in lines if len(line) < 500]
    assert "too long" in err
    assert "no longer fit" in err


def test_chat_with_a_base_model_continues_the_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("从前\n"))
    with running_server(FakeModel(chat=False)) as base:
        assert main(["chat", f"openai:fake@{base}"]) == 0
    assert capsys.readouterr().out == expected_text("从前".encode()) + "\n"


# Names, addresses, keys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai:gpt-4o", ("gpt-4o", "https://api.openai.com/v1")),
        ("openai:gpt-4o@https://a.example/v1/", ("gpt-4o", "https://a.example/v1/")),
        ("openai:ft:gpt:org::x@http://10.0.0.1", ("ft:gpt:org::x", "http://10.0.0.1")),
        ("openai:llama3.2:1b", ("llama3.2:1b", "https://api.openai.com/v1")),
        ("openai:m@20240620", ("m@20240620", "https://api.openai.com/v1")),
        ("openai:模型@http://[::1]:8000/v1", ("模型", "http://[::1]:8000/v1")),
    ],
)
def test_names(name: str, expected: tuple[str, str]) -> None:
    assert parse_name(name) == expected


@pytest.mark.parametrize(
    "name",
    ["openai:", "gpt-4o", "openai:@https://a.example", "openai:a b", "openai:m@localhost:8000", "openai:m@a.example",
     "openai:m@localhost", "openai:m@10.0.0.1", "openai:m@localhost/v1", "openai:m@ftp://a.example"],
)  # fmt: skip
def test_names_that_could_send_a_text_to_the_wrong_place(name: str) -> None:
    with pytest.raises(UsageError, match="openai:MODEL"):
        parse_name(name)


def test_the_base_address_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    assert str(connect("openai:m").http.url) == "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    "base",
    ["https://user:pass@a.example/v1", f"https://{KEY}@a.example", "https://a.example/v1?key=x", "https://",
     "https://a.example/#x", "https://a.example:port/v1"],
)  # fmt: skip
def test_addresses_with_secrets_or_nonsense_are_refused_and_not_repeated(base: str) -> None:
    with pytest.raises(UsageError) as caught:
        connect(f"openai:m@{base}")
    assert "pass" not in str(caught.value).replace("password", "")
    assert KEY not in str(caught.value) + caught.value.zh


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "10.1.2.3", "192.168.0.9", "[fd00::1]", "gpu-box", "my_vllm", "a.local"]
)
def test_plain_http_to_this_machine_and_private_networks(host: str) -> None:
    assert connect(f"openai:m@http://{host}:8000").http.url.scheme == "http"


@pytest.mark.parametrize(
    "host", ["example.com", "8.8.8.8", "134744072", "0x08080808", "127.0.0.1.example.com", "localhost.example.com",
             "[2001:4860:4860::8888]", "10.example.com"],
)  # fmt: skip
def test_plain_http_across_the_internet_needs_a_decision(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"openai:m@http://{host}/v1"
    with pytest.raises(UsageError, match="plain http") as caught:
        connect(name)
    assert "read the key" in caught.value.why
    assert connect(name, allow_http=True).http.url.scheme == "http"
    monkeypatch.setenv("HANMO_ALLOW_HTTP", "1")
    assert connect(name).http.url.scheme == "http"


def test_offline_means_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("api.example.com", "10.0.0.1", "gpu-box"):
        with pytest.raises(NetworkError, match="another machine"):
            connect(f"openai:m@https://{host}/v1", offline=True)
    monkeypatch.setenv("HANMO_OFFLINE", "1")
    with pytest.raises(NetworkError):
        connect("openai:gpt-4o")
    for host in ("127.0.0.1", "localhost", "[::1]"):
        connect(f"openai:m@http://{host}:1/v1")


@pytest.mark.parametrize(
    ("base", "key"),
    [
        ("https://api.openai.com/v1", "openai-key"),
        ("https://proxy.example/v1", "openai-key"),  # OPENAI_BASE_URL
        ("https://proxy.example:444/v1", "hanmo-key"),
        ("https://api.openai.com.evil.example/v1", "hanmo-key"),
        ("http://127.0.0.1:8000", "hanmo-key"),
    ],
)
def test_which_key_goes_where(base: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "openai-key")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://proxy.example/v1")
    monkeypatch.setenv("HANMO_API_KEY", "hanmo-key")
    assert sent_key(base) == f"Bearer {key}"
    monkeypatch.delenv("HANMO_API_KEY")
    assert sent_key(base) == ("Bearer openai-key" if key == "openai-key" else None)
    monkeypatch.setenv("HANMO_API_KEY", "hanmo-key")
    monkeypatch.delenv("OPENAI_API_KEY")
    assert sent_key(base) == "Bearer hanmo-key"


def sent_key(base: str) -> str | None:
    seen: list[httpx.Request] = []
    fake(f"openai:m@{base}", lambda request: seen.append(request) or reply("ok")).generate("a")
    value: str | None = seen[0].headers.get("authorization")
    return value


@pytest.mark.parametrize("key", ["sk 1", "sk-1\nX-Evil: 1", "密钥", "sk-\x00"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(UsageError) as caught:
        connect(PUBLIC, key=key)
    assert key not in str(caught.value)
    assert connect(PUBLIC, key=" sk-1\n").http.client.headers["authorization"] == "Bearer sk-1"  # a copied line break


@pytest.mark.parametrize("answer", ["401", "500", "stream", "drop"])
def test_the_key_is_never_shown(answer: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    def server(request: httpx.Request) -> httpx.Response:
        told = f"no: {request.headers['authorization']} {request.url}"
        if answer == "drop":
            raise httpx.ReadError(told)
        if answer == "stream":
            return events(sse({"error": {"message": told}}))
        return httpx.Response(int(answer), json={"error": {"message": told}})

    model = fake(PUBLIC, server, key=KEY)
    with pytest.raises(HanmoError) as caught:
        list(model.stream("a"))
    error = caught.value
    shown = [str(error), repr(error), error.zh, repr(model), model.describe(), str(model.http.client.headers)]
    shown += [caplog.text, repr(error.__cause__)]
    assert "no: Bearer ***" in str(error)
    assert not any(KEY in text for text in shown)


@pytest.mark.parametrize("host", ["public", "private"])
def test_proxies_are_for_public_hosts(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://user:hidden@proxy.example:3128")
    base = "https://api.example.com" if host == "public" else "https://192.168.0.2"
    client = connect(f"openai:m@{base}").http.client
    transport = client._transport_for_url(httpx.URL(base + "/v1/models"))
    assert (transport is not client._transport) == (host == "public")
    monkeypatch.setenv("HTTPS_PROXY", "gopher://hidden")
    with pytest.raises(UsageError) as caught:
        connect("openai:m@https://api.example.com")
    assert "hidden" not in str(caught.value)


def test_httpx_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ResourceError, match="httpx") as caught:
        connect(PUBLIC)
    assert "hanmo[remote]" in caught.value.fix and "hanmo[remote]" in caught.value.zh


# A fake endpoint -----------------------------------------------------------------------------------------------------

Server = Callable[[httpx.Request], httpx.Response]


class Clock:
    """Time that only passes by sleeping, or by a server that takes its time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def fake(name: str, server: Server, clock: Clock | None = None, **options: Any) -> RemoteModel:
    clock = clock or Clock()

    def unread(request: httpx.Request) -> httpx.Response:
        """The answer as it comes from a network: its body is still to be read."""
        answer = server(request)
        whole = Pieces([answer.content]) if answer.is_stream_consumed else answer.stream
        return httpx.Response(answer.status_code, headers=answer.headers, stream=whole)

    transport = httpx.MockTransport(unread)
    return RemoteModel(name, transport=transport, clock=clock, sleep=clock.sleep, jitter=lambda: 1.0, **options)


def reply(text: Any, **extra: Any) -> httpx.Response:
    choice = {"index": 0, "text": text, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return httpx.Response(200, json={"choices": [choice], "usage": usage, **extra})


def problem(status: int, message: str, code: str | None = None, param: str | None = None) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message, "type": "t", "param": param, "code": code}})


def sse(*values: Any, done: bool = False) -> bytes:
    lines = [f"data: {json.dumps(value, ensure_ascii=False)}\n\n" for value in values]
    return "".join([*lines, "data: [DONE]\n\n" if done else ""]).encode()


def delta(text: Any = None, reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": text}, "text": text, "finish_reason": reason}]}


class Pieces(httpx.SyncByteStream):
    """A body in given pieces, with an error at its end."""

    def __init__(self, pieces: list[bytes], error: Exception | None = None) -> None:
        self.pieces, self.error, self.closed = pieces, error, False

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.closed = True


def events(body: bytes | Pieces) -> httpx.Response:
    content: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"stream": body}
    return httpx.Response(200, headers={"content-type": "text/event-stream; charset=utf-8"}, **content)


def texts(model: RemoteModel, **options: Any) -> list[str]:
    return [chunk.text for chunk in model.stream("a", **options)]


# Retries -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [408, 409, 429, 500, 502, 503, 529, "connect", "read", "timeout"])
@pytest.mark.parametrize("how", ["generate", "stream"])
def test_passing_troubles_are_tried_again_with_growing_pauses(trouble: int | str, how: str) -> None:
    calls = 0
    raised: dict[Any, Exception] = {
        "connect": httpx.ConnectError("refused"),
        "read": httpx.RemoteProtocolError("closed"),
        "timeout": httpx.ReadTimeout("slow"),
    }

    def server(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls <= 3:
            if trouble in raised:
                raise raised[trouble]
            return problem(int(trouble), "busy")
        return events(sse(delta("好", "stop"), done=True)) if b'"stream":true' in request.content else reply("好")

    clock = Clock()
    model = fake(PUBLIC, server, clock)
    text = model.generate("a")[0].text if how == "generate" else "".join(texts(model))
    assert text == "好"
    assert clock.pauses == [0.5, 1.0, 2.0]
    assert (model.usage.requests, model.usage.retries) == (1, 3)
    assert model.usage.seconds == 3.5


def test_retries_end_and_the_reason_is_told() -> None:
    clock = Clock()
    model = fake(PUBLIC, lambda _: problem(503, "no capacity\x1b[31m\n now"), clock, max_retries=2)
    with pytest.raises(NetworkError, match=r"\(503\): no capacity \[31m now") as caught:
        model.generate("a")
    assert caught.value.zh and "no capacity" in caught.value.zh
    assert len(clock.pauses) == 2
    assert caught.value.where == PUBLIC


def test_jitter_shortens_a_pause_by_up_to_half() -> None:
    clock = Clock()
    model = fake(PUBLIC, lambda _: problem(500, "x"), clock, max_retries=8)
    model.http.jitter = lambda: 0.0
    with pytest.raises(NetworkError):
        model.generate("a")
    assert clock.pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]


@pytest.mark.parametrize(
    ("header", "pause"), [("7", 7.0), ("0", 0.5), ("3600", 60.0), ("1e9", 0.5), ("Wed, 21 Oct 2099 07:28:00 GMT", 60.0)]
)
def test_retry_after_is_honoured_up_to_a_minute(header: str, pause: float) -> None:
    answers = [httpx.Response(429, headers={"retry-after": header}), reply("ok")]
    clock = Clock()
    assert fake(PUBLIC, lambda _: answers.pop(0), clock).generate("a")[0].text == "ok"
    assert clock.pauses == [pause]


def test_the_deadline_holds_for_all_attempts_together() -> None:
    clock = Clock()

    def server(_: httpx.Request) -> httpx.Response:
        clock.now += 20
        return problem(500, "x")

    with pytest.raises(NetworkError):
        fake(PUBLIC, server, clock, deadline=50.0, max_retries=100).generate("a")
    assert clock.now <= 1000 + 50 + 20
    assert len(clock.pauses) == 2


def test_a_body_that_never_ends_meets_the_deadline() -> None:
    clock = Clock()

    class Drip(Pieces):
        def __iter__(self) -> Iterator[bytes]:
            while True:
                clock.now += 1
                yield b": wait\n"

    drip = Drip([])
    with pytest.raises(NetworkError, match="after 30 seconds"):
        texts(fake(PUBLIC, lambda _: events(drip), clock, deadline=30.0))
    assert drip.closed


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, None, UsageError),
        (401, "invalid_api_key", UsageError),
        (403, None, UsageError),
        (402, None, NetworkError),
        (404, "model_not_found", ModelError),
        (422, None, UsageError),
        (429, "insufficient_quota", NetworkError),  # more money, not more time, would help
        (501, None, UsageError),
        (400, "context_length_exceeded", ContextExceeded),
    ],
)
def test_lasting_refusals_are_told_at_once(status: int, code: str | None, kind: type[HanmoError]) -> None:
    clock = Clock()
    model = fake(PUBLIC, lambda _: problem(status, "the reason 原因", code), clock, endpoint="chat")
    with pytest.raises(kind, match="the reason 原因") as caught:
        model.generate("a")
    assert type(caught.value) is kind
    assert caught.value.fix and "原因" in caught.value.zh
    assert clock.pauses == []


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"error": "plain words"}', "plain words"),
        (b'{"message": "m"}', ": m"),
        (b'{"detail": [{"loc": ["body", "n"], "msg": "bad"}]}', '"msg": "bad"'),
        (b"just text", "just text"),
        (b"<html><body>nginx</body></html>", "Bad Request"),
        (b"", "Bad Request"),
        (b"\xff\xfe", "\N{REPLACEMENT CHARACTER}"),
        (b"x" * 1_000_000, "x" * 499 + "…"),
        (b'{"error": {"message": null, "code": 7}}', "Bad Request"),
    ],
)
def test_error_bodies_of_any_form_are_told_and_bounded(body: bytes, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        fake(PUBLIC, lambda _: httpx.Response(400, content=body)).generate("a")
    assert told in caught.value.what
    assert len(caught.value.what) < 700


def test_a_redirect_is_refused_and_nothing_is_sent_there() -> None:
    hosts: list[str] = []

    def server(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        return httpx.Response(307, headers={"location": "https://evil.example/v1?x=y"})

    with pytest.raises(NetworkError, match=r"redirects to https://evil\.example/v1,"):
        fake(PUBLIC, server, key=KEY).generate("a")
    assert hosts == ["api.example.com"]


def test_a_certificate_that_is_wrong_is_not_tried_again() -> None:
    def server(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")

    clock = Clock()
    with pytest.raises(NetworkError, match="self-signed"):
        fake(PUBLIC, server, clock).generate("a")
    assert clock.pauses == []


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"{", b'"text"', b"<html>", b"\xff", b'{"choices": []}', b'{"choices": null}', b"{}",
        b'{"choices": [1]}', b'{"choices": [{}]}', b'{"choices": [{"text": 5}]}', b"[" * 100_000,
        b'{"n":' + b"9" * 5000,
        b'{"choices": [{"text": "a", "index": 3}]}', b'{"choices": [{"text": "a"}, {"text": "b", "index": 1}]}',
        b'{"choices": [{"message": {"content": ["a"]}}]}', b'{"choices": [{"text": "a", "finish_reason": "error"}]}',
    ],
)  # fmt: skip
def test_malformed_answers_are_refused_with_a_reason(body: bytes) -> None:
    with pytest.raises((ModelError, NetworkError)) as caught:
        fake(PUBLIC, lambda _: httpx.Response(200, content=body)).generate("a")
    assert caught.value.where == PUBLIC and caught.value.fix and caught.value.zh


def test_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_BODY", 1000)
    body = Pieces([b"x" * 100] * 1_000_000)
    with pytest.raises(ModelError, match="larger than 1000 bytes"):
        fake(PUBLIC, lambda _: httpx.Response(200, stream=body)).generate("a")
    assert body.closed
    monkeypatch.setattr(endpoint, "MAX_LINE", 1000)
    with pytest.raises(ModelError, match="longer than 1000 bytes"):
        texts(fake(PUBLIC, lambda _: events(Pieces([b"data: " + b"x" * 100] * 1000))))
    squeezed = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=Pieces([]))
    with pytest.raises(ModelError, match="compressed"):
        fake(PUBLIC, lambda _: squeezed).generate("a")


@pytest.mark.parametrize(
    ("word", "reason"),
    [("stop", "stop"), ("eos_token", "stop"), ("content_filter", "stop"), ("tool_calls", "stop"), (None, "stop"),
     ("length", "length"), ("max_tokens", "length"), ("model_length", "length"), (["x"], "stop")],
)  # fmt: skip
def test_words_for_the_end(word: Any, reason: str) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": word}
    model = fake(PUBLIC, lambda _: httpx.Response(200, json={"choices": [choice]}))
    (completion,) = model.chat(HELLO)
    assert isinstance(completion, RemoteCompletion)
    assert (completion.text, completion.finish_reason) == ("", reason)
    assert completion.reported_reason == (word if isinstance(word, str) else "")
    assert completion.prompt_tokens == 0 and model.usage.uncounted == 1


def test_surrogates_in_an_answer_become_characters() -> None:
    raw = rb'{"choices": [{"text": "a\ud83c\udf38b\ud83c", "finish_reason": "stop"}]}'
    assert fake(PUBLIC, lambda _: httpx.Response(200, content=raw)).generate("a")[0].text == "a🌸b\ufffd"
    with pytest.raises(DataError, match="U\\+D83C"):
        fake(PUBLIC, lambda _: reply("x")).generate("a\ud83c")


@pytest.mark.parametrize(
    "given",
    [
        {"tokens": ["好", "!"], "token_logprobs": [-1.5, -0.25], "top_logprobs": [{"好": -1.5, "坏": -2}, None]},
        {"content": [{"token": "好", "logprob": -1.5, "top_logprobs": [{"token": "坏", "logprob": -2}]},
                     {"token": "!", "logprob": -0.25, "top_logprobs": []}]},
    ],
)  # fmt: skip
def test_log_probabilities_in_either_form(given: dict[str, Any]) -> None:
    sent: list[dict[str, Any]] = []

    def server(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        choice = {"index": 0, "text": "好!", "message": {"content": "好!"}, "finish_reason": "stop", "logprobs": given}
        return httpx.Response(200, json={"choices": [choice]})

    model = fake(PUBLIC, server)
    for (completion,) in (model.generate("a", logprobs=2), model.chat(HELLO, logprobs=2)):
        assert isinstance(completion, RemoteCompletion) and completion.logprobs is not None
        assert [(token.token, token.logprob) for token in completion.logprobs] == [("好", -1.5), ("!", -0.25)]
        assert completion.logprobs[0].alternatives["坏"] == -2
    assert sent[0]["logprobs"] == 2
    assert (sent[1]["logprobs"], sent[1]["top_logprobs"]) == (True, 2)


@pytest.mark.parametrize(
    "given",
    [None, {"tokens": ["a"], "token_logprobs": [0.5]}, {"tokens": ["a"], "token_logprobs": []}, {"tokens": ["a"]},
     {"content": [{"token": "a", "logprob": "x"}]}, {"content": [5]}, {"tokens": 5, "token_logprobs": 5},
     {"tokens": ["a"], "token_logprobs": [True]}, {"tokens": ["a"], "token_logprobs": [-(10**400)]}],
)  # fmt: skip
def test_log_probabilities_that_are_none_are_refused(given: Any) -> None:
    model = fake(PUBLIC, lambda _: httpx.Response(200, json={"choices": [{"text": "a", "logprobs": given}]}))
    with pytest.raises(ModelError, match="log-probabilities"):
        model.generate("a", logprobs=1)
    with pytest.raises(UsageError, match="stream"):
        model.stream("a", logprobs=1)


def test_a_text_is_scored_only_where_the_answer_repeats_it() -> None:
    scores = {"tokens": ["你", "好", "!"], "token_logprobs": [None, -1.0, -2.0], "text_offset": [0, 1, 2]}

    def server(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if body["max_tokens"] == 0:
            return problem(400, "max_tokens must be at least 1", param="max_tokens")
        return httpx.Response(200, json={"choices": [{"text": "你好!", "logprobs": scores}]})

    assert fake(PUBLIC, server).logprobs("你好").tolist()[1:] == [-1.0]  # the token that was written is cut off
    for answer in (reply("!"), problem(400, "Only no echo is supported"), problem(404, "no such route")):
        with pytest.raises(ModelError, match="no log-probabilities of a given text"):
            fake(PUBLIC, lambda _, answer=answer: answer).logprobs("你好")
    with pytest.raises(ModelError, match="of a given text"):
        fake(PUBLIC, lambda _: reply("never asked"), endpoint="chat").logprobs("你好")
    with pytest.raises(UsageError, match="401"):
        fake(PUBLIC, lambda _: problem(401, "key")).logprobs("你好")


# Options and routes --------------------------------------------------------------------------------------------------


def recorded(model_list: Any = None) -> tuple[Server, list[tuple[str, dict[str, Any]]]]:
    sent: list[tuple[str, dict[str, Any]]] = []

    def server(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(404) if model_list is None else httpx.Response(200, json=model_list)
        sent.append((request.url.path, json.loads(request.content)))
        return reply("ok")

    return server, sent


def test_options_under_the_names_of_the_api() -> None:
    server, sent = recorded()
    model = fake(PUBLIC, server)
    options = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["。"], "presence_penalty": -1.0, "top_k": 0}
    model.generate("春", max_new_tokens=9, frequency_penalty=1.5, **options)
    common = {"model": "m", "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["。"]}
    common |= {"frequency_penalty": 1.5, "presence_penalty": -1.0}
    assert sent[-1] == ("/v1/completions", {**common, "prompt": "春", "max_tokens": 9})
    model.chat(HELLO)
    assert sent[-1][1] == {"model": "m", "temperature": 0.0, "messages": HELLO, "max_tokens": 128}
    model.generate("a", temperature=0.0, top_p=0.5, top_k=3)  # the likeliest token needs no narrower choice
    assert sent[-1][1].keys() == {"model", "temperature", "prompt", "max_tokens"}
    for bad in ({"presence_penalty": 3}, {"logprobs": -1}, {"temprature": 1}, {"n": 0}):
        with pytest.raises(UsageError):
            model.generate("a", **bad)


@pytest.mark.parametrize("owner", ["openai", "vllm", "hanmo", "llamacpp"])
@pytest.mark.parametrize(
    "option", [{"top_k": 5}, {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}, {"ignore_eos": True}]
)
def test_extensions_are_sent_to_servers_that_have_them(owner: str, option: dict[str, Any]) -> None:
    server, sent = recorded({"data": [{"id": "other"}, {"id": "m", "owned_by": owner}]})
    (name, value), = option.items()  # fmt: skip
    lacks = {"hanmo": "", "vllm": "no_repeat_ngram_size", "llamacpp": "repetition_penalty no_repeat_ngram_size"}
    model = fake(PUBLIC, server)
    if owner in lacks and name not in lacks[owner].split():
        model.generate("a", temperature=1.0, **option)
        assert sent[-1][1][name] == value
    else:
        with pytest.raises(UsageError, match=f"no option '{name}'"):
            model.stream("a", temperature=1.0, **option)
        assert sent == []
    forced = fake(PUBLIC, server, extensions=[name])
    forced.generate("a", temperature=1.0, **option)
    assert sent[-1][1][name] == value
    with pytest.raises(UsageError, match="did you mean 'top_k'"):
        fake(PUBLIC, server, extensions=["topk"])


@pytest.mark.parametrize("how", ["generate", "stream"])
@pytest.mark.parametrize(
    "refusal",
    [
        problem(404, "This is a chat model and not supported in the v1/completions endpoint."),
        problem(400, "this chat model has no completions"),
        httpx.Response(404, text="404 page not found"),
        httpx.Response(405),
        problem(501, "not implemented"),
    ],
)
def test_a_text_goes_to_chat_where_there_are_no_completions_and_that_is_remembered(
    refusal: httpx.Response, how: str
) -> None:
    paths: list[str] = []

    def server(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        if request.url.path == "/v1/completions":
            return httpx.Response(refusal.status_code, content=refusal.content)
        body = json.loads(request.content)
        assert body["messages"] == [{"role": "user", "content": "a"}]
        return events(sse(delta("好", "stop"), done=True)) if body.get("stream") else reply("好")

    model = fake(PUBLIC, server)
    for _ in range(2):
        assert (model.generate("a")[0].text if how == "generate" else "".join(texts(model))) == "好"
    assert paths == ["/v1/completions", *["/v1/chat/completions"] * 2]
    assert model.route == "chat"
    with pytest.raises(UsageError, match="token ids"):
        model.generate([[1, 2]])


def test_an_unknown_model_is_not_asked_twice_and_a_set_route_is_kept() -> None:
    paths: list[str] = []

    def server(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        return problem(404, "no model m", "model_not_found")

    for route, path in (("auto", "completions"), ("completions", "completions"), ("chat", "chat/completions")):
        paths.clear()
        with pytest.raises(ModelError, match="no model m"):
            fake(PUBLIC, server, endpoint=route).generate("a")
        assert paths == [f"/v1/{path}", "/v1/models"]
    with pytest.raises(UsageError, match="endpoint"):
        fake(PUBLIC, server, endpoint="text")


def test_newer_models_get_the_newer_name_of_the_limit() -> None:
    sent: list[dict[str, Any]] = []

    def server(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        if "max_tokens" in sent[-1]:
            told = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            return problem(400, told, "unsupported_parameter", "max_tokens")
        return reply("ok")

    model = fake(PUBLIC, server)
    for _ in range(2):
        assert model.chat(HELLO, max_new_tokens=5)[0].text == "ok"
    assert ["max_completion_tokens" in body for body in sent] == [False, True, True]
    assert sent[-1]["max_completion_tokens"] == 5


def test_servers_without_stream_options() -> None:
    sent: list[dict[str, Any]] = []

    def server(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        if "stream_options" in sent[-1]:
            return problem(422, "extra fields not permitted: stream_options")
        return events(sse(delta("ok", "stop"), done=True))

    model = fake(PUBLIC, server)
    assert "".join(texts(model)) == "".join(texts(model)) == "ok"
    assert len(sent) == 3
    assert model.usage.uncounted == 2 and model.usage.cost is None


@pytest.mark.parametrize(
    ("card", "length"),
    [({"context_length": 8}, 8), ({"max_model_len": 9}, 9), ({"meta": {"n_ctx_train": 10}}, 10),
     ({"context_length": "big"}, None), ({"context_length": True, "meta": 3}, None), ({}, None)],
)  # fmt: skip
def test_the_context_length_as_several_servers_tell_it(card: dict[str, Any], length: int | None) -> None:
    server, _ = recorded({"data": [{"id": "m", **card}, "junk"]})
    assert fake(PUBLIC, server).context_length == length
    assert fake(PUBLIC, server, context_length=77).context_length == (length or 77)


def test_no_model_list_is_no_error_but_no_connection_is() -> None:
    asked = 0

    def server(_: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        return httpx.Response(404)

    model = fake(PUBLIC, server, context_length=5)
    assert model.context_length == model.context_length == 5
    assert model.is_chat and asked == 1
    assert fake(PUBLIC, lambda _: httpx.Response(200, text="<html>")).context_length is None
    with pytest.raises(NetworkError):
        fake(PUBLIC, lambda _: httpx.Response(503)).context_length  # noqa: B018


@pytest.mark.parametrize("messages", [[], ["hi"], [{"role": "user"}], [{"role": "user", "content": None}]])
def test_messages_are_checked_before_they_are_sent(messages: Any) -> None:
    with pytest.raises(UsageError):
        fake(PUBLIC, lambda _: pytest.fail("was sent")).chat(messages)


# Several prompts -----------------------------------------------------------------------------------------------------


def test_prompts_are_sent_side_by_side_and_answered_in_order() -> None:
    lock, running, most = threading.Lock(), 0, 0
    together = threading.Barrier(3, timeout=20)

    def server(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        prompt = json.loads(request.content)["prompt"]
        with lock:
            running += 1
            most = max(most, running)
        if prompt != "0":
            together.wait()  # passes only when three requests are on their way
        with lock:
            running -= 1
        return reply(f"answer to {prompt}")

    model = fake(PUBLIC, server, max_parallel=3)
    completions = model.generate([str(number) for number in range(10)])
    assert [completion.text for completion in completions] == [f"answer to {number}" for number in range(10)]
    assert [completion.index for completion in completions] == list(range(10))
    assert most == 3
    assert (model.usage.requests, model.usage.prompt_tokens, model.usage.completion_tokens) == (10, 30, 20)


def test_after_an_error_nothing_more_is_begun() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        time.sleep(0.001)
        return number

    with pytest.raises(ValueError, match="three"):
        in_parallel(work, range(10_000), 2)
    assert len(begun) < 10_000
    assert in_parallel(lambda number: number * number, range(5), 8) == [0, 1, 4, 9, 16]
    assert in_parallel(work, [], 2) == []


def test_counters_lose_nothing_between_threads() -> None:
    usage = Usage(prices=(1.0, 2.0))

    def count(_: int) -> None:
        for _ in range(500):
            usage.add(requests=1, prompt_tokens=2, completion_tokens=3)

    in_parallel(count, range(8), 8)
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (4000, 8000, 12000)
    assert usage.cost == pytest.approx(0.032)


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", "-1,2", "nan,1", "inf,1", ","])
def test_prices_that_are_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANMO_PRICES", text)
    with pytest.raises(UsageError, match="two numbers"):
        connect(PUBLIC)


def test_prices_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fake(PUBLIC, lambda _: reply("x")).usage.cost is None  # never invented
    monkeypatch.setenv("HANMO_PRICES", "2.5, 10")
    monkeypatch.setenv("HANMO_LANG", "zh")
    model = fake(PUBLIC, lambda _: reply("x"))
    model.generate("a")
    assert model.usage.as_dict()["cost"] == pytest.approx((3 * 2.5 + 2 * 10) / 1e6)
    assert "3 + 2 个词元" in model.describe()


# Streams -------------------------------------------------------------------------------------------------------------

STORY = "春眠不觉晓，🌸 处处闻啼鸟。\n"


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 2000), max_size=40), ending=st.sampled_from(["\n", "\r\n", "\r"]))
def test_a_stream_is_the_same_wherever_its_bytes_are_cut(cuts: list[int], ending: str) -> None:
    parts = [delta(character) for character in STORY] + [delta(None, "stop")]
    body = b": ping\n\nevent: chunk\nid: 1\n" + sse(*parts, {"choices": [], "usage": {"prompt_tokens": 4}}, done=True)
    body = body.replace(b"\n", ending.encode())
    edges = sorted({0, len(body), *(cut for cut in cuts if cut < len(body))})
    pieces = [body[start:stop] for start, stop in itertools.pairwise(edges)]
    model = fake(PUBLIC, lambda _: events(Pieces(pieces)))
    chunks = list(model.stream("a"))
    assert "".join(chunk.text for chunk in chunks) == STORY
    assert (chunks[-1].finish_reason, chunks[-1].prompt_tokens) == ("stop", 4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("dat: \n\rx")), max_size=8))
def test_lines_do_not_depend_on_where_they_are_cut(pieces: list[str]) -> None:
    whole = "".join(pieces).encode()
    cut = list(event_data(piece.encode() for piece in pieces))
    assert cut == list(event_data([whole])) == list(event_data(bytes([byte]) for byte in whole))


def test_a_character_cut_into_two_surrogates_is_one_character() -> None:
    parts = [b'{"choices":[{"text":"a\\ud83c"}]}', b'{"choices":[{"text":"\\udf38b\\ud83c"}]}', b"[DONE]"]
    body = b"".join(b"data: " + part + b"\n\n" for part in parts)
    assert "".join(texts(fake(PUBLIC, lambda _: events(body)))) == "a🌸b\ufffd"


@pytest.mark.parametrize(
    "body",
    [
        sse(delta("好"), delta(None, "stop")),  # no [DONE], but the text is complete
        sse(delta("好", "stop")).rstrip(b"\n"),  # not even the empty line
        sse(delta("好"), done=True),  # [DONE] without a reason
        sse({"choices": []}, {"id": "x"}, {"choices": None}, delta(""), delta("好", "stop"), done=True),
        sse(delta("好", "stop"), done=True) + b"data: {not json after the end\n\n",
        sse({"choices": [{"delta": {"role": "assistant", "content": None}}]}, delta("好", "stop"), done=True),
    ],
)
def test_streams_that_are_complete_in_their_own_way(body: bytes) -> None:
    chunks = list(fake(PUBLIC, lambda _: events(body)).stream("a"))
    assert "".join(chunk.text for chunk in chunks) == "好"
    assert [chunk.finish_reason for chunk in chunks][-1] == "stop"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


def test_a_connection_that_ends_badly_after_the_text_is_complete() -> None:
    body = Pieces([sse(delta("好", "length"))], httpx.ReadTimeout("waiting for [DONE]"))
    chunks = list(fake(PUBLIC, lambda _: events(body)).stream("a"))
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("好", None), ("", "length")]
    assert body.closed


@pytest.mark.parametrize(
    ("body", "kind", "told"),
    [
        (sse(delta("好")), NetworkError, "broke off"),
        (b"", NetworkError, "broke off"),
        (sse(done=True), ModelError, "0 choices instead of 1"),
        (sse(delta("好"), {"error": {"message": "overloaded 过载", "code": 503}}), NetworkError, "过载"),
        (sse(delta("好"), {"error": {"message": "context length", "code": 400}}), ContextExceeded, "context length"),
        (sse(delta("好"), {"error": "boom"}), NetworkError, "boom"),
        (sse(delta("好"), delta("x", index=4)), ModelError, "not asked for"),
        (sse(delta("好"), {"choices": ["x"]}), ModelError, "not asked for"),
        (sse(delta("好"), delta(["x"])), ModelError, "not a string"),
        (sse(delta("好"), delta(None, "error")), NetworkError, "broke the answer off"),
        (sse(delta("好")) + b"data: {broken\n\n", ModelError, "not a JSON object"),
        (sse(delta("好")) + b"data: \xff\xfe\n\n", ModelError, "not a JSON object"),
        (Pieces([sse(delta("好"))], httpx.ReadError("reset")), NetworkError, "reset"),
    ],
)
def test_streams_that_fail_are_told_and_never_begun_again(body: Any, kind: type[HanmoError], told: str) -> None:
    calls = 0

    def server(_: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        return events(body)

    seen: list[str] = []
    model = fake(PUBLIC, server)
    with pytest.raises(kind, match=told):
        seen.extend(chunk.text for chunk in model.stream("a"))
    assert calls == 1 and model.usage.retries == 0
    assert "".join(seen) == ("" if body in (b"", sse(done=True)) else "好")  # once, not once per attempt
    assert model.usage.uncounted == (0 if body == b"" else 1)


def test_a_stream_that_fails_before_its_first_word_is_begun_again() -> None:
    answers: list[Any] = [
        Pieces([b": waiting\n\n"], httpx.ReadError("reset")),
        sse({"error": {"message": "overloaded", "type": "overloaded_error"}}),
        sse(delta("好", "stop"), done=True),
    ]
    clock = Clock()
    assert "".join(texts(fake(PUBLIC, lambda _: events(answers.pop(0)), clock))) == "好"
    assert clock.pauses == [0.5, 1.0]


def test_a_stream_that_was_answered_at_once() -> None:
    chunks = list(fake(PUBLIC, lambda _: reply("好")).stream("a"))
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("好", None), ("", "stop")]
    assert chunks[-1].prompt_tokens == 3


def test_choices_of_a_stream_and_a_server_that_gives_fewer() -> None:
    body = sse(delta("a", index=1), delta("b", index=0), delta("c", "stop", 1), delta(None, "length", 0), done=True)
    chunks = list(fake(PUBLIC, lambda _: events(body)).stream("x", n=2))
    joined = ["".join(chunk.text for chunk in chunks if chunk.choice == choice) for choice in range(2)]
    assert joined == ["b", "ac"]
    assert [(chunk.choice, chunk.finish_reason) for chunk in chunks[-2:]] == [(0, "length"), (1, "stop")]
    with pytest.raises(ModelError, match="1 choices instead of 2"):
        list(fake(PUBLIC, lambda _: events(sse(delta("a", "stop"), done=True))).stream("x", n=2))
    with pytest.raises(ModelError, match="1 choices instead of 2"):
        fake(PUBLIC, lambda _: reply("a")).generate("x", n=2)


def test_closing_a_stream_closes_the_connection() -> None:
    body = Pieces([sse(delta("好"))] * 1000)
    stream = fake(PUBLIC, lambda _: events(body)).stream("a")
    assert next(stream).text == "好"
    stream.close()  # type: ignore[attr-defined]
    assert body.closed


# Real sockets --------------------------------------------------------------------------------------------------------


class Socket:
    """Answers each connection to a port of 127.0.0.1 with the next of some byte strings, however malformed."""

    def __init__(self, answers: list[bytes]) -> None:
        self.requests: list[bytes] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.name = f"openai:m@http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self.serve, args=(answers,), daemon=True).start()

    def serve(self, answers: list[bytes]) -> None:
        for answer in answers:
            connection, _ = self.listener.accept()
            with connection:
                connection.settimeout(10)
                received = b""
                while b"\r\n\r\n" not in received:
                    received += connection.recv(65536)
                head, _, rest = received.partition(b"\r\n\r\n")
                fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
                length = int(fields[b"content-length"])
                while len(rest) < length:
                    rest += connection.recv(65536)
                self.requests.append(head + b"\r\n\r\n" + rest)
                for start in range(0, len(answer), 7):
                    connection.sendall(answer[start : start + 7])
        self.listener.close()


def http(status: str, body: bytes, length: int | None = None, kind: str = "application/json") -> bytes:
    head = [
        f"HTTP/1.1 {status}",
        f"content-type: {kind}",
        f"content-length: {length or len(body)}",
        "connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def test_over_real_sockets_troubles_and_then_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANMO_API_KEY", KEY)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # nobody there: a request that took it would fail
    good = json.dumps({"choices": [{"text": "春眠", "finish_reason": "stop"}]}).encode()
    server = Socket([
        b"",  # closed without a word
        b"no http at all\r\n\r\n",
        http("503 Service Unavailable", b"busy"),
        http("200 OK", good, len(good) + 50),  # cut off
        http("200 OK", good),
    ])  # fmt: skip
    pauses: list[float] = []
    model = connect(server.name, sleep=pauses.append)
    assert model.generate("从前 🌸")[0].text == "春眠"
    assert len(pauses) == 4
    head, _, body = server.requests[-1].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1")
    assert f"Authorization: Bearer {KEY}".encode() in head
    assert json.loads(body)["prompt"] == "从前 🌸"


def test_over_real_sockets_a_stream_cut_in_the_middle_of_a_character() -> None:
    body = sse(delta("春"), delta("眠", "stop"), done=True)
    whole = http("200 OK", body, kind="text/event-stream")
    half = http("200 OK", body, kind="text/event-stream")[: -len(body) + len(sse(delta("春"))) + 60]
    server = Socket([whole, half])
    model = connect(server.name)
    assert "".join(texts(model)) == "春眠"
    stream = model.stream("a")
    assert next(stream).text == "春"
    with pytest.raises(NetworkError):
        list(stream)
    assert len(server.requests) == 2


def test_over_real_sockets_silence_ends_at_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        model = connect(f"openai:m@http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.05, max_retries=1)
        model.http.sleep = lambda _: None
        with pytest.raises(NetworkError, match="ReadTimeout"):
            model.generate("a")
        assert model.usage.retries == 1
    with pytest.raises(NetworkError, match=r"refused|Connect"):  # and now nobody listens
        model.generate("a")


def test_importing_the_address_rules_is_light() -> None:
    assert "httpx" not in vars(address) and "httpx" not in vars(endpoint)
