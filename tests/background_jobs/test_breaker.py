"""A store that does not answer is asked by one probe, and everybody else is told at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.background_jobs.harness import job, open_fleet
from tests.background_jobs.making import make_task
from tests.support.waiting import wait_until
from toolfleet.bootstrap import Core, open_core
from toolfleet.services.background_jobs import event_reader, nats_connection, pull_feed, redis_events, store_gate
from toolfleet.services.background_jobs.errors import JobNotFound, StoreError, StoreSilent, StoreUnavailable
from toolfleet.services.background_jobs.event_reader import Pulse
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.task_models import JobEvent
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.services.tool_execution.catalogue_store import CatalogueStore
from toolfleet.settings import Settings

# -- the gate alone --------------------------------------------------------------------------------------------------


class Server:
    """What a probe meets: an error, or None where it is served."""

    def __init__(self) -> None:
        self.says: StoreError | None = StoreSilent("nobody there")
        self.asked = 0
        self.hangs = False

    async def ping(self) -> None:
        self.asked += 1
        if self.hangs:
            self.hangs = False
            await asyncio.Event().wait()
        if self.says is not None:
            raise self.says


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(store_gate, "PROBE_S", 0.01)
    monkeypatch.setattr(store_gate, "BOUNDS_S", (0.05,))
    return Server()


@pytest.fixture
async def gate(server: Server) -> AsyncIterator[StoreGate]:
    gate = StoreGate(server.ping)
    yield gate
    await gate.close()


async def test_who_calls_a_silent_store_is_told_since_when_and_why(gate: StoreGate) -> None:
    gate.check()
    gate.fell_silent(StoreSilent("connection refused."), gate.outages)
    with pytest.raises(StoreSilent, match=r"since 20\S+Z \(connection refused\)\. It is asked again every 0\.01 s"):
        gate.check()


async def test_silence_is_told_once_and_one_probe_asks_for_all(gate: StoreGate, server: Server) -> None:
    told: list[str] = []
    gate.listen(on_open=lambda: told.append("open"), on_silence=lambda: told.append("silent"))
    for _ in range(20):
        gate.fell_silent(StoreSilent(), gate.outages)
    await wait_until(lambda: server.asked >= 3, "the probe has asked a few times")
    assert (told, gate.outages, gate.unanswered, gate.is_open) == (["silent"], 1, 20, False)
    assert len([task for task in asyncio.all_tasks() if task.get_name() == "store-probe"]) == 1
    server.says = None
    async with asyncio.timeout(5):
        await gate.wait()
    assert (told, gate.is_silent) == (["silent", "open"], False)
    gate.check()


async def test_a_question_that_hangs_does_not_end_the_asking(gate: StoreGate, server: Server) -> None:
    server.hangs, server.says = True, None
    gate.fell_silent(StoreSilent(), gate.outages)
    async with asyncio.timeout(5):
        await gate.wait()
    assert server.asked == 2


async def test_what_began_before_an_outage_does_not_make_another(gate: StoreGate, server: Server) -> None:
    before = gate.outages
    server.says = None
    gate.fell_silent(StoreSilent(), before)
    async with asyncio.timeout(5):
        await gate.wait()
    gate.fell_silent(StoreSilent("late"), before)
    assert (gate.is_silent, gate.outages) == (False, 1)


async def test_a_server_that_answers_not_now_is_read_from_and_not_written_to(gate: StoreGate, server: Server) -> None:
    gate.fell_silent(StoreSilent(), gate.outages)
    server.says = StoreUnavailable("MISCONF")
    async with asyncio.timeout(5):
        await gate.wait_answers()
    gate.check()
    assert not gate.is_open
    server.says = None
    async with asyncio.timeout(5):
        await gate.wait()


def test_the_waits_after_an_outage_leave_time_for_a_job_within_a_second() -> None:
    """Each is the longest that something may lie idle after its server is back; store and queue come back side by
    side. A probe that was begun while the server was away is given up after the short bound."""
    queue = nats_connection.RECONNECT_WAIT_S + pull_feed.REFUSED_PAUSES_S[0]
    store = store_gate.PROBE_S + (store_gate.BOUNDS_S[0] or 0)
    assert max(queue, store, redis_events.RECONNECT_S) <= 0.75


# -- on a server that is stopped, not gone ---------------------------------------------------------------------------


@pytest.fixture
async def core(own_settings: Settings) -> AsyncIterator[Core]:
    async with open_core(own_settings, name="test") as core:
        await core.store.load()
        yield core


async def test_after_one_time_out_nothing_more_is_sent_to_a_stopped_server(
    core: Core, own_valkey: EmbeddedValkey
) -> None:
    gate, store = core.store.gate, core.store
    await own_valkey.pause()
    with pytest.raises(StoreSilent):
        await store.get("job_x")
    assert (gate.is_silent, gate.unanswered) == (True, 1)
    calls = [store.get("job_x"), store.enqueue(make_task()), store.stats(), store.workers(), store.server_info()]
    refused = await asyncio.gather(*calls, *(store.get("job_x") for _ in range(200)), return_exceptions=True)
    assert all(isinstance(answer, StoreSilent) for answer in refused)
    with pytest.raises(StoreSilent):
        await store.load()
    assert await CatalogueStore(store).load() == []
    assert gate.unanswered == 1, "only the first call has waited for an answer"
    with pytest.raises(StoreSilent, match="a question"):
        await store.ping()
    await own_valkey.resume()
    async with asyncio.timeout(5):
        await gate.wait()
    record, new = await store.enqueue(make_task())
    assert new
    assert await store.get(record.job_id) is not None


async def test_a_ping_that_is_answered_ends_the_silence(
    core: Core, own_valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_gate, "PROBE_S", 3600)
    await own_valkey.pause()
    with pytest.raises(StoreSilent):
        await core.store.get("job_x")
    await own_valkey.resume()
    await core.store.ping()
    assert core.store.gate.is_open
    assert await core.store.get("job_x") is None


async def test_an_answer_that_says_not_now_does_not_silence_the_reads(core: Core) -> None:
    record, _ = await core.store.enqueue(make_task())
    await core.client.config_set("maxmemory", "1")
    for _ in range(3):
        with pytest.raises(StoreUnavailable) as refused:
            await core.store.enqueue(make_task())
        assert not isinstance(refused.value, StoreSilent)
    assert await core.store.get(record.job_id) is not None
    assert (core.store.gate.is_silent, core.store.gate.unanswered) == (False, 0)


async def test_a_server_that_refuses_all_writes_is_not_taken_for_one_that_serves(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_gate, "PROBE_S", 0.01)
    gate, opened, asked = core.store.gate, 0, 0
    ask = gate._ping

    def on_open() -> None:
        nonlocal opened
        opened += 1

    async def counted() -> None:
        nonlocal asked
        asked += 1
        await ask()

    monkeypatch.setattr(gate, "_ping", counted)
    gate.listen(on_open=on_open)
    await core.client.config_set("maxmemory", "1")
    write = asyncio.create_task(gate.insist(lambda: core.store.enqueue(make_task())))
    await wait_until(lambda: asked >= 5, "the probe has asked a few times")
    assert (opened, gate.is_silent) == (0, False)
    await core.client.config_set("maxmemory", "0")
    async with asyncio.timeout(5):
        _, new = await write
    assert (new, opened) == (True, 1)


async def test_a_subscription_that_is_cut_off_alone_is_no_outage(own_settings: Settings) -> None:
    async with open_fleet(own_settings, workers=0) as fleet:
        job_id = await fleet.submit("echo")
        async with fleet.core.feed.watch(job_id) as watch:
            await wait_until(lambda: watch.connected, "the subscription stands")
            assert await watch.changed(5) == (), "after the first connection"
            assert await fleet.core.client.client_kill_filter(_type="pubsub") == 1
            assert await watch.changed(5) == (), "after the new one"
            assert fleet.core.store.gate.outages == 0


async def test_a_process_with_the_fewest_connections_that_it_may_have_does_not_wait_for_itself(
    own_settings: Settings,
) -> None:
    (fewest,) = (rule.ge for rule in Settings.model_fields["redis_max_connections"].metadata)
    async with open_fleet(own_settings.model_copy(update={"redis_max_connections": fewest})) as fleet:
        for _ in range(2):
            # With several calls at once all pipelines are in use, when everybody misses the functions.
            ids = await asyncio.gather(*(fleet.submit("echo") for _ in range(20)))
            for job_id in ids:
                await fleet.over(job_id)
            await fleet.core.client.execute_command("FUNCTION", "FLUSH")  # type: ignore[no-untyped-call]
        assert fleet.core.store.gate.outages == 0


# -- readers ---------------------------------------------------------------------------------------------------------


async def test_a_reader_hears_at_once_that_the_store_is_away_and_goes_on_without_gap_or_repeat(
    own_settings: Settings, own_valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nor does it look by itself: it is woken, when the store falls silent and when it is back.
    monkeypatch.setattr(event_reader, "FIRST_LOOK_S", 3600)
    async with open_fleet(own_settings) as fleet:
        job_id = await fleet.submit("hold")
        await fleet.began("c1:1")
        # An hour between two heartbeats: what comes is not one of them.
        events = fleet.service.events(job_id, heartbeat_s=3600)
        seen: list[JobEvent] = []

        async def until_away() -> None:
            async for item in events:
                if isinstance(item, Pulse) and item.reconnecting:
                    return
                assert isinstance(item, JobEvent)
                seen.append(item)

        watching = asyncio.create_task(until_away())
        await wait_until(lambda: len(seen) >= 3, "the log so far is told")
        await own_valkey.pause()
        with pytest.raises(StoreSilent):
            await fleet.core.store.get(job_id)
        async with asyncio.timeout(5):
            await watching
        fleet.bench.gate.set()
        await own_valkey.resume()
        async with asyncio.timeout(10):
            seen += [item async for item in events if isinstance(item, JobEvent)]
        assert [event.id for event in seen] == list(range(1, len(seen) + 1))
        assert seen[-1].type.value == "job.completed"


async def test_whoever_begins_to_watch_a_silent_store_does_not_wait_for_its_confirmation(
    own_settings: Settings, own_valkey: EmbeddedValkey
) -> None:
    async with open_fleet(own_settings, workers=0) as fleet:
        first = await fleet.submit("echo")
        async with fleet.core.feed.watch(first) as watch:
            await wait_until(lambda: watch.connected, "the subscription stands")
            await own_valkey.pause()
            with pytest.raises(StoreSilent):
                await fleet.core.store.get(first)
            assert not watch.connected
            for _ in range(50):
                view = await fleet.service.wait(first, 0)
                assert view.degraded
            assert fleet.core.store.gate.unanswered == 1
            await own_valkey.resume()
            await wait_until(lambda: watch.connected, "the subscription stands again")
        await fleet.service.cancel(first)


# -- submits ---------------------------------------------------------------------------------------------------------


@pytest.mark.promise("G1")
async def test_jobs_are_accepted_one_after_the_other_while_the_store_is_stopped(
    own_settings: Settings, own_valkey: EmbeddedValkey
) -> None:
    async with open_fleet(own_settings, workers=0) as fleet:
        await fleet.core.store.load()
        await own_valkey.pause()
        accepted = [await fleet.service.submit(job("echo"), idempotency_key=f"k{n}") for n in range(30)]
        assert all(one.created and one.record is None for one in accepted)
        views = [await fleet.service.get(one.job_id) for one in accepted]
        assert all(view.degraded for view in views)
        with pytest.raises(StoreUnavailable):
            await fleet.service.get("job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB")
        assert fleet.core.store.gate.unanswered == 1
        await own_valkey.resume()
        async with asyncio.timeout(5):
            await fleet.core.store.gate.wait()
        with pytest.raises(JobNotFound):
            await fleet.service.get("job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB")
        for one in accepted:
            await fleet.service.cancel(one.job_id)
