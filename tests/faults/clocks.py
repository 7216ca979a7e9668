"""Processes whose clock a test moves, by libfaketime. Monotonic clocks go on as they are, as when an operator or NTP
sets a machine's time.

nats-server can't be moved: it is linked statically. Where its clock counts, Redis' is moved against it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from toolfleet.services.embedded.valkey_server import EmbeddedValkey

HOUR_S = 3600


def find_library() -> str | None:
    """Where libfaketime is; None where it is not installed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return str(found[0]) if found else None


class Clock:
    """Of the processes that were started with its `environment`."""

    def __init__(self, folder: Path, library: str) -> None:
        self._offset = folder / "clock"
        self._library = library
        self.jump(0)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process."""
        return {
            "LD_PRELOAD": self._library,
            "FAKETIME_TIMESTAMP_FILE": str(self._offset),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def jump(self, seconds: int) -> None:
        """From now on the clock is so far ahead of the true time."""
        fresh = self._offset.with_suffix(".new")
        fresh.write_text(f"{seconds:+d}")
        # Moved into place: a process that reads it in between must not find half of it.
        fresh.replace(self._offset)


class MovedValkey(EmbeddedValkey):
    """A server whose clock can be moved."""

    def __init__(self, data_dir: Path, clock: Clock) -> None:
        super().__init__(data_dir, durable=False)
        self._clock = clock

    def _prepare(self) -> list[str]:
        env = shutil.which("env")
        assert env is not None, "every system has env"
        return [env, *(f"{name}={value}" for name, value in self._clock.environment.items()), *super()._prepare()]
