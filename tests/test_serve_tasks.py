"""Tasks over HTTP and in notebooks: models of every kind, prompts, bad input, and requests side by side."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.testclient import TestClient

import hanmo
from hanmo.data.tasks import Labelled, Proposition, Tagged
from hanmo.errors import DataError, ModelError, UsageError
from hanmo.inference.encoder import TextEncoder
from hanmo.inference.language_model import LanguageModel
from hanmo.models.heads import HeadConfig
from hanmo.models.linear import LinearClassifier
from hanmo.models.recurrent import RecurrentConfig, RecurrentEncoder
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.serving.app import create_app
from hanmo.serving.schema import MAX_INPUT_CHARS
from hanmo.tasks.base import Form
from hanmo.tasks.registry import find_task
from hanmo.tasks.semantic_roles import to_tagged
from hanmo.tasks.tagging import Field
from hanmo.text.training import train_bpe

from .finetune_cases import make_bases
from .serving_fakes import FakeModel, running_server

TEXTS = [
    "win a free prize now",
    "free money, call",
    "see you at lunch",
    "中奖了，请来电",
    "我们明天见",
    "home at noon",
] * 4
LABELS = ["spam", "spam", "ham", "spam", "ham", "ham"] * 4
SENTENCES = [
    Tagged(("Ann", "lives", "in", "Paris"), ("B-PER", "O", "O", "B-LOC")),
    Tagged(("Bob", "Ray", "left", "Rome"), ("B-PER", "I-PER", "O", "B-LOC")),
    Tagged(("in", "New", "York", "it", "rains"), ("O", "B-LOC", "I-LOC", "O", "O")),
] * 4
SOLD = Proposition(("She", "sold", "the", "car"), 1, ((0, 1, "ARG0"), (2, 4, "ARG1")))
ODD = [
    "🌸👩‍🚀🎉",
    "１２３４５６７ ＡＢＣ　全角",
    "mixed 中文 and English и русский مرحبا",
    "line one\r\nline two\ttab",
    "a\x00b\u200b\ufeff",
]


@pytest.fixture(scope="module")
def classifier() -> LinearClassifier:
    return LinearClassifier().fit(TEXTS, LABELS)


@pytest.fixture(scope="module")
def tagger() -> Any:
    field = Field(max_iterations=30)
    field.fit(SENTENCES)
    return field.tagger


@pytest.fixture(scope="module")
def roles() -> Any:
    field = Field(template="roles", max_iterations=30)
    field.fit([to_tagged(SOLD)] * 4)
    return field.tagger


@pytest.fixture(scope="module")
def decoder() -> LanguageModel:
    """A random transformer: nonsense, but all of the real path."""
    torch.manual_seed(0)
    tokenizer = train_bpe([*TEXTS, "Classify the text. 请给文本分类。"], 320)
    network = Transformer(TransformerConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 64, 512))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return LanguageModel(network, tokenizer, name="tiny", prompt_prefix=[tokenizer.eos_id or 0])


def web_of(model: Any, name: str = "m") -> TestClient:
    return TestClient(create_app(model, name), base_url="http://127.0.0.1:8000")


@pytest.fixture(scope="module")
def web(classifier: LinearClassifier) -> Iterator[TestClient]:
    with web_of(classifier) as web:
        yield web


@pytest.fixture(scope="module")
def asked(decoder: LanguageModel) -> Iterator[TestClient]:
    with web_of(decoder) as web:
        yield web


def ask(web: TestClient, task: str, given: Any, **more: Any) -> Any:
    response = web.post(f"/v1/tasks/{task}", json={"model": "m", "input": given, **more})
    assert response.status_code == 200, response.text
    return response.json()


def problem(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    return error


# ---- what a model can do


def test_a_classifier_is_served(web: TestClient, classifier: LinearClassifier) -> None:
    (card,) = web.get("/v1/tasks").json()["data"]
    assert card["id"] == "classification" and card["labels"] == ["ham", "spam"] and "spam" in card["aliases"]
    assert card["input"] == ["text", "pair"] and not card["asked"] and not card["needs_labels"]
    model = web.get("/v1/models/m").json()
    assert model["tasks"] == ["classification"] and not model["writes"] and not model["chat"]
    answer = ask(web, "spam", TEXTS[:6])
    assert (answer["object"], answer["task"], answer["model"]) == ("list", "classification", "m")
    assert [row["index"] for row in answer["data"]] == list(range(6)) and answer["usage"] == {"texts": 6}
    assert [row["labels"] for row in answer["data"]] == [[label] for label in LABELS[:6]]
    direct = classifier.predict_proba(TEXTS[:6])
    for row, expected in zip(answer["data"], direct, strict=True):
        assert row["probabilities"] == pytest.approx(dict(zip(classifier.labels, expected.tolist(), strict=True)))
    (single,) = ask(web, "classification", TEXTS[0])["data"]
    assert single == answer["data"][0] == ask(web, "topic", {"text": TEXTS[0]})["data"][0]


def test_a_pair_is_two_texts_and_a_tab_is_none(web: TestClient, classifier: LinearClassifier) -> None:
    pair, tab = ask(web, "spam", [{"text": "free", "pair": "lunch"}, "free\tlunch"])["data"]
    rows = classifier.predict_proba(["free\nlunch", "free\tlunch"])
    for row, expected in zip((pair, tab), rows, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(sorted(expected.tolist(), reverse=True))


def test_a_model_that_does_not_write_says_so(web: TestClient) -> None:
    error = problem(web.post("/v1/completions", json={"model": "m", "prompt": "a"}))
    assert error["code"] == "model_writes_no_text" and "/v1/tasks/classification" in error["message"]
    chat = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    assert problem(web.post("/v1/chat/completions", json=chat))["code"] == "model_writes_no_text"
    assert problem(web.post("/tokenize", json={"prompt": "a"}))["code"] == "model_writes_no_text"
    assert problem(web.get("/tokenizer_info"))["code"] == "model_writes_no_text"


def test_a_tagger_gives_tokens_tags_and_spans(tagger: Any) -> None:
    with web_of(tagger) as web:
        assert [card["id"] for card in web.get("/v1/tasks").json()["data"]] == ["tagging"]
        (row,) = ask(web, "ner", "Ann lives in New York")["data"]
        assert row["tokens"] == ["Ann", "lives", "in", "New", "York"]
        assert row["tags"] == ["B-PER", "O", "O", "B-LOC", "I-LOC"]
        assert row["spans"] == [{"start": 0, "end": 1, "type": "PER"}, {"start": 3, "end": 5, "type": "LOC"}]
        assert problem(web.post("/v1/tasks/srl", json={"model": "m", "input": "a"}))["code"] == "task_not_supported"


def test_roles_need_a_marked_predicate(roles: Any) -> None:
    with web_of(roles) as web:
        assert [card["id"] for card in web.get("/v1/tasks").json()["data"]] == ["semantic-roles"]
        (row,) = ask(web, "srl", "She [sold] the car")["data"]
        assert row["arguments"] == [
            {"start": 0, "end": 1, "role": "ARG0"},
            {"start": 2, "end": 4, "role": "ARG1"},
        ]
        error = problem(web.post("/v1/tasks/srl", json={"model": "m", "input": ["She [sold] it", "She sold it"]}))
        assert error["param"] == "input[1]" and "brackets" in error["message"]


@pytest.mark.parametrize(
    ("kind", "labels", "task"),
    [
        ("sequence-classification", ("ham", "spam"), "classification"),
        ("token-classification", ("O", "B-LOC", "I-LOC"), "tagging"),
        ("token-classification", ("O", "B-ARG0", "I-ARG0"), "semantic-roles"),
    ],
)
def test_a_network_does_what_its_head_has_learned(kind: str, labels: tuple[str, ...], task: str) -> None:
    tokenizer = train_bpe(TEXTS, 300)
    config = RecurrentConfig("lstm", tokenizer.vocab_size, 8, 8, 1, tie_embeddings=False, bidirectional=True)
    model = RecurrentEncoder(config, HeadConfig(kind, labels))
    model.initialize(0)
    with web_of(TextEncoder(model, tokenizer)) as web:
        (card,) = web.get("/v1/tasks").json()["data"]
        assert card["id"] == task and card["labels"] == list(labels)
        for text in ODD:
            ask(web, task, f"[{text}]" if task == "semantic-roles" else text)


def test_encoder_decoders_read_bare_texts(tmp_path: Path) -> None:
    model = hanmo.load(make_bases(tmp_path)["both"])
    with web_of(model) as web:
        answer = ask(web, "translation", ["good film", "很好 的 电影"])
        expected = hanmo.task("translation", model)(["good film", "很好 的 电影"])
        assert [row["translation"] for row in answer["data"]] == [row["translation"] for row in expected]
        assert answer["usage"]["completion_tokens"] > 0


def test_questions_poems_and_programs(asked: TestClient) -> None:
    (row,) = ask(asked, "qa", {"text": "Who\tcame?", "context": "Ann came. Bob left."})["data"]
    assert row["answer"] is None or isinstance(row["answer"], str)
    error = problem(asked.post("/v1/tasks/qa", json={"model": "m", "input": ["Who came?"]}))
    assert error["param"] == "input[0]" and "no text that the question is about" in error["message"]
    (row,) = ask(asked, "poems", "春雨", settings={"form": "五言绝句"})["data"]
    assert row["form"] == "五言绝句" and row["text"] and isinstance(row["holds"], bool)
    (row,) = ask(asked, "code", "def add(a, b):", settings={"samples": 2})["data"]
    assert len(row["programs"]) == 2
    for settings in ({"samples": "many"}, {"samples": 10**6}, {"nothing": 1}, {"samples": [1]}):
        error = problem(asked.post("/v1/tasks/code", json={"model": "m", "input": "a", "settings": settings}))
        assert error["param"].startswith("settings")


def test_a_model_without_tasks_is_still_served() -> None:
    with web_of(FakeModel()) as web:
        assert web.get("/v1/tasks").json() == {"object": "list", "data": []}
        error = problem(web.post("/v1/tasks/spam", json={"model": "m", "input": "a"}))
        assert "it can do: no task" in error["message"]


def test_word_vectors_are_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hanmo.cli.main import main

    file = tmp_path / "words.vec"
    file.write_text("2 2\na 1 0\nb 0 1\n", encoding="utf-8")
    assert main(["serve", str(file), "--port", "0"]) == 2
    assert "nothing to serve" in capsys.readouterr().err


# ---- language models, which are asked


def test_a_decoder_is_told_the_labels(asked: TestClient, decoder: LanguageModel) -> None:
    cards = {card["id"]: card for card in asked.get("/v1/tasks").json()["data"]}
    assert cards["classification"]["needs_labels"] and cards["tagging"]["needs_labels"]
    assert not cards["translation"]["needs_labels"] and "semantic-roles" not in cards
    answer = ask(asked, "spam", ["free prize", "明天见"], labels=["ham", "spam"])
    system = find_task("spam").system(decoder, (), Form(labels=("ham", "spam")))
    for row, verdict in zip(
        answer["data"], system.answer([Labelled("free prize", ()), Labelled("明天见", ())]), strict=True
    ):
        assert row["labels"] == list(verdict.labels)
        assert row["probabilities"] == pytest.approx(dict(verdict.probabilities), rel=1e-5)
    usage = answer["usage"]
    assert usage["texts"] == 2 and usage["total_tokens"] == usage["prompt_tokens"] > 40
    error = problem(asked.post("/v1/tasks/spam", json={"model": "m", "input": "a"}))
    assert error["param"] == "labels" and "examples" in error["message"]


def test_examples_are_records_and_all_are_shown(asked: TestClient, decoder: LanguageModel) -> None:
    examples = [{"text": "win now", "label": "spam"}, {"text": "hello mum", "label": "ham"}]
    shown = ask(asked, "spam", "free prize", examples=examples)
    expected = hanmo.task("spam", decoder, examples=examples)("free prize")
    assert shown["data"][0]["probabilities"] == pytest.approx(expected["probabilities"], rel=1e-5)
    fewer = ask(asked, "spam", "free prize", examples=examples, shots=0)
    assert fewer["usage"]["prompt_tokens"] < shown["usage"]["prompt_tokens"]
    assert fewer["data"][0]["probabilities"] != shown["data"][0]["probabilities"]


def test_a_decoder_writes_translations_summaries_and_entities(asked: TestClient, decoder: LanguageModel) -> None:
    answer = ask(asked, "mt", "free prize", instruction="Say it in French.")
    told = find_task("mt").system(decoder, (), Form(instruction="Say it in French."))
    (expected,) = told.answer([find_task("mt").record("free prize")])
    assert answer["data"][0]["translation"] == expected
    usage = answer["usage"]
    assert usage["completion_tokens"] > 0 and usage["total_tokens"] == sum(
        usage[name] for name in ("prompt_tokens", "completion_tokens")
    )
    assert isinstance(ask(asked, "summary", "One. Two. Three.")["data"][0]["summary"], str)
    (row,) = ask(asked, "ner", "Ann lives in Paris.", labels=["PER", "LOC"])["data"]
    assert len(row["tags"]) == len(row["tokens"]) == 5


@pytest.mark.parametrize(
    ("more", "param", "message"),
    [
        ({"labels": ["a"]}, "labels", "2 to 64 labels, not 1"),
        ({"labels": ["a", ""]}, "labels[1]", "at least 1"),
        ({"labels": "a, b"}, "labels", "valid list"),
        ({"labels": ["a"] * 65}, "labels", "at most 64"),
        ({"labels": ["a", "b"], "shots": 2}, "shots", "needs 'examples'"),
        ({"labels": ["a", "b"], "shots": True}, "shots", "valid integer"),
        ({"labels": ["a", "b"], "instruction": ""}, "instruction", "at least 1"),
        ({"examples": [{"nothing": "x"}]}, "examples", "examples.jsonl:1"),
        ({"examples": ["x"]}, "examples[0]", "valid dictionary"),
        ({"examples": [{"text": "x", "label": "a"}] * 65}, "examples", "at most 64"),
    ],
)
def test_bad_prompts(asked: TestClient, more: dict[str, Any], param: str, message: str) -> None:
    error = problem(asked.post("/v1/tasks/spam", json={"model": "m", "input": "a", **more}))
    assert error["param"] == param and message in error["message"]


# ---- bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "empty text"),
        (" \n\u3000", "empty text"),
        ([], "not empty"),
        (["a", " "], "in [1]"),
        ([{"pair": "a"}], "empty text"),
        (None, "'input' is missing"),
        (3, "must be a text"),
        (["a", 3], "must be a text"),
        ([["a"]], "must be a text"),
        ({"text": 5}, "must be a text"),
        ({"text": "a", "contxt": "b"}, "unknown field 'input[0].contxt'; known: text, pair"),
        (["a"] * 257, "at most 256"),
        ("长" * (MAX_INPUT_CHARS + 1), "at most 200000"),
    ],
)
def test_bad_texts(web: TestClient, given: Any, message: str) -> None:
    error = problem(web.post("/v1/tasks/spam", json={"model": "m", "input": given}))
    assert error["param"].startswith("input") and message in error["message"] and len(error["message"]) <= 1000


def test_bad_requests(web: TestClient) -> None:
    error = problem(web.post("/v1/tasks/spamm", json={"model": "m", "input": "a"}), 404)
    assert error["code"] == "task_not_found" and "did you mean 'spam'?" in error["message"]
    assert "known: classification" in problem(web.post("/v1/tasks/zzzz", json={}), 404)["message"]
    error = problem(web.post("/v1/tasks/translation", json={"model": "m", "input": "a"}))
    assert error["code"] == "task_not_supported" and "it can do: classification" in error["message"]
    assert problem(web.post("/v1/tasks/spam", json={"model": "x", "input": "a"}), 404)["code"] == "model_not_found"
    error = problem(web.post("/v1/tasks/spam", json={"model": "m", "input": "a", "labels": ["x", "y"]}))
    assert error["code"] == "unsupported_parameter" and error["param"] == "labels"
    error = problem(web.post("/v1/tasks/spam", json={"model": "m", "inputs": "a"}))
    assert "did you mean 'input'?" in error["message"]
    assert "lone surrogate" in problem(web.post("/v1/tasks/spam", content=b'{"input": "\\ud800"}'))["message"]
    problem(web.post("/v1/tasks/spam", content=b"{"), 400)
    problem(web.post("/v1/tasks/spam", content=b'"' + b"a" * (1 << 20) + b'"'), 413)
    problem(web.get("/v1/tasks/spam"), 405)
    problem(web.get("/v1/tasks", headers={"host": "evil.example"}), 403)
    problem(web.post("/v1/tasks/spam", json={}, headers={"origin": "http://evil.example"}), 403)


def test_odd_and_long_texts(web: TestClient, asked: TestClient, tagger: Any) -> None:
    long = "word 春眠 " * 5000  # 10,000 words
    texts = [*ODD, long]
    for row in ask(web, "spam", texts)["data"]:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    for row in ask(asked, "spam", texts, labels=["ham", "spam"])["data"]:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    with web_of(tagger) as tagging:
        for text, row in zip(texts, ask(tagging, "ner", texts)["data"], strict=True):
            assert len(row["tags"]) == len(row["tokens"])
            at = 0
            for token in row["tokens"]:  # the page finds each token again in the text
                at = text.index(token, at) + len(token)


def test_what_goes_wrong_inside_is_told_and_logged(
    classifier: LinearClassifier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with web_of(classifier) as web:
        monkeypatch.setattr(classifier, "predict_proba", lambda _: 1 / 0)
        error = problem(web.post("/v1/tasks/spam", json={"model": "m", "input": "a"}), 500)
        assert error["code"] == "internal_error" and "division" not in error["message"]
        assert "ZeroDivisionError" in caplog.text
        monkeypatch.undo()
        assert ask(web, "spam", "a")["data"]


# ---- side by side


@pytest.mark.parametrize("kind", ["classifier", "decoder"])
def test_twenty_at_once_give_the_same_as_one_batch(kind: str, classifier: Any, decoder: Any) -> None:
    texts = [f"free prize {number} 明天" + "见" * number for number in range(20)]
    more: dict[str, Any] = {} if kind == "classifier" else {"labels": ["ham", "spam"]}
    with running_server(classifier if kind == "classifier" else decoder, "m") as address:

        def one(given: Any) -> list[dict[str, Any]]:
            body = {"model": "m", "input": given, **more}
            response = httpx.post(f"{address}/v1/tasks/spam", json=body, timeout=60)
            assert response.status_code == 200, response.text
            rows: list[dict[str, Any]] = response.json()["data"]
            return rows

        whole = one(texts)
        with ThreadPoolExecutor(20) as pool:
            single = [rows[0] for rows in pool.map(one, texts)]
    for row, alone in zip(whole, single, strict=True):
        assert alone["labels"] == row["labels"]
        assert alone["probabilities"] == pytest.approx(row["probabilities"], rel=1e-6)


def test_the_server_answers_others_while_a_model_works(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, begun, real = threading.Event(), threading.Event(), classifier.predict_proba

    def slow(texts: list[str]) -> Any:
        begun.set()
        gate.wait(20)
        return real(texts)

    monkeypatch.setattr(classifier, "predict_proba", slow)
    with running_server(classifier, "m") as address, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, f"{address}/v1/tasks/spam", json={"model": "m", "input": "a"}, timeout=30)
        assert begun.wait(10)
        assert httpx.get(f"{address}/livez", timeout=5).json() == {"status": "ok"}
        assert httpx.get(f"{address}/v1/tasks", timeout=5).status_code == 200
        gate.set()
        assert waiting.result().status_code == 200


def test_a_client_that_leaves_stops_the_work(
    classifier: Any, decoder: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = classifier.predict_proba

    def slow(texts: list[str]) -> Any:
        seen.append(len(texts))
        time.sleep(0.1)
        return real(texts)

    monkeypatch.setattr(classifier, "predict_proba", slow)
    with running_server(classifier, "m") as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/tasks/spam", json={"model": "m", "input": ["a"] * 256}, timeout=0.15)
        time.sleep(0.6)
        assert 0 < sum(seen) < 256, "the blocks that were left are not answered"
        assert httpx.post(f"{address}/v1/tasks/spam", json={"model": "m", "input": "a"}).status_code == 200
    with running_server(decoder, "m") as address:
        body = {"model": "m", "input": "free prize. " * 2000}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/tasks/translation", json=body, timeout=0.4)
        time.sleep(0.5)
        steps = decoder.engine.steps
        time.sleep(0.4)
        assert decoder.engine.steps == steps


# ---- notebooks


def test_a_task_in_a_notebook(classifier: LinearClassifier, tmp_path: Path) -> None:
    folder = tmp_path / "spam"
    classifier.save(folder)
    spam = hanmo.task("spam", str(folder))
    assert spam("free prize")["labels"] == ["spam"]
    assert spam(["free prize", {"text": "see you", "pair": "at lunch"}]) == spam.predict(
        ["free prize", {"text": "see you", "pair": "at lunch"}]
    )
    assert spam.predict([]) == []
    with pytest.raises(UsageError, match="a list of texts"):
        spam.predict("free prize")
    for wrong in (["a", 3], [{"txt": "a"}], [{"text": None}]):
        with pytest.raises(UsageError, match=f"text {len(wrong) - 1} is no text"):
            spam(wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown task"):
        hanmo.task("spamm", classifier)
    with pytest.raises(ModelError, match="cannot do tagging"):
        hanmo.task("ner", classifier)


def test_examples_of_a_file_and_of_objects(decoder: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "train.tsv"
    file.write_text("spam\twin now\nham\thello mum\n", encoding="utf-8")
    examples = [{"text": "win now", "label": "spam"}, {"text": "hello mum", "label": "ham"}]
    by_file = hanmo.task("spam", decoder, examples=file, shots=2)
    assert by_file.system.signature() == hanmo.task("spam", decoder, examples=examples).system.signature()
    assert hanmo.task("spam", decoder, examples=file).system.signature()["shots"] == 0
    with pytest.raises(DataError):
        hanmo.task("spam", decoder, examples=[{"nothing": "x"}])
    with pytest.raises(UsageError, match="2 to 64 labels"):
        hanmo.task("spam", decoder)
