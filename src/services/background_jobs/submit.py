"""The short way to a job, for a program that submits one now and then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolfleet.services.background_jobs.job_request import NewJob
from toolfleet.services.background_jobs.job_service import JobService


async def submit_tool_execution_task(
    task_data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    priority: str = "normal",
    max_retries: int = 2,
    *,
    service: JobService | None = None,
) -> str:
    """Queue tool calls as one job.

    Args:
        task_data: ``{"tools": [{"tool_name": …, "tool_args": {…}}, …], …}`` with the fields of `NewJob`, or only the
            list of tools.
        priority: ``high``, ``normal`` or ``low``.
        max_retries: 0 to 20.
        service: an open `JobService`; without one, connections are opened as the environment says and closed again,
            which costs some milliseconds a call.

    Returns:
        The ``job_id``.

    Raises:
        pydantic.ValidationError, InvalidTask: the job is not valid; nothing was queued.
        QueueFull, QueueUnavailable, ToolUnavailable: it could not be accepted.
        DiscoveryError: it is not known where NATS and Redis are.
    """
    data = dict(task_data) if isinstance(task_data, Mapping) else {"tools": list(task_data)}
    new = NewJob.model_validate({**data, "priority": priority, "max_retries": max_retries})
    if service is not None:
        return (await service.submit(new)).job_id
    # The one place below the composition root that composes: a caller with one call to hand over should not have to.
    from toolfleet.bootstrap import open_service
    from toolfleet.settings import Settings

    async with open_service(Settings(), name="submit") as wired:
        return (await wired.service.submit(new)).job_id
