"""The queue on JetStream: one message a job, dead letters, the streams' contract."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from tests.background_jobs.making import make_task
from tests.conftest import SettingsFactory
from toolfleet.bootstrap import Core, open_core
from toolfleet.services.background_jobs.errors import QueueError, QueueUnavailable, StreamMismatch
from toolfleet.services.background_jobs.nats_task_queue import NatsTaskQueue
from toolfleet.services.background_jobs.queue_ports import DeadLetter
from toolfleet.services.background_jobs.task_models import Tier, new_job_id
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.settings import Settings


@pytest.fixture
async def core(settings: Settings) -> AsyncIterator[Core]:
    async with open_core(settings, name="test") as opened:
        yield opened


@pytest.fixture
def queue(core: Core) -> NatsTaskQueue:
    return core.queue


async def test_a_job_has_one_message_in_whatever_tier(queue: NatsTaskQueue) -> None:
    for tier in Tier:
        task = make_task(priority=tier)
        assert await queue.find(task.job_id) is None
        assert not await queue.stands(task.job_id)
        assert await queue.publish(task) == "stored"
        assert await queue.publish(task) == "duplicate"
        assert await queue.publish(task.model_copy(update={"generation": 2})) == "refused"
        assert await queue.publish(task, again=True) == "refused"
        assert await queue.find(task.job_id) == task
        assert await queue.stands(task.job_id)
        assert await queue.purge(task.job_id)
        assert not await queue.purge(task.job_id)
        assert await queue.find(task.job_id) is None


async def test_a_message_under_a_subject_that_no_consumer_reads_is_nobodys(queue: NatsTaskQueue, core: Core) -> None:
    task = make_task()
    stranger = core.settings.subject_prefix + ".bulk." + task.job_id
    await core.connection.request(stranger, task.to_json(), 5)
    assert await queue.stands(task.job_id)
    assert await queue.acked(task.job_id)
    assert await queue.purge(task.job_id)


async def test_a_message_that_is_known_to_be_gone_can_be_published_again(queue: NatsTaskQueue) -> None:
    task = make_task()
    assert await queue.publish(task) == "stored"
    await queue.purge(task.job_id)
    assert await queue.publish(task) == "duplicate", "the stream remembers its id"
    assert not await queue.stands(task.job_id)
    assert await queue.publish(task, again=True) == "stored"
    assert await queue.purge(task.job_id)


@pytest.mark.leaves_messages
async def test_a_full_stream_refuses_a_job_that_it_does_not_hold(
    make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    async with open_core(
        make_settings(nats_url=nats_url, redis_url=redis_url, stream_max_bytes=1 << 20), name="test"
    ) as core:
        first, second = (make_task(metadata={"x": "y" * 600_000}) for _ in range(2))
        assert await core.queue.publish(first) == "stored"
        assert await core.queue.publish(second) == "refused"
        assert await core.queue.stands(first.job_id)
        assert not await core.queue.stands(second.job_id)
        figures = await core.queue.stats()
        assert figures.messages == 1
        assert 600_000 < figures.bytes < figures.max_bytes == 1 << 20


async def test_a_message_that_can_not_be_read_stands_all_the_same(core: Core) -> None:
    job_id = new_job_id()
    subject = core.queue.names.subject(Tier.NORMAL, job_id)
    await core.connection.request(subject, b"nonsense", 5)
    assert await core.queue.stands(job_id)
    with pytest.raises(QueueError, match=job_id):
        await core.queue.find(job_id)
    assert await core.queue.purge(job_id)


# -- dead letters ----------------------------------------------------------------------------------------------------


def letter(number: int, payload: bytes = b"{}") -> DeadLetter:
    return DeadLetter(new_job_id(), number, "too_many_starts", f"Nummer {number} \N{SNOWMAN}\nund so", payload)


async def test_dead_letters_are_paged_from_the_oldest(core: Core) -> None:
    buried = [letter(number, bytes([number])) for number in range(1, 8)]
    for each in buried:
        await core.letters.store(each)
    found: list[DeadLetter] = []
    after: int | None = 0
    while after is not None:
        page = await core.letters.page(after, 3)
        found += page.entries
        after = page.cursor
    assert [(e.job_id, e.fence, e.reason, e.message, e.payload) for e in found] == [
        (e.job_id, e.fence, e.reason, e.message, e.payload) for e in buried
    ]
    assert [entry.seq for entry in found] == list(range(1, 8))
    figures = await core.queue.stats()
    assert figures.dead_letters == 7
    assert figures.oldest_dead_letter_at == found[0].at > 0


async def test_a_repeated_dead_letter_is_stored_once(core: Core) -> None:
    known, malformed = letter(1), DeadLetter(None, 0, "malformed", "not a task", b"\x00\xff")
    for each in (known, known, malformed, malformed):
        await core.letters.store(each)
    other = DeadLetter(known.job_id, 0, "malformed", "not a task", b"one")
    await core.letters.store(other)
    await core.letters.store(DeadLetter(known.job_id, 0, "malformed", "not a task", b"another"))
    page = await core.letters.page(0, 10)
    assert [entry.payload for entry in page.entries] == [b"{}", b"\x00\xff", b"one", b"another"]
    assert page.entries[1].job_id is None


async def test_a_generation_has_one_letter_whichever_attempt_stored_it(core: Core) -> None:
    # An attempt whose publish was stored without an answer is followed by one with another fence.
    first = make_task()
    second = first.model_copy(update={"generation": 2})
    for task, fence in ((first, 4), (first, 5), (second, 6)):
        await core.letters.store(DeadLetter(task.job_id, fence, "too_many_starts", "died", task.to_json()))
    assert [letter.fence for letter in (await core.letters.page(0, 10)).entries] == [4, 6]


async def test_a_message_as_large_as_the_server_takes_can_be_buried(core: Core) -> None:
    await core.letters.store(letter(1, b"x" * (1 << 20)))
    (entry,) = (await core.letters.page(0, 10)).entries
    assert len(entry.payload) > 1_000_000


# -- the streams' contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "change", "field"),
    [
        ("stream", {"duplicate_window": 10_000_000_000}, "duplicate_window"),
        ("stream", {"discard_new_per_subject": False}, "discard_new_per_subject"),
        ("dlq_stream", {"max_age": 3_600_000_000_000}, "max_age"),
    ],
)
async def test_a_stream_with_other_settings_is_named_and_left_alone(
    settings: Settings, which: str, change: dict[str, object], field: str
) -> None:
    async with open_core(settings, name="test") as core:
        name = getattr(settings, which)
        config = (await core.queue._admin.api(f"STREAM.INFO.{name}"))["config"] | change
        await core.queue._admin.api(f"STREAM.UPDATE.{name}", config)
        standing = (await core.queue._admin.api(f"STREAM.INFO.{name}"))["config"]
        with pytest.raises(StreamMismatch, match=field) as caught:
            await core.queue.ensure()
        assert name in str(caught.value)
        assert (await core.queue._admin.api(f"STREAM.INFO.{name}"))["config"] == standing
    with pytest.raises(StreamMismatch, match=field):
        async with open_core(settings, name="test"):
            pass


async def test_a_consumer_with_other_settings_is_named_too(settings: Settings) -> None:
    async with open_core(settings, name="test"):
        pass
    with pytest.raises(StreamMismatch, match=r"workers-high.*ack_wait"):
        async with open_core(settings.model_copy(update={"ack_wait": 7.0}), name="test"):
            pass


async def test_streams_are_as_the_design_says(core: Core, settings: Settings) -> None:
    tasks = (await core.queue._admin.api(f"STREAM.INFO.{settings.stream}"))["config"]
    assert (tasks["retention"], tasks["discard"], tasks["max_msgs_per_subject"]) == ("workqueue", "new", 1)
    for tier in Tier:
        consumer = await core.queue._admin.api(f"CONSUMER.INFO.{settings.stream}.workers-{tier}")
        config = consumer["config"]
        assert (config["max_deliver"], config["max_ack_pending"], config["ack_policy"]) == (-1, -1, "explicit")
        assert "backoff" not in config
        assert json.dumps(config).count("workers-") >= 1


async def test_without_a_server_nothing_can_have_been_stored(own_settings: Settings, own_nats: EmbeddedNats) -> None:
    async with open_core(own_settings, name="test") as core:
        await own_nats.pause()
        with pytest.raises(QueueUnavailable) as caught:
            await core.queue.publish(make_task())
        assert caught.value.maybe_stored, "bytes were written and nobody answered"
        await own_nats.resume()
        await core.connection.client.jsm().purge_stream(own_settings.stream)
        await own_nats.stop()
        with pytest.raises(QueueUnavailable):
            await core.queue.find(new_job_id())
        with pytest.raises(QueueUnavailable) as caught:
            await core.queue.publish(make_task())
        assert not caught.value.maybe_stored
