"""The process of a stdio MCP server: how it starts, how it ends, and what it writes to stderr.

The end follows the specification: close stdin, wait, then terminate
(https://modelcontextprotocol.io/specification/2025-11-25/basic/lifecycle#shutdown).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Final

from mcp.client.stdio import get_default_environment

from toolfleet.services.background_jobs.errors import ToolUnavailable
from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution import stdio_launcher
from toolfleet.services.tool_execution.progress_gate import Pace
from toolfleet.services.tool_execution.stdio_lines import LineSplitter, TooLong
from toolfleet.services.tool_execution.stdio_pipe import StdoutPipe

_log = logging.getLogger(__name__)

_CHUNK: Final = 64 << 10
_EXIT_S: Final = 2.0
"""For a server to exit after its stdin has been closed."""
_KILL_S: Final = 4.0
"""For the launcher to end the group after that; above its own bounds together."""
_LOG_LINE: Final = 2000
"""Bytes of a line of stderr in the log."""
_LOG_LINES: Final = 50
"""Lines of stderr in the log within `_LOG_WINDOW_S`; a chatty server must not fill the disk."""
_LOG_WINDOW_S: Final = 10.0


async def start(server: McpServer) -> tuple[asyncio.subprocess.Process, StdoutPipe, int]:
    """The launcher's process, the server's stdout, and the descriptor that keeps them alive.

    Raises:
        ToolUnavailable: the command does not exist, or the process could not be started.
    """
    assert server.command is not None
    environment = get_default_environment() | dict(server.env)
    directory = Path(server.cwd or ".")
    # Looked up here as well as by the launcher, since here it can be said what is missing.
    if (
        shutil.which(
            directory / server.command if "/" in server.command else server.command, path=environment.get("PATH")
        )
        is None
    ):
        raise ToolUnavailable(
            f"the command '{server.command}' of MCP server '{server.name}' was not found; install it, or give its "
            "full path in the server's configuration"
        )
    end, lifeline = os.pipe()
    stdout = StdoutPipe()
    try:
        await stdout.open()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", stdio_launcher.__file__, str(end), "--", server.command, *server.args,
            stdin=asyncio.subprocess.PIPE, stdout=stdout.child_end, stderr=asyncio.subprocess.PIPE,
            env=environment, cwd=server.cwd, pass_fds=(end,), start_new_session=True,
        )  # fmt: skip
    except BaseException as error:
        os.close(lifeline)  # which ends the launcher too, should it have started
        stdout.close()
        if not isinstance(error, OSError):
            raise
        raise ToolUnavailable(
            f"MCP server '{server.name}' could not be started: {error.strerror or error}; check its 'command' and 'cwd'"
        ) from error
    finally:
        os.close(end)
        stdout.release_child_end()
    return process, stdout, lifeline


async def stop(name: str, process: asyncio.subprocess.Process, stdout: StdoutPipe, lifeline: int) -> None:
    """End what `start` gave, and all that it started; bounded by the times above."""
    assert process.stdin is not None
    process.stdin.close()
    # Read on: a server that is stuck writing can't exit.
    rest = asyncio.create_task(_discard(stdout), name=f"mcp-drain-{name}")
    if not await _exited(process, _EXIT_S):
        _log.info("MCP server %s does not exit by itself; terminating its process group", name)
    os.close(lifeline)
    if not await _exited(process, _KILL_S):
        _log.warning("MCP server %s (launcher pid %d) could not be ended; killing its launcher", name, process.pid)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await _exited(process, _EXIT_S)
    rest.cancel()
    await asyncio.wait({rest})
    stdout.close()


async def _exited(process: asyncio.subprocess.Process, timeout: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await process.wait()
    return process.returncode is not None


async def _discard(stdout: StdoutPipe) -> None:
    while await stdout.read():
        pass


async def log_stderr(name: str, stderr: asyncio.StreamReader) -> None:
    """The server's stderr, line by line, in the log and within its bounds."""
    lines, pace = LineSplitter(_LOG_LINE), Pace()
    window, logged, dropped = time.monotonic(), 0, 0
    while chunk := await stderr.read(_CHUNK):
        began, left_out = pace.clock(), dropped
        for line in lines.feed(chunk):
            now = time.monotonic()
            if now - window > _LOG_WINDOW_S:
                if dropped:
                    _log.warning("MCP server %s: %d more lines of stderr were left out", name, dropped)
                window, logged, dropped = now, 0, 0
            if logged >= _LOG_LINES:
                dropped += 1
                continue
            logged += 1
            text = line.head[:_LOG_LINE] if isinstance(line, TooLong) else line
            _log.info("MCP server %s: %s", name, text.decode(errors="replace").rstrip())
        if dropped > left_out:
            pace.spent(pace.clock() - began)
            await asyncio.sleep(pace.rest())
