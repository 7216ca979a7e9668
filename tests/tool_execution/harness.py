"""What the tests of the tool execution share: a registry to change, servers to start, notes to read."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_until
from toolfleet.services.background_jobs.errors import ToolTimedOut, ToolUnavailable
from toolfleet.services.background_jobs.ports import CallContext, ToolSpec
from toolfleet.services.background_jobs.task_models import ToolCall, ToolResult
from toolfleet.services.background_jobs.transitions import CallStop
from toolfleet.services.discovery.models import DiscoveryError, McpServer
from toolfleet.services.tool_execution.mcp_runner import McpTools

TOOLBOX = str(Path(__file__).parent / "servers" / "toolbox.py")
OLD_STDIO = str(Path(__file__).parent / "servers" / "old_stdio.py")
PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin"

JOB = "job_00000000000000000000000000"


def peer(program: str) -> str:
    """The path of a program in the environment of the peers.

    Raises:
        AssertionError: it is not installed.
    """
    path = PEERS / program
    assert path.exists(), f"{path} is missing: run 'make peers' first"
    return str(path)


class ListRegistry:
    """A `Registry` whose MCP servers are what the test says at the moment."""

    def __init__(self, *servers: McpServer) -> None:
        self.servers = list(servers)
        self.down = False

    async def nats_urls(self) -> list[str]:
        raise DiscoveryError("not in these tests")

    async def redis_url(self) -> str:
        raise DiscoveryError("not in these tests")

    async def mcp_servers(self) -> list[McpServer]:
        if self.down:
            raise DiscoveryError("the registry is down")
        return list(self.servers)

    async def queue_meta(self) -> Mapping[str, str]:
        return {}

    async def close(self) -> None:
        pass


@dataclass
class Notes:
    """What tools noted at the server."""

    path: Path

    def entries(self, event: str | None = None, label: str | None = None) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        entries = [json.loads(line) for line in self.path.read_text().splitlines()]
        return [
            entry
            for entry in entries
            if (event is None or entry["event"] == event) and (label is None or entry.get("label") == label)
        ]

    async def until(self, event: str, label: str | None = None) -> dict[str, Any]:
        """The first such entry, once it is there."""
        found = await wait_until(lambda: self.entries(event, label), f"the server noted {event} {label or ''}")
        return found[0]


@dataclass
class HttpToolbox:
    """A toolbox server over HTTP, in a process of its own; started again it keeps its port."""

    python: str
    notes: Notes
    options: tuple[str, ...] = ()
    port: int = 0
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/mcp"

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            self.python, TOOLBOX, "http", str(self.notes.path), str(self.port), *self.options,
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.port = int(await asyncio.wait_for(self.process.stdout.readline(), 20))

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


def stdio_toolbox(notes: Notes, name: str = "toolbox", python: str = sys.executable) -> McpServer:
    """The toolbox as a stdio server."""
    return McpServer(name, command=python, args=(TOOLBOX, "stdio", str(notes.path)))


def old_stdio(*manners: str, name: str = "old") -> McpServer:
    """The hand-written server of the oldest protocol."""
    return McpServer(name, command=sys.executable, args=(OLD_STDIO, *manners))


Progress = tuple[float, float | None, str | None]


@dataclass
class Caller:
    """Makes calls as a worker does."""

    tools: McpTools
    progress: list[Progress] = field(default_factory=list)
    stops: list[CallStop] = field(default_factory=list)
    """How far cancels got."""

    async def __call__(self, tool: str, timeout: float = 30, attempt: int = 1, **arguments: Any) -> ToolResult:
        """Describe and run.

        Raises:
            ToolFailure, UnknownTool: as the runner does.
        """
        spec = await self.tools.runner.describe(tool)
        return await self.run(spec, timeout, attempt, **arguments)

    async def run(self, spec: ToolSpec, timeout: float = 30, attempt: int = 1, **arguments: Any) -> ToolResult:
        """Run without describing."""
        call = ToolCall(tool_call_id="call_1", tool_name=spec.name, tool_args=arguments)
        context = CallContext(
            job_id=JOB,
            attempt=attempt,
            idempotency_key=f"{JOB}:call_1",
            timeout_s=timeout,
            on_progress=lambda *progress: self.progress.append(progress),
            on_stop=self.stops.append,
        )
        return await self.tools.runner.run(spec, call, context)

    async def times_out(self, spec: ToolSpec, **arguments: Any) -> None:
        """A call that was sent, and whose time then ran out. Where the machine was too slow to send it, with more time.

        Raises:
            ToolUnavailable: it could not be sent in 20 s either.
        """
        for seconds in (0.5, 2, 5, 20):
            try:
                await self.run(spec, seconds, **arguments)
            except ToolTimedOut:
                return
            except ToolUnavailable:
                if seconds == 20:
                    raise
            else:
                raise AssertionError("the call was answered")

    async def opened(self, server: str) -> int:
        """Sessions opened with a server so far."""
        return (await self.tools.servers.link(server)).opened


def spec_of(server: str, tool: str) -> ToolSpec:
    """A spec without the catalogue."""
    return ToolSpec(name=f"{server}/{tool}", server=server, tool=tool)


def text(result: ToolResult) -> str:
    """The first text of a result."""
    return str(result.content[0]["text"])


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def children_of(pid: int) -> list[int]:
    """The process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def own_children() -> list[int]:
    """The children of this process."""
    return children_of(os.getpid())
