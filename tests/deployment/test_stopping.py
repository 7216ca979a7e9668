"""manage_workers.sh ends workers: with their jobs, within a bound, and it shows how they are."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.deployment.fleet import MANAGE, Fleet, is_alive
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_service
from toolfleet.services.background_jobs.job_request import NewJob
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.task_models import Status


@pytest.fixture
async def service(fleet: Fleet) -> AsyncIterator[JobService]:
    async with open_service(fleet.settings) as wired:
        yield wired.service


async def submit(service: JobService, tool: str, **arguments: str) -> str:
    new = NewJob.model_validate({"tools": [{"tool_name": tool, "tool_args": arguments}]})
    return (await service.submit(new)).job_id


async def test_jobs_are_counted_and_drain_waits_for_them(fleet: Fleet, service: JobService) -> None:
    await fleet.started()
    gate = fleet.folder / "gate"
    await submit(service, "echo", text="hello")
    waits = await submit(service, "wait_for", path=str(gate))

    async def worker() -> dict[str, Any]:
        return (await fleet.status())[1]["normal-1"]

    async def both_are_counted() -> bool:
        shown = await worker()
        return (shown["in_flight"], shown["done"]) == (1, 1)

    await wait_until(both_are_counted, "one job is in flight and one is done", timeout=20)
    row = next(line for line in (await fleet.manage("status")).lines if " normal-1 " in line)
    assert row.split()[4:6] == ["1", "1"]

    for _ in range(2):  # a second SIGTERM would end the worker at once
        short = await fleet.manage("drain", "--timeout", "1")
        assert short.code == 1
        assert "waiting for normal-1 (1 in flight)" in short.out
        assert "still runs after 1 s (1 in flight)" in short.err
    assert (await worker())["state"] == "draining"
    started = await fleet.manage("start")
    assert started.code == 1
    assert "normal-1 still drains" in started.err
    gate.touch()
    drained = await fleet.manage("drain", "normal")
    assert drained.code == 0
    assert "normal-1 stopped" in drained.out
    record = (await service.get(waits)).record
    assert record is not None
    assert record.status is Status.COMPLETED
    assert fleet.pids() == {}


async def test_a_worker_that_does_not_end_is_killed_at_the_deadline(fleet: Fleet) -> None:
    fleet.extra = {"TOOLFLEET_DRAIN_TIMEOUT": "0.5", "WORKER_KILL_MARGIN": "0"}
    pid = (await fleet.started(WORKER_COUNT_HIGH="1"))["normal-1"]
    os.kill(pid, signal.SIGSTOP)
    waited = await fleet.manage("drain", "normal", "--timeout=1")
    assert waited.code == 1
    assert is_alive(pid)
    stopped = await fleet.manage("stop")
    assert stopped.code == 0
    assert f"normal-1 (pid {pid}) has not ended within 1 s: SIGKILL" in stopped.err
    assert "high-1 (pid" not in stopped.err
    assert "high-1 stopped" in stopped.out
    assert "normal-1 stopped" in stopped.out
    # The 5 s that are waited after the SIGKILL are not announced as the time before one.
    announced = [line for line in stopped.out.splitlines() if "left before SIGKILL" in line]
    assert all(line.split("; ")[-1].split()[0] in ("0", "1") for line in announced), announced
    assert fleet.processes() == {}


async def test_status_tells_dead_stopped_and_silent_workers_apart(fleet: Fleet) -> None:
    pids = await fleet.started(WORKER_COUNT_HIGH="1", WORKER_COUNT_NORMAL="2", WORKER_COUNT_LOW="1")
    os.kill(pids["normal-1"], signal.SIGKILL)
    os.kill(pids["normal-2"], signal.SIGTERM)
    os.kill(pids["low-1"], signal.SIGSTOP)
    await wait_until(lambda: not is_alive(pids["normal-1"]) and not is_alive(pids["normal-2"]), "both have ended")
    said = fleet.state_dir / "low-1.status.json"
    report = json.loads(said.read_text())
    said.write_text(json.dumps(report | {"heartbeat_at": report["heartbeat_at"] - 60_000}))
    code, workers = await fleet.status()
    assert code == 1
    assert {name: (worker["state"], worker["stale"]) for name, worker in workers.items()} == {
        "high-1": ("running", False),
        "normal-1": ("dead", False),
        "normal-2": ("stopped", False),
        "low-1": ("running", True),
    }
    assert workers["low-1"]["heartbeat_age_s"] >= 60
    table = await fleet.manage("status")
    assert table.code == 1
    assert "(stale)" in next(line for line in table.lines if " low-1 " in line)
    assert "normal-1 died without being stopped" in table.out
    assert "normal-2 ended in order" in table.out
    assert table.lines[-1] == "2 of 4 run"


async def test_logs_of_one_and_of_all(fleet: Fleet) -> None:
    fleet.state_dir.mkdir()
    for name in ("high-1", "normal-1"):
        (fleet.state_dir / f"{name}.log").write_text("".join(f"{name} line {number}\n" for number in range(100)))
    one = await fleet.manage("logs", "high-1", "-n", "2")
    assert one.lines == ["high-1 line 98", "high-1 line 99"]
    every = await fleet.manage("logs", "-n", "1")
    assert "high-1 line 99" in every.lines
    assert "normal-1 line 99" in every.lines
    assert len((await fleet.manage("logs", "high")).lines) == 50
    none = await fleet.manage("logs", "low")
    assert none.code == 1
    assert "there is no log of low" in none.err


async def test_logs_can_be_followed(fleet: Fleet) -> None:
    fleet.state_dir.mkdir()
    log = fleet.state_dir / "high-1.log"
    log.write_text("before\n")
    process = await asyncio.create_subprocess_exec(
        MANAGE, "logs", "high-1", "-f", env=fleet.env(), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"before\n"
            with log.open("a") as more:
                more.write("after\n")
            assert await process.stdout.readline() == b"after\n"
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["begin"],
        ["start", "middle"],
        ["start", "normal-0"],
        ["start", "high-1"],
        ["start", "high", "low"],
        ["stop", "--force"],
        ["status", "high"],
        ["logs", "-n"],
        ["logs", "-n", "many"],
        ["drain", "--timeout", "soon"],
    ],
    ids=" ".join,
)
async def test_wrong_usage(fleet: Fleet, words: list[str]) -> None:
    ran = await fleet.manage(*words)
    assert (ran.code, ran.out) == (2, "")
    assert "usage: manage_workers.sh" in ran.err


@pytest.mark.parametrize(
    ("variable", "value"),
    [("WORKER_COUNT_HIGH", "-1"), ("WORKER_COUNT_LOW", "two"), ("TOOLFLEET_DRAIN_TIMEOUT", "soon")],
)
async def test_a_setting_that_is_no_number_is_named(fleet: Fleet, variable: str, value: str) -> None:
    ran = await fleet.manage("status", **{variable: value})
    assert ran.code == 2
    assert f"{variable} is '{value}'" in ran.err


async def test_help(fleet: Fleet) -> None:
    for words in (["help"], ["--help"], ["stop", "--help"]):
        ran = await fleet.manage(*words)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith("usage: manage_workers.sh")
