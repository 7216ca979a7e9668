"""`toolfleet api` and `toolfleet worker`: the two long-running programs, from settings to exit code."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import uvloop

from toolfleet.bootstrap import open_worker
from toolfleet.cli.exits import FAILED, OK, CliError
from toolfleet.services.background_jobs.errors import QueueError
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.discovery.models import DiscoveryError
from toolfleet.services.telemetry.gc_tuning import settle
from toolfleet.services.telemetry.logs import configure_logging
from toolfleet.settings import Settings


def run_api(settings: Settings, ready_file: Path | None) -> int:
    """Serve the API until told to stop; `ready_file` gets its URL meanwhile.

    Raises:
        CliError: it can't start; the message says why.
    """
    from toolfleet.api.serve import serve  # late: FastAPI takes longer to load than the rest of a worker

    configure_logging(settings)

    def ready(port: int) -> None:
        if ready_file is not None:
            write_whole(ready_file, f"http://{_reachable(settings.api_host)}:{port}\n")

    with _start_errors():
        try:
            serve(settings, port=settings.api_port, ready=ready)
        except OSError as error:
            where = f"{settings.api_host}:{settings.api_port}"
            raise CliError(f"the API can't listen on {where}: {error.strerror}; choose another --port") from error
        finally:
            if ready_file is not None:
                ready_file.unlink(missing_ok=True)
    return OK


def run_worker(settings: Settings, tier: Tier, status_file: Path | None) -> int:
    """Work until told to stop, then drain.

    Raises:
        CliError: it can't start, or its streams are not what they must be; the message says why.
    """
    configure_logging(settings)

    async def work() -> int:
        async with open_worker(settings, tier, status_file=status_file) as worker:
            settle()
            return await worker.run()

    with _start_errors(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())


@contextmanager
def _start_errors() -> Iterator[None]:
    try:
        yield
    except (DiscoveryError, QueueError) as error:
        raise CliError(str(error), FAILED) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file that others wait for: they may read it the moment it appears."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _reachable(host: str) -> str:
    """What a client on this machine connects to; a wildcard address is none."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "[::1]" if address.version == 6 else "127.0.0.1"
    return f"[{address}]" if address.version == 6 else str(address)
