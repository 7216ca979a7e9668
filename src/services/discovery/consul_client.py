"""py-consul over httpx: the library's API objects, awaited.

py-consul leaves the HTTP client to its subclasses. Its own asyncio one needs aiohttp, passes it arguments that it
refuses together, and has no time-out; its own blocking one would need a thread for each question.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
from consul import base

from toolfleet.services.discovery.models import DiscoveryError

_DEFAULT_PORT = 8500
"""Of Consul's HTTP API."""

Params = Sequence[tuple[str, Any]] | None
Callback = Callable[[Any], Any]


class _HttpxClient(base.HTTPClient):  # type: ignore[misc]  # py-consul ships no types
    """The transport that py-consul's API objects call: each method returns an awaitable of the callback's value."""

    def __init__(self, host: str, port: int, scheme: str, timeout: float) -> None:
        super().__init__(host, port, scheme)
        # Proxies and certificates of the environment are not looked at: settings are its only reader.
        self._client = httpx.AsyncClient(timeout=timeout, trust_env=False)
        self._timeout = timeout

    async def _request(
        self, method: str, callback: Callback, path: str, params: Params, headers: Any, data: Any = None
    ) -> Any:
        try:
            # httpx bounds each read, not the whole answer.
            async with asyncio.timeout(self._timeout):
                response = await self._client.request(method, self.uri(path, params), headers=headers, content=data)
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"no whole answer within {self._timeout:g} s") from error
        return callback(base.Response(response.status_code, response.headers, response.text))

    async def get(
        self, callback: Callback, path: str, params: Params = None, headers: Any = None, raw: bool = False
    ) -> Any:
        return await self._request("GET", callback, path, params, headers)

    async def put(
        self, callback: Callback, path: str, params: Params = None, data: Any = "", headers: Any = None
    ) -> Any:
        return await self._request("PUT", callback, path, params, headers, data)

    async def post(
        self, callback: Callback, path: str, params: Params = None, data: Any = "", headers: Any = None
    ) -> Any:
        return await self._request("POST", callback, path, params, headers, data)

    async def delete(
        self, callback: Callback, path: str, params: Params = None, data: Any = "", headers: Any = None
    ) -> Any:
        return await self._request("DELETE", callback, path, params, headers, data)

    async def close(self) -> None:
        await self._client.aclose()


class ConsulClient(base.Consul):  # type: ignore[misc]  # py-consul ships no types
    """A Consul agent's HTTP API; `await client.health.service(...)` and so on, then `await client.http.close()`.

    Calls raise `consul.ConsulException` for an answer that is an error and `httpx.HTTPError` for none.
    """

    def __init__(self, address: str, token: str | None, timeout: float) -> None:
        """
        Args:
            address: as CONSUL_HTTP_ADDR has it, ``[http[s]://]host[:port]``.
            token: an ACL token, or None.
            timeout: seconds for a whole answer.

        Raises:
            DiscoveryError: the address is not of that form.
        """
        self._timeout = timeout
        scheme, host, port = parse_address(address)
        # `verify` is given because py-consul would ask the environment for it.
        super().__init__(host=host, port=port, scheme=scheme, verify=True)
        # Not an argument: there py-consul prefers the environment's token to the caller's.
        self.token = token

    def http_connect(self, host: str, port: int, scheme: str, verify: object = True, cert: object = None) -> object:
        return _HttpxClient(host, port, scheme, self._timeout)


def parse_address(address: str) -> tuple[str, str, int]:
    """Scheme, host (IPv6 in brackets) and port of a CONSUL_HTTP_ADDR.

    Raises:
        DiscoveryError: it is not of the form ``[http[s]://]host[:port]``.
    """
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host, port = parts.hostname, parts.port or _DEFAULT_PORT
    except ValueError:
        host, port = None, 0
    if host is None or parts.scheme not in ("http", "https") or parts.path.strip("/") or parts.query:
        raise DiscoveryError("CONSUL_HTTP_ADDR is not of the form host:port, http://host:port or https://host:port")
    return parts.scheme, f"[{host}]" if ":" in host else host, port
