"""manage_workers.sh brings workers up: as many as asked for, each once, and says why one does not come up."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployment.fleet import Fleet, is_alive, start_time
from tests.support.waiting import wait_until


async def test_a_fleet_from_start_to_stop(fleet: Fleet) -> None:
    fleet.extra = {"WORKER_COUNT_HIGH": "", "WORKER_COUNT_NORMAL": "", "WORKER_COUNT_LOW": ""}
    pids = await fleet.started()
    assert list(pids) == ["high-1", "low-1", "normal-1", "normal-2"]
    for name, pid in pids.items():
        assert_detached(pid, fleet.state_dir / f"{name}.log")
    table = await fleet.manage("status")
    assert table.code == 0
    assert table.lines[0].split() == ["TIER", "NAME", "PID", "UPTIME", "IN-FLIGHT", "DONE", "STATE", "HEARTBEAT"]
    row = table.lines[1].split()
    assert row[:3] == ["high", "high-1", str(pids["high-1"])]
    assert row[4:7] == ["0", "0", "running"]
    code, workers = await fleet.status()
    assert code == 0
    assert {name: worker["pid"] for name, worker in workers.items()} == pids
    assert [worker["tier"] for worker in workers.values()] == ["high", "normal", "normal", "low"]

    again = await fleet.manage("start")
    assert (again.code, len(again.lines)) == (0, 4)
    assert all("runs already" in line for line in again.lines)
    assert fleet.pids() == pids

    stopped = await fleet.manage("stop")
    assert stopped.code == 0
    assert "SIGKILL" not in stopped.err
    assert fleet.processes() == {}
    assert sorted(path.name for path in fleet.state_dir.iterdir()) == [
        ".lock",
        *(f"{name}.log" for name in sorted(pids)),
    ]
    none = await fleet.manage("status")
    assert none.code == 3
    assert "no worker runs" in none.out


def assert_detached(pid: int, log: Path) -> None:
    """It leads a session of its own, ignores SIGHUP, and holds nothing of the terminal or of the lock."""
    assert os.getsid(pid) == pid
    ignored = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn"))
    assert int(ignored.split()[1], 16) & 1 << (signal.SIGHUP - 1)
    opened = {path.name: str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert (opened["0"], opened["1"], opened["2"]) == (os.devnull, str(log), str(log))
    assert not [target for target in opened.values() if target.endswith(".lock")]


async def test_no_worker_is_started_twice(fleet: Fleet) -> None:
    """Neither by two starts at the same time, nor after its pid file was lost."""
    both = await asyncio.gather(fleet.manage("start"), fleet.manage("start"))
    assert [ran.code for ran in both] == [0, 0]
    said = "".join(ran.out for ran in both)
    assert said.count("normal-1 started") == 1
    assert said.count("normal-1 runs already") == 1
    pids = fleet.pids()
    assert list(fleet.processes()) == list(pids.values())
    (fleet.state_dir / "normal-1.pid").unlink()
    assert (await fleet.status())[1]["normal-1"]["pid"] == pids["normal-1"]
    ran = await fleet.manage("start")
    assert ran.code == 0
    assert "normal-1: its pid file was lost" in ran.out
    assert fleet.pids() == pids
    assert list(fleet.processes()) == list(pids.values())


async def test_counts_can_grow_and_a_surplus_is_said(fleet: Fleet) -> None:
    first = await fleet.started()
    more = await fleet.started(WORKER_COUNT_NORMAL="2")
    assert list(more) == ["normal-1", "normal-2"]
    assert more["normal-1"] == first["normal-1"]
    fewer = await fleet.manage("start")
    assert fewer.code == 0
    assert "normal-2 runs beyond WORKER_COUNT_NORMAL=1" in fewer.out
    assert fleet.pids() == more
    assert (await fleet.manage("stop", "normal-2")).code == 0
    assert fleet.pids() == first


async def test_a_dead_worker_is_started_anew_with_a_fresh_log(fleet: Fleet) -> None:
    before = await fleet.started()
    log = fleet.state_dir / "normal-1.log"
    for number in (1, 2, 3):
        Path(f"{log}.{number}").write_text(f"log {number}")
    os.kill(before["normal-1"], signal.SIGKILL)
    await wait_until(lambda: not is_alive(before["normal-1"]), "the worker is dead")
    code, workers = await fleet.status()
    assert (code, workers["normal-1"]["state"], workers["normal-1"]["runs"]) == (3, "dead", False)
    last_words = log.read_text()
    ran = await fleet.manage("start", WORKER_LOG_MAX_BYTES="5")
    assert ran.code == 0
    assert f"normal-1: its pid file names {before['normal-1']}, which is gone" in ran.out
    assert is_alive(fleet.pids()["normal-1"])
    assert [Path(f"{log}.{number}").read_text() for number in (1, 2, 3)] == [last_words, "log 1", "log 2"]
    assert str(before["normal-1"]) not in log.read_text()


@pytest.mark.parametrize("start_matches", [True, False], ids=["same-start-time", "other-start-time"])
async def test_a_pid_that_another_program_has_now_is_left_alone(fleet: Fleet, start_matches: bool) -> None:
    with subprocess.Popen(["sleep", "600"]) as sleep:
        try:
            fleet.write_pid_file("normal-1", sleep.pid, start_time(sleep.pid) if start_matches else "1")
            code, workers = await fleet.status()
            assert (code, workers["normal-1"]["state"]) == (3, "dead")
            stopped = await fleet.manage("stop")
            assert stopped.code == 0
            assert f"names {sleep.pid}, which is another program now (sleep)" in stopped.out
            assert sleep.poll() is None
            assert fleet.pids() == {}
        finally:
            sleep.kill()


async def test_a_worker_that_dies_at_start_is_shown_with_its_last_words(fleet: Fleet) -> None:
    python = fleet.folder / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *normal-2*) echo "out of luck"; exit 3 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (fleet.state_dir).mkdir()
    (fleet.state_dir / "normal-2.log").write_text("words of an earlier life\n")
    ran = await fleet.manage("start", WORKER_COUNT_NORMAL="2", TOOLFLEET_PYTHON=str(python))
    assert ran.code == 1
    assert "normal-2 died at start" in ran.err
    assert "    out of luck" in ran.err
    assert "earlier life" not in ran.err
    assert f"these run: normal-1 (pid {fleet.pids()['normal-1']})" in ran.err
    code, workers = await fleet.status()
    assert code == 1
    assert {name: worker["state"] for name, worker in workers.items()} == {"normal-1": "running", "normal-2": "dead"}


async def test_nothing_is_started_where_the_environment_lacks_something(fleet: Fleet) -> None:
    ran = await fleet.manage(
        "start", NATS_URL="nats://me:hunter2@127.0.0.1:1", REDIS_URL="redis://:hunter2@127.0.0.1:1/0"
    )
    assert ran.code == 1
    missing = [line.split(":")[0] for line in ran.err.splitlines() if line.startswith("missing")]
    assert [line.split()[1] for line in missing] == ["NATS", "Redis"]
    assert "nothing was started" in ran.err
    assert "hunter2" not in ran.out + ran.err
    assert (fleet.pids(), fleet.processes()) == ({}, {})


async def test_a_stream_for_which_there_is_no_room_is_said(fleet: Fleet) -> None:
    ran = await fleet.manage("start", TOOLFLEET_STREAM_MAX_BYTES=str(1 << 40))
    assert ran.code == 1
    assert "normal-1 died at start" in ran.err
    assert "insufficient storage" in ran.err
    assert "max_file_store" in ran.err


async def test_a_missing_interpreter_is_said(fleet: Fleet) -> None:
    ran = await fleet.manage("start", TOOLFLEET_PYTHON=str(fleet.folder / "nowhere"))
    assert ran.code == 1
    assert "TOOLFLEET_PYTHON" in ran.err


async def test_restart_goes_one_by_one(fleet: Fleet) -> None:
    before = await fleet.started(WORKER_COUNT_NORMAL="2")
    refused = await fleet.manage("restart", WORKER_COUNT_NORMAL="2", REDIS_URL="redis://127.0.0.1:1/0")
    assert refused.code == 1
    assert "nothing was restarted" in refused.err
    assert fleet.pids() == before
    ran = await fleet.manage("restart", WORKER_COUNT_NORMAL="2")
    assert ran.code == 0
    steps = [line.split(" (pid")[0] for line in ran.lines if not line.startswith("waiting")]
    assert steps == ["normal-1 stopped", "normal-1 started", "normal-2 stopped", "normal-2 started"]
    after = fleet.pids()
    assert set(after.values()) & set(before.values()) == set()
    assert set(fleet.processes()) == set(after.values())
