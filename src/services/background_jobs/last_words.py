"""What an attempt still has to write when its calls are over: as one value, in one order, and as JSON for the spool.

Every write is under the attempt's fence and safe to repeat, so the whole may be repeated too, by another process for
instance, and a store that meanwhile gave the job to somebody else refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Final, Literal, Protocol

from pydantic import Field, TypeAdapter, ValidationError

from toolfleet.services.background_jobs.errors import MalformedTask
from toolfleet.services.background_jobs.ports import Changes, Lease, RetryAnswer, WriteAnswer
from toolfleet.services.background_jobs.task_models import ErrorInfo
from toolfleet.services.background_jobs.transitions import Ending

VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class ProgressWrite:
    """Results and events of an attempt that goes on, or that was given up; `wseq` as in `AttemptStore.progress`."""

    wseq: int
    changes: Changes
    kind: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True)
class FinishWrite:
    """The job has ended."""

    ending: Ending
    changes: Changes
    kind: Literal["finish"] = "finish"


@dataclass(frozen=True, slots=True)
class RetryWrite:
    """Another attempt is to follow, `delay_ms` after this is written."""

    delay_ms: int
    error: ErrorInfo
    changes: Changes
    kind: Literal["retry"] = "retry"


@dataclass(frozen=True, slots=True)
class HandBackWrite:
    """Somebody else goes on."""

    changes: Changes
    kind: Literal["hand_back"] = "hand_back"


LastWrite = ProgressWrite | FinishWrite | RetryWrite | HandBackWrite


class LastStore(Protocol):
    """What is needed of the store; as in `JobStore`."""

    async def withdraw_mark(self, lease: Lease, tool_call_id: str) -> WriteAnswer:
        """Take the mark of a call back that was surely not sent."""

    async def progress(self, lease: Lease, changes: Changes, wseq: int) -> WriteAnswer:
        """Store results and events of a running attempt."""

    async def finish(self, lease: Lease, ending: Ending, changes: Changes) -> WriteAnswer:
        """Step 6."""

    async def retry(self, lease: Lease, delay_ms: int, error: ErrorInfo, changes: Changes) -> RetryAnswer:
        """Step 8."""

    async def hand_back(self, lease: Lease, changes: Changes) -> RetryAnswer:
        """Give the job back unfinished."""


@dataclass(frozen=True, slots=True)
class LastWords:
    """All that one attempt still has to write, in this order."""

    lease: Lease
    last: Annotated[LastWrite, Field(discriminator="kind")]
    unanswered: ProgressWrite | None = None
    """A write that was sent, perhaps, and whose answer was not waited for: it is repeated under its own number, since
    with the last write its events would be told twice."""
    withdrawn: tuple[str, ...] = ()
    """Calls that must not run twice and were surely not sent: their marks are to go."""

    async def write(self, store: LastStore) -> RetryAnswer:
        """Write it; the answer to the last write.

        Raises:
            StoreError: as the store does; what was written until then may be written again.
        """
        for tool_call_id in self.withdrawn:
            await store.withdraw_mark(self.lease, tool_call_id)
        last = self.last
        if self.unanswered is not None:
            changes = self.unanswered.changes
            if await store.progress(self.lease, changes, self.unanswered.wseq) == "lost":
                # The job may have become `unknown` meanwhile; then the last write settles it, with these results.
                last = replace(last, changes=_joined(changes, last.changes))
        match last:
            case ProgressWrite():
                return await store.progress(self.lease, last.changes, last.wseq)
            case FinishWrite():
                return await store.finish(self.lease, last.ending, last.changes)
            case RetryWrite():
                return await store.retry(self.lease, last.delay_ms, last.error, last.changes)
            case HandBackWrite():
                return await store.hand_back(self.lease, last.changes)

    def to_json(self) -> bytes:
        """As it stands in the spool, with its version as ``v``. Raises `ValueError` for what JSON can't carry."""
        return _ENTRY.dump_json(_Entry(VERSION, self))

    @classmethod
    def from_json(cls, data: bytes) -> LastWords:
        """From the spool.

        Raises:
            MalformedTask: it is damaged, or of another version; the message says where.
        """
        try:
            return _ENTRY.validate_json(data).words
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise MalformedTask(f"not the last words of an attempt: {where}: {first['msg']}") from None


@dataclass(frozen=True, slots=True)
class _Entry:
    v: Literal[1]
    words: LastWords


_ENTRY: Final = TypeAdapter(_Entry)


def _joined(first: Changes, second: Changes) -> Changes:
    return replace(second, results=first.results + second.results, events=first.events + second.events)
