"""Whether the machine has time for what is measured: a run on two cores next to a test suite measures the suite."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

PRESSURE: Final = Path("/proc/pressure/cpu")
"""Linux: microseconds in which some process waited for a CPU (`total=` of the line `some`)."""
EVERY_S: Final = 0.1
LATE_S: Final = 0.2
"""A wake-up of the driver that comes so much later says that its own clients are held up."""
WAITING_SHARE: Final = 0.6


class Busy:
    """Samples of the machine's load while a run lasts."""

    def __init__(self) -> None:
        self._last_busy = float("-inf")
        self._samples = 0
        self._busy = 0

    @property
    def share(self) -> float:
        """Of the samples, those that found the machine busy."""
        return round(self._busy / max(1, self._samples), 2)

    def since(self, moment: float) -> bool:
        """Whether it was busy at or after a time of the monotonic clock."""
        return self._last_busy >= moment

    async def watch(self) -> None:
        """Until cancelled."""
        waited, at = _waited_s(), time.monotonic()
        while True:
            await asyncio.sleep(EVERY_S)
            now, waited_now = time.monotonic(), _waited_s()
            late = now - at - EVERY_S
            self._samples += 1
            if late > LATE_S or (waited_now - waited) / (now - at) > WAITING_SHARE:
                self._busy += 1
                self._last_busy = now
            waited, at = waited_now, now


def _waited_s() -> float:
    """Seconds in which somebody waited for a CPU; 0 where the kernel does not tell."""
    try:
        return int(PRESSURE.read_text().split("total=")[1].split()[0]) / 1e6
    except (OSError, IndexError, ValueError):
        return 0.0
