"""``python -m tests.powercut [--jobs 2000] [--seed 1] [--settings shipped,embedded,default]``, as root.

Each run: servers with these settings on a disk of their own, an API, workers, clients; in the middle of it the power
of the disk is cut and everything killed; then all of it is started on what is left. A line a figure, and one JSON
object on the last line. Exit code 0 where nothing acknowledged was lost with our settings and something with the
servers' defaults; 1 where not; 2 where this machine can't do it; 130 where it was interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from tests.powercut.audit import Figures, verdict
from tests.powercut.device import what_is_missing
from tests.powercut.run import run
from tests.powercut.servers import SETTINGS

_CANNOT = 2
_INTERRUPTED = 130


def say(text: str) -> None:
    """A line of the report, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def report(settings: str, figures: Figures) -> None:
    """A line a figure."""
    for name, value in figures.as_json().items():
        shown = ", ".join(f"{count} {status}" for status, count in value.items()) if isinstance(value, dict) else value
        say(f"  {settings:9} {name:20} {shown}")


async def main(chosen: list[str], jobs: int, seed: int) -> int:
    """All runs, one after the other; the exit code."""
    wrong: list[str] = []
    summary: dict[str, object] = {"jobs": jobs, "seed": seed}
    for settings in chosen:
        say(f"{settings}: {jobs} jobs, seed {seed}")
        with tempfile.TemporaryDirectory(prefix="toolfleet-powercut-") as folder:
            figures, notes = await run(settings, Path(folder), jobs=jobs, seed=seed)
        report(settings, figures)
        for note in notes:
            say(f"  {settings:9} {note}")
        wrong += verdict(settings, figures, jobs)
        summary[settings] = figures.as_json()
    for line in wrong:
        say(f"FAILED: {line}")
    say(json.dumps({**summary, "failed": wrong}))
    return 1 if wrong else 0


async def cleanly(running: Coroutine[Any, Any, int]) -> int:
    """Ended from outside, it cleans up first; `make` and a terminal send their signals more than once.

    Raises:
        asyncio.CancelledError: it was ended.
    """
    task = asyncio.create_task(running)
    loop = asyncio.get_running_loop()
    asked = False

    def end() -> None:
        nonlocal asked
        if not asked:
            asked = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    return await task


def in_own_namespace() -> None:
    """Become the same program in a mount namespace of its own: its mounts, and the loop devices under them, end with
    its last process, even if it is killed."""
    assert __package__ is not None, "run it as python -m tests.powercut"
    unshare = shutil.which("unshare")
    assert unshare is not None, "what_is_missing() has looked for it"
    module = [sys.executable, "-m", __package__, "--inside", *sys.argv[1:]]
    os.execv(unshare, [unshare, "--mount", "--propagation", "private", *module])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make powercut")
    parser.add_argument("--jobs", type=int, default=2000, help="acknowledged before the power is cut")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="of the servers; `default` is the control")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.settings = options.settings.split(",")
    if unknown := set(options.settings) - set(SETTINGS):
        parser.error(f"no such settings: {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    return options


if __name__ == "__main__":
    told = parsed()
    if missing := what_is_missing(os.geteuid()):
        sys.stderr.write("".join(f"powercut needs {each}\n" for each in missing))
        sys.exit(_CANNOT)
    if not told.inside:
        in_own_namespace()
    try:
        code = asyncio.run(cleanly(main(told.settings, told.jobs, told.seed)))
    except asyncio.CancelledError:
        code = _INTERRUPTED
    sys.exit(code)
