"""The floor: the least that any queue on JetStream and Redis has to do, written as directly as the clients permit.

Publish and ack, pull and ack, one Redis pipeline for state, result and publish. No lease, fence, event log, retry,
cancel or recovery: it loses jobs and runs them twice. It only says how fast the parts are on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

import nats
import redis.asyncio as redis
import uvloop
from nats.js.api import ConsumerConfig, StreamConfig

STREAM = "FLOOR"
SUBJECT = "floor.tasks"
CONSUMER = "floor"
ANSWER = "r" * 200


async def work(nats_url: str, redis_url: str, slots: int) -> None:
    """Pull, one pipeline, ack; for ever."""
    client = redis.from_url(redis_url, decode_responses=True)
    connection = await nats.connect(nats_url)
    stream = connection.jetstream()
    await stream.add_stream(StreamConfig(name=STREAM, subjects=[SUBJECT], retention="workqueue", storage="file"))
    await stream.add_consumer(STREAM, ConsumerConfig(durable_name=CONSUMER, ack_policy="explicit", max_ack_pending=-1))
    inbox = connection.new_inbox()
    jobs: set[asyncio.Task[None]] = set()
    slot = asyncio.Semaphore(slots)

    async def job(message: Any) -> None:
        task = json.loads(message.data)
        pipeline = client.pipeline(transaction=False)
        pipeline.hset(f"job:{task['id']}", mapping={"status": "completed", "attempt": 1})
        pipeline.set(f"result:{task['id']}", ANSWER, ex=3600)
        pipeline.publish(f"events:{task['id']}", "completed")
        await pipeline.execute()
        await message.ack()
        slot.release()

    async def take(message: Any) -> None:
        await slot.acquire()
        started = asyncio.create_task(job(message))
        jobs.add(started)
        started.add_done_callback(jobs.discard)

    await connection.subscribe(inbox, cb=take)
    # One pull for everything: the floor pays for no flow control.
    body = json.dumps({"batch": 1_000_000}).encode()
    await connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{CONSUMER}", body, reply=inbox)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


async def submit(nats_url: str, jobs: int, in_flight: int) -> None:
    """Publish with many acks in flight."""
    connection = await nats.connect(nats_url)
    numbers = iter(range(jobs))

    stream = connection.jetstream(timeout=30)

    async def publisher() -> None:
        for number in numbers:
            data = json.dumps({"id": number, "argument": "a" * 200}).encode()
            await stream.publish(SUBJECT, data, headers={"Nats-Msg-Id": str(number)})

    await asyncio.gather(*(publisher() for _ in range(in_flight)))
    await connection.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--nats", required=True)
    parser.add_argument("--redis", required=True)
    options = parser.parse_args()
    uvloop.run(work(options.nats, options.redis, options.slots))
