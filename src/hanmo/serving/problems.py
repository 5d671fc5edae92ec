"""Errors of the HTTP interface, in the shape that OpenAI's clients understand."""

from __future__ import annotations

from typing import Any

from hanmo.errors import DataError, HanmoError, UsageError

MAX_MESSAGE_CHARS = 1000  # an error never sends a whole prompt back


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
        message: what is wrong and what to do instead, in English as the rest of the API.
        status: the HTTP status; below 500 the request is at fault.
        param: the field at fault, such as ``messages[0].content``.
        code: a word that programs can test for, such as ``context_length_exceeded``.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        message = self.message
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[: MAX_MESSAGE_CHARS - 1] + "…"
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers that belong to the answer."""
        return {"Retry-After": str(self.retry_after)} if self.retry_after is not None else {}


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told about an error: the truth where it can act on it, no internals where it cannot."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (UsageError, DataError)):
        return ApiError(" ".join(part for part in (error.what, error.fix) if part))
    if isinstance(error, HanmoError):
        return ApiError(error.what, status=500)
    return ApiError("the server failed on this request; its log says why", status=500, code="internal_error")
