"""A headless chromium for tests, driven through its debugging pipe (the Chrome DevTools Protocol): no driver needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ENTER, SHIFT = "\ue007", "\ue008"
SWITCHES = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update "
    "disable-sync disable-dev-shm-usage remote-debugging-pipe"
)
# It reads commands from descriptor 3 and writes to 4; copies first, for the pipes may have these very numbers.
START = (
    "import os, sys\n"
    "pipes = [os.dup(int(number)) for number in sys.argv[1:3]]\n"
    "while min(pipes) < 5: pipes = [os.dup(pipe) for pipe in pipes]\n"
    "os.dup2(pipes[0], 3); os.dup2(pipes[1], 4)\n"
    "os.execvp(sys.argv[3], sys.argv[3:])\n"
)


class Browser:
    """One page of a browser.

    Args:
        to_browser: where commands are written, each followed by a zero byte.
        from_browser: where answers and events are read.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.buffer, self.number, self.session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, seconds: float = 30, **parameters: Any) -> Any:
        """Send a command and wait for its answer; events are passed over."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while True:
            answer = self.receive(deadline)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.from_browser], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            piece = os.read(self.from_browser, 1 << 16)
            assert piece, "the browser has gone"
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        value: dict[str, Any] = json.loads(message)
        return value

    def open(
        self,
        url: str,
        *,
        language: str = "en",
        dark: bool = False,
        width: int = 1100,
        height: int = 800,
        name: str = "fake",
    ) -> None:
        """Open a page of the server and wait until it knows the model, whose name is given."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setUserAgentOverride", userAgent="test", acceptLanguage=language)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url="about:blank")  # so that a page that differs in its #part alone is read anew
        self.call("Page.navigate", url=url)
        self.wait(f"return document.getElementById('model-name')?.textContent === {json.dumps(name)}")

    def js(self, script: str) -> Any:
        """What a script returns."""
        answer = self.call(
            "Runtime.evaluate", expression=f"(() => {{ {script} }})()", returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> None:
        """Wait until a script returns something true."""
        deadline = time.monotonic() + seconds
        while not self.js(f"return Boolean((() => {{ {script} }})())"):
            assert time.monotonic() < deadline, f"still false: {script}\n{self.js('return document.body?.innerText')}"
            time.sleep(0.03)

    def type(self, selector: str, text: str) -> None:
        """Type into an element; ``ENTER`` is the key, ``SHIFT`` presses and releases the other one."""
        self.js(f"document.querySelector({selector!r}).focus()")
        shift, plain = 0, ""
        for character in [*text, ""]:
            if character not in (ENTER, SHIFT, ""):
                plain += character
                continue
            if plain:
                self.call("Input.insertText", text=plain)
                plain = ""
            if character == SHIFT:
                shift = 8 - shift
            elif character == ENTER:
                self.key("Enter", 13, "\r", shift)

    def key(self, name: str, code: int, text: str = "", modifiers: int = 0) -> None:
        """Press and release a key."""
        key = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse."""
        script = "const box = e.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]"
        x, y = self.js(
            f"const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'nearest'}}); {script}"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def text(self, selector: str) -> str:
        """The text of an element."""
        return str(self.js(f"return document.querySelector({selector!r}).textContent"))

    def screenshot(self, path: Path) -> None:
        """What is to be seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def running_browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with a profile of its own."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    to_browser, from_browser = os.pipe(), os.pipe()
    command = [sys.executable, "-c", START, str(to_browser[0]), str(from_browser[1]), chromium]
    process = subprocess.Popen(
        [*command, *(f"--{switch}" for switch in SWITCHES.split()), f"--user-data-dir={profile}"],
        pass_fds=(to_browser[0], from_browser[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        try:
            browser = Browser(to_browser[1], from_browser[0])
        except (AssertionError, OSError) as error:
            pytest.skip(f"chromium does not start here: {error}")
        yield browser
    finally:
        process.terminate()
        process.wait(10)
        os.close(to_browser[1])
        os.close(from_browser[0])
