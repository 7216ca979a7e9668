"""The whole of toolfleet on this machine: servers, tool server, API and workers, each a process of its own.

The servers and the tool server come first, the API and the workers when they know where the servers are. They start
beside each other: most of the time is Python reading modules, on as many cores as there are.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from toolfleet.cli.programs import CLI, WEB_TOOLS, Program
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.server import EmbeddedServer
from toolfleet.services.embedded.valkey_server import EmbeddedValkey

WORKERS: Final[Mapping[Tier, int]] = {Tier.HIGH: 1, Tier.NORMAL: 2, Tier.LOW: 1}
SERVER_GRACE_S: Final = 10.0

Part = EmbeddedServer | Program
OnStep = Callable[[str], None]
"""Called with what has just been done."""


@dataclass(frozen=True, slots=True)
class StackPlan:
    """What a stack is made of."""

    folder: Path
    """For data, logs and configuration."""
    api_port: int
    """0 takes a free one."""
    worker_grace_s: float
    """How long a worker has from SIGTERM to its end."""
    own_nats: bool = True
    """False where the processes find one through settings or Consul."""
    own_redis: bool = True
    env: Mapping[str, str | None] = field(default_factory=dict)
    """Variables that every process has otherwise than this one; None takes one away."""
    mcp_servers: Mapping[str, Any] = field(default_factory=dict)
    """Entries for the `mcpServers` file, beside the project's own server."""


class Stack:
    """Starts and stops everything; `start` once, `stop` or `kill` as often as one likes."""

    def __init__(self, plan: StackPlan, on_step: OnStep = lambda what: None) -> None:
        self._plan = plan
        self._on_step = on_step
        folder = plan.folder
        self._config = folder / "mcp.json"
        self.nats = EmbeddedNats(folder / "nats", monitoring=True) if plan.own_nats else None
        self.valkey = EmbeddedValkey(folder / "valkey") if plan.own_redis else None
        # One name for all workers would make them one worker to the fleet.
        self._env = {**plan.env, "TOOLFLEET_MCP_CONFIG": str(self._config), "TOOLFLEET_WORKER_NAME": None}
        self._tools = self._program(
            "web-tools", WEB_TOOLS, "--host", "127.0.0.1", "--port", "0", "--allow-private", ready="--ready-file"
        )
        self._api: Program | None = None
        self._workers: list[Program] = []

    # -- what it is made of ------------------------------------------------------------------------------------

    @property
    def servers(self) -> list[EmbeddedServer]:
        """The servers that are its own."""
        return [server for server in (self.nats, self.valkey) if server is not None]

    @property
    def parts(self) -> list[Part]:
        """Everything that runs, in the order of its start."""
        return [*self.servers, self._tools, *([self._api] if self._api else ()), *self._workers]

    @property
    def tools(self) -> Program:
        """The project's MCP tool server."""
        return self._tools

    @property
    def env(self) -> Mapping[str, str | None]:
        """What a process needs in its environment to find this stack."""
        return self._env

    @property
    def api_url(self) -> str:
        """Of the running API."""
        assert self._api is not None, "the stack has been started"
        return self._api.ready_text

    # -- life --------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start everything; returns when it is ready.

        Raises:
            EmbeddedServerError: something is not installed, ended or was not ready in time; the message has its last
                log lines. What was started goes on: `kill` ends it.
        """
        self._plan.folder.mkdir(parents=True, exist_ok=True)
        self._write_config({})
        self._tools.launch()
        await _all(*(server.start() for server in self.servers))
        self._find_servers()
        self._on_step("NATS and Redis")
        self._api = self._api_program()
        self._workers = [
            self._worker_program(tier, number) for tier, count in WORKERS.items() for number in range(1, count + 1)
        ]
        await _all(self._start_tools(), self._api.start(), *(worker.start() for worker in self._workers))
        # Started again, they are found where they were.
        _keep_port(self._api)
        self._on_step(f"tool server, API and {len(self._workers)} workers")

    async def stop(self) -> None:
        """Workers first, so that they can finish their jobs; then what they need. Safe to repeat."""
        await _all(*(worker.stop(self._plan.worker_grace_s) for worker in self._workers))
        if self._api is not None:
            await self._api.stop(SERVER_GRACE_S)
        await self._tools.stop(SERVER_GRACE_S)
        await _all(*(server.stop(SERVER_GRACE_S) for server in self.servers))

    async def stop_idle(self) -> None:
        """As `stop`, for a stack that has nothing to do: workers and API at once, and then what they used."""
        await _all(*(program.stop(SERVER_GRACE_S) for program in [*self._workers, *([self._api] if self._api else ())]))
        await _all(self._tools.stop(SERVER_GRACE_S), *(server.stop(SERVER_GRACE_S) for server in self.servers))

    async def kill(self) -> None:
        """End everything at once. Safe to repeat."""
        await asyncio.gather(*(part.kill() for part in self.parts))

    # -- the pieces --------------------------------------------------------------------------------------------

    def _find_servers(self) -> None:
        if self.nats is not None:
            self._env |= {"NATS_URL": self.nats.url, "TOOLFLEET_NATS_MONITORING_URL": self.nats.monitoring_url}
        if self.valkey is not None:
            self._env["REDIS_URL"] = self.valkey.url
            # What one Redis did not take is not for another one: its spool lives and goes with its data.
            self._env["TOOLFLEET_STATE_DIR"] = str(self._plan.folder)

    async def _start_tools(self) -> None:
        await self._tools.start()
        _keep_port(self._tools)
        self._write_config({"web-tools": {"url": self._tools.ready_text}})

    def _write_config(self, own: Mapping[str, Any]) -> None:
        # Written beside and moved over: API and workers read it whenever they like.
        fresh = self._config.with_suffix(".new")
        fresh.write_text(json.dumps({"mcpServers": {**self._plan.mcp_servers, **own}}, indent=2), encoding="utf-8")
        fresh.replace(self._config)

    def _api_program(self) -> Program:
        return self._program("api", CLI, "api", "--port", str(self._plan.api_port), ready="--ready-file")

    def _worker_program(self, tier: Tier, number: int) -> Program:
        name = f"worker-{tier.value}-{number}"
        return self._program(name, CLI, "worker", "--tier", tier.value, ready="--status-file")

    def _program(self, name: str, module: str, *arguments: str, ready: str) -> Program:
        file = self._plan.folder / f"{name}.ready"
        return Program(
            name, module, [*arguments, ready, str(file)], folder=self._plan.folder, ready_file=file, env=self._env
        )


def _keep_port(program: Program) -> None:
    """A program that took a free port takes the same one when it is started again."""
    port = program.ready_text.partition("://")[2].partition("/")[0].rpartition(":")[2]
    where = program.arguments.index("--port") + 1
    program.arguments[where] = port


async def _all(*work: Any) -> None:
    """All of it at once; the first failure ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from None
