"""The contract of the two streams: what they must look like, and what is said when one does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from nats.aio.msg import Msg

from toolfleet.services.background_jobs.errors import QueueError, QueueUnavailable, StreamMismatch
from toolfleet.services.background_jobs.nats_connection import NatsConnection
from toolfleet.services.background_jobs.task_models import Millis, Tier, millis_of

NANOS = 1_000_000_000

STREAM_NOT_FOUND = 10059
CONSUMER_NOT_FOUND = 10014
MESSAGE_NOT_FOUND = frozenset({10037, 10043, 10057})
"""No message found, sequence not found, and the refusal of its deletion, which is both."""
INSUFFICIENT_STORAGE = 10047
NO_ROOM = "; raise max_file_store in the server's configuration, or lower TOOLFLEET_STREAM_MAX_BYTES"

STORE_FAILED = 10077
"""`maximum messages per subject exceeded` as well as `maximum bytes exceeded`: queued already, or full. Also every
failure to write, with the reason as its description."""
AT_A_LIMIT = "maximum "
"""How descriptions of a stream's own limits begin."""
DUPLICATE_IN_FLIGHT = 10158
"""The same Nats-Msg-Id is being stored at this moment."""
INSUFFICIENT = frozenset({10023, 10028, INSUFFICIENT_STORAGE})
"""Resources, account or server storage at their limit."""

DUPLICATE_WINDOW_S = 120
"""JetStream's default, within which a Nats-Msg-Id is stored once."""


@dataclass(frozen=True, slots=True)
class StreamNames:
    """How the streams and subjects of one fleet are called."""

    tasks: str
    prefix: str
    dlq: str
    dlq_prefix: str

    def subject(self, tier: Tier, job_id: str) -> str:
        """Of a job's task."""
        return f"{self.prefix}.{tier.value}.{job_id}"

    def any_tier(self, job_id: str) -> str:
        """Matches a job's task in every tier."""
        return f"{self.prefix}.*.{job_id}"

    def consumer(self, tier: Tier) -> str:
        """The durable consumer of a tier."""
        return f"workers-{tier.value}"


def task_stream(names: StreamNames, max_bytes: int) -> dict[str, Any]:
    """WorkQueue: one message a job, removed by its ack; a second one of a job is refused, and so is overflow."""
    return {
        "name": names.tasks,
        "subjects": [f"{names.prefix}.*.*"],
        "retention": "workqueue",
        "storage": "file",
        "max_msgs_per_subject": 1,
        "discard": "new",
        "discard_new_per_subject": True,
        "max_bytes": max_bytes,
        "duplicate_window": DUPLICATE_WINDOW_S * NANOS,
        "allow_direct": True,
    }


def dead_letter_stream(names: StreamNames, max_bytes: int, max_age_days: float) -> dict[str, Any]:
    """Limits: dead letters stay until their age or the stream's size says otherwise, the oldest going first."""
    return {
        "name": names.dlq,
        "subjects": [f"{names.dlq_prefix}.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_bytes": max_bytes,
        "max_age": int(max_age_days * 86400 * NANOS),
        "duplicate_window": DUPLICATE_WINDOW_S * NANOS,
        "allow_direct": True,
    }


def tier_consumer(names: StreamNames, tier: Tier, ack_wait_s: float) -> dict[str, Any]:
    """Durable pull consumer of a tier. Attempts are counted in Redis, so it delivers without limit and backoff."""
    return {
        "durable_name": names.consumer(tier),
        "filter_subject": f"{names.prefix}.{tier.value}.*",
        "ack_policy": "explicit",
        "ack_wait": int(ack_wait_s * NANOS),
        "max_deliver": -1,
        "max_ack_pending": -1,
        "max_waiting": 2048,
        "deliver_policy": "all",
        "replay_policy": "instant",
    }


class StreamAdmin:
    """JetStream's API for streams, consumers and messages, as JSON over requests."""

    def __init__(self, connection: NatsConnection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout = timeout_s

    async def api(self, verb: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call ``$JS.API.<verb>``.

        Raises:
            QueueUnavailable: no answer.
            QueueError: JetStream refused; ``details["err_code"]`` says why.
        """
        payload = json.dumps(body).encode() if body else b""
        reply = await self._connection.request(f"$JS.API.{verb}", payload, self._timeout)
        answer: dict[str, Any] = json.loads(reply.data)
        if error := answer.get("error"):
            code = error.get("err_code")
            hint = NO_ROOM if code == INSUFFICIENT_STORAGE else ""
            raise QueueError(f"JetStream refused {verb}: {error.get('description')} ({code}){hint}", err_code=code)
        return answer

    async def publish(
        self, subject: str, data: bytes, headers: dict[str, str] | None
    ) -> Literal["stored", "duplicate", "refused"]:
        """Publish into a stream and wait for its ack; 'refused' is error 10077.

        Raises:
            QueueUnavailable: no answer, or another refusal, such as for a disk that is full.
        """
        reply = await self._connection.request(subject, data, self._timeout, headers=headers)
        answer: dict[str, Any] = json.loads(reply.data)
        if error := answer.get("error"):
            code = error.get("err_code")
            text = f"JetStream refused {subject}: {error.get('description')} ({code})"
            if code == STORE_FAILED:
                if str(error.get("description")).startswith(AT_A_LIMIT):
                    return "refused"
                # The server's own words about its disk; whether the message is on it can't be told.
                raise QueueUnavailable(f"{text}; look at the disk of the NATS server", maybe_stored=True)
            if code == DUPLICATE_IN_FLIGHT:
                return "duplicate"
            # Also where the server has no storage left for anybody: it is not the caller who filled it.
            hint = "; the NATS server has no storage left: free or add some" if code in INSUFFICIENT else ""
            raise QueueUnavailable(text + hint)
        return "duplicate" if answer.get("duplicate") else "stored"

    async def direct_get(self, stream: str, query: Mapping[str, Any]) -> Msg | None:
        """One stored message, as JetStream's direct get finds it; None where there is none.

        Raises:
            QueueUnavailable: no answer.
            QueueError: JetStream refused.
        """
        reply = await self._connection.request(
            f"$JS.API.DIRECT.GET.{stream}", json.dumps(query).encode(), self._timeout
        )
        status = (reply.headers or {}).get("Status")
        if status == "404":
            return None
        if status is not None:
            raise QueueError(f"JetStream refused a direct get of {stream}: status {status}")
        return reply

    async def ensure_stream(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The stream's info; it is made where it is not there, and never changed.

        Raises:
            StreamMismatch: it exists with other settings; the message names each field.
        """
        name = wanted["name"]
        try:
            info = await self.api(f"STREAM.INFO.{name}")
        except QueueError as error:
            if error.details.get("err_code") != STREAM_NOT_FOUND:
                raise
            info = await self.api(f"STREAM.CREATE.{name}", wanted)
        compare(f"stream {name}", wanted, info["config"])
        return info

    async def ensure_consumer(self, stream: str, wanted: Mapping[str, Any]) -> bool:
        """Make a consumer where it is not there; whether it was gone.

        Raises:
            StreamMismatch: it exists with other settings.
        """
        name = wanted["durable_name"]
        try:
            info = await self.api(f"CONSUMER.INFO.{stream}.{name}")
        except QueueError as error:
            if isinstance(error, QueueUnavailable) or error.details.get("err_code") != CONSUMER_NOT_FOUND:
                raise
            # Creating is idempotent for the same settings, so two workers may do it at once.
            body = {"stream_name": stream, "config": wanted}
            info = await self.api(f"CONSUMER.DURABLE.CREATE.{stream}.{name}", body)
            compare(f"consumer {name}", wanted, info["config"])
            return True
        compare(f"consumer {name}", wanted, info["config"])
        return False

    async def state_of(self, verb: str, wanted: Mapping[str, Any]) -> str:
        """Of a stream or consumer, asked with its INFO verb: 'ok', 'missing', or what differs. Changes nothing."""
        try:
            info = await self.api(verb)
            compare(verb.partition(".INFO.")[2], wanted, info["config"])
        except StreamMismatch as error:
            return str(error)
        except QueueError as error:
            if error.details.get("err_code") in (STREAM_NOT_FOUND, CONSUMER_NOT_FOUND):
                return "missing"
            raise
        return "ok"


def compare(what: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises `StreamMismatch` naming each field that differs."""
    differs = [
        f"{field} is {found.get(field)!r}, expected {value!r}"
        for field, value in wanted.items()
        if found.get(field) != value and not (value in (False, 0, "instant", "all") and field not in found)
    ]
    if differs:
        raise StreamMismatch(
            f"{what} exists with other settings: {'; '.join(differs)}. toolfleet never changes one silently: "
            "set the settings to match, name another stream (TOOLFLEET_STREAM, TOOLFLEET_DLQ_STREAM), or edit it "
            "with the nats command line",
            what=what,
        )


def stamp_millis(timestamp: str) -> Millis:
    """A time of JetStream, which writes nanoseconds; `datetime` reads microseconds."""
    whole, _, fraction = timestamp.removesuffix("Z").partition(".")
    return millis_of(datetime.fromisoformat(f"{whole}.{fraction[:6].ljust(6, '0')}+00:00"))
