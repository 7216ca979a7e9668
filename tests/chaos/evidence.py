"""What a run left behind, as plain values that the audit reads: it needs neither servers nor files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.chaos.ledger import Entry

TERMINAL: Final = frozenset({"completed", "failed", "cancelled", "unknown"})
ENDS: Final = frozenset(f"job.{status}" for status in TERMINAL)


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One event of a job's log as it stands in the store."""

    id: int
    type: str
    generation: int
    attempt: int
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it stands in the store at the end."""

    job_id: str
    status: str
    generation: int
    log: Sequence[LogEntry] = ()
    results: Mapping[str, int] = field(default_factory=dict)
    """The attempt that each stored result says it is of, by tool_call_id; 0 for a person's decision."""
    once: frozenset[str] = frozenset()
    """Its calls that must not run twice."""
    kind: str = ""

    def generation_of(self, attempt: int) -> int | None:
        """The generation in which an attempt was started; None where the log knows no such attempt."""
        return next((e.generation for e in self.log if e.type == "job.started" and e.attempt == attempt), None)

    def started_at(self, attempt: int) -> int | None:
        """The place in the log at which an attempt was started."""
        return next((e.id for e in self.log if e.type == "job.started" and e.attempt == attempt), None)


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, as it was found in its stream at any time of the run."""

    seq: int
    job_id: str | None
    attempt: int
    reason: str
    payload: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything the audit knows of a run."""

    jobs: Mapping[str, Job]
    views: Sequence[Entry] = ()
    """The clients' ledger."""
    effects: Sequence[Entry] = ()
    """The tool servers' ledger."""
    letters: Sequence[Letter] = ()
    malformed: Sequence[str] = ()
    """Payloads of messages that were published and are no tasks."""
    left_in_stream: int = 0
    left_running: int = 0
    """Jobs that the store says are running."""
    max_starts: int = 3
    wrong: Sequence[str] = ()
    """Answers that no client should get, each beginning with the promise that it breaks."""
    silent: Sequence[str] = ()
    bad_exits: Sequence[str] = ()
    terms: int = 0
    """Workers and APIs that were told to leave."""
    calm_cancel_p99_ms: float | None = None
    """Of receipts while nothing that they need was hurt; None where there were too few to say."""

    def of(self, kind: str) -> list[Entry]:
        """The views of a kind."""
        return [view for view in self.views if view["k"] == kind]

    def failures(self) -> dict[str, int]:
        """How many generations failed, by the code of their error."""
        ends = (e.data.get("error") or {} for job in self.jobs.values() for e in job.log if e.type == "job.failed")
        return dict(sorted(Counter(str(error.get("code")) for error in ends).items()))

    def statuses(self) -> dict[str, int]:
        """How many jobs have each status."""
        return dict(sorted(Counter(job.status for job in self.jobs.values()).items()))
