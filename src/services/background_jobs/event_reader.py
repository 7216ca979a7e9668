"""Reads a job's log as a stream: every event once, in order, to the end of its generation.

A reader subscribes first, then reads the log from its last id, then follows; after every new subscription and at every
heartbeat it reads the log again from its last id, since Pub/Sub drops messages, the last one too (G7).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from toolfleet.services.background_jobs.errors import QueueUnavailable, StoreUnavailable
from toolfleet.services.background_jobs.ports import EventFeed, JobStore
from toolfleet.services.background_jobs.task_models import Gap, JobEvent

PAGE: Final = 500
FIRST_LOOK_S: Final = 1.0
"""How soon the log is read again while a connection to Redis is missing."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """Nothing new; the reader is alive."""

    reconnecting: bool
    """Whether the store can't be reached at present."""


StreamItem = JobEvent | Gap | Pulse


class Replay:
    """Puts events in order and tells each once, whatever order and however often they come. Pure."""

    def __init__(self, after: int) -> None:
        self.last = after
        self.ended = False

    def fits(self, events: Sequence[JobEvent]) -> bool:
        """Whether pushed events follow on what was told, so that the log need not be read."""
        expected = self.last + 1
        for event in events:
            if event.id > expected:
                return False
            expected = max(expected, event.id + 1)
        return True

    def take(self, events: Sequence[JobEvent]) -> list[JobEvent | Gap]:
        """What is new among events that are in order; a hole is told as a gap."""
        fresh: list[JobEvent | Gap] = []
        for event in events:
            if event.id <= self.last or self.ended:
                continue
            if event.id > self.last + 1:
                fresh.append(Gap(after=self.last, resumes_at=event.id))
            fresh.append(event)
            self.last = event.id
        return fresh


async def read_events(
    store: JobStore,
    feed: EventFeed,
    job_id: str,
    *,
    after: int,
    heartbeat_s: float,
    check: Callable[[], Awaitable[Any]],
) -> AsyncGenerator[StreamItem, None]:
    """Follow a job.

    Args:
        after: the last id that the reader has.
        heartbeat_s: how often a `Pulse` comes while nothing else does.
        check: raises where there is no such job, or it is somebody else's; gives a `JobView`.
    """
    async with feed.watch(job_id) as watch:
        view = await check()
        generation = view.record.generation if view.record is not None else 1
        over = view.record is not None and view.record.status.terminal
        # An id that the log has not reached yet would hide the end: begin at the log's.
        replay = Replay(after if view.record is None else min(after, view.record.last_event))
        pushed: Sequence[JobEvent] | None = ()
        away = doubtful = False
        while True:
            reconnecting = False
            if pushed and replay.fits(pushed):
                batch: Sequence[JobEvent] = pushed
            else:
                try:
                    batch = await _log(store, job_id, replay.last)
                except StoreUnavailable:
                    batch, reconnecting = (), True
            for item in replay.take(batch):
                yield item
                if isinstance(item, JobEvent) and item.ends_stream and item.generation >= generation:
                    return
            if over and not reconnecting and len(batch) < PAGE:
                # The terminal event was read before, or was trimmed: there is nothing to wait for.
                return
            if len(batch) >= PAGE:
                pushed = ()
                continue
            if reconnecting and not away:
                # At once, and then at every look: whoever watches is not to take an outage for a quiet tool.
                yield Pulse(reconnecting=True)
            away = reconnecting
            if doubtful and not reconnecting:
                doubtful, rewound = await _look_back(check, replay.last)
                if rewound is not None:
                    yield Gap(after=replay.last, resumes_at=1)
                    replay, generation, pushed = Replay(0), rewound, ()
                    continue
            wait = FIRST_LOOK_S if reconnecting or not watch.connected else heartbeat_s
            pushed = await watch.changed(wait)
            doubtful = doubtful or pushed == ()
            if pushed is None:
                yield Pulse(reconnecting or not watch.connected)


async def _look_back(check: Callable[[], Awaitable[Any]], last: int) -> tuple[bool, int | None]:
    """Whether the job's log still reaches to `last`, where something could have been missed: a Redis that has lost its
    latest writes, by a restart or a failover, gives the same ids again to other events, the terminal one among them.

    Whether it can't be told now, and the generation to read from the beginning where it does not reach that far.
    """
    try:
        view = await check()
    except (StoreUnavailable, QueueUnavailable):
        return True, None
    if view.degraded:
        # The queue's word for a job that Redis can't be asked about: it says nothing of the log.
        return True, None
    record = view.record
    if record is None:
        return False, 1 if last else None
    return False, record.generation if record.last_event < last else None


async def _log(store: JobStore, job_id: str, after: int) -> Sequence[JobEvent]:
    return await store.events(job_id, after, PAGE)
