"""Whether the store can be used, told to everyone who waits for it.

While it is down a worker takes no new jobs and keeps what it has; one task asks again until it is back, instead of
every job asking by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from toolfleet.services.background_jobs.errors import StoreError, StoreUnavailable

log = structlog.get_logger(__name__)

PROBE_S: Final = 0.25
"""Between two questions while it is down: the first job after an outage starts well within 1 s."""

T = TypeVar("T")


class StoreGate:
    """Open while the store answers."""

    def __init__(self, ping: Callable[[], Awaitable[None]], on_open: Callable[[], None] = lambda: None) -> None:
        self._ping = ping
        self._on_open = on_open
        self._open = asyncio.Event()
        self._open.set()
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the last word of the store was an answer."""
        return self._open.is_set()

    def listen(self, on_open: Callable[[], None]) -> None:
        """Call back whenever the store is back."""
        self._on_open = on_open

    def shut(self, error: Exception) -> None:
        """The store has failed somebody."""
        if self._open.is_set():
            log.warning("store.down", error=str(error), hint="jobs in hand go on; no new ones are taken")
            self._open.clear()
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._until_up(), name="store-probe")

    async def _until_up(self) -> None:
        while True:
            # Before the first question too: a store that answers it and refuses writes, out of memory for instance,
            # would otherwise be asked without a pause.
            await asyncio.sleep(PROBE_S)
            try:
                await self._ping()
            except StoreError:
                continue
            log.info("store.up")
            self._open.set()
            self._on_open()
            return

    async def wait(self) -> None:
        """Until the store answers."""
        await self._open.wait()

    async def insist(self, write: Callable[[], Awaitable[T]]) -> T:
        """Repeat a write, which must be safe to repeat, until the store has answered it."""
        while True:
            try:
                return await write()
            except StoreUnavailable as error:
                self.shut(error)
                await self.wait()

    async def close(self) -> None:
        """End the probe."""
        if self._probe is not None:
            self._probe.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._probe
