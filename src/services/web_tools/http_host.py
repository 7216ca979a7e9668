"""An ASGI application on a socket, inside a running event loop, that says when it listens and where."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import IPv6Address, ip_address

import uvicorn
from starlette.types import ASGIApp

SHUTDOWN_GRACE = 2
"""Whole seconds that uvicorn gives open connections once it was told to stop."""


class _Server(uvicorn.Server):
    """uvicorn without its hold on signals, which would end the process by the signal instead of with exit code 0."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class HostedApp:
    """A listening application: `base_url` without a trailing slash, and the ways to wait for its end."""

    def __init__(self, server: _Server, task: asyncio.Task[None], base_url: str) -> None:
        self._server = server
        self._task = task
        self.base_url = base_url

    async def ended(self) -> None:
        """Return when the server has stopped by itself; raises what it failed with."""
        await asyncio.shield(self._task)

    def close_as_on_signal(self, signum: int) -> None:
        """What uvicorn does on SIGTERM. Event streams that only end with their client hear of it and end as well."""
        self._server.handle_exit(signum, None)


@asynccontextmanager
async def host_app(app: ASGIApp, host: str, port: int) -> AsyncIterator[HostedApp]:
    """Serve `app` while the context is open; port 0 takes a free one.

    Raises:
        OSError: the address cannot be bound; the message names it.
    """
    listener = _bind(host, port)
    bound_port = listener.getsockname()[1]
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=SHUTDOWN_GRACE
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name=f"http-host-{bound_port}")
    listening = asyncio.create_task(server.listening.wait())
    try:
        await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not server.listening.is_set():
            await task
            raise RuntimeError(f"the HTTP server on {host}:{bound_port} ended while starting; see the log above")
        yield HostedApp(server, task, f"http://{_in_url(host)}:{bound_port}")
    finally:
        listening.cancel()
        server.should_exit = True
        await task
        listener.close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {reason}; choose another host or port") from error
    listener.setblocking(False)
    return listener


def _in_url(host: str) -> str:
    """What a client on this machine connects to: a wildcard address is none."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "[::1]" if isinstance(address, IPv6Address) else "127.0.0.1"
    return f"[{address}]" if isinstance(address, IPv6Address) else str(address)
