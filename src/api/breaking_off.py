"""What a client is told whose request is broken off when the server's time to stop is up."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolfleet.api.problems import ApiProblem, problem_response
from toolfleet.services.background_jobs.task_models import DEFAULT_TENANT, derived_job_id


class BrokenOff:
    """Answers a request with 503 where uvicorn cancels it.

    It does so to those that still run when `timeout_graceful_shutdown` is over, and its own answer, a bare 500, says
    neither that asking again helps nor whether a job was accepted.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; one that has begun to be answered breaks off as it is."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            if begun:
                raise
            request = Request(scope)
            await problem_response(request, _problem(request))(scope, receive, send)


def _problem(request: Request) -> ApiProblem:
    members: dict[str, Any] = {}
    detail = "the API stops; ask again"
    if key := getattr(request.state, "idempotency_key", None):
        members = {"job_id": derived_job_id(DEFAULT_TENANT, key), "accepted": "unknown"}
        detail += " with the same Idempotency-Key"
    return ApiProblem(503, "stopping", "Stopping", detail, **members)
