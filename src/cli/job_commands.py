"""The commands for one job: submit, watch, result, cancel, retry, resolve."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

from toolfleet.cli.client import JobsClient, ask
from toolfleet.cli.exits import INTERRUPTED, OK, TRY_AGAIN, UNKNOWN, exit_code_of
from toolfleet.cli.output import out, plain, print_json, say
from toolfleet.cli.values import json_value, tool_arguments
from toolfleet.cli.watching import follow, follower_for

Answer = dict[str, Any]

CALL_STOPS: Final = {
    "ended": "had ended before",
    "not_sent": "never reached its tool",
    "stopped": "has stopped",
    "told": "its tool was told and has not confirmed that it stopped; it may still be running",
    "not_told": "its tool could not be told so far; it may still be running",
}
"""How far a cancel got with one call, for people."""


def submit(
    api: str,
    call: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    key: str | None,
    watch_it: bool,
    as_json: bool,
) -> int:
    """Queue a job of one call; its id goes to stdout alone, so that `JOB=$(toolfleet submit …)` works.

    Args:
        api: URL of the API.
        call: ``tool_name``, and ``words`` and ``args`` as `tool_arguments` takes them.
        options: further fields of the job; None means not given.
        key: the Idempotency-Key.
        watch_it: follow the job to its end.
        as_json: print JSON.
    """
    arguments = tool_arguments(call["words"], call["args"], sys.stdin)
    body: dict[str, Any] = {"tools": [{"tool_name": call["tool_name"], "tool_args": arguments}]}
    body |= {name: value for name, value in options.items() if value is not None}
    job = ask(api, lambda client: client.submit(body, key=key))
    job_id = str(job["job_id"])
    if watch_it:
        if not as_json:
            say(f"{job_id} {job['status']}")
        return watch(api, job_id, after=0, as_json=as_json, show_result=True)
    if as_json:
        print_json(job)
    else:
        print(job_id)
        say(f"{job['status']}; follow it with: toolfleet watch {job_id}")
    return OK


def watch(api: str, job_id: str, *, after: int, as_json: bool, show_result: bool = False) -> int:
    """Follow a job to its end; the exit code is the job's. Ctrl-C leaves the job running."""

    async def run(client: JobsClient) -> Answer:
        job = await follow(client, job_id, follower_for(out(), as_json=as_json), after)
        if show_result and not as_json:
            _, result = await client.result(job_id)
            _print_results(result, told=True)
        return job

    try:
        job = ask(api, run)
    except KeyboardInterrupt:
        say(f"{job_id} goes on; follow it with: toolfleet watch {job_id}; stop it with: toolfleet cancel {job_id}")
        return INTERRUPTED
    status = str(job["status"])
    if not as_json:
        say(f"{job_id} {status}{_because(job)}")
    if status == "unknown":
        _say_undecided(job)
    return exit_code_of(status)


def result(api: str, job_id: str, *, as_json: bool) -> int:
    """Print each call's result; 75 while the job runs, 4 where a person has to decide a call first."""
    ended, answer = ask(api, lambda client: client.result(job_id))
    if as_json:
        print_json(answer)
    if not ended:
        say(f"{job_id} is {answer['status']}, there is no result yet; follow it with: toolfleet watch {job_id}")
        return TRY_AGAIN
    if not as_json:
        _print_results(answer)
        say(f"{job_id} {answer['status']}{_because(answer)}")
    if answer["status"] != "unknown":
        return OK
    undecided = [entry["tool_call_id"] for entry in answer["results"] if entry["status"] == "unknown"]
    _say_undecided({"job_id": job_id, "undecided_calls": undecided})
    return UNKNOWN


def cancel(api: str, job_id: str, *, as_json: bool) -> int:
    """Stop a job, and say how far that got."""
    answer = ask(api, lambda client: client.cancel(job_id))
    if as_json:
        print_json(answer)
        return OK
    outcome, reached = answer.get("outcome"), answer.get("reached")
    text = {
        "cancelled": f"{job_id} is cancelled",
        "already_cancelled": f"{job_id} was cancelled already",
    }.get(str(outcome), f"{job_id} is being cancelled; follow it with: toolfleet watch {job_id}")
    told = {
        "queued": "it was not running",
        "worker": "its worker has stopped it",
        "tool": "the tool's server was told",
        "requested": "its worker has not answered yet",
    }.get(str(reached))
    print(text + (f"; {told}" if told and outcome != "already_cancelled" else ""))
    calls = answer.get("calls") or ()
    if reached != "queued":
        for call in calls:
            state = str(call["state"])
            print(f"{call['tool_call_id']} {call['tool_name']}: {CALL_STOPS.get(state, state)}")
    if not calls and (still := answer.get("still_running")):
        say(f"these calls have not confirmed that they stopped: {', '.join(map(str, still))}")
    return OK


def retry(api: str, job_id: str, *, note: str | None, as_json: bool) -> int:
    """Run a failed or cancelled job again, without the calls that succeeded."""
    return _reopened(ask(api, lambda client: client.retry(job_id, note)), as_json=as_json)


def resolve(
    api: str, job_id: str, tool_call_id: str, decision: str, *, result_text: str | None, note: str, as_json: bool
) -> int:
    """Decide one call of an unknown job."""
    body: dict[str, Any] = {"tool_call_id": tool_call_id, "decision": decision, "note": note}
    if result_text is not None:
        body["result"] = json_value(result_text, "--result", sys.stdin)
    return _reopened(ask(api, lambda client: client.resolve(job_id, body)), as_json=as_json)


def _reopened(job: Answer, *, as_json: bool) -> int:
    if as_json:
        print_json(job)
        return OK
    print(f"{job['job_id']} {job['status']}")
    _say_undecided(job)
    if job["status"] in ("queued", "running"):
        say(f"follow it with: toolfleet watch {job['job_id']}")
    return OK


def _because(document: Answer) -> str:
    error = document.get("error")
    return f": {error['message']}" if isinstance(error, Mapping) and error.get("message") else ""


def _say_undecided(job: Answer) -> None:
    for call in job.get("undecided_calls") or ():
        say(f"decide it: toolfleet resolve {job['job_id']} {call} rerun | completed --result JSON | failed --note TEXT")


def _print_results(answer: Answer, *, told: bool = False) -> None:
    """What each call gave, as its tool wrote it for people; structured content where there is no text.

    Args:
        answer: the job's result.
        told: why calls failed was shown already, by their events.
    """
    results = answer.get("results") or []
    for entry in results:
        if len(results) > 1:
            print(f"== {entry['tool_call_id']} {entry['tool_name']}: {entry['status']}")
        elif entry["status"] != "completed":
            print(f"{entry['tool_call_id']} {entry['tool_name']}: {entry['status']}")
        reason = ""
        if isinstance(error := entry.get("error"), Mapping):
            reason = str(error.get("message"))
            if not told:
                print(f"{error.get('code')}: {plain(reason)}")
        for block in entry.get("content") or ():
            if reason and block.get("text") == reason:
                continue
            print(block["text"] if block.get("type") == "text" else _summary(block))
        if not entry.get("content") and entry.get("structured_content") is not None:
            print_json(entry["structured_content"])


def _summary(block: Mapping[str, Any]) -> str:
    size = len(str(block.get("data", "")))
    return f"[{block.get('type')} {block.get('mimeType', '')} {size} characters; see it with --json]"
