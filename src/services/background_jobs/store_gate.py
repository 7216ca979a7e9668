"""Whether the store can be used, told to everyone in the process who needs it.

Two things can be wrong. A store that *refuses* (out of memory, read only) answers: reads go on, and only a worker waits
with new jobs. A store that is *silent* (connections fail, nothing comes in time) would cost every caller the whole
bound of a round trip: after the first exchange without an answer all calls fail at once, and one task asks until there
is an answer again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from toolfleet.services.background_jobs.errors import StoreError, StoreSilent, StoreUnavailable
from toolfleet.services.background_jobs.task_ending import end_tasks
from toolfleet.services.background_jobs.task_models import Millis, iso_time

log = structlog.get_logger(__name__)

PROBE_S: Final = 0.25
"""Between two questions while it is down: the first job after an outage starts well within 1 s."""
BOUNDS_S: Final[tuple[float | None, ...]] = (0.5, 0.5, 0.5, None)
"""Of the questions, in turn; None leaves a question its own bound. What was sent into a cut network is repeated later
and later, so most are short and soon asked anew; on a link too slow for them a long one gets its answer."""

T = TypeVar("T")


class StoreGate:
    """Open while the store serves. One for a process: adapters tell it what they meet, and ask it before they call."""

    def __init__(self, ping: Callable[[], Awaitable[None]]) -> None:
        """`ping` asks the store on a way of its own, bounded. It raises `StoreSilent` where nobody answers, and
        `StoreUnavailable` where the answer is 'not now'."""
        self._ping = ping
        self._on_open: list[Callable[[], None]] = []
        self._on_silence: list[Callable[[], None]] = []
        self._open = asyncio.Event()
        self._shut = asyncio.Event()
        self._answers = asyncio.Event()
        self._silent = asyncio.Event()
        self._open.set()
        self._answers.set()
        self._since: Millis = 0
        self._reason = ""
        self._probe: asyncio.Task[None] | None = None
        self.outages = 0
        """How often it has fallen silent."""
        self.unanswered = 0
        """Exchanges that got no answer; a call that was refused here is none."""

    @property
    def is_open(self) -> bool:
        """Whether the last word of the store was that it serves."""
        return self._open.is_set()

    @property
    def is_silent(self) -> bool:
        """Whether calls fail at once, since nobody answers."""
        return self._silent.is_set()

    def listen(self, on_open: Callable[[], None] | None = None, on_silence: Callable[[], None] | None = None) -> None:
        """Call back whenever the store is back, and whenever it falls silent; in the event loop, must not block."""
        if on_open is not None:
            self._on_open.append(on_open)
        if on_silence is not None:
            self._on_silence.append(on_silence)

    def check(self) -> None:
        """To be called before an exchange with the store. Raises `StoreSilent` while it does not answer."""
        if self._silent.is_set():
            raise StoreSilent(
                f"Redis has not answered since {iso_time(self._since)} ({self._reason}). It is asked again every "
                f"{PROBE_S:g} s, and calls go through as soon as it answers"
            )

    def fell_silent(self, error: StoreError, outages: int) -> None:
        """An exchange got no answer; `outages` is what the attribute said when it began.

        What began before an outage says nothing of the time after it.
        """
        self.unanswered += 1
        if self._silent.is_set() or outages != self.outages:
            return
        self.outages += 1
        self._since, self._reason = int(time.time() * 1000), str(error).rstrip(". ")
        self._answers.clear()
        self._silent.set()
        self.shut(error)
        for listener in self._on_silence:
            listener()

    def shut(self, error: Exception) -> None:
        """The store has failed somebody."""
        if self._open.is_set():
            log.warning("store.down", error=str(error), hint="jobs in hand go on; no new ones are taken")
            self._open.clear()
            self._shut.set()
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._until_up(), name="store-probe")

    async def _until_up(self) -> None:
        for bound in itertools.cycle(BOUNDS_S):
            # Before the first question too: a store that answers it and refuses writes, out of memory for instance,
            # would otherwise be asked without a pause.
            await asyncio.sleep(PROBE_S)
            if self._open.is_set():
                return
            try:
                async with asyncio.timeout(bound):
                    await self._ping()
            except (StoreSilent, TimeoutError):
                continue
            except StoreUnavailable:
                # It answers: reads may go on.
                self._heard()
                continue
            except Exception:
                # Nobody else asks while all calls fail at once: without this task that would be so for ever.
                log.exception("store.probe_failed", hint="the store is asked again")
                continue
            self.answered()
            return

    def _heard(self) -> None:
        self._silent.clear()
        self._answers.set()

    def answered(self) -> None:
        """The store has answered that it serves."""
        self._heard()
        if not self._open.is_set():
            log.info("store.up")
            self._shut.clear()
            self._open.set()
            for listener in self._on_open:
                listener()

    async def wait(self) -> None:
        """Until the store serves."""
        await self._open.wait()

    async def wait_shut(self) -> None:
        """Until it does not."""
        await self._shut.wait()

    async def wait_answers(self) -> None:
        """Until the store answers, whatever it says."""
        await self._answers.wait()

    async def wait_silent(self) -> None:
        """Until it does not."""
        await self._silent.wait()

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
            await end_tasks([self._probe])
