"""A job's events as Server-Sent Events.

Written here and not taken from a library: the one in use elsewhere polls for the end of the server twice a second by
replacing a method of uvicorn for the whole process, and its pings know nothing of a store that is away.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

import anyio
import structlog
from fastapi.sse import format_sse_event
from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from toolfleet.api.stopping import Stopping
from toolfleet.services.background_jobs.errors import ToolfleetError
from toolfleet.services.background_jobs.event_reader import Pulse, StreamItem
from toolfleet.services.background_jobs.task_models import EventType, Gap, JobEvent

log = structlog.get_logger(__name__)

MEDIA_TYPE: Final = "text/event-stream"
HEADERS: Final = {
    "Cache-Control": "no-store",
    # nginx would gather events until its buffer is full.
    "X-Accel-Buffering": "no",
}

EVENT_SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "description": "One event of the stream.",
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9]{1,15}$"},
        "event": {"type": "string", "enum": [*(kind.value for kind in EventType), "gap"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}
"""Of an event as OpenAPI describes it; comments are none."""

_END: Final = object()


class EventStream(StreamingResponse):
    """The stream as a response."""

    def __init__(self, events: AsyncGenerator[StreamItem, None], stopping: Stopping, *, lost: int | None) -> None:
        """
        Args:
            events: of the job, from where the client left off.
            stopping: ends the stream when the server stops; the client reconnects elsewhere, or later.
            lost: the id that a client claims to have, where the log does not reach that far: it is told from its
                beginning.
        """
        self._frames = _frames(events, stopping, lost)
        super().__init__(self._frames, headers=HEADERS, media_type=MEDIA_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end, the client's or the server's going."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Shielded, since a client that goes cancels all of this, and the subscription has to be ended.
            with anyio.CancelScope(shield=True):
                await self._frames.aclose()


async def _frames(
    events: AsyncGenerator[StreamItem, None], stopping: Stopping, lost: int | None
) -> AsyncGenerator[bytes, None]:
    if lost is not None:
        yield frame(Gap(after=lost, resumes_at=1))
    async with contextlib.aclosing(events):
        while True:
            try:
                item = await stopping.unless(_next(events))
            except ToolfleetError as error:
                # The status line has been sent: all that can still be said is a comment. The client reconnects, and
                # is told as a problem what is wrong.
                log.warning("api.stream_failed", error=str(error))
                yield format_sse_event(comment="failed, connect again")
                return
            if item is None or item is _END:
                return
            assert isinstance(item, (JobEvent, Gap, Pulse))
            yield frame(item)


async def _next(events: AsyncGenerator[StreamItem, None]) -> object:
    # StopAsyncIteration can't cross a task's border.
    return await anext(events, _END)


def frame(item: StreamItem) -> bytes:
    """An item as it is written. A gap has no id: a client that reconnects must not believe to have what is missing."""
    match item:
        case JobEvent():
            return format_sse_event(id=str(item.id), event=item.type.value, data_str=_json(item.payload()))
        case Gap():
            return format_sse_event(event="gap", data_str=_json(item.model_dump()))
        case Pulse(reconnecting=True):
            return format_sse_event(comment="reconnecting")
        case Pulse():
            return format_sse_event(comment="heartbeat")


def _json(value: object) -> str:
    # A tool's progress may be NaN, which is not JSON.
    return to_json(value, inf_nan_mode="null").decode()
