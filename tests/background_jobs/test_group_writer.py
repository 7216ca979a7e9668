"""Grouping of commands into pipelines, and the connections that carry them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from tests.support.waiting import wait_until
from toolfleet.bootstrap import redis_client
from toolfleet.services.background_jobs.errors import StoreError, StoreUnavailable
from toolfleet.services.background_jobs.group_writer import MAX_BYTES, MAX_COMMANDS, GroupWriter
from toolfleet.services.background_jobs.redis_functions import RedisFunctions
from toolfleet.services.background_jobs.redis_link import Command, RedisLink
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings


class Way:
    """Answers a pipeline when it is told to; each command's answer is its first word."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []
        self.go = asyncio.Event()
        self.fails: Exception | None = None

    async def __call__(self, commands: Sequence[Command]) -> Sequence[Any]:
        self.sent.append([command[0] for command in commands])
        await self.go.wait()
        if self.fails is not None:
            raise self.fails
        return [ValueError(word) if word == "bad" else word for word, *_ in commands]


async def send(writer: GroupWriter, *words: str, size: int = 0) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.ensure_future(writer.call((word,), size)) for word in words]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_what_arrives_meanwhile_goes_out_together() -> None:
    way = Way()
    writer = GroupWriter([way])
    first = await send(writer, "a")
    later = await send(writer, "b", "c")
    assert way.sent == [["a"]]
    way.go.set()
    assert await asyncio.gather(*first, *later) == ["a", "b", "c"]
    assert way.sent == [["a"], ["b", "c"]]


async def test_as_many_pipelines_in_flight_as_there_are_ways() -> None:
    one, two = Way(), Way()
    writer = GroupWriter([one, two])
    tasks = [*await send(writer, "a"), *await send(writer, "b"), *await send(writer, "c")]
    assert sorted([*one.sent, *two.sent]) == [["a"], ["b"]]
    one.go.set()
    two.go.set()
    assert await asyncio.gather(*tasks) == ["a", "b", "c"]


async def test_an_error_is_its_own_callers_alone() -> None:
    way = Way()
    way.go.set()
    tasks = await send(GroupWriter([way]), "a", "bad", "c")
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert (answers[0], answers[2]) == ("a", "c")
    assert isinstance(answers[1], ValueError)


async def test_a_broken_pipeline_is_told_to_all_who_were_in_it_and_the_next_one_goes() -> None:
    way = Way()
    writer = GroupWriter([way])
    tasks = await send(writer, "a")
    way.fails = ConnectionError("gone")
    way.go.set()
    assert all(isinstance(a, ConnectionError) for a in await asyncio.gather(*tasks, return_exceptions=True))
    way.fails = None
    assert await writer.call(("b",)) == "b"


async def test_pipelines_are_bounded_in_length_and_size() -> None:
    way = Way()
    writer = GroupWriter([way])
    words = [f"w{number}" for number in range(MAX_COMMANDS + 5)]
    tasks = [*await send(writer, "first"), *await send(writer, *words), *await send(writer, "x", "y", size=MAX_BYTES)]
    way.go.set()
    await asyncio.gather(*tasks)
    assert [len(pipeline) for pipeline in way.sent] == [1, MAX_COMMANDS, 6, 1]


async def test_a_caller_who_has_gone_is_not_sent_for() -> None:
    way = Way()
    writer = GroupWriter([way])
    first = await send(writer, "a")
    gone, stays = await send(writer, "b", "c")
    gone.cancel()
    way.go.set()
    assert await asyncio.gather(*first, stays) == ["a", "c"]
    assert way.sent == [["a"], ["c"]]


async def test_close_waits_for_what_was_accepted() -> None:
    way = Way()
    writer = GroupWriter([way])
    (task,) = await send(writer, "a")
    closing = asyncio.ensure_future(writer.close())
    way.go.set()
    await closing
    assert task.done()


# -- on a real server ------------------------------------------------------------------------------------------


@pytest.fixture
def client(settings: Settings, redis_url: str) -> redis.Redis:
    return redis_client(settings, redis_url)


async def test_a_kept_connection_that_died_is_made_anew_unnoticed(client: redis.Redis) -> None:
    link = RedisLink(client, timeout_s=5)
    (own_id,) = await link.exchange([("CLIENT", "ID")])
    assert await client.execute_command("CLIENT", "KILL", "ID", own_id) == 1  # type: ignore[no-untyped-call]
    assert await link.exchange([("PING",), ("ECHO", "x")]) == ["PONG", "x"]
    await link.close()
    await client.aclose()


async def test_an_error_among_the_answers_leaves_the_connection_in_step(client: redis.Redis) -> None:
    link = RedisLink(client, timeout_s=5)
    answers = await link.exchange([("SET", "k", "v", "EX", 10), ("LPUSH", "k", "x"), ("GET", "k")])
    assert (answers[0], answers[2]) == ("OK", "v")
    assert "WRONGTYPE" in str(answers[1])
    assert await link.exchange([("GET", "k")]) == ["v"]
    await link.close()
    await client.aclose()


async def test_what_is_large_has_time_in_proportion_to_its_size(client: redis.Redis) -> None:
    link = RedisLink(client, timeout_s=0.001)
    assert await link.exchange([("SET", "k", b"x" * (16 << 20), "EX", 10)]) == ["OK"]
    await link.close()
    await client.aclose()


async def test_a_refusal_is_not_taken_for_an_outage(client: redis.Redis) -> None:
    functions = RedisFunctions(client, timeout_s=5)
    with pytest.raises(StoreError, match="unknown command") as refused:
        await functions.read("NOSUCHCOMMAND")
    assert not isinstance(refused.value, StoreUnavailable)
    await functions.close()
    await client.aclose()


async def test_a_server_that_does_not_answer_is_given_up_within_the_bound_and_served_again(
    tmp_path: Path, settings: Settings
) -> None:
    async with EmbeddedValkey(tmp_path / "valkey", durable=False) as server:
        client = redis_client(settings, server.url)
        functions = RedisFunctions(client, timeout_s=0.3)
        assert await functions.read("PING") == "PONG"
        await server.pause()
        with pytest.raises(StoreUnavailable):
            await functions.read("PING")
        await server.resume()

        async def answers() -> bool:
            try:
                return bool(await functions.read("ECHO", "back") == "back")
            except StoreUnavailable:
                return False

        await wait_until(answers, "the server answers its own commands again, not earlier ones'")
        await functions.close()
        await client.aclose()
