"""What the driver itself sees of streams and records, past the links that it cuts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.chaos.evidence import Evidence, Job, Letter, LogEntry
from tests.chaos.ledger import SyncedFile, entries
from tests.chaos.workload import JobPlan
from toolfleet.bootstrap import Core
from toolfleet.services.background_jobs.errors import QueueError, StoreError
from toolfleet.services.background_jobs.nats_dead_letters import NatsDeadLetters
from toolfleet.services.background_jobs.task_models import DEFAULT_TENANT, JobRecord, TaskDefinition

PAGE = 200
LETTERS_EVERY_S = 0.5


class Collector:
    """Reads streams and records directly."""

    def __init__(self, core: Core, letters: Path) -> None:
        self._core = core
        self._box = NatsDeadLetters(core.connection, core.queue.names, timeout_s=10)
        self._letters = SyncedFile(letters)
        self._path = letters
        self._seq = 0
        self._reading = asyncio.Lock()

    async def publish_raw(self, tier: str, job_id: str, payload: str) -> bool:
        """Put a message into the stream past the API; whether it is stored. Asked again while NATS is away."""
        names = self._core.queue.names
        while True:
            try:
                reply = await self._core.connection.request(f"{names.prefix}.{tier}.{job_id}", payload.encode(), 5)
            except QueueError:
                await asyncio.sleep(0.5)
                continue
            answer: dict[str, Any] = json.loads(reply.data)
            # Refused: the stream is full, or the message stands since an attempt whose answer was lost.
            return "error" not in answer or await self._core.queue.stands(job_id)

    async def note_letters(self) -> None:
        """Write the dead letters that are new into their ledger; a later redrive may take them away."""
        async with self._reading:
            while True:
                try:
                    page = await self._box.page(self._seq, PAGE)
                except QueueError:
                    return
                for letter in page.entries:
                    self._letters.write(
                        {"seq": letter.seq, "job": letter.job_id, "attempt": letter.fence, "reason": letter.reason,
                         "payload": letter.payload.decode(errors="replace")}
                    )  # fmt: skip
                    self._seq = letter.seq
                if page.cursor is None:
                    return

    async def keep_noting(self) -> None:
        """Until cancelled."""
        while True:
            await self.note_letters()
            await asyncio.sleep(LETTERS_EVERY_S)

    async def is_quiet(self) -> bool:
        """Whether nothing is left to do."""
        try:
            queue = await self._core.queue.stats()
            store = await self._core.store.stats()
        except (QueueError, StoreError):
            return False
        busy = sum(tier.running + tier.queued for tier in store.tiers.values())
        return queue.messages == 0 and busy == 0

    async def evidence(self, *, plans: Sequence[JobPlan], views: Sequence[dict[str, Any]], **rest: Any) -> Evidence:
        """Everything as it stands now, with what the ledgers say."""
        await self.note_letters()
        kinds = {view["job"]: plans[view["n"]] for view in views if view["k"] == "accepted"}
        jobs = [await self._job(record, kinds) for record in await self._records()]
        letters = [Letter(e["seq"], e["job"], e["attempt"], e["reason"], e["payload"]) for e in entries(self._path)]
        queue, store = await self._core.queue.stats(), await self._core.store.stats()
        return Evidence(
            {job.job_id: job for job in jobs}, views, letters=letters, left_in_stream=queue.messages,
            left_running=sum(tier.running for tier in store.tiers.values()), **rest,
        )  # fmt: skip

    async def _records(self) -> list[JobRecord]:
        records: list[JobRecord] = []
        cursor = None
        while True:
            page = await self._core.store.jobs(DEFAULT_TENANT, None, None, cursor, PAGE)
            records += page.jobs
            if (cursor := page.cursor) is None:
                return records

    async def _job(self, record: JobRecord, plans: Mapping[str, JobPlan]) -> Job:
        store, log = self._core.store, list[LogEntry]()
        while events := await store.events(record.job_id, log[-1].id if log else 0):
            log += [LogEntry(e.id, e.type.value, e.generation, e.attempt, e.data) for e in events]
        results = await store.results(record.job_id)
        plan = plans.get(record.job_id)
        return Job(
            record.job_id,
            record.status.value,
            record.generation,
            log,
            {call: result.attempt for call, result in results.items()},
            once=_once(record.task),
            kind=plan.kind if plan else str(record.task.metadata.get("kind", "")),
        )


def _once(task: TaskDefinition) -> frozenset[str]:
    return frozenset(call.tool_call_id for call in task.tools if "/once_" in call.tool_name)


def recovery_ms(healed_at: Sequence[float], evidence: Evidence) -> int | None:
    """The longest time from NATS or Redis being back to the next start of a job that a client saw."""
    starts = sorted(_seconds(view["at"]) for view in evidence.of("event") if view["type"] == "job.started")
    waits = [next((start - healed for start in starts if start > healed), None) for healed in healed_at]
    return max((round(1000 * wait) for wait in waits if wait is not None), default=None)


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()
