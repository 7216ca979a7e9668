"""Sessions over their life: reused, broken, hung, forgotten by a restarted server, and opened again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_until
from tests.tool_execution.conftest import OpenTools, StartHttp
from tests.tool_execution.harness import (
    Caller,
    ListRegistry,
    Notes,
    children_of,
    is_running,
    old_stdio,
    own_children,
    peer,
    spec_of,
    stdio_toolbox,
    text,
)
from toolfleet.services.background_jobs.errors import (
    ResultTooLarge,
    ToolConnectionLost,
    ToolRejected,
    ToolServerFailed,
    ToolUnavailable,
)
from toolfleet.services.background_jobs.task_models import ToolResult
from toolfleet.services.discovery.models import McpServer

ECHO = spec_of("toolbox", "echo")
HANG = spec_of("toolbox", "hang")


async def until_it_works(call: Caller) -> ToolResult:
    """A call that is made again while the server is being reached."""

    results: list[ToolResult] = []

    async def attempt() -> bool:
        try:
            results.append(await call.run(ECHO, text="back"))
        except ToolUnavailable:
            return False
        return True

    await wait_until(attempt, "the server is reached again", timeout=30)
    return results[0]


async def test_a_crash_fails_the_calls_that_were_on_and_no_later_one(notes: Notes, open_tools: OpenTools) -> None:
    call = Caller(await open_tools(stdio_toolbox(notes)))
    await call.run(ECHO, text="one")
    on_it = asyncio.create_task(call.run(HANG, label="a"))
    await notes.until("started", "a")

    with pytest.raises(ToolConnectionLost):
        await call.run(spec_of("toolbox", "crash"))
    with pytest.raises(ToolConnectionLost):
        await on_it

    assert text(await call.run(ECHO, text="two")) == "two"
    assert await call.opened("toolbox") == 2


async def test_a_server_that_crashes_at_every_call_is_given_pauses(notes: Notes, open_tools: OpenTools) -> None:
    call = Caller(await open_tools(stdio_toolbox(notes)))
    with pytest.raises(ToolConnectionLost):
        await call.run(spec_of("toolbox", "crash"))
    with pytest.raises(ToolConnectionLost):
        await call.run(spec_of("toolbox", "crash"))

    with pytest.raises(ToolUnavailable, match=r"ended its session.*next attempt is due in"):
        await call.run(ECHO, timeout=0.01, text="x")

    waited = await asyncio.gather(*(call.run(ECHO, text="waited") for _ in range(5)))
    assert {text(result) for result in waited} == {"waited"}
    assert await call.opened("toolbox") == 3


async def test_a_hung_server_is_replaced_for_new_calls(
    notes: Notes, open_tools: OpenTools, caplog: pytest.LogCaptureFixture
) -> None:
    call = Caller(await open_tools(stdio_toolbox(notes), mcp_connect_timeout=30))
    await call.run(ECHO, text="one")

    await call.times_out(spec_of("toolbox", "freeze"))

    await wait_until(lambda: "shows no sign of life" in caplog.text, "it was asked for a sign of life", timeout=30)
    assert text(await call.run(ECHO, text="two")) == "two"
    assert await call.opened("toolbox") == 2
    [frozen] = notes.entries("frozen")
    await wait_until(lambda: not is_running(frozen["pid"]), "the frozen server is gone", timeout=30)


async def test_concurrent_first_calls_open_one_session(notes: Notes, open_tools: OpenTools) -> None:
    call = Caller(await open_tools(stdio_toolbox(notes)))

    await asyncio.gather(*(call.run(ECHO, text="x") for _ in range(20)))

    assert await call.opened("toolbox") == 1
    assert len(notes.entries("process")) == 1


async def test_cancelling_the_call_that_opens_leaves_the_session_to_the_others(
    notes: Notes, open_tools: OpenTools
) -> None:
    call = Caller(await open_tools(stdio_toolbox(notes)))
    first = asyncio.create_task(call.run(ECHO, text="1"))
    second = asyncio.create_task(call.run(ECHO, text="2"))
    await wait_until(lambda: len(own_children()) > 0, "the server is being started")

    first.cancel()

    assert text(await second) == "2"
    assert first.cancelled()


@pytest.mark.parametrize("python", ["new", "old"])
async def test_calls_survive_the_restart_of_an_http_server(
    python: str, start_http: StartHttp, open_tools: OpenTools
) -> None:
    server = await start_http(sys.executable if python == "new" else peer("python"))
    call = Caller(await open_tools(McpServer("toolbox", url=server.url)))
    await call.run(ECHO, text="before")
    await server.kill()

    with pytest.raises(ToolUnavailable, match="can't be reached"):
        await call.run(ECHO, text="down")

    await server.start()
    assert text(await until_it_works(call)) == "back"


async def test_a_session_that_a_restarted_server_does_not_know_is_opened_again(
    start_http: StartHttp, open_tools: OpenTools
) -> None:
    server = await start_http(peer("python"))
    call = Caller(await open_tools(McpServer("toolbox", url=server.url)))
    await call.run(ECHO, text="before")
    await server.kill()
    await server.start()

    results = await asyncio.gather(*(call.run(ECHO, text="after") for _ in range(10)))

    assert {text(result) for result in results} == {"after"}
    assert await call.opened("toolbox") == 2


async def test_calls_in_flight_are_lost_when_an_http_server_dies(
    notes: Notes, start_http: StartHttp, open_tools: OpenTools
) -> None:
    server = await start_http()
    call = Caller(await open_tools(McpServer("toolbox", url=server.url)))
    on_it = asyncio.create_task(call.run(HANG, label="a"))
    await notes.until("started", "a")

    await server.kill()

    with pytest.raises(ToolConnectionLost):
        await on_it


async def test_a_server_that_hangs_at_connect_is_given_up_in_time(open_tools: OpenTools) -> None:
    call = Caller(await open_tools(old_stdio("mute"), mcp_connect_timeout=1))

    with pytest.raises(ToolUnavailable, match=r"'old'.* did not answer within 1 s"):
        await call.run(spec_of("old", "old_echo"), text="x")


async def test_a_call_does_not_wait_longer_for_a_session_than_it_has_time(open_tools: OpenTools) -> None:
    call = Caller(await open_tools(old_stdio("mute"), mcp_connect_timeout=30))

    with pytest.raises(ToolUnavailable, match=r"no session with MCP server 'old'"):
        await call.run(spec_of("old", "old_echo"), timeout=0.3, text="x")


async def test_what_can_not_be_started_says_so(tmp_path: Path, open_tools: OpenTools) -> None:
    script = tmp_path / "dies.sh"
    script.write_text("#!/bin/sh\necho why >&2\nexit 5\n")
    script.chmod(0o755)
    call = Caller(
        await open_tools(
            McpServer("missing", command="no-such-program-anywhere"),
            McpServer("dies", command=str(script)),
            McpServer("nowhere", command=sys.executable, cwd=str(tmp_path / "gone")),
            McpServer("refuses", url="http://127.0.0.1:1/mcp"),
        )
    )

    for server, words in {
        "missing": "'no-such-program-anywhere' of MCP server 'missing' was not found",
        "dies": "'dies' ended before it was ready",
        "nowhere": "'nowhere' could not be started: No such file",
        "refuses": r"can't be reached: ConnectError",
        "unheard": r"no MCP server 'unheard' is registered now \(there are: dies, missing, nowhere, refuses\)",
    }.items():
        with pytest.raises(ToolUnavailable, match=words):
            await call.run(spec_of(server, "any"))


async def test_a_changed_configuration_reaches_new_calls_and_leaves_running_ones(
    notes: Notes, tmp_path: Path, open_tools: OpenTools
) -> None:
    registry = ListRegistry(stdio_toolbox(notes))
    call = Caller(await open_tools(registry=registry))
    flag = tmp_path / "flag"
    running = asyncio.create_task(call.run(spec_of("toolbox", "wait_for"), path=str(flag)))
    old_pid = (await notes.until("waiting"))["pid"]

    before = registry.servers[0]
    registry.servers = [McpServer("toolbox", command=before.command, args=before.args, env={"CHANGED": "1"})]

    async def served_by_the_new_one() -> bool:
        about = json.loads(text(await call.run(spec_of("toolbox", "about"))))
        return bool(about["pid"] != old_pid)

    await wait_until(served_by_the_new_one, "new calls go to the new process")
    flag.touch()
    assert text(await running) == "there"
    await wait_until(lambda: not is_running(old_pid), "the old process is gone")


async def test_lines_that_are_no_messages_disturb_nobody(notes: Notes, open_tools: OpenTools) -> None:
    call = Caller(await open_tools(stdio_toolbox(notes)))
    on_it = asyncio.create_task(call.run(HANG, label="a"))
    await notes.until("started", "a")

    assert text(await call.run(spec_of("toolbox", "bad_stdout"))) == "wrote"

    assert text(await call.run(ECHO, text="on")) == "on"
    assert not on_it.done()
    on_it.cancel()
    await asyncio.wait({on_it})


async def test_stderr_of_a_server_goes_to_the_log(
    notes: Notes, open_tools: OpenTools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    call = Caller(await open_tools(stdio_toolbox(notes)))
    await call.run(ECHO, text="x")

    await wait_until(lambda: "MCP server toolbox: toolbox starts" in caplog.text, "the line is in the log")


async def test_a_server_gets_the_safe_environment_and_its_own(
    tmp_path: Path, open_tools: OpenTools, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_SECRET", "s3cret")
    seen = tmp_path / "environment"
    script = tmp_path / "show.sh"
    script.write_text(f"#!/bin/sh\nenv > {seen}\npwd >> {seen}\nexit 1\n")
    script.chmod(0o755)
    call = Caller(await open_tools(McpServer("show", command="./show.sh", env={"MINE": "yes"}, cwd=str(tmp_path))))

    with pytest.raises(ToolUnavailable):
        await call.run(spec_of("show", "any"))

    lines = seen.read_text().splitlines()
    assert "MINE=yes" in lines
    assert f"PATH={os.environ['PATH']}" in lines
    assert str(tmp_path) in lines
    assert not [line for line in lines if "WORKER_SECRET" in line]


# -- servers of older protocols, and of the manners that are about -----------------------------------------------


@pytest.mark.parametrize("manner", ["plain", "silent", "strict"])
async def test_servers_of_the_oldest_protocol_work(manner: str, open_tools: OpenTools) -> None:
    tools = await open_tools(old_stdio(manner), mcp_connect_timeout=5)
    call = Caller(tools)

    result = await call.run(spec_of("old", "old_echo"), text="hello")
    assert result.content == ({"type": "text", "text": "hello", "x-vendor": None},)
    session = await (await tools.servers.link("old")).session(1)
    assert session.protocol_version == "2024-11-05"

    with pytest.raises(ToolRejected, match="no tool nonsense"):
        await call.run(spec_of("old", "nonsense"))
    with pytest.raises(ToolServerFailed, match="it broke"):
        await call.run(spec_of("old", "internal"))
    with pytest.raises(ToolServerFailed, match="invalid result: content"):
        await call.run(spec_of("old", "invalid"))


@pytest.mark.parametrize("manner", ["plain", "silent"])
async def test_a_server_that_starts_slowly_is_started_once(
    manner: str, open_tools: OpenTools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    call = Caller(await open_tools(old_stdio(manner, "slow", "noisy"), mcp_connect_timeout=7))

    assert text(await call.run(spec_of("old", "old_echo"), text="hello")) == "hello"

    await wait_until(lambda: "old is asked initialize" in caplog.text, "its stderr is in the log")
    assert caplog.text.count("old starts") == 1


async def test_a_server_of_the_newest_protocol_that_starts_slowly_is_started_once(
    notes: Notes, open_tools: OpenTools
) -> None:
    server = stdio_toolbox(notes)
    slow = McpServer(
        "toolbox", command="sh", args=("-c", 'sleep 6; exec "$@"', "-", server.command or "", *server.args)
    )
    # The question before the handshake is given up after 5 s; how long the start itself takes is the machine's matter.
    call = Caller(await open_tools(slow, mcp_connect_timeout=30))

    assert text(await call.run(ECHO, text="hello")) == "hello"

    assert len(notes.entries("process")) == 1


async def test_an_old_server_is_asked_for_the_newest_protocol_once(
    open_tools: OpenTools, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    call = Caller(await open_tools(old_stdio("noisy")))
    await call.run(spec_of("old", "old_echo"), text="one")
    with pytest.raises(ToolConnectionLost):
        await call.run(spec_of("old", "exit"))

    await call.run(spec_of("old", "old_echo"), text="two")

    await wait_until(lambda: caplog.text.count("old is asked initialize") == 2, "both are in the log")
    assert caplog.text.count("old is asked server/discover") == 1


@pytest.mark.parametrize("how", ["utf8", "surrogate", "nested"])
async def test_an_answer_that_can_not_be_read_fails_its_call(how: str, open_tools: OpenTools) -> None:
    call = Caller(await open_tools(old_stdio()))

    with pytest.raises(ToolServerFailed, match="no valid JSON-RPC message"):
        await call.run(spec_of("old", "unreadable"), how=how)

    assert text(await call.run(spec_of("old", "old_echo"), text="on")) == "on"
    assert await call.opened("old") == 1


@pytest.mark.parametrize("place", ["big-first", "big-last"])
async def test_a_line_above_the_limit_fails_the_call_that_it_answers(place: str, open_tools: OpenTools) -> None:
    call = Caller(await open_tools(old_stdio(place), max_result_bytes=20_000))

    with pytest.raises(ResultTooLarge):
        await call.run(spec_of("old", "big"), size=100_000)

    assert text(await call.run(spec_of("old", "old_echo"), text="on")) == "on"
    assert await call.opened("old") == 1


async def test_servers_that_nobody_here_wrote(open_tools: OpenTools) -> None:
    call = Caller(
        await open_tools(
            McpServer("time", command=peer("mcp-server-time"), args=("--local-timezone", "UTC")),
            McpServer("fetch", command=peer("mcp-server-fetch"), args=("--ignore-robots-txt",)),
        )
    )

    now = await call("get_current_time", timezone="Asia/Tokyo")
    assert json.loads(text(now))["timezone"] == "Asia/Tokyo"
    assert now.status == "completed"
    wrong = await call("time/get_current_time", timezone="Nowhere/Land")
    assert wrong.is_error
    assert "Nowhere/Land" in text(wrong)

    unreachable = await call("fetch", url="http://127.0.0.1:1/")
    assert unreachable.is_error
    names = {spec.name for spec in await call.tools.catalogue.tools()}
    assert names == {"convert_time", "fetch", "get_current_time"}


# -- the process of a stdio server ------------------------------------------------------------------------------


async def test_killing_the_worker_ends_the_server_and_all_that_it_started(notes: Notes) -> None:
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.tool_execution.servers.owner", str(notes.path),
        stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert owner.stdout is not None
    family = json.loads(await asyncio.wait_for(owner.stdout.readline(), 30))
    assert len(family) == 3
    assert all(is_running(pid) for pid in family)

    owner.kill()
    await owner.wait()

    await wait_until(lambda: not any(is_running(pid) for pid in family), "server, child and grandchild are gone")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_server_that_is_killed_takes_its_family_along(
    number: signal.Signals, notes: Notes, open_tools: OpenTools
) -> None:
    call = Caller(await open_tools(stdio_toolbox(notes)))
    family = json.loads(text(await call.run(spec_of("toolbox", "family"))))

    session = await (await call.tools.servers.link("toolbox")).session(1)
    os.kill(family[0], number)

    await wait_until(lambda: not any(is_running(pid) for pid in family), "all are gone")
    await wait_until(lambda: not session.usable, "their end has been noticed")
    assert text(await call.run(ECHO, text="on")) == "on"


async def test_a_server_does_not_outlive_its_launcher(notes: Notes, open_tools: OpenTools) -> None:
    call = Caller(await open_tools(stdio_toolbox(notes)))
    before = json.loads(text(await call.run(spec_of("toolbox", "about"))))["pid"]
    [launcher] = [pid for pid in own_children() if before in children_of(pid)]

    session = await (await call.tools.servers.link("toolbox")).session(1)
    os.kill(launcher, signal.SIGKILL)

    await wait_until(lambda: not is_running(before), "the server is gone")
    await wait_until(lambda: not session.usable, "its end has been noticed")
    assert text(await until_it_works(call)) == "back"


async def test_closing_ends_servers_even_frozen_ones(notes: Notes, open_tools: OpenTools) -> None:
    tools = await open_tools(stdio_toolbox(notes))
    call = Caller(tools)
    family = json.loads(text(await call.run(spec_of("toolbox", "family"))))
    frozen = asyncio.create_task(call.run(spec_of("toolbox", "freeze")))
    await notes.until("frozen")

    await tools.runner.close()

    assert not any(is_running(pid) for pid in family)
    with pytest.raises(ToolConnectionLost):
        await frozen
    with pytest.raises(ToolUnavailable):
        await (await tools.servers.link("toolbox")).session(0.001)
    await tools.runner.close()
