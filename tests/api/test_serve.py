"""The API as a process: it says its port, ends streams when it is told to stop, and exits with 0."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.api.harness import BOUND_S, Toolbox, call, frames, problem, running_server
from tests.support.waiting import wait_until
from toolfleet.api.serve import ApiServer, bound, serve
from toolfleet.bootstrap import open_core, open_service
from toolfleet.services.background_jobs.errors import StreamMismatch
from toolfleet.services.background_jobs.job_request import NewCall, NewJob
from toolfleet.services.background_jobs.nats_streams import task_stream
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.settings import Settings

_SERVE = """
import sys
from toolfleet.api.serve import serve
from toolfleet.settings import Settings
serve(Settings(), port=0, ready=lambda port: print(f"http://127.0.0.1:{port} ready", flush=True))
"""


def _environment(settings: Settings) -> dict[str, str]:
    assert settings.nats_url is not None
    assert settings.redis_url is not None
    names = ("stream", "subject_prefix", "dlq_stream", "dlq_subject_prefix", "stream_max_bytes", "dlq_max_bytes")
    return {
        **os.environ,
        **{f"TOOLFLEET_{name.upper()}": str(getattr(settings, name)) for name in names},
        "NATS_URL": settings.nats_url.get_secret_value(),
        "REDIS_URL": settings.redis_url.get_secret_value(),
    }


@contextlib.asynccontextmanager
async def _process(
    settings: Settings, log_path: Path, *command: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A program that says its URL; killed at the end where it still runs."""
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=log, stderr=log, env=_environment(settings)
        )
    try:

        def url() -> str | None:
            found = re.search(r"http://127\.0\.0\.1:\d+", log_path.read_text())
            return found[0] if found else None

        yield process, str(await wait_until(url, f"{command} says its URL", timeout=BOUND_S))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _queued_job(settings: Settings, tools: Toolbox) -> str:
    async with open_service(settings, tools=tools.runner) as wired:
        new = NewJob(tools=[NewCall.model_validate(call("echo", n=1))])
        return (await wired.service.submit(new)).job_id


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_streams_and_the_exit_code_is_0(
    api_settings: Settings, tools: Toolbox, tmp_path: Path, number: signal.Signals
) -> None:
    job_id = await _queued_job(api_settings, tools)
    async with (
        _process(api_settings, tmp_path / "log", "-c", _SERVE) as (process, url),
        httpx.AsyncClient(base_url=url, timeout=BOUND_S) as client,
        client.stream("GET", f"/api/v1/jobs/{job_id}/stream") as response,
    ):
        told = frames(response)
        assert (await anext(told)).event == "job.queued"
        process.send_signal(number)
        async with asyncio.timeout(BOUND_S):
            assert [frame.event async for frame in told] == []
            assert await process.wait() == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health/live")


async def test_streams_end_under_the_program_uvicorn_too(
    api_settings: Settings, tools: Toolbox, tmp_path: Path
) -> None:
    job_id = await _queued_job(api_settings, tools)
    command = ("-m", "uvicorn", "toolfleet.api.app:create_app", "--factory", "--port", "0", "--no-access-log")
    async with (
        _process(api_settings, tmp_path / "log", *command) as (process, url),
        httpx.AsyncClient(base_url=url, timeout=BOUND_S) as client,
        client.stream("GET", f"/api/v1/jobs/{job_id}/stream") as response,
    ):
        told = frames(response)
        assert (await anext(told)).event == "job.queued"
        process.terminate()
        async with asyncio.timeout(BOUND_S):
            assert [frame.event async for frame in told] == []
            await process.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()


async def test_a_request_that_is_broken_off_at_the_end_is_told_to_ask_again(
    api_settings: Settings, tools: Toolbox
) -> None:
    async with running_server(api_settings.model_copy(update={"drain_timeout": 1}), tools) as (server, client):
        body = {"tools": [call("hold")], "mode": "sync"}
        asked = asyncio.create_task(client.post("/api/v1/jobs", json=body, headers={"Idempotency-Key": "k"}))
        await wait_until(lambda: tools.calls["hold"] == 1, "the tool is called")
        server.stop()
        answer = await asked
        tools.release.set()
    told = problem(answer, 503, "stopping")
    assert told["accepted"] == "unknown"
    assert answer.headers["Idempotency-Key"] == "k"
    assert told["job_id"].startswith("job_")
    assert int(answer.headers["Retry-After"]) > 0


def test_a_taken_port_is_said(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        serve(settings, port=taken.getsockname()[1])


async def test_other_stream_settings_stop_the_start(api_settings: Settings, tools: Toolbox) -> None:
    async with running_server(api_settings, tools):
        pass
    changed = api_settings.model_copy(update={"stream_max_bytes": 2 << 20})
    with pytest.raises(StreamMismatch, match="max_bytes"):
        await ApiServer(changed, port=0, tools=tools.runner).run()


async def test_a_stream_that_is_replaced_by_another_kind_ends_the_api(
    own_settings: Settings, own_nats: EmbeddedNats, tools: Toolbox
) -> None:
    with pytest.raises(StreamMismatch, match="max_bytes"):
        async with running_server(own_settings, tools), open_core(own_settings, name="test") as core:
            name = own_settings.stream
            deleted = await core.connection.request(f"$JS.API.STREAM.DELETE.{name}", b"", 2)
            assert json.loads(deleted.data)["success"]
            other = task_stream(core.queue.names, 2 << 20)
            made = await core.connection.request(f"$JS.API.STREAM.CREATE.{name}", json.dumps(other).encode(), 2)
            assert "error" not in json.loads(made.data)
            # The API looks again when it has its connection back.
            await own_nats.restart()
            await wait_until(core.queue_state.failed.is_set, "the mismatch is noticed", timeout=BOUND_S)


async def test_a_call_that_runs_is_waited_for(api_settings: Settings, tools: Toolbox) -> None:
    async with running_server(api_settings, tools) as (server, client):
        answer = asyncio.create_task(client.post("/api/v1/jobs", json={"tools": [call("hold")], "mode": "sync"}))
        await wait_until(lambda: tools.calls["hold"] == 1, "the tool runs")
        server.stop()
        tools.release.set()
        assert (await answer).json()["status"] == "completed"


async def test_nobody_is_let_in_before_there_is_an_answer() -> None:
    # Bound and not listening: a load balancer that connects too early is refused and tries again.
    with bound("127.0.0.1", 0) as listener, pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*listener.getsockname())
