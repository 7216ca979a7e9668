"""An API process for benchmarks of its reading side; its second word on standard output is its port."""

from __future__ import annotations

import argparse
import asyncio
import sys

import uvloop

from benchmarks.stack import quiet
from benchmarks.worker import tools
from toolfleet.api.serve import ApiServer, raise_open_files
from toolfleet.settings import Settings


async def run(settings: Settings) -> None:
    """Serve until SIGTERM."""

    def ready(port: int) -> None:
        sys.stdout.write(f"ready\n{port}\n")
        sys.stdout.flush()

    await ApiServer(settings, port=0, ready=ready, tools=tools()).run(handle_signals=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", required=True, help="JSON")
    options = parser.parse_args()
    quiet()
    raise_open_files()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(Settings.model_validate_json(options.settings)))
