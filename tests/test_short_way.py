"""`submit_tool_execution_task`, the short way: nothing but the environment, and a job that then runs."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from toolfleet.bootstrap import open_service, open_worker
from toolfleet.services.background_jobs import submit_tool_execution_task
from toolfleet.services.background_jobs.errors import UnknownTool
from toolfleet.services.background_jobs.task_models import Status, Tier
from toolfleet.services.web_tools.demo_site import DEMO_SECTIONS, serve_demo_site
from toolfleet.settings import Settings


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: Settings) -> Settings:
    """The variables that a program would be started with; the tool server is a stdio one."""
    config = tmp_path / "mcp.json"
    server = {
        "command": sys.executable,
        "args": ["-m", "toolfleet.services.web_tools", "--stdio", "--allow-private"],
    }
    config.write_text(json.dumps({"mcpServers": {"web": server}}))
    assert settings.nats_url is not None
    assert settings.redis_url is not None
    monkeypatch.setenv("NATS_URL", settings.nats_url.get_secret_value())
    monkeypatch.setenv("REDIS_URL", settings.redis_url.get_secret_value())
    monkeypatch.setenv("TOOLFLEET_MCP_CONFIG", str(config))
    for name in ("stream", "subject_prefix", "dlq_stream", "dlq_subject_prefix", "stream_max_bytes", "dlq_max_bytes"):
        monkeypatch.setenv(f"TOOLFLEET_{name.upper()}", str(getattr(settings, name)))
    return Settings()


async def test_a_task_of_two_calls_runs(environment: Settings) -> None:
    async with serve_demo_site(latency_s=0) as site:
        calls = [
            {"tool_name": "web_crawl", "tool_args": {"url": section.url(site), "max_pages": 3}}
            for section in DEMO_SECTIONS[:2]
        ]
        job_id = await submit_tool_execution_task({"tools": calls, "session_id": "s1"}, priority="low", max_retries=1)
        async with open_service(environment) as wired, open_worker(environment, Tier.LOW) as worker:
            working = asyncio.create_task(worker.run())
            async with asyncio.timeout(40):
                record = await wired.service.wait_until_over(job_id)
            worker.stop()
            assert await working == 0
    assert record.status is Status.COMPLETED, record.error
    assert (record.completed_calls, record.task.session_id, record.task.max_retries) == (2, "s1", 1)


async def test_an_unknown_tool_is_refused_before_anything_is_queued(environment: Settings) -> None:
    with pytest.raises(UnknownTool) as refused:
        await submit_tool_execution_task([{"tool_name": "web_crowl", "tool_args": {}}])
    assert "web_crawl" in refused.value.details["nearest"]
