"""A stdio MCP server as a child process: the transport that the SDK's client speaks over.

In place of the SDK's own `stdio_client`, because a server must not outlive a killed worker (`stdio_launcher`), its
stderr belongs into the log, one line must not take any amount of memory, and a request must be known as written or
not. The end follows the specification: close stdin, wait, then terminate
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
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import anyio
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage
from mcp_types import ErrorData, JSONRPCError, JSONRPCRequest, jsonrpc_message_adapter

from toolfleet.services.background_jobs.errors import ToolUnavailable
from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution import stdio_launcher
from toolfleet.services.tool_execution.exchange import (
    NO_PROBE_ANSWER_CODE,
    TOO_LARGE_CODE,
    UNREADABLE_CODE,
    current_exchange,
)
from toolfleet.services.tool_execution.stdio_lines import LineSplitter, TooLong, answered_id

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
_PROBE: Final = "server/discover"


@dataclass(slots=True)
class _Probe:
    """The question before the handshake, which some older servers never answer."""

    until: float
    """On the event loop's clock."""
    request_id: int | str | None = None


@asynccontextmanager
async def stdio_transport(
    server: McpServer, *, max_line: int, on_end: Callable[[], None], probe_timeout: float
) -> AsyncIterator[tuple[_Reader, _Writer]]:
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
    process, lifeline = await _start(server)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(_log_stderr(server.name, process.stderr), name=f"mcp-stderr-{server.name}")
    probe = _Probe(asyncio.get_running_loop().time() + probe_timeout)
    try:
        yield _Reader(server.name, process.stdout, max_line, on_end, probe), _Writer(process.stdin, probe)
    finally:
        # Bounded by its own time-outs, and must run to its end: what is cut short here stays as a process.
        with anyio.CancelScope(shield=True):
            await _stop(server.name, process, lifeline)
            errors.cancel()
            await asyncio.wait({errors})


async def _start(server: McpServer) -> tuple[asyncio.subprocess.Process, int]:
    """The launcher's process and the descriptor that keeps it alive."""
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
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", stdio_launcher.__file__, str(end), "--", server.command, *server.args,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env=environment, cwd=server.cwd, pass_fds=(end,), start_new_session=True,
        )  # fmt: skip
    except BaseException as error:
        os.close(lifeline)  # which ends the launcher too, should it have started
        if not isinstance(error, OSError):
            raise
        raise ToolUnavailable(
            f"MCP server '{server.name}' could not be started: {error.strerror or error}; check its 'command' and 'cwd'"
        ) from error
    finally:
        os.close(end)
    return process, lifeline


async def _stop(name: str, process: asyncio.subprocess.Process, lifeline: int) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    # Read on: a server that is stuck writing can't exit, and asyncio sees the exit only after the pipe's end.
    rest = asyncio.create_task(_discard(process.stdout), name=f"mcp-drain-{name}")
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


async def _exited(process: asyncio.subprocess.Process, timeout: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await process.wait()
    return process.returncode is not None


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(_CHUNK):
        pass


class _Reader:
    """The SDK's read stream over the server's stdout."""

    def __init__(
        self, name: str, stdout: asyncio.StreamReader, max_line: int, on_end: Callable[[], None], probe: _Probe
    ) -> None:
        self._name = name
        self._stdout = stdout
        self._lines = LineSplitter(max_line)
        self._max_line = max_line
        self._ready: deque[SessionMessage] = deque()
        self._on_end = on_end
        self._probe: _Probe | None = probe
        self._closed = False

    async def receive(self) -> SessionMessage | Exception:
        """The next message.

        Raises:
            anyio.EndOfStream: the server has closed its stdout.
        """
        while not self._ready:
            chunk = b"" if self._closed else await self._chunk()
            if chunk is None:
                continue
            if not chunk:
                self._on_end()
                raise anyio.EndOfStream
            for line in self._lines.feed(chunk):
                message = self._message(line)
                if message is not None:
                    self._ready.append(message)
        return self._ready.popleft()

    async def _chunk(self) -> bytes | None:
        """What the server wrote; None where the time of the probe ran out first."""
        if self._probe is None:
            return await self._stdout.read(_CHUNK)
        try:
            async with asyncio.timeout_at(self._probe.until):
                return await self._stdout.read(_CHUNK)
        except TimeoutError:
            probed, self._probe = self._probe.request_id, None
            if probed is not None:
                self._ready.append(_error(probed, NO_PROBE_ANSWER_CODE, f"no answer to {_PROBE}"))
            return None

    def _message(self, line: bytes | TooLong) -> SessionMessage | None:
        if isinstance(line, TooLong):
            return self._refusal(line)
        if not line.strip():
            return None
        try:
            message = jsonrpc_message_adapter.validate_json(line, by_name=False)
        except ValueError:
            # The content is left out: it may be anything, and what is meant to be read belongs on stderr.
            _log.warning("MCP server %s wrote %d bytes to stdout that are no JSON-RPC message", self._name, len(line))
            request_id = answered_id(line)
            if request_id is None:
                return None
            reason = f"its answer of {len(line)} bytes is no valid JSON-RPC message"
            return _error(request_id, UNREADABLE_CODE, reason)
        if self._probe is not None and getattr(message, "id", None) == self._probe.request_id is not None:
            self._probe = None
        return SessionMessage(message)

    def _refusal(self, line: TooLong) -> SessionMessage | None:
        """The answer to the request whose own answer was too long."""
        _log.warning("MCP server %s sent a message of %d bytes, more than %d", self._name, line.size, self._max_line)
        request_id = line.request_id()
        if request_id is None:
            # Nobody can be told that his answer is gone, and waiting for it would last until the call's time-out.
            self._closed = True
            return None
        return _error(request_id, TOO_LARGE_CODE, "too large", line.size)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        """Deliver nothing more."""
        self._closed = True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.aclose()


class _Writer:
    """The SDK's write stream over the server's stdin."""

    def __init__(self, stdin: asyncio.StreamWriter, probe: _Probe) -> None:
        self._stdin = stdin
        self._probe = probe

    async def send(self, item: SessionMessage) -> None:
        """Write a message whole: it is handed over before the first wait, so a cancelled sender can't cut it.

        Raises:
            anyio.BrokenResourceError: the server does not read any more.
        """
        line = item.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"
        if self._stdin.is_closing():
            raise anyio.BrokenResourceError
        if (exchange := current_exchange()) is not None:
            exchange.sent = True
        if isinstance(item.message, JSONRPCRequest) and item.message.method == _PROBE:
            self._probe.request_id = item.message.id
        try:
            self._stdin.write(line)
            await self._stdin.drain()
        except OSError as error:
            raise anyio.BrokenResourceError from error

    async def aclose(self) -> None:
        """Tell the server that nothing more comes."""
        self._stdin.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.aclose()


def _error(request_id: int | str, code: int, message: str, data: int | None = None) -> SessionMessage:
    """An error answer that the server did not give."""
    error = ErrorData(code=code, message=message, data=data)
    return SessionMessage(JSONRPCError(jsonrpc="2.0", id=request_id, error=error))


async def _log_stderr(name: str, stderr: asyncio.StreamReader) -> None:
    """The server's stderr, line by line, in the log and within its bounds."""
    lines = LineSplitter(_LOG_LINE)
    window, logged, dropped = time.monotonic(), 0, 0
    while chunk := await stderr.read(_CHUNK):
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
