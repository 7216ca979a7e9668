"""Ending tasks for sure.

nats-py swallows a cancellation that arrives while it hands data to its flusher (`Client._flush_pending`), so a task
that was cancelled once may go on as if nothing had happened: it is cancelled again until it has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import structlog

log = structlog.get_logger(__name__)

AGAIN_S: Final = 0.5
TRIES: Final = 10


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended; what they raise is theirs."""
    pending = {task for task in tasks if not task.done()}
    for _ in range(TRIES):
        if not pending:
            return
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_S)
    if pending:
        log.error("tasks.left_behind", tasks=sorted(task.get_name() for task in pending))
