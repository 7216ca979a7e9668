"""The output of a stdio server cut into lines, with a bound on what one line may hold in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_EDGE: Final = 4096
"""Bytes kept of each end of a line that is too long: enough to find the id of the request it answers."""

# The id of a JSON-RPC message stands at its beginning or at its end, depending on the server's library. Both patterns
# are anchored to an edge of the line, so an "id" inside the result can't be mistaken for it.
_ID_FIRST: Final = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*(\d+)\s*,')
_ID_LAST: Final = re.compile(rb',\s*"id"\s*:\s*(\d+)\s*(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*\Z')

_ANSWER_ID_FIRST: Final = re.compile(_ID_FIRST.pattern + rb'\s*"(?:result|error)"\s*:')
_ANSWER_FIRST: Final = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"(?:result|error)"\s*:')


def answered_id(line: bytes) -> int | None:
    """The id of the request that a line answers which is no valid JSON, where its edges tell.

    A request of the server has an id of its own kind, so the result or the error must be there too.
    """
    match = _ANSWER_ID_FIRST.match(line)
    if match is None and _ANSWER_FIRST.match(line):
        match = _ID_LAST.search(line[-_EDGE:])
    return int(match.group(1)) if match else None


@dataclass(frozen=True, slots=True)
class TooLong:
    """A line above the limit; its middle was dropped."""

    size: int
    head: bytes
    tail: bytes

    def request_id(self) -> int | None:
        """The id of the request that the line answers, where its edges tell."""
        match = _ID_FIRST.match(self.head) or _ID_LAST.search(self.tail)
        return int(match.group(1)) if match else None


class LineSplitter:
    """Cuts chunks into lines.

    Args:
        limit: bytes of a line, its end not counted; of a longer one only the edges are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._head: bytes | None = None
        """The beginning of the current line once it is too long; the buffer holds its end from then on."""
        self._dropped = 0

    def feed(self, chunk: bytes) -> list[bytes | TooLong]:
        """Take a chunk; the lines that it completes, without their ends."""
        lines: list[bytes | TooLong] = []
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._append(chunk[start:end])
            lines.append(self._finish())
            start = end + 1
        self._append(chunk[start:])
        return lines

    def _append(self, piece: bytes) -> None:
        self._buffer += piece
        if self._head is None and len(self._buffer) > self._limit:
            self._head = bytes(self._buffer[:_EDGE])
        if self._head is not None and (excess := len(self._buffer) - _EDGE) > 0:
            del self._buffer[:excess]
            self._dropped += excess

    def _finish(self) -> bytes | TooLong:
        line, head, dropped = bytes(self._buffer), self._head, self._dropped
        self._buffer.clear()
        self._head, self._dropped = None, 0
        return line if head is None else TooLong(size=dropped + len(line), head=head, tail=line)
