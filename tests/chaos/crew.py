"""A few real processes for a scenario of one fault, and what they leave behind for the audit.

Clients ask an API of this process, or one of their own process where a scenario breaks or stops it. Nothing here waits
for a time: a process says that it is ready, stopped at a point, or dead, and a job is over or nothing can wake it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import SecretStr

from tests.chaos import member, woven
from tests.chaos.audit import Verdict, audit
from tests.chaos.clients import JOBS, Client
from tests.chaos.collecting import Collector
from tests.chaos.http_client import Gone
from tests.chaos.ledger import Entry, Ledger, entries
from tests.chaos.living import BOUND_S, Member
from tests.chaos.workload import JobPlan
from tests.support.waiting import wait_until
from toolfleet.api.serve import ApiServer
from toolfleet.bootstrap import Wired, open_service
from toolfleet.services.background_jobs.task_models import JobRecord
from toolfleet.settings import Settings

ROOT: Final = Path(__file__).parents[2]
LEASE_S: Final = 1.0
SHORT: Final[dict[str, Any]] = {
    "lease": LEASE_S,
    "ack_wait": LEASE_S,
    "retry_delays": (0.05,),
    "retry_jitter": 0.0,
    "redis_timeout": 2.0,
    "publish_timeout": 2.0,
    "drain_timeout": 4.0,
    "concurrency": 4,
    # The message is the promise. A scenario that is about the net below it says so.
    "recovery_check_interval": 3600.0,
}


@dataclass
class Crew:
    """Members, clients, and a look at the stores."""

    settings: Settings
    folder: Path
    wired: Wired
    collector: Collector
    ledger: Ledger
    client: Client
    broken: str | None = None
    """The build that members are, unless they are started otherwise."""
    short_grace: bool = False
    seed: int = 0
    """Of the jobs' keys, so of their ids."""
    members: list[Member] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    plans: list[JobPlan] = field(default_factory=list)

    # -- processes ---------------------------------------------------------------------------------------------

    async def worker(self, *armed: dict[str, Any], **overrides: Any) -> Member:
        """A worker that is ready for jobs."""
        return await self._start("worker", list(armed), overrides)

    async def api(self, *armed: dict[str, Any], **overrides: Any) -> tuple[Member, Client]:
        """An API of a process of its own, and its clients."""
        started = await self._start("api", list(armed), overrides)
        client = Client([int((self.folder / f"{started.name}.ready").read_text())], self.ledger, 0, lambda _: False)
        self.clients.append(client)
        return started, client

    async def _start(self, role: str, armed: list[dict[str, Any]], overrides: dict[str, Any]) -> Member:
        name = f"{role}-{len(self.members) + 1}"
        ready = self.folder / f"{name}.ready"
        told = {
            "role": role,
            "settings": plain(self.settings) | {"worker_name": name} | overrides,
            "effects": str(self.effects_path),
            "ready": str(ready),
        }
        how = {
            "armed": armed,
            "hits": str(self.folder / "hits"),
            "broken": self.broken,
            "short_grace": self.short_grace,
        }
        with (self.folder / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", woven.__name__, json.dumps(how), member.__name__, json.dumps(told),
                cwd=ROOT, stdout=log, stderr=log,
            )  # fmt: skip
        started = Member(name, process, self.folder)
        self.members.append(started)

        def is_ready() -> bool:
            assert process.returncode is None, f"{name} ended at its start:\n{started.log}"
            return ready.exists()

        await wait_until(is_ready, f"{name} is ready", BOUND_S)
        return started

    # -- jobs --------------------------------------------------------------------------------------------------

    def plan(self, *tools: str, args: dict[str, Any] | None = None, **fields: Any) -> JobPlan:
        """A job of tools of `tests.chaos.member`; its calls are named ``c1``, ``c2``, …"""
        calls = [
            {"tool_name": f"own/{tool}", "tool_args": args or {}, "tool_call_id": f"c{number}"}
            for number, tool in enumerate(tools, 1)
        ]
        number = len(self.plans)
        body = {"tools": calls, "priority": "normal", **fields}
        self.plans.append(JobPlan(number, 0.0, tools[0], body, f"key-{self.seed}-{number}"))
        return self.plans[-1]

    async def submit(self, plan: JobPlan, client: Client | None = None) -> str:
        """Ask until it is accepted; its id."""
        job_id = await (client or self.client).submit(plan.number, plan.body, plan.key)
        assert job_id is not None
        return job_id

    async def submits(self, *tools: str, client: Client | None = None, **fields: Any) -> str:
        """A job that is accepted; its id. Fields as of `plan`."""
        return await self.submit(self.plan(*tools, **fields), client)

    async def record(self, job_id: str) -> JobRecord | None:
        return await self.wired.core.store.get(job_id)

    async def over(self, job_id: str, generation: int = 1) -> JobRecord:
        """The record of a job that must end, once it has, and its message is gone."""

        async def ended() -> JobRecord | None:
            record = await self.record(job_id)
            stands = await self.wired.core.queue.stands(job_id)
            over = record is not None and record.status.terminal and record.generation >= generation
            return record if over and not stands else None

        record = await wait_until(ended, f"{job_id} is over", BOUND_S)
        assert record is not None
        return record

    async def settled(self, job_id: str, generation: int = 1) -> None:
        """Until the job is over, or nothing is left that could wake it; its client then looks at it."""

        async def done() -> bool:
            # In this order: a job ends before its message goes.
            return not await self.wired.core.queue.stands(job_id)

        await wait_until(done, f"nothing is left that could wake {job_id}", BOUND_S)
        record = await self.record(job_id)
        if record is not None and record.status.terminal and record.generation >= generation:
            await self.client.poll(job_id)
            await self.client.result(job_id)

    async def again(self, job_id: str, client: Client) -> None:
        """A person retries the job, once, in the ledger like any other; also at an API that dies of it."""
        await self.collector.note_letters()
        await self.ledger.write("asks", job=job_id, verb="retry", generation=1)
        with contextlib.suppress(Gone):
            answer = await client.ask("POST", f"{JOBS}/{job_id}/retry")
            await self.ledger.write("person", job=job_id, verb="retry", code=answer.status, generation=1)
            assert answer.status in (200, 202), answer.body

    def noted(self) -> list[Entry]:
        """What tools have noted, in order."""
        return list(entries(self.effects_path))

    def effects(self, what: str = "begin") -> list[tuple[str, int]]:
        """Call and attempt of what tools have noted, in order."""
        return [(entry["call"], entry["attempt"]) for entry in self.noted() if entry["what"] == what]

    async def begun(self, call: str, attempt: int) -> None:
        """Until a call of an attempt is in its tool."""
        await wait_until(lambda: (call, attempt) in self.effects(), f"{call} has begun in attempt {attempt}", BOUND_S)

    @property
    def gate(self) -> Path:
        """What `work` waits for where it is told to."""
        return self.folder / "gate"

    @property
    def effects_path(self) -> Path:
        return self.folder / "effects.jsonl"

    @property
    def views_path(self) -> Path:
        return self.folder / "views.jsonl"

    # -- what is left ------------------------------------------------------------------------------------------

    async def verdict(self) -> Verdict:
        """What the audit of the chaos runs says of it."""
        clients = (self.client, *self.clients)
        evidence = await self.collector.evidence(
            plans=self.plans,
            views=list(entries(self.views_path)),
            effects=self.noted(),
            max_starts=self.settings.max_starts,
            wrong=[wrong for client in clients for wrong in client.tally.wrong],
            silent=[silent for client in clients for silent in client.tally.silent],
        )
        return audit(evidence)


def plain(settings: Settings) -> dict[str, Any]:
    """What was set, as JSON takes it."""
    values: dict[str, Any] = settings.model_dump(mode="json", include=settings.model_fields_set)
    for name in values:
        if isinstance(secret := getattr(settings, name), SecretStr):
            values[name] = secret.get_secret_value()
    return values


@contextlib.asynccontextmanager
async def open_crew(settings: Settings, folder: Path, **about: Any) -> AsyncIterator[Crew]:
    """A crew without members, whose clients ask an API of this process; all has ended when the context has.

    Args:
        settings: where the servers are; `SHORT` and `about["overrides"]` are laid over them.
        folder: for logs and ledgers.
        about: `broken`, `short_grace` and `seed` of the `Crew`, and `overrides` of settings.
    """
    values = plain(settings) | SHORT | about.pop("overrides", {})
    short = Settings.model_validate(values)
    async with contextlib.AsyncExitStack() as stack:
        tools = member.local_tools(folder / "effects.jsonl")
        wired = await stack.enter_async_context(open_service(short, tools=tools))
        port = await stack.enter_async_context(_own_api(short, tools))
        ledger = Ledger(folder / "views.jsonl")
        stack.push_async_callback(ledger.aclose)
        crew = Crew(
            short,
            folder,
            wired,
            Collector(wired.core, folder / "letters.jsonl"),
            ledger,
            Client([port], ledger, 0, lambda _: False),
            **about,
        )
        stack.push_async_callback(_end, crew)
        yield crew


@contextlib.asynccontextmanager
async def _own_api(settings: Settings, tools: Any) -> AsyncIterator[int]:
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = ApiServer(settings, port=0, ready=port.set_result, tools=tools)
    running = asyncio.create_task(server.run(), name="the crew's API")
    either: set[asyncio.Future[Any]] = {running, port}
    await asyncio.wait(either, timeout=BOUND_S, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        await running
    try:
        yield port.result()
    finally:
        server.stop()
        async with asyncio.timeout(BOUND_S):
            await running


async def _end(crew: Crew) -> None:
    crew.gate.touch()
    for one in crew.members:
        await one.kill()
    for client in (crew.client, *crew.clients):
        client.over.set()
