"""What the embedded servers have in common: the way from a data directory to a server that answers, and back."""

from __future__ import annotations

import asyncio
import socket
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from toolfleet.services.embedded.errors import ServerNotRunning, ServerStartFailed
from toolfleet.services.embedded.process import ChildProcess

HOST = "127.0.0.1"
"""Embedded servers listen on loopback only: they have no passwords."""

_READY_POLL_SECONDS = 0.02
_PROBE_TIMEOUT_SECONDS = 0.5
_PORT_ATTEMPTS = 5
"""A port that was free a moment ago can be taken when the server gets to it; then another one is tried."""


class EmbeddedServer(ABC):
    """A real server as a child process; also an async context manager.

    A server keeps its ports from its first start on, so that clients find it again after `restart`, `kill` and
    `start`. It can be used from several event loops, one after the other.
    """

    name: ClassVar[str]
    """Names the server in messages and its log file in `data_dir`."""

    picked_ports: ClassVar[int]
    """How many free ports are picked for the server at its first start; 0 where it picks them itself."""

    def __init__(self, data_dir: Path, *, ports: tuple[int, ...] = (), start_timeout: float = 20.0) -> None:
        """
        Args:
            data_dir: where the server keeps its configuration, data and log; made where missing.
            ports: the ports to use, the clients' first; empty for free ones.
            start_timeout: seconds until a server that does not answer is given up.
        """
        self.data_dir = data_dir.absolute()
        self._ports = ports
        self._start_timeout = start_timeout
        self._process: ChildProcess | None = None

    @property
    def log_path(self) -> Path:
        return self.data_dir / f"{self.name}.log"

    @property
    def port(self) -> int:
        """The clients' port. Raises `ServerNotRunning` before the first start of a server that gets a free one."""
        if not self._ports:
            raise ServerNotRunning(f"{self.name} gets its port when it starts; start it first")
        return self._ports[0]

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.running

    @property
    def pid(self) -> int:
        """Raises `ServerNotRunning` where there is none."""
        return self._running_process().pid

    async def start(self) -> None:
        """Starts the server and waits until it answers; does nothing where it runs already.

        Raises:
            ServerNotInstalled: its program is not on this machine.
            ServerStartFailed: it died or did not answer in time; the message has its last log lines.
        """
        if self.running:
            return
        await asyncio.to_thread(self.data_dir.mkdir, parents=True, exist_ok=True)
        for attempts_left in reversed(range(_PORT_ATTEMPTS)):
            ports_are_new = self.picked_ports > 0 and not self._ports
            if ports_are_new:
                self._ports = free_ports(self.picked_ports)
            process = ChildProcess(self._prepare(), self.data_dir, self.log_path)
            try:
                await self._wait_until_ready(process)
            except ServerStartFailed:
                if ports_are_new:
                    self._ports = ()
                if not (attempts_left and ports_are_new and _lost_a_port(process)):
                    raise
            else:
                self._process = process
                return

    async def stop(self, grace: float = 10.0) -> None:
        """SIGTERM, SIGKILL after `grace` seconds. Safe to repeat and on a server that was killed or paused."""
        if self._process is not None:
            await self._process.stop(grace)
            self._process = None

    async def kill(self) -> None:
        """SIGKILL, as a crash would end it; its data stays. Does nothing where it does not run."""
        if self._process is not None:
            await self._process.kill()
            self._process = None

    async def restart(self) -> None:
        """Stops the server if it runs and starts it again on the same ports and data; raises as `start` does."""
        await self.stop()
        await self.start()

    async def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers. Raises `ServerNotRunning`."""
        await self._running_process().pause()

    async def resume(self) -> None:
        """SIGCONT, after `pause`. Raises `ServerNotRunning`."""
        self._running_process().resume()

    async def wait(self) -> int:
        """The exit code, as soon as the server has ended by itself. Raises `ServerNotRunning`."""
        return await self._running_process().wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    @abstractmethod
    def _prepare(self) -> list[str]:
        """Writes the configuration and returns the command. Raises `ServerNotInstalled`."""

    @abstractmethod
    async def _answers(self, pid: int) -> bool:
        """Whether the server with this pid takes work. `OSError`, `EOFError` and `TimeoutError` count as no."""

    def _running_process(self) -> ChildProcess:
        if self._process is None or not self._process.running:
            raise ServerNotRunning(f"{self.name} is not running; start it first")
        return self._process

    async def _wait_until_ready(self, process: ChildProcess) -> None:
        deadline = time.monotonic() + self._start_timeout
        try:
            while not await self._probe(process.pid):
                if not process.running:
                    raise self._failure(f"{self.name} ended at start with exit code {process.exit_code}", process)
                if time.monotonic() > deadline:
                    raise self._failure(f"{self.name} did not answer within {self._start_timeout:g} s", process)
                await asyncio.sleep(_READY_POLL_SECONDS)
        except BaseException:
            await process.kill()
            raise

    async def _probe(self, pid: int) -> bool:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_SECONDS):
                return await self._answers(pid)
        except (OSError, EOFError, TimeoutError):
            return False

    def _failure(self, what: str, process: ChildProcess) -> ServerStartFailed:
        tail = process.log_tail() or "(it wrote nothing)"
        return ServerStartFailed(f"{what}. The end of {self.log_path}:\n{tail}")


def _lost_a_port(process: ChildProcess) -> bool:
    return "address already in use" in process.log_tail().lower()


def free_ports(count: int) -> tuple[int, ...]:
    """Different loopback ports that are free for TCP and UDP now.

    They are only picked, not held: a server that finds one taken after all has to be started with others.
    """
    held: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < count:
            tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            held.append(tcp)
            tcp.bind((HOST, 0))
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            held.append(udp)
            try:
                udp.bind(tcp.getsockname())
            except OSError:
                continue
            ports.append(tcp.getsockname()[1])
    finally:
        for each in held:
            each.close()
    return tuple(ports)
