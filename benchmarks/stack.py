"""Real servers and worker processes for a benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings


def quiet() -> None:
    """Only errors: a report is read by people and its last line by programs."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


@dataclass(frozen=True, slots=True)
class Stack:
    """Where the servers of one measurement are."""

    nats_url: str
    redis_url: str

    def settings(self, **changes: object) -> Settings:
        """Settings for these servers, whatever the environment says."""
        return Settings.model_validate(
            {"nats_url": self.nats_url, "redis_url": self.redis_url, "log_level": "error", **changes}
        )


@contextlib.asynccontextmanager
async def servers(*, durable: bool) -> AsyncIterator[Stack]:
    """Fresh servers in a temporary directory: at their default durability, or syncing every write."""
    with tempfile.TemporaryDirectory(prefix="toolfleet-bench-") as folder:
        root = Path(folder)
        async with (
            EmbeddedNats(root / "nats", durable=durable) as nats,
            EmbeddedValkey(root / "valkey", durable=durable) as valkey,
        ):
            yield Stack(nats.url, valkey.url)


class WorkerProcess:
    """A child that says `ready` on its standard output when it works, and ends on SIGTERM."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def line(self) -> str:
        """The next line of its standard output."""
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()

    @property
    def rss_mb(self) -> float:
        """Resident memory now, from /proc."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    @property
    def cpu_s(self) -> float:
        """User and system time so far, from /proc."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def child(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> AsyncIterator[WorkerProcess]:
    """A process of one of this package's modules, ended with the context."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments,
        stdout=asyncio.subprocess.PIPE, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            line = await process.stdout.readline()
        if line.strip() != b"ready":
            raise RuntimeError(f"{module} ended before it was ready; its error is above")
        yield WorkerProcess(process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
