"""The points and the broken builds fit the source as it is, and what is armed happens."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.chaos.broken_builds import BROKEN, SHORT_GRACE
from tests.chaos.points import API_POINTS, BEYOND_PROTOCOL, POINTS
from tests.chaos.weaving import HOOK, Patch, Point, WeavingError, patched_lua, source_path, with_lua, woven
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
LUA = source_path("services.background_jobs.redis_functions").parent / "lua"


@pytest.mark.parametrize("name", POINTS)
def test_a_point_has_its_place(name: str) -> None:
    tree = woven(POINTS[name].module, {name: POINTS[name]}, ())
    text = ast.unparse(tree)
    assert text.count(f"{HOOK}.reach({name!r})") == 1
    compile(tree, name, "exec")


def test_all_points_fit_together() -> None:
    for module in {point.module for point in POINTS.values()}:
        compile(woven(module, POINTS, ()), module, "exec")
    assert set(POINTS) > BEYOND_PROTOCOL | set(API_POINTS)


@pytest.mark.parametrize("name", [*BROKEN, "short grace"])
def test_a_broken_build_has_its_place(name: str) -> None:
    patches = BROKEN.get(name, SHORT_GRACE)
    for patch in with_lua(patches):
        if patch.of_lua:
            text = (LUA / patch.module).read_text(encoding="utf-8")
            assert patched_lua(patch.module, text, patches) != text
        else:
            compile(woven(patch.module, {}, patches), name, "exec")


@pytest.mark.parametrize(
    ("function", "call", "said"),
    [
        ("gone", "f", "gone"),
        ("Submitter.gone", "f", r"Submitter\.gone"),
        ("Submitter.submit", "self._gone", r"self\._gone .* test-point; there are 0"),
        ("Submitter._already", "task_of", "there are 0"),
        ("Submitter._run_now", "QueueUnavailable", "there are 2"),
    ],
)
def test_a_place_that_is_gone_or_not_alone_is_named(function: str, call: str, said: str) -> None:
    point = Point("services.background_jobs.submission", function, "before", call)
    with pytest.raises(WeavingError, match=said):
        woven(point.module, {"test-point": point}, ())


def test_text_that_is_gone_is_named() -> None:
    gone = Patch("services.background_jobs.submission", "Submitter.submit", "no such text", "")
    with pytest.raises(WeavingError, match="no such text"):
        woven(gone.module, {}, [gone])
    with pytest.raises(WeavingError, match="no such text"):
        patched_lua("10_common.lua", "text", [Patch("10_common.lua", "", "no such text", "")])


async def run_woven(told: dict[str, object], program: str, folder: Path) -> asyncio.subprocess.Process:
    """A program that is one line of Python, under the weaver."""
    (folder / "program.py").write_text(program)
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chaos.woven", json.dumps(told), "program", "an argument",
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(folder)}, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


POINT = "after-purge-before-publish"
PROGRAM = """
import asyncio, sys
from types import SimpleNamespace
from toolfleet.services.background_jobs.reopening import publish_generation
from toolfleet.services.background_jobs.redis_functions import library
class Queue:
    async def purge(self, job_id): print("purged", flush=True)
    async def publish(self, task): return "stored"
async def main():
    for n in (1, 2, 3):
        await publish_generation(Queue(), SimpleNamespace(job_id="j"))
    print("GRACE_MS = 500" in library()[0], sys.argv[1:], flush=True)
asyncio.run(main())
"""


async def test_a_process_stops_at_the_nth_time_and_goes_on_when_it_is_continued(tmp_path: Path) -> None:
    hits = tmp_path / "hits"
    armed = [{"point": POINT, "nth": 2, "action": "stop"}]
    process = await run_woven({"armed": armed, "hits": str(hits), "short_grace": True}, PROGRAM, tmp_path)
    try:
        await wait_until(lambda: process.returncode is not None or hits.exists(), "the point is reached")
        await wait_until(lambda: _state(process.pid) == "T", "the process is stopped")
        assert hits.read_text() == f"{POINT} {process.pid}\n"
        process.send_signal(signal.SIGCONT)
        async with asyncio.timeout(20):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, err.decode()) == (0, "")
    assert out.decode().splitlines() == ["purged", "purged", "purged", "True ['an argument']"]


async def test_a_process_kills_itself(tmp_path: Path) -> None:
    armed = [{"point": POINT, "action": "kill"}]
    process = await run_woven({"armed": armed, "hits": str(tmp_path / "hits")}, PROGRAM, tmp_path)
    async with asyncio.timeout(20):
        out, _ = await process.communicate()
    assert (process.returncode, out) == (-signal.SIGKILL, b"purged\n")
    assert (tmp_path / "hits").read_text() == f"{POINT} {process.pid}\n"


async def test_an_unarmed_process_runs_through_and_an_unknown_point_does_not_start(tmp_path: Path) -> None:
    process = await run_woven({}, PROGRAM, tmp_path)
    async with asyncio.timeout(20):
        out, _ = await process.communicate()
    assert (process.returncode, out.decode().splitlines()[-1]) == (0, "False ['an argument']")
    process = await run_woven({"armed": [{"point": "no-such-point", "action": "stop"}]}, PROGRAM, tmp_path)
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert process.returncode == 1
    assert "no-such-point" in err.decode()
    assert out == b""


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
