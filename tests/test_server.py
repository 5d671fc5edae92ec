"""The server: OpenAI's interface through OpenAI's own client, its limits, and that no request harms another."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from hanmo.cli.main import main
from hanmo.errors import ResourceError, UsageError
from hanmo.inference.language_model import LanguageModel
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.serving import server
from hanmo.serving.app import create_app
from hanmo.serving.problems import ApiError
from hanmo.serving.runner import Runner
from hanmo.serving.schema import CompletionRequest, parse_request
from hanmo.serving.server import listen
from hanmo.text.training import train_bpe

from .serving_fakes import EOS, FakeModel, expected_text, running_server

CHAT = [{"role": "user", "content": "你好 <|im_end|> 🌸"}]


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture(scope="module")
def address(model: FakeModel) -> Iterator[str]:
    with running_server(model) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def web() -> Iterator[TestClient]:
    with TestClient(create_app(FakeModel(), "fake"), base_url="http://127.0.0.1:8000") as web:
        yield web


def post(web: TestClient, body: Any, route: str = "completions", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    return web.post(f"/v1/{route}", content=content, headers={"content-type": "application/json", **headers})


def problem(response: Any, status: int = 400) -> dict[str, Any]:
    """The error of an answer, after checking its shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    return error


# OpenAI's client -----------------------------------------------------------------------------------------------------


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "fake" and client.models.retrieve("fake") == model
    assert model.model_extra == {"context_length": 400, "writes": True, "chat": True, "tasks": []}
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_chat(client: openai.OpenAI, model: FakeModel) -> None:
    answer = client.chat.completions.create(model="fake", messages=CHAT)
    ids = model.chat_ids(CHAT)
    text = expected_text(ids)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(text.encode()) + 1  # and the end token
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, model: FakeModel) -> None:
    chunks = list(client.chat.completions.create(model="fake", messages=CHAT, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected_text(model.chat_ids(CHAT))
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_in_a_stream_comes_last_and_only_when_asked(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="fake", messages=CHAT, stream=True, stream_options=options))
    whole = client.chat.completions.create(model="fake", messages=CHAT)
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    options = {"continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(model="fake", messages=CHAT, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == whole.usage.completion_tokens


def test_the_wire_format_of_a_stream(web: TestClient) -> None:
    body = {
        "model": "fake",
        "prompt": "从前",
        "stream": True,
        "max_tokens": 8,
        "stream_options": {"include_usage": True},
    }
    response = post(web, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    events = response.text.split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_completion_with_openai_defaults(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="从前")
    assert answer.choices[0].text == expected_text("从前".encode()).encode()[:16].decode("utf-8", "replace")
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 16)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(client: openai.OpenAI, stream: bool) -> None:
    prompts = ["山", "水", "a 🌸"]
    answer = client.completions.create(model="fake", prompt=prompts, n=2, max_tokens=200, stream=stream)
    texts = [""] * 6
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == [expected_text(prompt.encode(), choice) for prompt in prompts for choice in range(2)]
    if not stream:
        assert answer.usage.prompt_tokens == sum(len(prompt.encode()) for prompt in prompts)


def test_prompts_as_ids(client: openai.OpenAI) -> None:
    ids = list("山水".encode())
    by_text = client.completions.create(model="fake", prompt="山水", max_tokens=100)
    for prompt in (ids, [ids]):
        answer = client.completions.create(model="fake", prompt=prompt, max_tokens=100)
        assert (answer.choices, answer.usage) == (by_text.choices, by_text.usage)


@pytest.mark.parametrize("stop", ["闻啼", ["nothing", "闻啼", "鸟"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_cut(client: openai.OpenAI, stop: Any, stream: bool) -> None:
    answer = client.completions.create(model="fake", prompt="a", stop=stop, max_tokens=200, stream=stream)
    parts = list(answer) if stream else [answer]
    assert "".join(part.choices[0].text for part in parts) == expected_text(b"a").split("闻啼")[0]
    assert parts[-1].choices[0].finish_reason == "stop"


def test_echo_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="é!", max_tokens=2, echo=True, logprobs=0).choices[0]
    assert answer.text == "é!" + expected_text("é!".encode())[:2]
    tokens = "é!".encode() + expected_text("é!".encode())[:2].encode()
    assert answer.logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9", "!", *answer.text[2:]]
    assert answer.logprobs.token_logprobs == [None, *(-float(id) for id in tokens[1:])]
    assert answer.logprobs.text_offset == [0, 0, 1, 2, 3]
    only_prompt = client.completions.create(model="fake", prompt="é!", max_tokens=0, echo=True, logprobs=0)
    assert only_prompt.choices[0].text == "é!" and only_prompt.usage.completion_tokens == 0
    assert only_prompt.choices[0].logprobs.token_logprobs == answer.logprobs.token_logprobs[:3]
    without = client.completions.create(model="fake", prompt="é!", max_tokens=2, logprobs=0).choices[0]
    assert without.logprobs.token_logprobs == answer.logprobs.token_logprobs[3:]
    assert without.logprobs.text_offset == [0, 1] and without.logprobs.top_logprobs is None
    two = client.completions.create(model="fake", prompt="aé", max_tokens=1, logprobs=2, echo=True).choices[0].logprobs
    assert two.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "["]
    assert two.top_logprobs[0] is None and two.top_logprobs[3] == {"[": -91.0, "\\": -92.0}


def test_logprobs_of_a_stream_add_up(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "fake", "max_tokens": 30, "n": 2}
    whole = client.completions.create(prompt=["a", "é"], echo=True, logprobs=1, **common).choices
    parts: list[dict[str, Any]] = [{"text": "", "tokens": [], "top_logprobs": [], "text_offset": []} for _ in whole]
    for chunk in client.completions.create(prompt=["a", "é"], echo=True, logprobs=1, stream=True, **common):
        (choice,) = chunk.choices
        parts[choice.index]["text"] += choice.text
        for name in ("tokens", "top_logprobs", "text_offset"):
            parts[choice.index][name] += getattr(choice.logprobs, name)
    for choice, part in zip(whole, parts, strict=True):
        assert part.pop("text") == choice.text
        assert part == {name: getattr(choice.logprobs, name) for name in part}
    chat: dict[str, Any] = {"messages": CHAT, "logprobs": True, "top_logprobs": 2, **common}
    said = client.chat.completions.create(**chat).choices
    streamed: list[list[Any]] = [[], []]
    for chunk in client.chat.completions.create(**chat, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert streamed == [choice.logprobs.content for choice in said] and len(streamed[0]) == 30
    token = said[0].logprobs.content[0]
    assert (token.token, token.bytes, token.logprob) == ("[", [91], -91.0)
    assert [(top.token, top.logprob) for top in token.top_logprobs] == [("[", -91.0), ("\\", -92.0)]


def test_an_empty_prompt_is_the_start_of_a_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="", max_tokens=300)
    assert answer.choices[0].text == expected_text([EOS]) and answer.usage.prompt_tokens == 1


def test_extensions_and_text_parts(client: openai.OpenAI, model: FakeModel) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "ignore_eos": False}
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    messages = [{"role": "developer", "content": "简短"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="fake", messages=messages, extra_body=extra, seed=1, user="someone")
    plain = [{"role": "system", "content": "简短"}, {"role": "user", "content": "你好"}]
    assert answer.choices[0].message.content == expected_text(model.chat_ids(plain))


def test_fields_that_ask_for_nothing_are_accepted(web: TestClient) -> None:
    body = {"model": "fake", "prompt": "a", "frequency_penalty": 0, "logit_bias": {}, "suffix": None, "logprobs": None}
    assert post(web, body).status_code == 200
    body = {"model": "fake", "messages": CHAT, "logprobs": False, "tools": [], "response_format": {"type": "text"}}
    assert post(web, body, "chat/completions").status_code == 200


# A real network -----------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def network() -> LanguageModel:
    """A random transformer with a tokenizer of a few hundred tokens: nonsense, but all of the real path."""
    tokenizer = train_bpe(["春眠不觉晓，处处闻啼鸟。", "The quick brown fox 🌸"] * 4, 300, chat_template=TEMPLATE)
    config = TransformerConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 64, 128)
    transformer = Transformer(config)
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return LanguageModel(transformer, tokenizer, prompt_prefix=[tokenizer.eos_id or 0])


@pytest.fixture(scope="module")
def real(network: LanguageModel) -> Iterator[openai.OpenAI]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the server's thread and this one both compute; on a busy machine pools would fight
    with running_server(network, "real") as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20)
    torch.set_num_threads(threads)


def test_the_server_says_what_the_engine_says(network: LanguageModel, real: openai.OpenAI) -> None:
    """Same ids, same seed, same choices: through HTTP, streamed or not, and directly."""
    fields = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    ids = network.chat_ids(CHAT)
    direct = network.generate([ids], max_new_tokens=40, n=3, **fields)
    common = {"model": "real", "messages": CHAT, "max_completion_tokens": 40, "n": 3, **fields}
    answer = real.chat.completions.create(**common)
    assert [choice.message.content for choice in answer.choices] == [completion.text for completion in direct]
    assert [choice.finish_reason for choice in answer.choices] == [completion.finish_reason for completion in direct]
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == sum(len(completion.ids) for completion in direct)
    streamed = [""] * 3
    for chunk in real.chat.completions.create(**common, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [completion.text for completion in direct]


def test_control_tokens_in_a_text_stay_text(network: LanguageModel, real: openai.OpenAI) -> None:
    prompt = "鸟<|im_end|><|endoftext|>"
    answer = real.completions.create(model="real", prompt=prompt, max_tokens=0, echo=True, logprobs=0)
    tokens = answer.choices[0].logprobs.tokens
    assert answer.choices[0].text == prompt
    assert not set(tokens) & set(network.tokenizer.special_tokens)
    assert answer.usage.prompt_tokens == len(tokens) + 1  # the separator a text starts after is read, not shown


def test_echoed_logprobs_are_those_of_the_engine(network: LanguageModel, real: openai.OpenAI) -> None:
    answer = real.completions.create(model="real", prompt="春眠", max_tokens=5, temperature=0, echo=True, logprobs=0)
    ids = network.encode_prompt("春眠")
    ids += network.generate([ids], max_new_tokens=5)[0].ids
    expected = network.logits(ids).log_softmax(1)[range(len(ids) - 1), ids[1:]].tolist()
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx(expected, abs=1e-5)
    answer = real.completions.create(model="real", prompt=ids, max_tokens=0, temperature=0, echo=True, logprobs=3)
    scores = answer.choices[0].logprobs
    assert scores.token_logprobs[0] is None and scores.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    for value, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
        assert len(top) <= 3 and value <= max(top.values()) + 1e-6


def test_several_prompts_are_continued_together(network: LanguageModel, real: openai.OpenAI) -> None:
    prompts = ["春眠", "不觉", "a", "处处闻", "啼", "夜来", "风", "雨", "声", "花落"]
    common: dict[str, Any] = {"model": "real", "max_tokens": 8, "temperature": 0.8, "seed": 3}
    answer = real.completions.create(prompt=prompts, **common).choices
    assert [choice.index for choice in answer] == list(range(10))
    single = [real.completions.create(prompt=prompt, **common).choices[0].text for prompt in prompts]
    assert [choice.text for choice in answer] == single
    before = network.engine.steps
    real.completions.create(prompt=prompts[:8], **common, extra_body={"ignore_eos": True})
    assert network.engine.steps - before < 8 * 4  # one prompt after the other would take 8 steps each


def test_an_answer_up_to_the_last_token_of_the_context(network: LanguageModel, real: openai.OpenAI) -> None:
    ids = [5] * 120
    answer = real.completions.create(
        model="real", prompt=ids, max_tokens=999, echo=True, logprobs=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.total_tokens == network.context_length
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].logprobs.token_logprobs) == network.context_length


# Bad requests --------------------------------------------------------------------------------------------------------

BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, "greater than or equal to 0"),
    ("temperature", 2.1, "less than or equal to 2"),
    ("temperature", "warm", "valid number"),
    ("temperature", True, "valid number"),
    ("temperature", 10**400, "number"),
    ("top_p", 1.5, "less than or equal to 1"),
    ("top_k", -1, "greater than or equal to 0"),
    ("top_k", 1.5, "valid integer"),
    ("min_p", 2, "less than or equal to 1"),
    ("repetition_penalty", 0, "greater than or equal to 0.1"),
    ("no_repeat_ngram_size", -1, "greater than or equal to 0"),
    ("n", 0, "greater than or equal to 1"),
    ("n", 17, "less than or equal to 16"),
    ("n", 1_000_000, "less than or equal to 16"),
    ("max_tokens", -1, "greater than or equal to 0"),
    ("max_tokens", 10**9, "less than or equal to 1000000"),
    ("max_tokens", "16", "valid integer"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**63, "less than or equal to"),
    ("stop", ["a"] * 17, "at most 16"),
    ("stop", "a" * 65, "at most 64"),
    ("stop", "", "at least 1"),
    ("stop", [1], "valid string"),
    ("stream", "yes", "valid boolean"),
    ("stream_options", {"include_usage": True}, "needs 'stream': true"),
    ("ignore_eos", 1, "valid boolean"),
    ("prompt", [], "not empty"),
    ("prompt", [1, "a"], "must be a text, a list of texts"),
    ("prompt", [[]] * 65, "at most 64"),
    ("prompt", [300], "token id 300 at position 0 is outside the vocabulary (0 to 256)"),
    ("prompt", [5, -1], "token id -1 at position 1"),
    ("prompt", [True], "must be a text"),
    ("logprobs", 6, "less than or equal to 5"),
    ("logprobs", True, "valid integer"),
    ("model", 5, "valid string"),
    ("best_of", 3, "'best_of' is not supported"),
    ("frequency_penalty", 0.5, "'frequency_penalty' is not supported"),
    ("tools", [{"type": "function"}], "'tools' is not supported"),
    ("temprature", 1, "unknown field 'temprature'; did you mean 'temperature'?"),
    ("zzz", 1, "unknown field 'zzz'; known: echo"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_bounds(web: TestClient, field: str, value: Any, message: str) -> None:
    body = {"model": "fake", "prompt": "a", "max_tokens": 1, field: value}
    error = problem(post(web, body))
    assert message in error["message"]
    assert error["param"].startswith(field)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "robot", "content": "a"}], "messages[0].role"),
        ([*CHAT, {"role": "user", "contnet": "a"}], "messages[1].contnet"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": "a"}] * 1025, "messages"),
    ],
)
def test_bad_messages(web: TestClient, messages: Any, param: str) -> None:
    error = problem(post(web, {"model": "fake", "messages": messages}, "chat/completions"))
    assert error["param"] == param and f"'{param}'" in error["message"]


def test_unknown_fields_inside_objects_name_their_nearest(web: TestClient) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "a", "conten": "b"}]}
    assert "did you mean 'content'?" in problem(post(web, body, "chat/completions"))["message"]
    body = {"model": "fake", "messages": CHAT, "stream": True, "stream_options": {"include_usge": True}}
    assert "did you mean 'include_usage'?" in problem(post(web, body, "chat/completions"))["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"model": "fake", "prompt": "a"', "not valid JSON"),
        (b'{"model": "fake", "prompt": "a", "top_p": NaN}', "NaN is not a JSON number"),
        (b'{"model": "fake", "prompt": "a", "top_p": -Infinity}', "-Infinity is not"),
        (b'{"model": "fake", "prompt": "a", "temperature": 1e999}', "finite number"),
        (b'{"model": "fake", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"model": "fake", "prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
        (b'{"model": "fake", "prompt": "\\ud800"}', "lone surrogate \\ud800"),
        (b'{"model": "fake", "prompt": "a", "\\udfff": 1}', "lone surrogate"),
        (b'{"model": "fake", "prompt": "\xff"}', "not valid UTF-8"),
        (b'{"model": "fake", "prompt": ' + b"[" * 40 + b"]" * 40 + b"}", "deeper than 32"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper than 32"),
        (b"[" * 900_000, "deeper than 32"),
    ],
)
def test_bad_json(web: TestClient, body: bytes, message: str) -> None:
    error = problem(post(web, body))
    assert message in error["message"] and len(error["message"]) <= 1000


def test_missing_fields_wrong_model_wrong_method(web: TestClient) -> None:
    assert "'prompt' is missing" in problem(post(web, {"model": "fake"}))["message"]
    assert "'model' is missing" in problem(post(web, {"prompt": "a"}))["message"]
    assert problem(post(web, {"model": "gpt-9", "prompt": "a"}), 404)["code"] == "model_not_found"
    problem(web.get("/v1/completions"), 405)
    problem(web.get("/v2/models"), 404)


def test_too_much(web: TestClient) -> None:
    error = problem(post(web, {"model": "fake", "prompt": ["a"] * 64, "n": 2}))
    assert "64 prompts times n = 2" in error["message"]
    error = problem(post(web, {"model": "fake", "prompt": "a" * (1 << 20)}), 413)
    assert "larger than 1048576 bytes" in error["message"]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_prompt_longer_than_the_context(web: TestClient, route: str) -> None:
    text = "长" * 200
    body = {"prompt": text} if route == "completions" else {"messages": [{"role": "user", "content": text}]}
    error = problem(post(web, {"model": "fake", **body}, route))
    tokens = 600 if route == "completions" else 606
    assert error["code"] == "context_length_exceeded"
    assert "holds 400 tokens" in error["message"] and f"has {tokens} and" in error["message"]


def test_the_context_ends_an_answer(web: TestClient) -> None:
    """A prompt that leaves two tokens gets two; one that leaves none can still be echoed."""
    answer = post(web, {"model": "fake", "prompt": "a" * 398, "max_tokens": 50}).json()
    assert answer["usage"]["completion_tokens"] == 2 and answer["choices"][0]["finish_reason"] == "length"
    problem(post(web, {"model": "fake", "prompt": "a" * 400}))
    assert post(web, {"model": "fake", "prompt": "a" * 400, "max_tokens": 0, "echo": True}).status_code == 200


def test_chat_without_a_template() -> None:
    with TestClient(create_app(FakeModel(chat=False), "base"), base_url="http://localhost:9000") as web:
        error = problem(post(web, {"model": "base", "messages": CHAT}, "chat/completions"))
        assert error["code"] == "no_chat_template" and "/v1/completions" in error["message"]
        assert web.get("/v1/models/base").json()["chat"] is False


def test_the_official_client_sees_bad_requests(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="less than or equal to 2") as caught:
        client.chat.completions.create(model="fake", messages=CHAT, temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="did you mean 'top_k'"):
        client.completions.create(model="fake", prompt="a", extra_body={"topk": 1})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.dictionaries(
    st.sampled_from(sorted(CompletionRequest.model_fields)) | st.text(max_size=5), JSON, max_size=6
)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=60), JSON.map(json.dumps).map(str.encode), FIELDS.map(json.dumps).map(str.encode)))
def test_any_body_is_a_request_or_a_clear_error(body: bytes) -> None:
    try:
        request = parse_request(body, CompletionRequest)
    except ApiError as error:
        assert 400 <= error.status < 500 and error.message
        json.dumps(error.body()).encode()
    else:
        assert isinstance(request, CompletionRequest)


# Who may ask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost:8000@evil.example"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_other_sites_are_kept_out(web: TestClient, headers: dict[str, str], status: int) -> None:
    response = post(web, {"model": "fake", "prompt": "a"}, **headers)
    assert response.status_code == status
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_health(web: TestClient) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert web.get(path).json() == {"status": "ok"}


# One request never harms another -------------------------------------------------------------------------------------


def test_concurrent_requests_each_get_their_own_answer(address: str) -> None:
    def ask(number: int) -> bool:
        prompt = f"问题 {number} " + "啊" * number
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            answer = client.completions.create(model="fake", prompt=prompt, max_tokens=200, stream=number % 2 == 0)
            parts = list(answer) if number % 2 == 0 else [answer]
        return "".join(part.choices[0].text for part in parts) == expected_text(prompt.encode())

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(12)))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_generation(stream: bool) -> None:
    model = FakeModel(delay=0.03)
    with running_server(model) as address:
        body = {"model": "fake", "prompt": "a", "max_tokens": 300, "stream": stream}
        if stream:
            with httpx.stream("POST", f"{address}/v1/completions", json=body) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/v1/completions", json=body, timeout=0.3)
        time.sleep(0.2)
        steps = model.steps
        assert 0 < steps < 40
        time.sleep(0.2)
        assert model.steps == steps
        model.delay = 0
        after = httpx.post(f"{address}/v1/completions", json={"model": "fake", "prompt": "b", "max_tokens": 200})
        assert after.json()["choices"][0]["text"] == expected_text(b"b")


def test_an_error_in_mid_stream_is_told_and_the_server_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    model = FakeModel()
    with running_server(model) as address:
        model.fail_after = 5
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="failed on this request"):
                list(client.chat.completions.create(model="fake", messages=CHAT, stream=True))
            with pytest.raises(openai.InternalServerError, match="failed on this request"):
                client.chat.completions.create(model="fake", messages=CHAT)
            model.fail_after = None
            assert client.completions.create(model="fake", prompt="a").choices[0].finish_reason == "length"
    assert "told to fail" in caplog.text, "the cause is in the log"


def test_a_full_queue_refuses_and_recovers() -> None:
    async def scenario() -> None:
        runner = Runner(max_waiting=2, workers=1)
        runner.start()
        gate = threading.Event()

        def work() -> Iterator[str]:
            gate.wait(5)
            yield "done"

        running = runner.submit(work)
        while not runner.running:
            await asyncio.sleep(0.001)
        waiting = [runner.submit(work) for _ in range(2)]
        with pytest.raises(ApiError) as caught:
            runner.submit(work)
        assert caught.value.status == 503 and caught.value.headers() == {"Retry-After": "5"}
        runner.cancel(waiting[0])  # gives its place free
        waiting.append(runner.submit(work))
        gate.set()
        for job in (running, waiting[1], waiting[2]):
            assert [item async for item in job] == ["done"]
        assert waiting[0].results.empty()
        left = runner.submit(work)
        runner.close()
        with pytest.raises(ApiError, match="stopping"):
            runner.submit(work)
        assert left.cancelled.is_set() or not left.results.empty()

    asyncio.run(scenario())


def test_requests_that_run_at_the_same_time_share_the_steps(network: LanguageModel) -> None:
    prompts = ["春眠不觉晓", "The quick brown", "a", "夜来风雨声", "花落", "once upon"]
    body = {"model": "real", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    alone = [network.generate(prompt, max_new_tokens=24, ignore_eos=True)[0].text for prompt in prompts]
    before = network.engine.steps
    with running_server(network, "real") as address, ThreadPoolExecutor(len(prompts)) as pool:

        def ask(prompt: str) -> str:
            answer = httpx.post(f"{address}/v1/completions", json={**body, "prompt": prompt}, timeout=60)
            return answer.json()["choices"][0]["text"]  # type: ignore[no-any-return]

        network.engine.claim()  # until all have arrived
        answers = [pool.submit(ask, prompt) for prompt in prompts]
        while len(network.engine.waiting) < len(prompts):
            time.sleep(0.005)
        network.engine.unclaim()
        assert [answer.result() for answer in answers] == alone
    assert network.engine.steps - before <= 24 + len(prompts)


def test_running_answers_finish_when_the_server_stops() -> None:
    model = FakeModel(delay=0.01)
    with ThreadPoolExecutor(1) as pool:
        with running_server(model) as address:
            body = {"model": "fake", "prompt": "a", "max_tokens": 60}
            answer = pool.submit(httpx.post, f"{address}/v1/completions", json=body, timeout=20)
            while model.steps < 5:
                time.sleep(0.01)
        assert answer.result().json()["usage"]["completion_tokens"] == 60


def test_an_answer_that_takes_too_long_ends_with_an_error_when_the_server_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "DRAIN_SECONDS", 0.2)
    model = FakeModel(delay=0.02)
    with ThreadPoolExecutor(1) as pool:
        with running_server(model) as address:
            body = {"model": "fake", "prompt": "a", "max_tokens": 300, "stream": True}
            answer = pool.submit(httpx.post, f"{address}/v1/completions", json=body, timeout=20)
            while model.steps < 5:
                time.sleep(0.01)
        *_, last, end = answer.result().text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_stopping" and end == ""


# Starting and stopping -----------------------------------------------------------------------------------------------


def test_a_port_in_use_is_told_with_a_free_one() -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} is in use") as caught:
            listen(port)
        assert caught.value.exit_code == 5
        free = int(caught.value.fix.split()[-1])
        with listen(free) as other:
            assert other.getsockname() == ("127.0.0.1", free)


def test_the_verb_takes_the_port_before_it_loads_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with listen(0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "no-such-model", "--port", str(port), "--offline"]) == 5
    assert f"port {port} is in use" in capsys.readouterr().err


def test_a_port_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="no port 70000"):
        listen(70_000)


SERVE = """
from hanmo.serving.server import serve
serve(lambda: None, "none", 0, lambda address: print(address, flush=True))
print("stopped")
"""


@pytest.mark.skipif(os.name == "nt", reason="signals as on POSIX")
def test_signals_end_the_server_cleanly() -> None:
    """SIGTERM and Ctrl-C: exit code 0, nothing on standard error, the port is free again."""
    command = [sys.executable, "-c", SERVE]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        try:
            for process, number in ((first, signal.SIGTERM), (second, signal.SIGINT)):
                address = process.stdout.readline().strip()
                assert httpx.get(f"{address}/readyz", timeout=10).json() == {"status": "ok"}
                host, port = address.removeprefix("http://").split(":")
                assert host == "127.0.0.1"
                process.send_signal(number)
                output, errors = process.communicate(timeout=15)
                assert (process.returncode, output, errors) == (0, "stopped\n", "")
                with socket.socket() as again:
                    assert again.connect_ex((host, int(port))) != 0
        finally:
            first.kill()
            second.kill()


def test_small_answers_are_sent_at_once(address: str) -> None:
    """On a connection that stays open none waits until the client has confirmed the one before (40 ms)."""
    times = []
    with httpx.Client() as kept:
        for _ in range(20):
            begun = time.perf_counter()
            assert kept.get(f"{address}/livez").status_code == 200
            times.append(time.perf_counter() - begun)
    assert min(times[1:]) < 0.03
