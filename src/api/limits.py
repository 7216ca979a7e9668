"""The limit of a request's body, as ASGI middleware: by its announced length, and by what really comes."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolfleet.api.problems import ApiProblem


class BodyLimit:
    """Ends the reading of a body that is too large with a 413.

    The error is raised where the body is read, so that the answer is made like any other, and a body that nobody reads
    costs nothing. With `Expect: 100-continue` the client is refused before it sends anything.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with a counting `receive`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            if announced.isdecimal() and int(announced) > self._max_bytes:
                raise self._too_large()
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> ApiProblem:
        return ApiProblem(
            413,
            "too-large",
            "Body too large",
            f"the body is above the limit of {self._max_bytes} bytes; pass large inputs by reference, for instance as "
            "a URL",
            limit=self._max_bytes,
        )
