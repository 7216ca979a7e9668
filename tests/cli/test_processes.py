"""`toolfleet worker` and `toolfleet api` as an operator starts them."""

from __future__ import annotations

import json
import socket
import uuid
from pathlib import Path

import pytest

from tests.cli.running import Marked, clean_env, toolfleet
from tests.support.waiting import wait_until
from toolfleet.cli.exits import FAILED
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey


@pytest.mark.parametrize("command", ["worker", "api"])
def test_what_is_not_configured_is_one_line(command: str) -> None:
    ended = toolfleet(command)
    assert ended.code == FAILED
    assert ended.err.startswith("toolfleet: it is not known where Redis is. Set REDIS_URL")
    assert ended.err.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(nats_server: EmbeddedNats, valkey_server: EmbeddedValkey) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = clean_env(NATS_URL=nats_server.url, REDIS_URL=valkey_server.url)
        ended = toolfleet("api", "--port", port, env=env)
    assert ended.code == FAILED
    assert ended.err == (
        f"toolfleet: the API can't listen on 127.0.0.1:{port}: Address already in use; choose another --port\n"
    )


async def test_a_worker_says_that_writes_are_not_durable_and_drains_on_sigterm(
    tmp_path: Path, nats_server: EmbeddedNats, valkey_server: EmbeddedValkey
) -> None:
    unique = uuid.uuid4().hex[:8]
    env = {
        "NATS_URL": nats_server.url,
        "REDIS_URL": valkey_server.url,
        "TOOLFLEET_STREAM": f"T_{unique}",
        "TOOLFLEET_SUBJECT_PREFIX": f"t-{unique}",
        "TOOLFLEET_DLQ_STREAM": f"D_{unique}",
        "TOOLFLEET_DLQ_SUBJECT_PREFIX": f"d-{unique}",
    }
    status = tmp_path / "status.json"
    arguments = ["worker", "--tier", "low", "--concurrency", "3", "--name", f"w-{unique}", "--status-file", str(status)]
    worker = Marked(tmp_path, *arguments, env=env)
    try:
        worker.read_until("writes.not_durable")
        await wait_until(status.exists, "the worker tells its state")
        told = json.loads(status.read_text())
        assert (told["worker"], told["tier"], told["slots"]) == (f"w-{unique}", "low", 3)
        worker.popen.terminate()
        ended = worker.end()
    finally:
        worker.kill()
    assert ended.code == 0
    events = [json.loads(line) for line in ended.out.splitlines()]
    warned = next(event for event in events if event["event"] == "writes.not_durable")
    assert warned["server"] == "Redis"
    assert warned["level"] == "warning"
    assert events[-1]["event"] == "worker.stopped"
    assert events[-1]["code"] == 0
