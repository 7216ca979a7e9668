"""Fleets of real workers whose tools are the toolbox over stdio."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.conftest import SettingsFactory
from tests.deployment.fleet import TOOLBOX, Fleet
from tests.support.waiting import wait_until


@pytest.fixture
async def fleet(tmp_path: Path, make_settings: SettingsFactory, nats_url: str, redis_url: str) -> AsyncIterator[Fleet]:
    """No worker runs yet; those that run at the end of a test are killed."""
    toolbox = {"command": sys.executable, "args": [str(TOOLBOX), "stdio", str(tmp_path / "notes")]}
    mcp_config = tmp_path / "mcp.json"
    mcp_config.write_text(json.dumps({"mcpServers": {"toolbox": toolbox}}))
    fleet = Fleet(tmp_path, make_settings(nats_url=nats_url, redis_url=redis_url, mcp_config=mcp_config))
    try:
        yield fleet
    finally:
        fleet.kill_all()
        await wait_until(lambda: not fleet.processes(), "all processes of the fleet are gone")
