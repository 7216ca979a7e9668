"""A standing, credit-based pull on a JetStream consumer.

`fetch()` of nats-py is not used: it holds the first message back until its batch is full or its time is up, and it
sleeps through a restart of the server. Here one inbox with a callback takes messages as they come; a pull asks for
as many as there are free slots, and it is made anew after a reconnect, after 408 and 409, and after a silence that
the idle heartbeat (1 s) does not explain.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Final

import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from toolfleet.services.background_jobs.nats_connection import NatsConnection
from toolfleet.services.background_jobs.task_models import Millis

log = structlog.get_logger(__name__)

NANOS: Final = 1_000_000_000
HEARTBEAT_S: Final = 1.0
SILENCE_S: Final = 2.5
"""Two heartbeats and a half: a pull that says nothing for so long is gone."""
EXPIRES_S: Final = 10.0
"""JetStream needs an expiry above twice the heartbeat; at its end it says 408 and the pull is made anew. For so long a
server that can't see that its client has gone delivers to a pull that nobody reads."""
CHECK_S: Final = 0.5
END_S: Final = 1.0
"""For the server's last word when the pull ends."""
REFUSED_PAUSES_S: Final = (0.25, 0.25, 0.5, 1.0, 2.0, 5.0)
"""After refusals in a row; the last one repeats, and a reconnect ends it: that may be another server. Asked again at
once, a server that refuses would be asked as fast as it answers."""


class NatsDelivery:
    """A message of the task stream in a worker's hands."""

    __slots__ = ("_connection", "_reply", "data", "published_at", "subject")

    def __init__(self, connection: NatsConnection, message: Msg) -> None:
        self._connection = connection
        self._reply = message.reply
        self.data: bytes = message.data
        self.subject: str = message.subject
        self.published_at: Millis = _published_at(message.reply)

    async def ack(self) -> None:
        """Done. Not waited for: waiting halves the rate and proves nothing, step 3 acks a redelivery."""
        await self._connection.publish(self._reply, b"+ACK")

    async def nak(self, delay_s: float) -> None:
        """Deliver again after the delay."""
        body = b"-NAK" if delay_s <= 0 else b'-NAK {"delay": %d}' % int(delay_s * NANOS)
        await self._connection.publish(self._reply, body)

    async def in_progress(self) -> None:
        """Start ack_wait anew."""
        await self._connection.publish(self._reply, b"+WPI")


def _published_at(reply: str) -> Millis:
    """From ``$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>``; with a domain and an account
    hash before the stream, two tokens later (ADR-15)."""
    tokens = reply.split(".")
    return int(tokens[7] if len(tokens) == 9 else tokens[9]) // 1_000_000


class PullFeed:
    """Keeps a consumer's messages coming, never more than there are free slots."""

    def __init__(
        self,
        connection: NatsConnection,
        stream: str,
        consumer: str,
        *,
        credits: Callable[[], int],
        deliver: Callable[[NatsDelivery], None],
        on_consumer_gone: Callable[[], Awaitable[object]],
    ) -> None:
        """Make a feed.

        Args:
            connection: shared with the rest of the process.
            stream: its name.
            consumer: the durable consumer's name.
            credits: how many more messages may be taken now; called in the event loop. Where that is less than was
                asked for before, the pull is withdrawn.
            deliver: takes a message; called in the event loop, must not block.
            on_consumer_gone: awaited where the server says that the consumer does not exist.
        """
        self._connection = connection
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._credits = credits
        self._deliver = deliver
        self._on_consumer_gone = on_consumer_gone
        self._subscription: Subscription | None = None
        self._inbox = ""
        self._outstanding = 0
        self._heard = 0.0
        self._wake = asyncio.Event()
        self._renew = False
        self._reconnected = asyncio.Event()
        self._gone = False
        self._stopping = False
        self._refusals = 0
        self._refused = False
        self.pulls = 0

    def poke(self) -> None:
        """A slot has become free, or pulling may resume."""
        self._wake.set()

    def stop(self) -> None:
        """Ask for nothing more, deliver what is on its way, and end `run`."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Pull until stopped or cancelled."""
        loop = asyncio.get_running_loop()
        self._connection.on_reconnect(self._on_reconnect)
        try:
            await self._open()
            while not self._stopping:
                await self._ask()
                try:
                    async with asyncio.timeout(CHECK_S):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
                if self._refused:
                    self._refused = False
                    await self._pause(REFUSED_PAUSES_S[min(self._refusals, len(REFUSED_PAUSES_S)) - 1])
                if self._gone:
                    self._gone = False
                    await self._make_consumer()
                silent = self._outstanding > 0 and loop.time() - self._heard > SILENCE_S
                if self._renew or (silent and self._connection.connected):
                    await self._reopen("asked" if self._renew else "silence")
                elif self._outstanding > max(0, self._credits()) and self._connection.connected:
                    await self._withdraw()
        finally:
            await self._end()

    async def _pause(self, seconds: float) -> None:
        self._reconnected.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._reconnected.wait()

    async def _make_consumer(self) -> None:
        try:
            await self._on_consumer_gone()
        except Exception as error:
            # The server may still be coming up; the next check asks again, until the loop is cancelled.
            log.warning("pull.consumer_not_made", subject=self._subject, error=str(error))
            self._gone = True

    async def _on_reconnect(self) -> None:
        # The server forgot the pull with the connection; messages in hand are still ours until ack_wait.
        self._renew = True
        self._refusals = 0
        self._reconnected.set()
        self._wake.set()

    async def _open(self) -> None:
        # A new inbox for each life of the pull: what an old pull still delivers has no reader and comes again after
        # ack_wait, instead of arriving beyond the credits of the new one.
        client = self._connection.client
        await self._connection.wait_connected()
        self._inbox = client.new_inbox()
        self._subscription = await client.subscribe(f"{self._inbox}.*", cb=self._on_message)
        self._outstanding = 0
        self._renew = False
        self._heard = asyncio.get_running_loop().time()

    async def _reopen(self, why: str) -> None:
        log.info("pull.renewed", why=why, subject=self._subject)
        await self._close()
        await self._open()

    async def _withdraw(self) -> None:
        """Take a pull back that asks for more than is wanted by now: it would bring what others could take at once."""
        log.info("pull.withdrawn", subject=self._subject, asked_for=self._outstanding)
        await self._end()
        await self._open()

    async def _end(self) -> None:
        """Ask for nothing more, and deliver what is on its way: others would get it only after ack_wait."""
        if self._subscription is not None and self._connection.connected:
            try:
                async with asyncio.timeout(END_S):
                    await self._subscription.drain()  # type: ignore[no-untyped-call]
            except (nats.errors.Error, OSError, TimeoutError) as error:
                log.debug("pull.not_drained", error=str(error) or type(error).__name__)
            else:
                self._subscription = None
        await self._close()

    async def _close(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None and not self._connection.client.is_closed:
            try:
                await subscription.unsubscribe()
            except Exception as error:
                # A subscription of a connection that has just gone: there is nothing left to end.
                log.debug("pull.unsubscribe_failed", error=str(error))

    async def _ask(self) -> None:
        batch = self._credits() - self._outstanding
        if batch <= 0 or not self._connection.connected:
            return
        body = {"batch": batch, "expires": int(EXPIRES_S * NANOS), "idle_heartbeat": int(HEARTBEAT_S * NANOS)}
        if self._outstanding == 0:
            self._heard = asyncio.get_running_loop().time()
        self._outstanding += batch
        self.pulls += 1
        await self._connection.publish(self._subject, json.dumps(body).encode(), f"{self._inbox}.{self.pulls}-{batch}")

    async def _on_message(self, message: Msg) -> None:
        self._heard = asyncio.get_running_loop().time()
        if message.reply and message.subject[: len(self._inbox)] != self._inbox:
            self._refusals = 0
            self._outstanding -= 1
            self._deliver(NatsDelivery(self._connection, message))
            if self._outstanding <= 0:
                self._wake.set()
            return
        headers = message.headers or {}
        status = headers.get("Status", "")
        if status == "100":
            self._refusals = 0
            return
        # This ends one pull, and says how many of its messages were not delivered. A refused one says nothing: then it
        # is as many as were asked for, which stand in its reply subject; the other pulls go on.
        batch = message.subject.rpartition("-")[2]
        self._outstanding = max(0, self._outstanding - int(headers.get("Nats-Pending-Messages", batch)))
        description = headers.get("Description", "")
        if status == "503" or "Consumer Deleted" in description or "Consumer is push" in description:
            self._gone = True
        if status not in ("404", "408"):
            self._refused = True
            self._refusals += 1
            if self._refusals == 1:
                log.info("pull.refused", status=status, description=description.strip())
        self._wake.set()
