"""An API over HTTP on a free port, workers, and tools that a test holds in its hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.support.waiting import wait_until
from toolfleet.api.serve import ApiServer
from toolfleet.bootstrap import open_worker
from toolfleet.services.background_jobs.errors import ToolConnectionLost
from toolfleet.services.background_jobs.ports import CallContext, ToolSpec
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.tool_execution.local_runner import LocalAnswer, LocalToolRunner
from toolfleet.settings import Settings

JOBS = "/api/v1/jobs"
BOUND_S = 15
"""Of every wait in these tests; it only bounds a failing one."""

_SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0}, "text": {"type": "string"}, "data": {}},
    "required": ["n"],
    "additionalProperties": False,
}


class Toolbox:
    """Tools of the test: `echo` answers, `hold` waits for `release`, `step` reports what `steps` gives it, `boom`
    fails, `lost` loses its connection and must not run twice."""

    def __init__(self) -> None:
        self.calls: defaultdict[str, int] = defaultdict(int)
        """How often each tool was called."""
        self.release = asyncio.Event()
        self.steps: asyncio.Queue[str | None] = asyncio.Queue()
        """What `step` is to report next; None ends it."""
        self.boom_fails = True
        functions = {"echo": self._echo, "hold": self._hold, "step": self._step, "boom": self._boom, "lost": self._lost}
        self.runner = LocalToolRunner(
            {
                name: (
                    ToolSpec(name, "test", name, name, _SCHEMA if name == "echo" else {}, repeatable=name != "lost"),
                    function,
                )
                for name, function in functions.items()
            }
        )

    async def _echo(self, args: dict[str, Any], _: CallContext) -> LocalAnswer:
        self.calls["echo"] += 1
        return {"n": args["n"]}

    async def _hold(self, _: dict[str, Any], __: CallContext) -> LocalAnswer:
        self.calls["hold"] += 1
        await self.release.wait()
        return "released"

    async def _step(self, _: dict[str, Any], context: CallContext) -> LocalAnswer:
        self.calls["step"] += 1
        done = 0
        while (text := await self.steps.get()) is not None:
            done += 1
            context.on_progress(done, None, text)
        return "done"

    async def _boom(self, _: dict[str, Any], __: CallContext) -> LocalAnswer:
        self.calls["boom"] += 1
        if self.boom_fails:
            raise ValueError("boom")
        return "well"

    async def _lost(self, _: dict[str, Any], __: CallContext) -> LocalAnswer:
        self.calls["lost"] += 1
        raise ToolConnectionLost


@contextlib.asynccontextmanager
async def running_api(settings: Settings, tools: Toolbox | None) -> AsyncIterator[httpx.AsyncClient]:
    """The API, until the context ends; an HTTP client of it. Without `tools`, with those of the fleet: none."""
    async with running_server(settings, tools) as (_, client):
        yield client


@contextlib.asynccontextmanager
async def running_server(
    settings: Settings, tools: Toolbox | None
) -> AsyncIterator[tuple[ApiServer, httpx.AsyncClient]]:
    """The API's server and a client of it; the test may stop the server."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = ApiServer(settings, port=0, ready=port.set_result, tools=tools.runner if tools else None)
    running = asyncio.create_task(server.run(), name="api-server")
    await asyncio.wait({running, port}, timeout=BOUND_S, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        await running
    base = f"http://127.0.0.1:{port.result()}"
    try:
        async with httpx.AsyncClient(
            base_url=base, timeout=BOUND_S, limits=httpx.Limits(max_connections=None)
        ) as client:
            yield server, client
    finally:
        server.stop()
        async with asyncio.timeout(BOUND_S):
            await running


@contextlib.asynccontextmanager
async def running_worker(settings: Settings, tools: Toolbox, tier: Tier = Tier.NORMAL) -> AsyncIterator[None]:
    """A worker, until the context ends; tools that are held are released then."""
    async with open_worker(settings, tier, tools=tools.runner) as worker:
        running = asyncio.create_task(worker.run(), name=f"worker-{tier.value}")
        try:
            yield
        finally:
            tools.release.set()
            tools.steps.put_nowait(None)
            worker.stop()
            async with asyncio.timeout(BOUND_S):
                await running


def call(tool: str, **arguments: Any) -> dict[str, Any]:
    """One call as a client writes it."""
    return {"tool_name": tool, "tool_args": arguments}


def job_of(*calls: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """A job as a client writes it."""
    return {"tools": list(calls), **fields}


async def submit(client: httpx.AsyncClient, *calls: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """Submit a job that must be accepted; the answer's JSON."""
    answer = await client.post(JOBS, json=job_of(*calls, **fields))
    assert answer.status_code == 202, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def ended(client: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    """The job once it is terminal."""

    async def look() -> dict[str, Any] | None:
        job: dict[str, Any] = (await client.get(f"{JOBS}/{job_id}")).json()
        # None where the job can not be asked for, as a moment after an outage.
        return job if job.get("output_available") else None

    found = await wait_until(look, f"job {job_id} has ended", timeout=BOUND_S)
    assert found is not None
    return found


async def in_status(client: httpx.AsyncClient, job_id: str, status: str) -> None:
    """Until the job has a status."""

    async def look() -> bool:
        return bool((await client.get(f"{JOBS}/{job_id}")).json().get("status") == status)

    await wait_until(look, f"job {job_id} is {status}", timeout=BOUND_S)


@dataclass
class Frame:
    """One frame of a stream: an event, or comments alone."""

    id: str | None = None
    event: str | None = None
    data: Any = None
    comments: list[str] = field(default_factory=list)


async def frames(response: httpx.Response) -> AsyncIterator[Frame]:
    """The frames of an event stream, as the WHATWG rules read them."""
    frame, data = Frame(), []
    async for line in response.aiter_lines():
        if not line:
            frame.data = json.loads("\n".join(data)) if data else None
            yield frame
            frame, data = Frame(), []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "":
                frame.comments.append(value)
            case "id":
                frame.id = value
            case "event":
                frame.event = value
            case "data":
                data.append(value)


async def read_stream(client: httpx.AsyncClient, url: str, **headers: str) -> list[Frame]:
    """All events of a stream that ends by itself; comments left out."""
    async with asyncio.timeout(BOUND_S), client.stream("GET", url, headers=headers) as response:
        assert response.status_code in (200, 204), await response.aread()
        return [frame async for frame in frames(response) if frame.event is not None]


def problem(answer: httpx.Response, status: int, kind: str | None = None) -> dict[str, Any]:
    """The body of an answer that must be a problem of RFC 9457."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["instance"] == answer.request.url.raw_path.decode().partition("?")[0]
    if kind is not None:
        assert body["type"] == f"urn:toolfleet:problem:{kind}"
    return body
