"""The commands for one job, through the installed program against a real stack."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import Fleet
from tests.cli.running import PROGRAM, clean_env, in_process
from toolfleet.cli.exits import CANCELLED, FAILED, INTERRUPTED, TRY_AGAIN, UNKNOWN, UNREACHABLE, USAGE
from toolfleet.services.background_jobs.task_models import is_job_id

LATER = ("--delay", "3600")
"""A job that waits for as long as a test needs."""


def test_a_crawl_is_followed_to_its_end_with_its_result(fleet: Fleet) -> None:
    ended = fleet.run("submit", "web_crawl", f"url={fleet.site}/harbours/", "max_pages=3", "--watch")
    assert ended.code == 0
    assert "tool.progress   call_1 web_crawl 3/3 read" in ended.out
    assert "job.completed" in ended.out
    assert "# Crawl of" in ended.out
    assert ended.err.rstrip().endswith("completed")


def test_the_id_alone_goes_to_stdout_and_the_job_can_be_watched_from_where_one_left_off(fleet: Fleet) -> None:
    job = fleet.submit("steps", "count=3")
    assert job.startswith("job_")
    assert job == job.split()[0]
    whole = fleet.run("watch", job, "--json")
    ids = [event["id"] for event in whole.lines]
    assert ids == list(range(1, ids[-1] + 1))
    assert whole.lines[-1]["event"] == "job.completed"
    resumed = fleet.run("watch", job, "--after", "2", "--json")
    assert resumed.lines == whole.lines[2:]
    assert resumed.code == whole.code == 0


def test_arguments_arrive_with_their_types(fleet: Fleet) -> None:
    job = fleet.submit("keep", 'value={"n": 5, "yes": true, "text": "5"}')
    assert fleet.call("watch", job).code == 0
    (call,) = fleet.call("result", job, "--json").json["results"]
    assert json.loads(call["content"][0]["text"]) == {"n": 5, "yes": True, "text": "5"}
    assert fleet.call("submit", "keep", "--args", "-", "--watch", stdin='{"value": [1]}').out.endswith("[1]\n")


def test_content_that_is_no_text_is_named(fleet: Fleet) -> None:
    ended = fleet.call("submit", "picture", "--watch")
    assert "one pixel\n[image image/png" in ended.out


def test_a_job_that_has_not_ended_has_no_result_yet_and_can_be_cancelled(fleet: Fleet) -> None:
    job = fleet.submit("add", "a=1", "b=1", *LATER)
    early = fleet.run("result", job)
    assert early.code == TRY_AGAIN
    assert "there is no result yet" in early.err
    cancelled = fleet.run("cancel", job)
    assert cancelled.code == 0
    assert "it was not running" in cancelled.out
    assert "was cancelled already" in fleet.run("cancel", job).out
    watched = fleet.run("watch", job)
    assert watched.code == CANCELLED
    assert watched.err == f"{job} cancelled\n"


def test_a_running_call_is_stopped_and_the_job_run_again(fleet: Fleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job = fleet.submit("wait_for", f"path={gate}")
    with subprocess.Popen(
        [PROGRAM, "watch", job, "--json"], env=fleet.env, stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        assert any("tool.started" in line for line in watching.stdout)
        answer = fleet.call("cancel", job, "--json").json
        assert answer["outcome"] in ("cancelled", "cancelling")
        assert "job.cancelled" in watching.stdout.read()
        assert watching.wait() == CANCELLED
    gate.touch()
    # It must not run twice and had been sent: whether it happened is a person's to say, and a worker may be
    # there already when the answer is made.
    assert fleet.call("retry", job).out in {f"{job} {status}\n" for status in ("queued", "running", "unknown")}
    assert fleet.call("watch", job).code == UNKNOWN
    resolved = fleet.call("resolve", job, "call_1", "rerun").out
    assert resolved in {f"{job} {status}\n" for status in ("queued", "running", "completed")}
    assert fleet.call("watch", job).code == 0


def test_ctrl_c_leaves_the_job_running_and_says_how_to_go_on(fleet: Fleet, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with subprocess.Popen(
        [PROGRAM, "submit", "wait_for", f"path={gate}", "--watch"],
        env=fleet.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # As in a terminal, where nobody has SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert any("tool.started" in line for line in watching.stdout)
        watching.send_signal(signal.SIGINT)
        err = watching.stderr.read()
        assert watching.wait() == INTERRUPTED
    job = err.split()[0]
    assert f"follow it with: toolfleet watch {job}; stop it with: toolfleet cancel {job}" in err
    assert "Traceback" not in err
    gate.touch()
    assert fleet.call("watch", job).code == 0


def test_a_failed_job_says_why(fleet: Fleet) -> None:
    ended = fleet.call("submit", "refuse", "reason=not today", "--watch")
    assert ended.code == FAILED
    assert "not today" in ended.err
    assert "failed" in ended.err
    assert ended.out.count("not today") == 1, ended.out
    job = ended.err.split()[0]
    assert fleet.call("result", job).out.count("not today") == 1


@pytest.mark.parametrize("command", ["watch", "result", "cancel", "retry"])
@pytest.mark.parametrize("job", ["zzz", "job_x", "job_01JZ0G9V6M4Q2R8T3W5X7Y9ZA", "../stats"])
def test_what_can_be_no_job_is_a_usage_error_without_asking(command: str, job: str) -> None:
    # Nothing listens there: a request would end with another code.
    ended = in_process(command, job, "--api", "http://127.0.0.1:1", env=clean_env())
    assert ended.code == USAGE
    assert f"'{job}' is not the id of a job" in ended.err
    assert not is_job_id(job)


def test_a_call_whose_outcome_is_not_known_is_decided_once(fleet: Fleet) -> None:
    ended = fleet.call("submit", "crash", "--watch", "--json")
    assert ended.code == UNKNOWN
    assert ended.lines[-1]["event"] == "job.unknown"
    job = ended.lines[-1]["data"]["job_id"]
    assert f"toolfleet resolve {job} call_1 rerun" in ended.err
    wrong = fleet.call("resolve", job, "call_1", "rerun", "--result", "1")
    assert wrong.code == USAGE
    decided = fleet.call("resolve", job, "call_1", "completed", "--result", '{"seen": true}', "--note", "it was there")
    assert decided.out == f"{job} completed\n"
    assert json.loads(fleet.call("result", job).out) == {"seen": True}
    late = fleet.call("resolve", job, "call_1", "failed")
    assert late.code == FAILED
    assert job in late.err


def test_the_same_key_gives_the_same_job(fleet: Fleet) -> None:
    words = ("add", "a=1", "b=2", "--key", "one-key")
    first = fleet.submit(*words)
    assert fleet.submit(*words) == first
    other = fleet.call("submit", "add", "a=9", "b=2", "--key", "one-key")
    assert other.code == USAGE
    assert "Idempotency-Key" in other.err


def test_options_reach_the_job(fleet: Fleet) -> None:
    job = fleet.submit("add", "a=1", "b=2", "--priority", "low", "--retries", "7", *LATER)
    (found,) = [each for each in fleet.call("jobs", "--tier", "low", "--json").json["jobs"] if each["job_id"] == job]
    assert found["max_retries"] == 7
    assert found["status"] == "queued"
    fleet.call("cancel", job)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("web_crwl", "url=http://example.org"), "web_crawl"),
        (("web_crawl", "url=http://example.org", "max_pages=many"), "$.max_pages"),
        (("web_crawl", "url=http://example.org", "max_pags=2"), "max_pags"),
        (("web_crawl", "url"), "write key=value"),
    ],
)
def test_what_can_not_be_queued_is_one_line_with_what_would_be_right(
    fleet: Fleet, words: tuple[str, ...], says: str
) -> None:
    ended = fleet.call("submit", *words)
    assert ended.code == USAGE
    assert ended.out == ""
    assert says in ended.err
    assert ended.err.count("\n") == 1


def test_a_refusal_as_json_is_the_apis_own_document(fleet: Fleet) -> None:
    ended = fleet.run("submit", "web_crwl", "--json")
    assert ended.json["status"] == 422
    assert ended.json["nearest"] == ["web_crawl"]


@pytest.mark.parametrize("command", ["watch", "cancel"])
def test_a_job_that_is_not_there(fleet: Fleet, command: str) -> None:
    ended = fleet.call(command, "job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB")
    assert ended.code == FAILED
    assert "there is no job job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB" in ended.err
    assert ended.err.count("\n") == 1


def test_an_api_that_is_not_there_or_is_none(fleet: Fleet) -> None:
    nowhere = fleet.run("submit", "echo", "text=hi", "--api", "http://127.0.0.1:1")
    assert nowhere.code == UNREACHABLE
    assert "http://127.0.0.1:1 can't be reached" in nowhere.err
    site = fleet.run("jobs", "--api", fleet.site)
    assert site.code == UNREACHABLE
    assert "not the jobs API" in site.err


def test_a_reader_that_leaves_ends_the_command_in_silence(fleet: Fleet) -> None:
    job = fleet.submit("steps", "count=3")
    assert fleet.call("watch", job).code == 0
    line = f"'{PROGRAM}' watch {job} --json | head -n 1"
    ended = subprocess.run(
        ["/bin/sh", "-c", line], env=fleet.env, capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(ended.stdout)["id"] == 1
    assert ended.stderr == ""
