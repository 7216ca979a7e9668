"""What is asked for and answered about dead letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolfleet.services.background_jobs.queue_ports import DeadLetter
from toolfleet.services.background_jobs.task_models import (
    DEFAULT_TENANT,
    JobEvent,
    JobRecord,
    Millis,
    TaskDefinition,
    ToolResult,
)


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Which letters are meant: those that fit everything that is given."""

    reason: str | None = None
    tool_name: str | None = None
    """As the job asked for it; letters that are no job have none."""
    older_than: Millis | None = None
    """Written before this time."""
    newer_than: Millis | None = None
    """Written after it."""

    def fits(self, letter: DeadLetter, task: TaskDefinition | None) -> bool:
        """Whether a letter, whose task is `task`, is meant."""
        if self.reason is not None and letter.reason != self.reason:
            return False
        called = {call.tool_name for call in task.tools} if task is not None else set()
        if self.tool_name is not None and self.tool_name not in called:
            return False
        if self.older_than is not None and letter.at >= self.older_than:
            return False
        return self.newer_than is None or letter.at > self.newer_than


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter and the task in it; None for a malformed message and for a newer version's task."""

    letter: DeadLetter
    task: TaskDefinition | None

    @property
    def tenant(self) -> str:
        """Whose it is; what is no job belongs to nobody and is shown to the default tenant."""
        return self.task.tenant if self.task is not None else DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class LetterPage:
    """Letters from the oldest; `cursor` is where the next page begins, None where all were looked at."""

    letters: Sequence[Letter]
    cursor: int | None


@dataclass(frozen=True, slots=True)
class LetterHistory:
    """A job that became a dead letter, or a malformed message, as far as anything is known of it."""

    letters: Sequence[Letter]
    """All of the job, oldest first; one for a malformed message."""
    record: JobRecord | None
    """None where it is gone, and for a malformed message."""
    events: Sequence[JobEvent]
    results: Mapping[str, ToolResult]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one of many was left alone."""

    letter_id: str
    why: str


@dataclass(frozen=True, slots=True)
class ManyDone:
    """What became of many."""

    matched: Sequence[str]
    """Ids of what was meant: jobs, and malformed messages where they were asked for."""
    done: Sequence[str]
    """Of those, the ones that were redriven or discarded; none in a dry run."""
    refused: Sequence[Refusal]
    cursor: int | None
    """Where to go on; None where all letters were looked at."""
