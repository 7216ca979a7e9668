"""The way to one MCP server: a session where there is one, a new one where it broke, and a pause after failures.

A session is shared by every call that runs; it is replaced when it ends, and retired - no new calls, the running ones
finish - when the server has forgotten it or stopped answering. So a crashed or hung server costs only the calls that
were on it.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections.abc import Coroutine
from typing import Any, Final

from toolfleet.services.background_jobs.errors import ToolUnavailable
from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution.mcp_session import McpSession, Mode, SessionLimits
from toolfleet.settings import Settings

_log = logging.getLogger(__name__)

_PAUSES_S: Final = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Before the next attempt to open, after so many failures in a row. None after the first: a crash is no pattern yet."""
_AWAITED_PAUSE_S: Final = 5.0
"""A call waits for the end of a pause up to this long, where it has the time; above it, it is refused at once."""
_AUTO_SHARE: Final = 0.6
"""Of the time to connect, for the attempt with the newest protocol over HTTP. Servers that never answer a question from
before the handshake are left the rest for the older one. Over stdio the session sees to it with one process: a second
one would have to start from the beginning."""


class ServerLink:
    """Sessions with one server, one at a time for new calls.

    Args:
        server: how it is reached.
        settings: bounds of its sessions.
    """

    def __init__(self, server: McpServer, settings: Settings) -> None:
        self.server = server
        self._limits = SessionLimits(
            connect_timeout=settings.mcp_connect_timeout,
            max_result_bytes=settings.max_result_bytes,
            max_connections=min(settings.mcp_max_connections, _open_files() // 2),
        )
        self._session: McpSession | None = None
        self._opening: asyncio.Task[McpSession] | None = None
        self._background: set[asyncio.Task[Any]] = set()
        self._retired: set[McpSession] = set()
        self._probing: McpSession | None = None
        self._failures = 0
        self._not_before = 0.0
        self._last_failure = ""
        self._mode: Mode = "auto"
        self._slow = False
        self._closed = False
        self.opened = 0
        """Sessions opened so far."""

    async def session(self, timeout: float) -> McpSession:
        """A usable session, opened if need be; concurrent callers share one attempt.

        Raises:
            ToolUnavailable: there is none and none can be opened now, or not within the time-out (seconds).
        """
        deadline = time.monotonic() + timeout
        while True:
            if self._session is not None:
                if self._session.usable:
                    return self._session
                self._drop(self._session)
            if self._closed:
                raise ToolUnavailable(f"MCP server '{self.server.name}' is not used any more")
            pause = self._pause(deadline) if self._opening is None else 0.0
            if pause == 0:
                return await self._joined(deadline, timeout)
            await asyncio.sleep(pause)

    async def _joined(self, deadline: float, timeout: float) -> McpSession:
        """The session of the attempt to open that runs, or of a new one."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(), name=f"mcp-open-{self.server.name}")
            self._opening.add_done_callback(self._opened)
        done, _ = await asyncio.wait({self._opening}, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise ToolUnavailable(
                f"no session with MCP server '{self.server.name}' within the {timeout:g} s that the call has"
            )
        opened = done.pop()
        if opened.cancelled():
            raise ToolUnavailable(f"MCP server '{self.server.name}' is not used any more")
        return opened.result()

    def retire(self, session: McpSession) -> None:
        """Make no new calls on this session; it is closed once the running ones have ended."""
        if self._session is session:
            self._session = None
            self._in_background(self._close_when_idle(session))

    def suspect(self, session: McpSession) -> None:
        """A call on it timed out. Ask the server for a sign of life, and retire the session where there is none."""
        stateless = self.server.url is not None and session.modern
        if self._probing is None and not stateless and session.usable:
            self._probing = session
            self._in_background(self._probe(session))

    def leave(self) -> None:
        """The server is gone from the registry: no new calls; the running ones finish."""
        self._closed = True
        if self._session is not None:
            self.retire(self._session)

    @property
    def idle(self) -> bool:
        """Whether nothing of it runs any more."""
        return self._session is None and self._opening is None and not self._background

    async def close(self) -> None:
        """End the session and what is in the background. Safe to repeat."""
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        if self._session is not None:
            self._drop(self._session)
        for session in self._retired:
            self._in_background(session.close())
        while self._background:
            await asyncio.wait(set(self._background))

    def _pause(self, deadline: float) -> float:
        """Seconds until the next attempt to open may start.

        Raises:
            ToolUnavailable: longer than a call waits, or than this one has.
        """
        now = time.monotonic()
        left = self._not_before - now
        if left > min(_AWAITED_PAUSE_S, deadline - now) and left > 0:
            raise ToolUnavailable(f"{self._last_failure}; the next attempt is due in {left:.1f} s")
        return max(0.0, left)

    async def _open(self) -> McpSession:
        session = await self._connected()
        self._session = session
        self.opened += 1
        _log.info(
            "session with MCP server %s (%s) opened, protocol %s",
            self.server.name, self.server.location, session.protocol_version,
        )  # fmt: skip
        if self._closed:
            self.retire(session)  # the registry has dropped the server meanwhile
        return session

    async def _connected(self) -> McpSession:
        """Connect in the mode that worked last; the older handshake is tried where the newest protocol gets no answer.

        Raises:
            ToolUnavailable: neither worked.
        """
        left = self._limits.connect_timeout
        if self._mode == "auto":
            started = time.monotonic()
            share = 1.0 if self._slow or self.server.url is None else _AUTO_SHARE
            try:
                session = await self._attempt("auto", left * share)
                if self.server.url is None and not session.modern:
                    # Some old servers fill their stderr at a question that they do not know: ask it once.
                    self._mode = "legacy"
                return session
            except TimeoutError:
                left *= 1 - share
                if left == 0:
                    raise self._no_answer() from None
            except ToolUnavailable as error:
                # Some older stdio servers end at any message that is not the handshake.
                if not error.details.get("closed"):
                    raise
                left -= time.monotonic() - started
        try:
            session = await self._attempt("legacy", left)
        except TimeoutError:
            raise self._no_answer() from None
        except ToolUnavailable:
            self._mode = "auto"  # the server may have been exchanged for one that knows the newest protocol alone
            raise
        self._mode = "legacy"
        return session

    def _no_answer(self) -> ToolUnavailable:
        # Perhaps it only starts slowly: the next time the newest protocol gets all the time, then both again.
        self._mode, self._slow = "auto", not self._slow
        return ToolUnavailable(
            f"MCP server '{self.server.name}' ({self.server.location}) did not answer within "
            f"{self._limits.connect_timeout:g} s; it may be hung, or TOOLFLEET_MCP_CONNECT_TIMEOUT too short"
        )

    async def _attempt(self, mode: Mode, timeout: float) -> McpSession:
        session = McpSession(self.server, self._limits)
        try:
            await session.open(mode, timeout)
        except BaseException:
            self._in_background(session.close())
            raise
        return session

    def _opened(self, task: asyncio.Task[McpSession]) -> None:
        self._opening = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._failed(str(error))
            _log.warning("MCP server %s: %s", self.server.name, error)

    def _failed(self, reason: str) -> None:
        self._last_failure = reason
        self._not_before = time.monotonic() + _PAUSES_S[min(self._failures, len(_PAUSES_S) - 1)]
        self._failures += 1

    def _drop(self, session: McpSession) -> None:
        """Let go of a session that has ended; one that never answered a call counts as a failure to open."""
        self._session = None
        if session.answered:
            self._failures = 0
        else:
            self._failed(f"MCP server '{self.server.name}' ended its session before it answered a call")
        self._in_background(session.close())

    async def _probe(self, session: McpSession) -> None:
        try:
            if not await session.alive() and session.usable:
                _log.warning("MCP server %s shows no sign of life; new calls get a new session", self.server.name)
                self.retire(session)
        finally:
            self._probing = None

    async def _close_when_idle(self, session: McpSession) -> None:
        self._retired.add(session)
        try:
            await session.idle()
            await session.close()
        finally:
            self._retired.discard(session)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"mcp-link-{self.server.name}")
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _open_files() -> int:
    """The process's limit of open files: above it connections fail where they could have waited."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else 1 << 20
