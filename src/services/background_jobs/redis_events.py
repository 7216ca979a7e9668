"""One Pub/Sub connection a process: wakes readers of job logs and tells a worker of cancels.

Pub/Sub drops messages, the last one too, so nothing here is a source of truth: a reader reads the log after every
subscription, after every reconnect (an empty wake-up) and at every heartbeat. When the store falls silent every reader
is woken, so that it can say so, and the connection is made anew: nobody knows what it would still bring.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import redis.asyncio as redis
import structlog
from redis import exceptions as redis_errors
from redis.asyncio.client import PubSub

from toolfleet.services.background_jobs.errors import StoreSilent
from toolfleet.services.background_jobs.redis_functions import as_store_error
from toolfleet.services.background_jobs.redis_link import lost_connections
from toolfleet.services.background_jobs.redis_records import events_from, root_of
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.task_ending import end_tasks
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


class _Subscriptions(PubSub):
    """Never connects again by itself.

    redis-py (8.1) does so in whatever task meets the loss: beside the task that reads, so that both fail with a
    RuntimeError, or without a word to those who may have missed something.
    """

    async def connect(self) -> None:
        self._must_be_whole()
        await super().connect()  # type: ignore[no-untyped-call]

    async def parse_response(self, block: bool = True, timeout: float = 0) -> Any:
        self._must_be_whole()
        return await super().parse_response(block, timeout)

    async def _reconnect(self, conn: Any, *_: Any, **__: Any) -> None:
        await conn.disconnect(nowait=True)

    def _must_be_whole(self) -> None:
        if self.connection is not None and not self.connection.is_connected:
            raise redis_errors.ConnectionError("the connection of the subscriptions was lost")


class RedisEventFeed:
    """`EventFeed` on Redis Pub/Sub."""

    def __init__(self, client: redis.Redis, timeout_s: float, gate: StoreGate) -> None:
        """Use a client made with ``decode_responses=True``; it stays the caller's to close. While `gate` is silent
        nothing is tried."""
        self._client = client
        self._timeout = timeout_s
        self._gate = gate
        gate.listen(on_silence=self._on_silence)
        self._listeners: dict[str, set[Listener]] = {}
        self._confirmations: dict[str, asyncio.Future[None]] = {}
        self._renewed: set[str] = set()
        """Channels of a new connection whose subscription has not been confirmed yet."""
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
            with lost_connections():
                async with asyncio.timeout(self._timeout):
                    await getattr(self._pubsub, verb)(*channels)
        except (*_BROKEN, AttributeError) as error:
            # AttributeError: redis-py (8.1) writes to the None that the reading task has just put in a lost
            # connection's place.
            # The reading task meets the same broken connection and subscribes everything again.
            log.debug("redis_events.send_failed", verb=verb, error=str(error))

    async def _read(self) -> None:
        while True:
            # While the store is silent one probe asks for the whole process, and this goes on as soon as it is heard.
            await self._gate.wait_answers()
            outages = self._gate.outages
            try:
                await self._session()
            except _BROKEN as error:
                reason = str(error) or type(error).__name__
                if self.connected:
                    log.warning("redis_events.disconnected", error=reason)
                failure = as_store_error(error, "a subscription")
                # A connection that was lost is no outage, unless there is no new one or nothing was said any more.
                if isinstance(failure, StoreSilent) and not (self.connected and _lost(error)):
                    self._gate.fell_silent(failure, outages)
            finally:
                self.connected = False
                await self._drop()
            await asyncio.sleep(RECONNECT_S)

    async def _session(self) -> None:
        """Connect and listen until the connection breaks or the store falls silent."""
        session = asyncio.create_task(self._connect_and_pump(), name="redis-events-session")
        silence = asyncio.create_task(self._gate.wait_silent(), name="redis-events-silence")
        try:
            await asyncio.wait({session, silence}, return_when=asyncio.FIRST_COMPLETED)
            if session.done():
                await session
        finally:
            await end_tasks([session, silence])

    async def _connect_and_pump(self) -> None:
        with lost_connections():
            await self._connect()
            await self._pump()

    def _on_silence(self) -> None:
        self.connected = False
        for confirmation in self._confirmations.values():
            if not confirmation.done():
                confirmation.set_result(None)
        for channel in list(self._listeners):
            self._tell_missed(channel)

    def _tell_missed(self, channel: str) -> None:
        for listener in list(self._listeners.get(channel, ())):
            listener(None)

    async def _connect(self) -> None:
        self._pubsub = _Subscriptions(self._client.connection_pool)
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
        self._renewed = subscribed
        self.connected = True

    async def _pump(self) -> None:
        silent = False
        while True:
            message = await self._pubsub.get_message(timeout=PING_S)
            if message is None:
                if silent:
                    raise redis_errors.TimeoutError("no answer to a ping")
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
            if channel in self._renewed:
                # Not before: what happens between a read of the log and the subscription would be heard of by nobody.
                self._renewed.discard(channel)
                self._tell_missed(channel)

    async def _drop(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            with contextlib.suppress(*_BROKEN):
                await pubsub.aclose()

    async def close(self) -> None:
        """End the connection."""
        if self._reader is not None:
            await end_tasks([self._reader])

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


def _lost(error: BaseException) -> bool:
    return not isinstance(error, (redis_errors.TimeoutError, TimeoutError))


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
