"""A client of an event stream that loses its connection, and goes on from where it was."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Final

END_EVENTS: Final = frozenset({b"job.completed", b"job.failed", b"job.cancelled", b"job.unknown"})
RECONNECT_S: Final = 0.3
"""The longest pause before the next connection."""


@dataclass
class Followed:
    """What one client saw of one job."""

    job_id: str
    ids: list[int] = field(default_factory=list)
    gaps: int = 0
    connections: int = 0
    ended: bool = False

    def problems(self) -> list[str]:
        """What is wrong with it: every event of the log once, in order, to the end, is right."""
        found = []
        if self.ids != list(range(1, len(self.ids) + 1)):
            found.append(f"{self.job_id}: ids {self.ids}")
        if self.gaps:
            found.append(f"{self.job_id}: {self.gaps} gaps")
        if not self.ended:
            found.append(f"{self.job_id}: the end was not seen, the last event was {self.ids[-1:]}")
        return found


async def connect(port: int, job_id: str, last: int | None) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter]:
    """The status of the answer, and its body, which ends with the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seen = f"Last-Event-ID: {last}\r\n" if last is not None else ""
    # With HTTP/1.0 the body is not in chunks.
    writer.write(f"GET /api/v1/jobs/{job_id}/stream HTTP/1.0\r\nHost: bench\r\n{seen}\r\n".encode())
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.transport.abort()
        raise
    return int(head.split(b" ", 2)[1]), reader, writer


async def follow(port: int, job_id: str, chance: random.Random, drop_after: tuple[int, int]) -> Followed:
    """Follow a job to its end; the connection is cut after a random number of frames, again and again.

    Args:
        drop_after: the least and the most frames of one connection.
    """
    followed = Followed(job_id)
    while not followed.ended:
        last = followed.ids[-1] if followed.ids else None
        try:
            status, reader, writer = await connect(port, job_id, last)
        except (asyncio.IncompleteReadError, OSError):
            await asyncio.sleep(chance.uniform(0, RECONNECT_S))
            continue
        followed.connections += 1
        try:
            if status == 200:
                await _read(reader, followed, chance.randint(*drop_after))
            elif status == 204:
                return followed
            elif status != 503:
                raise RuntimeError(f"the stream of {job_id} answered {status}")
        finally:
            writer.transport.abort()
        await asyncio.sleep(chance.uniform(0, RECONNECT_S))
    return followed


async def _read(reader: asyncio.StreamReader, followed: Followed, frames: int) -> None:
    """Read so many frames, or to the end of the stream. Only a whole frame counts."""
    frame: dict[bytes, bytes] = {}
    while frames > 0:
        line = await reader.readline()
        if not line.endswith(b"\n"):
            return
        if line.strip():
            name, _, value = line.strip().partition(b": ")
            frame[name] = value
            continue
        frames -= 1
        if frame.get(b"event") == b"gap":
            followed.gaps += 1
        elif b"id" in frame:
            followed.ids.append(int(frame[b"id"]))
            followed.ended = frame[b"event"] in END_EVENTS
            if followed.ended:
                return
        frame = {}
