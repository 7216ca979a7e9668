"""The disk of a server is full, or the stream has reached its limit: no promise is made that is not kept."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from pydantic import SecretStr

from tests.background_jobs.harness import open_fleet
from tests.faults.scene import BOUND_S, Scene, open_scene
from tests.support.disk import full_disk
from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.errors import QueueFull, QueueUnavailable, StoreUnavailable
from toolfleet.services.background_jobs.reconciler import Reconciler
from toolfleet.services.background_jobs.redis_records import root_of
from toolfleet.services.background_jobs.task_models import Status
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

ARGS = {"text": "x" * 40_000}
ROOM = 1 << 20
"""Bytes of one file: room for about 25 of these jobs."""
MORE_THAN_FIT = 60


async def submit_until_refused(scene: Scene, *refusals: type[Exception]) -> str:
    """Jobs until one is refused; its name."""
    for number in range(MORE_THAN_FIT):
        try:
            await scene.submit(f"job{number}", "echo", ARGS)
        except refusals:
            return f"job{number}"
    raise AssertionError(f"{MORE_THAN_FIT} jobs were accepted; not so many fit")


async def comes_back_under_its_key(scene: Scene, name: str) -> None:
    """A job whose record has expired is asked for again, while its old message stands that nobody will ever get."""
    core, job_id = scene.core, scene.jobs[name]
    task = await core.queue.find(job_id)
    assert task is not None
    assert await core.queue.acked(job_id)
    await core.client.delete(f"{root_of(job_id)}:job:{job_id}")
    await core.store.enqueue(task)
    await core.client.zadd(f"{root_of(job_id)}:due", {job_id: 0})
    assert await Reconciler(core.store, core.queue, interval_s=1, stuck_s=300).look() == 1
    await scene.becomes(name, Status.COMPLETED)
    assert not await core.queue.acked(job_id)


@pytest.mark.promise("G1")
@pytest.mark.promise("G12")
async def test_the_disk_of_nats_is_full(scene: Scene) -> None:
    scene.settings = scene.settings.model_copy(update={"concurrency": 1})
    async with scene.worker(proxied=False):
        # It keeps the only slot, so that the jobs stay in the stream.
        await scene.submit("once_held", "once_hold")
        await scene.begun("once_held")
        with full_disk(scene.nats.pid, ROOM):
            refused = await submit_until_refused(scene, QueueUnavailable)
            with pytest.raises(QueueUnavailable) as caught:
                await scene.submit("one_more", "echo", ARGS)
            assert "job_id" in caught.value.details
            # What was accepted is done, although nothing can be written any more.
            scene.bench.gate.set()
            for name in scene.jobs:
                await scene.becomes(name, Status.COMPLETED)
        # nats-server takes no message for this stream again before it is restarted, however much room there is
        # (https://github.com/nats-io/nats-server/issues/3997).
        await scene.nats.restart()
        await scene.insist(refused, "echo", ARGS)
        await scene.works_again()
        # It has the acks, but could not write that their messages are gone: these stand, and no consumer delivers them.
        await comes_back_under_its_key(scene, "job0")
        # A new consumer does.
        await scene.core.connection.client.jsm().delete_consumer(scene.settings.stream, "workers-normal")
        await scene.all_over()
    # What has come back had ended, and was not run again, but for the job that was asked for again.
    assert len(scene.bench.started) == len(scene.jobs) + 1


@pytest.mark.promise("G1")
@pytest.mark.parametrize("durable", [True, False])
async def test_the_disk_of_redis_is_full(
    own_settings: Settings, own_nats: EmbeddedNats, tmp_path: Path, durable: bool
) -> None:
    async with EmbeddedValkey(tmp_path / "redis", durable=durable) as valkey:
        settings = own_settings.model_copy(update={"redis_url": SecretStr(valkey.url)})
        async with open_fleet(settings) as fleet:
            held = await fleet.submit("once_hold")
            await fleet.began("c1:1")
            with full_disk(valkey.pid, ROOM):
                # The stream has the jobs, and that is the promise: Redis need not even have heard of them.
                jobs = [await fleet.submit(("echo", ARGS)) for _ in range(MORE_THAN_FIT)]
                await wait_until(
                    lambda: not fleet.workers[0]._gate.is_open, "the worker knows that Redis takes nothing"
                )
                fleet.bench.gate.set()
                if durable:
                    # Of a server that must not lose a write nothing is left then; whoever supervises it starts it.
                    await wait_until(lambda: not valkey.running, "Redis has ended itself")
            await valkey.start()
            for job_id in (held, *jobs):

                async def completed(job_id: str = job_id) -> bool:
                    with contextlib.suppress(StoreUnavailable):
                        record = await fleet.core.store.get(job_id)
                        return record is not None and record.status is Status.COMPLETED
                    return False

                await wait_until(completed, f"{job_id} is completed", timeout=BOUND_S)
            await fleet.queue_is_empty()
    assert fleet.bench.started.count("c1:1") <= 1 + len(jobs)


@pytest.mark.promise("G12")
async def test_the_stream_is_full(own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey) -> None:
    small = own_settings.model_copy(update={"stream_max_bytes": ROOM})
    async with open_scene(small, own_nats, own_valkey) as scene:
        refused = await submit_until_refused(scene, QueueFull)
        stood = (await scene.core.queue.stats()).messages
        assert stood == len(scene.jobs)
        with pytest.raises(QueueFull):
            await scene.submit("one_more", "echo", ARGS)
        async with scene.worker(proxied=False):

            async def accepted() -> str | None:
                try:
                    return await scene.submit(refused, "echo", ARGS)
                except QueueFull:
                    return None

            await wait_until(accepted, "there is room again", timeout=BOUND_S)
            await scene.works_again()
            await scene.all_over()
    assert len(scene.bench.started) == len(scene.jobs)
