"""Finds jobs that no message will wake, runs that are stuck, and consumers that are gone (step 12).

`orphans` hands each job out to one reconciler at a time and puts it off, so every worker runs this loop without a
leader. A job whose message stands in the stream is left to its redelivery: a queued one for as long as it takes, since
a backlog is no fault; one that was running until its redelivery has failed it. A run that goes on long after its
running time is ended here, since the worker that should have done so did not.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

import structlog

from toolfleet.services.background_jobs.errors import QueueError, StoreError
from toolfleet.services.background_jobs.ports import JobStore, Orphan
from toolfleet.services.background_jobs.queue_ports import JobQueue
from toolfleet.services.background_jobs.task_models import Tier

log = structlog.get_logger(__name__)

PARTITIONS: Final = 16
BATCH: Final = 100
"""Jobs of a partition that are looked at in one round."""


class Reconciler:
    """Looks after jobs that were left alone."""

    def __init__(self, store: JobStore, queue: JobQueue, *, interval_s: float, stuck_s: float) -> None:
        """`stuck_s`: after so many seconds without a lease, or beyond its running time, a run counts as stuck."""
        self._store = store
        self._queue = queue
        self._interval = interval_s
        self._stuck_ms = int(stuck_s * 1000)
        self.recovered = 0

    async def run(self) -> None:
        """Look until cancelled; workers that start together spread out."""
        await asyncio.sleep(self._interval * random.random())  # noqa: S311 - spreads load, guards nothing
        while True:
            await self.look()
            await asyncio.sleep(self._interval)

    async def look(self) -> int:
        """One round over all partitions; the number of jobs that were published again or ended.

        Failing is not the end: what was put off is looked at again.
        """
        done = 0
        try:
            for tier in Tier:
                if await self._queue.ensure_consumer(tier):
                    log.warning("reconciler.consumer_made", tier=tier.value)
            for partition in range(PARTITIONS):
                for orphan in await self._store.orphans(partition, BATCH, self._stuck_ms):
                    done += await self._recover(orphan)
                await self._store.prune(partition, BATCH)
        except (StoreError, QueueError) as error:
            log.warning("reconciler.round_failed", error=str(error))
        self.recovered += done
        return done

    async def _recover(self, orphan: Orphan) -> bool:
        if orphan.trouble == "overrun":
            return await self._end_overrun(orphan)
        if await self._queue.stands(orphan.job_id):
            if orphan.trouble != "stuck" and not await self._queue.acked(orphan.job_id):
                return False
            # Before the record says 'queued': after it nobody would know any more that this message wakes nobody. An
            # attempt that began this moment has its job all the same; it needs no message to finish.
            await self._queue.purge(orphan.job_id)
        verdict = await self._store.reclaim(orphan)
        if verdict == "changed":
            return False
        if verdict == "publish" and orphan.task is not None:
            # Within the duplicate window the stream still knows the message's id and would swallow it. 'refused'
            # means that somebody was faster.
            await self._queue.publish(orphan.task, again=True)
        log.warning("reconciler.recovered", job_id=orphan.job_id, verdict=verdict, was=orphan.trouble)
        return True

    async def _end_overrun(self, orphan: Orphan) -> bool:
        if await self._store.end_overrun(orphan, self._stuck_ms) == "changed":
            return False
        # Its worker is told by its next renewal that the attempt is lost, and does not ack.
        await self._queue.purge(orphan.job_id)
        log.warning("reconciler.recovered", job_id=orphan.job_id, verdict="settled", was=orphan.trouble)
        return True
