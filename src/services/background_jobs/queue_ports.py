"""What the core needs of the queue, as small Protocols: deliveries, the task stream, the dead letters.

The adapters (`nats_task_queue`, `nats_dead_letters`) are handed in by `toolfleet.bootstrap`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from toolfleet.services.background_jobs.errors import MalformedTask, NewerTask
from toolfleet.services.background_jobs.task_models import Millis, TaskDefinition, Tier


class Delivery(Protocol):
    """One message in a worker's hands."""

    @property
    def data(self) -> bytes:
        """The task's JSON, not yet checked."""

    @property
    def subject(self) -> str:
        """Its subject; the last token is the job id."""

    @property
    def published_at(self) -> Millis:
        """When the stream stored it, by the clock of the NATS server."""

    async def ack(self) -> None:
        """Done with it. Not waited for: a lost ack comes back and is acked by step 3."""

    async def nak(self, delay_s: float) -> None:
        """Deliver again after the delay."""

    async def in_progress(self) -> None:
        """Still at it: start ack_wait anew."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry of the dead letter stream: a job that nobody could run to its end, or a message that is no job."""

    job_id: str | None
    """None for a malformed message without a readable id."""
    fence: int
    """Of the attempt that gave up, at least 1; 0 for a message that no attempt was made for."""
    reason: str
    message: str
    payload: bytes
    """The message as it stood in the queue; its end is missing where it was larger than a dead letter can be."""
    subject: str | None = None
    """Where a malformed message stood in the queue; None where that was not noted."""
    size: int | None = None
    """Bytes of the whole message; None where `payload` is all of it."""
    sha256: str | None = None
    """Of the whole message, hexadecimal; None where `payload` is all of it."""
    seq: int = 0
    """Its place in the dead letter stream; 0 before it is stored."""
    at: Millis = 0

    @property
    def malformed(self) -> bool:
        """Whether it is the letter of no attempt: a message that no worker could read as a task, or one that was
        accepted under another job's Idempotency-Key while Redis was away."""
        return self.fence == 0

    @property
    def letter_id(self) -> str:
        """What it is asked for by: its job's id, or ``letter_<seq>`` for a malformed message, which has no job."""
        return self.job_id if self.job_id is not None and not self.malformed else f"letter_{self.seq}"

    def task(self) -> TaskDefinition | None:
        """The task of the job; None where the message is none, or is one of a newer version of toolfleet."""
        if self.malformed:
            return None
        try:
            return TaskDefinition.from_json(self.payload)
        except (MalformedTask, NewerTask):
            return None

    @property
    def message_key(self) -> str:
        """SHA-256 of the whole message: names one without a readable job id by its content."""
        return self.sha256 or hashlib.sha256(self.payload).hexdigest()


@dataclass(frozen=True, slots=True)
class DeadLetterPage:
    """Dead letters from the oldest; `cursor` is where the next page begins, None on the last one."""

    entries: Sequence[DeadLetter]
    cursor: int | None


class DeadLetterBox(Protocol):
    """What needs a person. Every method raises `QueueUnavailable` where there is no answer within its bound."""

    async def store(self, letter: DeadLetter) -> None:
        """Publish to the dead letter stream and wait for its ack (step 9); repeating it stores nothing new.

        Raises:
            QueueFull: it takes no more.
        """

    async def page(self, after: int, limit: int) -> DeadLetterPage:
        """The letters behind a place in the stream, oldest first."""

    async def of_job(self, job_id: str) -> Sequence[DeadLetter]:
        """All letters that name a job, oldest first; also malformed messages that stood under its subject."""

    async def at(self, seq: int) -> DeadLetter | None:
        """The letter at a place of the stream, or None."""

    async def remove(self, letters: Sequence[DeadLetter]) -> int:
        """Take exactly these letters away; how many were still there."""


@dataclass(frozen=True, slots=True)
class TierFill:
    """A tier's part of the task stream."""

    jobs: int
    """Its jobs in the stream: waiting for a worker, for their time, or running."""
    settled: int
    """Deliveries that were over since the consumer was made; what it grows by in a while is what the tier drained."""


@dataclass(frozen=True, slots=True)
class QueueFill:
    """How full the task stream is."""

    messages: int
    bytes: int
    max_bytes: int
    tiers: Mapping[Tier, TierFill]


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Of the streams."""

    messages: int
    bytes: int
    max_bytes: int
    tiers: Mapping[Tier, TierFill]
    """Of the task stream."""
    dead_letters: int
    dead_letters_bytes: int
    dead_letters_max_bytes: int
    oldest_dead_letter_at: Millis | None


class JobQueue(Protocol):
    """Where tasks wait. Every method raises `QueueUnavailable` where there is no answer within its bound."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection at this moment."""

    async def publish(self, task: TaskDefinition, *, again: bool = False) -> Literal["stored", "duplicate", "refused"]:
        """Publish and wait for the ack. 'refused' is error 10077: queued already, or full; `find` tells which.

        `again` is for a message known not to be in the stream: it goes without a message id, which the stream may
        still remember."""

    async def find(self, job_id: str) -> TaskDefinition | None:
        """The task of a job that stands in the stream, waiting or delivered."""

    async def stands(self, job_id: str) -> bool:
        """Whether a message of the job stands in the stream, readable or not."""

    async def acked(self, job_id: str) -> bool:
        """Whether the message of a job stands in the stream although its consumer takes it for acked, so that nobody
        will ever get it."""

    async def purge(self, job_id: str) -> bool:
        """Remove a job's message; whether there was one."""

    async def stats(self) -> QueueStats:
        """Fill of the streams."""

    async def fill(self) -> QueueFill:
        """Fill of the task stream, by tier."""

    async def ensure_consumer(self, tier: Tier) -> bool:
        """Make a lost consumer again; whether it was gone."""
