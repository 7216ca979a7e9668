"""The job queue on NATS JetStream: publish, find, purge."""

from __future__ import annotations

import asyncio
from typing import Literal

from toolfleet.services.background_jobs.errors import MalformedTask, NewerTask, QueueError
from toolfleet.services.background_jobs.nats_connection import NatsConnection
from toolfleet.services.background_jobs.nats_streams import (
    CONSUMER_NOT_FOUND,
    STREAM_NOT_FOUND,
    StreamAdmin,
    StreamNames,
    dead_letter_stream,
    stamp_millis,
    task_stream,
    tier_consumer,
)
from toolfleet.services.background_jobs.queue_ports import QueueFill, QueueStats, TierFill
from toolfleet.services.background_jobs.task_models import TaskDefinition, Tier


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
        return await self._admin.publish(subject, task.to_json(), None if again else {"Nats-Msg-Id": task.task_id})

    async def find(self, job_id: str) -> TaskDefinition | None:
        """The task of a job that stands in the stream, waiting or delivered."""
        reply = await self._admin.direct_get(self._names.tasks, {"last_by_subj": self._names.any_tier(job_id)})
        if reply is None:
            return None
        try:
            return TaskDefinition.from_json(reply.data)
        except (MalformedTask, NewerTask) as error:
            raise QueueError(f"the message of {job_id} in the stream can't be read: {error}") from error

    async def stands(self, job_id: str) -> bool:
        """Whether a message of the job stands in the stream, readable or not."""
        return (
            await self._admin.direct_get(self._names.tasks, {"last_by_subj": self._names.any_tier(job_id)}) is not None
        )

    async def acked(self, job_id: str) -> bool:
        """Whether a message stands although its consumer takes it for acked.

        nats-server 2.15 leaves such messages where its disk was full when they were acked (nats-server#3997), also
        after a restart. What is at or below the consumer's ack floor is never delivered again.
        """
        reply = await self._admin.direct_get(self._names.tasks, {"last_by_subj": self._names.any_tier(job_id)})
        if reply is None:
            return False
        headers = reply.headers or {}
        tier = headers["Nats-Subject"].split(".")[-2]
        if tier not in {each.value for each in Tier}:
            # Another program's, under a subject that no consumer reads.
            return True
        info = await self._admin.api(f"CONSUMER.INFO.{self._names.tasks}.{self._names.consumer(Tier(tier))}")
        return int(headers["Nats-Sequence"]) <= int(info["ack_floor"]["stream_seq"])

    async def purge(self, job_id: str) -> bool:
        """Remove a job's message; whether there was one."""
        answer = await self._admin.api(f"STREAM.PURGE.{self._names.tasks}", {"filter": self._names.any_tier(job_id)})
        return bool(answer.get("purged"))

    async def stats(self) -> QueueStats:
        """Fill of the streams."""
        tasks, dlq = await asyncio.gather(self.fill(), self._admin.api(f"STREAM.INFO.{self._names.dlq}"))
        state = dlq["state"]
        oldest = stamp_millis(state["first_ts"]) if state["messages"] else None
        return QueueStats(
            messages=tasks.messages,
            bytes=tasks.bytes,
            max_bytes=tasks.max_bytes,
            tiers=tasks.tiers,
            dead_letters=state["messages"],
            dead_letters_bytes=state["bytes"],
            dead_letters_max_bytes=dlq["config"]["max_bytes"],
            oldest_dead_letter_at=oldest,
        )

    async def fill(self) -> QueueFill:
        """Fill of the task stream, by tier."""
        info, *tiers = await asyncio.gather(
            self._admin.api(f"STREAM.INFO.{self._names.tasks}"), *(self._tier_fill(tier) for tier in Tier)
        )
        state = info["state"]
        return QueueFill(
            messages=state["messages"],
            bytes=state["bytes"],
            max_bytes=info["config"]["max_bytes"],
            tiers=dict(zip(Tier, tiers, strict=True)),
        )

    async def _tier_fill(self, tier: Tier) -> TierFill:
        """A tier by its consumer; nothing is known of one that is lost until a worker makes it again."""
        try:
            info = await self._admin.api(f"CONSUMER.INFO.{self._names.tasks}.{self._names.consumer(tier)}")
        except QueueError as error:
            if error.details.get("err_code") != CONSUMER_NOT_FOUND:
                raise
            return TierFill(0, 0)
        held = info["num_ack_pending"]
        return TierFill(jobs=info["num_pending"] + held, settled=info["delivered"]["consumer_seq"] - held)

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
