"""Events as bars on a terminal, and in words."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from toolfleet.cli.sse import ServerEvent
from toolfleet.cli.watching import Bars, JsonLines, Lines, describe, follower_for


def event(kind: str, **data: Any) -> ServerEvent:
    return ServerEvent(1, kind, {"job_id": "job_x", **data})


def drawn(*events: ServerEvent, names: dict[str, str] | None = None) -> str:
    """The last picture of the bars."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120, no_color=True)
    with Bars(console, names) as bars:
        for each in events:
            bars.show(each)
        file = console.file
        assert isinstance(file, io.StringIO)
        file.truncate(0)
        file.seek(0)
    return file.getvalue()


def call(kind: str, name: str = "call_1", **data: Any) -> ServerEvent:
    return event(kind, tool_call_id=name, tool_name="web_crawl", **data)


def test_a_bar_for_each_call() -> None:
    picture = drawn(
        call("tool.started"),
        call("tool.progress", progress=3, total=9, message="read a page"),
        call("tool.started", "call_2"),
        call("tool.completed", "call_2", duration_ms=1200),
    )
    first, second = [line for line in picture.splitlines() if "call_" in line]
    assert "call_1 web_crawl" in first
    assert "3/9" in first
    assert "read a page" in first
    assert "call_2 web_crawl" in second
    assert "done in 1.2 s" in second


def test_a_call_that_is_tried_again_begins_anew() -> None:
    picture = drawn(
        call("tool.started"),
        call("tool.progress", progress=8, total=9),
        call("tool.failed", will_retry=True, error={"code": "timeout", "message": "no answer"}),
        call("tool.started"),
        call("tool.progress", progress=1, total=9),
    )
    assert "1/9" in picture
    assert "8/9" not in picture


def test_bars_of_calls_that_are_known_stand_there_before_they_start() -> None:
    picture = drawn(names={"a": "Harbours [1]", "b": "Orchards"})
    assert "Harbours [1]" in picture
    assert picture.count("waiting") == 2


def test_progress_without_a_total_is_a_count() -> None:
    assert " 7 " in drawn(call("tool.started"), call("tool.progress", progress=7))


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (event("job.started", worker="w-1"), "by w-1"),
        (event("job.retrying", next_attempt_at="2030-01-01T00:00:00Z", error={"message": "lost"}),
         "next attempt at 2030-01-01T00:00:00Z lost"),
        (call("tool.failed", will_retry=True, error={"message": "lost"}), "call_1 web_crawl will be tried again: lost"),
        (event("job.cancelling", reached="worker"), "reached: worker"),
        (event("gap", after=1, resumes_at=9), "earlier events are no longer kept"),
    ],
)  # fmt: skip
def test_events_in_words(told: ServerEvent, words: str) -> None:
    assert describe(told) == words


def test_what_fits_where_stdout_goes() -> None:
    terminal, pipe = Console(force_terminal=True), Console(file=io.StringIO())
    assert isinstance(follower_for(terminal, as_json=False), Bars)
    assert isinstance(follower_for(pipe, as_json=False), Lines)
    assert isinstance(follower_for(terminal, as_json=True), JsonLines)


def test_who_decided_and_why_is_told() -> None:
    decisions = [
        {"tool_call_id": "call_1", "decision": "completed", "by": "ada", "note": "seen in the shop"},
        {"tool_call_id": "call_2", "decision": "rerun", "by": "", "note": ""},
    ]
    told = describe(event("job.queued", reason="resolved", decisions=decisions))
    assert told == "call_1 completed by ada: seen in the shop; call_2 rerun; (resolved)"
    again = describe(event("job.queued", reason="redrive", by="ada", note="its server is up"))
    assert again == "(redrive) by ada note: its server is up"


def test_control_characters_of_a_tool_are_written_out() -> None:
    assert describe(call("tool.progress", progress=1, message="\x1b[2Jgone")) == "call_1 web_crawl 1 \\x1b[2Jgone"
