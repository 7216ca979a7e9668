"""The worker process: named loops, signals, drain."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from toolfleet.services.background_jobs.loop_watchdog import LoopWatchdog
from toolfleet.services.background_jobs.ports import JobStore, WorkerInfo
from toolfleet.services.background_jobs.queue_ports import Delivery, JobQueue
from toolfleet.services.background_jobs.reconciler import Reconciler
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.task_ending import end_tasks
from toolfleet.services.background_jobs.task_executor import JobExecutor
from toolfleet.services.background_jobs.task_lease import LeaseKeeper
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.background_jobs.transitions import Stop
from toolfleet.services.background_jobs.worker_report import WorkerReport

log = structlog.get_logger(__name__)

HAND_BACK_S: Final = 5.0
"""Of the drain time, what is kept for stopping calls and handing jobs back."""
PULL_END_S: Final = 3.0
"""For the pull to end in order; without NATS it can't, and is cut off."""
ONE_SIGNAL_S: Final = 0.2
"""Signals closer than this are one: a process group and its leader are often both signalled, by `timeout` for one."""
ENDED: Final = ("completed", "failed", "cancelled", "unknown")
"""Outcomes that end a job; a retry, a hand-back and a lost attempt do not."""


class Feed(Protocol):
    """What a worker needs of `PullFeed`."""

    def poke(self) -> None:
        """A slot has become free, or pulling may resume."""

    def stop(self) -> None:
        """Ask for nothing more, deliver what is on its way, and end `run`."""

    async def run(self) -> None:
        """Pull until stopped or cancelled."""


FeedFactory = Callable[[Callable[[], int], Callable[[Delivery], None]], Feed]
"""Makes the feed from ``credits`` and ``deliver``."""


class TaskWorker:
    """Pulls jobs of one tier and executes them."""

    def __init__(
        self,
        *,
        worker_id: str,
        tier: Tier,
        slots: int,
        store: JobStore,
        queue: JobQueue,
        executor: JobExecutor,
        keeper: LeaseKeeper,
        gate: StoreGate,
        make_feed: FeedFactory,
        listen_for_cancels: Callable[[str, Callable[[str | None], object]], Coroutine[Any, Any, None]],
        recovery_interval_s: float,
        stuck_s: float,
        drain_timeout_s: float,
        version: str,
        status_file: Path | None = None,
        queue_ready: Callable[[], bool] = lambda: True,
        watchdog: LoopWatchdog | None = None,
    ) -> None:
        self.worker_id = worker_id
        self._tier = tier
        self._slots = slots
        self._queue = queue
        self._queue_ready = queue_ready
        self._executor = executor
        self._keeper = keeper
        self._gate = gate
        self._listen = listen_for_cancels
        self._drain_timeout = drain_timeout_s
        self._version = version
        self._jobs: set[asyncio.Task[None]] = set()
        self._started_at = int(time.time() * 1000)
        self._state = "starting"
        self._asked_at: float | None = None
        self._stop = asyncio.Event()
        self._force = asyncio.Event()
        self._feed = make_feed(self._credits, self._take)
        self._report = WorkerReport(store, self._describe, status_file)
        self._reconciler = Reconciler(store, queue, interval_s=recovery_interval_s, stuck_s=stuck_s)
        self._watchdog = watchdog

    # -- what the feed asks and gives ------------------------------------------------------------------------

    def _credits(self) -> int:
        if self._stop.is_set() or not self._gate.is_open:
            return 0
        return self._slots - len(self._jobs)

    def _take(self, delivery: Delivery) -> None:
        job = asyncio.create_task(self._execute(delivery), name=delivery.subject)
        self._jobs.add(job)
        job.add_done_callback(self._ended)

    async def _execute(self, delivery: Delivery) -> None:
        if self._stop.is_set():
            await delivery.nak(0)
            return
        await self._executor.execute(delivery)

    def _ended(self, job: asyncio.Task[None]) -> None:
        self._jobs.discard(job)
        if not job.cancelled() and (error := job.exception()):
            # The job is not lost: its lease ends, its message comes again, and its start was counted.
            log.error("worker.job_broke", subject=job.get_name(), exc_info=error)
        self._feed.poke()

    # -- life ------------------------------------------------------------------------------------------------

    async def run(self, *, handle_signals: bool = True) -> int:
        """Work until told to stop, then drain; the exit code.

        `handle_signals` makes SIGTERM and SIGINT call `stop`; a program that embeds a worker calls it itself.
        """
        if handle_signals:
            self._on_signals()
        await self._listen(self.worker_id, self._keeper.cancel)
        self._gate.listen(self._feed.poke)
        self._state = "running"
        background = {
            "pull": self._feed.run(),
            "renew": self._keeper.run(),
            "deadlines": self._keeper.watch_deadlines(),
            "report": self._report.run(),
            "reconcile": self._reconciler.run(),
        }
        if self._watchdog is not None:
            background["watchdog"] = self._watchdog.run()
        named = {name: asyncio.create_task(loop, name=name) for name, loop in background.items()}
        loops = set(named.values())
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        log.info("worker.started", worker=self.worker_id, tier=self._tier.value, slots=self._slots)
        code = 0
        try:
            done, _ = await asyncio.wait({*loops, stop}, return_when=asyncio.FIRST_COMPLETED)
            for ended in done - {stop}:
                # A loop never ends by itself: without it the worker would only look alive.
                log.error("worker.loop_broke", loop=ended.get_name(), exc_info=ended.exception())
                code = 1
            self._stop.set()
            # The pull ends first: what it still brings is handed back, and nothing comes to a worker that leaves.
            self._feed.stop()
            await asyncio.wait([named["pull"]], timeout=PULL_END_S)
            await self._drain()
        finally:
            await end_tasks([stop, *loops, *self._jobs])
            self._state = "stopped"
            await self._report.retire()
        log.info("worker.stopped", worker=self.worker_id, jobs=self._done(), code=code)
        return code

    def stop(self) -> None:
        """The first call drains, a second one ends at once."""
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            log.info("worker.draining", in_flight=len(self._jobs), seconds=self._drain_timeout)
        elif now - self._asked_at > ONE_SIGNAL_S:
            log.warning("worker.forced", in_flight=len(self._jobs))
            self._force.set()
        self._stop.set()

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)

    async def _drain(self) -> None:
        """Running jobs finish, or are handed back before the deadline (G10)."""
        self._state = "draining"
        hand_back = min(HAND_BACK_S, self._drain_timeout / 2)
        await self._wait_for_jobs(self._drain_timeout - hand_back)
        if self._jobs and not self._force.is_set():
            log.info("worker.handing_back", jobs=len(self._jobs))
        for attempt in self._executor.attempts:
            attempt.stop(Stop.DRAIN)
        if not self._force.is_set():
            await self._wait_for_jobs(hand_back)
        if self._jobs:
            log.warning("worker.left_jobs", jobs=len(self._jobs), hint="they come back when their leases end")

    async def _wait_for_jobs(self, seconds: float) -> None:
        forced = asyncio.create_task(self._force.wait())
        try:
            async with asyncio.timeout(seconds):
                while self._jobs and not self._force.is_set():
                    await asyncio.wait({*self._jobs, forced}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            pass
        finally:
            forced.cancel()

    # -- what it says of itself ------------------------------------------------------------------------------

    def _done(self) -> int:
        """Jobs that ended here."""
        return sum(self._executor.ended.get(outcome, 0) for outcome in ENDED)

    def _describe(self) -> tuple[WorkerInfo, Mapping[str, Any]]:
        state = self._state
        if state == "running" and not self._gate.is_open:
            state = "waiting for Redis"
        elif state == "running" and not self._queue.connected:
            state = "waiting for NATS"
        elif state == "running" and not self._queue_ready():
            state = "waiting for the streams"
        info = WorkerInfo(
            worker_id=self.worker_id,
            tier=self._tier,
            host=socket.gethostname(),
            pid=os.getpid(),
            started_at=self._started_at,
            seen_at=int(time.time() * 1000),
            slots=self._slots,
            in_flight=len(self._jobs),
            done=self._done(),
            version=self._version,
            state=state,
        )
        return info, {"outcomes": dict(self._executor.ended), "recovered": self._reconciler.recovered}
