"""Redis connections that are reset at any moment, under the event loop that workers and the API run on."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
import redis.asyncio as redis
import uvloop
from redis import exceptions as redis_errors

from tests.support.waiting import wait_until
from toolfleet.bootstrap import redis_client
from toolfleet.services.background_jobs.errors import StoreSilent
from toolfleet.services.background_jobs.redis_link import CONNECTION_ERRORS, RedisLink, ask_alone
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.settings import Settings

TRIES = 400
"""About one in 25 was met between its connection and its first write."""


@contextlib.contextmanager
def resetting_server() -> Iterator[str]:
    """Resets what connects, at once or when something was sent; a thread, so that it may happen between two steps."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for count in itertools.count():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.settimeout(0.0005)
                if count % 2:
                    connection.recv(1)

    thread = threading.Thread(target=serve, name="resetting-server")
    thread.start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_a_reset_connection_is_a_lost_connection_and_no_bug(settings: Settings) -> None:
    async def ask() -> None:
        with resetting_server() as url:
            client: redis.Redis = redis_client(settings, url)
            link = RedisLink(client, 2)
            for _ in range(TRIES):
                with pytest.raises((*CONNECTION_ERRORS, redis_errors.RedisError)):
                    await ask_alone(client, 2)
                with pytest.raises((*CONNECTION_ERRORS, redis_errors.RedisError)):
                    await link.exchange([("PING",)])
            await link.close()
            await client.aclose()

    uvloop.run(ask())


async def test_the_probe_outlives_what_nobody_thought_of() -> None:
    asked = 0

    async def ping() -> None:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise RuntimeError("what nobody thought of")

    gate = StoreGate(ping)
    gate.fell_silent(StoreSilent("silent"), gate.outages)
    assert gate.is_silent
    await wait_until(lambda: gate.is_open, "the gate is open again")
    assert asked == 3
    await gate.close()
