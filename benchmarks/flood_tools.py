"""An MCP server for the flood benchmark: one small tool, and one that reports progress as fast as it can.

``python benchmarks/flood_tools.py stdio``, or ``… http``, which prints ``ready PORT`` when it listens.
"""

from __future__ import annotations

import socket
import sys

import uvicorn
from mcp.server.mcpserver import Context, MCPServer
from mcp.types import ToolAnnotations

app = MCPServer("flood", log_level="ERROR")
READ_ONLY = ToolAnnotations(readOnlyHint=True)


@app.tool(annotations=READ_ONLY)
def small(text: str) -> str:
    """Gives the text back."""
    return text


@app.tool(annotations=READ_ONLY)
async def flood(count: int, ctx: Context) -> str:
    """Reports progress so many times, without a pause."""
    for step in range(1, count + 1):
        await ctx.report_progress(step, count, f"step {step} of many that nobody can read as fast as they come")
    return "done"


def serve_http() -> None:
    """Listens on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"ready {listener.getsockname()[1]}\n")
    sys.stdout.flush()
    config = uvicorn.Config(app.streamable_http_app(), log_level="error", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        app.run("stdio")
    else:
        serve_http()
