"""The tasks on the page, in a real browser where chromium exists: labels, spans, texts, prompts, what goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from hanmo.models.linear import LinearClassifier
from hanmo.tasks.tagging import Field

from .browser import Browser, running_browser
from .serving_fakes import running_server
from .test_page import STRINGS
from .test_serve_tasks import LABELS, SENTENCES, TEXTS, decoder  # noqa: F401 - the fixture

EN, ZH = STRINGS["en"], STRINGS["zh"]
ANSWERED = "return document.getElementById('task-result').children.length > 0"
TASKS = "return !document.getElementById('tasks').hidden"
FITS = "return document.scrollingElement.scrollWidth <= innerWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def classifier() -> LinearClassifier:
    return LinearClassifier().fit(TEXTS, LABELS)


@pytest.fixture(scope="module")
def tagger() -> Any:
    field = Field(max_iterations=30)
    field.fit(SENTENCES)
    return field.tagger


@pytest.mark.parametrize("width", [390, 1100])
def test_labels_are_a_table_with_bars(browser: Browser, classifier: LinearClassifier, width: int) -> None:
    with running_server(classifier) as url:
        browser.open(url, width=width)
        browser.wait(TASKS)
        assert browser.js("return document.getElementById('views').hidden"), "there is only one view"
        assert browser.js("return document.querySelector('footer').hidden")
        assert browser.js("return document.getElementById('task-run').disabled")
        browser.type("#task-text", "free prize <b>中奖</b>")
        browser.click("#task-run")
        browser.wait(ANSWERED)
        rows = browser.js("return [...document.querySelectorAll('tbody tr')].map(r => [r.className, r.textContent])")
        assert [row[0] for row in rows] == ["chosen", ""] and rows[0][1].startswith("spam (chosen)")
        first, second = browser.js("return [...document.querySelectorAll('.filled')].map(b => b.offsetWidth)")
        assert first > second > 0, "the policy of the page lets bars have widths"
        assert browser.js(FITS)
        browser.click("#language")
        assert browser.text("thead th") == ZH["label"] and ZH["chosen"] in browser.text("tbody th")
        assert ZH["taskNames"]["classification"] == browser.text("#task option")
        browser.click("#language")


def test_spans_are_marked_in_the_text(browser: Browser, tagger: Any) -> None:
    with running_server(tagger) as url:
        browser.open(url)
        browser.wait(TASKS)
        browser.type("#task-text", "Ann  lives in New York")
        browser.click("#task-run")
        browser.wait(ANSWERED)
        marks = browser.js("return [...document.querySelectorAll('mark')].map(m => [m.firstChild.data, m.className])")
        assert marks == [["Ann", "hue-0"], ["New York", "hue-1"]]
        assert browser.text(".marked").replace("PER", "").replace("LOC", "") == "Ann  lives in New York"
        cells = browser.js("return [...document.querySelectorAll('tbody td')].map(c => c.textContent)")
        assert cells == ["Ann", "PER", "New York", "LOC"]


def test_a_model_that_writes_has_two_views(browser: Browser, decoder: Any) -> None:  # noqa: F811
    with running_server(decoder) as url:
        browser.open(url)
        assert not browser.js("return document.getElementById('views').hidden")
        assert not browser.js("return document.querySelector('footer').hidden")
        browser.click("#tab-talk")
        browser.key("ArrowRight", 39)
        browser.wait(TASKS)
        assert browser.js("return document.activeElement.id") == "tab-tasks"
        chosen = "return [...document.querySelectorAll('[role=tab]')].map(t => t.getAttribute('aria-selected'))"
        assert browser.js(chosen) == ["false", "true"]
        browser.type("#task-text", "free prize")
        assert browser.js("return document.getElementById('task-run').disabled"), "a prompt needs labels"
        browser.type("#task-labels", "spam， ham")
        browser.click("#task-run")
        browser.wait(ANSWERED)
        assert browser.js("return document.querySelectorAll('tbody tr').length") == 2
        browser.js(
            "const s = document.getElementById('task'); s.value = 'translation'; s.dispatchEvent(new Event('change'))"
        )
        assert not browser.js(ANSWERED), "an answer belongs to its task"
        assert browser.js("return document.querySelector('[data-asked-labels]').hidden")
        browser.click("#task-run")
        browser.wait(ANSWERED)
        assert browser.text("#task-result h2") == EN["fieldNames"]["translation"]
        assert browser.js(FITS)
        browser.open(f"{url}/#tasks")
        browser.wait(TASKS)


def test_a_stop_and_an_error(browser: Browser, classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), classifier.predict_proba

    def slow(texts: list[str]) -> Any:
        gate.wait(20)
        return real(texts)

    monkeypatch.setattr(classifier, "predict_proba", slow)
    with running_server(classifier) as url:
        browser.open(url)
        browser.wait(TASKS)
        browser.type("#task-text", "free prize")
        browser.click("#task-run")
        browser.wait("return !document.getElementById('task-stop').hidden")
        assert browser.text("#task-figures") == EN["taskWorking"]
        browser.click("#task-stop")
        browser.wait("return !document.getElementById('task-run').hidden")
        assert browser.js("return document.getElementById('problem').hidden"), "a stop is no error"
        gate.set()
        monkeypatch.setattr(classifier, "predict_proba", lambda _: 1 / 0)
        browser.click("#task-run")
        browser.wait("return !document.getElementById('problem').hidden")
        assert "could not answer" in browser.text("#problem")
        monkeypatch.undo()
        browser.click("#task-run")
        browser.wait(ANSWERED)
        assert browser.js("return document.getElementById('problem').hidden")
