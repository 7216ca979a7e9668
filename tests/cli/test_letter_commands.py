"""`toolfleet dlq`: list, show, redrive, discard; and who decides an unknown call."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Iterator

import pytest

from tests.cli.conftest import Fleet
from tests.cli.running import Ended, clean_env, in_process, toolfleet
from toolfleet.bootstrap import open_core
from toolfleet.cli.exits import FAILED, OK, UNKNOWN, UNREACHABLE, USAGE
from toolfleet.services.background_jobs.queue_ports import DeadLetter
from toolfleet.services.background_jobs.task_models import TaskDefinition, ToolCall
from toolfleet.settings import Settings

ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture(autouse=True)
def nothing_is_left(fleet: Fleet) -> Iterator[None]:
    """Other tests of the stack find no dead letters."""
    yield
    fleet.call("dlq", "discard", "--all", "--yes")


def bury(fleet: Fleet, *letters: DeadLetter) -> None:
    """Put dead letters into the stack's stream."""

    async def store() -> None:
        settings = Settings(nats_url=fleet.servers["NATS_URL"], redis_url=fleet.servers["REDIS_URL"])
        async with open_core(settings, name="test", prepare=False) as core:
            for letter in letters:
                await core.letters.store(letter)

    asyncio.run(store())


def dead(fleet: Fleet) -> str:
    """A job that failed, and that has a dead letter."""
    job = fleet.submit("refuse", "reason=no", "--retries", "0")
    assert fleet.call("watch", job).code == FAILED
    task = TaskDefinition(
        job_id=job, tools=(ToolCall(tool_call_id="call_1", tool_name="refuse", tool_args={"reason": "no"}),)
    )
    bury(fleet, DeadLetter(job, 1, "too_many_starts", "its workers died", task.to_json()))
    return job


def test_a_dead_job_is_shown_and_redriven(fleet: Fleet) -> None:
    job = dead(fleet)
    row = fleet.call("dlq", "list", "--tool", "refuse").out.split("\t")
    assert (row[0], row[2:5]) == (job, ["1", "too_many_starts", "refuse"])
    shown = fleet.call("dlq", "show", job)
    assert "too_many_starts" in shown.out
    assert "call     call_1 refuse: failed" in shown.out
    assert f"toolfleet dlq redrive | discard {job}" in shown.err
    assert fleet.call("dlq", "show", job, "--json").json["job"]["status"] == "failed"

    done = fleet.call("dlq", "redrive", job, "--note", "once more")
    assert (done.code, done.out) == (OK, f"{job} redriven\n")
    assert fleet.call("watch", job).code == FAILED
    opened = [line for line in fleet.call("watch", job, "--json").lines if line["data"].get("reason") == "redrive"]
    assert [(line["data"]["by"], line["data"]["note"]) for line in opened] == [(ME, "once more")]
    late = fleet.call("dlq", "redrive", job)
    assert late.code == FAILED
    assert "has no dead letter" in late.err


def test_a_malformed_message_is_shown_and_discarded(fleet: Fleet) -> None:
    bury(fleet, DeadLetter(None, 0, "malformed", "not a task", b"\xff\x00", subject="toolfleet.tasks.normal.x"))
    letter = fleet.call("dlq", "list", "--reason", "malformed").out.split("\t")[0]
    shown = fleet.call("dlq", "show", letter).out
    assert "subject  toolfleet.tasks.normal.x" in shown
    assert "base64   /wA=" in shown
    refused = fleet.call("dlq", "redrive", letter)
    assert (refused.code, "is no job" in refused.err) == (FAILED, True)
    assert fleet.call("dlq", "discard", letter).out == f"{letter} discarded\n"
    assert fleet.call("dlq", "show", letter).code == FAILED


def test_a_stranger_s_message_does_not_reach_the_terminal_as_control_characters(fleet: Fleet) -> None:
    bury(fleet, DeadLetter(None, 0, "malformed", "not a task: \x1b[31m", b"\x1b[2Jred\x07\tend", subject="\x1b]0;x"))
    listed = fleet.call("dlq", "list", "--reason", "malformed").out
    letter = listed.split("\t")[0]
    shown = fleet.call("dlq", "show", letter).out
    assert "utf-8    \\x1b[2Jred\\x07\tend" in shown
    assert "\x1b" not in listed + shown
    assert fleet.call("dlq", "show", letter, "--json").json["raw"]["data"] == "\x1b[2Jred\x07\tend"


def test_what_was_done_before_the_api_went_is_told() -> None:
    async def one_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"id": "letter_1", "discarded": 1}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        await writer.drain()
        server.close()
        writer.close()

    async def discarded() -> Ended:
        nonlocal server
        server = await asyncio.start_server(one_answer, "127.0.0.1", 0)
        api = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return await asyncio.to_thread(toolfleet, "dlq", "discard", "letter_1", "letter_2", "--api", api)

    server: asyncio.Server
    ended = asyncio.run(discarded())
    assert (ended.code, ended.out) == (UNREACHABLE, "letter_1 discarded\n")
    assert "can't be reached" in ended.err
    assert "1 of 2 were discarded" in ended.err


def test_many_are_asked_for_first(fleet: Fleet) -> None:
    jobs = [dead(fleet), dead(fleet)]
    plan = fleet.call("dlq", "redrive", "--tool", "refuse", "--dry-run")
    assert (plan.out.split(), plan.code) == (jobs, OK)
    # No terminal that could be asked, and nobody has said yes.
    unsure = fleet.call("dlq", "redrive", "--tool", "refuse")
    assert unsure.code == USAGE
    assert "2 dead letters would be redriven" in unsure.err
    done = fleet.call("dlq", "redrive", "--tool", "refuse", "--newer-than", "1h", "--yes", "--json").json
    assert (done["matched"], done["done"], sorted(done["ids"])) == (2, 2, sorted(jobs))
    assert "nothing fits" in fleet.call("dlq", "discard", "--tool", "refuse").err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dlq", "redrive"], "say which letters"),
        (["dlq", "discard", "letter_1", "--all"], "say which letters"),
        (["dlq", "discard", "letter_1", "--dry-run"], "--dry-run goes with a filter"),
        (["dlq", "show", "nonsense"], "is not the id of a dead letter"),
        (["dlq", "list", "--older-than", "soon"], "is no time"),
        (["dlq", "redrive", "--older-than", "2030-01-01T00:00:00"], "is no time"),
    ],
)
def test_a_command_line_that_is_wrong(arguments: list[str], says: str) -> None:
    ended = in_process(*arguments, "--api", "http://127.0.0.1:1", env=clean_env())
    assert (ended.code, ended.out) == (USAGE, "")
    assert says in ended.err


def test_the_result_of_an_unknown_job_says_what_to_do(fleet: Fleet) -> None:
    job = fleet.call("submit", "crash", "--watch", "--json").lines[-1]["data"]["job_id"]
    result = fleet.call("result", job)
    assert result.code == UNKNOWN
    assert f"toolfleet resolve {job} call_1 rerun" in result.err
    fleet.call("resolve", job, "call_1", "failed", "--note", "it is gone")
    assert fleet.call("result", job).code == OK
    opened = next(line for line in fleet.call("watch", job, "--json").lines if line["data"].get("reason") == "resolved")
    (decision,) = opened["data"]["decisions"]
    assert (decision["by"], decision["note"], decision["decision"]) == (ME, "it is gone", "failed")


def test_a_misspelt_policy_is_told_by_doctor_and_the_policy_by_tools(fleet: Fleet) -> None:
    policy = '{"toolbox/ehco": "once"}'
    ended = fleet.run("doctor", "--json", **fleet.servers, TOOLFLEET_TOOL_POLICY=policy)
    told = next(check for check in ended.json["checks"] if check["part"] == "tool policy")
    assert told["state"] == "unsure"
    assert "near: toolbox/echo" in told["found"]
    rows = {line.split("\t")[0]: line.split("\t")[3] for line in fleet.call("tools").out.splitlines()}
    assert (rows["echo"], rows["once"]) == ("again (annotation)", "once (default)")
