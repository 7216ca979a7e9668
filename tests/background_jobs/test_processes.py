"""Real worker processes that are killed, stopped and told to leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.background_jobs import worker_main
from tests.background_jobs.harness import job
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_service
from toolfleet.services.background_jobs import loop_watchdog
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.nats_task_queue import NatsTaskQueue
from toolfleet.services.background_jobs.task_models import JobRecord, Status
from toolfleet.settings import Settings

SHORT: dict[str, Any] = {"lease": 1.0, "ack_wait": 1.0, "recovery_check_interval": 0.5, "max_starts": 2}
ROOT = Path(__file__).parents[2]


@dataclass
class Fleet:
    """Worker processes, their ledger, and a service to submit and watch."""

    settings: Settings
    service: JobService
    queue: NatsTaskQueue
    folder: Path
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    @property
    def gate(self) -> Path:
        """What `hold` waits for."""
        return self.folder / "gate"

    async def start(self, *, lives: bool = True, **overrides: Any) -> asyncio.subprocess.Process:
        """A worker that is ready for jobs; or one that may have died before anybody knew."""
        name = f"w{len(self.processes) + 1}"
        values = self.settings.model_dump(include=set(SHORT) | NAMED) | {"worker_name": name} | overrides
        for secret in ("nats_url", "redis_url"):
            values[secret] = values[secret].get_secret_value()
        told = {"settings": values, "tier": "normal", "ledger": str(self.folder / "ledger")}
        with (self.folder / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", worker_main.__name__, json.dumps(told), cwd=ROOT, stdout=log, stderr=log
            )
        self.processes.append(process)

        if not lives:
            return process

        async def ready() -> bool:
            assert process.returncode is None, (self.folder / f"{name}.log").read_text()
            return any(worker.pid == process.pid for worker in await self.service.workers())

        await wait_until(ready, f"{name} is ready", timeout=30)
        return process

    async def says(self, number: int, what: str) -> None:
        log = self.folder / f"w{number}.log"
        await wait_until(lambda: what in log.read_text(), f"w{number} says {what}")

    async def submit(self, *tools: str, **fields: Any) -> str:
        return (await self.service.submit(job(*((t, {"until": str(self.gate)}) for t in tools), **fields))).job_id

    async def over(self, job_id: str) -> JobRecord:
        async with asyncio.timeout(30):
            record = await self.service.wait_until_over(job_id)

        async def acked() -> bool:
            return not await self.queue.stands(job_id)

        await wait_until(acked, "its message is acked")
        return record

    async def record(self, job_id: str) -> JobRecord:
        record = (await self.service.get(job_id)).record
        assert record is not None
        return record

    def ledger(self) -> list[str]:
        """Lines without the process id."""
        with contextlib.suppress(FileNotFoundError):
            return [line.rpartition(" ")[0] for line in (self.folder / "ledger").read_text().splitlines()]
        return []

    async def noted(self, line: str) -> None:
        await wait_until(lambda: line in self.ledger(), f"{line!r} is noted")


NAMED = {
    "nats_url", "redis_url", "stream", "subject_prefix", "dlq_stream", "dlq_subject_prefix", "stream_max_bytes",
    "dlq_max_bytes", "retry_delays", "retry_jitter", "drain_timeout", "concurrency",
}  # fmt: skip


@pytest.fixture
async def fleet(settings: Settings, tmp_path: Path) -> AsyncIterator[Fleet]:
    short = settings.model_copy(update=SHORT)
    async with open_service(short, tools=worker_main.tools(worker_main.Ledger(tmp_path / "unused"))) as wired:
        fleet = Fleet(short, wired.service, wired.core.queue, tmp_path)
        try:
            yield fleet
        finally:
            fleet.gate.touch()
            for process in fleet.processes:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
                await process.wait()


async def exit_code(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(20):
        return await process.wait()


@pytest.mark.promise("G1")
@pytest.mark.promise("G4")
async def test_a_worker_killed_in_the_middle_of_a_call_is_followed_by_another(fleet: Fleet) -> None:
    first = await fleet.start()
    job_id = await fleet.submit("note", "hold")
    await fleet.noted("begin c2 1")

    async def stored() -> bool:
        return (await fleet.record(job_id)).completed_calls == 1

    await wait_until(stored, "the first call's result is stored")
    await fleet.start()
    first.kill()
    fleet.gate.touch()
    record = await fleet.over(job_id)
    assert (record.status, record.starts, record.worker) == (Status.COMPLETED, 2, None)
    assert sorted(fleet.ledger()) == ["begin c1 1", "begin c2 1", "begin c2 2", "end c1 1", "end c2 2"]


@pytest.mark.promise("G5")
async def test_a_call_that_must_not_run_twice_is_started_once_whoever_dies(fleet: Fleet) -> None:
    first = await fleet.start()
    job_id = await fleet.submit("once_die", "note")
    await exit_code(first)
    await fleet.start()
    record = await fleet.over(job_id)
    assert (record.status, record.undecided) == (Status.UNKNOWN, ("c1",))
    assert [line for line in fleet.ledger() if " c1 " in line] == ["begin c1 1"]
    assert any(line.startswith("end c2") for line in fleet.ledger()), "the other call ends first"


@pytest.mark.promise("G9")
async def test_a_job_that_kills_its_workers_ends_as_a_dead_letter(fleet: Fleet) -> None:
    killed = await fleet.submit("die", priority="normal")
    for attempt in (1, 2):
        worker = await fleet.start(lives=False)
        assert await exit_code(worker) == -signal.SIGKILL
        await fleet.noted(f"begin c1 {attempt}")
    await fleet.start()
    for _ in range(3):
        assert (await fleet.over(await fleet.submit("note"))).status is Status.COMPLETED
    record = await fleet.over(killed)
    assert record.error is not None
    assert (record.status, record.error.code) == (Status.FAILED, "too_many_starts")
    (letter,) = (await fleet.service.letters.box.page(0, 10)).entries
    assert (letter.job_id, letter.reason) == (killed, "too_many_starts")
    assert fleet.ledger().count("begin c1 3") == 0


@pytest.mark.promise("G10")
async def test_a_worker_that_is_told_to_leave_ends_what_it_has_and_takes_nothing_new(fleet: Fleet) -> None:
    worker = await fleet.start(drain_timeout=20)
    job_id = await fleet.submit("hold", "once_hold")
    await fleet.noted("begin c1 1")
    await fleet.noted("begin c2 1")
    worker.terminate()
    await fleet.says(1, "worker.draining")
    waiting = await fleet.submit("note")
    fleet.gate.touch()
    assert await exit_code(worker) == 0
    record = await fleet.record(job_id)
    assert (record.status, record.starts) == (Status.COMPLETED, 1)
    assert (await fleet.record(waiting)).starts == 0
    assert await fleet.service.workers() == []
    await fleet.start()
    assert (await fleet.over(waiting)).status is Status.COMPLETED


@pytest.mark.promise("G10")
async def test_what_does_not_end_in_time_is_handed_back_without_counting(fleet: Fleet) -> None:
    worker = await fleet.start(drain_timeout=0.6)
    job_id = await fleet.submit("hold")
    await fleet.noted("begin c1 1")
    worker.terminate()
    assert await exit_code(worker) == 0
    record = await fleet.record(job_id)
    assert (record.status, record.starts, record.retries) == (Status.QUEUED, 0, 0)
    assert fleet.ledger() == ["begin c1 1", "stopped c1 1"]
    fleet.gate.touch()
    await fleet.start()
    record = await fleet.over(job_id)
    assert (record.status, record.starts) == (Status.COMPLETED, 1)


@pytest.mark.promise("G10")
async def test_a_second_signal_ends_a_worker_at_once(fleet: Fleet) -> None:
    worker = await fleet.start(drain_timeout=60)
    job_id = await fleet.submit("hold")
    await fleet.noted("begin c1 1")
    worker.terminate()
    await fleet.says(1, "worker.draining")

    def told_again() -> bool:
        # Not once: what comes within a moment of the first signal counts as the same one.
        with contextlib.suppress(ProcessLookupError):
            worker.send_signal(signal.SIGTERM)
        return worker.returncode is not None

    await wait_until(told_again, "the worker has ended, long before its deadline")
    await fleet.says(1, "worker.forced")
    fleet.gate.touch()
    await fleet.start()
    assert (await fleet.over(job_id)).status is Status.COMPLETED


@pytest.mark.promise("G2")
async def test_a_worker_that_slept_past_its_lease_changes_nothing(fleet: Fleet) -> None:
    sleeper = await fleet.start()
    job_id = await fleet.submit("hold")
    await fleet.noted("begin c1 1")
    os.kill(sleeper.pid, signal.SIGSTOP)
    fleet.gate.touch()
    other = await fleet.start()
    record = await fleet.over(job_id)
    assert (record.status, record.fence) == (Status.COMPLETED, 2)
    results = await fleet.service.results(record)
    assert results["c1"].attempt == 2
    other.terminate()
    assert await exit_code(other) == 0
    os.kill(sleeper.pid, signal.SIGCONT)
    # It is well again, and by the end of another job it has tried whatever it wanted to write.
    assert (await fleet.over(await fleet.submit("note"))).status is Status.COMPLETED
    sleeper.terminate()
    assert await exit_code(sleeper) == 0
    assert await fleet.record(job_id) == record
    assert (await fleet.service.results(record))["c1"].attempt == 2


@pytest.mark.promise("G8")
async def test_a_cancel_reaches_the_tool_in_another_process(fleet: Fleet) -> None:
    await fleet.start(concurrency=1)
    job_id = await fleet.submit("hold")
    await fleet.noted("begin c1 1")
    receipt = await fleet.service.cancel(job_id)
    assert (receipt.outcome, receipt.reached) == ("cancelled", "tool")
    assert fleet.ledger() == ["begin c1 1", "stopped c1 1"]
    assert (await fleet.over(await fleet.submit("note"))).status is Status.COMPLETED


@pytest.mark.promise("G1")
async def test_a_worker_whose_loop_is_blocked_ends_itself_and_says_what_blocks(fleet: Fleet) -> None:
    blocked = await fleet.start(blocked_loop_limit=1.0)
    job_id = await fleet.submit("block")
    await fleet.noted("begin c1 1")
    assert await exit_code(blocked) == loop_watchdog.EXIT_CODE
    log = (fleet.folder / "w1.log").read_text()
    assert "worker.loop_blocked" in log
    assert "in block" in log, "the stack names the tool's function"
    fleet.gate.touch()
    await fleet.start()
    record = await fleet.over(job_id)
    assert (record.status, record.starts) == (Status.COMPLETED, 2)
    assert fleet.ledger() == ["begin c1 1", "begin c1 2", "end c1 2"]


async def test_a_worker_that_was_stopped_for_long_is_not_taken_for_a_blocked_one(fleet: Fleet) -> None:
    worker = await fleet.start(blocked_loop_limit=0.5)
    for _ in range(3):
        os.kill(worker.pid, signal.SIGSTOP)
        over = time.monotonic() + 1.0
        await wait_until(lambda over=over: time.monotonic() > over, "it was stopped for longer than the bound")
        os.kill(worker.pid, signal.SIGCONT)
    assert (await fleet.over(await fleet.submit("note"))).status is Status.COMPLETED
    worker.terminate()
    assert await exit_code(worker) == 0
    assert "worker.loop_blocked" not in (fleet.folder / "w1.log").read_text()
