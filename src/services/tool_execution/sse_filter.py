"""Takes the progress of a flooding tool out of an event stream before the SDK decodes it."""

from __future__ import annotations

import re
from typing import Final

from toolfleet.services.tool_execution.progress_gate import ProgressGate, is_log_message, progress_token

_BOUNDARY: Final = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_BOUNDARY_LENGTH: Final = 4
_MAX_HELD: Final = 64 << 10
"""Of an event that is not complete yet. A longer one is passed on as it comes, as an event that may be a result is;
its bound is the SDK's."""


class SseFilter:
    """Bytes of one response's event stream in, the bytes that the SDK is to see out.

    Args:
        gate: of the call whose response this is.
        token: the progress token of that call.
    """

    def __init__(self, gate: ProgressGate, token: int) -> None:
        self._gate = gate
        self._token = token
        self._held = b""
        self._passing = False
        self.flooding = False
        """Whether the last piece held progress that was not told one by one."""

    def feed(self, piece: bytes) -> bytes:
        """Take a piece; what is to be passed on of it and of what was held, perhaps nothing."""
        self.flooding = False
        data, out = self._held + piece, bytearray()
        position, last_id = 0, b""
        if self._passing:
            # What is held has been passed on: it is kept only to find a boundary that was cut in two.
            position = len(self._held)
            end = _BOUNDARY.search(data)
            if end is None:
                self._held = data[-(_BOUNDARY_LENGTH - 1) :]
                return piece
            self._passing = False
            out += data[position : end.end()]
            position = end.end()
        while (end := _BOUNDARY.search(data, position)) is not None:
            event = data[position : end.end()]
            position = end.end()
            if self._taken(event):
                last_id = _id_of(event) or last_id
            else:
                # An id without data moves the SDK's place in a stream that can be resumed; the next event's does too.
                out += event
                last_id = b"" if _id_of(event) else last_id
        if last_id:
            out += b"id: " + last_id + b"\n\n"
        self._held = data[position:]
        if len(self._held) > _MAX_HELD:
            out += self._held
            self._held, self._passing = self._held[-(_BOUNDARY_LENGTH - 1) :], True
        return bytes(out)

    def rest(self) -> bytes:
        """At the end of the stream: what was held."""
        held, self._held = self._held, b""
        return b"" if self._passing else held

    def _taken(self, event: bytes) -> bool:
        data = _data_of(event)
        if data is None:
            return False
        if is_log_message(data):
            self.flooding = True
            return True
        if progress_token(data) == self._token:
            self.flooding |= self._gate.offer(data)
            return True
        return False


def _data_of(event: bytes) -> bytes | None:
    """The data of an event that has one line of it, and is a message."""
    found = None
    for line in event.splitlines():
        name, _, value = line.partition(b":")
        if name == b"data":
            if found is not None:
                return None
            found = value.strip()
        elif name == b"event" and value.strip() != b"message":
            return None
    return found


def _id_of(event: bytes) -> bytes:
    for line in event.splitlines():
        if line.startswith(b"id:"):
            return line[3:].strip()
    return b""
