"""The Redis function library: joining its files, loading it, calling it within a bound.

The library's name and the prefix of its functions carry a hash of its text, so that workers of two versions can run
beside each other and a changed function is never called under its old name.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from functools import cache, partial
from importlib import resources
from typing import Any, Final

import redis.asyncio as redis
from redis import exceptions as redis_errors

from toolfleet.services.background_jobs.errors import StoreError, StoreUnavailable
from toolfleet.services.background_jobs.group_writer import GroupWriter
from toolfleet.services.background_jobs.redis_link import CONNECTION_ERRORS, Command, RedisLink

_UNAVAILABLE = (
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.ClusterDownError,
    redis_errors.TryAgainError,
)
"""Errors that say 'not now' and not 'wrong': the same command may succeed later or elsewhere. redis-py takes the code
off the text of these; MASTERDOWN is a ClusterDownError, and LOADING no ResponseError."""
_UNAVAILABLE_CODES = ("MISCONF", "NOREPLICAS", "BUSY")
"""The same for errors that redis-py has no class for."""


PIPELINES: Final = 2
"""In flight at once, each on a connection of its own."""


@cache
def library() -> tuple[str, str]:
    """The library's text as Redis takes it, and the prefix of its functions."""
    folder = resources.files("toolfleet.services.background_jobs.lua")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".lua")), key=lambda f: f.name)
    text = "\n".join(f.read_text(encoding="utf-8") for f in files)
    prefix = "toolfleet_" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"#!lua name={prefix}\n" + text.replace("{prefix}", prefix), prefix


class RedisFunctions:
    """Calls the functions of the library over one client."""

    def __init__(self, client: redis.Redis, timeout_s: float) -> None:
        self._client = client
        self._timeout = timeout_s
        self._links = [RedisLink(client, timeout_s) for _ in range(PIPELINES)]
        self._writer = GroupWriter([partial(_pipeline, link) for link in self._links])
        self._text, self._prefix = library()

    async def call(self, function: str, root: str, *args: Any, size: int = 0) -> Any:
        """Call a function on a partition, in the shared pipeline.

        Raises:
            StoreUnavailable: no answer within the bound, or Redis said 'not now'.
            StoreError: Redis refused the call.
        """
        command = ("FCALL", f"{self._prefix}_{function}", 1, root, *args)
        try:
            return await self._writer.call(command, size)
        except redis_errors.ResponseError as error:
            if "Function not found" not in str(error):
                raise as_store_error(error, function) from error
        await self.load()
        try:
            return await self._writer.call(command, size)
        except redis_errors.ResponseError as error:
            raise as_store_error(error, function) from error

    async def load(self) -> None:
        """Load the library where it is not there: after a first start, a wipe or a failover."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._client.execute_command("FUNCTION", "LOAD", self._text)  # type: ignore[no-untyped-call]
        except redis_errors.ResponseError as error:
            if "already exists" not in str(error):
                raise as_store_error(error, "FUNCTION LOAD") from error
        except CONNECTION_ERRORS as error:
            raise as_store_error(error, "FUNCTION LOAD") from error

    async def read(self, *command: Any) -> Any:
        """One plain command, in the shared pipeline. Raises as `call`."""
        try:
            return await self._writer.call(command)
        except redis_errors.ResponseError as error:
            raise as_store_error(error, str(command[0])) from error

    async def read_all(self, commands: Sequence[Command]) -> list[Any]:
        """Several plain commands in one round trip. Raises as `call`."""
        return list(await asyncio.gather(*(self.read(*command) for command in commands)))

    async def close(self) -> None:
        """Wait for what was accepted, and give the connection up."""
        await self._writer.close()
        for link in self._links:
            await link.close()


async def _pipeline(link: RedisLink, commands: Sequence[Command]) -> Sequence[Any]:
    try:
        return await link.exchange(commands)
    except CONNECTION_ERRORS as error:
        raise as_store_error(error, "a pipeline") from error


def as_store_error(error: BaseException, what: str) -> StoreError:
    """Redis' error as ours: 'not now' and 'wrong' are told apart."""
    text = str(error) or type(error).__name__
    refused = isinstance(error, redis_errors.ResponseError) and not isinstance(error, _UNAVAILABLE)
    if refused and not text.startswith(_UNAVAILABLE_CODES):
        return StoreError(f"Redis refused {what}: {text}")
    return StoreUnavailable(f"Redis did not serve {what}: {text}. Check REDIS_URL and `toolfleet doctor`.")
