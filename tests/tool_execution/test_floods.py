"""Tools that report progress as fast as they can: thinned out, the last state never lost, nobody else held up."""

from __future__ import annotations

import asyncio
import math
import random

import pytest

from tests.tool_execution.conftest import OpenTools
from tests.tool_execution.harness import Caller, Notes, Progress, peer, spec_of, stdio_toolbox, text
from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution.progress_gate import ONE_BY_ONE, ProgressGate, progress_token
from toolfleet.services.tool_execution.sse_filter import SseFilter

ECHO = spec_of("toolbox", "echo")


def writer_of_stdout(notes: Notes) -> McpServer:
    """The toolbox on the SDK's previous release: the current one keeps what tools write out of its stdout."""
    return stdio_toolbox(notes, python=peer("python"))


def counted(told: list[Progress]) -> int:
    """Notifications that were told or said to be left out."""
    return len(told) + sum(entry[3] for entry in told if len(entry) > 3)


async def test_a_flood_is_thinned_out_counted_and_its_last_state_comes_before_the_result(call: Caller) -> None:
    result = await call("steps", count=2000)
    assert text(result) == "done"
    assert call.progress[-1][:3] == (2000, 2000, "step 2000")
    assert [entry[0] for entry in call.progress[:ONE_BY_ONE]] == list(range(1, ONE_BY_ONE + 1))
    assert [entry[0] for entry in call.progress] == sorted(entry[0] for entry in call.progress)
    assert counted(call.progress) == 2000
    assert len(call.progress) < 2000


async def test_a_hundred_thousand_notifications_at_once(notes: Notes, open_tools: OpenTools) -> None:
    call = Caller(await open_tools(writer_of_stdout(notes)))
    line = '"progress":STEP,"total":1000,"message":"of the server"'
    assert text(await call("raw_progress", timeout=60, lines=[line] * 100, times=1000)) == "done"
    assert call.progress[-1][:3] == (1000, 1000, "of the server")
    assert counted(call.progress) == 100_000
    assert len(call.progress) < 10_000


async def test_beside_a_flood_other_calls_are_answered_and_the_flood_can_be_cancelled(
    call: Caller, notes: Notes
) -> None:
    flood = asyncio.create_task(call("flood", label="f"))
    await notes.until("started", "f")
    for number in range(20):
        assert text(await call.run(ECHO, timeout=10, text=str(number))) == str(number)
    assert call.progress
    flood.cancel()
    await notes.until("cancelled", "f")
    with pytest.raises(asyncio.CancelledError):
        await flood
    told = len(call.progress)
    assert text(await call.run(ECHO, text="after")) == "after"
    assert len(call.progress) == told, "nothing is told of a call that has ended"
    assert await call.opened("toolbox") == 1


async def test_numbers_that_are_none_break_nothing(notes: Notes, open_tools: OpenTools) -> None:
    call = Caller(await open_tools(writer_of_stdout(notes)))
    lines = [
        '"progress":NaN,"total":Infinity',
        '"progress":-5,"total":-1',
        f'"progress":{"9" * 400},"message":"huge"',
        '"progress":"three"',
        '"progress":null',
        '"progress":1,"total":"x","message":7',
        '"progress":2,"message":"fine"',
    ]
    assert text(await call("raw_progress", lines=lines, times=1)) == "done"
    told = call.progress
    assert math.isnan(told[0][0])
    assert told[0][1] == math.inf
    assert told[1:4] == [(-5, -1, None), (math.inf, None, "huge"), (1, None, None, 2)]
    assert told[4] == (2, None, "fine")
    assert text(await call.run(ECHO, text="after")) == "after"
    assert await call.opened("toolbox") == 1, "the session lives on"


@pytest.mark.parametrize(
    ("line", "token"),
    [
        (b'{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":7,"progress":1}}', 7),
        (b'{"method":"notifications/progress","params":{"progress":1,"progressToken": 7},"jsonrpc":"2.0"}', 7),
        (b'{"jsonrpc":"2.0","id":1,"result":{"method":"notifications/progress","params":{"progressToken":7}}}', None),
        (b'{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":"7","progress":1}}', None),
        (b'{"jsonrpc":"2.0","method":"notifications/progress","params":'
         b'{"progressToken":7,"_meta":{"progressToken":8},"progress":1}}', None),
        (b'{"jsonrpc":"2.0","method":"notifications/progress","params":'
         b'{"message":"\\"progressToken\\":8,","progressToken":7,"progress":1}}', 7),
        (b'{"jsonrpc":"2.0","method":"notifications/message","params":{"progressToken":7}}', None),
    ],
)  # fmt: skip
def test_only_what_is_surely_progress_is_taken_for_it(line: bytes, token: int | None) -> None:
    assert progress_token(line) == token


def filtered(data: bytes, source: random.Random) -> tuple[str, list[float]]:
    """What is left of a stream that comes in pieces of any size, and the progress that was told."""
    told: list[float] = []
    out = b""
    with ProgressGate(lambda *state: told.append(state[0])) as gate:
        found = SseFilter(gate, 7)
        while data:
            size = source.choice((1, 7, 100, 5000, 90_000)) if len(out) < 50_000 else 5000
            out += found.feed(data[:size])
            data = data[size:]
        out += found.rest()
    return out.decode(), told


async def test_an_event_stream_is_filtered_wherever_it_is_cut() -> None:
    progress = (
        'data: {{"jsonrpc":"2.0","method":"notifications/progress","params":{{"progressToken":7,"progress":{}}}}}'
    )
    other = progress.replace(":7,", ":8,").format(1)
    answer = 'data: {"jsonrpc":"2.0","id":7,"result":{"text":"%s"}}' % ("x" * 70_000)
    events = [f"event: message\r\n{progress.format(n)}\r\n\r\n" for n in range(1, 60)]
    stream = "".join(
        [": hello\n\n", *events, f"id: 9\n{other}\n\n", f"id: 10\n{progress.format(60)}\n\n", answer, "\n\n"]
    )
    kept = [f"id: 9\n{other}\n\n", f"{answer}\n\n"]
    source = random.Random(4)
    for _ in range(20):
        text_out, told = filtered(stream.encode(), source)
        assert text_out.startswith(": hello\n\n")
        assert text_out.removeprefix(": hello\n\n").replace("id: 10\n\n", "") == "".join(kept)
        assert "id: 10\n\n" in text_out, "the place in the stream moves on"
        assert told == [*map(float, range(1, ONE_BY_ONE + 1)), 60.0]
