"""The dead letters on NATS JetStream: store, read, remove."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from nats.aio.msg import Msg

from toolfleet.services.background_jobs.errors import QueueError, QueueFull, QueueUnavailable
from toolfleet.services.background_jobs.nats_connection import NatsConnection
from toolfleet.services.background_jobs.nats_streams import (
    MESSAGE_NOT_FOUND,
    StreamAdmin,
    StreamNames,
    stamp_millis,
)
from toolfleet.services.background_jobs.queue_ports import DeadLetter, DeadLetterPage
from toolfleet.services.background_jobs.task_models import is_job_id

LETTER_HEADER: Final = "Toolfleet-Dead-Letter"
"""JSON: what is said of a dead letter, beside the message itself."""
HEADERS_MARGIN: Final = 1024
"""Of a dead letter, for the other headers: a task of 900 KiB leaves a hundred times as much below 1 MiB."""
MAX_SUBJECT: Final = 1000
"""Characters of a stranger's subject that are kept."""


class NatsDeadLetters:
    """`DeadLetterBox` on JetStream."""

    def __init__(self, connection: NatsConnection, names: StreamNames, *, timeout_s: float) -> None:
        self._connection = connection
        self._admin = StreamAdmin(connection, timeout_s)
        self._stream = names.dlq
        self._prefix = names.dlq_prefix

    async def store(self, letter: DeadLetter) -> None:
        """Publish to the dead letter stream and wait for its ack (step 9); repeating it stores nothing new."""
        if await self._stands(letter):
            return
        # The fence makes each attempt's letter one of its own, and the same letter once. A malformed message has no
        # fence; its content names it, so that a redelivery stores it once.
        message_id = f"dlq:{letter.job_id}:{letter.fence}" if letter.fence else f"dlq:{letter.message_key}"
        # The message goes as it is, beside the headers: encoded, a large one would be above the server's max_payload
        # and could never be buried. What does not fit even so is cut; a task always fits.
        room = self._connection.client.max_payload - len(_about(letter, cut=True)) - HEADERS_MARGIN
        about = _about(letter, cut=len(letter.payload) > room)
        headers = {"Nats-Msg-Id": message_id, LETTER_HEADER: about}
        subject = f"{self._prefix}.{letter.job_id or 'malformed'}"
        if await self._admin.publish(subject, letter.payload[:room], headers) == "refused":
            raise QueueFull(f"the dead letter stream {self._stream} is full; raise TOOLFLEET_DLQ_MAX_BYTES")

    async def _stands(self, letter: DeadLetter) -> bool:
        """Whether an earlier attempt of the same generation has left a letter: its ack was lost, or it died before the
        job's end was written. The next attempt has another fence, but the job needs a person once."""
        task = letter.task()
        if task is None:
            return False
        reply = await self._admin.direct_get(self._stream, {"last_by_subj": f"{self._prefix}.{task.job_id}"})
        earlier = _letter_of(reply).task() if reply is not None else None
        return earlier is not None and earlier.generation == task.generation

    async def page(self, after: int, limit: int) -> DeadLetterPage:
        """The letters behind a place in the stream, oldest first; the cursor is a stream sequence."""
        entries = await self._read(f"{self._prefix}.>", after, limit)
        return DeadLetterPage(entries, entries[-1].seq if len(entries) == limit else None)

    async def of_job(self, job_id: str) -> Sequence[DeadLetter]:
        """All letters that name a job, oldest first."""
        return await self._read(f"{self._prefix}.{job_id}", 0, None)

    async def _read(self, subject: str, after: int, limit: int | None) -> list[DeadLetter]:
        found: list[DeadLetter] = []
        while limit is None or len(found) < limit:
            reply = await self._admin.direct_get(self._stream, {"seq": after + 1, "next_by_subj": subject})
            if reply is None:
                break
            found.append(_letter_of(reply))
            after = found[-1].seq
        return found

    async def at(self, seq: int) -> DeadLetter | None:
        """The letter at a place of the stream, or None."""
        reply = await self._admin.direct_get(self._stream, {"seq": seq})
        return None if reply is None else _letter_of(reply)

    async def remove(self, letters: Sequence[DeadLetter]) -> int:
        """Take exactly these letters away; how many were still there.

        One by one and not by a purge of the subject: a job that was redriven may have a new letter by now.
        """
        removed = 0
        for letter in letters:
            try:
                await self._admin.api(f"STREAM.MSG.DELETE.{self._stream}", {"seq": letter.seq, "no_erase": True})
            except QueueUnavailable:
                raise
            except QueueError as error:
                if error.details.get("err_code") not in MESSAGE_NOT_FOUND:
                    raise
            else:
                removed += 1
        return removed


def _about(letter: DeadLetter, *, cut: bool) -> str:
    """What is said of a letter in its header."""
    about: dict[str, Any] = {
        "v": 1,
        "job_id": letter.job_id,
        "fence": letter.fence,
        "reason": letter.reason,
        "message": letter.message,
    }
    if letter.subject is not None:
        about["subject"] = letter.subject[:MAX_SUBJECT]
    if cut:
        about |= {"size": len(letter.payload), "sha256": letter.message_key}
    return json.dumps(about)


def _letter_of(reply: Msg) -> DeadLetter:
    headers = reply.headers or {}
    seq, at = int(headers["Nats-Sequence"]), stamp_millis(headers["Nats-Time-Stamp"])
    try:
        about: Mapping[str, Any] = json.loads(headers[LETTER_HEADER])
        job_id = about.get("job_id")
        return DeadLetter(
            job_id=job_id if job_id and is_job_id(job_id) else None,
            fence=int(about["fence"]),
            reason=str(about["reason"]),
            message=str(about["message"]),
            payload=reply.data,
            subject=about.get("subject"),
            size=about.get("size"),
            sha256=about.get("sha256"),
            seq=seq,
            at=at,
        )
    except (KeyError, ValueError, TypeError, AttributeError):
        # Somebody else's message must not keep a person from seeing ours.
        subject = headers.get("Nats-Subject")
        text = f"the message was put into {headers.get('Nats-Stream')} by another program than toolfleet"
        return DeadLetter(None, 0, "foreign", text, reply.data, subject=subject, seq=seq, at=at)
