"""The worker that `start_worker.py` runs, once its environment has been looked at."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import structlog
from pydantic import ValidationError
from pydantic_settings import SettingsError
from worker_checks import Finding, check_settings, check_surroundings, is_missing, make_streams

from toolfleet.cli.exits import CliError
from toolfleet.cli.processes import run_worker
from toolfleet.services.background_jobs.errors import QueueError
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.discovery.models import DiscoveryError
from toolfleet.services.telemetry.logs import configure_logging
from toolfleet.settings import Settings

log = structlog.get_logger("toolfleet.start_worker")


def run(tier: str, name: str | None, status_file: Path | None) -> int:
    """Check, then work until told to stop.

    Returns:
        0 after a stop in order, 1 where something is missing or a loop of the worker broke.
    """
    try:
        settings = Settings() if name is None else Settings(worker_name=name)
    except (ValidationError, SettingsError):
        # Without settings it is not known how to log.
        print("\n".join(finding.line() for finding in check_settings()), file=sys.stderr)
        return 1
    configure_logging(settings)
    try:
        findings = asyncio.run(_look(settings))
        _tell(findings)
        return 1 if is_missing(findings) else run_worker(settings, Tier(tier), status_file)
    except (CliError, DiscoveryError, QueueError) as error:
        # What was there a moment ago is gone, or is not what it must be.
        log.error("worker.not_started", error=str(error))
        return 1


async def _look(settings: Settings) -> list[Finding]:
    findings = await check_surroundings(settings, writes=False)
    return findings if is_missing(findings) else [*findings, *await make_streams(settings)]


def _tell(findings: list[Finding]) -> None:
    for finding in findings:
        if finding.level == "missing":
            log.error("environment.missing", part=finding.part, problem=finding.text)
        elif finding.level == "warning":
            log.warning("environment.warning", part=finding.part, problem=finding.text)
