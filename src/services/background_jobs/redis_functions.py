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

from toolfleet.services.background_jobs.errors import StoreError, StoreSilent, StoreUnavailable
from toolfleet.services.background_jobs.group_writer import GroupWriter
from toolfleet.services.background_jobs.redis_link import CONNECTION_ERRORS, Command, RedisLink, ask_alone
from toolfleet.services.background_jobs.redis_records import ROOTS
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.task_ending import end_tasks

_MISSING: Final = "Function not found"
_UNAVAILABLE = (
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.ClusterDownError,
    redis_errors.TryAgainError,
)
"""Errors that say 'not now' and not 'wrong': the same command may succeed later or elsewhere. redis-py takes the code
off the text of these; MASTERDOWN is a ClusterDownError, and LOADING no ResponseError."""
_UNAVAILABLE_CODES = ("MISCONF", "NOREPLICAS", "BUSY", _MISSING)
"""The same for errors that redis-py has no class for. The library is loaded where it is missing: one that is gone again
each time says nothing about the call."""


PIPELINES: Final = 2
"""In flight at once, each on a connection of its own."""


LOADS: Final = 2
"""Of a call that finds no functions: somebody may flush them again meanwhile."""


@cache
def library() -> tuple[str, str]:
    """The library's text as Redis takes it, and the prefix of its functions."""
    folder = resources.files("toolfleet.services.background_jobs.lua")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".lua")), key=lambda f: f.name)
    text = "\n".join(f.read_text(encoding="utf-8") for f in files)
    prefix = "toolfleet_" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"#!lua name={prefix}\n" + text.replace("{prefix}", prefix), prefix


class RedisFunctions:
    """Calls the functions of the library, and plain commands, over one client.

    After an exchange that got no answer every call fails at once until the server answers again, as `gate` says.
    """

    def __init__(self, client: redis.Redis, timeout_s: float) -> None:
        self._client = client
        self._timeout = timeout_s
        self.gate = StoreGate(self._ask)
        self._links = [RedisLink(client, timeout_s) for _ in range(PIPELINES)]
        for link in self._links:
            self.gate.listen(on_silence=link.doubt)
        self._writer = GroupWriter([partial(self._pipeline, link) for link in self._links])
        self._text, self._prefix = library()
        self._loading: asyncio.Task[None] | None = None

    async def call(self, function: str, root: str, *args: Any, size: int = 0) -> Any:
        """Call a function on a partition, in the shared pipeline.

        Raises:
            StoreSilent: no answer within the bound, or none to earlier calls and none to a question since.
            StoreUnavailable: Redis said 'not now'.
            StoreError: Redis refused the call.
        """
        command = ("FCALL", f"{self._prefix}_{function}", 1, root, *args)
        self.gate.check()
        for _ in range(LOADS):
            try:
                return await self._writer.call(command, size)
            except redis_errors.ResponseError as error:
                if _MISSING not in str(error):
                    raise as_store_error(error, function) from error
            await self.load()
        try:
            return await self._writer.call(command, size)
        except redis_errors.ResponseError as error:
            raise as_store_error(error, function) from error

    async def load(self) -> None:
        """Load the library where it is not there: after a first start, a wipe or a failover. Raises as `call`."""
        self.gate.check()
        if self._loading is None or self._loading.done():
            # Everybody who misses it misses it at once, and loading compiles the whole of it.
            self._loading = asyncio.create_task(self._load(), name="redis-load")
            self._loading.add_done_callback(_seen)
        await asyncio.shield(self._loading)

    async def _load(self) -> None:
        outages = self.gate.outages
        try:
            async with asyncio.timeout(self._timeout):
                await self._client.execute_command("FUNCTION", "LOAD", self._text)  # type: ignore[no-untyped-call]
        except redis_errors.ResponseError as error:
            if "already exists" not in str(error):
                raise as_store_error(error, "FUNCTION LOAD") from error
        except CONNECTION_ERRORS as error:
            raise self._no_answer(error, "FUNCTION LOAD", outages) from error

    async def read(self, *command: Any) -> Any:
        """One plain command, in the shared pipeline. Raises as `call`."""
        self.gate.check()
        try:
            return await self._writer.call(command)
        except redis_errors.ResponseError as error:
            raise as_store_error(error, str(command[0])) from error

    async def read_all(self, commands: Sequence[Command]) -> list[Any]:
        """Several plain commands in one round trip. Raises as `call`."""
        return list(await asyncio.gather(*(self.read(*command) for command in commands)))

    async def ping(self) -> None:
        """Ask the server itself, also while other calls fail at once. Raises as `call`."""
        if not self.gate.is_silent:
            await self.read("PING")
            return
        await self._ask()
        self.gate.answered()

    async def _ask(self) -> None:
        # A renewal of nothing: PING is answered as well by a server that refuses all writes, and everybody would go on,
        # be refused and wait again, several times a second.
        question = ("FCALL", f"{self._prefix}_renew", 1, ROOTS[0], 0)
        try:
            await ask_alone(self._client, self._timeout, question)
        except (*CONNECTION_ERRORS, redis_errors.RedisError) as error:
            failure = as_store_error(error, "a question")
            # What is neither silence nor 'not now', such as another node's slot, says that the server serves; so does
            # one that was emptied: whoever calls next loads the functions.
            if isinstance(failure, StoreUnavailable) and _MISSING not in str(error):
                raise failure from error

    async def _pipeline(self, link: RedisLink, commands: Sequence[Command]) -> Sequence[Any]:
        # Here too: these commands may have waited while the one before them got no answer.
        self.gate.check()
        outages = self.gate.outages
        try:
            return await link.exchange(commands)
        except CONNECTION_ERRORS as error:
            raise self._no_answer(error, "a pipeline", outages) from error

    def _no_answer(self, error: BaseException, what: str, outages: int) -> StoreError:
        failure = as_store_error(error, what)
        self.gate.fell_silent(failure, outages)
        return failure

    async def close(self) -> None:
        """Wait for what was accepted, and give the connections up."""
        await self._writer.close()
        if self._loading is not None:
            await end_tasks([self._loading])
        for link in self._links:
            await link.close()
        await self.gate.close()


def _seen(task: asyncio.Task[None]) -> None:
    """What a task raised is raised to those who wait for it; where nobody is left, nobody needs it."""
    if not task.cancelled():
        task.exception()


def as_store_error(error: BaseException, what: str) -> StoreError:
    """Redis' error as ours: silence, 'not now' and 'wrong' are told apart."""
    text = str(error) or type(error).__name__
    refused = isinstance(error, redis_errors.ResponseError) and not isinstance(error, _UNAVAILABLE)
    if refused and not text.startswith(_UNAVAILABLE_CODES):
        return StoreError(f"Redis refused {what}: {text}")
    kind = StoreUnavailable if isinstance(error, redis_errors.ResponseError) else StoreSilent
    return kind(f"Redis did not serve {what}: {text}. Check REDIS_URL and `toolfleet doctor`.")
