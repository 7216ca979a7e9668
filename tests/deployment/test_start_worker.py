"""start_worker.py says everything that is missing at once, and changes nothing while it looks."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import nats
import pytest

from tests.conftest import SettingsFactory
from tests.deployment.fleet import START_WORKER, Fleet, Ran, run
from toolfleet.bootstrap import open_core


async def check(env: dict[str, str]) -> Ran:
    return await run(sys.executable, START_WORKER, "--check", env={"PATH": os.environ["PATH"], **env})


def parts(ran: Ran, level: str) -> list[str]:
    """What is of this level, in order."""
    found = [line.split(":")[0].split(maxsplit=1) for line in ran.lines + ran.err.splitlines() if ":" in line]
    return [part for found_level, part in found if found_level == level]


async def test_everything_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    ran = await check({"TOOLFLEET_STATE_DIR": str(file / "state"), "TOOLFLEET_MCP_CONFIG": str(tmp_path / "none.json")})
    assert ran.code == 1
    assert parts(ran, "missing") == ["state directory", "NATS", "Redis", "MCP servers"]
    for advice in ("set TOOLFLEET_STATE_DIR", "Set NATS_URL", "Set REDIS_URL", "none.json: cannot be read"):
        assert advice in ran.out


async def test_what_does_not_answer_is_said_at_once_without_secrets(tmp_path: Path) -> None:
    ran = await check(
        {
            "NATS_URL": "nats://me:hunter2@127.0.0.1:1",
            "REDIS_URL": "redis://:hunter2@127.0.0.1:1/0",
            "CONSUL_HTTP_ADDR": "127.0.0.1:1",
            "CONSUL_HTTP_TOKEN": "hunter2",
            "TOOLFLEET_STATE_DIR": str(tmp_path),
        }
    )
    assert ran.code == 1
    assert parts(ran, "missing") == ["Consul", "NATS", "Redis", "MCP servers"]
    assert "hunter2" not in ran.out + ran.err


async def test_one_server_is_tried_though_the_other_is_not_known(tmp_path: Path) -> None:
    env = {"TOOLFLEET_STATE_DIR": str(tmp_path)}
    nats_away, redis_away = await asyncio.gather(
        check(env | {"NATS_URL": "nats://127.0.0.1:1"}), check(env | {"REDIS_URL": "redis://127.0.0.1:1/0"})
    )
    assert parts(nats_away, "missing") == ["Redis", "NATS"]
    assert parts(redis_away, "missing") == ["NATS", "Redis"]
    assert "can't be used" in redis_away.out


async def test_every_setting_that_is_not_valid_is_named() -> None:
    ran = await check(
        {"TOOLFLEET_LEASE": "0", "TOOLFLEET_CONCURRENCY": "many", "RECOVERY_CHECK_INTERVAL_SECONDS": "-1"}
    )
    assert ran.code == 1
    for name in ("TOOLFLEET_LEASE", "TOOLFLEET_CONCURRENCY", "RECOVERY_CHECK_INTERVAL_SECONDS"):
        assert f"{name} is not valid" in ran.out
    assert parts(ran, "unchecked")
    ran = await check({"TOOLFLEET_TOOL_POLICY": "web_crawl"})
    assert (ran.code, "TOOLFLEET_TOOL_POLICY is not JSON" in ran.out) == (1, True)


async def test_an_environment_that_has_it_all_is_left_as_it_was(fleet: Fleet) -> None:
    ran = await check(fleet.env())
    assert ran.code == 0
    assert parts(ran, "missing") == []
    assert "streams: as they must be, or not made yet" in ran.out
    assert parts(ran, "warning") == ["writes of Redis"]  # the session's server does not sync
    assert not fleet.state_dir.exists()
    connection = await nats.connect(fleet.env()["NATS_URL"])
    with pytest.raises(nats.js.errors.NotFoundError):
        await connection.jetstream().stream_info(fleet.settings.stream)
    await connection.close()


async def test_streams_with_other_settings_are_named(fleet: Fleet, make_settings: SettingsFactory) -> None:
    async with open_core(fleet.settings, name="test"):
        pass
    ran = await check(fleet.env(TOOLFLEET_STREAM_MAX_BYTES="2097152"))
    assert ran.code == 1
    assert parts(ran, "missing") == ["streams"]
    assert f"{fleet.settings.stream} exists with other settings: max_bytes is" in ran.out


async def test_an_mcp_program_that_is_not_there_is_a_warning(fleet: Fleet) -> None:
    config = fleet.folder / "other.json"
    config.write_text('{"mcpServers": {"time": {"command": "no-such-program"}}}')
    ran = await check(fleet.env(TOOLFLEET_MCP_CONFIG=str(config)))
    assert ran.code == 0
    assert "time: there is no program 'no-such-program' on PATH" in ran.out


async def test_a_python_without_the_package_is_said() -> None:
    # -S leaves site-packages out, and with it the package.
    ran = await run(sys.executable, "-I", "-S", START_WORKER, "--check", env={})
    assert ran.code == 1
    assert parts(ran, "missing") == ["package"]
    assert "make setup" in ran.err
    assert "unchecked  settings" in ran.err


async def test_a_python_that_is_too_old_is_said() -> None:
    program = "import sys, start_worker; start_worker.MIN_PYTHON = (99, 0); sys.exit(start_worker.main(['--check']))"
    ran = await run(sys.executable, "-c", program, env={"PYTHONPATH": str(START_WORKER.parent)})
    assert ran.code == 1
    assert parts(ran, "missing") == ["Python"]
    assert "99.0 or later is needed" in ran.err


async def test_a_worker_does_not_run_without_what_it_needs() -> None:
    ran = await run(sys.executable, START_WORKER, "--tier", "high", env={})
    assert ran.code == 1
    assert ran.err.count('"environment.missing"') == 2
    broken = await run(sys.executable, START_WORKER, "--tier", "high", env={"TOOLFLEET_LEASE": "0"})
    assert broken.code == 1
    assert "TOOLFLEET_LEASE is not valid" in broken.err


@pytest.mark.parametrize("words", [[], ["--tier", "urgent"], ["--tier", "high", "low"]], ids=" ".join)
async def test_wrong_usage(words: list[str]) -> None:
    ran = await run(sys.executable, START_WORKER, *words, env={})
    assert (ran.code, ran.out) == (2, "")
    assert "usage: start_worker.py" in ran.err
