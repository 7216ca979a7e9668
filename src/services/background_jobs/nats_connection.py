"""One NATS connection a process, that comes up by itself and says how it is.

A program starts although NATS is down: the connection is tried in the background for ever, and meanwhile every call
fails at once with `QueueUnavailable`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport

from toolfleet.services.background_jobs.errors import QueueError, QueueUnavailable

log = structlog.get_logger(__name__)

PING_INTERVAL_S = 2
MAX_OUTSTANDING_PINGS = 2
"""A server that is stopped, not gone, is noticed after about 3 x 2 s."""
RECONNECT_WAIT_S = 0.25
"""So that the first new job after an outage starts within 1 s."""
CONNECT_TIMEOUT_S = 2
FLUSH_TIMEOUT_S = 1
"""For a message to get into a socket that takes no more; without it nats-py waits as long as the kernel tries."""
CLOSE_FLUSH_S = 2


class _Client(Client):
    """Drops a broken connection, where nats-py closes it in order.

    It waits until what was written has been sent and only then connects anew: on a connection that is cut, that is
    as long as the kernel tries, 15 minutes.
    """

    async def _process_op_err(self, e: Exception) -> None:
        if not (self.is_closed or self.is_reconnecting):
            self.drop()
        await super()._process_op_err(e)

    def drop(self) -> None:
        """End the connection without sending the rest."""
        writer = self._transport._io_writer if isinstance(self._transport, TcpTransport) else None
        if writer is not None:
            writer.transport.abort()

    def forget_pending(self) -> None:
        """Send nothing of what waits for a connection."""
        self._pending.clear()
        self._pending_data_size = 0


class NatsConnection:
    """A `nats.aio` client with its life cycle."""

    def __init__(self, servers: Sequence[str], *, name: str) -> None:
        self._servers = list(servers)
        self._name = name
        self._client = _Client()
        self._connecting: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[], Awaitable[None]]] = []
        self._closing = False
        self._up = asyncio.Event()
        self._inbox: str | None = None
        self._requests = 0
        self._replies: dict[str, asyncio.Future[Msg]] = {}
        self.reconnects = 0
        self.last_error = "not connected yet"

    @property
    def client(self) -> Client:
        """The client; it may be disconnected."""
        return self._client

    @property
    def connected(self) -> bool:
        """Whether a socket is up and the server has answered on it."""
        return bool(self._client.is_connected)

    def on_reconnect(self, listener: Callable[[], Awaitable[None]]) -> None:
        """Call back after every connection but the first."""
        self._listeners.append(listener)

    async def start(self, wait_s: float = 3.0) -> bool:
        """Begin to connect, and wait a little for it; whether it is connected."""
        self._connecting = asyncio.create_task(self._connect(), name="nats-connect")
        done, _ = await asyncio.wait([self._connecting], timeout=wait_s)
        for ended in done:
            # What trying again can't mend, such as an address that is none.
            ended.result()
        return self.connected

    async def wait_connected(self) -> None:
        """Until there is a connection."""
        await self._up.wait()

    async def _connect(self) -> None:
        while not self._client.is_connected:
            try:
                await self._client.connect(
                    self._servers,
                    name=self._name,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=RECONNECT_WAIT_S,  # type: ignore[arg-type]  # it sleeps; fractions are fine
                    connect_timeout=CONNECT_TIMEOUT_S,
                    flush_timeout=FLUSH_TIMEOUT_S,
                    ping_interval=PING_INTERVAL_S,
                    max_outstanding_pings=MAX_OUTSTANDING_PINGS,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnect,
                    reconnected_cb=self._on_reconnected,
                )
            except (nats.errors.Error, OSError) as error:
                await self._on_error(error)
                await asyncio.sleep(RECONNECT_WAIT_S)
        self._up.set()
        if self.last_error != "not connected yet":
            # It came up late: whoever waits for a reconnect has waited for this.
            await self._notify()

    async def _on_error(self, error: Exception) -> None:
        text = str(error) or type(error).__name__
        if text != self.last_error:
            log.warning("nats.error", error=text)
        self.last_error = text

    async def _on_disconnect(self) -> None:
        self._up.clear()
        if self._closing:
            return
        self.last_error = "disconnected"
        log.warning("nats.disconnected", hint="jobs in hand go on; pulling resumes after the reconnect")

    async def _on_reconnected(self) -> None:
        self._up.set()
        self.reconnects += 1
        log.info("nats.reconnected", reconnects=self.reconnects)
        await self._notify()

    async def _notify(self) -> None:
        # Side by side: the pull is not to wait for the check of the streams, nor that for a store that is away.
        await asyncio.gather(*(listener() for listener in self._listeners))

    async def request(self, subject: str, payload: bytes, timeout: float, headers: dict[str, str] | None = None) -> Msg:
        """A request and its answer.

        Raises:
            QueueUnavailable: not connected (`maybe_stored` False: nothing was written to a socket), nobody answers
                there, or no answer in time (`maybe_stored` True).
        """
        if not self.connected:
            raise QueueUnavailable(f"NATS is not connected ({self.last_error}); check NATS_URL and the server")
        try:
            reply = await self._exchange(subject, payload, timeout, headers)
        except nats.errors.OutboundBufferLimitError as error:
            raise QueueUnavailable("NATS is reconnecting and the send buffer is full") from error
        except nats.errors.MaxPayloadError as error:
            raise QueueError("the message is above the max_payload of the NATS server") from error
        except (nats.errors.Error, OSError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            raise QueueUnavailable(f"NATS gave no answer in {timeout} s: {reason}", maybe_stored=True) from error
        if reply.headers and reply.headers.get("Status") == "503":
            raise QueueUnavailable(f"nobody answers on {subject}: JetStream is off or the stream is gone")
        return reply

    async def _exchange(self, subject: str, payload: bytes, timeout: float, headers: dict[str, str] | None) -> Msg:
        """As `Client.request`, without a random name, a wrapped future and a lambda a request: a third of its cost."""
        loop = asyncio.get_running_loop()
        if self._inbox is None:
            self._inbox = self._client.new_inbox()
            await self._client.subscribe(f"{self._inbox}.*", cb=self._on_reply)
        self._requests += 1
        key = str(self._requests)
        future: asyncio.Future[Msg] = loop.create_future()
        self._replies[key] = future
        bound = loop.call_later(timeout, _give_up, future)
        try:
            await self._client.publish(subject, payload, reply=f"{self._inbox}.{key}", headers=headers)
            return await future
        finally:
            bound.cancel()
            del self._replies[key]

    async def _on_reply(self, message: Msg) -> None:
        future = self._replies.get(message.subject.rpartition(".")[2])
        if future is not None and not future.done():
            future.set_result(message)

    async def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Send without waiting; kept by the client while it reconnects. Failing is harmless: redelivery covers it."""
        try:
            await self._client.publish(subject, payload, reply=reply)
        except (nats.errors.Error, OSError) as error:
            log.warning("nats.publish_failed", subject=subject, error=str(error) or type(error).__name__)

    async def close(self) -> None:
        """Flush what is pending, bounded, and end."""
        self._closing = True
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._connecting
        if not await self._flushed():
            # Closing would wait for it without a bound.
            self._client.forget_pending()
            self._client.drop()
        with contextlib.suppress(nats.errors.Error, OSError, asyncio.CancelledError):
            await self._client.close()

    async def _flushed(self) -> bool:
        if not self._client.is_connected:
            return False
        try:
            await self._client.flush(timeout=CLOSE_FLUSH_S)
        except (nats.errors.Error, OSError, TimeoutError):
            return False
        return True


def _give_up(future: asyncio.Future[Msg]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
