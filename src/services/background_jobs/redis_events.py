"""One Pub/Sub connection a process: wakes readers of job logs and tells a worker of cancels.

Pub/Sub drops messages, the last one too, so nothing here is a source of truth: a reader reads the log after every
subscription, after every reconnect (an empty wake-up) and at every heartbeat.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import redis.asyncio as redis
import structlog
from redis import exceptions as redis_errors

from toolfleet.services.background_jobs.redis_records import events_from, root_of
from toolfleet.services.background_jobs.task_models import JobEvent

log = structlog.get_logger(__name__)

PING_S: Final = 5.0
"""Silence after which the connection is asked whether it lives; after twice that it is made anew."""
RECONNECT_S: Final = 0.25
MAX_PUSHED: Final = 1000
"""Events that wait for one slow reader; beyond that it is told to read the log."""

_BROKEN = (redis_errors.RedisError, OSError, TimeoutError)

Listener = Callable[[str | None], None]
"""Called with a message, or with None after a reconnect: something may have been missed."""


class RedisEventFeed:
    """`EventFeed` on Redis Pub/Sub."""

    def __init__(self, client: redis.Redis, timeout_s: float) -> None:
        """Use a client made with ``decode_responses=True``; it stays the caller's to close."""
        self._client = client
        self._timeout = timeout_s
        self._listeners: dict[str, set[Listener]] = {}
        self._confirmations: dict[str, asyncio.Future[None]] = {}
        self._pubsub: Any = None
        self._reader: asyncio.Task[None] | None = None
        self.connected = False

    async def listen(self, channel: str, listener: Listener) -> None:
        """Subscribed when this returns, or as soon as Redis is back."""
        first = channel not in self._listeners
        self._listeners.setdefault(channel, set()).add(listener)
        if self._reader is None:
            self._reader = asyncio.create_task(self._read(), name="redis-events")
        if first:
            self._confirmations[channel] = asyncio.get_running_loop().create_future()
            await self._send("subscribe", channel)
        confirmation = self._confirmations.get(channel)
        if confirmation is not None and self.connected:
            # After the bound the reader is served by its reads of the log, and by the reconnect that must follow.
            await asyncio.wait([confirmation], timeout=self._timeout)

    async def unlisten(self, channel: str, listener: Listener) -> None:
        """No more calls after this."""
        listeners = self._listeners.get(channel)
        if listeners is None:
            return
        listeners.discard(listener)
        if not listeners:
            del self._listeners[channel]
            self._confirmations.pop(channel, None)
            await self._send("unsubscribe", channel)

    async def _send(self, verb: str, *channels: str) -> None:
        if not self.connected or not channels:
            return
        try:
            async with asyncio.timeout(self._timeout):
                await getattr(self._pubsub, verb)(*channels)
        except _BROKEN as error:
            # The reading task meets the same broken connection and subscribes everything again.
            log.debug("redis_events.send_failed", verb=verb, error=str(error))

    async def _read(self) -> None:
        while True:
            try:
                await self._connect()
                await self._pump()
            except _BROKEN as error:
                if self.connected:
                    log.warning("redis_events.disconnected", error=str(error) or type(error).__name__)
            finally:
                self.connected = False
                await self._drop()
            await asyncio.sleep(RECONNECT_S)

    async def _connect(self) -> None:
        self._pubsub = self._client.pubsub()
        async with asyncio.timeout(self._timeout):
            await self._pubsub.ping()
            subscribed: set[str] = set()
            # Listeners come and go while this waits, and nobody else subscribes for them before `connected` is set.
            while subscribed != self._listeners.keys():
                if missing := self._listeners.keys() - subscribed:
                    await self._pubsub.subscribe(*missing)
                elif left := subscribed - self._listeners.keys():
                    await self._pubsub.unsubscribe(*left)
                    subscribed -= left
                subscribed |= missing
        self.connected = True
        for listeners in list(self._listeners.values()):
            for listener in list(listeners):
                listener(None)

    async def _pump(self) -> None:
        silent = False
        while True:
            message = await self._pubsub.get_message(timeout=PING_S)
            if message is None:
                if silent:
                    raise redis_errors.ConnectionError("no answer to a ping")
                silent = True
                async with asyncio.timeout(self._timeout):
                    await self._pubsub.ping()
                continue
            silent = False
            self._dispatch(message)

    def _dispatch(self, message: dict[str, Any]) -> None:
        channel = message.get("channel")
        if message["type"] == "message":
            for listener in list(self._listeners.get(str(channel), ())):
                listener(message["data"])
        elif message["type"] == "subscribe":
            confirmation = self._confirmations.get(str(channel))
            if confirmation is not None and not confirmation.done():
                confirmation.set_result(None)

    async def _drop(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            with contextlib.suppress(*_BROKEN):
                await pubsub.aclose()

    async def close(self) -> None:
        """End the connection."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader

    @contextlib.asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[JobWatch]:
        """Wake-ups for one job's log, subscribed on entry."""
        channel = f"{root_of(job_id)}:ev:{job_id}"
        watch = JobWatch(self, job_id)
        await self.listen(channel, watch.push)
        try:
            yield watch
        finally:
            await self.unlisten(channel, watch.push)

    async def on_cancel(self, worker: str, cancel: Callable[[str | None], object]) -> None:
        """Call back with the id of each job of this worker that is to be cancelled, and with None after every
        connection: some could have been missed."""

        def heard(message: str | None) -> None:
            if message is None:
                cancel(None)
            elif message.startswith("cancel "):
                cancel(message.removeprefix("cancel "))

        await self.listen(f"tf:ctl:{worker}", heard)


class JobWatch:
    """One reader's wake-ups for one job."""

    def __init__(self, feed: RedisEventFeed, job_id: str) -> None:
        self._feed = feed
        self._job_id = job_id
        self._pushed: list[JobEvent] = []
        self._missed = False
        self._wake = asyncio.Event()

    @property
    def connected(self) -> bool:
        """Whether pushes arrive at present."""
        return self._feed.connected

    def push(self, message: str | None) -> None:
        """Called by the feed."""
        if message is None or len(self._pushed) >= MAX_PUSHED:
            self._missed = True
        else:
            try:
                self._pushed += events_from(self._job_id, message)
            except ValueError as error:
                # A newer worker's event, say. One channel's must not end the process's only reader.
                log.warning("redis_events.unreadable", job_id=self._job_id, error=str(error))
                self._missed = True
        self._wake.set()

    async def changed(self, timeout: float) -> Sequence[JobEvent] | None:
        """Events pushed since the last call; an empty answer asks for a read of the log; None on time-out."""
        try:
            async with asyncio.timeout(timeout):
                await self._wake.wait()
        except TimeoutError:
            return None
        self._wake.clear()
        pushed, self._pushed = self._pushed, []
        if self._missed:
            self._missed = False
            return ()
        return pushed
