"""Clients of the jobs API: they submit, look at what they have submitted, cancel some, and note what they were told."""

from __future__ import annotations

import asyncio
import uuid

import httpx

from tests.powercut.audit import TERMINAL
from tests.powercut.ledger import Ledger
from tests.powercut.plan import Plan

JOBS = "/api/v1/jobs"
CLIENTS = 24
_PAUSE_S = 0.05
"""Before a client that was refused tries again."""


class Load:
    """Clients that go on until they are stopped."""

    def __init__(self, url: str, plan: Plan, ledger: Ledger, jobs: int) -> None:
        """`enough` is set when `jobs` of them are acknowledged."""
        self._url = url
        self._plan = plan
        self._ledger = ledger
        self._wanted = jobs
        self.accepted: list[str] = []
        self.enough = asyncio.Event()
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Until `stop`."""
        async with httpx.AsyncClient(base_url=self._url, timeout=5) as client, asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(client))

    def stop(self) -> None:
        """After the request at hand, which may never be answered."""
        self._stop.set()

    async def _client(self, client: httpx.AsyncClient) -> None:
        while not self._stop.is_set():
            try:
                await self._submit(client)
                await self._look(client)
            except httpx.HTTPError:
                # The machine is without power, or about to be: what was not answered was not acknowledged.
                await asyncio.sleep(_PAUSE_S)

    async def _submit(self, client: httpx.AsyncClient) -> None:
        body, key = self._plan.next(), uuid.uuid4().hex
        answer = await client.post(JOBS, json=body, headers={"Idempotency-Key": key})
        if answer.status_code != httpx.codes.ACCEPTED:
            await asyncio.sleep(_PAUSE_S)
            return
        job_id = answer.json()["job_id"]
        self._ledger.note("accepted", job_id)
        self.accepted.append(job_id)
        if len(self.accepted) >= self._wanted:
            self.enough.set()

    async def _look(self, client: httpx.AsyncClient) -> None:
        if not self.accepted:
            return
        job_id = self._plan.choice(self.accepted)
        if self._plan.cancels():
            await client.post(f"{JOBS}/{job_id}/cancel")
        answer = await client.get(f"{JOBS}/{job_id}")
        if answer.status_code == httpx.codes.OK and (status := answer.json()["status"]) in TERMINAL:
            self._ledger.note("seen", job_id, status=status, by="client")
