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
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from weakref import WeakValueDictionary

import anyio
from mcp.client.stdio import get_default_environment
from mcp.shared.message import SessionMessage
from mcp_types import (
    ErrorData,
    JSONRPCError,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    jsonrpc_message_adapter,
)

from toolfleet.services.background_jobs.errors import ToolUnavailable
from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution import stdio_launcher
from toolfleet.services.tool_execution.exchange import (
    NO_PROBE_ANSWER_CODE,
    TOO_LARGE_CODE,
    UNREADABLE_CODE,
    Exchange,
    current_exchange,
)
from toolfleet.services.tool_execution.progress_gate import Pace, ProgressGate, is_log_message, progress_token
from toolfleet.services.tool_execution.stdio_lines import LineSplitter, TooLong, answered_id
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
_PROBE: Final = "server/discover"

_Asked = WeakValueDictionary[int | str | None, Exchange]
"""What was asked, by request id. Weak: what nobody waits for any more may never be answered."""


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
    process, stdout, lifeline = await _start(server)
    assert process.stdin is not None
    assert process.stderr is not None
    errors = asyncio.create_task(_log_stderr(server.name, process.stderr), name=f"mcp-stderr-{server.name}")
    probe = _Probe(asyncio.get_running_loop().time() + probe_timeout)
    gates: dict[int | str, ProgressGate] = {}
    asked: _Asked = WeakValueDictionary()
    ending = asyncio.create_task(_tell_end(process, asked), name=f"mcp-end-{server.name}")
    try:
        yield (
            _Reader(server.name, stdout, max_line, on_end, probe, gates, asked),
            _Writer(process.stdin, probe, gates, asked),
        )
    finally:
        # Bounded by its own time-outs, and must run to its end: what is cut short here stays as a process.
        with anyio.CancelScope(shield=True):
            await _stop(server.name, process, stdout, lifeline)
            errors.cancel()
            ending.cancel()
            await asyncio.wait({errors, ending})


async def _start(server: McpServer) -> tuple[asyncio.subprocess.Process, StdoutPipe, int]:
    """The launcher's process, the server's stdout, and the descriptor that keeps them alive."""
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


async def _stop(name: str, process: asyncio.subprocess.Process, stdout: StdoutPipe, lifeline: int) -> None:
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


async def _tell_end(process: asyncio.subprocess.Process, asked: _Asked) -> None:
    # The launcher ends after the server and all that it started.
    await process.wait()
    for exchange in list(asked.values()):
        exchange.server_done()


async def _exited(process: asyncio.subprocess.Process, timeout: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout):
            await process.wait()
    return process.returncode is not None


async def _discard(stdout: StdoutPipe) -> None:
    while await stdout.read():
        pass


class _Reader:
    """The SDK's read stream over the server's stdout."""

    def __init__(
        self,
        name: str,
        stdout: StdoutPipe,
        max_line: int,
        on_end: Callable[[], None],
        probe: _Probe,
        gates: Mapping[int | str, ProgressGate],
        asked: _Asked,
    ) -> None:
        self._name = name
        self._stdout = stdout
        self._lines = LineSplitter(max_line)
        self._max_line = max_line
        self._ready: deque[SessionMessage] = deque()
        self._on_end = on_end
        self._probe: _Probe | None = probe
        self._gates = gates
        self._asked = asked
        self._pace = Pace()
        self._closed = False

    async def receive(self) -> SessionMessage | Exception:
        """The next message.

        Raises:
            anyio.EndOfStream: the server has closed its stdout.
        """
        while not self._ready:
            await self._rest()
            chunk = b"" if self._closed else await self._chunk()
            if chunk is None:
                continue
            if not chunk:
                self._on_end()
                raise anyio.EndOfStream
            self._read(chunk)
        return self._ready.popleft()

    async def _rest(self) -> None:
        """Leave a server alone that floods; what it has said apart from that was passed on before."""
        if (seconds := self._pace.rest()) > 0:
            self._stdout.pause()
            await asyncio.sleep(seconds)

    def _read(self, chunk: bytes) -> None:
        flooding, began = 0, self._pace.clock()
        for line in self._lines.feed(chunk):
            if isinstance(line, bytes) and (told := self._progress(line)) is not None:
                flooding += not told
            elif (message := self._message(line)) is not None:
                self._ready.append(message)
        if flooding:
            self._pace.spent(self._pace.clock() - began)

    def _progress(self, line: bytes) -> bool | None:
        """Of a message that is progress or a log line: whether it was told one by one. None for any other."""
        if is_log_message(line):
            return False
        token = progress_token(line)
        if token is None:
            return None
        gate = self._gates.get(token)
        # What comes after its call has ended is for nobody.
        return gate is not None and not gate.offer(line)

    async def _chunk(self) -> bytes | None:
        """What the server wrote; None where the time of the probe ran out first."""
        if self._probe is None:
            return await self._stdout.read()
        try:
            async with asyncio.timeout_at(self._probe.until):
                return await self._stdout.read()
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
        if isinstance(message, JSONRPCResponse | JSONRPCError) and (exchange := self._asked.get(message.id)):
            exchange.answered(result=isinstance(message, JSONRPCResponse))
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

    def __init__(
        self, stdin: asyncio.StreamWriter, probe: _Probe, gates: dict[int | str, ProgressGate], asked: _Asked
    ) -> None:
        self._stdin = stdin
        self._probe = probe
        self._gates = gates
        self._asked = asked

    async def send(self, item: SessionMessage) -> None:
        """Write a message whole: it is handed over before the first wait, so a cancelled sender can't cut it.

        Raises:
            anyio.BrokenResourceError: the server does not read any more.
        """
        line = item.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"
        told = current_exchange() if _is_cancel(item) else None
        try:
            if self._stdin.is_closing():
                raise BrokenPipeError
            if isinstance(item.message, JSONRPCRequest):
                self._note(item.message, current_exchange())
            self._stdin.write(line)
            await self._stdin.drain()
        except OSError as error:
            if told is not None:
                told.server_told(False)
            raise anyio.BrokenResourceError from error
        if told is not None:
            told.server_told(True)

    def _note(self, request: JSONRPCRequest, exchange: Exchange | None) -> None:
        if request.method == _PROBE:
            self._probe.request_id = request.id
        if exchange is None:
            return
        exchange.asks()
        self._asked[request.id] = exchange
        if exchange.progress is not None:
            # The SDK takes the request's id for its progress token.
            self._gates[request.id] = exchange.progress
            exchange.progress.on_close(partial(self._gates.pop, request.id, None))

    async def aclose(self) -> None:
        """Tell the server that nothing more comes."""
        self._stdin.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.aclose()


def _is_cancel(item: SessionMessage) -> bool:
    return isinstance(item.message, JSONRPCNotification) and item.message.method == "notifications/cancelled"


def _error(request_id: int | str, code: int, message: str, data: int | None = None) -> SessionMessage:
    """An error answer that the server did not give."""
    error = ErrorData(code=code, message=message, data=data)
    return SessionMessage(JSONRPCError(jsonrpc="2.0", id=request_id, error=error))


async def _log_stderr(name: str, stderr: asyncio.StreamReader) -> None:
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
