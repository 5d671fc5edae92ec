"""Render a chat template, which is a program by a stranger, without trusting it.

A template comes with a downloaded model and is Jinja code. Three walls stand around it:

- Jinja's immutable sandbox, which refuses attributes that begin with an underscore and changes of its inputs; the
  inputs are plain strings, lists and dictionaries, and ``namespace`` refuses such names too.
- A limit on what it writes.
- A process of its own (:func:`serve`) with a limit on memory, which :class:`Renderer` kills when the time is up. A loop
  over a loop, or ``"%9999999999d"``, cannot be stopped reliably inside a process that must go on.

Text from messages is :class:`Content`, so that the caller can tell it from the template's own; :mod:`hanmo.text.chat`
says why.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any

from hanmo.errors import DataError, ModelError

SECONDS = 5.0  # a real template takes about a millisecond
MEMORY_BYTES = 1 << 29  # address space, of which Python and Jinja need a fifth
OUTPUT_CHARACTERS = 16_000_000


class Content(str):
    """Text from a message, in which some characters are replaced by stand-ins (see :mod:`hanmo.text.chat`).

    A template may search and cut it (``content.split('</think>')``). What it searches for is translated in the same
    way, and the results are ``Content`` again, so the template works as on the original text. What the template itself
    adds (``content + '<|im_end|>'``) keeps its own characters.
    """

    stand_ins: dict[int, str] = {}  # noqa: RUF012  for the one template that this process renders at a time

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        return Content(str.__add__(self, other))

    def __radd__(self, other: str) -> str:
        return Content(str.__add__(other, self))

    def __iter__(self) -> Iterator[str]:
        return (Content(character) for character in str.__iter__(self))

    def __hash__(self) -> int:
        return str.__hash__(self)


def translated(value: Any) -> Any:
    """What a template compares content with, in the characters of content."""
    if type(value) is str:
        return value.translate(Content.stand_ins)
    return tuple(map(translated, value)) if isinstance(value, tuple) else value


def as_content(value: Any) -> Any:
    """The result of a method of :class:`Content`: its strings are content too."""
    if type(value) is str:
        return Content(value)
    return type(value)(map(as_content, value)) if isinstance(value, list | tuple) else value


def lift(name: str) -> Callable[..., Any]:
    """The method ``name`` of ``str`` for :class:`Content`."""
    method = getattr(str, name)

    def call(self: Content, *args: Any, **options: Any) -> Any:
        given = {key: translated(value) for key, value in options.items()}
        return as_content(method(self, *map(translated, args), **given))

    return call


LIFTED = (
    *("__contains__", "__eq__", "__ne__", "__getitem__", "__mul__", "__rmul__", "capitalize", "count", "endswith"),
    *(
        "expandtabs",
        "find",
        "index",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
    ),
    *("rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper"),
)
for _name in LIFTED:
    setattr(Content, _name, lift(_name))


class Refused(Exception):
    """The template called ``raise_exception``: it does not accept these messages."""


@functools.cache
def environment() -> Any:
    """The Jinja environment that chat templates are written for: as in ``transformers``, and no wider."""
    from jinja2 import sandbox, utils
    from jinja2.exceptions import SecurityError

    class SafeNamespace(utils.Namespace):
        def __init__(*args: Any, **values: Any) -> None:
            for name in values:
                check_name(name)
            utils.Namespace.__init__(*args, **values)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            utils.Namespace.__setitem__(self, name, value)

    def check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")

    def raise_exception(message: Any) -> None:
        raise Refused(str(message))

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        del ensure_ascii  # escapes would hide stand-ins from the caller
        return json.dumps(value, ensure_ascii=False, **options)

    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = to_json
    made.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
        namespace=SafeNamespace,
    )
    for name in ("cycler", "joiner", "lipsum"):
        del made.globals[name]
    return made


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> Any:
    """A template ready to run; a server renders the same one all the time."""
    return environment().from_string(template)


def render(request: dict[str, Any]) -> dict[str, str]:
    """Render one request; the answer has ``text``, or ``refused`` or ``error`` with a message."""
    Content.stand_ins = {int(point): twin for point, twin in request["stand_ins"].items()}
    messages = [
        {key: value if key == "role" else Content(value) for key, value in message.items()}
        for message in request["messages"]
    ]
    parts: list[str] = []
    size = 0
    try:
        for part in compiled(request["template"]).generate({**request["values"], "messages": messages}):
            size += len(part)
            if size > OUTPUT_CHARACTERS:
                return {"error": f"it writes more than {OUTPUT_CHARACTERS:,} characters"}
            parts.append(str.__str__(part))
        return {"text": "".join(parts)}
    except Refused as error:
        return {"refused": str(error)[:1000]}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # whatever a stranger's program may raise
        line = getattr(error, "lineno", None)
        return {"error": f"{type(error).__name__}: {str(error)[:500]}" + (f" (line {line})" if line else "")}


def serve() -> None:
    """Answer requests, one JSON document a line, from standard input to standard output until it closes."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass  # not on this system: the time limit remains
    environment()  # import Jinja before the first request
    for line in sys.stdin:
        sys.stdout.write(json.dumps(render(json.loads(line))) + "\n")
        sys.stdout.flush()


class Renderer:
    """The process that renders templates; started when first needed, and again after it had to be killed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> subprocess.Popen[str]:
        """Start the process. It inherits the module search path and nothing else."""
        code = f"import sys; sys.path[:] = {sys.path!r}; from hanmo.text.template import serve; serve()"
        return subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us
        )

    def close(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """Send a request and return the answer.

        Raises:
            ModelError: no answer came in time, or the process died.
        """
        line = json.dumps(request) + "\n"
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = self.start()
                exchange(
                    self.process, json.dumps({"template": "", "values": {}, "messages": [], "stand_ins": {}}) + "\n", 60
                )
            answer = exchange(self.process, line, SECONDS)
            if not answer:
                self.close()
                raise template_error(
                    f"it did not finish within {SECONDS:.0f} seconds or {MEMORY_BYTES >> 20} MB of memory"
                )
        decoded: dict[str, str] = json.loads(answer)
        return decoded


def exchange(process: subprocess.Popen[str], line: str, seconds: float) -> str:
    """Send a line and read one; empty where the process died or was killed because the time was up."""
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        return send(stdin, stdout, line)
    finally:
        timer.cancel()


def send(stdin: IO[str], stdout: IO[str], line: str) -> str:
    """Write a line and read one; empty where the other side is gone."""
    try:
        stdin.write(line)
        stdin.flush()
        return stdout.readline()
    except (BrokenPipeError, ValueError, OSError):
        return ""


RENDERER = Renderer()
atexit.register(RENDERER.close)


def template_error(detail: str) -> ModelError:
    """The error for a template that cannot be used."""
    return ModelError(
        f"the chat template of this model failed: {detail}",
        fix="use a model with another template, or generate without one: hanmo generate",
        zh=f"该模型的对话模板出错：{detail}。请换一个模型，或用 hanmo generate 直接续写",
    )


def render_template(
    template: str, messages: list[dict[str, str]], values: dict[str, Any], stand_ins: dict[int, str]
) -> str:
    """Render ``template`` over ``messages``, whose texts already have their stand-ins.

    Raises:
        ModelError: the template is broken, too slow, or tries what the sandbox forbids.
        DataError: the template refuses these messages (it called ``raise_exception``).
    """
    answer = RENDERER.ask(
        {
            "template": template,
            "messages": messages,
            "values": values,
            "stand_ins": {str(k): v for k, v in stand_ins.items()},
        }
    )
    if "refused" in answer:
        raise DataError(
            f"the chat template of this model refuses these messages: {answer['refused']}",
            zh=f"该模型的对话模板不接受这些消息：{answer['refused']}",
        )
    if "error" in answer:
        raise template_error(answer["error"])
    return answer["text"]
