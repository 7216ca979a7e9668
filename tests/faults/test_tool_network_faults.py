"""What calls come through while the network between a worker and an HTTP tool server is cut, reset or slow.

One server is offered twice, behind one proxy: what `again` offers may run twice, what `once` offers must not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SettingsFactory
from tests.faults import unruly_server
from tests.faults.scene import BOUND_S, CUTS, LEASE_S, Watcher
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_service, open_worker
from toolfleet.services.background_jobs.job_request import NewJob
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.task_models import JobRecord, Status, Tier
from toolfleet.services.embedded.server import HOST

ROOT = Path(__file__).parents[2]
SHORT_S = 1.0
"""The time of a call, where a cut lasts longer."""


@dataclass
class ToolNetwork:
    """A tool server behind a proxy, a worker that calls it, and what was submitted."""

    proxy: TcpProxy
    service: JobService
    notes: Path
    gate: Path
    """The file that `late` waits for."""
    watchers: dict[str, Watcher] = field(default_factory=dict)
    watching: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    async def submit(self, name: str, tool: str, **fields: Any) -> None:
        """A job of one call, ``again/…`` or ``once/…``."""
        arguments = {"name": name, "until": str(self.gate)}
        call = {"tool_name": tool, "tool_args": arguments, "tool_call_id": name}
        new = NewJob.model_validate({"tools": [call]} | fields)
        self.watchers[name] = Watcher((await self.service.submit(new)).job_id)
        self.watching[name] = asyncio.create_task(self.watchers[name].watch(self.service), name=f"watcher of {name}")

    def calls(self, name: str) -> int:
        """How often the call of this job has reached the server."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [(tool != "answered", told["name"]) for tool, told, _ in map(json.loads, lines)].count((True, name))

    async def reached(self, *names: str) -> None:
        await wait_until(lambda: all(self.calls(name) for name in names), f"{names} have reached the server")

    async def over(self, *names: str) -> dict[str, JobRecord]:
        """These jobs, or all, once they have ended; no stream lacks an event or has one twice."""
        records = {}
        for name in names or self.watchers:
            async with asyncio.timeout(BOUND_S):
                await self.watching[name]
                record = await self.service.wait_until_over(self.watchers[name].job_id)
            told = [event.id for event in self.watchers[name].events]
            assert told == list(range(1, record.last_event + 1)), f"{name} was told {self.watchers[name].events}"
            if name.startswith("once"):
                assert self.calls(name) <= 1, f"{name} ran more than once"
            records[name] = record
        return records

    async def works_again(self, name: str = "fresh") -> None:
        """New calls of both kinds end well, at the first try."""
        await self.submit(name, "again/echo")
        await self.submit(f"once_{name}", "once/echo")
        for each, record in (await self.over(name, f"once_{name}")).items():
            assert (record.status, record.retries, self.calls(each)) == (Status.COMPLETED, 0, 1), record.error


@contextlib.asynccontextmanager
async def tool_server(notes: Path) -> AsyncIterator[int]:
    """A server over HTTP; its port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", unruly_server.__name__, "http", str(notes), "0", cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        yield int(await process.stdout.readline())
    finally:
        process.kill()
        await process.wait()


@pytest.fixture
def call_timeout() -> float:
    """Of the worker's calls, in seconds: longer than any fault."""
    return 60.0


@pytest.fixture
async def network(
    make_settings: SettingsFactory, nats_url: str, redis_url: str, tmp_path: Path, call_timeout: float
) -> AsyncIterator[ToolNetwork]:
    async with contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(tool_server(tmp_path / "notes"))
        proxy = await stack.enter_async_context(TcpProxy(HOST, port))
        stack.callback(proxy.normal)
        entry = {"url": f"http://{proxy.host}:{proxy.port}/mcp"}
        config = tmp_path / "mcp.json"
        config.write_text(json.dumps({"mcpServers": {"again": entry, "once": entry}}))
        settings = make_settings(
            nats_url=nats_url,
            redis_url=redis_url,
            mcp_config=config,
            tool_policy={"again/*": "repeatable", "once/*": "once"},
            call_timeout=call_timeout,
            retry_delays=(0.1,),
            retry_jitter=0.0,
        )
        wired = await stack.enter_async_context(open_service(settings))
        worker = await stack.enter_async_context(open_worker(settings, Tier.NORMAL))
        running = asyncio.create_task(worker.run(), name="worker")
        network = ToolNetwork(proxy, wired.service, tmp_path / "notes", tmp_path / "gate")
        try:
            yield network
        finally:
            network.gate.touch()
            worker.stop()
            for watching in network.watching.values():
                watching.cancel()
            await asyncio.gather(*network.watching.values(), return_exceptions=True)
            async with asyncio.timeout(BOUND_S):
                assert await running == 0


async def _nothing_ends(network: ToolNetwork, names: Sequence[str]) -> None:
    """Not in a lease, where an untouched network would have brought the answers at once."""
    watching = [network.watching[name] for name in names]
    done, _ = await asyncio.wait(watching, timeout=LEASE_S, return_when=asyncio.FIRST_COMPLETED)
    assert not done


@pytest.mark.parametrize("cut", CUTS)
async def test_calls_wait_through_a_cut_that_is_shorter_than_their_time(network: ToolNetwork, cut: str) -> None:
    """For a lease and longer, where issue 3 names 20 s."""
    held = ["held", "once_held"]
    await network.submit("held", "again/late")
    await network.submit("once_held", "once/late")
    await network.reached(*held)
    network.proxy.cut(**CUTS[cut])
    network.gate.touch()
    await network.submit("during", "again/echo")
    await network.submit("once_during", "once/echo")
    answers_pass = cut == "what the worker sends"
    await _nothing_ends(network, ["during", "once_during"] + ([] if answers_pass else held))
    if answers_pass:
        await network.over(*held)
    network.proxy.heal()
    records = await network.over()
    assert {(r.status, r.starts, r.retries) for r in records.values()} == {(Status.COMPLETED, 1, 0)}
    assert {network.calls(name) for name in records} == {1}
    await network.works_again()


@pytest.mark.promise("G5")
@pytest.mark.parametrize("call_timeout", [SHORT_S])
@pytest.mark.parametrize("cut", CUTS)
async def test_calls_are_cut_off_for_longer_than_their_time(network: ToolNetwork, cut: str) -> None:
    """What may run twice does, until it comes through; what must not is left to a person, unsent or not."""
    await network.works_again()
    network.proxy.cut(**CUTS[cut])
    await network.submit("during", "again/echo", max_retries=10)
    await network.submit("once_during", "once/echo")
    record = (await network.over("once_during"))["once_during"]
    assert (record.status, record.undecided) == (Status.UNKNOWN, ("once_during",))

    async def retried() -> bool:
        view = await network.service.get(network.watchers["during"].job_id)
        return view.record is not None and view.record.retries >= 2

    await wait_until(retried, "the other one is tried again", timeout=BOUND_S)
    network.proxy.heal()
    assert (await network.over("during"))["during"].status is Status.COMPLETED
    assert network.calls("once_during") <= 1


@pytest.mark.promise("G5")
async def test_the_connections_to_a_tool_server_are_reset_every_so_often(network: ToolNetwork) -> None:
    """Whenever calls are on their way, where issue 3 names every 2 s."""
    for number in range(4):
        held = [f"held{number}", f"once_held{number}"]
        await network.submit(held[0], "again/late", max_retries=10)
        await network.submit(held[1], "once/late")
        await network.reached(*held)
        assert network.proxy.reset_all() >= 2
        record = (await network.over(held[1]))[held[1]]
        assert (record.status, record.undecided) == (Status.UNKNOWN, (held[1],))
    network.gate.touch()
    await network.works_again()
    records = await network.over()
    assert {records[f"held{number}"].status for number in range(4)} == {Status.COMPLETED}


@pytest.mark.promise("G5")
async def test_the_network_to_a_tool_server_is_slow_and_lossy(network: ToolNetwork) -> None:
    await network.works_again("before")
    network.proxy.slow(0.01, 0.03)
    network.proxy.lossy(stall_chance=0.1, stall_s=0.5, reset_chance=0.02)
    for number in range(15):
        await network.submit(f"again{number}", "again/echo", max_retries=10)
        await network.submit(f"once{number}", "once/echo")
    records = await network.over()
    assert {records[f"again{number}"].status for number in range(15)} == {Status.COMPLETED}
    # One whose connection was lost may have run: nobody can know.
    assert {records[f"once{number}"].status for number in range(15)} <= {Status.COMPLETED, Status.UNKNOWN}
    network.proxy.normal()
    await network.works_again()


@pytest.mark.promise("G5")
@pytest.mark.parametrize("call_timeout", [SHORT_S])
async def test_connections_that_a_firewall_has_forgotten_cost_one_call_each(network: ToolNetwork) -> None:
    await network.works_again()
    assert network.proxy.strand() >= 1
    await network.submit("next", "again/echo")
    assert (await network.over("next"))["next"].status is Status.COMPLETED
