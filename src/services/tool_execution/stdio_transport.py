"""A stdio MCP server as a child process: the transport that the SDK's client speaks over.

In place of the SDK's own `stdio_client`, because a server must not outlive a killed worker (`stdio_launcher`), its
stderr belongs into the log, one line must not take any amount of memory, and a request must be known as written or
not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution.stdio_process import log_stderr, start, stop
from toolfleet.services.tool_execution.stdio_streams import OnTheWay, Probe, Reader, Writer


@asynccontextmanager
async def stdio_transport(
    server: McpServer, *, max_line: int, on_end: Callable[[], None], probe_timeout: float
) -> AsyncIterator[tuple[Reader, Writer]]:
    """Start the server; stop it, and all that it started, when the context is left.

    Args:
        server: with a `command`.
        max_line: bytes of one message.
        on_end: called once the server has closed its stdout: no answer will come any more.
        probe_timeout: seconds from now for an answer to `server/discover`. After it the question is resolved with an
            error, on which the SDK goes on to the older handshake with the same process: one that only starts slowly
            must not be started again.

    Raises:
        ToolUnavailable: the command does not exist, or the process could not be started.
    """
    process, stdout, lifeline = await start(server)
    assert process.stdin is not None
    assert process.stderr is not None
    errors = asyncio.create_task(log_stderr(server.name, process.stderr), name=f"mcp-stderr-{server.name}")
    on_the_way = OnTheWay(Probe(asyncio.get_running_loop().time() + probe_timeout))
    ending = asyncio.create_task(_tell_end(process, on_the_way), name=f"mcp-end-{server.name}")
    try:
        yield (
            Reader(server.name, stdout, max_line, on_end, on_the_way),
            Writer(process.stdin, on_the_way),
        )
    finally:
        # Bounded by its own time-outs, and must run to its end: what is cut short here stays as a process.
        with anyio.CancelScope(shield=True):
            await stop(server.name, process, stdout, lifeline)
            errors.cancel()
            ending.cancel()
            await asyncio.wait({errors, ending})


async def _tell_end(process: asyncio.subprocess.Process, on_the_way: OnTheWay) -> None:
    # The launcher ends after the server and all that it started.
    await process.wait()
    for exchange in list(on_the_way.asked.values()):
        exchange.server_done()
