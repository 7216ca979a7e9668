"""Many stream clients at once: connections break at random, the Pub/Sub connection is cut, clients idle."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from benchmarks.stream_client import Followed, connect, follow
from redis.asyncio import Redis

from tests.api.harness import BOUND_S, JOBS, Toolbox, call, running_api, running_worker, submit
from tests.conftest import SettingsFactory
from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.ports import CallContext, ToolSpec
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.services.tool_execution.local_runner import LocalToolRunner
from toolfleet.settings import Settings

CLIENTS = 100
STEPS = 60
PAUSE_S = 0.05


class Chatty(Toolbox):
    """`chat` reports progress so many times, with a pause after each; it begins when `release` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = LocalToolRunner({"chat": (ToolSpec("chat", "test", "chat", repeatable=True), self._chat)})

    async def _chat(self, _: dict[str, Any], context: CallContext) -> str:
        await self.release.wait()
        for step in range(STEPS):
            context.on_progress(step + 1, STEPS, None)
            await asyncio.sleep(PAUSE_S)
        return "done"


@pytest.fixture
async def tools() -> Chatty:
    return Chatty()


async def storm(client: httpx.AsyncClient, tools: Chatty, seed: int, jobs: int = 5) -> list[Followed]:
    """So many clients follow some jobs, each with its own chance, from before the first progress to the end."""
    chance = random.Random(seed)
    port = client.base_url.port
    assert port is not None
    ids = [(await submit(client, call("chat")))["job_id"] for _ in range(jobs)]
    following = [
        asyncio.create_task(follow(port, ids[number % jobs], random.Random(chance.random()), (1, 30)))
        for number in range(CLIENTS)
    ]
    tools.release.set()
    async with asyncio.timeout(4 * BOUND_S):
        return await asyncio.gather(*following)


@pytest.mark.promise("G7")
async def test_clients_that_drop_at_random_see_every_event_once_and_in_order(
    make_settings: SettingsFactory, nats_url: str, redis_url: str, tools: Chatty
) -> None:
    seed = random.randrange(1 << 32)
    settings = make_settings(nats_url=nats_url, redis_url=redis_url, progress_interval=0.01)
    async with running_api(settings, tools) as client, running_worker(settings, tools):
        seen = await storm(client, tools, seed)
    assert not [problem for one in seen for problem in one.problems()], f"seed {seed}"
    assert sum(one.connections for one in seen) > 2 * CLIENTS
    # How much is coalesced hangs on how busy the machine is.
    assert min(len(one.ids) for one in seen) > STEPS // 6


@contextlib.asynccontextmanager
async def pubsub_cut_again_and_again(server: EmbeddedValkey) -> AsyncIterator[list[int]]:
    """Every Pub/Sub connection is killed as soon as there is one; how many, by turn."""
    killed: list[int] = []

    async def cut(redis: Redis) -> None:
        while True:
            if count := int(await redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")):
                killed.append(count)
            await asyncio.sleep(0.3)

    async with Redis.from_url(server.url) as redis:
        cutting = asyncio.create_task(cut(redis))
        try:
            yield killed
        finally:
            cutting.cancel()
            await asyncio.wait({cutting})


@pytest.mark.promise("G7")
async def test_a_pubsub_gap_loses_no_event_of_any_client(
    own_settings: Settings, own_valkey: EmbeddedValkey, tools: Chatty, caplog: pytest.LogCaptureFixture
) -> None:
    seed = random.randrange(1 << 32)
    settings = own_settings.model_copy(update={"progress_interval": 0.01})
    async with (
        running_api(settings, tools) as client,
        running_worker(settings, tools),
        pubsub_cut_again_and_again(own_valkey) as killed,
    ):
        seen = await storm(client, tools, seed)
    assert not [problem for one in seen for problem in one.problems()], f"seed {seed}"
    assert len(killed) > 3, "the connection was cut in between"
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "no stream ended with an error"


async def test_idle_clients_share_one_connection_to_redis_and_hear_of_the_end(
    own_settings: Settings, own_valkey: EmbeddedValkey, tools: Chatty
) -> None:
    async with running_api(own_settings, tools) as client, Redis.from_url(own_valkey.url) as redis:
        port = client.base_url.port
        assert port is not None
        jobs = [(await submit(client, call("chat")))["job_id"] for _ in range(10)]
        streams = [await connect(port, jobs[number % 10], None) for number in range(300)]
        for _, reader, _ in streams:
            await reader.readuntil(b"event: job.queued")
        assert len(await redis.client_list(_type="pubsub")) == 1
        for job_id in jobs:
            assert (await client.post(f"{JOBS}/{job_id}/cancel")).status_code in (200, 202)
        async with asyncio.timeout(BOUND_S):
            ends = await asyncio.gather(*(reader.read() for _, reader, _ in streams))
        assert all(end.count(b"event: job.cancelled") == 1 for end in ends)
        for _, _, writer in streams:
            writer.close()

        async def nobody_listens() -> bool:
            return not await redis.pubsub_channels("*:ev:*")

        await wait_until(nobody_listens, "no channel has a subscriber")
