"""An httpx transport that connects to the very address that was checked.

The check happens where the connection is made: the name is resolved once, every answer is judged, and the socket is
opened to that address and no other. A second lookup between check and connect, the gap of DNS rebinding, does not
exist. The connection pool is keyed by host name, so TLS (SNI, certificate) and `Host` still speak of the name.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import httpcore
import httpx

from toolfleet.services.web_tools.address_guard import AddressGuard

_ADDRESSES_TRIED = 4
"""Of one host, each with its share of the time-out: enough for two address families with a spare each."""

# From the specific to the general; the first match counts.
_AS_HTTPX: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.WriteTimeout, httpx.WriteTimeout),
    (httpcore.PoolTimeout, httpx.PoolTimeout),
    (httpcore.TimeoutException, httpx.ReadTimeout),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.WriteError, httpx.WriteError),
    (httpcore.NetworkError, httpx.ReadError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
    (httpcore.ProtocolError, httpx.LocalProtocolError),
    (httpcore.UnsupportedProtocol, httpx.UnsupportedProtocol),
)


@contextmanager
def _as_httpx_errors() -> Iterator[None]:
    try:
        yield
    except tuple(source for source, _ in _AS_HTTPX) as error:
        target = next(target for source, target in _AS_HTTPX if isinstance(error, source))
        raise target(str(error)) from error


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Opens TCP connections to checked addresses only; unix sockets, which no URL can ask for, not at all."""

    def __init__(self, guard: AddressGuard) -> None:
        self._guard = guard
        self._sockets = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve, check all, connect to the first that answers.

        Raises:
            AddressRefusedError: an address of the host is not allowed.
            FetchFailedError: the name does not resolve.
            httpcore.ConnectError, httpcore.ConnectTimeout: of the last address tried.
        """
        addresses = (await self._guard.addresses_for(host, port))[:_ADDRESSES_TRIED]
        share = None if timeout is None else timeout / len(addresses)
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in addresses:
            try:
                return await self._sockets.connect_tcp(str(address), port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx_errors():
            async for chunk in self._response.aiter_stream():
                yield chunk

    async def aclose(self) -> None:
        with _as_httpx_errors():
            await self._response.aclose()


class PinnedTransport(httpx.AsyncBaseTransport):
    """HTTP/1.1 over connections that `PinnedBackend` opened. No proxies: a proxy would do its own lookups.

    Args:
        guard: which addresses are allowed.
        ssl_context: shared by crawls, since building one reads every root certificate.
        max_connections: of this transport, to all hosts together.
    """

    def __init__(self, guard: AddressGuard, *, ssl_context: ssl.SSLContext, max_connections: int) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=max_connections,
            keepalive_expiry=5,
            network_backend=PinnedBackend(guard),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request.

        Raises:
            FetchFailedError: the guard refused the host or could not resolve it.
            httpx.TransportError: as any httpx transport.
        """
        outgoing = httpcore.Request(
            method=request.method,
            url=httpcore.URL(
                scheme=request.url.raw_scheme,
                host=request.url.raw_host,
                port=request.url.port,
                target=request.url.raw_path,
            ),
            headers=request.headers.raw,
            content=cast("httpx.AsyncByteStream", request.stream),
            extensions=request.extensions,
        )
        with _as_httpx_errors():
            incoming = await self._pool.handle_async_request(outgoing)
        return httpx.Response(
            incoming.status, headers=incoming.headers, stream=_Body(incoming), extensions=incoming.extensions
        )

    async def aclose(self) -> None:
        """Close every connection."""
        with _as_httpx_errors():
            await self._pool.aclose()
