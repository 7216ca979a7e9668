"""The worker that `start_worker.py` runs, once its environment has been looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import structlog
from pydantic import ValidationError
from pydantic_settings import SettingsError
from worker_checks import Finding, check_settings, check_surroundings, is_missing, make_streams

from toolfleet.bootstrap import open_worker
from toolfleet.services.background_jobs.errors import ToolfleetError
from toolfleet.services.background_jobs.task_models import Tier
from toolfleet.services.discovery.models import DiscoveryError
from toolfleet.services.telemetry.logs import configure_logging
from toolfleet.settings import Settings

log = structlog.get_logger("toolfleet.start_worker")


async def run(tier: str, name: str | None, status_file: Path | None) -> int:
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
    findings = await check_surroundings(settings, writes=False)
    try:
        if not is_missing(findings):
            findings += await make_streams(settings)
        _tell(findings)
        if is_missing(findings):
            return 1
        async with open_worker(settings, Tier(tier), status_file=status_file) as worker:
            return await worker.run()
    except (ToolfleetError, DiscoveryError) as error:
        # What was there a moment ago is gone, or is not what it must be.
        log.error("worker.not_started", error=str(error))
        return 1


def _tell(findings: list[Finding]) -> None:
    for finding in findings:
        if finding.level == "missing":
            log.error("environment.missing", part=finding.part, problem=finding.text)
        elif finding.level == "warning":
            log.warning("environment.warning", part=finding.part, problem=finding.text)
