"""One child process: its own session, its log in a file, and an end that is certain.

A child is out of the terminal's process group, so Ctrl-C reaches only the parent, which then stops its children in
the order it wants. A parent that is killed takes its children along (Linux: PR_SET_PDEATHSIG). The kernel ties that
to the *thread* that started the child: start servers from a thread that lives as long as they should.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from toolfleet.services.embedded import guarded_exec
from toolfleet.services.embedded.errors import ServerNotRunning

_POLL_SECONDS = 0.02
"""How often a child is looked at while something waits for it; a `Popen` needs no event loop of its own, so one
server can be used from several loops."""

_LOG_TAIL_BYTES = 8192
_LOG_TAIL_LINES = 15


class ChildProcess:
    """A running child process with its output in a log file.

    Attributes:
        pid: the process id; also the id of its process group.
        log_path: where its standard output and error go, appended.
    """

    def __init__(
        self, command: Sequence[str], cwd: Path, log_path: Path, *, env: Mapping[str, str | None] | None = None
    ) -> None:
        """Starts `command` (its first item is an absolute path) in `cwd`.

        Args:
            env: variables that the child has otherwise than this process; None takes one away.

        Raises:
            OSError: the log file or the process cannot be made.
        """
        self.log_path = log_path
        with log_path.open("ab") as log:
            self._log_start = log.tell()
            self._popen = subprocess.Popen(  # noqa: S603 - a fixed program found by this package, no shell
                [*_guard(), *command],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_inherited(env) if env else None,
            )
        self.pid = self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number where a signal ended it."""
        return self._popen.poll()

    @property
    def running(self) -> bool:
        return self.exit_code is None

    async def wait(self, timeout: float | None = None) -> int:
        """The exit code, as soon as the process has ended.

        Raises:
            TimeoutError: it still runs after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.exit_code) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            await asyncio.sleep(_POLL_SECONDS)
        return code

    async def stop(self, grace: float) -> None:
        """SIGTERM, and SIGKILL after `grace` seconds; returns when the process is gone. Safe to repeat."""
        # It may end by itself at any moment, also between two signals.
        with contextlib.suppress(ServerNotRunning):
            self._signal(signal.SIGTERM)
            # A stopped process acts on SIGTERM only once it continues.
            self._signal(signal.SIGCONT)
        try:
            await self.wait(grace)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL to the process and what it started; returns when the process is gone. Safe to repeat."""
        with contextlib.suppress(ServerNotRunning):
            self._signal(signal.SIGKILL)
        await self.wait()

    async def pause(self) -> None:
        """SIGSTOP; returns when it has taken effect.

        Raises:
            ServerNotRunning: the process has ended.
        """
        self._signal(signal.SIGSTOP)
        while self.running and not self._is_stopped():  # noqa: ASYNC110 - the kernel offers no event for this
            await asyncio.sleep(_POLL_SECONDS)

    def resume(self) -> None:
        """SIGCONT.

        Raises:
            ServerNotRunning: the process has ended.
        """
        self._signal(signal.SIGCONT)

    def log_tail(self) -> str:
        """The last lines that this process wrote, at most 15; empty where it wrote none."""
        with self.log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def _is_stopped(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT | os.WNOHANG) is not None

    def _signal(self, number: signal.Signals) -> None:
        if not self.running:
            raise ServerNotRunning(f"process {self.pid} has ended (exit code {self.exit_code})")
        os.killpg(self.pid, number)


def _inherited(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment, handed on with changes; nothing is read from it."""
    changed = {**os.environ, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def _guard() -> list[str]:
    if sys.platform != "linux":
        return []
    # -I and -S: neither the environment nor site-packages are needed, and without them this takes about 10 ms.
    return [sys.executable, "-I", "-S", str(guarded_exec.__file__), str(os.getpid())]
