"""What was seen, in files outside the system: one JSON object a line, synced to the disk before it is used.

Writers of several processes share one file: a line is one write to a file that is open for appending.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class SyncedFile:
    """Lines of one writer, each on the disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, *entries: Entry) -> None:
        """Append them, in order, and sync."""
        data = b"".join(json.dumps(entry, separators=(",", ":")).encode() + b"\n" for entry in entries)
        os.write(self._file, data)
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class Ledger:
    """Entries of many tasks of one event loop; those that wait are synced together."""

    def __init__(self, path: Path) -> None:
        self._file = SyncedFile(path)
        self._waiting: list[tuple[Entry, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    async def write(self, kind: str, **fields: Any) -> None:
        """On the disk when this returns. `t` is the wall clock in seconds."""
        entry = {"k": kind, "t": round(time.time(), 3), **fields}
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_all(), name="ledger")
        # Shielded: a client that is cancelled must not take the line with it.
        await asyncio.shield(written)

    async def _write_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                await asyncio.to_thread(self._file.write, *(entry for entry, _ in batch))
            except OSError as error:
                for _, written in batch:
                    written.set_exception(error)
                raise
            for _, written in batch:
                if not written.done():
                    written.set_result(None)

    async def aclose(self) -> None:
        """Everything is written when this returns."""
        if self._writer is not None:
            await self._writer
        self._file.close()


def entries(path: Path) -> Iterator[Entry]:
    """What stands in a ledger; none where it was never written. A line that its writer's death cut off is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
