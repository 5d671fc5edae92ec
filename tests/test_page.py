"""The page: what it is made of, everywhere; how it behaves in a real browser, where chromium exists."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import hanmo.serving
from hanmo.serving.app import create_app

from .browser import ENTER, SHIFT, Browser, running_browser
from .serving_fakes import FakeModel, expected_text, running_server

WEB = Path(hanmo.serving.__file__).parent / "web"
SCRIPTS = ("app.js", "api.js", "tasks.js")
STRINGS: dict[str, dict[str, Any]] = json.loads((WEB / "strings.json").read_text(encoding="utf-8"))


# What the page is made of --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(FakeModel(), "fake"), base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/app.js", "text/javascript; charset=utf-8"),
        ("/api.js", "text/javascript; charset=utf-8"),
        ("/tasks.js", "text/javascript; charset=utf-8"),
        ("/strings.json", "application/json"),
        ("/icon.svg", "image/svg+xml"),
    ],
)
def test_each_file_is_served_with_its_type_and_a_strict_policy(client: TestClient, path: str, media_type: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = response.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy


def test_every_file_in_the_folder_is_served(client: TestClient) -> None:
    for path in WEB.iterdir():
        assert client.get("/" if path.name == "index.html" else f"/{path.name}").content == path.read_bytes()


@pytest.mark.parametrize("path", ["/app.py", "/web/app.js", "/..%2fapp.py", "/static/../app.py", "/nothing"])
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_nothing_comes_from_outside_and_nothing_is_inline() -> None:
    for path in WEB.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"(https?:)?//[\w-]+\.\w", text), f"{path.name} names another site"
    script = "".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", script)
    page = Elements((WEB / "index.html").read_text(encoding="utf-8"))
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], f"inline code in <{tag}>"
        assert tag != "style" and (tag != "script" or "src" in attributes)


def test_both_languages_say_the_same_things() -> None:
    english, chinese = STRINGS["en"], STRINGS["zh"]
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert type(text) is type(chinese[key])
        if isinstance(text, str):
            assert re.findall(r"\{\w+\}", text) == re.findall(r"\{\w+\}", chinese[key]), key
        elif isinstance(text, dict):
            assert text.keys() == chinese[key].keys(), key
        else:
            assert len(text) == len(chinese[key]), key


def test_every_text_the_page_asks_for_exists_and_is_used() -> None:
    page = Elements((WEB / "index.html").read_text(encoding="utf-8"))
    names = ("data-i18n", "data-i18n-label", "data-i18n-placeholder")
    asked = {value for _, attributes in page.elements for name, value in attributes.items() if name in names}
    script = "".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS)
    quoted = set(re.findall(r'"(\w+)"', script))
    assert asked <= STRINGS["en"].keys()
    assert set(re.findall(r'\bt\("(\w+)"', script)) <= STRINGS["en"].keys()
    assert STRINGS["en"].keys() <= asked | quoted, "a text that nobody shows"


def test_every_control_has_a_name() -> None:
    page = Elements((WEB / "index.html").read_text(encoding="utf-8"))
    labelled = {attributes.get("for") for tag, attributes in page.elements if tag == "label"}
    for tag, attributes in page.elements:
        if tag in ("input", "textarea", "select"):
            assert attributes["id"] in labelled or page.inside_label[attributes["id"]], attributes["id"]


class Elements(HTMLParser):
    """All elements of a page with their attributes; and which of those with an id lie inside a label."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.inside_label: dict[str, bool] = {}
        self.labels = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        self.labels += tag == "label"
        if "id" in attributes:
            self.inside_label[attributes["id"]] = self.labels > 0

    def handle_endtag(self, tag: str) -> None:
        self.labels -= tag == "label"


# How it behaves in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


LAST_ANSWER = "return [...document.querySelectorAll('.assistant')].at(-1)?.textContent ?? ''"
IDLE = "return document.getElementById('stop').hidden"


def test_a_conversation(browser: Browser) -> None:
    """Enter sends, the answer streams and is complete, markup stays text, again and clear work."""
    model = FakeModel(delay=0.002)
    with running_server(model) as url:
        browser.open(url)
        assert browser.text("#greeting") == STRINGS["en"]["chatGreeting"]
        browser.type("#input", f"<b>你好</b>{SHIFT}{ENTER}{SHIFT}second line{ENTER}")
        assert browser.text(".user p") == "<b>你好</b>\nsecond line"
        browser.wait(LAST_ANSWER)  # some of it is there before all of it is
        browser.wait(IDLE)
        answer = expected_text(model.chat_ids([{"role": "user", "content": "<b>你好</b>\nsecond line"}]))
        assert browser.text(".assistant p") == answer
        assert re.fullmatch(r"\d+ tokens · \d+\.\d tokens/s", browser.text("#figures"))
        assert browser.text("#announce") == STRINGS["en"]["answerDone"]
        browser.js("[...document.querySelectorAll('.tools button')].at(-1).click()")
        browser.wait(IDLE)
        assert browser.js("return document.querySelectorAll('article').length") == 2
        assert browser.text(".assistant p") == answer
        browser.click("#clear")
        assert browser.js("return document.querySelectorAll('article').length") == 0


def test_stop_ends_the_answer_here_and_on_the_server(browser: Browser) -> None:
    model = FakeModel(delay=0.05)
    with running_server(model) as url:
        browser.open(url, language="zh-CN")
        browser.type("#input", f"你好{ENTER}")
        browser.wait("return document.querySelector('.assistant p')?.textContent.length > 3")
        browser.click("#stop")
        browser.wait(IDLE)
        assert STRINGS["zh"]["endStopped"] in browser.text(".tools")
        time.sleep(0.3)
        steps = model.steps
        time.sleep(0.3)
        assert model.steps == steps < 60


def test_a_model_without_template_goes_on_writing(browser: Browser) -> None:
    model = FakeModel(chat=False)
    with running_server(model) as url:
        browser.open(url)
        assert browser.text("#send") == STRINGS["en"]["continue"]
        browser.type("#input", f"从前{ENTER}")
        browser.wait(IDLE + " && document.querySelector('.tools button')")
        first = expected_text(model.tokenizer.encode("从前"))
        assert browser.text(".manuscript p") == "从前" + first
        browser.click("#send")  # an empty input: simply go on
        browser.wait("return document.querySelectorAll('.manuscript .assistant').length === 2")
        browser.wait(IDLE)
        assert browser.text(".manuscript p") == "从前" + first + expected_text(model.tokenizer.encode("从前" + first))


def test_settings_reach_the_model_and_are_remembered(browser: Browser) -> None:
    model = FakeModel()
    with running_server(model) as url:
        browser.open(url)
        browser.click("#open-settings")
        browser.js("const f = document.getElementById('max_tokens'); f.value = ''; f.focus()")
        browser.type("#max_tokens", "10")
        browser.click("#settings .seal-button")
        browser.type("#input", f"hello{ENTER}")
        browser.wait(IDLE + " && document.querySelector('.tools button')")
        assert STRINGS["en"]["endLength"] in browser.text(".tools")
        assert browser.text(".assistant p") == expected_text(model.chat_ids([{"role": "user", "content": "hello"}]))[:9]
        assert browser.text("#figures").startswith("10 tokens")
        browser.click("#language")
        browser.open(url)
        assert browser.js("return document.documentElement.lang") == "zh-CN"
        assert browser.js("return document.getElementById('max_tokens').value") == "10"


def test_errors_are_shown_in_plain_words(browser: Browser) -> None:
    model = FakeModel(context_length=60)
    with running_server(model) as url:
        browser.open(url)
        browser.type("#input", "x" * 100 + ENTER)
        browser.wait("return !document.getElementById('problem').hidden")
        assert browser.text("#problem") == STRINGS["en"]["errorLong"].replace("{context}", "60")
        assert browser.js("return document.getElementById('input').value") == "x" * 100, "the text is given back"
        model.context_length, model.fail_after = 400, 5
        browser.click("#send")
        browser.wait("return document.getElementById('problem').textContent.includes('could not answer')")
        assert len(browser.text(".assistant p")) > 2, "what was written before the error is kept"
    browser.type("#input", f"still there?{ENTER}")
    browser.wait(f"return document.getElementById('problem').textContent === {STRINGS['en']['errorOffline']!r}")


def test_enter_belongs_to_an_input_method_while_it_composes(browser: Browser) -> None:
    with running_server(FakeModel()) as url:
        browser.open(url)
        browser.type("#input", "ni hao")
        enter = "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true, isComposing: %s})"
        browser.js(f"document.getElementById('input').dispatchEvent({enter % 'true'})")
        assert browser.js("return document.querySelectorAll('article').length") == 0
        browser.js(f"document.getElementById('input').dispatchEvent({enter % 'false'})")
        assert browser.js("return document.querySelectorAll('article').length") == 2


@pytest.mark.parametrize("language", ["en", "zh-CN"])
@pytest.mark.parametrize("width", [390, 1100])
def test_nothing_is_wider_than_the_window(browser: Browser, language: str, width: int) -> None:
    with running_server(FakeModel()) as url:
        browser.open(url, language=language, width=width)
        browser.type("#input", "a" * 300 + ENTER)
        browser.wait(IDLE)
        assert browser.js("return document.scrollingElement.scrollWidth <= innerWidth")
        assert browser.js("return document.documentElement.lang").startswith(language[:2])
