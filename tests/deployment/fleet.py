"""The real manage_workers.sh on a state directory and streams of the test's own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from tests.support.settings_doc import variable
from toolfleet.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
STAGING = ROOT / "deployment" / "staging"
MANAGE = STAGING / "scripts" / "manage_workers.sh"
START_WORKER = STAGING / "scripts" / "start_worker.py"
TOOLBOX = ROOT / "tests" / "tool_execution" / "servers" / "toolbox.py"

BOUND_S = 60
"""Of one command; it only bounds a failing test."""


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


async def run(*command: str | Path, env: dict[str, str]) -> Ran:
    """Runs a command to its end."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        env=env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(BOUND_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


@dataclass
class Fleet:
    """One host's workers.

    Attributes:
        folder: everything of the fleet lies in it, so whatever names it belongs to the fleet.
        settings: what its workers have.
        extra: further variables of the script's environment.
    """

    folder: Path
    settings: Settings
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    def env(self, **variables: str) -> dict[str, str]:
        """Nothing of this machine's environment but PATH and HOME, and one normal worker."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            **variables_of(self.settings),
            "TOOLFLEET_STATE_DIR": str(self.state_dir),
            "TOOLFLEET_PYTHON": sys.executable,
            "WORKER_COUNT_HIGH": "0",
            "WORKER_COUNT_NORMAL": "1",
            "WORKER_COUNT_LOW": "0",
            **self.extra,
            **variables,
        }

    async def manage(self, *words: str, **variables: str) -> Ran:
        """Runs manage_workers.sh."""
        return await run(MANAGE, *words, env=self.env(**variables))

    async def started(self, **variables: str) -> dict[str, int]:
        """Starts the fleet, which must work; the pids by name."""
        ran = await self.manage("start", **variables)
        assert ran.code == 0, ran.out + ran.err
        return self.pids()

    async def status(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """Exit code and workers by name, from `status --json`."""
        ran = await self.manage("status", "--json")
        return ran.code, {worker["name"]: worker for worker in json.loads(ran.out)["workers"]}

    def pids(self) -> dict[str, int]:
        """What the pid files say."""
        return {path.stem: int(path.read_text().split()[0]) for path in sorted(self.state_dir.glob("*.pid"))}

    def write_pid_file(self, name: str, pid: int, start: str) -> None:
        self.state_dir.mkdir(exist_ok=True)
        (self.state_dir / f"{name}.pid").write_text(f"{pid}\n{start}\n")

    def processes(self) -> dict[int, str]:
        """Live processes of this fleet by pid: those whose command line or environment name its folder."""
        mark, found = str(self.folder).encode(), {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                command, environ = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            except OSError:
                continue  # it has ended meanwhile, or is another user's
            if command and (mark in command or mark in environ):
                found[int(entry.name)] = command.replace(b"\0", b" ").decode()
        return found

    def kill_all(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def variables_of(settings: Settings) -> dict[str, str]:
    """The environment that gives the settings which were set."""
    variables = {}
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        variables[variable(name, Settings.model_fields[name])] = text
    return variables


def start_time(pid: int) -> str:
    """In clock ticks after boot, field 22 of proc(5)'s stat."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]


def is_alive(pid: int) -> bool:
    """Whether a process has this pid and has not ended; one that ended and nobody has waited for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False
