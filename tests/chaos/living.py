"""A process that was armed: it says where it stopped or died, and goes on when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.support.waiting import wait_until

BOUND_S: Final = 30.0
"""Of every wait; it only bounds a failing test."""


def stop_at(point: str, nth: int = 1) -> dict[str, Any]:
    """Stop there, until it is continued."""
    return {"point": point, "nth": nth, "action": "stop"}


def kill_at(point: str, nth: int = 1) -> dict[str, Any]:
    """Die there, by SIGKILL."""
    return {"point": point, "nth": nth, "action": "kill"}


@dataclass
class Member:
    """A process of the crew."""

    name: str
    process: asyncio.subprocess.Process
    folder: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()

    async def says(self, *words: str) -> None:
        """Until its log has one of them."""
        await wait_until(lambda: any(word in self.log for word in words), f"{self.name} says {words}", BOUND_S)

    async def stops_at(self, point: str) -> None:
        """Until it has stopped itself there."""

        def stopped() -> bool:
            assert self.process.returncode is None, f"{self.name} has ended:\n{self.log}"
            return self._was_at(point) and self._state() == "T"

        await wait_until(stopped, f"{self.name} stops {point}", BOUND_S)

    async def dies_at(self, point: str) -> None:
        """Until it has killed itself there."""
        async with asyncio.timeout(BOUND_S):
            code = await self.process.wait()
        assert code == -signal.SIGKILL, self.log
        assert self._was_at(point), f"{self.name} died elsewhere"

    def stop(self) -> None:
        """Wherever it is."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After a stop."""
        self.process.send_signal(signal.SIGCONT)

    async def leave(self) -> None:
        """In order; it must end with 0."""
        self.process.terminate()
        async with asyncio.timeout(BOUND_S):
            assert await self.process.wait() == 0, self.log

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()

    def _was_at(self, point: str) -> bool:
        hits = self.folder / "hits"
        return hits.exists() and f"{point} {self.pid}" in hits.read_text().splitlines()

    def _state(self) -> str:
        """As proc(5) has it."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]
