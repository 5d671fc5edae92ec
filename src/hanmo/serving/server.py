"""Run the application on 127.0.0.1: take the port first, then load, serve, and stop without cutting answers off."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from hanmo.errors import ResourceError, UsageError
from hanmo.serving.app import create_app

if TYPE_CHECKING:
    from fastapi import FastAPI

HOST = "127.0.0.1"
DRAIN_SECONDS = 5  # how long running answers may go on after SIGTERM or Ctrl-C
PORTS_TO_TRY = 100


def listen(port: int) -> socket.socket:
    """Take a port of 127.0.0.1; 0 takes any free one.

    Raises:
        UsageError: no port has this number.
        ResourceError: the port is in use (the next free one is suggested) or reserved by the system.
    """
    if not 0 <= port <= 65535:
        raise UsageError(
            f"there is no port {port}", where="--port", fix="ports go from 1 to 65535", zh=f"没有 {port} 号端口"
        )
    try:
        return bind(port)
    except PermissionError:
        raise ResourceError(
            f"port {port} is reserved for the system",
            where="--port",
            fix="choose one from 1024 on, for example --port 8000",
            zh=f"端口 {port} 由系统保留，请选 1024 以上的端口，例如 --port 8000",
        ) from None
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        free = next_free(port)
        raise ResourceError(
            f"port {port} is in use",
            where=f"{HOST}:{port}",
            why="another program, perhaps another hanmo serve, listens there",
            fix=f"hanmo serve --port {free}",
            zh=f"端口 {port} 已被占用，请运行：hanmo serve --port {free}",
        ) from None


def bind(port: int) -> socket.socket:
    """A listening socket. It listens at once: a bound socket that does not listen does not keep others away."""
    # The protocol is named: only then does asyncio send small answers at once, else each waits 40 ms for the client.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener


def next_free(port: int) -> int:
    """The first free port after ``port``; where there is none nearby, any."""
    for candidate in range(port + 1, min(port + PORTS_TO_TRY, 65535) + 1):
        with contextlib.suppress(OSError), bind(candidate):
            return candidate
    with bind(0) as listener:
        return int(listener.getsockname()[1])


class Server(uvicorn.Server):
    """Uvicorn that lets running answers finish for a few seconds before it ends them with an error."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        runner = self.config.app.state.runner  # type: ignore[union-attr]
        runner.drain()
        timer = asyncio.get_running_loop().call_later(DRAIN_SECONDS, runner.abort)
        await super().shutdown(sockets)
        timer.cancel()


def make_server(app: FastAPI) -> Server:
    """The server of an application, quiet except for errors."""
    return Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_SECONDS + 5,
        )
    )


def serve(load: Callable[[], Any], name: str, port: int, announce: Callable[[str], None]) -> None:
    """Take the port, load the model and answer requests until SIGTERM or Ctrl-C.

    Args:
        load: loads the model; called after the port is taken, so that a port in use costs no waiting.
        name: the model's id in the API.
        port: of 127.0.0.1; 0 takes a free one.
        announce: called with the address as soon as requests are answered.

    Raises:
        HanmoError: the port cannot be had, or the model cannot be loaded.
    """
    with listen(port) as listener:
        server = make_server(create_app(load(), name))
        announce(f"http://{HOST}:{listener.getsockname()[1]}")
        # After its clean shutdown uvicorn raises the signal once more; a stop that was asked for is a success.
        previous = {number: signal.signal(number, ignore) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing."""
