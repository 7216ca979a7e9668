"""Runs the API with uvicorn, from a bound port to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Final

import structlog
import uvicorn
import uvloop

from toolfleet.api.app import NAME, create_app
from toolfleet.api.dependencies import Api
from toolfleet.bootstrap import Tools, open_service
from toolfleet.settings import Settings

log = structlog.get_logger(__name__)

Ready = Callable[[int], None]
"""Called with the port once requests are answered."""

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
FEW_FILES: Final = 4096
"""Open files below which an API says at its start how many streams it can serve at most."""


def raise_open_files() -> int:
    """Let this process have as many open files as the system permits it; that number.

    Every open stream is a file, and the soft limit is 1,024 on many systems, for programs that use `select`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):  # some systems tell a higher limit than they grant
            log.debug("api.open_files_kept", limit=soft)
    if soft < FEW_FILES:
        log.warning(
            "api.few_open_files",
            limit=soft,
            advice=f"further clients get no connection; raise the hard limit (ulimit -Hn, LimitNOFILE) to {FEW_FILES}",
        )
    return soft


def serve(settings: Settings, *, port: int | None = None, ready: Ready | None = None) -> None:
    """Serve until SIGTERM or SIGINT, in an event loop of its own; a second signal does not wait for open answers.

    Args:
        settings: where things are, and `api_host` and `api_port`.
        port: instead of `api_port`; 0 takes a free one.
        ready: told the port once requests are answered.

    Raises:
        OSError: the port is taken, or the host is not of this machine.
        DiscoveryError, StreamMismatch: as `bootstrap.open_service`; the latter also where it is found out later.
    """
    raise_open_files()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(ApiServer(settings, port=port, ready=ready).run(handle_signals=True))


class ApiServer:
    """The API in a running event loop, for programs that run other things beside it."""

    def __init__(
        self, settings: Settings, *, port: int | None = None, ready: Ready | None = None, tools: Tools | None = None
    ) -> None:
        """As `serve`; `tools` are the caller's own instead of the fleet's."""
        self._settings = settings
        self._port = settings.api_port if port is None else port
        self._ready = ready
        self._tools = tools
        self._server: _Server | None = None
        self._api: Api | None = None
        self._stopped = False

    async def run(self, *, handle_signals: bool = False) -> None:
        """Serve until `stop`; returns when open answers have ended, at most `drain_timeout` later. Raises as
        `serve`."""
        with bound(self._settings.api_host, self._port) as listener:
            async with open_service(self._settings, name=NAME, tools=self._tools, runs_jobs=True) as wired:
                app = create_app(self._settings, wired)
                self._api = app.state.api
                self._server = _Server(_config(app, self._settings), listener, self._ready)
                if self._stopped:
                    return
                state = wired.core.queue_state
                watch = asyncio.create_task(self._stop_when(state.failed))
                try:
                    with self._signals() if handle_signals else contextlib.nullcontext():
                        await self._server.serve(sockets=[listener])
                finally:
                    watch.cancel()
                if state.mismatch is not None:
                    raise state.mismatch

    def stop(self) -> None:
        """Take no new requests, end open streams, let the other answers end; a second call does not wait for them."""
        if self._server is not None:
            self._server.force_exit = self._server.force_exit or self._stopped
            self._server.should_exit = True
        if self._api is not None:
            self._api.stopping.begin()
        self._stopped = True

    async def _stop_when(self, failed: asyncio.Event) -> None:
        await failed.wait()
        self.stop()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which raises the signal again at the end: the exit code would not be 0."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, ready: Ready | None) -> None:
        super().__init__(config)
        self._listener = listener
        self._on_ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `ApiServer`'s."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says the port when it can be used."""
        await super().startup(sockets)
        if self.started:
            port = int(self._listener.getsockname()[1])
            log.info("api.ready", port=port)
            if self._on_ready is not None:
                self._on_ready(port)


def _config(app: object, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # an ASGI app
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=max(1, int(settings.drain_timeout)),
    )


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that is bound and does not listen yet: nobody connects before there is an answer.

    Raises:
        OSError: as `serve`.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # The protocol is named since asyncio sends without Nagle's delay, 40 ms an answer, only where it is TCP by name.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        # A restart must not wait for connections of the process before.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.setblocking(False)
        yield listener
