"""What a worker says of itself: a heartbeat in the store for the fleet, a file for the operator of its host."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import structlog

from toolfleet.services.background_jobs.errors import StoreError
from toolfleet.services.background_jobs.ports import JobStore, WorkerInfo

log = structlog.get_logger(__name__)

INTERVAL_S: Final = 3.0
TTL_S: Final = 10.0
"""Three heartbeats may be lost before a worker is no longer shown."""


class WorkerReport:
    """Tells every few seconds how a worker is."""

    def __init__(
        self, store: JobStore, describe: Callable[[], tuple[WorkerInfo, Mapping[str, Any]]], status_file: Path | None
    ) -> None:
        """`describe` gives the heartbeat, and what only the file is to hold."""
        self._store = store
        self._describe = describe
        self._status_file = status_file

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            await self.tell()
            await asyncio.sleep(INTERVAL_S)

    async def tell(self) -> None:
        """One heartbeat. The file comes first: it works while Redis is down."""
        info, more = self._describe()
        self._write(info, more)
        try:
            await self._store.heartbeat(info, TTL_S)
        except StoreError as error:
            log.debug("worker.heartbeat_failed", error=str(error))

    async def retire(self) -> None:
        """The last word of a worker that ends in order."""
        info, more = self._describe()
        self._write(info, more)
        try:
            await self._store.retire(info.worker_id)
        except StoreError as error:
            log.debug("worker.retire_failed", error=str(error))

    def _write(self, info: WorkerInfo, more: Mapping[str, Any]) -> None:
        if self._status_file is None:
            return
        status = {
            "worker": info.worker_id,
            "tier": info.tier.value,
            "pid": info.pid,
            "started_at": info.started_at,
            "heartbeat_at": int(time.time() * 1000),
            "state": info.state,
            "slots": info.slots,
            "in_flight": info.in_flight,
            "done": info.done,
            **more,
        }
        # Written beside and moved over, so that a reader never sees half a file.
        fresh = self._status_file.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(status) + "\n")
            fresh.replace(self._status_file)
        except OSError as error:
            log.warning("worker.status_file_failed", path=str(self._status_file), error=str(error))
