"""Keeps what a process holds: leases in the store and deliveries of the queue, renewed together.

Every third of the lease (a lost renewal leaves two more), one pipeline renews all running attempts, and `in_progress`
starts the ack_wait of every message in hand anew, also of those that wait for the store. The answer carries cancel
requests and lost fences. An attempt whose lease could not be renewed in time is stopped by its own monotonic clock.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import structlog

from toolfleet.services.background_jobs.errors import StoreError, StoreUnavailable
from toolfleet.services.background_jobs.ports import JobStore, Lease
from toolfleet.services.background_jobs.queue_ports import Delivery
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.transitions import Stop

log = structlog.get_logger(__name__)


class Stoppable(Protocol):
    """An attempt, as the keeper sees it."""

    @property
    def lease(self) -> Lease:
        """What names it."""

    def stop(self, why: Stop) -> None:
        """End its calls."""


@dataclass(slots=True, eq=False)
class Held:
    """An attempt and the monotonic second at which its lease ends."""

    attempt: Stoppable
    deadline: float
    expired: bool = False
    """Whether it was told so."""


class LeaseKeeper:
    """Renews all that a process holds."""

    def __init__(
        self, store: JobStore, gate: StoreGate, *, lease_s: float, ack_wait_s: float, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._gate = gate
        self.lease_s = lease_s
        self._ack_wait = ack_wait_s
        self._clock = clock
        self._held: dict[str, Held] = {}
        self._deliveries: set[Delivery] = set()
        self._asked = asyncio.Event()
        self._early: set[str] = set()
        """Cancelled jobs that are not held: over already, or the answer to their claim is on its way."""
        # After an outage the next third of a lease may be too late.
        gate.listen(on_open=self._asked.set)

    @property
    def lease_ms(self) -> int:
        """As the store takes it."""
        return int(self.lease_s * 1000)

    @contextlib.contextmanager
    def delivery(self, delivery: Delivery | None) -> Iterator[None]:
        """Keep a message from being delivered to others while it is in hand."""
        if delivery is None:
            yield
            return
        self._deliveries.add(delivery)
        try:
            yield
        finally:
            self._deliveries.discard(delivery)

    @contextlib.contextmanager
    def attempt(self, attempt: Stoppable, asked_at: float) -> Iterator[Held]:
        """Renew an attempt's lease; `asked_at` is the monotonic second before the claim was sent."""
        held = Held(attempt, asked_at + self.lease_s)
        if earlier := self._held.get(attempt.lease.job_id):
            # The claim that made this attempt took the job from that one.
            earlier.attempt.stop(Stop.LOST)
        self._held[attempt.lease.job_id] = held
        if attempt.lease.job_id in self._early:
            # Not stopped on that word alone: it may have been about an earlier attempt. The renewal tells.
            self._asked.set()
        try:
            yield held
        finally:
            if self._held.get(attempt.lease.job_id) is held:
                del self._held[attempt.lease.job_id]

    def give_up(self, attempt: Stoppable) -> None:
        """Let an attempt's lease run out, while it still has something to write: it must not keep others waiting."""
        held = self._held.get(attempt.lease.job_id)
        if held is not None and held.attempt is attempt:
            del self._held[attempt.lease.job_id]

    def cancel(self, job_id: str | None) -> None:
        """A cancel request was heard of by Pub/Sub; None where some could have been missed, so that a renewal asks."""
        if job_id is None:
            self._asked.set()
        elif held := self._held.get(job_id):
            held.attempt.stop(Stop.CANCEL)
        else:
            self._early.add(job_id)

    async def run(self) -> None:
        """Renew until cancelled."""
        interval = min(self.lease_s, self._ack_wait) / 3
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await self._asked.wait()
            self._asked.clear()
            self._early.clear()
            await self.renew_all()

    async def watch_deadlines(self) -> None:
        """Stop attempts whose lease ran out, until cancelled. A loop of its own: it must not wait for the store."""
        while True:
            await asyncio.sleep(min(0.5, self.lease_s / 10))
            self.expire()

    def expire(self) -> None:
        """Stop the attempts whose lease ended by our clock."""
        now = self._clock()
        for held in list(self._held.values()):
            if held.deadline <= now and not held.expired:
                held.expired = True
                log.warning("lease.expired", job_id=held.attempt.lease.job_id, hint="Redis did not answer in time")
                held.attempt.stop(Stop.LOST)

    async def renew_all(self) -> None:
        """One renewal of everything in hand. Neither server's silence holds up what goes to the other."""
        await asyncio.gather(self._keep_deliveries(), self._renew_leases())

    async def _keep_deliveries(self) -> None:
        for delivery in list(self._deliveries):
            await delivery.in_progress()

    async def _renew_leases(self) -> None:
        held = list(self._held.values())
        if not held:
            return
        asked_at = self._clock()
        try:
            answers = await self._store.renew([h.attempt.lease for h in held], self.lease_ms)
        except StoreUnavailable as error:
            self._gate.shut(error)
            return
        except StoreError as error:
            log.error("lease.renewal_refused", error=str(error))
            return
        for one, answer in zip(held, answers, strict=True):
            if answer == "lost":
                one.attempt.stop(Stop.LOST)
                continue
            one.deadline, one.expired = asked_at + self.lease_s, False
            if answer == "cancel":
                one.attempt.stop(Stop.CANCEL)
