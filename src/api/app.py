"""The jobs API as an ASGI app; also a factory: ``uvicorn toolfleet.api.app:create_app --factory``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from toolfleet.api import control, dead_letters, fleet, health, jobs, openapi, problems, submit
from toolfleet.api.breaking_off import BrokenOff
from toolfleet.api.dependencies import Api
from toolfleet.api.limits import BodyLimit
from toolfleet.api.stopping import Stopping
from toolfleet.api.views import Views
from toolfleet.bootstrap import Wired, open_service, package_version
from toolfleet.settings import Settings

NAME = "api"
"""In NATS' list of connections, and as the worker of synchronous runs."""

_DESCRIPTION = """\
Tool calls of agents as durable jobs: submit, watch live, cancel, decide.

Errors are `application/problem+json` (RFC 9457). What a client has to know beside that: a 202 of a submit is a promise
that the job ends; after a 503 ask again with the same `Idempotency-Key`; a stream that broke off is continued with
`Last-Event-ID`.
"""


def create_app(settings: Settings | None = None, wired: Wired | None = None) -> FastAPI:
    """The app.

    Args:
        settings: from the environment where missing.
        wired: an open service, which stays the caller's to close; without it the app opens one of its own when it
            starts, and then raises as `bootstrap.open_service`.
    """
    if settings is None:
        settings = wired.core.settings if wired is not None else Settings()
    api = Api(settings, Views(settings.public_url), Stopping())

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(api.stopping.on_signals())
            if wired is not None:
                api.wired = wired
            else:
                api.wired = await stack.enter_async_context(open_service(settings, name=NAME, runs_jobs=True))
            try:
                yield
            finally:
                api.stopping.begin()
                api.wired = None

    app = FastAPI(
        title="toolfleet",
        summary="Durable background tool execution for AI agents.",
        description=_DESCRIPTION,
        version=package_version(),
        openapi_tags=openapi.TAGS,
        servers=[{"url": settings.public_url}] if settings.public_url else None,
        lifespan=lifespan,
        # Ids have no slash at their end: a redirect would turn a mistake into a second request.
        redirect_slashes=False,
    )
    app.state.api = api
    routers = (submit.router, jobs.router, control.router, dead_letters.router, fleet.router, health.router)
    for router in routers:
        app.include_router(router)
    problems.install(app, [route for router in routers for route in router.routes])
    openapi.complete(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(BrokenOff)
    return app
