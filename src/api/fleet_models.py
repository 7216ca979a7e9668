"""What the API answers about the fleet: statistics, tools, workers, dead letters, health."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue

from toolfleet.api.models import IsoTime
from toolfleet.services.background_jobs.task_models import Status, Tier


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class TierFigures(_Answer):
    """One tier at this moment."""

    queued: int
    running: int
    oldest_age_seconds: float
    """Of the oldest job that is due and waits; 0 where none does."""
    in_queue: int | None
    """Jobs of the tier in the queue, waiting and running; null while NATS is down."""
    max_in_queue: int
    """At so many a further job is answered 429."""
    max_bytes: int | None
    """Fill of the whole stream above which the tier's jobs are answered 429; null while NATS is down."""


class Rates(_Answer):
    """Jobs that ended."""

    finished_last_minute: int
    """In this and the last full minute."""
    finished_last_15_minutes: int


class QueueFigures(_Answer):
    """Fill of the task stream."""

    messages: int
    bytes: int
    max_bytes: int


class DeadLetterFigures(_Answer):
    """Fill of the dead letter stream."""

    count: int
    bytes: int
    max_bytes: int
    oldest_at: IsoTime | None
    oldest_age_seconds: float | None


class WorkerFigures(_Answer):
    """The workers that are alive."""

    total: int
    by_tier: dict[Tier, int]
    slots: int
    in_flight: int


class Stats(_Answer):
    """The fleet's figures."""

    tiers: dict[Tier, TierFigures]
    totals: dict[Status, int]
    """Jobs that reached each terminal status since the store was made, and those queued and running now."""
    rates: Rates
    leases_lost: int
    queue: QueueFigures | None
    """Null while NATS is down; so is `dead_letters`."""
    dead_letters: DeadLetterFigures | None
    workers: WorkerFigures
    warnings: list[str]


class Tool(_Answer):
    """A tool that jobs can call."""

    name: str
    """As `tool_name` takes it: ``tool``, or ``server/tool`` where two servers have a tool of one name."""
    server: str
    tool: str
    description: str
    input_schema: dict[str, JsonValue]
    repeatable: bool
    """Read-only or idempotent: it may run again after an attempt whose outcome is not known."""
    policy: Literal["repeatable", "once"]
    """The same in a word. `once`: a call that was started and whose outcome is not known makes its job `unknown`."""
    policy_source: Literal["annotation", "default", "setting"]
    """Who says so: the tool's own MCP annotations, their defaults where it says nothing, or TOOLFLEET_TOOL_POLICY."""


class ToolList(_Answer):
    """What the fleet can call, by name."""

    tools: list[Tool]


class Worker(_Answer):
    """A worker's last heartbeat."""

    worker_id: str
    tier: Tier
    host: str
    pid: int
    version: str
    state: str
    started_at: IsoTime
    seen_at: IsoTime
    slots: int
    in_flight: int
    done: int


class WorkerList(_Answer):
    """The workers that are alive."""

    workers: list[Worker]


class Live(_Answer):
    """The process answers."""

    status: Literal["alive"] = "alive"
    version: str


class Ready(_Answer):
    """Everything is there."""

    status: Literal["ready"] = "ready"
    parts: dict[str, Literal["up"]]
