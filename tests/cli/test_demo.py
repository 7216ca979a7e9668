"""`toolfleet demo` from start to end, stopped in the middle, and failing: nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.running import Marked
from tests.support.waiting import wait_until
from toolfleet.cli.exits import FAILED, SIGNAL_BASE

HOSTILE = {
    "NATS_URL": "nats://127.0.0.1:1",
    "REDIS_URL": "redis://127.0.0.1:1/0",
    "CONSUL_HTTP_ADDR": "127.0.0.1:1",
    "TOOLFLEET_WORKER_NAME": "all-the-same",
    "TOOLFLEET_API_PORT": "not a port",
    "TOOLFLEET_MCP_CONFIG": "/nowhere",
    "TOOLFLEET_WEB_MAX_PAGE_BYTES": "1024",
}
"""Settings of a machine on which other things run; the demo has to be the same there."""


STEPS = (
    "NATS and Redis",
    "tool server, API and 4 workers",
    "demo site of 38 pages",
    "job accepted",
    "taken by normal-",
    "four sites crawled",
    "results read",
    "everything stopped and removed",
)


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Marked]:
    process = Marked(tmp_path, "demo", env=HOSTILE)
    try:
        yield process
    finally:
        process.kill()


async def nothing_is_left(demo: Marked) -> None:
    await wait_until(lambda: not demo.family(), "every process has ended")
    assert list(demo.tmp.iterdir()) == []


async def test_it_shows_everything_and_leaves_nothing(demo: Marked) -> None:
    ended = demo.end()
    assert ended.code == 0, ended.out
    for call in ("harbours", "orchards", "railways", "observatories"):
        assert re.search(rf"tool\.progress +{call} web_crawl \d/9 ", ended.out)
        pages, words = map(int, re.search(rf"^{call} +(\d+) +(\d+) ", ended.out, re.MULTILINE).groups())  # type: ignore[union-attr]  # no match fails
        assert pages == 9
        assert words > 1000
    for step in STEPS:
        assert re.search(rf"^{step}.*\d\.\d\d s$", ended.out, re.MULTILINE), step
    await nothing_is_left(demo)


@pytest.mark.parametrize(
    ("moment", "number"),
    [("NATS and Redis", signal.SIGHUP), ("NATS and Redis", signal.SIGTERM), ("tool.started", signal.SIGINT)],
)
async def test_a_signal_in_the_middle_leaves_nothing(demo: Marked, moment: str, number: signal.Signals) -> None:
    demo.read_until(moment)
    assert len(demo.family()) > 3
    demo.popen.send_signal(number)
    ended = demo.end()
    assert ended.code == SIGNAL_BASE + number
    assert ended.out.endswith(f"toolfleet: stopped by {number.name}\n")
    await nothing_is_left(demo)


async def test_a_part_that_dies_is_named_with_its_last_words(demo: Marked) -> None:
    demo.read_until("demo site")
    (api,) = demo.family(containing="toolfleet.cli api")
    os.kill(api, signal.SIGKILL)
    ended = demo.end()
    assert ended.code == FAILED
    assert "toolfleet: api ended by signal 9. The end of the log of api:\n" in ended.out
    assert "api.ready" in ended.out
    await nothing_is_left(demo)
