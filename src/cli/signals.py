"""Ctrl-C, SIGTERM and SIGHUP as events: the first asks to stop, the second to stop at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from toolfleet.cli.exits import SIGNAL_BASE, CliError

T = TypeVar("T")

_NUMBERS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Takes the signals over while open, in a running event loop's main thread."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        self._number: signal.Signals | None = None
        self._taken: list[signal.Signals] = []

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in _NUMBERS:
            # `nohup toolfleet up &` means it. Of SIGINT it says nothing: scripts start all with `&` that way.
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._heard, number)
                self._taken.append(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in self._taken:
            loop.remove_signal_handler(number)

    @property
    def exit_code(self) -> int:
        """As of a process that the first signal had ended."""
        return SIGNAL_BASE + (self._number or signal.SIGTERM)

    def _heard(self, number: signal.Signals) -> None:
        if self.asked.is_set():
            self.insisted.set()
        else:
            self._number = number
            self.asked.set()

    async def unless_asked(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; a signal cancels it, and it cleans up in peace.

        Raises:
            CliError: a signal came first.
        """
        task = asyncio.ensure_future(work)
        asked = asyncio.ensure_future(self.asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
            name = self._number.name if self._number else "a signal"
            raise CliError(f"stopped by {name}", self.exit_code)
        finally:
            asked.cancel()
