"""The commands about the fleet, and the program as a whole."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.cli.conftest import Fleet
from tests.cli.running import PROGRAM, clean_env, toolfleet
from toolfleet.cli.exits import INTERRUPTED, USAGE


def test_stats_for_people_and_for_programs(fleet: Fleet) -> None:
    text = fleet.run("stats").out
    assert [line.split()[0] for line in text.splitlines()[:4]] == ["tier", "high", "normal", "low"]
    assert "4 with 80 slots" in text
    figures = fleet.run("stats", "--json").json
    assert figures["workers"]["by_tier"] == {"high": 1, "normal": 2, "low": 1}


def test_stats_again_and_again_until_ctrl_c(fleet: Fleet) -> None:
    with subprocess.Popen(
        [PROGRAM, "stats", "--watch", "--json"],
        env=fleet.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert watching.stdout.readline().startswith('{"tiers"')
        assert watching.stdout.readline().startswith('{"tiers"')
        watching.send_signal(signal.SIGINT)
        assert watching.stderr.read() == ""
        assert watching.wait() == INTERRUPTED


def test_jobs_page_by_page(fleet: Fleet) -> None:
    # They stay queued for as long as the stack lives.
    older, newer = (fleet.submit("echo", f"text=number {n}", "--priority", "high", "--delay", "3600") for n in (1, 2))
    listed = ["jobs", "--status", "queued", "--tier", "high", "--limit", "1"]
    first = fleet.call(*listed, "--json").json
    second = fleet.call(*listed, "--json", "--cursor", first["cursor"]).json
    assert [job["job_id"] for job in first["jobs"] + second["jobs"]] == [newer, older]
    assert second["cursor"] is None
    page = fleet.call(*listed)
    assert page.out.split("\t")[:3] == [newer, "queued", "high"]
    assert f"--cursor {first['cursor']}" in page.err


def test_tools_of_both_servers(fleet: Fleet) -> None:
    rows = [line.split("\t") for line in fleet.run("tools").out.splitlines()]
    crawl = next(row for row in rows if row[0] == "web_crawl")
    assert crawl[1:3] == ["web-tools", "url [max_pages] [max_depth] [same_host]"]
    # The operator's own server, from the file that TOOLFLEET_MCP_CONFIG named when the stack was started.
    assert ["add", "toolbox", "a b", "again (annotation)", "Adds; structured."] in rows
    assert {tool["name"] for tool in fleet.run("tools", "--json").json["tools"]} >= {"web_crawl", "add"}


def test_there_are_no_dead_letters(fleet: Fleet) -> None:
    ended = fleet.run("dlq", "list")
    assert (ended.out, ended.err) == ("", "there are no dead letters\n")
    assert fleet.run("dlq", "list", "--json").json["dead_letters"] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "No such command 'nope'"),
        (["submit"], "Missing argument"),
        (["jobs", "--limit", "0"], "--limit"),
        (["jobs", "--status", "lost"], "--status"),
        (["jobs", "--api", "localhost"], "is not the URL of an API"),
    ],
)
def test_a_command_line_that_is_wrong(arguments: list[str], says: str) -> None:
    ended = toolfleet(*arguments)
    assert ended.code == USAGE
    assert says in ended.err
    assert ended.out == ""


def test_a_setting_that_does_not_parse_is_named_without_its_value() -> None:
    ended = toolfleet("worker", env=clean_env(TOOLFLEET_LEASE="hunter2"))
    assert ended.code == USAGE
    assert "lease" in ended.err
    assert "hunter2" not in ended.err
    assert ended.err.count("\n") == 1


def test_help_names_every_command_and_the_exit_codes() -> None:
    text = toolfleet("--help").out
    wanted = "up demo api worker submit watch result cancel retry resolve stats jobs tools dlq doctor"
    assert all(f"  {command} " in text for command in wanted.split())
    assert "69 API unreachable" in " ".join(text.split())
