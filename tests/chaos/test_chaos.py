"""A short run of the chaos driver, and that a seed makes the same run again."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.audit import MUST_BE_ZERO, lines
from tests.chaos.driver import Options, last_line, run, shape_of
from tests.chaos.schedule import Shape, schedule
from tests.chaos.workload import raw_messages, workload
from tests.support.waiting import wait_until

SHORT = Options(
    seed=11, jobs=60, seconds=8, scale=0.05, workers={"high": 1, "normal": 1, "low": 1}, apis=1, max_starts=2
)
"""About half a minute where the machine has time for it."""
BOUND_S = 85
SHAPE = shape_of(Options(seed=0, jobs=0, seconds=0, scale=1), consul=True)


def test_a_seed_makes_the_same_schedule() -> None:
    assert schedule(5, 60, 0.07, SHAPE) == schedule(5, 60, 0.07, SHAPE)
    assert schedule(5, 60, 0.07, SHAPE) != schedule(6, 60, 0.07, SHAPE)


def test_a_seed_makes_the_same_jobs() -> None:
    assert workload(5, 300, 60, 0.07) == workload(5, 300, 60, 0.07)
    assert workload(5, 300, 60, 0.07) != workload(6, 300, 60, 0.07)
    assert raw_messages(5, 300, 60) == raw_messages(5, 300, 60)


def test_a_long_schedule_has_every_kind_of_fault_and_never_two_at_once_on_one_target() -> None:
    faults = schedule(1, 900, 1, SHAPE)
    assert len({fault.kind for fault in faults}) == 24
    for target in {fault.target for fault in faults}:
        of_it = [fault for fault in faults if fault.target == target]
        assert all(a.at_s + a.duration_s < b.at_s for a, b in itertools.pairwise(of_it))


def test_a_tier_keeps_a_worker_that_nobody_hurts() -> None:
    for seed in range(50):
        faults = schedule(seed, 120, 0.2, SHAPE)
        hurt = [fault for fault in faults if fault.target in ("normal-1", "normal-2")]
        for a, b in itertools.pairwise(hurt):
            assert a.target == b.target or a.at_s + a.duration_s < b.at_s


def test_what_is_not_there_is_not_hurt() -> None:
    faults = schedule(1, 900, 1, Shape(("low-1",), ("api-1",), consul=False))
    assert {fault.kind for fault in faults}.isdisjoint({"consul_kill", "point", "api_point"})


def test_the_jobs_are_of_every_kind() -> None:
    plans = workload(1, 1000, 60, 0.07)
    assert {plan.kind for plan in plans} >= {"short", "long", "many", "refused", "hang", "flood", "once", "poison"}
    for wanted in ("twins", "again_after_s", "conflict", "watchers", "polls", "cancel_after_s", "person", "gives_up"):
        assert any(getattr(plan, wanted) for plan in plans), wanted
    assert any(plan.key is None for plan in plans)


@pytest.mark.timeout(BOUND_S + 20)
async def test_a_short_run_keeps_every_promise(tmp_path: Path) -> None:
    async with asyncio.timeout(BOUND_S):
        report = await run(SHORT, tmp_path)
    assert report.verdict.passed, "\n".join(lines(report.verdict))
    told = json.loads(last_line(report))
    assert told["accepted"] == told["terminal"] > 50
    assert all(told[name] == 0 for name in MUST_BE_ZERO)
    assert told["kills"] > 0
    assert told["restarts"] > 0
    assert told["cuts"] > 0
    unlooked = [name for name in ("G1", "G2", "G3", "G4", "G5", "G6", "G7", "G8") if not report.verdict.checked[name]]
    assert unlooked == []


@pytest.mark.timeout(BOUND_S + 20)
async def test_a_run_that_is_interrupted_leaves_no_process(tmp_path: Path) -> None:
    running = asyncio.create_task(run(replace(SHORT, seconds=60), tmp_path))
    await wait_until((tmp_path / "high-1.pid").exists, "the workers are being started", 60)
    running.cancel()
    await asyncio.wait([running], timeout=60)
    assert running.cancelled()
    named = str(tmp_path).encode()
    alive = [entry.name for entry in Path("/proc").glob("[0-9]*/cmdline") if named in entry.read_bytes()]
    assert alive == []
