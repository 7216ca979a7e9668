"""One run: the fleet, its jobs, the faults, and the audit of what is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.chaos.audit import Verdict, audit
from tests.chaos.busy import Busy
from tests.chaos.clients import Client
from tests.chaos.collecting import Collector, recovery_ms
from tests.chaos.evidence import Evidence
from tests.chaos.faults import Faults
from tests.chaos.fleet import Fleet, running_fleet, settings_for
from tests.chaos.ledger import Ledger, entries
from tests.chaos.lives import Lives
from tests.chaos.points import API_POINTS, BEYOND_PROTOCOL, POINTS
from tests.chaos.schedule import Fault, Shape, schedule
from tests.chaos.workload import JobPlan, RawMessage, raw_messages, workload
from toolfleet.bootstrap import open_core
from toolfleet.services.background_jobs.task_models import new_job_id

WORKER_POINTS: Final = tuple(name for name in POINTS if name not in API_POINTS)
LIVING_AT_ONCE: Final = 400
"""Jobs that clients look after at once; those beyond it are submitted later than planned."""
FEW_CANCELS: Final = 20
"""Below this many undisturbed receipts a 99th percentile says nothing."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is."""

    seed: int
    jobs: int
    seconds: float
    scale: float
    """Of leases and faults; 1 for those of production."""
    workers: dict[str, int] = field(default_factory=lambda: {"high": 1, "normal": 2, "low": 1})
    apis: int = 2
    broken: str | None = None
    max_starts: int = 3
    faults: bool = True

    @property
    def quiet_within_s(self) -> float:
        """How long after the last fault everything may take to end: retries, leases, the reconciler's second look."""
        return 90 + 300 * self.scale + self.jobs / 20


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run."""

    verdict: Verdict
    figures: dict[str, Any]
    """The last line of the output."""
    evidence: Evidence


def shape_of(options: Options, consul: bool) -> Shape:
    """What of the fleet can be hurt."""
    return Shape(
        tuple(f"{tier}-{n}" for tier, count in options.workers.items() for n in range(1, count + 1)),
        tuple(f"api-{n}" for n in range(1, options.apis + 1)),
        consul,
        WORKER_POINTS,
        API_POINTS,
        BEYOND_PROTOCOL,
    )


async def run(options: Options, folder: Path) -> Report:
    """Run it and audit it; everything lies in `folder` afterwards and nothing runs any more."""
    fleet_context = running_fleet(
        folder,
        scale=options.scale,
        workers=options.workers,
        apis=options.apis,
        broken=options.broken,
        max_starts=options.max_starts,
    )
    async with fleet_context as fleet:
        ledger = Ledger(folder / "clients.jsonl")
        faults = Faults(fleet, ledger, settings_for(options.scale)["drain_timeout"])
        busy = Busy()
        client = Client(
            list(fleet.api_ports.values()),
            ledger,
            options.seed,
            lambda since: faults.touched(since, "redis", "api", *TIERS) or busy.since(since),
        )
        async with (
            contextlib.aclosing(ledger),
            open_core(fleet.direct_settings(), name="chaos-audit", prepare=False) as core,
        ):
            collector = Collector(core, folder / "letters.jsonl")
            malformed = await _play(options, fleet, faults, client, collector, busy)
            evidence = await collector.evidence(
                plans=_plans(options), views=list(entries(folder / "clients.jsonl")),
                effects=list(entries(fleet.effects)), malformed=malformed, max_starts=options.max_starts,
                wrong=client.tally.wrong, silent=client.tally.silent, bad_exits=faults.damage.bad_exits,
                terms=sum(n for kind, n in faults.damage.by_kind.items() if kind.endswith("_term")),
                calm_cancel_p99_ms=_p99([ms for ms, calm in client.tally.cancels_ms if calm], FEW_CANCELS),
            )  # fmt: skip
    verdict = audit(evidence)
    return Report(verdict, _figures(options, verdict, faults, client, evidence, busy), evidence)


TIERS: Final = ("high", "normal", "low")


def _plans(options: Options) -> list[JobPlan]:
    return workload(options.seed, options.jobs, options.seconds, options.scale)


# -- the run ---------------------------------------------------------------------------------------------------


async def _play(
    options: Options, fleet: Fleet, faults: Faults, client: Client, collector: Collector, busy: Busy
) -> tuple[str, ...]:
    """Jobs, faults and raw messages side by side, then healing and quiet; the malformed payloads that were stored."""
    lives = Lives(client, options.seed, collector.note_letters)
    planned = schedule(options.seed, options.seconds, options.scale, shape_of(options, fleet.consul is not None))
    raw = raw_messages(options.seed, options.jobs, options.seconds)
    began = time.monotonic()
    async with _background(faults.watch(), collector.keep_noting(), busy.watch()):
        jobs = asyncio.create_task(_submit_all(_plans(options), lives, began), name="jobs")
        others = [asyncio.create_task(_publish(message, collector, began)) for message in raw]
        if options.faults:
            others += [asyncio.create_task(_fault(fault, faults, began)) for fault in planned]
        try:
            stored = [payload for payload in await asyncio.gather(*others) if payload]
            await faults.heal()
            await _quiet(options, lives, jobs, collector, client)
        finally:
            client.over.set()
            for task in others:
                task.cancel()
            await asyncio.wait([jobs, *others], timeout=60)
            jobs.cancel()
        await collector.note_letters()
    return tuple(stored)


@contextlib.asynccontextmanager
async def _background(*loops: Any) -> AsyncIterator[None]:
    """Loops that end with the context. A loop that breaks ends the run."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop) for loop in loops]
        yield
        for task in tasks:
            task.cancel()


async def _until(began: float, at_s: float) -> None:
    await asyncio.sleep(max(0, began + at_s - time.monotonic()))


async def _submit_all(plans: list[JobPlan], lives: Lives, began: float) -> None:
    slots = asyncio.Semaphore(LIVING_AT_ONCE)

    async def live(plan: JobPlan) -> None:
        try:
            await lives.live(plan)
        finally:
            slots.release()

    async with asyncio.TaskGroup() as group:
        for plan in plans:
            await _until(began, plan.at_s)
            await slots.acquire()
            group.create_task(live(plan), name=f"job-{plan.number}")


async def _fault(fault: Fault, faults: Faults, began: float) -> None:
    await _until(began, fault.at_s)
    await faults.carry_out(fault)


async def _publish(message: RawMessage, collector: Collector, began: float) -> str | None:
    await _until(began, message.at_s)
    return message.payload if await collector.publish_raw(message.tier, new_job_id(), message.payload) else None


async def _quiet(
    options: Options, lives: Lives, jobs: asyncio.Task[None], collector: Collector, client: Client
) -> None:
    """Until every job has been lived through and nothing is left in stream and store; what is not within the bound
    is noted."""
    deadline = time.monotonic() + options.quiet_within_s
    while time.monotonic() < deadline:
        if jobs.done():
            jobs.result()
            if await collector.is_quiet():
                return
        await asyncio.sleep(0.2)
    bound = f"within {options.quiet_within_s:.0f} s of the last fault"
    client.tally.silent += [
        f"the clients of job {number} came to no end {bound}" for number in sorted(lives.unfinished)
    ]


# -- the figures -----------------------------------------------------------------------------------------------


def _p99(values: list[float], least: int = 2) -> float | None:
    if len(values) < least:
        return None
    return round(statistics.quantiles(values, n=100, method="inclusive")[98], 1)


def _figures(
    options: Options, verdict: Verdict, faults: Faults, client: Client, evidence: Evidence, busy: Busy
) -> dict[str, Any]:
    damage = faults.damage
    receipts = [ms for ms, _ in client.tally.cancels_ms]
    calm = [ms for ms, undisturbed in client.tally.cancels_ms if undisturbed]
    return {
        "accepted": verdict.accepted,
        "terminal": verdict.terminal,
        **verdict.figures,
        "kills": damage.kills,
        "restarts": damage.restarts,
        "cuts": damage.cuts,
        "faults": dict(sorted(damage.by_kind.items())),
        "points_hit": dict(sorted(damage.points_hit.items())),
        "ended_by_themselves": damage.ended_by_themselves,
        "busy_share": busy.share,
        "statuses": evidence.statuses(),
        "failures": evidence.failures(),
        "effects": len(evidence.effects),
        "events_seen": verdict.checked["G7"],
        "cancels": len(receipts),
        "cancel_p50_ms": round(statistics.median(receipts), 1) if receipts else None,
        "cancel_p99_ms": _p99(receipts),
        "calm_cancels": len(calm),
        "calm_cancel_p99_ms": _p99(calm),
        "recovery_ms": recovery_ms(damage.healed_at, evidence),
        "seed": options.seed,
        "jobs": options.jobs,
        "seconds": options.seconds,
        "scale": options.scale,
    }


def last_line(report: Report) -> str:
    """The figures as one line of JSON."""
    return json.dumps(report.figures)
