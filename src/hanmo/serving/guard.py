"""What every request passes first: only this machine's names, no other site's pages, and safe headers on every answer.

A server on 127.0.0.1 is still reachable from any web page the user opens. Two checks keep such pages out:

- *DNS rebinding*: a page at evil.example whose name suddenly points to 127.0.0.1 sends ``Host: evil.example``; only the
  names of this machine are answered. The port is not compared, so that an SSH tunnel may use another one.
- *cross-site requests*: browsers put the site of the page into ``Origin``; where it is present it must be this server.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hanmo.serving.problems import ApiError

LOCAL_HOST = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?", re.IGNORECASE)

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """ASGI middleware with the checks above."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        problem = check(Headers(scope=scope))
        if problem is not None:
            await problem_response(problem)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)


def check(headers: Headers) -> ApiError | None:
    """The reason to refuse a request with these headers, if there is one."""
    host = headers.get("host", "")
    if not LOCAL_HOST.fullmatch(host):
        return ApiError(
            "this server answers only to 127.0.0.1, localhost and [::1]", status=403, code="host_not_allowed"
        )
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        return ApiError("requests from other sites are not allowed", status=403, code="origin_not_allowed")
    return None


def problem_response(problem: ApiError, **headers: Any) -> JSONResponse:
    """An error as an HTTP answer."""
    return JSONResponse(problem.body(), problem.status, {**problem.headers(), **headers})
