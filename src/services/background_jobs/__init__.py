"""Jobs: models, protocol, queue, store, service and worker. README.md beside this file tells how a job travels."""

from toolfleet.services.background_jobs.job_request import NewCall, NewJob
from toolfleet.services.background_jobs.job_service import JobService
from toolfleet.services.background_jobs.submit import submit_tool_execution_task

__all__ = ["JobService", "NewCall", "NewJob", "submit_tool_execution_task"]
