"""Whether the queue takes one more job of a tier: refused before the stream overflows, from figures a second old.

Two limits: the jobs of a tier in the queue, and the fill of the stream, which is lower for tiers that can wait, so that
bulk work never takes the room of what is urgent, and reopened and redelivered jobs still find some. The figures come
from JetStream and are shared by all submits of a process; a submit waits for them only where there are none. What this
process has accepted since is added, so the limits are overshot by what other processes accept within `FRESH_S` and one
answer of JetStream, and not further than the stream's own limit, which stays the hard wall.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from toolfleet.services.background_jobs.errors import QueueError, QueueFull
from toolfleet.services.background_jobs.queue_ports import JobQueue, QueueFill
from toolfleet.services.background_jobs.task_models import TaskDefinition, Tier

log = structlog.get_logger(__name__)

MAX_FILL: Final = {Tier.LOW: 0.80, Tier.NORMAL: 0.90, Tier.HIGH: 0.95}
"""Share of the stream's bytes up to which a tier may fill it. The last twentieth is for jobs that run again."""
FRESH_S: Final = 1.0
"""Age from which on figures are asked for again, beside the submit that notices."""
STALE_S: Final = 5.0
"""Age above which figures are not used: a submit waits for new ones."""
ASK_S: Final = 1.0
"""How long a submit waits for figures; without an answer it goes on, and the publish says what is wrong."""
WINDOW_S: Final = 10.0
"""Of the rate at which a tier drains."""
ROOM: Final = 0.05
"""Share of a limit that is to be free again when a refused client comes back, so that not all come back to a wall."""
MIN_RETRY_S: Final = 1
MAX_RETRY_S: Final = 60
"""Bounds of Retry-After where the rate is known."""


class Admission:
    """Refuses what does not fit.

    Args:
        queue: asked for its figures.
        max_jobs: of one tier in the queue, waiting and running.
        clock: seconds, monotonic.
    """

    def __init__(self, queue: JobQueue, max_jobs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = queue
        self._max_jobs = max_jobs
        self._clock = clock
        self._fill: QueueFill | None = None
        self._at = -math.inf
        self._asked_at = -math.inf
        self._asking: asyncio.Task[None] | None = None
        self._accepted = dict.fromkeys(Tier, 0)
        self._accepted_bytes = 0
        self._history: deque[tuple[float, QueueFill]] = deque()

    async def check(self, task: TaskDefinition) -> None:
        """Count a job that is about to be published.

        Raises:
            QueueFull: its tier is full, or the stream as far as the tier may fill it. ``details``: tier, limit,
                waiting, retry_after (seconds, where the rate of the tier is known).
        """
        fill = await self._figures()
        if fill is None:
            return
        size = len(task.to_json())
        if (refusal := self._refusal(task.priority, fill, size)) is not None:
            raise refusal
        self._accepted[task.priority] += 1
        self._accepted_bytes += size

    def full(self, tier: Tier, job_id: str) -> QueueFull:
        """The error of a job that the stream itself has refused."""
        fill = self._fill
        if fill is None:
            return QueueFull("the queue is full; try again later", job_id=job_id, tier=tier.value)
        return QueueFull(
            f"the queue's stream is full ({fill.bytes} of {fill.max_bytes} bytes); try again later",
            job_id=job_id,
            tier=tier.value,
            limit=fill.max_bytes,
            waiting=fill.tiers[tier].jobs,
            retry_after=self._retry_after(tier, self._jobs_of(ROOM * fill.max_bytes, fill)),
        )

    async def close(self) -> None:
        """End the question that is on its way."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    def _refusal(self, tier: Tier, fill: QueueFill, size: int) -> QueueFull | None:
        jobs = fill.tiers[tier].jobs + self._accepted[tier]
        if jobs >= self._max_jobs:
            return QueueFull(
                f"tier {tier.value} is full: {jobs} jobs are in the queue, the limit is {self._max_jobs} "
                "(TOOLFLEET_TIER_MAX_JOBS); try again later",
                tier=tier.value,
                limit=self._max_jobs,
                waiting=jobs,
                retry_after=self._retry_after(tier, jobs - self._max_jobs + ROOM * self._max_jobs),
            )
        limit = int(MAX_FILL[tier] * fill.max_bytes)
        used = fill.bytes + self._accepted_bytes
        # An empty queue takes any job that the stream can hold.
        if used + size > limit and used > 0:
            return QueueFull(
                f"the queue is full for tier {tier.value}: its stream holds {used} bytes, and this tier may fill it to "
                f"{limit}, {MAX_FILL[tier]:.0%} of TOOLFLEET_STREAM_MAX_BYTES; try again later",
                tier=tier.value,
                limit=limit,
                waiting=jobs,
                retry_after=self._retry_after(tier, self._jobs_of(used + size - limit + ROOM * limit, fill)),
            )
        return None

    @staticmethod
    def _jobs_of(size: float, fill: QueueFill) -> float:
        return size / (fill.bytes / fill.messages) if fill.messages and fill.bytes else 1.0

    def _retry_after(self, tier: Tier, jobs: float) -> int | None:
        """Seconds in which so many jobs leave the tier at its present rate; None where it is not known."""
        if len(self._history) < 2:
            return None
        (first_at, first), (last_at, last) = self._history[0], self._history[-1]
        drained = last.tiers[tier].settled - first.tiers[tier].settled
        if drained <= 0 or last_at <= first_at:
            return None
        return min(MAX_RETRY_S, max(MIN_RETRY_S, math.ceil(jobs * (last_at - first_at) / drained)))

    async def _figures(self) -> QueueFill | None:
        """Figures that may be used, else None: NATS gave none in time."""
        now = self._clock()
        if now - self._at >= FRESH_S and now - self._asked_at >= FRESH_S and self._asking is None:
            self._asked_at = now
            self._asking = asyncio.create_task(self._ask(), name="admission")
        if now - self._at < STALE_S:
            return self._fill
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=ASK_S)
        return self._fill if self._clock() - self._at < STALE_S else None

    async def _ask(self) -> None:
        accepted, accepted_bytes = dict(self._accepted), self._accepted_bytes
        try:
            fill = await self._queue.fill()
        except QueueError as error:
            log.debug("admission.no_figures", error=str(error))
            return
        finally:
            self._asking = None
        now = self._clock()
        self._fill, self._at = fill, now
        # What was accepted while JetStream was asked may not be in its figures.
        for tier in Tier:
            self._accepted[tier] -= accepted[tier]
        self._accepted_bytes -= accepted_bytes
        self._history.append((now, fill))
        while now - self._history[0][0] > WINDOW_S and len(self._history) > 2:
            self._history.popleft()
