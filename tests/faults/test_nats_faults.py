"""What jobs come through while NATS is gone, stands still, or can't be reached."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults.scene import CUTS, Scene, long_time, open_scene
from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.errors import QueueUnavailable
from toolfleet.services.background_jobs.task_models import Status
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

NOTICED_S = 20.0
"""Bounds the wait until a silent connection is given up: pings every 2 s, of which two may stay unanswered."""


@pytest.mark.promise("G1")
@pytest.mark.parametrize("moment", ["before the call", "in the call"])
async def test_nats_is_killed_right_after_a_delivery(scene: Scene, moment: str) -> None:
    async with scene.worker():
        if moment == "before the call":
            scene.bench.lookup.clear()
        await scene.submit("once", "once_hold")
        if moment == "before the call":
            await wait_until(lambda: scene.bench.looking, "the worker has the job")
        else:
            await scene.begun("once")
        await scene.nats.kill()
        scene.bench.lookup.set()
        scene.bench.gate.set()
        await scene.becomes("once", Status.COMPLETED)
        await scene.nats.start()
        await scene.works_again()
        assert (await scene.all_over())["once"].starts == 1


@pytest.mark.promise("G1")
@pytest.mark.promise("G12")
@pytest.mark.parametrize("how", ["down", "stopped"])
async def test_nats_is_away_for_long(scene: Scene, how: str) -> None:
    """For three times the ack_wait, or until the silence was noticed, where issue 3 names 30 and 20 s."""
    async with scene.worker():
        await scene.submit("running", "hold")
        await scene.submit("once", "once_hold")
        await scene.submit("later", "echo", delay_seconds=0.5)
        await scene.begun("running", "once")
        if how == "down":
            await scene.nats.kill()
        else:
            await scene.nats.pause()
        with pytest.raises(QueueUnavailable):
            await scene.submit("refused", "once_echo")
        await long_time()
        scene.bench.gate.set()
        await scene.becomes("running", Status.COMPLETED)
        await scene.becomes("once", Status.COMPLETED)
        await wait_until(lambda: not scene.core.queue.connected, "the silence is noticed", NOTICED_S)
        if how == "down":
            await scene.nats.start()
        else:
            await scene.nats.resume()
        await scene.works_again()
        # A client that asks again with its key has one job, whether the first publish came to be stored or not.
        await scene.insist("refused", "once_echo")
        records = await scene.all_over()
        assert {name: record.status for name, record in records.items()} == dict.fromkeys(records, Status.COMPLETED)
        assert (records["running"].starts, records["once"].starts) == (1, 1)


@pytest.mark.promise("G1")
@pytest.mark.parametrize("cut", CUTS)
async def test_a_worker_is_cut_off_from_nats(scene: Scene, cut: str) -> None:
    """Until it has noticed and longer than an ack_wait, where issue 3 names 20 s."""
    async with scene.worker() as worker:
        await scene.submit("running", "hold")
        await scene.submit("once", "once_hold")
        await scene.begun("running", "once")
        scene.nats_proxy.cut(**CUTS[cut])
        # Where the server still hears the worker, it delivers this to somebody who does not.
        await scene.submit("once_waiting", "once_echo")
        scene.bench.gate.set()
        await scene.becomes("running", Status.COMPLETED)
        await scene.becomes("once", Status.COMPLETED)
        await wait_until(lambda: not worker._queue.connected, "the worker has noticed", NOTICED_S)
        scene.nats_proxy.heal()
        await scene.works_again()
        records = await scene.all_over()
        assert {name: (r.status, r.starts) for name, r in records.items()} == dict.fromkeys(
            records, (Status.COMPLETED, 1)
        )


@pytest.mark.promise("G1")
async def test_what_a_worker_without_nats_has_finished_is_acked_by_another(scene: Scene) -> None:
    async with scene.worker():
        await scene.submit("once", "once_hold")
        await scene.begun("once")
        async with scene.worker(proxied=False, name="w2") as other:
            scene.nats_proxy.cut()
            # Longer than ack_wait: the other one is handed a job that somebody holds.
            await long_time(2)
            scene.bench.gate.set()
            await scene.becomes("once", Status.COMPLETED)
            await scene.works_again()
            records = await scene.all_over()
            assert records["once"].starts == 1
            assert other._executor.ended == {"completed": 1}
        scene.nats_proxy.heal()


async def test_a_worker_whose_connection_was_forgotten_by_a_firewall_makes_a_new_one(scene: Scene) -> None:
    async with scene.worker():
        await scene.submit("once", "once_hold")
        await scene.begun("once")
        assert scene.nats_proxy.strand() == 1
        scene.bench.gate.set()
        await scene.works_again()
        assert (await scene.all_over())["once"].starts == 1


async def test_a_forgotten_connection_with_much_to_send_is_replaced_too(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey
) -> None:
    """What can't be sent must not be waited for: the kernel tries for 15 minutes."""
    async with open_scene(own_settings, own_nats, own_valkey, proxied=True) as scene:
        assert scene.nats_proxy.strand() == 1
        large = {"text": "x" * 800_000}
        submits = [scene.submit(f"large{number}", "echo", large) for number in range(24)]
        assert all(isinstance(e, QueueUnavailable) for e in await asyncio.gather(*submits, return_exceptions=True))
        async with scene.worker(proxied=False):
            await scene.works_again()
            await scene.all_over()


@pytest.mark.promise("G1")
async def test_the_connections_to_nats_are_reset_every_so_often(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey
) -> None:
    """Whenever both have come up again, where issue 3 names every 2 s."""
    async with open_scene(own_settings, own_nats, own_valkey, proxied=True) as scene, scene.worker():
        for number in range(6):
            await scene.insist(f"once{number}", "once_echo")
            await scene.insist(f"held{number}", "hold", delay_seconds=0.1)
            await wait_until(lambda: scene.nats_proxy.connections >= 2, "both are connected")
            scene.nats_proxy.reset_all()
        scene.bench.gate.set()
        await scene.works_again()
        records = await scene.all_over()
        assert {record.status for record in records.values()} == {Status.COMPLETED}
        assert len(records) == 13


@pytest.mark.promise("G1")
async def test_the_network_to_nats_is_slow_and_lossy(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey
) -> None:
    async with open_scene(own_settings, own_nats, own_valkey, proxied=True) as scene:
        scene.nats_proxy.slow(0.02, 0.05)
        scene.nats_proxy.lossy(stall_chance=0.1, stall_s=0.6, reset_chance=0.01)
        async with scene.worker():
            await asyncio.gather(*(scene.insist(f"once{number}", "once_echo") for number in range(20)))
            await asyncio.gather(*(scene.insist(f"echo{number}", "echo") for number in range(20)))
            for name in list(scene.jobs):
                await scene.becomes(name, Status.COMPLETED)
            scene.nats_proxy.normal()
            await scene.works_again()
            await scene.all_over()
