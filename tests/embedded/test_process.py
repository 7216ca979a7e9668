"""One child process: its end is certain, and it does not outlive its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from toolfleet.services.embedded.errors import ServerNotRunning
from toolfleet.services.embedded.process import ChildProcess

STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf to SIGTERM", flush=True)
while True: signal.pause()
"""

PARENT = """
import sys, signal
from pathlib import Path
from toolfleet.services.embedded.process import ChildProcess
folder = Path(sys.argv[1])
print(ChildProcess(["/bin/sleep", "600"], folder, folder / "log").pid, flush=True)
signal.pause()
"""


def start(tmp_path: Path, *command: str) -> ChildProcess:
    return ChildProcess(command, tmp_path, tmp_path / "log")


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    child = start(tmp_path, sys.executable, "-c", STUBBORN)
    await wait_until(lambda: "deaf" in child.log_tail(), "the child ignores SIGTERM")
    await child.stop(grace=0.05)
    assert child.exit_code == -signal.SIGKILL


async def test_stop_and_kill_are_safe_to_repeat(tmp_path: Path) -> None:
    child = start(tmp_path, "/bin/sleep", "600")
    await child.stop(grace=10)
    await child.stop(grace=10)
    await child.kill()
    assert child.exit_code == -signal.SIGTERM


async def test_a_paused_child_acts_on_stop(tmp_path: Path) -> None:
    child = start(tmp_path, "/bin/sleep", "600")
    await child.pause()
    assert state_of(child.pid) == "T"
    await child.stop(grace=10)
    assert child.exit_code == -signal.SIGTERM


async def test_an_ended_child_takes_no_signals(tmp_path: Path) -> None:
    child = start(tmp_path, "/bin/true")
    assert await child.wait() == 0
    with pytest.raises(ServerNotRunning, match="has ended"):
        await child.pause()


async def test_wait_is_bounded(tmp_path: Path) -> None:
    child = start(tmp_path, "/bin/sleep", "600")
    with pytest.raises(TimeoutError, match="still runs"):
        await child.wait(timeout=0.01)
    await child.kill()


async def test_a_command_that_cannot_run_says_so_in_the_log(tmp_path: Path) -> None:
    child = start(tmp_path, str(tmp_path / "missing"))
    assert await child.wait() != 0
    assert "No such file" in child.log_tail()


async def test_the_log_tail_is_of_this_process_alone(tmp_path: Path) -> None:
    await start(tmp_path, "/bin/echo", "first").wait()
    second = start(tmp_path, "/bin/echo", "second")
    await second.wait()
    assert second.log_tail() == "second"
    assert (tmp_path / "log").read_text() == "first\nsecond\n"


async def test_ctrl_c_in_the_terminal_does_not_reach_a_child(tmp_path: Path) -> None:
    child = start(tmp_path, "/bin/sleep", "600")
    assert os.getsid(child.pid) == child.pid
    await child.kill()


async def test_a_child_dies_with_its_killed_parent(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        # Whether the child has asked the kernel for its own end by now or finds its parent gone: it ends.
        parent.kill()
    await wait_until(lambda: state_of(child) in (None, "Z"), "the child is gone")


def state_of(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
