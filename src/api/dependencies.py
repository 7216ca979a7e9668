"""What routes ask for: the service, the settings, and the checked parts of a request that several have."""

from __future__ import annotations

import difflib
import re
import uuid
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import Depends, Header, Path, Query, Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from toolfleet.api.problems import KEY_HEADER, MAX_NAME, USER_HEADER, ApiProblem
from toolfleet.api.stopping import Stopping
from toolfleet.api.views import Views
from toolfleet.bootstrap import Wired
from toolfleet.services.background_jobs.errors import JobNotFound
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.task_models import is_job_id
from toolfleet.settings import Settings

_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_EVENT_ID: Final = r"^[0-9]{1,15}$"
"""Of a log's entries: beyond it lies what a float of JSON or Lua can't tell apart."""


@dataclass(slots=True)
class Api:
    """What the routes stand on; kept in ``app.state.api``."""

    settings: Settings
    views: Views
    stopping: Stopping
    wired: Wired | None = None
    """Set while the app runs."""


def _api(request: Request) -> Api:
    api: Api = request.app.state.api
    return api


def _wired(api: Annotated[Api, Depends(_api)]) -> Wired:
    if api.wired is None:
        raise ApiProblem(503, "starting", "Starting", "the API has not started yet, or its lifespan was left out")
    return api.wired


def _service(wired: Annotated[Wired, Depends(_wired)]) -> JobService:
    return wired.service


ApiParts = Annotated[Api, Depends(_api)]
Parts = Annotated[Wired, Depends(_wired)]
Service = Annotated[JobService, Depends(_service)]


def known_query(request: Request) -> None:
    """Of a router: a query parameter that its route does not declare is refused.

    A misspelt filter that is ignored gives an answer to another question than the one asked.

    Raises:
        ApiProblem: 422, which names the parameter and those that there are.
    """
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    declared = _query_names(route.dependant)
    unknown = next((name for name in request.query_params if name not in declared), None)
    if unknown is None:
        return
    shown = unknown[:MAX_NAME]
    takes = f"this operation takes {', '.join(sorted(declared))}" if declared else "this operation takes none"
    raise ApiProblem(
        422, "invalid-request", "Invalid request", f"there is no query parameter '{shown}'; {takes}",
        path=f"$.{shown}", errors=[{"in": "query", "path": f"$.{shown}", "message": "unknown query parameter"}],
        nearest=difflib.get_close_matches(shown, declared),
    )  # fmt: skip


def _query_names(dependant: Dependant) -> set[str]:
    found = {field.alias for field in dependant.query_params}
    return found.union(*map(_query_names, dependant.dependencies))


def _job_id(
    job_id: Annotated[
        str,
        Path(
            description="The id of a job.",
            json_schema_extra={"pattern": "^job_[0-7][0-9A-HJKMNP-TV-Z]{25}$"},
            examples=["job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB"],
        ),
    ],
) -> str:
    # The pattern is documentation only: an id that can't be one of ours names no job, which is a 404.
    if not is_job_id(job_id):
        raise JobNotFound("this is not the id of a job; ids look like job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB")
    return job_id


JobIdPath = Annotated[str, Depends(_job_id)]


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """The key of a submit."""

    value: str
    known: bool
    """Whether the caller brought it, so that a job of it may be there."""


def _idempotency_key(
    request: Request,
    key: Annotated[
        str | None,
        Header(
            alias=KEY_HEADER,
            description="1 to 255 visible ASCII characters. The same key with the same body gives the same job, at "
            "least as long as its result is kept. Made where it is missing, and always in the answer.",
            json_schema_extra={"pattern": "^[!-~]{1,255}$"},
            examples=["order-4711"],
        ),
    ] = None,
) -> IdempotencyKey:
    if key is not None and not _KEY.fullmatch(key):
        raise ApiProblem(
            422, "invalid-request", "Invalid request", "the Idempotency-Key must be 1 to 255 visible ASCII characters",
            path=f"$.{KEY_HEADER}",
        )  # fmt: skip
    chosen = IdempotencyKey(key or str(uuid.uuid4()), known=key is not None)
    request.state.idempotency_key = chosen.value
    return chosen


SubmitKey = Annotated[IdempotencyKey, Depends(_idempotency_key)]


UserName = Annotated[
    str | None,
    Header(
        alias=USER_HEADER,
        description="Who asks, for the job's log. Taken as it is said: let the proxy set it that knows its users.",
        pattern=r"^[!-~]([ -~]{0,126}[!-~])?$",
        examples=["alice"],
    ),
]


def _after(
    last_event_id: Annotated[
        str | None,
        Header(
            alias="Last-Event-ID",
            description="The id of the last event the client has; set by the client itself when it reconnects, and "
            "stronger than `after`.",
            pattern=_EVENT_ID,
            examples=["12"],
        ),
    ] = None,
    after: Annotated[
        str | None,
        Query(description="As `Last-Event-ID`, for the first request.", pattern=_EVENT_ID, examples=["12"]),
    ] = None,
) -> StreamStart:
    chosen = last_event_id if last_event_id is not None else after
    return StreamStart(int(chosen or 0), reconnects=last_event_id is not None)


@dataclass(frozen=True, slots=True)
class StreamStart:
    """Where a stream begins."""

    after: int
    reconnects: bool
    """Whether this client had a stream before, as it says by `Last-Event-ID`."""


After = Annotated[StreamStart, Depends(_after)]
