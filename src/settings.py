"""Every setting of every part, read from the environment in one place.

Names follow the field where it has a name for a thing (``NATS_URL``, ``REDIS_URL``, ``CONSUL_HTTP_ADDR``,
``CONSUL_HTTP_TOKEN``); everything else is ``TOOLFLEET_<FIELD>``. No other module reads the environment: parts take
a `Settings`, or the values they need, as arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

Seconds = Annotated[float, Field(gt=0)]
"""A duration in seconds, above zero."""


def _either(*names: str) -> AliasChoices:
    return AliasChoices(*names)


class Settings(BaseSettings):
    """What an operator can set. Durations are in seconds and sizes in bytes unless the name says otherwise.

    Raises:
        pydantic.ValidationError: a variable does not parse; the message names the variable and the reason.
    """

    model_config = SettingsConfigDict(
        env_prefix="TOOLFLEET_",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    # -- where things are -------------------------------------------------------------------------------------
    nats_url: SecretStr | None = Field(None, validation_alias=_either("NATS_URL", "TOOLFLEET_NATS_URL"))
    """``nats://[user:password@]host:port``; several, separated by commas, for a cluster. First choice."""
    redis_url: SecretStr | None = Field(None, validation_alias=_either("REDIS_URL", "TOOLFLEET_REDIS_URL"))
    """``redis://[user:password@]host:port/db``. First choice."""
    consul_http_addr: str | None = Field(None, validation_alias="CONSUL_HTTP_ADDR")
    """``[http://]host:port`` of a Consul agent; asked for whatever has no explicit URL."""
    consul_http_token: SecretStr | None = Field(None, validation_alias="CONSUL_HTTP_TOKEN")
    """Sent to that agent."""
    nats_service_name: str = "nats-grpc-service"
    """Of NATS in Consul; its meta may carry `stream` and `subject_prefix`."""
    redis_service_name: str = "redis-grpc-service"
    """Of Redis in Consul."""
    mcp_config: Path | None = None
    """A JSON file in the `mcpServers` form of desktop clients and editors."""
    mcp_variables: dict[str, SecretStr] = Field(default_factory=dict)
    """JSON: ``{"NAME": "value"}``, what ``${NAME}`` stands for in that file; the environment is not looked at."""
    nats_monitoring_url: str | None = None
    """``http://host:port`` of nats-server's monitoring; only there it tells whether it syncs its writes."""
    api_url: str = "http://127.0.0.1:8081"
    """Of the jobs API, for the command line's client commands."""
    state_dir: Path = Path(".run")
    """Where this host keeps pid files, logs and worker status files (`manage_workers.sh`), and the spool of what could
    not be written while Redis was away. One for a fleet, on a disk that outlives the processes."""

    # -- the queue --------------------------------------------------------------------------------------------
    stream: str = "TOOLFLEET_TASKS"
    """The JetStream stream of tasks."""
    subject_prefix: str = "toolfleet.tasks"
    """Tasks are published to ``<prefix>.<tier>.<job_id>``."""
    dlq_stream: str = "TOOLFLEET_DLQ"
    """The JetStream stream of dead letters."""
    dlq_subject_prefix: str = "toolfleet.dlq"
    """Dead letters are published to ``<prefix>.<job_id>``."""
    stream_max_bytes: int = Field(1 << 30, ge=1 << 20)
    """Of the task stream. A submit is answered 429 before: tier low at 80 % of it, normal at 90 %, high at 95 %."""
    tier_max_jobs: int = Field(100_000, ge=1)
    """Jobs of one tier in the queue, waiting and running; a further one is answered 429. A worker of 1,000 jobs a
    second needs 100 s for so many."""
    dlq_max_bytes: int = Field(256 << 20, ge=1 << 20)
    """Of the dead letter stream; the oldest go first, and the stats warn at 80 %."""
    dlq_max_age_days: float = Field(30, gt=0)
    """How long a dead letter stays."""
    ack_wait: Seconds = 30
    """How long JetStream waits for an ack or in_progress before it delivers a task again."""
    publish_timeout: Seconds = 5
    """The bound of one request to JetStream."""

    # -- the store --------------------------------------------------------------------------------------------
    redis_timeout: Seconds = 5
    """The bound of one Redis round trip, connecting included; for large writes a second a MiB is added."""
    redis_max_connections: int = Field(8, ge=4)
    """Of one process; beyond it callers wait for one to be free. Two carry all calls, one the subscriptions, and one
    must be left to load the functions with."""
    result_ttl_hours: float = Field(24, ge=24)
    """How long a record, its results and its Idempotency-Key are kept after the end; at least 24 (G6)."""
    event_log_max: int = Field(1000, ge=50)
    """Entries kept of one job's log, one a write, which holds one event or several; older ones are trimmed and readers
    are told by a `gap` event."""

    # -- jobs -------------------------------------------------------------------------------------------------
    max_calls_per_job: int = Field(100, ge=1, le=1000)
    """More are refused with 422."""
    max_body_bytes: int = Field(900 * 1024, ge=1024, le=900 * 1024)
    """Of a request and of the task it becomes: 900 KiB leaves room for headers below NATS' 1 MiB max_payload."""
    job_timeout: Seconds = 600
    """Running time of a job over all attempts, where the caller sets none."""
    call_timeout: Seconds = 300
    """Of one tool call in one attempt."""
    max_retries: int = Field(2, ge=0, le=20)
    """Where the caller sets none."""
    retry_delays: Annotated[tuple[float, ...], NoDecode] = (30.0, 60.0)
    """Seconds before the first, the second … retry, comma separated; the last one repeats."""
    retry_jitter: float = Field(0.2, ge=0, le=1)
    """A delay is multiplied by a random factor from 1 to 1 + this."""
    max_starts: int = Field(3, ge=1, le=100)
    """Starts of a job that ended without a word (its worker died) before it becomes a dead letter (G9)."""

    # -- the worker -------------------------------------------------------------------------------------------
    concurrency: int = Field(20, ge=1, le=10_000)
    """Jobs at once in one worker."""
    calls_at_once: int = Field(8, ge=1, le=1000)
    """Tool calls of one job that run at once."""
    lease: Seconds = 30
    """How long an attempt holds its job without a renewal; renewed every third of it."""
    drain_timeout: Seconds = 30
    """From SIGTERM to the end; jobs that still run are handed back 5 s before it, or after half of it."""
    progress_interval: float = Field(0.2, ge=0)
    """Least time between two `tool.progress` events of one call; the last state is always sent."""
    recovery_check_interval: Seconds = Field(
        30, validation_alias=_either("RECOVERY_CHECK_INTERVAL_SECONDS", "TOOLFLEET_RECOVERY_CHECK_INTERVAL")
    )
    """Between two looks of the reconciler for jobs that no message will wake."""
    stuck_run_timeout: float = Field(
        5, gt=0, validation_alias=_either("STUCK_RUN_TIMEOUT_MINUTES", "TOOLFLEET_STUCK_RUN_TIMEOUT")
    )
    """Minutes after which the reconciler takes a running job from an attempt that does not go on: its lease ran out so
    long ago and its message was not delivered again, or it runs so much longer than its running time allows."""
    blocked_loop_limit: float = Field(20, ge=0)
    """Seconds for which a worker's event loop may be blocked; then the process ends itself with exit code 70. Below
    `lease`, so that it is gone when another worker takes its jobs, and far above any honest pause. 0: never."""
    worker_name: str | None = None
    """Unique in the fleet; ``<tier>-<host>-<pid>`` where unset."""

    # -- tools ------------------------------------------------------------------------------------------------
    max_result_bytes: int = Field(8 << 20, ge=1024)
    """Of one call's result; a larger one fails its call."""
    max_job_result_bytes: int = Field(64 << 20, ge=1024)
    """Of all results of one attempt of a job; a call whose result does not fit any more fails."""
    mcp_connect_timeout: Seconds = 10
    """For a tool server to be reached or started, and ready."""
    mcp_max_connections: int = Field(1000, ge=1)
    """Calls at once on one HTTP tool server; further ones wait. At most half of the process's open files."""
    tool_policy: dict[str, Literal["repeatable", "once"]] = Field(default_factory=dict)
    """JSON: ``{"server/tool" | "tool" | "server/*": "repeatable" | "once"}``; overrides the MCP annotations."""
    catalogue_ttl: Seconds = 60
    """Age at which the cached tool catalogue is refreshed from the servers."""

    # -- the web tools server ---------------------------------------------------------------------------------
    web_host: str = "127.0.0.1"
    """Where the tool server listens."""
    web_port: int = Field(8090, ge=0, le=65535)
    """0 picks a free one."""
    web_allow_private: bool = False
    """Let `web_crawl` fetch private and loopback addresses."""
    web_user_agent: str = "toolfleet-web-crawl/0.1"
    """Sent with every fetch, and looked for in robots.txt."""
    web_fetch_timeout: Seconds = 15
    """Of one fetch, each redirect by itself."""
    web_max_page_bytes: int = Field(5 << 20, ge=1024)
    """Of one page, as sent and as unpacked; a larger one is skipped."""
    web_crawl_timeout: Seconds = 240
    """After it a crawl ends with the pages it has; below `call_timeout`, so that they are not lost to that."""
    web_drain_timeout: Seconds = 10
    """From SIGTERM to the moment at which running crawls are stopped; a crawl can always be repeated."""

    # -- the API ----------------------------------------------------------------------------------------------
    api_host: str = "127.0.0.1"
    """Where the API listens. It asks for no key: put it on another address only behind something that does."""
    api_port: int = Field(8081, ge=0, le=65535)
    """0 picks a free one."""
    public_url: str | None = None
    """Prefix of the URLs in answers, where the API sits behind a proxy; without it URLs are paths."""
    sse_heartbeat: Seconds = 15
    """Between two comments on a stream that has nothing to tell."""
    api_concurrency: int = Field(20, ge=1)
    """Synchronous runs at once in one API process."""

    # -- logs -------------------------------------------------------------------------------------------------
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """From which level on is written."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """`auto`: console on a terminal, JSON otherwise."""
    no_color: str = Field("", validation_alias="NO_COLOR")
    """Not empty: no colours, as no-color.org has it."""

    @field_validator("retry_delays", mode="before")
    @classmethod
    def _split_delays(cls, value: object) -> object:
        return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def variable_names() -> frozenset[str]:
    """The name of every environment variable that `Settings` reads."""
    names: set[str] = set()
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias or f"TOOLFLEET_{name.upper()}"]
        names.update(choice for choice in choices if isinstance(choice, str))
    return frozenset(names)
