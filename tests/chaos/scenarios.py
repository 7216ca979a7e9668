"""For each broken build a way to the place where it shows: the same for the healthy build, which comes out of it well.

What a scenario leaves behind is for the audit; the scenario itself asserts nothing of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from tests.chaos.crew import Crew
from tests.chaos.ledger import entries
from tests.chaos.living import BOUND_S, kill_at, stop_at
from tests.support.waiting import wait_until

FULL: Final = 700_000
"""Bytes of a job of which the smallest stream, 1 MiB, holds one."""


PATIENT: Final = {"lease": 30.0}
"""Of a worker that is to end what it takes, on however busy a machine."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A way, and the figure of the audit that the broken build must not keep at zero."""

    play: Callable[[Crew], Awaitable[None]]
    figure: str
    overrides: dict[str, Any] = field(default_factory=dict)
    short_grace: bool = False


async def dies_before_finish(crew: Crew) -> None:
    """A worker dies between the call's end and the write of it; another one comes."""
    first = await crew.worker(kill_at("before-finish"))
    job_id = await crew.submits("work")
    await first.dies_at("before-finish")
    await crew.worker(**PATIENT)
    await crew.settled(job_id)


async def wakes_up_in_the_next_attempt(crew: Crew) -> None:
    """A worker sleeps past its lease, and writes its result while another one is in the same call."""
    sleeper = await crew.worker(stop_at("before-finish"))
    # Long enough for its start to be told by itself: then its result is written with the finish and not before.
    job_id = await crew.submits("work", args={"ms": 100, "until": str(crew.gate), "since": 2})
    await sleeper.stops_at("before-finish")
    await crew.worker(**PATIENT)
    await crew.begun("c1", 2)
    sleeper.go_on()

    async def has_written() -> bool:
        record = await crew.record(job_id)
        return "attempt.write_refused" in sleeper.log or (record is not None and record.status.terminal)

    await wait_until(has_written, "its write was refused, or was not", BOUND_S)
    crew.gate.touch()
    await crew.over(job_id)
    await crew.settled(job_id)


async def refused_while_nats_is_down(crew: Crew) -> None:
    """An API without NATS refuses a job for certain; a worker looks for jobs that were left alone."""
    _, client = await crew.api(nats_url="nats://127.0.0.1:9")
    plan = crew.plan("work")
    assert await client.submit(plan.number, plan.body, plan.key, gives_up=True) is None
    await crew.worker(recovery_check_interval=0.2, **PATIENT)
    # One that was left alone and is run is enough to know that the reconciler has looked at all.
    job_id = await crew.submits("work")
    await crew.wired.core.queue.purge(job_id)
    await crew.over(job_id)


async def dies_right_after_a_call(crew: Crew) -> None:
    """A worker dies right after the effect of a call that must not run twice; another one comes."""
    first = await crew.worker(kill_at("after-effect-before-result"))
    job_id = await crew.submits("once_work")
    await first.dies_at("after-effect-before-result")
    await crew.worker(**PATIENT)
    await crew.settled(job_id)


async def is_opened_again_at_once(crew: Crew) -> None:
    """A person retries a failed job within the duplicate window."""
    _, client = await crew.api()
    await crew.worker(**PATIENT)
    job_id = await crew.submits("fail", max_retries=0, args={"times": 1})
    await crew.over(job_id)
    await crew.again(job_id, client)
    await crew.settled(job_id, generation=2)


async def meets_a_full_stream(crew: Crew) -> None:
    """The room that an API has seen in the stream is taken before it publishes; then workers come."""
    api, client = await crew.api(stop_at("before-publish"))
    metadata = {"ballast": "x" * FULL}
    late = crew.plan("work", metadata=metadata)
    submitting = asyncio.create_task(client.submit(late.number, late.body, late.key))
    await api.stops_at("before-publish")
    first = await crew.submits("work", metadata=metadata)
    api.go_on()
    await wait_until(lambda: len(_answers(crew)) > 1, "the late one is answered", BOUND_S)
    await crew.worker(**PATIENT)
    for job_id in (first, await submitting):
        assert job_id is not None
        await crew.settled(job_id)


async def dies_again_after_a_retry(crew: Crew) -> None:
    """A job that kills its workers becomes a dead letter, and after a retry one more."""
    first = await crew.worker(kill_at("after-claim-before-run"))
    job_id = await crew.submits("work")
    await first.dies_at("after-claim-before-run")
    # Its first claim is the one that ends in the dead letter.
    second = await crew.worker(kill_at("after-claim-before-run", nth=2))
    await crew.over(job_id)
    await crew.again(job_id, crew.client)
    await second.dies_at("after-claim-before-run")
    await crew.worker(**PATIENT)
    await crew.over(job_id, generation=2)
    await crew.settled(job_id)


async def is_asked_twice_for_one_run(crew: Crew) -> None:
    """Two callers with one key want the same synchronous run."""
    _, client = await crew.api()
    plan = crew.plan("once_work", mode="sync", args={"until": str(crew.gate)})
    asking = [asyncio.create_task(client.submit(plan.number, plan.body, plan.key))]
    await crew.begun("c1", 1)
    asking.append(asyncio.create_task(client.submit(plan.number, plan.body, plan.key)))
    await wait_until(lambda: len(crew.effects()) > 1 or _answers(crew), "the second one runs, or is answered", BOUND_S)
    crew.gate.touch()
    job_ids = {await asked for asked in asking}
    for job_id in job_ids - {None}:
        await crew.settled(str(job_id))


SCENARIOS: Final[dict[str, Scenario]] = {
    "ack-before-finish": Scenario(dies_before_finish, "lost"),
    "no-fence": Scenario(wakes_up_in_the_next_attempt, "stale_writes"),
    "enqueue-before-publish-ack": Scenario(refused_while_nats_is_down, "ran_though_refused", short_grace=True),
    "start-mark-not-awaited": Scenario(dies_right_after_a_call, "duplicate_effects"),
    "reopen-with-old-message-id": Scenario(is_opened_again_at_once, "lost"),
    "10077-is-success": Scenario(meets_a_full_stream, "lost", {"stream_max_bytes": 1 << 20}),
    "dead-letter-without-fence": Scenario(dies_again_after_a_retry, "letters_missing", {"max_starts": 1}),
    "sync-run-without-claim": Scenario(is_asked_twice_for_one_run, "duplicate_effects"),
}
"""By the broken build that shows in it."""


def _answers(crew: Crew) -> list[str]:
    """What clients were answered, in order."""
    return [entry["k"] for entry in entries(crew.views_path) if entry["k"] in ("accepted", "refused")]
