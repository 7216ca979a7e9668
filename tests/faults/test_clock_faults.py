"""Clocks that jump by an hour: a worker's, the API's, Redis'.

Where a lease ends early it lasts a minute, so that nothing but the clock has ended it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.harness import JOBS
from tests.background_jobs import worker_main
from tests.conftest import SettingsFactory
from tests.faults.clock_scene import BOUND_S, Scene
from tests.faults.clocks import HOUR_S, Clock, MovedValkey, find_library
from tests.faults.test_api_faults import ApiProcess
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_service
from toolfleet.services.background_jobs.errors import StoreUnavailable
from toolfleet.services.background_jobs.task_models import JobRecord, Status
from toolfleet.services.embedded.nats_server import EmbeddedNats

JUMPS = (HOUR_S, -HOUR_S)

NEW: tuple[tuple[str, dict[str, Any]], ...] = (("note", {}), ("once_note", {}), ("note", {"delay_seconds": 0.3}))
"""Jobs that are accepted while Redis is down."""


@pytest.fixture
def library() -> str:
    """Skips where libfaketime is missing, except in CI, which installs it and must not skip what it came to test."""
    found = find_library()
    if found is None:
        message = "libfaketime is not installed. On Debian, as root: make faketime"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    return found


@pytest.fixture
async def moved_valkey(library: str, tmp_path: Path) -> AsyncIterator[tuple[MovedValkey, Clock]]:
    folder = tmp_path / "redis"
    folder.mkdir()
    clock = Clock(folder, library)
    async with MovedValkey(folder, clock) as server:
        yield server, clock


@pytest.fixture
async def scene(
    make_settings: SettingsFactory,
    own_nats: EmbeddedNats,
    moved_valkey: tuple[MovedValkey, Clock],
    library: str,
    tmp_path: Path,
) -> AsyncIterator[Scene]:
    server, redis_clock = moved_valkey
    settings = make_settings(
        nats_url=own_nats.url,
        redis_url=server.url,
        lease=3.0,
        ack_wait=3.0,
        # A look of the reconciler between a jump and the next renewals may end any run early, which is allowed.
        recovery_check_interval=3600.0,
        retry_delays=(0.05,),
        retry_jitter=0.0,
        drain_timeout=4.0,
    )
    unused = worker_main.tools(worker_main.Ledger(tmp_path / "unused"))
    async with open_service(settings, tools=unused) as wired:
        scene = Scene(settings, redis_clock, Clock(tmp_path, library), wired.service, wired.core, tmp_path)
        try:
            yield scene
        finally:
            scene.gate.touch()
            for process in scene.workers:
                await process.kill()


async def test_the_clock_of_a_worker_jumps(scene: Scene) -> None:
    worker = await scene.start_worker(clock=scene.clock)
    # Another one is there and would take what it can.
    await scene.start_worker()
    await scene.begin_held()
    for jump in JUMPS:
        scene.clock.jump(jump)
        await scene.lease_moves()
        for job_id in [await scene.submit("note"), await scene.submit("note", delay_seconds=0.3)]:
            assert (await scene.over(job_id)).starts == 1
        shown = {each.worker_id: each.seen_at for each in await scene.service.workers()}
        assert set(shown) == {"w1", "w2"}
        assert abs(shown["w1"] - shown["w2"]) < HOUR_S * 500, "heartbeats are told by the clock of Redis"
    await scene.end_held()
    await worker.stop(grace=10)
    assert worker.exit_code == 0


async def test_the_clock_of_the_api_jumps(scene: Scene) -> None:
    api = ApiProcess(scene.settings, scene.folder / "api.log", variables=scene.clock.environment)
    try:
        await asyncio.gather(api.start(), scene.start_worker())
        held = await scene.begin_held()
        async with httpx.AsyncClient(base_url=api.url, timeout=BOUND_S) as client:
            for jump in JUMPS:
                scene.clock.jump(jump)
                # The API has no tools of its own: what others submit is watched, listed and cancelled there.
                job_id = await scene.submit("note", delay_seconds=0.3)
                waited = (await client.get(f"{JOBS}/{job_id}", params={"wait": 20})).json()
                assert waited["job_id"] == job_id
                stream = (await client.get(f"{JOBS}/{job_id}/stream")).text
                assert stream.count("event: job.completed") == 1
                newest = (await client.get(JOBS)).json()["jobs"][0]
                assert (newest["job_id"], newest["status"]) == (job_id, "completed")
                stats = (await client.get(f"{JOBS}/stats")).json()
                assert stats["tiers"]["normal"]["running"] == 1
            answer = await client.post(f"{JOBS}/{held}/cancel")
            assert answer.status_code in (httpx.codes.OK, httpx.codes.ACCEPTED)
        assert (await scene.over(held)).starts == 1
    finally:
        await api.kill()


@pytest.mark.promise("G2")
async def test_the_clock_of_redis_jumps_below_workers_that_live(scene: Scene) -> None:
    await asyncio.gather(scene.start_worker(), scene.start_worker())
    await scene.begin_held()
    for jump in JUMPS:
        await scene.move_redis(jump)
        await scene.lease_moves()
        assert (await scene.over(await scene.submit("note", "once_note"))).starts == 1
    await scene.end_held()


@pytest.mark.promise("G2")
@pytest.mark.promise("G5")
async def test_leases_end_early_and_what_must_not_run_twice_becomes_unknown(scene: Scene) -> None:
    scene.settings = scene.settings.model_copy(update={"lease": 60.0})
    sleeper = await scene.start_worker()
    again, once = await scene.submit("hold"), await scene.submit("once_hold")
    await wait_until(lambda: scene.ledger().count("begin c1 1") == 2, "both have begun")
    await sleeper.pause()
    await scene.move_redis(HOUR_S)
    other = await scene.start_worker()
    record = await scene.over(once)
    assert (record.status, record.undecided, record.starts) == (Status.UNKNOWN, ("c1",), 1)
    await scene.noted("begin c1 2")
    scene.gate.touch()
    record = await scene.over(again)
    assert (record.status, record.fence) == (Status.COMPLETED, 2)
    await other.stop(grace=10)
    sleeper.resume()
    # It is well again, and by the end of another job it has tried whatever it wanted to write.
    assert (await scene.over(await scene.submit("note"))).status is Status.COMPLETED
    assert await scene.record(again) == record
    assert (await scene.service.results(record))["c1"].attempt == 2


@pytest.mark.promise("G1")
async def test_a_lease_that_ends_late_is_over_soon_after_the_clock_was_set_right(scene: Scene) -> None:
    dead = await scene.start_worker()
    held = await scene.submit("hold")
    await scene.noted("begin c1 1")
    await dead.kill()
    await scene.move_redis(-HOUR_S)
    await scene.start_worker()
    # New jobs do not wait for it, and the lease of the old one seems to last for another hour.
    for _ in range(3):
        assert (await scene.over(await scene.submit("note"))).status is Status.COMPLETED
    assert (await scene.record(held)).status is Status.RUNNING
    await scene.move_redis(0)
    scene.gate.touch()
    record = await scene.over(held)
    assert (record.status, record.starts) == (Status.COMPLETED, 2)
    await scene.queue_is_empty()


@pytest.mark.promise("G1")
async def test_a_job_that_redis_never_heard_of_is_run_although_its_clock_is_not_that_of_nats(
    scene: Scene, moved_valkey: tuple[MovedValkey, Clock]
) -> None:
    server, _ = moved_valkey
    await scene.start_worker()
    for jump in JUMPS:
        await server.stop()
        jobs = [await scene.submit(tool, **more) for tool, more in NEW]
        scene.redis_clock.jump(jump)
        await server.start()
        for job_id in jobs:

            async def ended(job_id: str = job_id) -> JobRecord | None:
                with contextlib.suppress(StoreUnavailable):
                    record = (await scene.service.get(job_id)).record
                    return record if record is not None and record.status.terminal else None
                return None

            record = await wait_until(ended, f"{job_id} has ended", timeout=BOUND_S)
            assert record is not None
            assert (record.status, record.starts) == (Status.COMPLETED, 1)
    await scene.queue_is_empty()
