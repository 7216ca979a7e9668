"""The whole fleet as real processes: servers, tool servers, workers and APIs, with links of their own to cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from tests.chaos import tool_server, woven
from tests.chaos.links import Links
from tests.chaos.schedule import LEASE_S, SERVERS
from tests.support.settings_doc import variable
from tests.support.waiting import wait_until
from toolfleet.services.embedded.consul_agent import EmbeddedConsul, find_consul
from toolfleet.services.embedded.errors import ServerNotInstalled
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.process import ChildProcess
from toolfleet.services.embedded.server import HOST, free_ports
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings, variable_names

ROOT: Final = Path(__file__).parents[2]
START_S: Final = 60
"""For a process to be ready while everything it needs is there; it only bounds a failing run."""
SHORT: Final = 0.5
"""Below this scale the reconciler looks at jobs soon after their time, too."""


def settings_for(scale: float) -> dict[str, Any]:
    """What the fleet's processes have otherwise than by default: everything that is waited for, at the run's scale."""
    return {
        "lease": max(2.0, LEASE_S * scale),
        "ack_wait": max(2.0, 30 * scale),
        "recovery_check_interval": max(0.5, 30 * scale),
        "drain_timeout": max(4.0, 30 * scale),
        "redis_timeout": max(2.0, 5 * scale),
        "publish_timeout": max(2.0, 5 * scale),
        "retry_delays": (max(0.3, 30 * scale), max(0.6, 60 * scale)),
        "call_timeout": max(10.0, 300 * scale),
        "job_timeout": max(30.0, 600 * scale),
        "catalogue_ttl": max(2.0, 60 * scale),
        "mcp_connect_timeout": max(6.0, 10 * scale),
        "sse_heartbeat": max(1.0, 15 * scale),
        # Small enough that a few large jobs fill it.
        "stream_max_bytes": 2 << 20,
        # The audit reads every log from its first event.
        "event_log_max": 20_000,
    }


def environment(values: Mapping[str, Any]) -> dict[str, str]:
    """The environment that gives these settings."""
    texts = {}
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        texts[variable(name, Settings.model_fields[name])] = text
    return texts


@dataclass
class Program:
    """One process of ours that can be killed and started again."""

    name: str
    command: list[str]
    folder: Path
    env: dict[str, str | None]
    ready_file: Path | None = None
    woven: bool = False
    broken: str | None = None
    short_grace: bool = False
    armed: list[dict[str, Any]] = field(default_factory=list)
    """Pause points of the next start."""
    process: ChildProcess | None = None
    starts: int = 0

    @property
    def pid_file(self) -> Path:
        return self.folder / f"{self.name}.pid"

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.running

    def launch(self) -> None:
        """Start it, unless it runs, without waiting."""
        if self.running:
            return
        if self.ready_file is not None:
            self.ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", *self.command]
        if self.woven:
            told = {"armed": self.armed, "hits": str(self.folder / "hits"), "broken": self.broken,
                    "short_grace": self.short_grace}  # fmt: skip
            command = [sys.executable, "-m", woven.__name__, json.dumps(told), *self.command]
        self.armed = []
        self.process = ChildProcess(command, ROOT, self.log_path, env=self.env)
        self.pid_file.write_text(str(self.process.pid))
        self.starts += 1

    async def ready(self) -> None:
        """It has said so; raises AssertionError with its last words where it ended or does not."""
        ready_file, process = self.ready_file, self.process
        assert ready_file is not None
        assert process is not None

        def is_ready() -> bool:
            assert process.running, f"{self.name} ended at its start:\n{process.log_tail()}"
            return ready_file.exists()

        await wait_until(is_ready, f"{self.name} is ready", START_S)

    def signal(self, number: signal.Signals) -> bool:
        """To the process alone, not to the tool servers that it started; whether there was one."""
        if not self.running or self.process is None:
            return False
        # Not `os.kill` of a remembered number: the process is ours and not yet waited for, so the number is its own.
        with contextlib.suppress(ProcessLookupError):
            self.process._popen.send_signal(number)
        return True

    async def kill(self) -> None:
        if self.process is not None:
            await self.process.kill()


@dataclass
class Fleet:
    """Everything that runs."""

    folder: Path
    scale: float
    nats: EmbeddedNats
    redis: EmbeddedValkey
    consul: EmbeddedConsul | None
    members: dict[str, Program] = field(default_factory=dict)
    """Workers and APIs."""
    tools: dict[str, Program] = field(default_factory=dict)
    """The tool servers over HTTP."""
    links: Links = field(default_factory=Links)
    """``<member>/<nats|redis|tools>``."""
    api_ports: dict[str, int] = field(default_factory=dict)
    tool_ports: dict[str, int] = field(default_factory=dict)

    @property
    def effects(self) -> Path:
        """The ledger of the tool servers."""
        return self.folder / "effects.jsonl"

    @property
    def hits(self) -> Path:
        """What pause points were hit."""
        return self.folder / "hits"

    def direct_settings(self) -> Settings:
        """For the driver's own look at streams and records: past the links that it cuts."""
        return Settings.model_validate(
            settings_for(self.scale) | {"nats_url": self.nats.url, "redis_url": self.redis.url, "redis_timeout": 10,
                                        "publish_timeout": 10, "mcp_config": self.folder / "none.json"}
        )  # fmt: skip

    async def register_tools(self) -> None:
        """Tell Consul where the tool server `reg` is; an agent that was restarted has forgotten it."""
        if self.consul is None:
            return
        service = {"Name": "reg", "Address": HOST, "Port": self.tool_ports["reg"], "Tags": ["mcp"]}
        async with httpx.AsyncClient(timeout=5) as client:
            answer = await client.put(f"http://{self.consul.address}/v1/agent/service/register", json=service)
        answer.raise_for_status()

    async def start_tools(self, name: str) -> None:
        """Start a tool server over HTTP; it listens when this returns."""
        program = self.tools[name]
        program.launch()
        port = self.tool_ports[name]

        async def listens() -> bool:
            assert program.running, f"tool server {name} ended:\n{program.log_path.read_text()[-2000:]}"
            try:
                _, writer = await asyncio.open_connection(HOST, port)
            except OSError:
                return False
            writer.close()
            return True

        await wait_until(listens, f"tool server {name} listens", START_S)


@contextlib.asynccontextmanager
async def running_fleet(
    folder: Path, *, scale: float, workers: Mapping[str, int], apis: int, broken: str | None, max_starts: int
) -> AsyncIterator[Fleet]:
    """The fleet, ready for jobs; every process has ended when the context has.

    Args:
        folder: for data, logs and ledgers.
        scale: of leases and time-outs, 1 for those of production.
        workers: their number by tier.
        apis: their number.
        broken: the name of a broken build that workers and APIs are to be, see `tests.chaos.woven`.
        max_starts: of a job, before it becomes a dead letter.
    """
    consul = None
    with contextlib.suppress(ServerNotInstalled):
        find_consul()
        consul = EmbeddedConsul(folder / "consul")
    fleet = Fleet(folder, scale, EmbeddedNats(folder / "nats"), EmbeddedValkey(folder / "valkey"), consul)
    names = [f"{tier}-{n}" for tier, count in workers.items() for n in range(1, count + 1)]
    api_names = [f"api-{n}" for n in range(1, apis + 1)]
    async with contextlib.AsyncExitStack() as stack:
        for server in (fleet.nats, fleet.redis, *([consul] if consul else [])):
            stack.push_async_callback(server.kill)
        await asyncio.gather(fleet.nats.start(), fleet.redis.start(), *([consul.start()] if consul else []))
        ports = free_ports(2 + apis)
        fleet.tool_ports = {"web": ports[0], "reg": ports[1]}
        fleet.api_ports = dict(zip(api_names, ports[2:], strict=True))
        for name in fleet.tool_ports:
            arguments = [tool_server.__name__, "http", str(fleet.effects), name, str(fleet.tool_ports[name])]
            fleet.tools[name] = Program(f"tools-{name}", arguments, folder, _clean_environment())
            stack.push_async_callback(fleet.tools[name].kill)
        await asyncio.gather(*(fleet.start_tools(name) for name in fleet.tools))
        await fleet.register_tools()
        shared = settings_for(scale) | {"max_starts": max_starts}
        targets = {"nats": fleet.nats.port, "redis": fleet.redis.port, "tools": fleet.tool_ports["web"]}
        stack.push_async_callback(fleet.links.close)
        await fleet.links.open({f"{m}/{server}": targets[server] for m in (*names, *api_names) for server in SERVERS})
        for name in (*names, *api_names):
            fleet.members[name] = _member(fleet, name, shared, broken)
            stack.push_async_callback(fleet.members[name].kill)
        for program in fleet.members.values():
            program.launch()
        await asyncio.gather(*(program.ready() for program in fleet.members.values()))
        yield fleet


def _clean_environment() -> dict[str, str | None]:
    """None of the settings of whoever runs this."""
    return dict.fromkeys(variable_names())


def _member(fleet: Fleet, name: str, shared: Mapping[str, Any], broken: str | None) -> Program:
    links = {server: fleet.links.ports[f"{name}/{server}"] for server in SERVERS}
    pid_file = fleet.folder / f"{name}.pid"
    std = {
        "command": sys.executable,
        "args": ["-m", tool_server.__name__, "stdio", str(fleet.effects), "std"],
        "cwd": str(ROOT),
        "env": {tool_server.WORKER_PID_FILE: str(pid_file)},
    }
    servers: dict[str, Any] = {"web": {"url": f"http://{HOST}:{links['tools']}/mcp"}, "std": std}
    if fleet.consul is None:
        servers["reg"] = {"url": f"http://{HOST}:{fleet.tool_ports['reg']}/mcp"}
    config = fleet.folder / f"{name}.mcp.json"
    config.write_text(json.dumps({"mcpServers": servers}))
    values = {
        **shared,
        "nats_url": f"nats://{HOST}:{links['nats']}",
        "redis_url": f"redis://{HOST}:{links['redis']}/0",
        "mcp_config": config,
        "state_dir": fleet.folder,
    }
    if fleet.consul is not None:
        values["consul_http_addr"] = fleet.consul.address
    ready = fleet.folder / f"{name}.ready"
    command = ["toolfleet.cli", "worker", "--tier", name.rpartition("-")[0], "--status-file", str(ready)]
    if name in fleet.api_ports:
        command = ["toolfleet.cli", "api", "--port", str(fleet.api_ports[name]), "--ready-file", str(ready)]
    env = _clean_environment() | environment(values)
    return Program(name, command, fleet.folder, env, ready_file=ready, woven=True, broken=broken,
                   short_grace=fleet.scale < SHORT)  # fmt: skip
