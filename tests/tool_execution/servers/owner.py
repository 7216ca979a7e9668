"""A process that holds a stdio session and waits to be killed: `owner.py NOTES`. Prints the pids of the family."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution.mcp_session import McpSession, SessionLimits


async def main(notes: str) -> None:
    toolbox = str(Path(__file__).with_name("toolbox.py"))
    server = McpServer("toolbox", command=sys.executable, args=(toolbox, "stdio", notes))
    session = McpSession(server, SessionLimits(connect_timeout=30, max_result_bytes=1 << 20, max_connections=10))
    await session.open("auto", 30)
    answer = await session.call("family", {}, meta={}, on_progress=lambda *_: None, timeout=30)
    print(answer["content"][0]["text"], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
