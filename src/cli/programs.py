"""One of this package's own programs as a child process of `up` or `demo`: started, ready, stopped."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from toolfleet.services.embedded.errors import ServerNotRunning, ServerStartFailed
from toolfleet.services.embedded.process import ChildProcess

START_TIMEOUT_S: Final = 60.0
"""Generous: on a slow machine the first start compiles every module."""
_POLL_S: Final = 0.02

CLI: Final = "toolfleet.cli"
WEB_TOOLS: Final = "toolfleet.services.web_tools"


class Program:
    """A module of this package as a process; it has the life of an `EmbeddedServer`."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], *, folder: Path, ready_file: Path,
        env: Mapping[str, str | None],
    ) -> None:  # fmt: skip
        """
        Args:
            name: for messages, and of the log file in `folder`.
            module: what `python -m` runs.
            arguments: its command line.
            folder: where it runs and logs.
            ready_file: the program makes it when it is ready, and not before.
            env: variables it has otherwise than this process; None takes one away.
        """
        self.name = name
        self.arguments = list(arguments)
        self._module = module
        self._folder = folder
        self._ready_file = ready_file
        self._env = dict(env)
        self._process: ChildProcess | None = None

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.running

    def launch(self) -> None:
        """Start the process, without waiting until it is ready."""
        self._ready_file.unlink(missing_ok=True)
        # -P: what lies in the folder it runs in must not be taken for a module.
        command = [sys.executable, "-P", "-m", self._module, *self.arguments]
        self._process = ChildProcess(command, self._folder, self._folder / f"{self.name}.log", env=self._env)

    async def start(self) -> None:
        """Start the process, unless it was launched, and wait until it is ready.

        Raises:
            ServerStartFailed: it ended or was not ready in time; the message has its last log lines.
        """
        if not self.running:
            self.launch()
        assert self._process is not None
        process = self._process
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not self._ready_file.exists():
                    if not process.running:
                        raise ServerStartFailed(self.obituary())
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            await process.kill()
            raise ServerStartFailed(
                f"{self.name} was not ready after {START_TIMEOUT_S:g} s. {self.last_words()}"
            ) from None

    @property
    def ready_text(self) -> str:
        """What the program wrote into its ready file."""
        return self._ready_file.read_text(encoding="utf-8").strip()

    async def wait(self) -> int:
        """The exit code, as soon as the process has ended. Raises `ServerNotRunning` where there never was one."""
        if self._process is None:
            raise ServerNotRunning(f"{self.name} was not started")
        return await self._process.wait()

    async def stop(self, grace: float) -> None:
        """SIGTERM, SIGKILL after `grace` seconds. Safe to repeat."""
        if self._process is not None:
            await self._process.stop(grace)

    async def kill(self) -> None:
        """SIGKILL. Safe to repeat."""
        if self._process is not None:
            await self._process.kill()

    def obituary(self) -> str:
        """How it ended, with its last log lines."""
        code = self._process.exit_code if self._process else None
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return f"{self.name} ended {how}. {self.last_words()}"

    def last_words(self) -> str:
        """Its last log lines, for messages."""
        tail = self._process.log_tail() if self._process else ""
        return f"The end of the log of {self.name}:\n{tail}" if tail else f"{self.name} wrote no log"
