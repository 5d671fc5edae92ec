"""The HTTP application: OpenAI's routes over a language model, tasks over any model, health, and the page.

=====================================  ==========================================================================
``GET /``                              the page (files of ``serving/web``)
``GET /v1/models``, ``/v1/models/ID``  the model, with extra fields: ``context_length``, ``writes``, ``chat``, ``tasks``
``POST /v1/completions``               continue text
``POST /v1/chat/completions``          answer a conversation through the model's own chat template
``GET /v1/tasks``                      the tasks that the model can do
``POST /v1/tasks/TASK``                answer texts
``GET /tokenizer_info``                the control tokens and the chat template
``POST /tokenize``, ``/detokenize``    ids of a text, text of ids, for clients that send ids
``GET /livez``                         200 while the process lives
``GET /readyz``, ``/health``           200 while requests are taken, else 503
=====================================  ==========================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from hanmo.serving.answers import ChatFormat, CompletionFormat, Format, Usage, collect
from hanmo.serving.generation import Piece, Plan, plan_chat, plan_completion
from hanmo.serving.guard import Guard, problem_response
from hanmo.serving.problems import ApiError, as_api_error
from hanmo.serving.runner import Job, Runner
from hanmo.serving.schema import (
    MAX_BODY_BYTES,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingFields,
    TaskRequest,
    TokenizeRequest,
    parse_request,
)
from hanmo.serving.tasks import TaskTable
from hanmo.serving.tokens import detokenize, tokenize, tokenizer_info

T = TypeVar("T")

BODY_SECONDS = 30.0  # a client that sends its body slower than this is let go
WEB = Path(__file__).parent / "web"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}

log = logging.getLogger(__name__)


def create_app(model: Any, model_name: str) -> FastAPI:
    """The application for one model.

    Args:
        model: what ``hanmo.load`` returned; a language model also continues texts.
        model_name: the id that clients send as ``model``.
    """
    service = Service(model, model_name)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.runner.start()
        yield
        await run_in_threadpool(service.runner.close)

    app = FastAPI(title="Hanmo", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.runner = service.runner
    app.add_middleware(Guard)
    app.add_exception_handler(ApiError, answer_problem)
    app.add_exception_handler(HTTPException, answer_http_exception)
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.model_card, methods=["GET"])
    app.add_api_route("/v1/completions", service.completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", service.chat_completions, methods=["POST"])
    app.add_api_route("/v1/tasks", service.task_list, methods=["GET"])
    app.add_api_route("/v1/tasks/{task:path}", service.task, methods=["POST"])
    app.add_api_route("/tokenizer_info", service.tokenizer_info, methods=["GET"])
    app.add_api_route("/tokenize", service.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", service.detokenize, methods=["POST"])
    app.add_api_route("/livez", service.livez, methods=["GET"])
    app.add_api_route("/readyz", service.readyz, methods=["GET"])
    app.add_api_route("/health", service.readyz, methods=["GET"])
    for path in sorted(WEB.iterdir()):
        if path.suffix in MEDIA_TYPES:
            app.add_api_route("/" if path.name == "index.html" else f"/{path.name}", page_file(path), methods=["GET"])
    return app


class Service:
    """The routes of one model."""

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.writes = hasattr(model, "stream")
        self.tasks = TaskTable(model, name)
        self.name = name
        self.created = int(time.time())
        self.runner = Runner()

    async def models(self) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [self.card()]})

    async def model_card(self, name: str) -> Response:
        """Describe the model."""
        self.check_name(name)
        return JSONResponse(self.card())

    async def livez(self) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """The model takes requests."""
        ready = self.runner.ready
        return JSONResponse({"status": "ok" if ready else "stopping"}, 200 if ready else 503)

    async def completions(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        fields = parse_request(await read_body(request), CompletionRequest)
        return await self.answer(request, fields, lambda: plan_completion(self.model, fields), CompletionFormat)

    async def chat_completions(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        fields = parse_request(await read_body(request), ChatRequest)
        return await self.answer(request, fields, lambda: plan_chat(self.model, fields), ChatFormat)

    async def task_list(self) -> Response:
        """``GET /v1/tasks``."""
        return JSONResponse({"object": "list", "data": self.tasks.cards()})

    async def task(self, request: Request, task: str) -> Response:
        """``POST /v1/tasks/TASK``: planned off the event loop, answered by the workers."""
        self.tasks.find(task)
        fields = parse_request(await read_body(request), TaskRequest)
        self.check_name(fields.model)
        try:
            plan = await run_in_threadpool(self.tasks.plan, task, fields)
        except Exception as error:
            raise logged(error) from error
        job = self.runner.submit(plan.run)
        try:
            blocks = await self.results(request, job, listed(job))
        finally:
            plan.watch.gone.set()
        if blocks is None:
            return Response(status_code=499)
        return JSONResponse(plan.whole([row for block in blocks for row in block]))

    async def tokenizer_info(self) -> Response:
        """``GET /tokenizer_info``."""
        self.check_writes()
        return JSONResponse(tokenizer_info(self.model))

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``."""
        fields = parse_request(await read_body(request), TokenizeRequest)
        self.check_name(fields.model or self.name)
        self.check_writes()
        return JSONResponse(await run_in_threadpool(tokenize, self.model, fields))

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``."""
        fields = parse_request(await read_body(request), DetokenizeRequest)
        self.check_name(fields.model or self.name)
        self.check_writes()
        return JSONResponse(await run_in_threadpool(detokenize, self.model, fields))

    def card(self) -> dict[str, Any]:
        """The model as OpenAI describes one, and what the page needs to know."""
        tokenizer = getattr(self.model, "tokenizer", None)
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "hanmo",
            "context_length": getattr(self.model, "context_length", None),
            "writes": self.writes,
            "chat": self.writes and bool(getattr(tokenizer, "chat_template", None)),
            "tasks": list(self.tasks.abilities),
        }

    def check_name(self, name: str) -> None:
        """Refuse a model that is not here."""
        if name != self.name:
            message = f"the model '{name[:80]}' does not exist here; this server has '{self.name}'"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    def check_writes(self) -> None:
        """Refuse to write with a model that does not."""
        if not self.writes:
            able = ", ".join(f"/v1/tasks/{task}" for task in self.tasks.abilities)
            kind = type(self.model).__name__
            message = f"the model '{self.name}' is a {kind} and writes no text; what it does: POST {able}"
            raise ApiError(message, param="model", code="model_writes_no_text")

    async def answer(
        self, request: Request, fields: SamplingFields, make_plan: Callable[[], Plan], kind: type[Format]
    ) -> Response:
        """Plan the request off the event loop, queue it, and answer at once or as a stream."""
        self.check_name(fields.model)
        self.check_writes()
        try:
            plan = await run_in_threadpool(make_plan)
        except Exception as error:
            raise logged(error) from error
        job = self.runner.submit(lambda: plan.run(self.model))
        form = kind(self.name, plan)
        if not fields.stream:
            return await self.answer_at_once(request, job, form)
        options = fields.stream_options
        usage = Usage(
            plan,
            at_end=bool(options and options.include_usage),
            always=bool(options and options.continuous_usage_stats),
        )
        return EventStream(events(job, form, usage), lambda: self.runner.cancel(job))

    async def answer_at_once(self, request: Request, job: Job[Piece], form: Format) -> Response:
        """Give all pieces as one answer."""
        choices = await self.results(request, job, collect(job))
        if choices is None:
            return Response(status_code=499)  # nobody reads it; the number is nginx's for "client closed request"
        return JSONResponse(form.whole(choices))

    async def results(self, request: Request, job: Job[Any], reading: Awaitable[T]) -> T | None:
        """Wait for what reading a job gives; None, and the job ends, where the client leaves first."""
        work = asyncio.ensure_future(reading)
        gone = asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return await work if work.done() else None
        except Exception as error:
            raise logged(error) from error
        finally:
            self.runner.cancel(job)
            work.cancel()
            gone.cancel()


async def listed(job: Job[T]) -> list[T]:
    """All results of a job."""
    return [result async for result in job]


class EventStream(StreamingResponse):
    """Server-sent events; however the answer ends, the work behind it ends too."""

    def __init__(self, content: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_end()


async def events(job: Job[Piece], form: Format, usage: Usage) -> AsyncIterator[str]:
    """The stream of an answer: chunks, then ``[DONE]``; or an error and no ``[DONE]``."""
    try:
        for chunk in form.opening():
            yield event(usage.add_to(chunk))
        async for piece in job:
            usage.count(piece)
            for chunk in form.chunks(piece):
                yield event(usage.add_to(chunk))
        if usage.at_end:
            yield event({**form.frame(), "choices": [], "usage": usage.total()})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(logged(error).body())


def event(value: dict[str, Any]) -> str:
    """One server-sent event. JSON has no raw line breaks, so it is always one line."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def logged(error: Exception) -> ApiError:
    """What the client is told; what it is not told goes to the log."""
    problem = as_api_error(error)
    if problem.code == "internal_error":
        log.error("a request failed", exc_info=error)
    return problem


async def read_body(request: Request) -> bytes:
    """The body, at most 1 MB, within 30 seconds.

    Raises:
        ApiError: 413 or 408. A body that is too large is read on for a while, so that the client gets to hear why.
    """

    async def read() -> bytes:
        body, size = bytearray(), 0
        async for piece in request.stream():
            size += len(piece)
            if size <= MAX_BODY_BYTES:
                body += piece
            elif size > 16 * MAX_BODY_BYTES:
                break
        if size > MAX_BODY_BYTES:
            raise ApiError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413, code="body_too_large")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except TimeoutError:
        raise ApiError("the body did not arrive in time", status=408, code="timeout") from None


async def disconnected(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def answer_problem(_: Request, error: Exception) -> Response:
    """Every error of ours has the same shape."""
    return problem_response(as_api_error(error))


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Errors of the framework (no such route, wrong method) in that shape too."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return problem_response(ApiError(message, status=error.status_code), **(error.headers or {}))


def page_file(path: Path) -> Callable[[], Any]:
    """A route that gives one file of the page; it is read once, and no request ever names a path."""
    content, media_type = path.read_bytes(), MEDIA_TYPES[path.suffix]

    async def read() -> Response:
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})

    return read
