"""The HTTP side of a remote model: how a request is sent, how often it is tried, how much of the answer is read.

The rules, each with a test:

- **Where**: only to the address that :mod:`hanmo.inference.address` has checked. Redirects are refused, so that neither
  key nor text goes to a host that nobody named. Proxies are used for public hosts alone. No message, ``repr`` or log
  shows a key, also where a server sends it back.
- **Again**: 408, 409, 429, 5xx and broken connections are tried again after a pause that doubles, with jitter, at least
  as long as ``Retry-After`` asks (up to a minute), within one deadline for the whole call. A stream that has delivered
  anything is not begun again: its text would be written twice.
- **How much**: a body, a line of a stream and an error message have bounds; a compressed answer was not asked for.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from hanmo import __version__
from hanmo.errors import DataError, HanmoError, ModelError, NetworkError, ResourceError, UsageError
from hanmo.inference.accounting import Usage
from hanmo.inference.address import check_address, check_key, find_key, import_httpx, is_private

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before the first and before later retries
LONGEST_RETRY_AFTER = 60.0
MAX_BODY = 32 << 20  # bytes of an answer; the log-probabilities of 128,000 tokens take about 12 MB
MAX_STREAM = 256 << 20
MAX_LINE = 4 << 20  # bytes of one line of a stream
MAX_ERROR_BODY = 64 << 10
MAX_MESSAGE = 500  # characters of a server's message that are shown
CONNECTION = "connection"  # code of problems with the connection that trying again does not solve
CONTEXT_CODES = ("context_length_exceeded", "exceed_context_size_error")


class ContextExceeded(UsageError):
    """The prompt does not fit into the context of the remote model."""


class Problem(Exception):
    """A request that was not answered as asked.

    Args:
        message: the server's message, or what happened to the connection; without the key, bounded.
        status: the HTTP status, None where there was no answer.
        code: the server's word for the error (its ``code``, else its ``type``).
        param: the field that the server names.
        retry_after: seconds the server asks to wait.
        retry: whether trying again makes sense; by default the status decides.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str = "",
        param: str = "",
        retry_after: float | None = None,
        retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after = retry_after
        number = status or 0
        by_status = number in (408, 409, 429) or (number >= 500 and number != 501)
        self.retry = retry if retry is not None else by_status and code != "insufficient_quota"

    def mentions(self, word: str) -> bool:
        """Whether the server complains about a field of the request."""
        return self.status in (400, 422) and (self.param == word or word in self.message)

    @property
    def wants_chat(self) -> bool:
        """Whether a refusal by ``/completions`` means that the model, or the server, only has the chat route."""
        if self.status in (404, 405, 501):
            return self.code != "model_not_found"
        told = self.message.lower()
        return self.status == 400 and "chat" in told and "completions" in told

    def as_error(self, where: str) -> HanmoError:
        """The error for a user."""
        status, told = self.status, self.message
        if self.code in CONTEXT_CODES or (status in (400, 413) and "context length" in told.lower()):
            return ContextExceeded(
                f"the text is too long for the model: {told}",
                where=where,
                fix="shorten the prompt, or ask for fewer new tokens",
                zh=f"文本超出模型的上下文：{told}。请缩短提示，或减少生成的词元数",
            )
        if status in (401, 403):
            return UsageError(
                f"the endpoint refuses the key ({status}): {told}",
                where=where,
                why="OPENAI_API_KEY is sent to the public API and to OPENAI_BASE_URL, HANMO_API_KEY to all others",
                fix="set the key that belongs to this endpoint",
                zh=f"接口拒绝了密钥（{status}）：{told}。OPENAI_API_KEY 只发给公共接口和 OPENAI_BASE_URL，"
                "其他地址使用 HANMO_API_KEY，请设置属于该接口的密钥",
            )
        if status == 404:
            return ModelError(
                f"the endpoint has no such model or route (404): {told}",
                where=where,
                fix="check the model's name and the address, which usually ends in /v1",
                zh=f"接口没有这个模型或路径（404）：{told}。请检查模型名称和地址（通常以 /v1 结尾）",
            )
        if status is None and not self.retry and self.code != CONNECTION:
            return ModelError(
                f"the endpoint's answer cannot be used: {told}",
                where=where,
                why="the server does not follow OpenAI's API, or something between answers in its place",
                fix="check the address, which usually ends in /v1",
                zh=f"接口的回答无法使用：{told}。请检查地址（通常以 /v1 结尾）",
            )
        if status is None or status < 400 or self.retry or status == 402 or self.code == "insufficient_quota":
            number = f" ({status})" if status else ""
            return NetworkError(
                f"the endpoint did not answer{number}: {told}",
                where=where,
                fix="try again later; check the address, the connection and the account",
                zh=f"接口没有给出回答{number}：{told}。请稍后重试，并检查地址、网络和账户",
            )
        return UsageError(
            f"the endpoint refuses the request ({status}): {told}",
            where=where,
            fix="change the option that the message names",
            zh=f"接口拒绝了请求（{status}）：{told}。请修改所指出的选项",
        )


# Requests ------------------------------------------------------------------------------------------------------------


class Endpoint:
    """An address that answers OpenAI's API, with retries and bounds.

    Args:
        base_url: the address that ends before ``/chat/completions``.
        key: sent as ``Authorization: Bearer``; by default :func:`find_key`.
        usage: its ``retries`` are counted here.
        timeout: seconds of silence that are borne.
        deadline: seconds for one call, retries and pauses included.
        max_retries: how often a failed request is repeated.
        transport: replaces the network; ``clock``, ``sleep`` and ``jitter`` replace time and chance (for tests).

    Raises:
        HanmoError: as :func:`check_address` and :func:`check_key`.
    """

    def __init__(
        self,
        base_url: str,
        usage: Usage,
        *,
        key: str | None = None,
        offline: bool = False,
        allow_http: bool = False,
        timeout: float = 300.0,
        deadline: float = 900.0,
        max_retries: int = 4,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        httpx = import_httpx()
        self.url = check_address(base_url, offline=offline, allow_http=allow_http)
        self._key = check_key(key if key is not None else find_key(self.url))
        self.usage = usage
        self.timeout, self.deadline, self.max_retries = timeout, deadline, max_retries
        self.clock, self.sleep, self.jitter = clock, sleep, jitter
        headers = {"User-Agent": f"hanmo/{__version__}", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        private = is_private(self.url.host)  # a proxy has no business between this machine and its own network
        try:
            self.client = httpx.Client(
                headers=headers,
                follow_redirects=False,
                trust_env=not private or self.url.scheme == "https",  # https may need the certificates named there
                mounts={"http://": None, "https://": None} if private else None,
                transport=transport,
            )
        except ImportError:  # ALL_PROXY=socks5://...
            raise ResourceError(
                "the environment names a SOCKS proxy, and the package for it is not installed",
                where="ALL_PROXY",
                fix="pip install socksio, or unset the variable",
                zh="环境变量 ALL_PROXY 指定了 SOCKS 代理，但缺少所需软件包。请运行 pip install socksio，或取消该变量",
            ) from None
        except ValueError:  # its message may hold the proxy's password
            raise UsageError(
                "the proxy in the environment cannot be used",
                where="HTTPS_PROXY, ALL_PROXY",
                fix="correct the variable or unset it",
                zh="环境变量中的代理（HTTPS_PROXY、ALL_PROXY）无法使用，请更正或取消设置",
            ) from None

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path.

        Raises:
            Problem: no answer, an answer that is an error, or one that is not a JSON object.
        """
        return self._persist(lambda stop: self._fetch("GET", path, None, stop))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a JSON object and return the answer's.

        Raises:
            Problem: as :meth:`get`.
            DataError: a text has a lone surrogate.
        """
        content = as_json(body)
        return self._persist(lambda stop: self._fetch("POST", path, content, stop))

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        """Send a JSON object and yield the objects of the streamed answer; None stands for ``[DONE]``.

        An answer given at once although a stream was asked for is one object and ``[DONE]``.

        Raises:
            Problem: as :meth:`get`, an error told inside the stream, or a stream that breaks off.
            DataError: a text has a lone surrogate.
        """
        content = as_json(body)
        stop = self.clock() + self.deadline
        attempt, delivered = 0, False
        while True:
            try:
                with self._open("POST", path, content, stop) as response:
                    for event in self._read_events(response, stop):
                        if event is not None and event.get("error"):
                            raise self._problem_of(event, None)
                        delivered = True
                        yield event
                return
            except Problem as problem:
                if delivered:
                    raise
                self._pause(problem, attempt, stop)
            attempt += 1

    def _persist(self, once: Callable[[float], T]) -> T:
        """Try until it works, the retries are used up, or the deadline is near."""
        stop = self.clock() + self.deadline
        attempt = 0
        while True:
            try:
                return once(stop)
            except Problem as problem:
                self._pause(problem, attempt, stop)
            attempt += 1

    def _pause(self, problem: Problem, attempt: int, stop: float) -> None:
        """Wait before the next attempt, or raise the problem where there must be none."""
        wait = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**attempt) * (0.5 + self.jitter() / 2)
        wait = max(wait, min(problem.retry_after or 0.0, LONGEST_RETRY_AFTER))
        if not problem.retry or attempt >= self.max_retries or self.clock() + wait >= stop:
            raise problem
        self.usage.add(retries=1)
        self.sleep(wait)

    def _fetch(self, method: str, path: str, content: bytes | None, stop: float) -> dict[str, Any]:
        with self._open(method, path, content, stop) as response:
            return as_object(b"".join(self._read(response, MAX_BODY, stop)))

    @contextlib.contextmanager
    def _open(self, method: str, path: str, content: bytes | None, stop: float) -> Iterator[httpx.Response]:
        """A successful answer whose body is still to be read; everything that goes wrong is a :class:`Problem`."""
        httpx = import_httpx()
        left = max(0.001, stop - self.clock())
        timeout = httpx.Timeout(min(self.timeout, left), connect=min(CONNECT_SECONDS, left))
        headers = {"Content-Type": "application/json"} if content is not None else {}
        url = self.url.copy_with(path=f"{self.url.path}/{path}")
        try:
            with self.client.stream(method, url, content=content, headers=headers, timeout=timeout) as response:
                self._check(response, stop)
                yield response
        except httpx.TimeoutException as error:
            raise Problem(f"nothing arrived in time ({type(error).__name__})", retry=True) from None
        except httpx.TransportError as error:
            text = self._clean(str(error)) or type(error).__name__
            raise Problem(text, code=CONNECTION, retry="CERTIFICATE_VERIFY_FAILED" not in text) from None

    def _check(self, response: httpx.Response, stop: float) -> None:
        """Raise a problem for every answer but a plain success."""
        if 300 <= response.status_code < 400:
            place = self._clean(response.headers.get("location", "")).partition("?")[0] or "another place"
            told = f"it redirects to {place}, and redirects are not followed; give the final address"
            raise Problem(told, status=response.status_code, retry=False)
        if response.status_code >= 400 or response.status_code < 200:
            raw = bytearray()
            for piece in self._read(response, MAX_BODY, stop):
                raw += piece
                if len(raw) > MAX_ERROR_BODY:  # longer than any message: cut
                    break
            try:
                value = as_object(bytes(raw))
            except Problem:
                text = raw.decode("utf-8", "replace").strip()
                value = {"message": "" if text.startswith("<") else text}  # an HTML page says nothing to a terminal
            raise self._problem_of(value, response)
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise Problem(f"the answer is compressed ({self._clean(encoding)}), which was not asked for", retry=False)

    def _problem_of(self, value: dict[str, Any], response: httpx.Response | None) -> Problem:
        """The problem that a server tells, in the several shapes that servers use."""
        error = value.get("error")
        fields: dict[str, Any] = error if isinstance(error, dict) else value
        told = next((fields[key] for key in ("message", "detail", "error") if fields.get(key)), "")
        message = self._clean(told if isinstance(told, str) else json.dumps(told, ensure_ascii=False))
        code = next((str(fields[key]) for key in ("code", "type") if isinstance(fields.get(key), str)), "")
        param = fields.get("param")
        if response is not None:
            status, retry_after = response.status_code, wished_pause(response.headers.get("retry-after", ""))
            message = message or self._clean(response.reason_phrase) or "no reason given"
        else:  # inside a stream: some servers put an HTTP status into ``code``
            number = fields.get("code")
            status, retry_after = number if type(number) is int and 400 <= number < 600 else 500, None
            message = message or "the stream ended with an error"
        return Problem(
            message, status=status, code=code, param=param if isinstance(param, str) else "", retry_after=retry_after
        )

    def _clean(self, text: str) -> str:
        """Text from outside for a terminal: bounded, one line, no control characters, and never the key."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join("".join(character if character.isprintable() else " " for character in text[:4096]).split())
        return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"

    def _read(self, response: httpx.Response, limit: int, stop: float) -> Iterator[bytes]:
        """The body in pieces; too many bytes, or too many seconds, are a problem."""
        size = 0
        for piece in response.iter_raw():
            size += len(piece)
            if size > limit:
                raise Problem(f"the answer is larger than {limit} bytes", retry=False)
            if self.clock() > stop:
                told = f"the answer was not complete after {self.deadline:.0f} seconds"
                raise Problem(told, code=CONNECTION, retry=False)
            yield piece

    def _read_events(self, response: httpx.Response, stop: float) -> Iterator[dict[str, Any] | None]:
        """The objects of a body: server-sent events, or one JSON object."""
        if response.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
            yield as_object(b"".join(self._read(response, MAX_BODY, stop)))
            yield None
            return
        for data in event_data(self._read(response, MAX_STREAM, stop)):
            if data.strip() == b"[DONE]":
                yield None
                return
            yield as_object(data)


# Formats -------------------------------------------------------------------------------------------------------------


def event_data(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The data of server-sent events (WHATWG HTML, section 9.2), wherever the bytes are cut.

    Raises:
        Problem: a line without end.

    >>> list(event_data([b"da", b"ta: a\\r", b"\\ndata:b\\n\\n: ping\\n\\nda", b"ta: c"]))
    [b'a\\nb', b'c']
    """
    data: list[bytes] = []
    for line in lines(pieces):
        if not line and data:
            yield b"\n".join(data)
            data = []
        elif line.startswith(b"data:"):
            data.append(line[5:].removeprefix(b" "))
    if data:  # the standard drops an event without its empty line; servers that forget the line mean it all the same
        yield b"\n".join(data)


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Lines that end with LF, CR LF or CR."""
    held = bytearray()
    for piece in pieces:
        searched = max(0, len(held) - 1)  # a CR at the end waited for its LF
        held += piece
        start = 0
        for match in re.finditer(rb"\r\n|\n|\r(?!\Z)", held[searched:]):
            yield bytes(held[start : searched + match.start()])
            start = searched + match.end()
        del held[:start]
        if len(held) > MAX_LINE:
            raise Problem(f"a line of the stream is longer than {MAX_LINE} bytes", retry=False)
    if held:
        yield bytes(held).removesuffix(b"\r")


def as_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        Problem: it is anything else.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):  # also bytes that are not UTF-8, and numbers with thousands of digits
        value = None
    if not isinstance(value, dict):
        raise Problem("the answer is not a JSON object; is this the address of an OpenAI-compatible API?", retry=False)
    return value


def as_json(body: dict[str, Any]) -> bytes:
    """A request as UTF-8.

    Raises:
        DataError: a text has a lone surrogate.
    """
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has half of a surrogate pair (U+{ord(error.object[error.start]):04X}), which is no character",
            fix="remove it, or read the file with the right encoding",
            zh="文本中有不成对的代理字符，它不是合法字符。请删除它，或用正确的编码读取文件",
        ) from None


def wished_pause(header: str) -> float | None:
    """Seconds that ``Retry-After`` asks to wait, given as a number or as a date; None where it says neither.

    >>> wished_pause("7"), wished_pause("soon"), wished_pause("Thu, 01 Jan 1970 00:00:00 GMT")
    (7.0, None, 0.0)
    """
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header.strip()):
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
