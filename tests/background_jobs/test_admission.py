"""A full tier, and a stream that is nearly full, refuse a job before the stream overflows."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable

import pytest
from nats.aio.msg import Msg

from tests.background_jobs.harness import job, open_fleet, running_worker
from tests.background_jobs.making import make_task
from tests.conftest import SettingsFactory
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_core
from toolfleet.services.background_jobs.admission import FRESH_S, MAX_RETRY_S, STALE_S, Admission
from toolfleet.services.background_jobs.errors import QueueFull, QueueUnavailable
from toolfleet.services.background_jobs.nats_streams import StreamAdmin
from toolfleet.services.background_jobs.nats_task_queue import NatsTaskQueue
from toolfleet.services.background_jobs.queue_ports import QueueFill, TierFill
from toolfleet.services.background_jobs.task_models import Status, Tier
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.settings import Settings

Clocked = Callable[[], float]


class Counted(NatsTaskQueue):
    """The real queue's part that admission uses, with figures that a test sets."""

    def __init__(self) -> None:
        self.asked = 0
        self.down = False
        self.answer = asyncio.Event()
        self.answer.set()
        self.jobs, self.settled, self.bytes = 0, 0, 0

    async def fill(self) -> QueueFill:
        self.asked += 1
        await self.answer.wait()
        if self.down:
            raise QueueUnavailable
        tiers = {tier: TierFill(self.jobs, self.settled) for tier in Tier}
        return QueueFill(3 * self.jobs, self.bytes, 1_000_000, tiers)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_a_full_tier_refuses_and_the_others_do_not(make_settings: SettingsFactory, settings: Settings) -> None:
    small = settings.model_copy(update={"tier_max_jobs": 3})
    async with open_fleet(small, workers=0) as fleet:
        ids = [await fleet.submit("echo") for _ in range(2)]
        ids.append((await fleet.service.submit(job("echo"), idempotency_key="k")).job_id)
        with pytest.raises(QueueFull, match="tier normal is full: 3 jobs") as refused:
            await fleet.service.submit(job("echo"), idempotency_key="another")
        assert refused.value.details["tier"] == "normal"
        assert refused.value.details["limit"] == refused.value.details["waiting"] == 3
        assert refused.value.details["job_id"]
        assert (await fleet.core.queue.stats()).messages == 3
        again = await fleet.service.submit(job("echo"), idempotency_key="k")
        assert (again.job_id, again.created) == (ids[2], False), "a job that is there is answered, full or not"
        high = await fleet.submit("echo", priority="high")
        async with running_worker(small, fleet.bench), running_worker(small, fleet.bench, Tier.HIGH):
            for job_id in (*ids, high):
                assert (await fleet.over(job_id)).status is Status.COMPLETED

            async def accepted() -> bool:
                try:
                    await fleet.over(await fleet.submit("echo"))
                except QueueFull:
                    return False
                return True

            await wait_until(accepted, "the drained tier takes jobs again")


async def test_a_synchronous_job_needs_no_room(settings: Settings) -> None:
    small = settings.model_copy(update={"tier_max_jobs": 1})
    async with open_fleet(small, workers=0, runs_jobs=True) as fleet:
        waiting = await fleet.submit("echo")
        with pytest.raises(QueueFull):
            await fleet.submit("echo")
        assert (await fleet.service.submit(job("echo", mode="sync"))).ran
        await fleet.service.cancel(waiting)


async def test_bulk_work_leaves_room_for_what_is_urgent(
    make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, stream_max_bytes=1 << 20)
    hundred_kb = {"metadata": {"x": "y" * 100_000}}
    async with open_fleet(settings, workers=0) as fleet:
        accepted = {}
        for tier in (Tier.LOW, Tier.NORMAL, Tier.HIGH):
            accepted[tier] = 0
            with pytest.raises(QueueFull, match=f"full for tier {tier}") as refused:
                for _ in range(12):
                    await fleet.submit("echo", priority=tier, **hundred_kb)
                    accepted[tier] += 1
            assert refused.value.details["tier"] == tier
            assert refused.value.details["limit"] < 1 << 20
        assert accepted == {Tier.LOW: 8, Tier.NORMAL: 1, Tier.HIGH: 0}
        assert (await fleet.core.queue.stats()).bytes < 0.95 * (1 << 20)
        async with (
            running_worker(settings, fleet.bench, Tier.LOW),
            running_worker(settings, fleet.bench),
        ):
            await fleet.queue_is_empty()


async def test_concurrent_submits_share_one_question(clock: Clock) -> None:
    queue = Counted()
    admission = Admission(queue, 1000, clock)
    await asyncio.gather(*(admission.check(make_task()) for _ in range(50)))
    assert queue.asked == 1
    clock.now += FRESH_S
    queue.answer.clear()
    async with asyncio.timeout(5):
        await asyncio.gather(*(admission.check(make_task()) for _ in range(50)))
    await wait_until(lambda: queue.asked == 2, "new figures are asked for beside the submits")
    queue.answer.set()
    await admission.close()


async def test_what_this_process_accepts_counts_at_once(clock: Clock) -> None:
    queue = Counted()
    admission = Admission(queue, 10, clock)
    for _ in range(10):
        await admission.check(make_task())
    with pytest.raises(QueueFull):
        await admission.check(make_task())
    await admission.check(make_task(priority=Tier.LOW))
    queue.jobs = 9
    clock.now += STALE_S
    await admission.check(make_task())
    with pytest.raises(QueueFull):
        await admission.check(make_task())
    await admission.close()


async def test_silence_of_nats_is_not_its_business(clock: Clock) -> None:
    queue = Counted()
    queue.down = True
    admission = Admission(queue, 1, clock)
    for _ in range(5):
        await admission.check(make_task())
    assert queue.asked == 1, "it is not asked again for every submit"
    await admission.close()


async def test_retry_after_follows_the_rate_of_the_tier(clock: Clock) -> None:
    queue = Counted()
    queue.jobs = queue.settled = 1000
    admission = Admission(queue, 1000, clock)

    async def told() -> int | None:
        with pytest.raises(QueueFull) as refused:
            await admission.check(make_task())
        found: int | None = refused.value.details["retry_after"]
        return found

    assert await told() is None, "nothing is known of the rate"
    clock.now += STALE_S
    queue.settled += 50
    assert await told() == 5, "50 jobs are to go, and 10 go a second"
    clock.now += STALE_S
    queue.settled += 1_000_000
    assert await told() == 1
    clock.now += 10 * STALE_S
    queue.settled += 1
    clock.now += 10 * STALE_S
    assert await told() in (1, MAX_RETRY_S)
    await admission.close()


@pytest.mark.leaves_open_jobs
async def test_a_server_without_storage_is_unavailable_and_not_full(
    own_settings: Settings, own_nats: EmbeddedNats
) -> None:
    # The stream may hold 16 MiB, and no file of the server may grow beyond 1 MiB: as a full disk does, writes fail.
    async with open_fleet(own_settings, workers=0) as fleet:
        resource.prlimit(own_nats.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        with pytest.raises(QueueUnavailable):
            for _ in range(20):
                await fleet.submit("echo", metadata={"x": "y" * 400_000})


@pytest.mark.parametrize(
    ("code", "description", "answer"),
    [
        (10077, "maximum bytes exceeded", "refused"),
        (10077, "maximum messages per subject exceeded", "refused"),
        (10158, "a message with this id is being stored", "duplicate"),
        (10077, "write 1.blk: no space left on device", QueueUnavailable),
        (10023, "insufficient resources", QueueUnavailable),
        (10028, "resource limits exceeded for account", QueueUnavailable),
        (10047, "insufficient storage resources available", QueueUnavailable),
    ],
)
async def test_only_a_limit_of_the_stream_is_the_callers_business(
    settings: Settings, code: int, description: str, answer: str | type[QueueUnavailable]
) -> None:
    async with open_core(settings, name="test") as core:

        async def refuse(message: Msg) -> None:
            error = {"code": 503, "err_code": code, "description": description}
            await message.respond(json.dumps({"error": error}).encode())

        subject = core.connection.client.new_inbox()
        await core.connection.client.subscribe(subject, cb=refuse)
        admin = StreamAdmin(core.connection, 5)
        if isinstance(answer, str):
            assert await admin.publish(subject, b"task", None) == answer
        else:
            with pytest.raises(answer, match=description):
                await admin.publish(subject, b"task", None)
