"""Tool servers that crash, hang, answer after a cancel and send nonsense, below a real worker.

Two servers offer the same tools: what `again` offers may run twice, what `once` offers must not. Each fault is made at
one of them while a call of the other is on its way, which must not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SettingsFactory
from tests.faults import unruly_server
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_service, open_worker
from toolfleet.services.background_jobs.job_request import NewJob
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.task_models import JobRecord, Status, Tier

ROOT = Path(__file__).parents[2]
BOUND_S = 30.0
SHORT_S = 1.0
"""The time of a call where a server does not answer; enough for one that does."""
MODULE = ("-m", unruly_server.__name__)


@dataclass
class ToolServer:
    """One server; over HTTP it is started here, and again when it has crashed, as a supervisor would."""

    name: str
    folder: Path
    way: str
    port: int = 0
    starts: int = 0
    _keeping: asyncio.Task[None] | None = None

    @property
    def notes(self) -> Path:
        return self.folder / f"{self.name}.notes"

    def entry(self) -> dict[str, Any]:
        """Its place in an `mcpServers` file."""
        if self.way == "http":
            return {"url": f"http://127.0.0.1:{self.port}/mcp"}
        return {"command": sys.executable, "args": [*MODULE, "stdio", str(self.notes)], "cwd": str(ROOT)}

    def requests(self, tool: str) -> list[int]:
        """The id of every request to call this tool that has reached it."""
        if not self.notes.exists():
            return []
        lines = [json.loads(line) for line in self.notes.read_text().splitlines()]
        return [request for noted, _, request in lines if noted == tool]

    def calls(self, tool: str) -> int:
        """How often a call of this tool has reached it."""
        return len(self.requests(tool))

    async def start(self) -> None:
        if self.way == "http":
            self._keeping = asyncio.create_task(self._keep(), name=f"supervisor of {self.name}")
            await wait_until(lambda: self.port, f"{self.name} listens")

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def _keep(self) -> None:
        while True:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *MODULE, "http", str(self.notes), str(self.port),
                cwd=ROOT, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            try:
                assert process.stdout is not None
                self.port = int(await process.stdout.readline())
                self.starts += 1
                await process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


@dataclass
class Scene:
    """Both servers, a service and one worker."""

    again: ToolServer
    once: ToolServer
    service: JobService
    folder: Path
    slots: int
    jobs: list[str] = field(default_factory=list)

    @property
    def gate(self) -> Path:
        """What `late` waits for."""
        return self.folder / "gate"

    def other(self, server: ToolServer) -> ToolServer:
        return self.once if server is self.again else self.again

    async def submit(self, server: ToolServer, tool: str, *, max_retries: int = 20, **arguments: Any) -> str:
        call = {"tool_name": f"{server.name}/{tool}", "tool_args": arguments, "tool_call_id": "c1"}
        new = NewJob.model_validate({"tools": [call], "max_retries": max_retries})
        self.jobs.append((await self.service.submit(new)).job_id)
        return self.jobs[-1]

    async def reached(self, server: ToolServer, tool: str, times: int = 1) -> None:
        await wait_until(lambda: server.calls(tool) >= times, f"{times} calls of {tool} have reached {server.name}")

    async def over(self, job_id: str) -> JobRecord:
        async with asyncio.timeout(BOUND_S):
            return await self.service.wait_until_over(job_id)

    async def answers(self, server: ToolServer) -> None:
        """Both servers take calls, and no slot of the worker is lost: as many jobs at once as it has."""
        jobs = [await self.submit(each, "echo") for each in (server, self.other(server)) for _ in range(self.slots)]
        for job_id in jobs:
            assert (await self.over(job_id)).status is Status.COMPLETED

    @contextlib.asynccontextmanager
    async def bystander(self, broken: ToolServer) -> AsyncIterator[None]:
        """A call at the other server that is on its way meanwhile, and ends well in its first attempt."""
        job_id = await self.submit(self.other(broken), "late", until=str(self.gate), bystander=True)
        await self.reached(self.other(broken), "late")
        yield
        self.gate.touch()
        record = await self.over(job_id)
        assert (record.status, record.starts) == (Status.COMPLETED, 1)


@pytest.fixture
def call_timeout() -> float:
    """Of the worker's calls, in seconds. Tests in which a server never answers have a short one."""
    return 60.0


@pytest.fixture(params=["stdio", "http"])
async def scene(
    request: pytest.FixtureRequest,
    make_settings: SettingsFactory,
    nats_url: str,
    redis_url: str,
    tmp_path: Path,
    call_timeout: float,
) -> AsyncIterator[Scene]:
    async with contextlib.AsyncExitStack() as stack:
        again, once = (ToolServer(name, tmp_path, str(request.param)) for name in ("again", "once"))
        for server in (again, once):
            stack.push_async_callback(server.stop)
            await server.start()
        config = tmp_path / "mcp.json"
        config.write_text(json.dumps({"mcpServers": {server.name: server.entry() for server in (again, once)}}))
        settings = make_settings(
            nats_url=nats_url,
            redis_url=redis_url,
            mcp_config=config,
            tool_policy={"again/*": "repeatable", "once/*": "once"},
            concurrency=4,
            call_timeout=call_timeout,
            retry_delays=(0.2,),
            retry_jitter=0.0,
        )
        wired = await stack.enter_async_context(open_service(settings))
        worker = await stack.enter_async_context(open_worker(settings, Tier.NORMAL))
        running = asyncio.create_task(worker.run(), name="worker")
        scene = Scene(again, once, wired.service, tmp_path, settings.concurrency)
        try:
            yield scene
        finally:
            scene.gate.touch()
            worker.stop()
            async with asyncio.timeout(BOUND_S):
                assert await running == 0


async def test_a_server_crashes_in_a_call_that_may_run_twice(scene: Scene) -> None:
    async with scene.bystander(scene.again):
        record = await scene.over(await scene.submit(scene.again, "crash", times=1))
        # More than one retry where the server was not up again at the first: such a call is not sent.
        assert (record.status, record.starts) == (Status.COMPLETED, record.retries + 1)
        assert scene.again.calls("crash") == 2
        await scene.answers(scene.again)


async def test_a_server_crashes_at_every_call(scene: Scene) -> None:
    async with scene.bystander(scene.again):
        record = await scene.over(await scene.submit(scene.again, "crash", max_retries=2))
        assert record.error is not None
        assert (record.status, record.retries) == (Status.FAILED, 2)
        assert record.error.code in ("connection_lost", "tool_unavailable")
        assert 1 <= scene.again.calls("crash") <= 3
        await scene.answers(scene.again)


@pytest.mark.promise("G5")
async def test_a_server_crashes_in_a_call_that_must_not_run_twice(scene: Scene) -> None:
    async with scene.bystander(scene.once):
        record = await scene.over(await scene.submit(scene.once, "crash", times=1))
        assert (record.status, record.undecided, record.starts) == (Status.UNKNOWN, ("c1",), 1)
        assert scene.once.calls("crash") == 1
        await scene.answers(scene.once)


@pytest.mark.promise("G5")
@pytest.mark.parametrize("call_timeout", [SHORT_S])
async def test_a_server_never_answers(scene: Scene) -> None:
    repeatable = await scene.submit(scene.again, "hang", times=1)
    once = await scene.submit(scene.once, "hang")
    for server in (scene.again, scene.once):
        await scene.reached(server, "hang")
        # The server hangs in one call; the others do not wait for it.
        assert (await scene.over(await scene.submit(server, "echo"))).status is Status.COMPLETED
    record = await scene.over(repeatable)
    assert (record.status, record.retries, scene.again.calls("hang")) == (Status.COMPLETED, 1, 2)
    record = await scene.over(once)
    assert (record.status, record.undecided, scene.once.calls("hang")) == (Status.UNKNOWN, ("c1",), 1)
    await scene.answers(scene.again)


@pytest.mark.promise("G3")
@pytest.mark.promise("G8")
async def test_a_server_answers_after_the_cancel(scene: Scene, tmp_path: Path) -> None:
    async with scene.bystander(scene.once):
        job_id = await scene.submit(scene.once, "late", until=str(tmp_path / "too late"))
        await scene.reached(scene.once, "late")
        receipt = await scene.service.cancel(job_id)
        assert (receipt.outcome, receipt.reached) == ("cancelled", "tool")
        (tmp_path / "too late").touch()
        await scene.reached(scene.once, "answered")
        await scene.answers(scene.once)
        record = await scene.over(job_id)
        assert (record.status, record.completed_calls) == (Status.CANCELLED, 0)
        assert await scene.service.results(record) == {}
        assert [event.type.value for event in await scene.service.recent_events(record)][-1] == "job.cancelled"


@pytest.mark.parametrize("call_timeout", [SHORT_S])
async def test_an_answer_that_comes_after_the_time_is_up_is_not_taken_for_that_of_the_retry(
    scene: Scene, tmp_path: Path
) -> None:
    job_id = await scene.submit(scene.again, "late", until=str(tmp_path / "too late"))
    await scene.reached(scene.again, "late", times=2)
    (tmp_path / "too late").touch()
    record = await scene.over(job_id)
    assert (record.status, record.retries) == (Status.COMPLETED, 1)
    result = (await scene.service.results(record))["c1"]
    assert result.content[0]["text"] == f"request {scene.again.requests('late')[-1]}"
    await scene.answers(scene.again)


@pytest.mark.promise("G5")
@pytest.mark.parametrize("call_timeout", [SHORT_S])
async def test_a_server_sends_what_is_no_answer(scene: Scene) -> None:
    kinds = list(unruly_server.GARBLED)
    repeatable = [await scene.submit(scene.again, "garble", how=how, times=1) for how in kinds]
    once = [await scene.submit(scene.once, "garble", how=how, times=1) for how in kinds]
    for how, job_id in zip(kinds, repeatable, strict=True):
        record = await scene.over(job_id)
        assert (how, record.status, record.retries) == (how, Status.COMPLETED, 1)
    for how, job_id in zip(kinds, once, strict=True):
        record = await scene.over(job_id)
        end = (record.status, record.error.code if record.error else None)
        # What can't be read does not say whether the tool has run.
        assert end == (Status.UNKNOWN, "outcome_unknown"), how
        assert record.starts == 1
    assert (scene.again.calls("garble"), scene.once.calls("garble")) == (2 * len(kinds), len(kinds))
    await scene.answers(scene.once)
