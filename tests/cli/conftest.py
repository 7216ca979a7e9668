"""One stack for all tests that only use it, started by the installed `toolfleet up`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import PROGRAM, Ended, clean_env, in_process, toolfleet

TOOLBOX = Path(__file__).parents[1] / "tool_execution" / "servers" / "toolbox.py"
START_S = 60.0


@dataclass(frozen=True)
class Fleet:
    """A running stack, with the tool server of other tests as the operator's own."""

    api: str
    site: str
    env: dict[str, str]
    """For a client: where the API is. `servers` has more."""
    servers: dict[str, str]
    """For a worker, or `doctor`."""

    def run(self, *arguments: str, stdin: str = "", **more: str) -> Ended:
        """The installed program against this stack."""
        return toolfleet(*arguments, env={**self.env, **more}, stdin=stdin)

    def call(self, *arguments: str, stdin: str = "") -> Ended:
        """The same, within this process."""
        return in_process(*arguments, env=self.env, stdin=stdin)

    def submit(self, *arguments: str) -> str:
        """A new job's id."""
        ended = self.call("submit", *arguments)
        assert ended.code == 0, ended.err
        return ended.out.strip()


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    config = folder / "mine.json"
    toolbox = {"command": sys.executable, "args": [str(TOOLBOX), "stdio", str(folder / "notes")]}
    config.write_text(json.dumps({"mcpServers": {"toolbox": toolbox}}))
    ready = folder / "ready.json"
    log = (folder / "up.log").open("w+")
    arguments = ["up", "--port", "0", "--data", str(folder / "data"), "--ready-file", str(ready)]
    env = clean_env(TOOLFLEET_MCP_CONFIG=str(config))
    with log, subprocess.Popen([PROGRAM, *arguments], env=env, stdout=log, stderr=log) as process:
        try:
            yield _ready(process, ready, Path(log.name))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                # Everything drains, and a folder that was named stays.
                assert process.wait(START_S) == 0, Path(log.name).read_text()
                assert Path(log.name).read_text().endswith("stopped\n")
                assert (folder / "data" / "nats").is_dir()
                assert not ready.exists()
            finally:
                process.kill()


def _ready(process: subprocess.Popen[Any], ready: Path, log: Path) -> Fleet:
    deadline = time.monotonic() + START_S
    while not ready.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)  # a fixture of a whole session has no event loop to wait in
    told = json.loads(ready.read_text())
    servers = {name: value for name, value in told["env"].items() if value is not None}
    return Fleet(told["api"], told["site"], clean_env(TOOLFLEET_API_URL=told["api"]), servers)
