"""A tool server of the chaos runs: every effect of a call is on the disk before anything else happens.

    python -m tests.chaos.tool_server stdio LEDGER NAME
    python -m tests.chaos.tool_server http LEDGER NAME PORT     writes the port it listens on to standard output

`_meta` of a call names job, call and attempt; see `toolfleet.services.tool_execution.mcp_runner`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

from tests.chaos.ledger import SyncedFile

KEY = "toolfleet/idempotency-key"
ATTEMPT = "toolfleet/attempt"
WORKER_PID_FILE = "CHAOS_WORKER_PID_FILE"
"""Of a stdio server: where the driver writes the pid of the worker that it belongs to."""

server_name = ""
ledger: SyncedFile


def note(ctx: Context, what: str) -> None:
    """One effect of the call, on the disk when this returns."""
    meta: Any = ctx.request_context.meta or {}
    values = meta if isinstance(meta, dict) else meta.model_dump()
    job, _, call = str(values.get(KEY, ":")).partition(":")
    ledger.write(
        {"job": job, "call": call, "attempt": values.get(ATTEMPT), "what": what, "server": server_name,
         "pid": os.getpid()}
    )  # fmt: skip


async def work(ms: int, ctx: Context) -> dict[str, int]:
    """Takes its time."""
    note(ctx, "begin")
    try:
        await anyio.sleep(ms / 1000)
    except anyio.get_cancelled_exc_class():
        note(ctx, "cancelled")
        raise
    note(ctx, "end")
    return {"ms": ms}


async def refuse(ms: int, ctx: Context) -> str:
    """Says that it failed."""
    note(ctx, "begin")
    note(ctx, "end")
    raise ToolError("refused, as asked")


async def fail(ms: int, ctx: Context) -> str:
    """Breaks."""
    note(ctx, "begin")
    raise RuntimeError("broken, as asked")


async def hang(ms: int, ctx: Context) -> str:
    """Never answers."""
    note(ctx, "begin")
    try:
        await anyio.sleep_forever()
    finally:
        note(ctx, "cancelled")
    return "never"


async def crash(ms: int, ctx: Context) -> str:
    """Takes its server down."""
    note(ctx, "begin")
    os._exit(3)


async def flood(count: int, ctx: Context) -> str:
    """Reports more than anybody can read."""
    note(ctx, "begin")
    for step in range(1, count + 1):
        await ctx.report_progress(step, count, f"step {step}")
    note(ctx, "end")
    return "flooded"


async def poison(ms: int, ctx: Context) -> str:
    """Kills the worker that called."""
    note(ctx, "begin")
    os.kill(int(Path(os.environ[WORKER_PID_FILE]).read_text()), signal.SIGKILL)
    await anyio.sleep_forever()
    return "never"


def _serve_http(app: Any, port: int) -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(1024)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app.streamable_http_app(), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


def main(transport: str, path: str, name: str, port: str = "0") -> None:
    """Serve until killed."""
    global ledger, server_name
    ledger, server_name = SyncedFile(Path(path)), name
    app: Any = MCPServer("chaos")
    for function in (work, refuse, fail, hang, crash, flood, poison):
        title = function.__name__
        app.tool(name=title, annotations=ToolAnnotations(idempotentHint=True))(function)
        # A tool that says nothing about itself must not run twice.
        app.tool(name=f"once_{title}")(function)
    if transport == "stdio":
        app.run("stdio")
    else:
        _serve_http(app, int(port))


if __name__ == "__main__":
    main(*sys.argv[1:])
