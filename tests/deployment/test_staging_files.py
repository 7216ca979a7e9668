"""The configuration files that are shipped: real servers start with them, and every name in them is true."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.deployment.fleet import MANAGE, ROOT, STAGING, START_WORKER, run
from tests.support.settings_doc import variable
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_core
from toolfleet.services.embedded import valkey_server
from toolfleet.services.embedded.server import HOST, free_ports
from toolfleet.settings import Settings

NATS_SERVER = Path(sysconfig.get_path("scripts")) / "nats-server"
NATS_CONF = STAGING / "nats.conf"
REDIS_CONF = STAGING / "redis.conf"
ENV_EXAMPLE = STAGING / "env.example"

OF_ONE_PROCESS = {"TOOLFLEET_WORKER_NAME", "NO_COLOR"}
"""Settings that are no matter of a host: manage_workers.sh names the workers, and a terminal has its colours."""


@asynccontextmanager
async def server(folder: Path, *command: str | Path) -> AsyncIterator[asyncio.subprocess.Process]:
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*map(str, command), cwd=folder, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 20)


@asynccontextmanager
async def nats_with_our_file(folder: Path) -> AsyncIterator[tuple[str, str]]:
    """URL and monitoring URL of a nats-server; only its ports are not the file's."""
    folder.mkdir()
    command = (NATS_SERVER, "--config", NATS_CONF, "-p", "-1", "-m", "-1", "--ports_file_dir", folder)
    async with server(folder, *command) as process:
        ports_file = folder / f"nats-server_{process.pid}.ports"

        def written() -> bool:
            assert process.returncode is None, (folder / "log").read_text()
            return ports_file.exists() and ports_file.read_text().endswith("}")

        await wait_until(written, "nats-server has written its ports")
        ports = json.loads(ports_file.read_text())
        yield ports["nats"][0], ports["monitoring"][0]


@asynccontextmanager
async def valkey_with_our_file(folder: Path) -> AsyncIterator[str]:
    """URL of a valkey-server; only its port is not the file's."""
    folder.mkdir()
    port = free_ports(1)[0]
    async with server(folder, valkey_server._find_program(), REDIS_CONF, "--port", str(port)) as process:
        url = f"redis://{HOST}:{port}/0"
        async with Redis.from_url(url) as client:

            async def answers() -> bool:
                assert process.returncode is None, (folder / "log").read_text()
                try:
                    return bool(await client.ping())
                except (RedisError, OSError):
                    return False

            await wait_until(answers, "valkey-server answers")
        yield url


async def test_nats_conf_is_valid(tmp_path: Path) -> None:
    ran = await run(NATS_SERVER, "--config", NATS_CONF, "-t", env={})
    assert ran.code == 0, ran.err


async def test_the_servers_keep_what_they_acknowledge(tmp_path: Path) -> None:
    async with (
        nats_with_our_file(tmp_path / "nats") as (nats_url, monitoring),
        valkey_with_our_file(tmp_path / "valkey") as redis_url,
    ):
        async with httpx.AsyncClient() as client:
            jetstream = (await client.get(f"{monitoring}/jsz")).json()["config"]
        assert jetstream["sync_always"] is True
        assert (tmp_path / "nats" / jetstream["store_dir"]).is_dir()
        async with Redis.from_url(redis_url, decode_responses=True) as client_of_redis:
            for name, value in {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}.items():
                assert await client_of_redis.config_get(name) == {name: value}
            assert await client_of_redis.config_get("dir") == {"dir": str(tmp_path / "valkey")}
        # The streams of the default size fit, and nobody has anything to warn of.
        defaults = Settings(nats_url=nats_url, redis_url=redis_url)
        async with open_core(defaults, name="test") as core:
            assert core.queue_state.problem is None
        mcp = tmp_path / "mcp.json"
        mcp.write_text('{"mcpServers": {"any": {"url": "http://127.0.0.1:1/mcp"}}}')
        env = {
            "NATS_URL": nats_url,
            "REDIS_URL": redis_url,
            "TOOLFLEET_NATS_MONITORING_URL": monitoring,
            "TOOLFLEET_MCP_CONFIG": str(mcp),
            "TOOLFLEET_STATE_DIR": str(tmp_path),
        }
        checked = await run(sys.executable, START_WORKER, "--check", env=env)
        assert checked.code == 0
        assert [line for line in checked.lines if not line.startswith("ok ")] == []


class Line:
    """``NAME=value`` or ``#NAME=value``, and whether the comment above calls it an example."""

    def __init__(self, name: str, value: str, example: bool, active: bool) -> None:
        self.name = name
        self.value = value
        self.example = example
        self.active = active


def env_example() -> list[Line]:
    found, comment, ended = [], "", True
    for text in ENV_EXAMPLE.read_text().splitlines():
        if match := re.fullmatch(r"(#?)([A-Z][A-Z0-9_]*)=(.*)", text):
            found.append(Line(match[2], match[3], comment.startswith("# Example"), not match[1]))
            ended = True
        elif ended or not text:
            comment, ended = text, not text
    return found


def settings_names() -> set[str]:
    return {variable(name, field) for name, field in Settings.model_fields.items()}


def test_every_setting_is_in_the_example() -> None:
    names = [line.name for line in env_example()]
    assert len(names) == len(set(names))
    assert settings_names() - OF_ONE_PROCESS - set(names) == set(), "describe them in deployment/staging/env.example"
    of_the_script = set(re.findall(r"\b(?:WORKER_[A-Z_]+|TOOLFLEET_PYTHON)\b", MANAGE.read_text()))
    assert set(names) - settings_names() <= of_the_script


def test_the_defaults_in_the_example_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in env_example():
        if not line.example and not line.active and line.name in settings_names():
            monkeypatch.setenv(line.name, line.value)
    assert Settings() == Settings.model_construct()
    shown = {line.name: line.value for line in env_example()}
    script = MANAGE.read_text()
    for name in ("WORKER_START_TIMEOUT", "WORKER_KILL_MARGIN", "WORKER_LOG_MAX_BYTES", "WORKER_COUNT_NORMAL"):
        assert f"whole_number {name} {shown[name]} " in script


def test_a_shell_reads_the_example() -> None:
    read = subprocess.run(
        ["bash", "-euc", f'set -a; . "{ENV_EXAMPLE}"; env'], env={"PATH": os.environ["PATH"]}, capture_output=True
    )
    assert read.returncode == 0, read.stderr
    assert b"NATS_URL=nats://127.0.0.1:4222\n" in read.stdout


def test_the_commands_of_the_guide_exist() -> None:
    guide = (ROOT / "WORKER_DEPLOYMENT.md").read_text()
    usage = subprocess.run([MANAGE, "help"], capture_output=True, text=True, check=True).stdout
    for command in set(re.findall(r"manage_workers\.sh ([a-z]+)", guide)):
        assert f"  {command} " in usage
    for path in re.findall(r"deployment/[\w./-]+\w", guide):
        assert (ROOT / path).exists(), path
