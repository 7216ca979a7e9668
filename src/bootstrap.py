"""The composition root: settings become wired parts, as async context managers.

Nothing else makes clients or joins parts; what is opened here is closed here, in the reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import redis.asyncio as redis
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from toolfleet.services.background_jobs.admission import Admission
from toolfleet.services.background_jobs.attempt import AttemptRules
from toolfleet.services.background_jobs.dead_letters import DeadLetters
from toolfleet.services.background_jobs.durability import (
    Durability,
    nats_varz,
    queue_durability,
    store_durability,
    tell_durability,
)
from toolfleet.services.background_jobs.errors import (
    QueueError,
    QueueUnavailable,
    StoreError,
    StoreUnavailable,
    StreamMismatch,
)
from toolfleet.services.background_jobs.finish_spool import FinishSpool
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.loop_watchdog import LoopWatchdog
from toolfleet.services.background_jobs.nats_connection import NatsConnection
from toolfleet.services.background_jobs.nats_dead_letters import NatsDeadLetters
from toolfleet.services.background_jobs.nats_streams import StreamNames
from toolfleet.services.background_jobs.nats_task_queue import NatsTaskQueue
from toolfleet.services.background_jobs.ports import ToolCatalogue, ToolRunner
from toolfleet.services.background_jobs.pull_feed import PullFeed
from toolfleet.services.background_jobs.queue_ports import Delivery
from toolfleet.services.background_jobs.redis_events import RedisEventFeed
from toolfleet.services.background_jobs.redis_state_manager import RedisStateManager
from toolfleet.services.background_jobs.retry_policy import RetryPolicy
from toolfleet.services.background_jobs.submission import Limits, Submitter
from toolfleet.services.background_jobs.sync_runs import SyncRunner
from toolfleet.services.background_jobs.task_ending import end_tasks
from toolfleet.services.background_jobs.task_executor import JobExecutor
from toolfleet.services.background_jobs.task_lease import LeaseKeeper
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.background_jobs.task_worker import TaskWorker
from toolfleet.services.discovery.chain import build_registry
from toolfleet.services.discovery.registry import Registry
from toolfleet.settings import Settings

log = structlog.get_logger(__name__)


def package_version() -> str:
    """The installed version; ``0+unknown`` where the tree was never installed."""
    try:
        return version("toolfleet")
    except PackageNotFoundError:
        return "0+unknown"


class Tools(ToolRunner, ToolCatalogue, Protocol):
    """Runs tools and knows which there are."""


@dataclass(slots=True)
class QueueState:
    """Whether the streams were found as they must be."""

    ready: bool = False
    problem: str | None = "not checked yet"
    mismatch: StreamMismatch | None = None
    refused: QueueError | None = None
    """JetStream's refusal to make the streams, for instance for want of storage; it is asked again."""
    failed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set where a person has to decide: the streams are not what they must be."""


@dataclass(frozen=True, slots=True)
class Core:
    """What every process has."""

    settings: Settings
    registry: Registry
    client: redis.Redis
    store: RedisStateManager
    feed: RedisEventFeed
    connection: NatsConnection
    queue: NatsTaskQueue
    letters: NatsDeadLetters
    queue_state: QueueState


@dataclass(frozen=True, slots=True)
class Wired:
    """A process that submits and watches jobs."""

    core: Core
    service: JobService
    catalogue: ToolCatalogue


def redis_client(settings: Settings, url: str) -> redis.Redis:
    """A client with a small waiting pool: redis-py's default pool raises at the 101st connection, and its default
    retries turn a bound of 1 s into 15."""
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=settings.redis_max_connections,
        timeout=settings.redis_timeout,
        socket_timeout=settings.redis_timeout,
        socket_connect_timeout=settings.redis_timeout,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
        protocol=2,
        client_name=f"toolfleet-{os.getpid()}",
    )
    # With `connection_pool=` the client would not close the pool.
    return redis.Redis.from_pool(pool)


@contextlib.asynccontextmanager
async def open_core(settings: Settings, *, name: str, prepare: bool = True) -> AsyncIterator[Core]:
    """Connect to queue and store, wherever the registry says they are.

    It does not fail because NATS or Redis is down: they are reached when they come up.

    Args:
        settings: where things are and how they behave.
        name: shown in NATS' list of connections.
        prepare: make the streams where they are missing, and check them; without it nothing is changed.

    Raises:
        DiscoveryError: it is not known where they are.
        StreamMismatch: the streams are there and are not what they must be.
        QueueError: JetStream refused to make them.
    """
    async with contextlib.AsyncExitStack() as stack:
        registry = build_registry(settings)
        stack.push_async_callback(registry.close)
        client = redis_client(settings, await registry.redis_url())
        stack.push_async_callback(client.aclose)
        store = RedisStateManager(
            client,
            timeout_s=settings.redis_timeout,
            log_max=settings.event_log_max,
            result_ttl_s=settings.result_ttl_hours * 3600,
            max_starts=settings.max_starts,
        )
        stack.push_async_callback(store.close)
        feed = RedisEventFeed(client, settings.redis_timeout, store.gate)
        stack.push_async_callback(feed.close)
        connection = NatsConnection(await registry.nats_urls(), name=name)
        stack.push_async_callback(connection.close)
        queue = await _queue(settings, registry, connection)
        letters = NatsDeadLetters(connection, queue.names, timeout_s=settings.publish_timeout)
        core = Core(settings, registry, client, store, feed, connection, queue, letters, QueueState())
        connected = await connection.start()
        if prepare:
            if connected:
                await prepare_queue(core)
                if failure := core.queue_state.mismatch or core.queue_state.refused:
                    raise failure
            # A server that comes up later, or comes back, may be another one: it is checked again.
            connection.on_reconnect(lambda: prepare_queue(core))
        yield core


async def _queue(settings: Settings, registry: Registry, connection: NatsConnection) -> NatsTaskQueue:
    meta = await registry.queue_meta()
    names = StreamNames(
        tasks=meta.get("stream", settings.stream),
        prefix=meta.get("subject_prefix", settings.subject_prefix),
        dlq=settings.dlq_stream,
        dlq_prefix=settings.dlq_subject_prefix,
    )
    return NatsTaskQueue(
        connection,
        names,
        timeout_s=settings.publish_timeout,
        ack_wait_s=settings.ack_wait,
        max_bytes=settings.stream_max_bytes,
        dlq_max_bytes=settings.dlq_max_bytes,
        dlq_max_age_days=settings.dlq_max_age_days,
    )


async def prepare_queue(core: Core) -> None:
    """Make the streams where they are missing, check them where they are not, and tell one that was swapped."""
    state = core.queue_state
    try:
        created, messages = await core.queue.ensure()
        stream = core.queue.names.tasks
        with contextlib.suppress(StoreError):
            known = await core.store.stream_identity(stream, created)
            if known != created and messages == 0:
                raise StreamMismatch(
                    f"stream {stream} was made at {created} and is empty, the jobs in Redis belong to one made at "
                    f"{known}. If the old stream is gone for good, run `toolfleet doctor --accept-stream`: the "
                    "reconciler then queues their jobs again from the records",
                    what=stream,
                )
            if known != created:
                await core.store.adopt_stream(stream, created)
    except StreamMismatch as error:
        state.ready, state.problem, state.mismatch = False, str(error), error
        log.error("queue.mismatch", error=str(error))
        state.failed.set()
    except QueueError as error:
        if state.problem != str(error):
            log.warning("queue.not_ready", error=str(error))
        state.ready, state.problem = False, str(error)
        state.refused = None if isinstance(error, QueueUnavailable) else error
    else:
        state.ready, state.problem, state.mismatch, state.refused = True, None, None, None


async def durability(core: Core) -> list[Durability]:
    """What store and queue say of their writes; raises `StoreUnavailable` where Redis does not answer."""
    try:
        info = await core.store.server_info()
    except StoreUnavailable:
        raise
    except StoreError:
        # A managed Redis may refuse CONFIG GET.
        info = {}
    url = core.settings.nats_monitoring_url
    varz = await nats_varz(url, core.settings.publish_timeout) if url else None
    return [store_durability(info), queue_durability(varz)]


@contextlib.asynccontextmanager
async def _durability_told(core: Core) -> AsyncIterator[None]:
    """A worker or API warns of weaker settings, as soon as the servers can be asked; its start does not wait."""
    told = asyncio.create_task(tell_durability(lambda: durability(core)), name="durability")
    try:
        yield
    finally:
        await end_tasks([told])


@contextlib.asynccontextmanager
async def open_tools(core: Core) -> AsyncIterator[tuple[ToolRunner, ToolCatalogue]]:
    """The MCP tools of the fleet. Imported here: a process that brings its own tools does not pay for the SDK."""
    from toolfleet.services.tool_execution.mcp_runner import mcp_tools

    async with mcp_tools(core.registry, core.store, core.settings) as tools:
        yield tools.runner, tools.catalogue


def attempt_rules(settings: Settings) -> AttemptRules:
    """The rules of every attempt, from settings."""
    return AttemptRules(
        lease_ms=int(settings.lease * 1000),
        call_timeout_s=settings.call_timeout,
        calls_at_once=settings.calls_at_once,
        progress_interval_s=settings.progress_interval,
        retries=RetryPolicy(settings.retry_delays, settings.retry_jitter),
        max_result_bytes=settings.max_job_result_bytes,
    )


def limits(settings: Settings) -> Limits:
    """What a job may be, from settings."""
    return Limits(settings.max_calls_per_job, settings.max_body_bytes, settings.max_retries, settings.job_timeout)


@contextlib.asynccontextmanager
async def _open_spool(core: Core) -> AsyncIterator[FinishSpool]:
    """What attempts could not write, here and in processes that are gone; the latter is looked at before all else."""
    spool = FinishSpool(core.settings.state_dir / "spool", core.store, core.store.gate)
    await spool.look_first()
    looking = asyncio.create_task(spool.run(), name="spool")
    try:
        yield spool
    finally:
        await end_tasks([looking])
        await spool.close()


def _executor(core: Core, runner: ToolRunner, spool: FinishSpool, name: str) -> tuple[JobExecutor, LeaseKeeper]:
    settings, gate = core.settings, core.store.gate
    keeper = LeaseKeeper(core.store, gate, lease_s=settings.lease, ack_wait_s=settings.ack_wait, clock=time.monotonic)
    executor = JobExecutor(
        store=core.store,
        queue=core.queue,
        letters=core.letters,
        runner=runner,
        keeper=keeper,
        gate=gate,
        spool=spool,
        rules=attempt_rules(settings),
        worker_id=name,
    )
    return executor, keeper


@contextlib.asynccontextmanager
async def open_service(
    settings: Settings, *, name: str = "client", tools: Tools | None = None, runs_jobs: bool = False
) -> AsyncIterator[Wired]:
    """A `JobService` on real parts.

    Args:
        settings: where things are and how they behave.
        name: shown in NATS' list of connections and as the worker of synchronous runs.
        tools: the caller's own tools instead of the fleet's.
        runs_jobs: whether synchronous runs may happen in this process.

    Raises:
        DiscoveryError, StreamMismatch: as `open_core`.
    """
    from toolfleet.services.tool_execution.schema_check import check_arguments  # late: a worker checks no arguments

    async with contextlib.AsyncExitStack() as stack:
        core = await stack.enter_async_context(open_core(settings, name=name))
        if tools is None:
            runner, catalogue = await stack.enter_async_context(open_tools(core))
        else:
            runner, catalogue = tools, tools
        sync_runs = None
        if runs_jobs:
            await stack.enter_async_context(_durability_told(core))
            spool = await stack.enter_async_context(_open_spool(core))
            executor, keeper = _executor(core, runner, spool, f"{name}-{socket.gethostname()}-{os.getpid()}")
            sync_runs = SyncRunner(executor, runner, attempt_rules(settings), at_once=settings.api_concurrency)
            loops = [asyncio.create_task(keeper.run()), asyncio.create_task(keeper.watch_deadlines())]
            await core.feed.on_cancel(executor.worker_id, keeper.cancel)
            stack.push_async_callback(end_tasks, loops)
        admission = Admission(core.queue, settings.tier_max_jobs)
        stack.push_async_callback(admission.close)
        submitter = Submitter(
            store=core.store,
            queue=core.queue,
            catalogue=catalogue,
            check_arguments=check_arguments,
            sync_runs=sync_runs,
            limits=limits(settings),
            admission=admission,
        )
        service = JobService(
            store=core.store,
            queue=core.queue,
            feed=core.feed,
            catalogue=catalogue,
            submitter=submitter,
            letters=DeadLetters(core.store, core.queue, core.letters, keep_s=settings.dlq_max_age_days * 86400),
        )
        yield Wired(core, service, catalogue)


def default_worker_name(tier: Tier) -> str:
    """``<tier>-<host>-<pid>``: unique in a fleet, and an operator finds the process."""
    return f"{tier.value}-{socket.gethostname()}-{os.getpid()}"


@contextlib.asynccontextmanager
async def open_worker(
    settings: Settings, tier: Tier, *, tools: ToolRunner | None = None, status_file: Path | None = None
) -> AsyncIterator[TaskWorker]:
    """A worker of one tier; `run` it. Raises as `open_core`, `StreamMismatch` also where it is found out later."""
    async with contextlib.AsyncExitStack() as stack:
        name = settings.worker_name or default_worker_name(tier)
        core = await stack.enter_async_context(open_core(settings, name=name))
        await stack.enter_async_context(_durability_told(core))
        runner = tools if tools is not None else (await stack.enter_async_context(open_tools(core)))[0]
        spool = await stack.enter_async_context(_open_spool(core))
        executor, keeper = _executor(core, runner, spool, name)

        def make_feed(credits: Callable[[], int], deliver: Callable[[Delivery], None]) -> PullFeed:
            return PullFeed(
                core.connection,
                core.queue.names.tasks,
                core.queue.names.consumer(tier),
                credits=credits,
                deliver=deliver,
                on_consumer_gone=lambda: prepare_queue(core),
            )

        worker = TaskWorker(
            worker_id=name,
            tier=tier,
            slots=settings.concurrency,
            store=core.store,
            queue=core.queue,
            executor=executor,
            keeper=keeper,
            gate=core.store.gate,
            make_feed=make_feed,
            listen_for_cancels=core.feed.on_cancel,
            recovery_interval_s=settings.recovery_check_interval,
            stuck_s=settings.stuck_run_timeout * 60,
            drain_timeout_s=settings.drain_timeout,
            version=package_version(),
            status_file=status_file,
            queue_ready=lambda: core.queue_state.ready,
            # Not in an API: it has `/health/live`, which a supervisor asks from outside, a worker has no port; and its
            # end would break every stream that it serves.
            watchdog=LoopWatchdog(settings.blocked_loop_limit) if settings.blocked_loop_limit else None,
        )
        watch = asyncio.create_task(_stop_on_mismatch(core.queue_state, worker), name="queue-watch")
        try:
            yield worker
        finally:
            await end_tasks([watch])
        if core.queue_state.mismatch is not None:
            raise core.queue_state.mismatch


async def _stop_on_mismatch(state: QueueState, worker: TaskWorker) -> None:
    await state.failed.wait()
    worker.stop()
