"""What jobs come through while Redis is gone, stands still, refuses, or can't be reached."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults.scene import CUTS, Scene, long_time, open_scene
from tests.support.waiting import wait_until
from toolfleet.bootstrap import redis_client
from toolfleet.services.background_jobs import redis_events
from toolfleet.services.background_jobs.pull_feed import PullFeed
from toolfleet.services.background_jobs.task_models import Status
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings


@pytest.mark.promise("G1")
async def test_redis_is_killed_and_restarted(scene: Scene) -> None:
    async with scene.worker():
        await scene.submit("running", "hold")
        await scene.submit("once", "once_hold")
        await scene.begun("running", "once")
        await scene.valkey.kill()
        await scene.submit("once_meanwhile", "once_echo")
        scene.bench.gate.set()
        await scene.valkey.start()
        await scene.works_again()
        records = await scene.all_over()
        assert {record.status for record in records.values()} == {Status.COMPLETED}


@pytest.mark.promise("G1")
@pytest.mark.promise("G2")
@pytest.mark.promise("G5")
@pytest.mark.parametrize("how", ["down", "stopped"])
async def test_redis_is_away_for_long(scene: Scene, how: str) -> None:
    """For longer than three leases, where issue 3 names 60 and 20 s: what runs is stopped at the end of its lease."""
    async with scene.worker():
        await scene.submit("running", "hold")
        await scene.submit("once", "once_hold")
        await scene.begun("running", "once")
        if how == "down":
            await scene.valkey.kill()
        else:
            await scene.valkey.pause()
        await scene.submit("once_meanwhile", "once_echo")
        await wait_until(lambda: sorted(scene.bench.stopped) == ["once", "running"], "both are stopped")
        await long_time()
        assert sorted(scene.bench.started) == ["once:1", "running:1"], "nothing may begin without a claim"
        scene.bench.gate.set()
        if how == "down":
            await scene.valkey.start()
        else:
            await scene.valkey.resume()
        await scene.works_again()
        records = await scene.all_over()
        assert (records["running"].status, records["running"].starts) == (Status.COMPLETED, 2)
        # It was stopped in the middle: whether it had its effect is for a person to find out.
        assert (records["once"].status, records["once"].undecided) == (Status.UNKNOWN, ("once",))
        assert (records["once_meanwhile"].status, records["once_meanwhile"].starts) == (Status.COMPLETED, 1)


@pytest.mark.promise("G1")
async def test_the_scripts_of_redis_are_gone_in_the_middle_of_a_job(scene: Scene) -> None:
    async with scene.worker():
        await scene.submit("once", "once_hold")
        for number in range(5):
            await scene.submit(f"running{number}", "hold")
        await scene.begun("once", *(f"running{number}" for number in range(5)))
        await scene.core.client.function_flush("SYNC")
        scene.bench.gate.set()
        for number in range(20):
            await scene.submit(f"echo{number}", "echo")
            await scene.core.client.function_flush("SYNC")
        await scene.works_again()
        records = await scene.all_over()
        assert {(r.status, r.starts) for r in records.values()} == {(Status.COMPLETED, 1)}


@pytest.mark.promise("G1")
async def test_redis_is_out_of_memory(scene: Scene) -> None:
    """It refuses writes under `noeviction` and answers reads: jobs are accepted, and end when memory is back."""
    async with scene.worker() as worker:
        await scene.submit("ends", "hold")
        await scene.begun("ends")
        assert (await scene.core.client.config_get("maxmemory-policy"))["maxmemory-policy"] == "noeviction"
        await scene.core.client.config_set("maxmemory", "1")
        await scene.submit("once_meanwhile", "once_echo")
        scene.bench.gate.set()
        await wait_until(lambda: not worker._gate.is_open, "the worker has been refused")
        await long_time()
        assert not (await scene.record("ends")).status.terminal
        await scene.core.client.config_set("maxmemory", "0")
        await scene.works_again()
        records = await scene.all_over()
        # Its tool had ended, so what waits is a write, and the fence holds although the lease is long over.
        assert (records["ends"].status, scene.bench.started.count("ends:1")) == (Status.COMPLETED, 1)
        assert (records["once_meanwhile"].status, records["once_meanwhile"].starts) == (Status.COMPLETED, 1)


@pytest.mark.promise("G1")
@pytest.mark.promise("G2")
@pytest.mark.promise("G5")
@pytest.mark.parametrize("cut", CUTS)
async def test_a_worker_is_cut_off_from_redis(scene: Scene, cut: str) -> None:
    """For longer than three leases, where issue 3 names 20 s."""
    async with scene.worker():
        await scene.submit("running", "hold")
        await scene.submit("once", "once_hold")
        await scene.begun("running", "once")
        scene.redis_proxy.cut(**CUTS[cut])
        await scene.submit("once_waiting", "once_echo")
        await wait_until(lambda: sorted(scene.bench.stopped) == ["once", "running"], "both are stopped")
        await long_time(2)
        assert sorted(scene.bench.started) == ["once:1", "running:1"], "nothing may begin whose claim is not answered"
        scene.bench.gate.set()
        scene.redis_proxy.heal()
        await scene.works_again()
        records = await scene.all_over()
        assert records["running"].status is Status.COMPLETED
        assert records["once"].status is Status.UNKNOWN
        assert records["once_waiting"].status is Status.COMPLETED


@pytest.mark.promise("G1")
async def test_what_a_worker_without_redis_holds_goes_to_another(scene: Scene) -> None:
    """What it runs, since its lease ends, and what it was handed and can't claim; and it asks for nothing more."""
    async with scene.worker() as cut_off:
        await scene.submit("running", "hold")
        await scene.begun("running")
        async with scene.worker(proxied=False, name="w2"):
            scene.redis_proxy.cut()
            for number in range(6):
                await scene.submit(f"once{number}", "once_echo")
            await wait_until(lambda: scene.bench.stopped == ["running"], "the first worker has stopped it")
            scene.bench.gate.set()
            feed = cut_off._feed
            assert isinstance(feed, PullFeed)
            await wait_until(lambda: feed._outstanding == 0, "its pull is withdrawn")
            await scene.works_again()
            records = await scene.all_over()
            assert {record.status for record in records.values()} == {Status.COMPLETED}
            assert records["running"].starts == 2
        scene.redis_proxy.heal()


async def test_connections_to_redis_that_a_firewall_has_forgotten_are_made_anew(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's and the service's, and the one that events and cancels arrive on, with a shorter silence."""
    monkeypatch.setattr(redis_events, "PING_S", 0.3)
    async with open_scene(own_settings, own_nats, own_valkey, proxied=True) as scene, scene.worker():
        await scene.submit("running", "hold")
        await scene.submit("once", "once_hold")
        await scene.begun("running", "once")
        old = scene.core.feed._pubsub
        assert scene.redis_proxy.strand() >= 4
        scene.bench.gate.set()
        await scene.becomes("running", Status.COMPLETED)
        await scene.becomes("once", Status.COMPLETED)
        await wait_until(lambda: scene.core.feed.connected and scene.core.feed._pubsub is not old, "it listens again")
        scene.bench.gate.clear()
        await scene.submit("cancelled", "hold")
        await scene.begun("cancelled")
        receipt = await scene.service.cancel(scene.jobs["cancelled"])
        await scene.works_again()
        records = await scene.all_over()
        assert records["cancelled"].status is Status.CANCELLED, receipt
        assert {records[name].starts for name in ("running", "once", "cancelled")} == {1}


async def test_a_forgotten_subscription_is_noticed_where_nothing_else_is_asked(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_events, "PING_S", 0.3)
    async with open_scene(own_settings, own_nats, own_valkey, proxied=True) as scene:
        heard: list[str | None] = []
        await scene.core.feed.listen("news", heard.append)
        await wait_until(lambda: scene.core.feed.connected, "it listens")
        heard.clear()
        assert scene.redis_proxy.strand() >= 1
        await wait_until(lambda: None in heard, "the listener is told that it may have missed something")
        await wait_until(lambda: scene.core.feed.connected, "it listens again")
        async with redis_client(scene.settings, own_valkey.url) as publisher:

            async def arrives() -> bool:
                await publisher.publish("news", "fresh")
                return "fresh" in heard

            await wait_until(arrives, "news arrive")


@pytest.mark.promise("G1")
async def test_the_connections_to_redis_are_reset_every_so_often(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey
) -> None:
    """In the middle of each five jobs, where issue 3 names every 2 s. Leases are long: nobody is away for one."""
    settings = own_settings.model_copy(update={"lease": 10.0})
    async with open_scene(settings, own_nats, own_valkey, proxied=True) as scene, scene.worker():
        await scene.submit("once_running", "once_hold")
        await scene.begun("once_running")
        for number in range(8):
            names = [f"once{number}-{each}" for each in range(5)]
            for name in names[:3]:
                await scene.submit(name, "once_echo")
            assert scene.redis_proxy.reset_all() >= 2
            await asyncio.gather(*(scene.submit(name, "once_echo") for name in names[3:]))
            await asyncio.gather(*(scene.over(name) for name in names))
        scene.bench.gate.set()
        await scene.works_again()
        records = await scene.all_over()
        assert len(records) == 42
        assert {record.status for record in records.values()} == {Status.COMPLETED}


@pytest.mark.promise("G1")
async def test_the_network_to_redis_is_slow_and_lossy(
    own_settings: Settings, own_nats: EmbeddedNats, own_valkey: EmbeddedValkey
) -> None:
    settings = own_settings.model_copy(update={"redis_timeout": 1.0, "lease": 10.0})
    async with open_scene(settings, own_nats, own_valkey, proxied=True) as scene, scene.worker():
        scene.redis_proxy.slow(0.02, 0.05)
        scene.redis_proxy.lossy(stall_chance=0.1, stall_s=0.4, reset_chance=0.02)
        await asyncio.gather(*(scene.submit(f"once{number}", "once_echo") for number in range(12)))
        await asyncio.gather(*(scene.submit(f"echo{number}", "echo") for number in range(12)))
        for name in list(scene.jobs):
            await scene.over(name)
        scene.redis_proxy.normal()
        await scene.works_again()
        records = await scene.all_over()
        assert {record.status for record in records.values()} == {Status.COMPLETED}
