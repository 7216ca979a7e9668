"""Ends what would hold a shutdown up: open streams and held answers, both as soon as the server is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterator
from types import FrameType
from typing import Any, Final, TypeVar

import anyio
import uvicorn

T = TypeVar("T")

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """Whether the server is about to stop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def begin(self) -> None:
        """The server stops. Safe to repeat."""
        self._event.set()

    @property
    def begun(self) -> bool:
        """Whether the server stops."""
        return self._event.is_set()

    async def unless(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What `work` gives, or None where the server stops first; then `work` is cancelled."""
        task = asyncio.ensure_future(work)
        stop = asyncio.ensure_future(self._event.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                # The server's own cancel scope would break this waiting off, and `work` would still be running.
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({task})

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Begin at uvicorn's own signals, where the program `uvicorn` runs the app.

        uvicorn tells an app that it stops only after every answer has ended, and a stream ends when it is told.
        """
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in SIGNALS}
        chained = {
            number: handler
            for number, handler in before.items()
            if isinstance(getattr(handler, "__self__", None), uvicorn.Server)
        }

        def heard(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.begin)
            handler = chained[signal.Signals(number)]
            if callable(handler):
                handler(number, frame)

        for number in chained:
            signal.signal(number, heard)
        try:
            yield
        finally:
            for number, handler in chained.items():
                if signal.getsignal(number) is heard:
                    signal.signal(number, handler)
