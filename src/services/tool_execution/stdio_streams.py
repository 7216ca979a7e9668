"""The SDK's two streams over the stdin and stdout of a stdio MCP server."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Final, Self
from weakref import WeakValueDictionary

import anyio
from mcp.shared.message import SessionMessage
from mcp_types import (
    ErrorData,
    JSONRPCError,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    jsonrpc_message_adapter,
)

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

_PROBE: Final = "server/discover"


@dataclass(slots=True)
class Probe:
    """The question before the handshake, which some older servers never answer."""

    until: float
    """On the event loop's clock."""
    request_id: int | str | None = None


@dataclass(slots=True)
class OnTheWay:
    """What the writer notes of requests, and the reader looks up for what comes back."""

    probe: Probe
    gates: dict[int | str, ProgressGate] = field(default_factory=dict)
    """Who is told the progress of a request, by its id."""
    asked: WeakValueDictionary[int | str | None, Exchange] = field(default_factory=WeakValueDictionary)
    """What was asked, by request id. Weak: what nobody waits for any more may never be answered."""


class Reader:
    """The SDK's read stream over the server's stdout."""

    def __init__(
        self,
        name: str,
        stdout: StdoutPipe,
        max_line: int,
        on_end: Callable[[], None],
        on_the_way: OnTheWay,
    ) -> None:
        self._name = name
        self._stdout = stdout
        self._lines = LineSplitter(max_line)
        self._max_line = max_line
        self._ready: deque[SessionMessage] = deque()
        self._on_end = on_end
        self._probe: Probe | None = on_the_way.probe
        self._gates = on_the_way.gates
        self._asked = on_the_way.asked
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


class Writer:
    """The SDK's write stream over the server's stdin."""

    def __init__(self, stdin: asyncio.StreamWriter, on_the_way: OnTheWay) -> None:
        self._stdin = stdin
        self._probe = on_the_way.probe
        self._gates = on_the_way.gates
        self._asked = on_the_way.asked

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
