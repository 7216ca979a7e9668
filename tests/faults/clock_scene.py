"""A fleet of worker processes with clocks of their own, and a job that is held while they are moved."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.background_jobs import worker_main
from tests.background_jobs.harness import job
from tests.faults.clocks import HOUR_S, Clock
from tests.support.waiting import wait_until
from toolfleet.bootstrap import Core
from toolfleet.services.background_jobs.errors import StoreUnavailable
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.redis_records import root_of
from toolfleet.services.background_jobs.task_models import JobRecord, Status
from toolfleet.services.embedded.process import ChildProcess
from toolfleet.settings import Settings

ROOT = Path(__file__).parents[2]
BOUND_S = 30.0

_TOLD = {
    "stream", "subject_prefix", "dlq_stream", "dlq_subject_prefix", "stream_max_bytes", "dlq_max_bytes", "lease",
    "ack_wait", "recovery_check_interval", "retry_delays", "retry_jitter", "drain_timeout",
}  # fmt: skip


@dataclass
class Scene:
    """Servers, the clock of Redis and one for other processes, a service with a true clock, worker processes."""

    settings: Settings
    redis_clock: Clock
    clock: Clock
    service: JobService
    core: Core
    folder: Path
    workers: list[ChildProcess] = field(default_factory=list)
    held: str = ""

    @property
    def gate(self) -> Path:
        """What `hold` waits for."""
        return self.folder / "gate"

    async def start_worker(self, *, clock: Clock | None = None) -> ChildProcess:
        """A worker that is ready for jobs, with a clock of its own or the true one."""
        name = f"w{len(self.workers) + 1}"
        values = self.settings.model_dump(include=_TOLD) | {"worker_name": name}
        for url in ("nats_url", "redis_url"):
            values[url] = getattr(self.settings, url).get_secret_value()
        told = {"settings": values, "tier": "normal", "ledger": str(self.folder / "ledger")}
        command = [sys.executable, "-m", worker_main.__name__, json.dumps(told)]
        process = ChildProcess(
            command, ROOT, self.folder / f"{name}.log", env={**os.environ, **(clock.environment if clock else {})}
        )
        self.workers.append(process)

        async def ready() -> bool:
            assert process.running, process.log_tail()
            with contextlib.suppress(StoreUnavailable):
                return any(worker.pid == process.pid for worker in await self.service.workers())
            return False

        await wait_until(ready, f"{name} is ready", timeout=BOUND_S)
        return process

    async def submit(self, *tools: str, **fields: Any) -> str:
        return (await self.service.submit(job(*((tool, {"until": str(self.gate)}) for tool in tools), **fields))).job_id

    async def over(self, job_id: str) -> JobRecord:
        async with asyncio.timeout(BOUND_S):
            return await self.service.wait_until_over(job_id)

    async def record(self, job_id: str) -> JobRecord:
        record = (await self.service.get(job_id)).record
        assert record is not None
        return record

    def ledger(self) -> list[str]:
        """Lines without the process id."""
        with contextlib.suppress(FileNotFoundError):
            return [line.rpartition(" ")[0] for line in (self.folder / "ledger").read_text().splitlines()]
        return []

    async def noted(self, line: str) -> None:
        await wait_until(lambda: line in self.ledger(), f"{line!r} is noted")

    async def begin_held(self) -> str:
        """A job whose two calls, one of which must not run twice, last until `end_held`; `lease_moves` looks at it."""
        self.held = await self.submit("hold", "once_hold")
        await self.noted("begin c1 1")
        await self.noted("begin c2 1")
        return self.held

    async def end_held(self) -> None:
        """It was one attempt from its beginning to its end, and nothing else was started twice either."""
        self.gate.touch()
        record = await self.over(self.held)
        assert (record.status, record.fence, record.starts) == (Status.COMPLETED, 1, 1)
        await self.queue_is_empty()
        assert [line for line in self.ledger() if not line.endswith(" 1")] == []

    async def move_redis(self, jump: int) -> None:
        """Until Redis tells the new time."""
        self.redis_clock.jump(jump)

        async def moved() -> bool:
            now, _ = await self.core.client.time()
            return abs(int(now) - time.time() - jump) < HOUR_S / 2

        await wait_until(moved, f"the clock of Redis is {jump} s ahead")

    async def lease_moves(self) -> None:
        """Until the lease of the held job was renewed."""
        key = f"{root_of(self.held)}:job:{self.held}"
        before = await self.core.client.hget(key, "lease_until")

        async def moved() -> bool:
            return bool(await self.core.client.hget(key, "lease_until") != before)

        await wait_until(moved, "the lease is renewed", timeout=BOUND_S)

    async def queue_is_empty(self) -> None:
        async def empty() -> bool:
            return (await self.core.queue.stats()).messages == 0

        await wait_until(empty, "the stream is empty", timeout=BOUND_S)
