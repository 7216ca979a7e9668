"""The commands about dead letters: dlq list, show, redrive, discard."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import typer

from toolfleet.cli.client import ApiRefused, JobsClient, ask
from toolfleet.cli.exits import FAILED, OK, TRY_AGAIN, USAGE, CliError
from toolfleet.cli.output import ago, plain, print_json, say, table

Answer = dict[str, Any]
Act = Literal["redrive", "discard"]

_PATH: Final = "dead-letters"
_PAST: Final[Mapping[Act, str]] = {"redrive": "redriven", "discard": "discarded"}
EVENTS_SHOWN: Final = 20
"""Of the log, by `show`; `--json` has all of it."""


def listed(api: str, wanted: Mapping[str, Any], *, limit: int, cursor: str | None, as_json: bool) -> int:
    """What needs a person, oldest first."""
    answer = ask(api, lambda client: client.get(_PATH, **wanted, limit=limit, cursor=cursor))
    if as_json:
        print_json(answer)
        return OK
    table(
        ("id", "age>", "attempt>", "reason", "tools", "message"),
        (
            (entry["id"], ago(entry["at"]), entry["attempt"], entry["reason"], " ".join(entry["tools"]),
             entry["message"])
            for entry in answer["dead_letters"]
        ),
    )  # fmt: skip
    if not answer["dead_letters"] and answer["cursor"] is None:
        say("there are no dead letters" + (" that fit the filter" if any(wanted.values()) else ""))
    if answer["cursor"] is not None:
        say(f"there are more; go on with: --cursor {answer['cursor']}")
    return OK


def show(api: str, letter_id: str, *, as_json: bool) -> int:
    """One with its history."""
    answer = ask(api, lambda client: client.get(f"{_PATH}/{letter_id}"))
    if as_json:
        print_json(answer)
        return OK
    newest = answer["letters"][-1]
    print(f"{answer['id']}  {newest['reason']}, {ago(newest['at'])} ago: {plain(newest['message'])}")
    job = answer["job"]
    if job is not None:
        print(f"the job is {job['status']}, generation {job['generation']}, attempt {job['attempt']}")
    elif not newest["malformed"]:
        print("the job's record has expired; a redrive makes it again from this letter")
    _show_raw(answer["raw"])
    for call in (answer["task"] or {}).get("calls", ()):
        result = call["result"]
        print(f"call     {call['tool_call_id']} {call['tool_name']}: {result['status'] if result else 'no result'}")
    for run in answer["attempts"]:
        print(f"attempt  {run['attempt']} on {run['worker'] or '?'}, {ago(run['started_at'])} ago: {run['outcome']}")
    for error in answer["errors"]:
        text = error["error"].get("message") or error["error"].get("code")
        call = f" {error['tool_call_id']}" if error["tool_call_id"] else ""
        print(f"error    attempt {error['attempt']}{call}: {plain(str(text))}")
    for event in answer["events"][-EVENTS_SHOWN:]:
        print(f"event    {event['id']} {event['data']['at']} {event['event']}")
    verbs = "discard" if newest["malformed"] else "redrive | discard"
    say(f"decide it: toolfleet dlq {verbs} {answer['id']}")
    return OK


def _show_raw(raw: Mapping[str, Any] | None) -> None:
    if raw is None:
        return
    print(f"subject  {plain(raw['subject'] or '?')}")
    print(f"bytes    {raw['bytes']}, sha256 {raw['sha256']}")
    more = f" (the first {raw['shown_bytes']} bytes)" if raw["shown_bytes"] < raw["bytes"] else ""
    print(f"{raw['encoding']:<8} {plain(raw['data'])}{more}")


def act_on(api: str, act: Act, ids: Sequence[str], *, note: str | None, as_json: bool) -> int:
    """Redrive or discard the letters of these ids, one by one; 1 where one was refused.

    Where the API is gone or overloaded the rest is not asked for; what was done before is told all the same.
    """
    body = {"note": note} if note else {}
    done: list[Answer] = []
    failed: list[Answer] = []
    ended: CliError | None = None

    async def run(client: JobsClient) -> None:
        for letter_id in ids:
            try:
                done.append(await client.post(f"{_PATH}/{letter_id}/{act}", body))
            except ApiRefused as error:
                if error.code == TRY_AGAIN:
                    raise
                failed.append({"id": letter_id, "why": str(error)})

    try:
        ask(api, run)
    except CliError as error:
        ended = CliError(f"{error} ({len(done)} of {len(ids)} were {_PAST[act]})", error.code)
    if as_json:
        print_json({_PAST[act]: done, "failed": failed})
    else:
        for answer in done:
            print(f"{answer['id']} {_PAST[act]}")
            if act == "redrive":
                say(f"follow it with: toolfleet watch {answer['id']}")
    _say_failed(failed)
    if ended is not None:
        raise ended
    return FAILED if failed else OK


def act_on_many(
    api: str, act: Act, wanted: Mapping[str, Any], *, dry_run: bool, yes: bool, note: str | None, as_json: bool
) -> int:
    """Redrive or discard what a filter says; asks before, unless `yes`. 1 where one of them was refused."""
    path = f"{_PATH}/{act}"
    body = {name: value for name, value in {**wanted, "note": note}.items() if value is not None}
    if dry_run or not yes:
        plan = ask(api, lambda client: client.post(path, {**body, "dry_run": True}))
        if dry_run:
            return _told_many(plan, act, as_json=as_json)
        if not plan["matched"]:
            say("nothing fits the filter")
            return OK
        if not _confirmed(act, plan):
            return FAILED
    return _told_many(ask(api, lambda client: client.post(path, body)), act, as_json=as_json)


def _confirmed(act: Act, plan: Answer) -> bool:
    what = f"{plan['matched']} dead letter{'s' if plan['matched'] > 1 else ''}"
    if not sys.stdin.isatty():
        raise CliError(f"{what} would be {_PAST[act]}; say that you mean it with --yes", USAGE)
    return typer.confirm(f"{act} {what}?", err=True)


def _told_many(answer: Answer, act: Act, *, as_json: bool) -> int:
    if as_json:
        print_json(answer)
    else:
        for letter_id in answer["ids"]:
            print(letter_id)
        if answer["dry_run"]:
            say(f"{answer['matched']} would be {_PAST[act]}")
        else:
            say(f"{answer['done']} of {answer['matched']} {_PAST[act]}")
        if answer["cursor"] is not None:
            say("not all letters were looked at; ask again, or with a larger --limit")
    _say_failed(answer["failed"])
    return FAILED if answer["failed"] else OK


def _say_failed(failed: Sequence[Answer]) -> None:
    for one in failed:
        say(f"{one['id']}: {one['why']}")
