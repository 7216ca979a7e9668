"""The machine whose power is cut: a disk, both servers on it, an API and workers."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

from tests.powercut import child
from tests.powercut.device import Device
from tests.powercut.servers import make_servers
from tests.support.waiting import wait_until
from toolfleet.services.embedded.process import ChildProcess
from toolfleet.settings import Settings

_ROOT: Final = Path(__file__).parents[2]
_WORKERS: Final = 2
_START_S: Final = 30
"""For a process to be ready; it only bounds a failing run."""

# What is short here only makes the run quick: nothing that is acknowledged hangs on it.
_SHORT: Final[dict[str, Any]] = {
    "lease": 3.0,
    "ack_wait": 3.0,
    "recovery_check_interval": 1.0,
    "retry_delays": [0.1],
    "stream_max_bytes": 256 << 20,
    "dlq_max_bytes": 16 << 20,
    "concurrency": 100,
    "log_format": "json",
    "log_level": "warning",
}


class Machine:
    """Start it, cut its power, start it again."""

    def __init__(self, settings: str, folder: Path) -> None:
        """`settings` names those of the servers (`servers.SETTINGS`); everything lies in `folder`."""
        self.ledgers = folder / "ledgers"
        self._logs = folder / "logs"
        for each in (self.ledgers, self._logs):
            each.mkdir()
        self.device = Device(folder)
        self.nats, self.redis = make_servers(settings, self.device.mount_point, self._logs)
        self._children: list[ChildProcess] = []
        self._starts = 0
        self.url = ""
        """Of the API, while it runs."""

    @property
    def settings(self) -> Settings:
        """Of every process on it."""
        return Settings.model_validate(self._told())

    def _told(self) -> dict[str, Any]:
        nats, redis = f"nats://127.0.0.1:{self.nats.port}", f"redis://127.0.0.1:{self.redis.port}/0"
        return {**_SHORT, "nats_url": nats, "redis_url": redis}

    async def start_servers(self) -> None:
        """Raises `ServerStartFailed` where one can't live with what it finds on the disk."""
        await asyncio.gather(self.nats.start(), self.redis.start())

    async def start_fleet(self) -> None:
        """The API and the workers; raises `AssertionError`, with its log, where one does not come up."""
        self._starts += 1
        names = ["api", *(f"worker{number}" for number in range(1, _WORKERS + 1))]
        self.url = f"http://127.0.0.1:{(await asyncio.gather(*(self._start(name) for name in names)))[0]}"

    async def _start(self, name: str) -> str:
        ready = self._logs / f"{name}.{self._starts}.ready"
        told = {
            "role": name.rstrip("0123456789"),
            "settings": self._told() | {"worker_name": f"{name}.{self._starts}"},
            "ledger": str(self.ledgers / f"{name}.{self._starts}.jsonl"),
            "ready": str(ready),
        }
        log = self._logs / f"{name}.log"
        process = ChildProcess([sys.executable, "-m", child.__name__, json.dumps(told)], _ROOT, log)
        self._children.append(process)

        def said() -> str | None:
            assert process.running, f"{name} ended at start:\n{process.log_tail()}"
            return ready.read_text() if ready.exists() else None

        return str(await wait_until(said, f"{name} is ready", timeout=_START_S))

    async def cut(self) -> int:
        """The power goes: first for the disk, then for everything that runs. When the last process was gone.

        Whatever a server still acknowledges in between counts as acknowledged: one that answers although its disk
        refuses is found out too.
        """
        self.device.cut()
        await self.kill()
        at = time.monotonic_ns()
        self.device.unmount()
        return at

    def plug_in(self) -> None:
        """What the firmware and the kernel do before any server runs."""
        self.device.check()
        self.device.mount()

    async def kill(self) -> None:
        """SIGKILL to all at once."""
        await asyncio.gather(self.nats.kill(), self.redis.kill(), *(process.kill() for process in self._children))
        self._children.clear()
