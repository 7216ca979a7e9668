"""One Redis connection that carries pipelines, one after the other.

redis-py's `Pipeline` packs each command in Python, parses each answer twice, and takes its connection from the pool
with a lock and a readability check; together that took a quarter of a worker's time. Here the connection is kept, and
hiredis packs in C. Answers come as Redis sent them: maps are flat lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import redis.asyncio as redis
from hiredis import pack_command
from redis import exceptions as redis_errors
from redis.asyncio.connection import AbstractConnection

CONNECTION_ERRORS = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError, TimeoutError)

Command = tuple[Any, ...]


class RedisLink:
    """Sends pipelines within a bound. Not for concurrent use: `GroupWriter` sends one at a time."""

    def __init__(self, client: redis.Redis, timeout_s: float) -> None:
        self._pool = client.connection_pool
        self._timeout = timeout_s
        self._connection: AbstractConnection | None = None

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """One answer a command; an error that Redis answers is an answer.

        A kept connection may have died since it was last used, so a pipeline that got no answer at all is sent once
        more on a new one: every command here is safe to repeat.

        Raises:
            redis.exceptions.RedisError, OSError, TimeoutError: no answers within the bound.
        """
        packed = b"".join([pack_command(command) for command in commands])
        # redis-py's own socket_timeout bounds each read, not the whole: it was seen to take 15.7 s with 1 s set.
        async with asyncio.timeout(self._timeout):
            kept = self._connection is not None
            try:
                return await self._send(packed, len(commands))
            except (redis_errors.ConnectionError, OSError):
                if not kept:
                    raise
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
