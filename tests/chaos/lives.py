"""A job as its clients live it: submitted, watched, cancelled, read, and taken up again by a person."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final

from tests.chaos.clients import JOBS, Client
from tests.chaos.workload import JobPlan

REDRIVE: Final = "/api/v1/dead-letters/{job_id}/redrive"
MAX_LIVES: Final = 3
"""Generations that a person opens of one job at most, so that a run ends."""


class Lives:
    """Lives through plans; each `live` is one job."""

    def __init__(self, client: Client, seed: int, note_letters: Callable[[], Awaitable[None]]) -> None:
        """
        Args:
            client: asks the API.
            seed: of what people decide.
            note_letters: writes the dead letters that stand into the ledger, before a person takes one away.
        """
        self._client = client
        self._seed = seed
        self._note_letters = note_letters
        self.unfinished: set[int] = set()
        """Numbers of jobs that are not over yet."""

    async def live(self, plan: JobPlan) -> None:
        """From the submit to the last look, or to the end of the run."""
        self.unfinished.add(plan.number)
        job_id = await self._submit(plan)
        if job_id is not None:
            if not await self._follow(plan, job_id):
                return
            await self._person(plan, job_id)
        if not self._client.over.is_set():
            self.unfinished.discard(plan.number)

    async def _submit(self, plan: JobPlan) -> str | None:
        client = self._client
        submits = [
            client.submit(plan.number, plan.body, plan.key, gives_up=plan.gives_up) for _ in range(1 + plan.twins)
        ]
        # Of several at once some may be refused; those that were not have the same job, see the audit.
        job_id = next((found for found in await asyncio.gather(*submits) if found), None)
        if job_id is not None and plan.kind in ("invalid", "rejected"):
            client.tally.wrong.append(f"G11 job {plan.number} of kind {plan.kind} was accepted as {job_id}")
        if job_id is not None and plan.conflict:
            other = {**plan.body, "metadata": {"kind": "another"}}
            answer = await client.insist("POST", JOBS, body=other, headers={"Idempotency-Key": plan.key or ""})
            # While Redis is away keys can't be compared; such a job is not run, and becomes a dead letter.
            if answer is not None and answer.status != 422 and not answer.json().get("degraded"):
                client.tally.wrong.append(f"G6 {job_id}: its key with another body gave {answer.status}")
        return job_id

    async def _follow(self, plan: JobPlan, job_id: str) -> bool:
        """Until the first generation has ended; whether it has."""
        client = self._client
        watching = [asyncio.create_task(client.watch(job_id, drops=plan.drops)) for _ in range(plan.watchers)]
        others = []
        if plan.cancel_after_s is not None:
            others.append(asyncio.create_task(self._later(plan.cancel_after_s, client.cancel(job_id))))
        if plan.again_after_s is not None:
            again = client.submit(plan.number, plan.body, plan.key)
            others.append(asyncio.create_task(self._later(plan.again_after_s, again)))
        try:
            if plan.polls or not watching:
                await client.until_over(job_id)
            await asyncio.gather(*watching, *others)
        finally:
            for task in (*watching, *others):
                task.cancel()
        if client.over.is_set():
            return False
        await client.result(job_id)
        return True

    async def _later(self, seconds: float, work: Any) -> None:
        await asyncio.sleep(seconds)
        await work

    # -- a person ----------------------------------------------------------------------------------------------

    async def _person(self, plan: JobPlan, job_id: str) -> None:
        """Acts on the ends that ask for it, a few times at most."""
        chance = random.Random(f"person-{self._seed}-{plan.number}")
        for _ in range(MAX_LIVES):
            # Not what a poll says at once: while Redis is away nobody knows that the job has ended.
            told = await self._client.until_over(job_id)
            if told is None:
                return
            generation = int(told["generation"])
            poison = plan.kind == "poison"
            acts = plan.person or poison or told["status"] == "unknown"
            # A redriven poison dies as it did the first time.
            if not acts or told["status"] == "completed" or (poison and generation > 1):
                return
            if told["status"] == "unknown":
                if not await self._decide(chance, job_id, told):
                    return
            elif told["status"] in ("failed", "cancelled"):
                if not await self._again(job_id, told, chance):
                    return
                plan_acts_once = chance.random() < 0.8
                if plan_acts_once:
                    await self._ended(plan, job_id, generation + 1)
                    return
            await self._ended(plan, job_id, generation + 1)

    async def _ended(self, plan: JobPlan, job_id: str, generation: int) -> None:
        watching = None
        if plan.watchers:
            watching = asyncio.create_task(self._client.watch(job_id, drops=plan.drops))
        await self._client.until_over(job_id, generation)
        if watching is not None:
            # A second stream of the same job begins at its first event and ends with an end; with which one is the
            # generation's that it was opened on.
            await watching
        await self._client.result(job_id)

    async def _decide(self, chance: random.Random, job_id: str, told: dict[str, Any]) -> bool:
        """Settle every undecided call; whether a new generation has begun, as far as this person knows."""
        for call in told["undecided_calls"]:
            decision = chance.choice(("rerun", "completed", "failed"))
            word = {"tool_call_id": call, "decision": decision, "note": "chaos"}
            await self._client.ledger.write("asks", job=job_id, verb="resolve", call=call, decision=decision,
                                            generation=told["generation"])  # fmt: skip
            answer = await self._client.insist("POST", f"{JOBS}/{job_id}/resolve", body=word)
            if answer is None:
                return False
            await self._client.ledger.write("person", job=job_id, verb="resolve", call=call, decision=decision,
                                            code=answer.status, generation=told["generation"])  # fmt: skip
        return True

    async def _again(self, job_id: str, told: dict[str, Any], chance: random.Random) -> bool:
        """Retry, or redrive where it is a dead letter; whether a new generation has begun."""
        verb, path = "retry", f"{JOBS}/{job_id}/retry"
        if (told.get("error") or {}).get("code") == "too_many_starts":
            await self._note_letters()
            if chance.random() < 0.7:
                verb, path = "redrive", REDRIVE.format(job_id=job_id)
        await self._client.ledger.write("asks", job=job_id, verb=verb, generation=told["generation"])
        answer = await self._client.insist("POST", path)
        if answer is not None and answer.status == 404 and verb == "redrive":
            answer = await self._client.insist("POST", f"{JOBS}/{job_id}/retry")
        if answer is None:
            return False
        await self._client.ledger.write("person", job=job_id, verb=verb, code=answer.status,
                                        generation=told["generation"])  # fmt: skip
        if answer.status != 409:
            return answer.status in (200, 202)
        # An earlier request whose answer was lost has done it already, or nobody may.
        now = await self._client.poll(job_id)
        return now is not None and now["generation"] > told["generation"]
