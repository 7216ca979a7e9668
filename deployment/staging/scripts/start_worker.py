#!/usr/bin/env python3
"""Starts one worker, after a look at everything that it needs.

All that is missing is said at once, each with what to do about it; then nothing is started. `--check` only looks, and
changes nothing: it makes no stream, no directory and no key.

Exit codes: 0 all is there, or the worker has ended in order; 1 something is missing, or the worker broke; 2 wrong
usage. Settings come from the environment (deployment/staging/env.example).

This file runs on old versions of Python and without the package, so that it can say that one of them is the trouble.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

MIN_PYTHON = (3, 11)
"""`requires-python` of pyproject.toml."""
TIERS = ("high", "normal", "low")
ALL_ELSE = "settings, state directory, NATS, Redis, Consul and MCP servers"


def main(argv: list[str] | None = None) -> int:
    """Check, then run until told to stop; the exit code."""
    options = _parse(argv)
    missing = _missing_foundation()
    if missing:
        print("\n".join(missing), file=sys.stderr)
        print(f"unchecked  {ALL_ELSE}: only the package can look at them", file=sys.stderr)
        return 1
    import worker_checks
    import worker_process

    if options.check:
        findings = asyncio.run(worker_checks.check_environment())
        print("\n".join(finding.line() for finding in findings))
        return 1 if worker_checks.is_missing(findings) else 0
    return worker_process.run(options.tier, options.name, options.status_file)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="start_worker.py", description="Checks the environment and runs a worker.")
    parser.add_argument("--tier", choices=TIERS, help="the jobs that it takes")
    parser.add_argument("--name", help="unique in the fleet; <tier>-<host>-<pid> where it is not given")
    parser.add_argument("--status-file", type=Path, help="where it says every few seconds how it is, as JSON")
    parser.add_argument("--check", action="store_true", help="only say what is there and what is missing")
    options = parser.parse_args(argv)
    if options.tier is None and not options.check:
        parser.error("--tier is needed to run a worker: high, normal or low")
    return options


def _missing_foundation() -> list[str]:
    """What keeps the package from being used; the other checks are made by it."""
    wanted = ".".join(map(str, MIN_PYTHON))
    if sys.version_info[:2] < MIN_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        return [
            f"missing    Python: {sys.executable} is {found}, {wanted} or later is needed. Set TOOLFLEET_PYTHON to one",
            "unchecked  package: it needs that Python",
        ]
    try:
        import toolfleet.bootstrap  # noqa: F401 - imported to see that it and all that it needs is there
    except ImportError as error:
        return [
            f"missing    package: {sys.executable} can't import toolfleet: {error}. Run 'make setup' in the project, "
            "or set TOOLFLEET_PYTHON to the interpreter that has it installed"
        ]
    return []


if __name__ == "__main__":
    sys.exit(main())
