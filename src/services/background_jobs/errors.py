"""What can go wrong, as types. A class docstring is the default message.

::

    ToolfleetError
    ├── InvalidTask                 bad input, refused before anything is queued
    │   ├── TaskTooLarge
    │   ├── UnknownTool
    │   ├── InvalidArguments
    │   └── IdempotencyConflict     same key, another body
    ├── InvalidCursor               a cursor that no page of ours has given
    ├── MalformedTask               a message of the queue that is no task
    ├── NewerTask                   a task of a version this program does not know
    ├── JobNotFound
    │   ├── JobExpired
    │   └── CallNotFound            the job is there and has no such call
    ├── DeadLetterNotFound
    ├── IllegalMove                 the job's status does not allow what was asked
    ├── QueueError
    │   ├── QueueUnavailable        JetStream can't be reached; `maybe_stored` tells whether a publish may stand
    │   ├── QueueFull               the stream is at its limit
    │   └── StreamMismatch          a stream of that name exists with other settings
    ├── StoreError
    │   └── StoreUnavailable        Redis does not serve: it says 'not now', or nothing at all
    │       └── StoreSilent         it can't be reached, or did not answer in time
    ├── LeaseLost                   the attempt's fence or lease is no longer current
    └── ToolFailure                 a call that gave no result; `code` says why, `sent` whether the tool saw it
        ├── ToolUnavailable         the call was surely not sent
        ├── ToolConnectionLost      sent, and then the connection broke
        ├── ToolTimedOut            sent, and no answer in time
        ├── ToolServerFailed        the server answered that it failed itself
        │   └── ToolAnswerUnclear   what came as an answer does not say whether the tool ran
        ├── ToolRejected            the server refused the name or the arguments
        └── ResultTooLarge          an answer came and was above the limit
"""

from __future__ import annotations

from typing import Any, ClassVar


class ToolfleetError(Exception):
    """Something in toolfleet failed."""

    def __init__(self, message: str | None = None, **details: Any) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])
        self.details = details


class InvalidTask(ToolfleetError):
    """The job is not valid."""


class TaskTooLarge(InvalidTask):
    """The job is larger than a task may be. Pass large inputs by reference, for instance as a URL."""


class UnknownTool(InvalidTask):
    """No tool server of the fleet offers this tool."""


class InvalidArguments(InvalidTask):
    """The arguments do not fit the tool's input schema."""


class IdempotencyConflict(InvalidTask):
    """This Idempotency-Key was used with another body. Use a new key for another job."""


class InvalidCursor(ToolfleetError):
    """The cursor is not one of ours. Begin again without one."""


class MalformedTask(ToolfleetError):
    """The message is not a task."""


class NewerTask(ToolfleetError):
    """The task was written by a newer version of toolfleet."""


class JobNotFound(ToolfleetError):
    """There is no such job."""


class JobExpired(JobNotFound):
    """The job ended and its result is no longer kept."""


class CallNotFound(JobNotFound):
    """The job has no such call."""


class DeadLetterNotFound(ToolfleetError):
    """There is no such dead letter."""


class IllegalMove(ToolfleetError):
    """The job's status does not allow this."""


class QueueError(ToolfleetError):
    """The queue failed."""


class QueueUnavailable(QueueError):
    """NATS JetStream can't be reached."""

    def __init__(self, message: str | None = None, *, maybe_stored: bool = False, **details: Any) -> None:
        super().__init__(message, **details)
        self.maybe_stored = maybe_stored
        """True when bytes were handed to a socket and no answer came: the message may stand in the stream."""


class QueueFull(QueueError):
    """The queue is at its limit. Try again later."""


class StreamMismatch(QueueError):
    """A stream of this name exists with other settings."""


class StoreError(ToolfleetError):
    """The job store failed."""


class StoreUnavailable(StoreError):
    """Redis does not serve at present."""


class StoreSilent(StoreUnavailable):
    """Redis can't be reached or did not answer in time."""


class LeaseLost(ToolfleetError):
    """This attempt no longer holds the job."""


class ToolFailure(ToolfleetError):
    """The tool call gave no result."""

    code: ClassVar[str] = "tool_failed"
    sent: ClassVar[bool] = True
    """Whether the tool may have seen the call."""
    answered: ClassVar[bool] = False
    """Whether the outcome is known: the server gave an answer of its own."""
    repeat: ClassVar[bool] = False
    """Whether another attempt may help, for a call that may run again."""


class ToolUnavailable(ToolFailure):
    """The tool's server could not be reached; the call was not sent."""

    code = "tool_unavailable"
    sent = False
    repeat = True


class ToolConnectionLost(ToolFailure):
    """The connection to the tool's server broke during the call."""

    code = "connection_lost"
    repeat = True


class ToolTimedOut(ToolFailure):
    """The tool did not answer in time."""

    code = "timeout"
    repeat = True


class ToolServerFailed(ToolFailure):
    """The tool's server answered that it failed."""

    code = "server_error"
    answered = True
    repeat = True


class ToolAnswerUnclear(ToolServerFailed):
    """What came as the server's answer does not say whether the tool has run."""

    answered = False


class ToolRejected(ToolFailure):
    """The tool's server refused the call."""

    code = "rejected"
    answered = True


class ResultTooLarge(ToolFailure):
    """The tool's result is larger than the limit."""

    code = "result_too_large"
    answered = True
