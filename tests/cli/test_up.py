"""`toolfleet up`: what it says, what it brings back, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.running import Marked, clean_env, toolfleet
from tests.support.waiting import wait_until
from toolfleet.cli.exits import FAILED

LAST_LINE = "Ctrl-C drains and stops."


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Marked]:
    process = Marked(tmp_path, "up", "--port", "0", "--ready-file", str(tmp_path / "ready.json"))
    try:
        yield process
    finally:
        process.kill()


def shell(line: str) -> Any:
    """Run a line as it stands; the last line of JSON that it printed."""
    found = subprocess.run(
        ["/bin/sh", "-c", line], env=clean_env(), capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])


async def test_its_lines_work_a_dead_part_comes_back_and_a_second_signal_ends_it_at_once(
    up: Marked, tmp_path: Path
) -> None:
    up.read_until(LAST_LINE)
    submit, poll, stream, result, cancel = re.findall(r"^curl .*$", up.text, re.MULTILINE)
    job = shell(submit)["job_id"]
    assert job in poll
    assert shell(poll)["job_id"] == job
    told = subprocess.run(["/bin/sh", "-c", stream], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "event: tool.progress" in told
    assert "event: job.completed" in told
    assert shell(result)["results"][0]["structured_content"]["totals"]["pages"] == 37
    assert shell(cancel)["outcome"] == "cancelled"

    api = json.loads((tmp_path / "ready.json").read_text())["api"]
    (victim,) = up.family(containing="toolfleet.cli api")
    os.kill(victim, signal.SIGKILL)
    up.read_until("api ended with exit code -9; it is started again in 0.5 s")
    up.read_until("api is back")
    assert httpx.get(f"{api}/health/live", trust_env=False).status_code == 200

    # A worker that is stopped can't drain: one signal would wait for its whole drain time.
    for worker in up.family(containing="toolfleet.cli worker"):
        os.kill(worker, signal.SIGSTOP)
    up.popen.send_signal(signal.SIGINT)
    up.read_until("draining")
    up.popen.send_signal(signal.SIGINT)
    assert up.end().code == 130
    assert not up.family()
    assert list(up.tmp.iterdir()) == []
    assert not (tmp_path / "ready.json").exists()


async def test_sigkill_takes_every_process_along(up: Marked) -> None:
    up.read_until("tool server, API and 4 workers")
    assert len(up.family()) == 9
    up.popen.kill()
    await wait_until(lambda: not up.family(), "every process has ended")


def test_a_port_that_is_taken_ends_it_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = toolfleet("up", "--port", str(port), "--data", str(tmp_path))
    assert ended.code == FAILED
    assert f"port {port} on 127.0.0.1 can't be used: Address already in use; choose another with --port" in ended.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["up.lock"]


def test_a_folder_that_another_one_uses(tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = toolfleet("up", "--port", "0", "--data", str(tmp_path))
    assert ended.code == FAILED
    assert f"another `toolfleet up` uses {tmp_path}" in ended.err
