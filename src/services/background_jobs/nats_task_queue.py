"""The job queue on NATS JetStream: publish, find, purge, dead letters."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final, Literal

from nats.aio.msg import Msg

from toolfleet.services.background_jobs.errors import (
    MalformedTask,
    NewerTask,
    QueueError,
    QueueFull,
    QueueUnavailable,
)
from toolfleet.services.background_jobs.nats_connection import NatsConnection
from toolfleet.services.background_jobs.nats_streams import (
    STREAM_NOT_FOUND,
    StreamAdmin,
    StreamNames,
    dead_letter_stream,
    task_stream,
    tier_consumer,
)
from toolfleet.services.background_jobs.ports import DeadLetter, DeadLetterPage, QueueStats
from toolfleet.services.background_jobs.task_models import Millis, TaskDefinition, Tier, is_job_id, millis_of

STORE_FAILED: Final = 10077
"""`maximum messages per subject exceeded` as well as `maximum bytes exceeded`: queued already, or full."""
DUPLICATE_IN_FLIGHT: Final = 10158
"""The same Nats-Msg-Id is being stored at this moment."""
LETTER_HEADER: Final = "Toolfleet-Dead-Letter"
"""JSON: what is said of a dead letter, beside the message itself."""
HEADERS_MARGIN: Final = 1024
"""Of a dead letter, for the other headers: a task of 900 KiB leaves a hundred times as much below 1 MiB."""
INSUFFICIENT: Final = frozenset({10023, 10028, 10047})
"""Resources, account or server storage at their limit."""


class NatsTaskQueue:
    """`JobQueue` on JetStream."""

    def __init__(
        self,
        connection: NatsConnection,
        names: StreamNames,
        *,
        timeout_s: float,
        ack_wait_s: float,
        max_bytes: int,
        dlq_max_bytes: int,
        dlq_max_age_days: float,
    ) -> None:
        self._connection = connection
        self._names = names
        self._timeout = timeout_s
        self._ack_wait = ack_wait_s
        self._admin = StreamAdmin(connection, timeout_s)
        self._tasks = task_stream(names, max_bytes)
        self._dlq = dead_letter_stream(names, dlq_max_bytes, dlq_max_age_days)

    @property
    def connected(self) -> bool:
        """Whether there is a connection at this moment."""
        return self._connection.connected

    @property
    def names(self) -> StreamNames:
        """How streams and subjects are called."""
        return self._names

    async def ensure(self) -> tuple[str, int]:
        """Make what is missing and check what is there; the task stream's creation time and its messages.

        Raises:
            StreamMismatch: a stream or consumer exists with other settings.
            QueueUnavailable: no answer.
        """
        info = await self._admin.ensure_stream(self._tasks)
        await self._admin.ensure_stream(self._dlq)
        for tier in Tier:
            await self.ensure_consumer(tier)
        return str(info["created"]), int(info["state"]["messages"])

    async def ensure_consumer(self, tier: Tier) -> bool:
        """Make a lost consumer again; whether it was gone."""
        return await self._admin.ensure_consumer(self._names.tasks, tier_consumer(self._names, tier, self._ack_wait))

    async def publish(self, task: TaskDefinition, *, again: bool = False) -> Literal["stored", "duplicate", "refused"]:
        """Publish a task and wait for its ack (step 1); `again` leaves the message id out."""
        subject = self._names.subject(task.priority, task.job_id)
        return await self._publish(subject, task.to_json(), None if again else {"Nats-Msg-Id": task.task_id})

    async def _publish(
        self, subject: str, data: bytes, headers: dict[str, str] | None
    ) -> Literal["stored", "duplicate", "refused"]:
        reply = await self._connection.request(subject, data, self._timeout, headers=headers)
        answer: dict[str, Any] = json.loads(reply.data)
        if error := answer.get("error"):
            code = error.get("err_code")
            if code == STORE_FAILED:
                return "refused"
            if code == DUPLICATE_IN_FLIGHT:
                return "duplicate"
            text = f"JetStream refused {subject}: {error.get('description')} ({code})"
            if code in INSUFFICIENT:
                raise QueueFull(text)
            raise QueueUnavailable(text)
        return "duplicate" if answer.get("duplicate") else "stored"

    async def find(self, job_id: str) -> TaskDefinition | None:
        """The task of a job that stands in the stream, waiting or delivered."""
        reply = await self._direct_get(self._names.tasks, {"last_by_subj": self._names.any_tier(job_id)})
        if reply is None:
            return None
        try:
            return TaskDefinition.from_json(reply.data)
        except (MalformedTask, NewerTask) as error:
            raise QueueError(f"the message of {job_id} in the stream can't be read: {error}") from error

    async def stands(self, job_id: str) -> bool:
        """Whether a message of the job stands in the stream, readable or not."""
        return await self._direct_get(self._names.tasks, {"last_by_subj": self._names.any_tier(job_id)}) is not None

    async def _direct_get(self, stream: str, query: dict[str, Any]) -> Msg | None:
        reply = await self._connection.request(
            f"$JS.API.DIRECT.GET.{stream}", json.dumps(query).encode(), self._timeout
        )
        status = (reply.headers or {}).get("Status")
        if status == "404":
            return None
        if status is not None:
            raise QueueError(f"JetStream refused a direct get of {stream}: status {status}")
        return reply

    async def purge(self, job_id: str) -> bool:
        """Remove a job's message; whether there was one."""
        answer = await self._admin.api(f"STREAM.PURGE.{self._names.tasks}", {"filter": self._names.any_tier(job_id)})
        return bool(answer.get("purged"))

    # -- dead letters ------------------------------------------------------------------------------------------

    async def dead_letter(self, letter: DeadLetter) -> None:
        """Publish to the dead letter stream and wait for its ack (step 9); repeating it stores nothing new."""
        about = {
            "v": 1,
            "job_id": letter.job_id,
            "fence": letter.fence,
            "reason": letter.reason,
            "message": letter.message,
        }
        last = letter.job_id or "malformed"
        # A malformed message has no fence; its content names it, so that a redelivery stores it once.
        message_id = f"dlq:{letter.job_id}:{letter.fence}" if letter.fence else f"dlq:{letter.message_key}"
        headers = {"Nats-Msg-Id": message_id, LETTER_HEADER: json.dumps(about)}
        # The message goes as it is, beside the headers: encoded, a large one would be above the server's max_payload
        # and could never be buried. What does not fit even so is cut; a task always fits.
        room = self._connection.client.max_payload - len(headers[LETTER_HEADER]) - HEADERS_MARGIN
        if await self._publish(f"{self._names.dlq_prefix}.{last}", letter.payload[:room], headers) == "refused":
            raise QueueFull(f"the dead letter stream {self._names.dlq} is full; raise TOOLFLEET_DLQ_MAX_BYTES")

    async def dead_letters(self, after: int, limit: int) -> DeadLetterPage:
        """A page of dead letters, oldest first; the cursor is a stream sequence."""
        entries: list[DeadLetter] = []
        seq = after + 1
        while len(entries) < limit:
            reply = await self._direct_get(self._names.dlq, {"seq": seq, "next_by_subj": f"{self._names.dlq_prefix}.>"})
            if reply is None:
                return DeadLetterPage(entries, None)
            entry = _dead_letter_of(reply)
            entries.append(entry)
            seq = entry.seq + 1
        return DeadLetterPage(entries, entries[-1].seq)

    async def stats(self) -> QueueStats:
        """Fill of the streams."""
        tasks = await self._admin.api(f"STREAM.INFO.{self._names.tasks}")
        dlq = await self._admin.api(f"STREAM.INFO.{self._names.dlq}")
        state = dlq["state"]
        oldest = _millis(state["first_ts"]) if state["messages"] else None
        return QueueStats(
            messages=tasks["state"]["messages"],
            bytes=tasks["state"]["bytes"],
            max_bytes=tasks["config"]["max_bytes"],
            dead_letters=state["messages"],
            dead_letters_bytes=state["bytes"],
            dead_letters_max_bytes=dlq["config"]["max_bytes"],
            oldest_dead_letter_at=oldest,
        )

    async def settings_report(self) -> dict[str, str]:
        """For `doctor`: the server's version, and each stream and consumer as 'ok', 'missing' or what differs.

        Raises:
            QueueUnavailable: no answer.
        """
        version = self._connection.client.connected_server_version
        report = {"server": f"{version.major}.{version.minor}.{version.patch}"}
        tasks = self._names.tasks
        for config in (self._tasks, self._dlq):
            report[config["name"]] = await self._admin.state_of(f"STREAM.INFO.{config['name']}", config)
        for tier in Tier:
            wanted = tier_consumer(self._names, tier, self._ack_wait)
            name = wanted["durable_name"]
            report[f"{tasks}/{name}"] = await self._admin.state_of(f"CONSUMER.INFO.{tasks}.{name}", wanted)
        return report

    async def identity(self) -> tuple[str, int] | None:
        """The task stream's creation time and its messages; None where there is no stream."""
        try:
            info = await self._admin.api(f"STREAM.INFO.{self._names.tasks}")
        except QueueError as error:
            if error.details.get("err_code") == STREAM_NOT_FOUND:
                return None
            raise
        return str(info["created"]), int(info["state"]["messages"])


def _dead_letter_of(reply: Msg) -> DeadLetter:
    headers = reply.headers or {}
    about = json.loads(headers[LETTER_HEADER])
    job_id = about.get("job_id")
    return DeadLetter(
        job_id=job_id if job_id and is_job_id(job_id) else None,
        fence=int(about["fence"]),
        reason=str(about["reason"]),
        message=str(about["message"]),
        payload=reply.data,
        seq=int(headers["Nats-Sequence"]),
        at=_millis(headers["Nats-Time-Stamp"]),
    )


def _millis(timestamp: str) -> Millis:
    """JetStream writes nanoseconds, `datetime` reads microseconds."""
    whole, _, fraction = timestamp.removesuffix("Z").partition(".")
    return millis_of(datetime.fromisoformat(f"{whole}.{fraction[:6].ljust(6, '0')}+00:00"))
