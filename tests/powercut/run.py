"""One run: load, cut, power, recovery, audit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tests.powercut.audit import TERMINAL, Figures, Found, audit
from tests.powercut.child import text_of
from tests.powercut.ledger import Ledger, read_ledgers
from tests.powercut.load import Load
from tests.powercut.machine import Machine
from tests.powercut.plan import Plan
from tests.powercut.servers import CONTROL
from toolfleet.bootstrap import Core, open_core
from toolfleet.services.background_jobs.ports import JobStore
from toolfleet.services.embedded.errors import ServerStartFailed
from toolfleet.settings import Settings

LOAD_S: Final = 600
"""For the jobs to be acknowledged."""
RECOVERY_S: Final = 120
"""For all of them to end after the power is back: a job whose message is gone waits 10 s for the reconciler, one
that runs for its lease, and a backlog for its turn."""
ACKS_S: Final = 15
"""For the stream to be empty after that."""
_AT_ONCE: Final = 100
_LOOK_AGAIN_S: Final = 0.5


async def run(settings: str, folder: Path, *, jobs: int, seed: int) -> tuple[Figures, list[str]]:
    """Figures, and what else there is to say.

    Raises:
        DeviceFailed, ServerStartFailed: the disk or a server did not survive the cut.
        TimeoutError: the jobs were not accepted in time.
    """
    machine = Machine(settings, folder)
    machine.device.make()
    machine.device.mount()
    try:
        await machine.start_servers()
        await machine.start_fleet()
        machine.device.settle()
        load = Load(machine.url, Plan(seed), Ledger(machine.ledgers / "clients.jsonl"), jobs)
        began = time.monotonic()
        clients = asyncio.create_task(load.run())
        try:
            async with asyncio.timeout(LOAD_S):
                await load.enough.wait()
            rate = jobs / (time.monotonic() - began)
            cut_at = await machine.cut()
        finally:
            load.stop()
            await clients
        machine.plug_in()
        notes = [f"{rate:.0f} jobs/s accepted"]
        found: dict[str, Found] = {}
        try:
            await machine.start_servers()
        except ServerStartFailed as error:
            if settings != CONTROL:
                raise
            notes.append(f"a server can't live with what is left on its disk: {error}")
        else:
            found = await recover(machine, load.accepted, notes, accept=settings == CONTROL)
    finally:
        await machine.kill()
        if machine.device.mount_point.is_mount():
            machine.device.unmount()
    return audit(read_ledgers(machine.ledgers), found, cut_at=cut_at), notes


async def recover(machine: Machine, accepted: list[str], notes: list[str], *, accept: bool) -> dict[str, Found]:
    """The jobs once the fleet has done what there is to do. `accept` says that the streams may be gone."""
    if accept and await accept_stream(machine.settings):
        notes.append("the stream was gone and its place was taken by an empty one, as by doctor --accept-stream")
    await machine.start_fleet()
    began = time.monotonic()
    found, left = await look_after(machine.settings, accepted)
    notes.append(f"all that was left ended {time.monotonic() - began:.1f} s after the power was back")
    notes.append(f"{left} messages left in the stream")
    return found


async def accept_stream(settings: Settings) -> bool:
    """What a person does where the stream is gone; whether it was. With our settings nobody has to."""
    async with open_core(settings, name="powercut", prepare=False) as core:
        created, _ = await core.queue.ensure()
        known = await core.store.stream_identity(core.queue.names.tasks, created)
        await core.store.adopt_stream(core.queue.names.tasks, created)
        return known != created


async def look_after(settings: Settings, accepted: Iterable[str]) -> tuple[dict[str, Found], int]:
    """Each job once it is over, or as it stands when nothing more is to be expected; and the messages that still stand
    in the stream then."""
    waiting = list(accepted)
    found: dict[str, Found] = {}
    async with open_core(settings, name="powercut", prepare=False) as core:
        deadline = time.monotonic() + RECOVERY_S
        while waiting and time.monotonic() < deadline:
            for start in range(0, len(waiting), _AT_ONCE):
                batch = waiting[start : start + _AT_ONCE]
                found.update(zip(batch, await asyncio.gather(*(_look(core.store, job) for job in batch)), strict=True))
            waiting = [job for job in waiting if found[job].status not in TERMINAL]
            if waiting and await _nowhere(core, waiting):
                break
            await asyncio.sleep(_LOOK_AGAIN_S)
        # The last acks are on their way; those that got lost in the cut come again after the ack wait.
        until = time.monotonic() + ACKS_S
        while (left := (await core.queue.stats()).messages) and time.monotonic() < until:
            await asyncio.sleep(_LOOK_AGAIN_S)
    return found, left


async def _nowhere(core: Core, jobs: list[str]) -> bool:
    """Whether neither stream nor store knows any of them: the control's losses need not be waited for."""
    for job in jobs:
        if await core.store.get(job) is not None or await core.queue.stands(job):
            return False
    return True


async def _look(store: JobStore, job: str) -> Found:
    record = await store.get(job)
    if record is None:
        return Found(None)
    results = await store.results(job) if record.status.terminal else {}
    return Found(record.status.value, {call: text_of(result) for call, result in results.items()})
