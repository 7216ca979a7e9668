"""Finds jobs that no message will wake, and consumers that are gone (step 12).

`orphans` hands each job out to one reconciler at a time and puts it off, so every worker runs this loop without a
leader. A job whose message stands in the stream is left to its redelivery.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

import structlog

from toolfleet.services.background_jobs.errors import QueueError, StoreError
from toolfleet.services.background_jobs.ports import JobQueue, JobStore, Orphan
from toolfleet.services.background_jobs.task_models import Tier

log = structlog.get_logger(__name__)

PARTITIONS: Final = 16
BATCH: Final = 100
"""Jobs of a partition that are looked at in one round."""


class Reconciler:
    """Looks after jobs that were left alone."""

    def __init__(self, store: JobStore, queue: JobQueue, *, interval_s: float) -> None:
        self._store = store
        self._queue = queue
        self._interval = interval_s
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
                for orphan in await self._store.orphans(partition, BATCH):
                    done += await self._recover(orphan)
                await self._store.prune(partition, BATCH)
        except (StoreError, QueueError) as error:
            log.warning("reconciler.round_failed", error=str(error))
        self.recovered += done
        return done

    async def _recover(self, orphan: Orphan) -> bool:
        if await self._queue.stands(orphan.job_id):
            return False
        verdict = await self._store.reclaim(orphan)
        if verdict == "changed":
            return False
        if verdict == "publish" and orphan.task is not None:
            # Within the duplicate window the stream still knows the message's id and would swallow it. 'refused'
            # means that somebody was faster.
            await self._queue.publish(orphan.task, again=True)
        log.warning("reconciler.recovered", job_id=orphan.job_id, verdict=verdict, was=orphan.status.value)
        return True
