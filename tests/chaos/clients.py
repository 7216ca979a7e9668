"""Clients over HTTP: they submit, watch, poll, cancel and read, through every death of an API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from tests.chaos.http_client import Answer, Gone, Silent, ask, stream
from tests.chaos.ledger import Ledger
from toolfleet.services.background_jobs.task_models import DEFAULT_TENANT, derived_job_id
from toolfleet.services.embedded.server import HOST

JOBS: Final = "/api/v1/jobs"
PAUSE_S: Final = 0.25
"""Before a client asks again an API that refused it."""
SILENCE_S: Final = 45.0
"""A request of which nothing is heard for so long was never going to be answered (G12); above every bound of ours."""
TERMINAL: Final = frozenset({"completed", "failed", "cancelled", "unknown"})
ENDS: Final = frozenset(f"job.{status}" for status in TERMINAL)

Frame = tuple[int | None, str, dict[str, Any]]
"""Id (None of a `gap`), type and data of an event."""


@dataclass
class Tally:
    """What clients noticed that is no entry of a job."""

    silent: list[str] = field(default_factory=list)
    """Requests without an answer although the API lived."""
    wrong: list[str] = field(default_factory=list)
    """Answers that no client should get, with the promise that they break."""
    answers: Counter[str] = field(default_factory=Counter)
    cancels_ms: list[tuple[float, bool]] = field(default_factory=list)
    """Receipts: milliseconds, and whether the calm was undisturbed."""


class Client:
    """All clients of a run; they share connections as those behind one gateway do."""

    def __init__(self, ports: list[int], ledger: Ledger, seed: int, disturbed: Callable[[float], bool]) -> None:
        """
        Args:
            ports: of the APIs, on 127.0.0.1.
            ledger: gets every view before it is used.
            seed: of which API is asked, and of when streams are dropped.
            disturbed: whether something that a cancel needs was hurt since a time of the monotonic clock.
        """
        self.ledger = ledger
        self.tally = Tally()
        self.over = asyncio.Event()
        """Set at the end of a run: whoever still asks gives up."""
        self._ports = ports
        self._chance = random.Random(f"clients-{seed}")
        self._disturbed = disturbed
        self._streams = 0

    async def close(self) -> None:
        """Whoever still asks gives up."""
        self.over.set()

    async def ask(self, method: str, path: str, **request: Any) -> Answer:
        """One request, at one of the APIs; a 503 counts as an answer. Raises `Gone`."""
        port = self._chance.choice(self._ports)
        answer = await ask(method, HOST, port, path, silence_s=SILENCE_S, **request)
        self.tally.answers[f"{method} {answer.status}"] += 1
        if "json" not in answer.headers.get("content-type", ""):
            text = answer.body[:200].decode(errors="replace")
            self.tally.wrong.append(f"G12 {method} {path} was answered with {answer.status} {text!r}")
            raise Gone(f"no answer of ours: {answer.status}")
        return answer

    async def insist(self, method: str, path: str, **request: Any) -> Answer | None:
        """Ask until there is an answer other than 503 and 429; None where the run is over before."""
        while not self.over.is_set():
            try:
                answer = await self.ask(method, path, **request)
                if answer.status not in (429, 503):
                    return answer
            except Silent:
                self.tally.silent.append(f"{method} {path} had no answer for {SILENCE_S:g} s")
            except Gone:
                pass
            await self._pause()
        return None

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(PAUSE_S * (0.5 + self._chance.random())):
                await self.over.wait()
        except TimeoutError:
            return

    # -- submit ------------------------------------------------------------------------------------------------

    async def submit(self, number: int, body: dict[str, Any], key: str | None, *, gives_up: bool = False) -> str | None:
        """The job's id once it is accepted; None where it is refused for good, or the run is over before.

        Who brought no key asks again only under the key that an answer named: without one the job may stand. Who
        gives up takes a word that nothing was accepted as the last one.
        """
        headers = {"Idempotency-Key": key} if key else {}
        while not self.over.is_set():
            began = time.monotonic()
            try:
                answer = await self.ask("POST", JOBS, body=body, headers=headers)
            except Silent:
                self.tally.silent.append(f"submit of job {number} had no answer for {SILENCE_S:g} s")
                answer = None
            except Gone:
                answer = None
            if answer is None:
                await self.ledger.write("unanswered", n=number)
                if not headers:
                    return None
                await self._pause()
                continue
            told = answer.json()
            if answer.status in (200, 202):
                await self._accepted(number, answer.status, told, answer.headers["idempotency-key"])
                # With queue and store down a synchronous run answers its caller, and nobody else ever knows it.
                unrecorded = answer.status == 200 and told.get("degraded") and told["status"] in TERMINAL
                return None if unrecorded else str(told["job_id"])
            chosen = answer.headers["idempotency-key"]
            await self.ledger.write(
                "refused", n=number, code=answer.status, type=told.get("type"), accepted=told.get("accepted"),
                job=derived_job_id(DEFAULT_TENANT, chosen), ms=round(1000 * (time.monotonic() - began)),
            )  # fmt: skip
            if answer.status not in (429, 503) or (gives_up and told.get("accepted") != "unknown"):
                return None
            headers = {"Idempotency-Key": chosen}
            await self._pause()
        return None

    async def _accepted(self, number: int, code: int, told: dict[str, Any], key: str) -> None:
        await self.ledger.write(
            "accepted", n=number, code=code, job=told["job_id"], key=key, status=told["status"],
            generation=int(told["task_id"].rpartition(":")[2]), degraded=told.get("degraded", False),
            fallback=told.get("fallback_reason"),
        )  # fmt: skip

    # -- read --------------------------------------------------------------------------------------------------

    async def poll(self, job_id: str, wait_s: float = 0) -> dict[str, Any] | None:
        """The job as it stands, held until it changes; None where the run is over before."""
        answer = await self.insist("GET", f"{JOBS}/{job_id}", query={"wait": wait_s} if wait_s else None)
        if answer is None:
            return None
        told: dict[str, Any] = answer.json()
        if answer.status != 200:
            self.tally.wrong.append(f"G1 {job_id}: a poll was answered with {answer.status} {told.get('detail')}")
            return None
        await self.ledger.write("poll", job=job_id, generation=told["generation"], status=told["status"],
                                attempt=told["attempt"])  # fmt: skip
        return told

    async def until_over(self, job_id: str, generation: int = 1) -> dict[str, Any] | None:
        """The job once it has ended in this generation or a later one."""
        while not self.over.is_set():
            told = await self.poll(job_id, wait_s=10)
            if told is None or (told["generation"] >= generation and told["status"] in TERMINAL):
                return told
            await self._pause()
        return None

    async def result(self, job_id: str) -> dict[str, Any] | None:
        """The results of a job that has ended; None where it was opened again meanwhile."""
        answer = await self.insist("GET", f"{JOBS}/{job_id}/result")
        if answer is None or answer.status != 200:
            return None
        told: dict[str, Any] = answer.json()
        calls = {call["tool_call_id"]: [call["status"], call["attempt"]] for call in told["results"]}
        generation = int(told["task_id"].rpartition(":")[2])
        await self.ledger.write("result", job=job_id, generation=generation, status=told["status"], calls=calls)
        return told

    # -- watch -------------------------------------------------------------------------------------------------

    async def watch(self, job_id: str, *, drops: bool, after: int = 0) -> int:
        """Follow the job to the end of its generation, again and again where the stream breaks; the last id seen."""
        self._streams += 1
        who, last = self._streams, after
        while not self.over.is_set():
            headers = {"Last-Event-ID": str(last)} if last else {}
            await self.ledger.write("connect", job=job_id, client=who, after=last)
            keep = self._chance.randint(1, 6) if drops and self._chance.random() < 0.7 else 0
            try:
                async with contextlib.aclosing(self._events(f"{JOBS}/{job_id}/stream", headers)) as events:
                    async for event_id, kind, data in events:
                        await self.ledger.write("event", job=job_id, client=who, id=event_id, type=kind,
                                                attempt=data.get("attempt"), at=data.get("at"))  # fmt: skip
                        last = event_id or last
                        if kind in ENDS:
                            return last
                        keep -= 1
                        if keep == 0:
                            break
            except Silent:
                self.tally.silent.append(f"a stream of {job_id} had no heartbeat for {SILENCE_S:g} s")
            except Gone:
                pass
            except StreamEnded:
                return last
            await self._pause()
        return last

    async def _events(self, path: str, headers: dict[str, str]) -> AsyncGenerator[Frame, None]:
        port = self._chance.choice(self._ports)
        async with stream(HOST, port, path, headers=headers, silence_s=SILENCE_S) as (response, parts):
            self.tally.answers[f"STREAM {response.status}"] += 1
            if response.status == 204:
                raise StreamEnded
            if response.status != 200:
                if response.status != 503:
                    self.tally.wrong.append(f"G7 {path} was answered with {response.status}")
                return
            event_id, kind, data = None, "", ""
            async for line in _lines(parts):
                name, _, value = line.partition(": ")
                if name == "id":
                    event_id = int(value)
                elif name == "event":
                    kind = value
                elif name == "data":
                    data = value
                elif not line and kind:
                    yield event_id, kind, json.loads(data)
                    event_id, kind, data = None, "", ""

    # -- change ------------------------------------------------------------------------------------------------

    async def cancel(self, job_id: str) -> None:
        """Cancel it, once; the receipt's latency is that of the request that was answered."""
        while not self.over.is_set():
            began = time.monotonic()
            try:
                answer = await self.ask("POST", f"{JOBS}/{job_id}/cancel", body={"reason": "chaos"})
            except Gone:
                answer = None
            if answer is not None and answer.status != 503:
                spent = 1000 * (time.monotonic() - began)
                told = answer.json()
                calm = not self._disturbed(began)
                self.tally.cancels_ms.append((spent, calm))
                await self.ledger.write("cancel", job=job_id, code=answer.status, outcome=told.get("outcome"),
                                        reached=told.get("reached"), ms=round(spent, 1), calm=calm)  # fmt: skip
                if answer.status not in (200, 202, 409):
                    self.tally.wrong.append(f"G8 {job_id}: a cancel was answered with {answer.status} {told}")
                return
            await self._pause()


async def _lines(parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[str, None]:
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode()


class StreamEnded(Exception):
    """The job has ended and this client has its last event (204)."""
