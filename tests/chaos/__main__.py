"""``python -m tests.chaos --seed 1 --jobs 1000 --seconds 60``: see the module docstrings, or ``make chaos``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import structlog

from tests.chaos.audit import lines
from tests.chaos.broken_builds import BROKEN
from tests.chaos.driver import Options, Report, last_line, run
from tests.chaos.report import case_file


def main() -> int:
    """Run once; 0 where every promise was kept, 1 where one was broken."""
    options, arguments = _options()
    # What the driver's own connection meets is what it does to the fleet.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    folder = Path(tempfile.mkdtemp(prefix=f"toolfleet-chaos-{options.seed}-", dir=arguments.folder))
    print(
        f"chaos: seed {options.seed}, {options.jobs} jobs in {options.seconds:g} s, everything lies in {folder}",
        flush=True,
    )
    try:
        report = asyncio.run(run(options, folder))
    except KeyboardInterrupt:
        print(f"interrupted; what was written so far lies in {folder}")
        return 130
    if not report.verdict.passed:
        _tell_failure(report, folder)
    for line in lines(report.verdict):
        print(line)
    if not report.verdict.passed:
        print(f"run it again: {again(options)}")
        print(f"everything lies in {folder}")
    elif not arguments.keep:
        shutil.rmtree(folder)
    print(last_line(report))
    return 0 if report.verdict.passed else 1


def again(options: Options) -> str:
    """The command that makes the same run."""
    broken = f" --broken {options.broken}" if options.broken else ""
    return (
        f"python -m tests.chaos --seed {options.seed} --jobs {options.jobs} --seconds {options.seconds:g} "
        f"--scale {options.scale:g}{broken}"
    )


def _interrupt() -> None:
    raise KeyboardInterrupt


def _tell_failure(report: Report, folder: Path) -> None:
    for job_id in dict.fromkeys(finding.job_id for finding in report.verdict.findings if finding.job_id):
        path = folder / f"case-{job_id}.txt"
        path.write_text(case_file(job_id, report.evidence, report.verdict, folder), encoding="utf-8")
        print(f"case: {path}")


def _options() -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="of jobs, faults and decisions; made where missing")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60, help="in which they are submitted and faults come")
    parser.add_argument("--scale", type=float, default=0.07, help="of leases and faults; 1 for those of production")
    parser.add_argument("--workers", type=int, default=4, help="in all three tiers together, at least 3")
    parser.add_argument("--apis", type=int, default=2)
    parser.add_argument("--broken", choices=sorted(BROKEN), help="hand a build to the fleet that breaks one rule")
    parser.add_argument("--no-faults", action="store_true", help="jobs alone")
    parser.add_argument("--keep", action="store_true", help="keep the folder of a run that passed, too")
    parser.add_argument("--folder", type=Path, default=None, help="where the run's folder is made")
    told = parser.parse_args()
    workers = {"high": 1, "normal": max(1, told.workers - 2), "low": 1}
    seed = told.seed if told.seed is not None else random.SystemRandom().randrange(1_000_000)
    options = Options(
        seed, told.jobs, told.seconds, told.scale, workers=workers, apis=told.apis, broken=told.broken,
        faults=not told.no_faults,
    )  # fmt: skip
    return options, told


if __name__ == "__main__":
    sys.exit(main())
