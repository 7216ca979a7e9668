"""One Redis connection that carries pipelines, one after the other.

redis-py's `Pipeline` packs each command in Python, parses each answer twice, and takes its connection from the pool
with a lock and a readability check; together that took a quarter of a worker's time. Here the connection is kept, and
hiredis packs in C. Answers come as Redis sent them: maps are flat lists.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import redis.asyncio as redis
from hiredis import pack_command
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

CONNECTION_ERRORS = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError, TimeoutError)

Command = tuple[Any, ...]

SLOW_BYTES_S = 1 << 20
"""Of a line that is slow and not dead, 8 Mbit/s. What is large gets time in proportion: with one bound for all a large
result would be sent, given up and repeated for ever, and each time the store would be taken for silent."""


@contextlib.contextmanager
def lost_connections() -> Iterator[None]:
    """Makes uvloop's word for a write to a connection that has just ended what it is: a lost connection.

    It is a RuntimeError, "the handler is closed", and redis-py (8.1) translates an OSError only. As what it came, it
    would end whatever loop wrote, as a bug does: the probe of the store among them, and then nobody asks again.
    """
    try:
        yield
    except RuntimeError as error:
        if "the handler is closed" not in str(error):
            raise
        raise redis_errors.ConnectionError(str(error)) from error


async def ask_alone(client: redis.Redis, timeout_s: float, question: Command = ("PING",)) -> None:
    """A command on a connection of its own, which waits for no place in the pool and for no other command.

    Raises:
        redis.exceptions.RedisError, OSError, TimeoutError: no answer within the bound, or an error was the answer.
    """
    connection: AbstractConnection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    try:
        with lost_connections():
            async with asyncio.timeout(timeout_s):
                await connection.connect()  # type: ignore[no-untyped-call]
                await connection.send_command(*question)
                await connection.read_response()
    finally:
        await connection.disconnect(nowait=True)


class RedisLink:
    """Sends pipelines within a bound. Not for concurrent use: `GroupWriter` sends one at a time."""

    def __init__(self, client: redis.Redis, timeout_s: float) -> None:
        self._pool = client.connection_pool
        self._timeout = timeout_s
        self._connection: AbstractConnection | None = None
        self._doubtful = False

    def doubt(self) -> None:
        """Make a new connection for the next pipeline: this one may lead to a server that is gone, and nobody says."""
        self._doubtful = True

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """One answer a command; an error that Redis answers is an answer.

        A kept connection may have died since it was last used, so a pipeline that got no answer at all is sent once
        more on a new one: every command here is safe to repeat.

        Raises:
            redis.exceptions.RedisError, OSError, TimeoutError: no answers within the bound.
        """
        packed = b"".join([pack_command(command) for command in commands])
        # redis-py's own socket_timeout bounds each read, not the whole: it was seen to take 15.7 s with 1 s set.
        async with asyncio.timeout(self._timeout + len(packed) / SLOW_BYTES_S):
            if self._doubtful:
                self._doubtful = False
                await self.close()
            kept = self._connection is not None
            try:
                with lost_connections():
                    return await self._send(packed, len(commands))
            except (redis_errors.ConnectionError, OSError):
                if not kept:
                    raise
                with lost_connections():
                    return await self._send(packed, len(commands))

    async def _send(self, packed: bytes, count: int) -> list[Any]:
        connection = self._connection or await self._connect()
        answers: list[Any] = []
        try:
            await connection.send_packed_command(packed, check_health=False)
            for _ in range(count):
                try:
                    answers.append(await connection.read_response())
                except redis_errors.ResponseError as error:
                    answers.append(error)
        finally:
            if len(answers) < count:
                # What is still to come would be read as the answers of the next pipeline.
                await self.close()
        return answers

    async def _connect(self) -> AbstractConnection:
        connection: AbstractConnection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        # The whole exchange is bounded; a bound for each read besides would cost a task or a timer a read.
        connection.socket_timeout = None
        self._connection = connection
        return connection

    async def close(self) -> None:
        """Give the connection up; the next pipeline makes a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)
            await self._pool.release(connection)
