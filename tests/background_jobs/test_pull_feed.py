"""The standing pull: as many messages as there are free slots, at once, through whatever the server does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from tests.background_jobs.making import make_task
from tests.support.waiting import wait_until
from toolfleet.bootstrap import Core, open_core
from toolfleet.services.background_jobs import pull_feed
from toolfleet.services.background_jobs.pull_feed import NatsDelivery, PullFeed
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.settings import Settings


@dataclass
class Hands:
    """Takes messages, so many at once."""

    slots: int
    held: list[NatsDelivery] = field(default_factory=list)
    most: int = 0
    taken: int = 0

    def credits(self) -> int:
        return self.slots - len(self.held)

    def take(self, delivery: NatsDelivery) -> None:
        self.held.append(delivery)
        self.taken += 1
        self.most = max(self.most, len(self.held))

    async def ack_one(self, feed: PullFeed) -> None:
        await self.held.pop(0).ack()
        feed.poke()


@contextlib.asynccontextmanager
async def feeding(
    settings: Settings, slots: int, *, last: int | None = None
) -> AsyncIterator[tuple[Core, PullFeed, Hands]]:
    """A feed that runs until the end of the block, or until its `last` message is there."""
    async with open_core(settings, name="test") as core:
        hands = Hands(slots)

        def take(delivery: NatsDelivery) -> None:
            hands.take(delivery)
            if hands.taken == last:
                run.cancel()

        feed = PullFeed(
            core.connection,
            settings.stream,
            core.queue.names.consumer(Tier.NORMAL),
            credits=hands.credits,
            deliver=take,
            on_consumer_gone=core.queue.ensure,
        )
        run = asyncio.create_task(feed.run())
        try:
            yield core, feed, hands
        finally:
            if last is None:
                run.cancel()
            # Cancelled once: a second time would cut off how it ends.
            await asyncio.wait([run], timeout=10)
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)


async def publish(core: Core, count: int) -> None:
    for _ in range(count):
        assert await core.queue.publish(make_task()) == "stored"


async def drain(feed: PullFeed, hands: Hands, count: int) -> None:
    """Take and ack, one by one, until so many were taken."""
    while hands.taken < count or hands.held:
        await wait_until(lambda: hands.held, f"message {hands.taken + 1} of {count} arrives")
        await hands.ack_one(feed)


async def test_there_are_never_more_messages_in_hand_than_slots(settings: Settings) -> None:
    async with feeding(settings, 3) as (core, feed, hands):
        await publish(core, 40)
        await wait_until(lambda: len(hands.held) == 3, "every slot is taken")
        await drain(feed, hands, 40)
        assert (hands.most, hands.taken) == (3, 40)


async def test_the_first_message_does_not_wait_for_its_batch(settings: Settings) -> None:
    async with feeding(settings, 50) as (core, feed, hands):
        await wait_until(lambda: feed.pulls == 1, "the pull stands")
        await publish(core, 1)
        await wait_until(lambda: hands.taken == 1, "the only message arrives", timeout=1)
        assert feed.pulls == 1, "and the same pull still stands for the others"
        await publish(core, 1)
        await wait_until(lambda: hands.taken == 2, "so does the next one", timeout=1)
        await drain(feed, hands, 2)


async def test_pulls_that_expire_are_made_again_and_keep_count(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_feed, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(pull_feed, "EXPIRES_S", 0.3)
    async with feeding(settings, 6) as (core, feed, hands):
        # Several pulls stand beside each other, some of them partly served, and expire one after the other.
        for taken in range(1, 5):
            await publish(core, 1)
            await wait_until(lambda taken=taken: hands.taken == taken, "a message arrives")  # type: ignore[misc]
            await hands.ack_one(feed)
        pulls = feed.pulls
        await wait_until(lambda: feed.pulls >= pulls + 2, "expired pulls are made again")
        await publish(core, 30)
        await wait_until(lambda: len(hands.held) == 6, "every slot is taken")
        await drain(feed, hands, 34)
        assert hands.most == 6


async def test_a_pull_beyond_what_the_server_allows_keeps_the_others_counted(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_feed, "CHECK_S", 0.05)
    async with feeding(settings, 1) as (core, feed, hands):
        await wait_until(lambda: feed.pulls == 1, "the first pull stands")
        hands.slots = 2
        feed.poke()
        await wait_until(lambda: feed.pulls == 2, "the second pull stands")
        # As the server answers a pull that is one too many: without a word on what is pending.
        refusal = f"{feed._inbox}.9-1"
        feed._outstanding += 1
        await core.connection.client.publish(
            refusal, b"", headers={"Status": "409", "Description": "Exceeded MaxWaiting"}
        )
        await wait_until(lambda: feed._outstanding == 2, "only the refused pull is gone")
        await publish(core, 10)
        await drain(feed, hands, 10)
        assert hands.most == 2


async def test_a_consumer_that_was_deleted_is_made_again(settings: Settings) -> None:
    async with feeding(settings, 2) as (core, feed, hands):
        await wait_until(lambda: feed.pulls == 1, "the pull stands")
        await core.connection.client.jsm().delete_consumer(settings.stream, "workers-normal")
        await publish(core, 5)
        await drain(feed, hands, 5)
        assert hands.most <= 2


async def test_a_server_that_is_gone_and_comes_back_is_asked_again(
    own_settings: Settings, own_nats: EmbeddedNats
) -> None:
    async with feeding(own_settings, 2) as (core, feed, hands):
        await publish(core, 3)
        await wait_until(lambda: len(hands.held) == 2, "every slot is taken")
        await own_nats.kill()
        await own_nats.start()
        # What was in hand is still ours to ack; it was delivered by the server's last life.
        await wait_until(lambda: core.connection.connected, "the connection is back")
        while hands.held:
            await hands.ack_one(feed)
        await publish(core, 3)

        async def empty() -> bool:
            while hands.held:
                await hands.ack_one(feed)
            return (await core.queue.stats()).messages == 0

        await wait_until(empty, "everything was taken and acked", timeout=20)
        assert hands.most <= 2


async def test_a_pull_that_the_server_has_forgotten_is_made_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_feed, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(pull_feed, "SILENCE_S", 0.3)
    monkeypatch.setattr(pull_feed, "CHECK_S", 0.05)
    async with feeding(settings, 2) as (core, feed, hands):
        await wait_until(lambda: feed.pulls == 1, "the pull stands")
        # Nobody at the inbox: the server drops the pull and says nothing more.
        assert feed._subscription is not None
        await feed._subscription.unsubscribe()
        await core.connection.client.flush()
        await publish(core, 4)
        await drain(feed, hands, 4)


async def test_a_message_that_is_handed_back_comes_again_and_its_age_is_kept(settings: Settings) -> None:
    async with feeding(settings, 1) as (core, feed, hands):
        await publish(core, 1)
        await wait_until(lambda: hands.taken == 1, "the message arrives")
        first = hands.held.pop()
        await first.nak(0.05)
        feed.poke()
        await wait_until(lambda: hands.taken == 2, "it comes again")
        (second,) = hands.held
        assert (second.subject, second.published_at, second.data) == (first.subject, first.published_at, first.data)
        await hands.ack_one(feed)


async def test_a_message_that_is_kept_in_progress_is_not_given_to_others(own_settings: Settings) -> None:
    settings = own_settings.model_copy(update={"ack_wait": 0.4})
    async with feeding(settings, 1) as (core, _, hands), feeding(settings, 1) as (_, _, other):
        await publish(core, 1)
        await wait_until(lambda: hands.taken + other.taken == 1, "the message arrives")
        holder = hands if hands.held else other
        for _ in range(8):
            await holder.held[0].in_progress()
            with contextlib.suppress(AssertionError):
                await wait_until(lambda: hands.taken + other.taken > 1, "somebody else gets it", timeout=0.1)
        assert hands.taken + other.taken == 1
        await holder.held.pop().ack()
        await core.connection.client.flush()


@pytest.mark.promise("G10")
@pytest.mark.leaves_messages
async def test_a_pull_that_ends_takes_what_is_on_its_way(settings: Settings) -> None:
    async with open_core(settings, name="publisher") as core:
        await asyncio.gather(*(core.queue.publish(make_task()) for _ in range(300)))
        async with feeding(settings, 300, last=1) as (_, _, hands):
            await wait_until(lambda: hands.taken, "the first message arrives")
        # Whatever was given out is in hand; the rest is free for others now, not after ack_wait.
        consumer = await core.queue._admin.api(f"CONSUMER.INFO.{settings.stream}.workers-normal")
        assert consumer["num_ack_pending"] == hands.taken > 0


@pytest.mark.parametrize(
    "reply",
    [
        "$JS.ACK.TASKS.workers-normal.1.7.7.1700000000123456789.0",
        "$JS.ACK.hub.ACC.TASKS.workers-normal.1.7.7.1700000000123456789.0.token",
    ],
)
def test_the_age_of_a_message_is_read_with_and_without_a_domain(reply: str) -> None:
    assert pull_feed._published_at(reply) == 1_700_000_000_123
