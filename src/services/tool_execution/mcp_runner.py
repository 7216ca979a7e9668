"""Runs tool calls on the fleet's MCP servers: the `ToolRunner` of a worker."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from toolfleet.services.background_jobs.errors import ToolTimedOut, ToolUnavailable, UnknownTool
from toolfleet.services.background_jobs.ports import CallContext, ToolSpec
from toolfleet.services.background_jobs.task_models import ToolCall, ToolResult
from toolfleet.services.discovery.registry import Registry
from toolfleet.services.tool_execution.catalogue import CachedCatalogue
from toolfleet.services.tool_execution.catalogue_store import SharedStore
from toolfleet.services.tool_execution.mcp_servers import McpServers
from toolfleet.settings import Settings

IDEMPOTENCY_META: Final = "toolfleet/idempotency-key"
ATTEMPT_META: Final = "toolfleet/attempt"
"""Keys of a call's `_meta`. The specification (2025-11-25, "_meta") wants a prefix of dot-separated labels and a slash;
reserved are only prefixes whose second label is `mcp` or `modelcontextprotocol`."""


class McpToolRunner:
    """A `ToolRunner` over MCP sessions.

    Args:
        servers: the ways to the servers; closed with the runner.
        catalogue: what they offer.
        settings: `max_result_bytes`.
    """

    def __init__(self, servers: McpServers, catalogue: CachedCatalogue, settings: Settings) -> None:
        self._servers = servers
        self._catalogue = catalogue
        self._max_result_bytes = settings.max_result_bytes

    async def describe(self, tool_name: str) -> ToolSpec:
        """The tool's spec.

        Raises:
            UnknownTool: no server offers it, and all have been asked.
            ToolUnavailable: it is not known and a server that may offer it can't be reached.
        """
        try:
            return await self._catalogue.find(tool_name)
        except UnknownTool as error:
            unreached = self._catalogue.unreached
            # That several offer it is an answer; and of a full name the one server that counts has been asked.
            if not unreached or error.details.get("ambiguous") or "/" in tool_name:
                raise
            raise ToolUnavailable(f"{error}; not reached so far: {', '.join(unreached)}") from error

    async def run(self, spec: ToolSpec, call: ToolCall, context: CallContext) -> ToolResult:
        """Run one call. Cancelling the task tells the tool's server, and ``context.on_stop`` how far that got, within
        0.7 s.

        A call that surely was not processed, because its session had gone stale, is made again once on a new session.

        Raises:
            ToolFailure: one of its subclasses; `sent` and `answered` say what is known of the outcome.
        """
        # Imported late: the SDK is heavy, see `mcp_servers`.
        from toolfleet.services.tool_execution.call_outcome import SessionGone, Where, result_of

        started = time.monotonic()
        meta = {IDEMPOTENCY_META: context.idempotency_key, ATTEMPT_META: context.attempt}
        stale = 0
        while True:
            link = await self._servers.link(spec.server)
            session = await link.session(_left(started, context))
            context.before_send()
            try:
                raw = await session.call(
                    spec.tool,
                    call.tool_args,
                    meta=meta,
                    on_progress=context.on_progress,
                    on_stop=context.on_stop,
                    timeout=_left(started, context),
                )
                break
            except SessionGone:
                link.retire(session)
                stale += 1
                if stale > 1:
                    raise
            except ToolTimedOut:
                link.suspect(session)
                raise
        return result_of(
            Where(spec.server, spec.tool, self._max_result_bytes),
            raw,
            call,
            attempt=context.attempt,
            duration_ms=int((time.monotonic() - started) * 1000),
        )

    async def close(self) -> None:
        """End all sessions and child processes, and the catalogue's refresh. Safe to repeat."""
        await self._catalogue.close()
        await self._servers.close()


@dataclass(frozen=True, slots=True)
class McpTools:
    """The parts that share one set of sessions."""

    servers: McpServers
    catalogue: CachedCatalogue
    runner: McpToolRunner


@asynccontextmanager
async def mcp_tools(registry: Registry, redis: SharedStore | None, settings: Settings) -> AsyncIterator[McpTools]:
    """Runner and catalogue for a process; all sessions and child processes end with the context."""
    servers = McpServers(registry, settings)
    catalogue = CachedCatalogue(servers, redis, settings)
    runner = McpToolRunner(servers, catalogue, settings)
    try:
        yield McpTools(servers, catalogue, runner)
    finally:
        await runner.close()


def _left(started: float, context: CallContext) -> float:
    """Seconds of the call's time that are left; never quite none, so that the one who waits says what it waited for."""
    return max(0.001, started + context.timeout_s - time.monotonic())
