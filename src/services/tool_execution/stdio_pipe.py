"""The reading end of a stdio server's stdout: a small pipe, which can be left alone for a while.

asyncio's own pipe of a child reads ahead as fast as the child writes, and under uvloop it is a socket pair that holds
200 KB more: a server that floods could not be slowed down, and what its other calls answer would stand behind all that.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
from typing import Final

PIPE_BYTES: Final = 16 << 10
"""Of the pipe, and of what is read ahead of it: about 250 notifications."""


class StdoutPipe(asyncio.Protocol):
    """`open` it, give `child_end` to the child, and then `release_child_end`."""

    def __init__(self) -> None:
        self._parent_end, self.child_end = os.pipe()
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # an unprivileged user's pipes may be limited; any size works
                fcntl.fcntl(self.child_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._buffer = bytearray()
        self._ended = False
        self._transport: asyncio.ReadTransport | None = None
        self._reading = True
        self._ready = asyncio.Event()

    async def open(self) -> None:
        """Begin to read; before the child is started, since from then on nothing may fail."""
        pipe = os.fdopen(self._parent_end, "rb", 0)
        try:
            self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: self, pipe)
        except BaseException:
            pipe.close()
            raise

    def release_child_end(self) -> None:
        """Leave the child's end to the child: held here as well, it would hide the pipe's end."""
        os.close(self.child_end)

    async def read(self) -> bytes:
        """What the child has written; empty at the end."""
        while not self._buffer and not self._ended:
            self._listen(True)
            self._ready.clear()
            await self._ready.wait()
        piece = bytes(self._buffer)
        self._buffer.clear()
        return piece

    def pause(self) -> None:
        """Read nothing until the next `read`: the child blocks when the pipe is full."""
        self._listen(False)

    def close(self) -> None:
        """Let go of the pipe."""
        if self._transport is not None:
            self._transport.close()
        self._ended = True
        self._ready.set()

    def _listen(self, wanted: bool) -> None:
        if self._transport is None or wanted is self._reading or self._ended:
            return
        self._reading = wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        """Called by the transport."""
        self._buffer += data
        if len(self._buffer) > PIPE_BYTES:
            self._listen(False)
        self._ready.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the transport: the child, and all that it started, have closed their ends, or the pipe broke."""
        self._ended = True
        self._ready.set()
