"""Does to a fleet what a schedule says, and takes it back."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final

import redis.asyncio as redis

from tests.chaos.fleet import Fleet, Program
from tests.chaos.ledger import Ledger
from tests.chaos.schedule import Fault
from toolfleet.services.embedded.server import EmbeddedServer

RESETS_EVERY_S: Final = 2.0
"""As issue 3 has it, at the full scale and at any other."""
TERM_MARGIN_S: Final = 10.0
"""Beyond its drain time, for a worker on a busy machine to end after SIGTERM."""
FULL_BYTES: Final = 1 << 20
"""What Redis may hold while it is out of memory: less than it holds when it is empty."""


@dataclass
class Damage:
    """What was done, for the figures."""

    kills: int = 0
    restarts: int = 0
    cuts: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    points_hit: Counter[str] = field(default_factory=Counter)
    bad_exits: list[str] = field(default_factory=list)
    """Workers and APIs that did not end well after SIGTERM."""
    ended_by_themselves: list[str] = field(default_factory=list)
    healed_at: list[float] = field(default_factory=list)
    """Wall clock at which NATS or Redis was back."""


class Faults:
    """Carries faults out, each as a task of its own."""

    def __init__(self, fleet: Fleet, ledger: Ledger, drain_timeout_s: float) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._drain_timeout = drain_timeout_s
        self.damage = Damage()
        self._active: Counter[str] = Counter()
        self._last: dict[str, float] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """A server may take longer to come back than was planned: the next fault of the same target waits."""
        self._stop_s = 0.0
        """How long a process stands at a pause point."""
        self._resting: set[str] = set()
        """Members that are down because a fault has them, so nobody else starts them."""

    def touched(self, since: float, *targets: str) -> bool:
        """Whether a fault hurt a target that begins with one of the names at or after a time of the monotonic clock."""
        return any(
            (self._active[target] > 0 or self._last.get(target, -1e9) >= since) and target.startswith(targets)
            for target in {*self._active, *self._last}
        )

    async def carry_out(self, fault: Fault) -> None:
        """From its start to its healing."""
        async with self._locks[fault.target]:
            await self._carry_out(fault)

    async def _carry_out(self, fault: Fault) -> None:
        self.damage.by_kind[fault.kind] += 1
        await self._ledger.write("fault", what=fault.kind, target=fault.target, detail=fault.detail, s=fault.duration_s)
        self._active[fault.target] += 1
        try:
            kind, _, _ = fault.kind.partition("_")
            match kind:
                case "nats" | "redis" | "consul" | "pubsub":
                    await self._server(fault)
                case "tools":
                    await self._tool_server(fault)
                case "cut" | "resets" | "slow":
                    await self._link(fault)
                case _:
                    await self._member(fault, self._fleet.members[fault.target])
        finally:
            self._active[fault.target] -= 1
            self._last[fault.target] = time.monotonic()
        await self._ledger.write("healed", what=fault.kind, target=fault.target)

    # -- servers -----------------------------------------------------------------------------------------------

    async def _server(self, fault: Fault) -> None:
        fleet = self._fleet
        servers: dict[str, EmbeddedServer | None] = {"nats": fleet.nats, "redis": fleet.redis, "consul": fleet.consul}
        server = servers[fault.target]
        assert server is not None
        match fault.kind.partition("_")[2]:
            case "kill" if fault.kind == "pubsub_kill":
                await self._in_redis("CLIENT", "KILL", "TYPE", "pubsub")
            case "flush":
                await self._in_redis("FUNCTION", "FLUSH")
            case "full":
                await self._in_redis("CONFIG", "SET", "maxmemory-policy", "noeviction")
                await self._in_redis("CONFIG", "SET", "maxmemory", str(FULL_BYTES))
                await asyncio.sleep(fault.duration_s)
                await self._in_redis("CONFIG", "SET", "maxmemory", "0")
            case "pause":
                await server.pause()
                await asyncio.sleep(fault.duration_s)
                await server.resume()
            case _:
                self.damage.kills += 1
                await server.kill()
                await asyncio.sleep(fault.duration_s)
                await self._bring_back(server)
        if fault.target in ("nats", "redis"):
            self.damage.healed_at.append(time.time())

    async def _bring_back(self, server: EmbeddedServer) -> None:
        await server.start()
        self.damage.restarts += 1
        if server is self._fleet.consul:
            await self._fleet.register_tools()

    async def _in_redis(self, *command: str) -> None:
        async with self._direct() as client:
            await client.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py has no types for it

    @contextlib.asynccontextmanager
    async def _direct(self) -> AsyncIterator[redis.Redis]:
        client = redis.Redis.from_url(self._fleet.redis.url, socket_timeout=10)
        try:
            yield client
        finally:
            await client.aclose()

    async def _tool_server(self, fault: Fault) -> None:
        program = self._fleet.tools[fault.detail]
        if fault.kind == "tools_pause":
            program.signal(signal.SIGSTOP)
            await asyncio.sleep(fault.duration_s)
            program.signal(signal.SIGCONT)
            return
        self.damage.kills += 1
        await program.kill()
        await asyncio.sleep(fault.duration_s)
        await self._fleet.start_tools(fault.detail)
        self.damage.restarts += 1

    # -- links -------------------------------------------------------------------------------------------------

    async def _link(self, fault: Fault) -> None:
        links = self._fleet.links
        match fault.kind:
            case "resets":
                end = time.monotonic() + fault.duration_s
                while time.monotonic() < end:
                    self.damage.cuts += 1
                    links.tell(fault.target, "reset_all")
                    await asyncio.sleep(min(RESETS_EVERY_S, max(0.05, end - time.monotonic())))
            case "slow":
                links.tell(fault.target, "slow", latency_s=0.02, jitter_s=0.15)
                links.tell(fault.target, "lossy", stall_chance=0.1, stall_s=0.4, reset_chance=0.002)
                await asyncio.sleep(fault.duration_s)
            case kind:
                self.damage.cuts += 1
                links.tell(fault.target, "cut", to_server=kind != "cut_to_client", to_client=kind != "cut_to_server")
                await asyncio.sleep(fault.duration_s)
        links.tell(fault.target, "normal")

    # -- workers and APIs --------------------------------------------------------------------------------------

    async def _member(self, fault: Fault, program: Program) -> None:
        match fault.kind:
            case "worker_stop":
                program.signal(signal.SIGSTOP)
                await asyncio.sleep(fault.duration_s)
                program.signal(signal.SIGCONT)
                return
            case "worker_term" | "api_term":
                await self._term(program)
                self.launch(program)
                return
        self._resting.add(program.name)
        try:
            if program.running:
                self.damage.kills += 1
            await program.kill()
            if not fault.kind.endswith("point"):
                await asyncio.sleep(fault.duration_s)
        finally:
            self._resting.discard(program.name)
        if fault.kind.endswith("point"):
            self._arm(fault, program)
        else:
            self.launch(program)

    def _arm(self, fault: Fault, program: Program) -> None:
        """Start it again with a pause point armed; `watch` finds it stopped there, or dead."""
        point, nth, action = fault.detail.split()
        program.armed = [{"point": point, "nth": int(nth), "action": action}]
        self._stop_s = fault.duration_s
        self.launch(program)

    async def _term(self, program: Program) -> None:
        process = program.process
        if process is None or not program.running:
            return
        self._resting.add(program.name)
        # One that is still starting has no handler yet, and nothing to leave in order.
        was_ready = program.ready_file is not None and program.ready_file.exists()
        try:
            program.signal(signal.SIGTERM)
            # It may be stopped at a pause point.
            program.signal(signal.SIGCONT)
            try:
                code = await process.wait(self._drain_timeout + TERM_MARGIN_S)
            except TimeoutError:
                self.damage.bad_exits.append(f"{program.name} did not end within its drain time after SIGTERM")
                await program.kill()
                return
            # A job may kill its worker while that drains.
            if code not in (0, -signal.SIGKILL) and (was_ready or code != -signal.SIGTERM):
                self.damage.bad_exits.append(f"{program.name} ended with {code} after SIGTERM")
        finally:
            self._resting.discard(program.name)

    def launch(self, program: Program) -> None:
        program.launch()
        self.damage.restarts += 1

    async def watch(self, every_s: float = 0.2) -> None:
        """Until cancelled: start again what has died by a job or at a pause point, as a supervisor would, and let what
        was stopped at one go on after its time."""
        seen = 0
        stopped: dict[int, float] = {}
        while True:
            hits = self._hits()
            for point, pid in hits[seen:]:
                self.damage.points_hit[point] += 1
                stopped[pid] = time.monotonic() + self._stop_s
            seen = len(hits)
            for program in self._fleet.members.values():
                if not program.running and program.name not in self._resting and self._active[program.name] == 0:
                    self._note_end(program)
                    self.launch(program)
                pid = program.process.pid if program.process is not None else 0
                if stopped.get(pid, float("inf")) <= time.monotonic():
                    del stopped[pid]
                    program.signal(signal.SIGCONT)
            await asyncio.sleep(every_s)

    def _hits(self) -> list[tuple[str, int]]:
        with contextlib.suppress(FileNotFoundError):
            words = [line.split() for line in self._fleet.hits.read_text().splitlines()]
            return [(point, int(pid)) for point, pid in words]
        return []

    def _note_end(self, program: Program) -> None:
        code = program.process.exit_code if program.process is not None else None
        if code == -signal.SIGKILL:
            self.damage.kills += 1
        else:
            self.damage.ended_by_themselves.append(f"{program.name} ended with {code} by itself")

    # -- the end -----------------------------------------------------------------------------------------------

    async def heal(self) -> None:
        """Everything runs and everything can be reached, whatever state it was left in."""
        fleet = self._fleet
        fleet.links.clear()
        for server in (fleet.nats, fleet.redis, *([fleet.consul] if fleet.consul else [])):
            if server.running:
                await server.resume()
            else:
                await self._bring_back(server)
        await self._in_redis("CONFIG", "SET", "maxmemory", "0")
        for name, program in fleet.tools.items():
            program.signal(signal.SIGCONT)
            await fleet.start_tools(name)
        await fleet.register_tools()
        for program in fleet.members.values():
            program.signal(signal.SIGCONT)
            if not program.running:
                self.launch(program)
