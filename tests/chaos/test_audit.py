"""Every check of the audit finds what it is there for, in ledgers made by hand, and nothing in one that is in order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.audit import MUST_BE_ZERO, PROMISES, audit, lines
from tests.chaos.evidence import Evidence, Job, Letter, LogEntry

JOB = "job_A"


def event(number: int, kind: str, attempt: int = 1, generation: int = 1, **data: Any) -> LogEntry:
    return LogEntry(number, kind, generation, attempt, data)


def effect(attempt: int = 1, call: str = "c0", what: str = "begin") -> dict[str, Any]:
    return {"job": JOB, "call": call, "attempt": attempt, "what": what}


def view(kind: str, **fields: Any) -> dict[str, Any]:
    return {"k": kind, "t": 1.0, "job": JOB, **fields}


def accepted(**fields: Any) -> dict[str, Any]:
    return view("accepted", n=0, code=202, key="key", status="queued", generation=1, **fields)


def seen(number: int, kind: str, attempt: int = 1, client: int = 1) -> dict[str, Any]:
    return view("event", client=client, id=number, type=kind, attempt=attempt)


LOG = (
    event(1, "job.queued", 0),
    event(2, "job.started"),
    event(3, "tool.started", tool_call_id="c0"),
    event(4, "tool.completed", tool_call_id="c0"),
    event(5, "job.completed"),
)
KEPT = Evidence(
    {JOB: Job(JOB, "completed", 1, LOG, {"c0": 1}, once=frozenset({"c0"}))},
    views=(
        accepted(),
        view("connect", client=1, after=0),
        *(seen(e.id, e.type, e.attempt) for e in LOG),
        view("poll", generation=1, status="completed"),
        view("result", generation=1, status="completed", calls={"c0": ["completed", 1]}),
    ),
    effects=(effect(), effect(what="end")),
)


def with_log(*events: LogEntry, **fields: Any) -> Evidence:
    """Of the job with another log; its stream client is left out, who saw the other one."""
    job = replace(KEPT.jobs[JOB], log=events, **fields)
    views = [v for v in KEPT.views if v["k"] not in ("event", "connect", "result", "poll")]
    return replace(KEPT, jobs={JOB: job}, views=views)


def also(*views: dict[str, Any]) -> Evidence:
    return replace(KEPT, views=(*KEPT.views, *views))


RETRIED = (
    *LOG[:3],
    event(4, "job.retrying"),
    event(5, "job.started", 2),
    event(6, "tool.completed", 2, tool_call_id="c0"),
    event(7, "job.completed", 2),
)
UNKNOWN = (*LOG[:3], event(4, "job.unknown"), event(5, "job.queued", 1, 2), event(6, "job.started", 2, 2),
           event(7, "tool.completed", 2, 2, tool_call_id="c0"), event(8, "job.completed", 2, 2))  # fmt: skip
DEAD = (*LOG[:2], event(3, "job.failed", error={"code": "too_many_starts"}))
LETTER = Letter(1, JOB, 1, "too_many_starts", "{}")
POISON = (
    *(event(n, "job.queued", 0) for n in (1,)),
    *(event(1 + n, "job.started", n) for n in (1, 2, 3, 4, 5)),
    event(7, "job.failed", 5, error={"code": "too_many_starts"}),
)

BROKEN: dict[str, tuple[str, Evidence]] = {
    "accepted and no record": ("lost", replace(KEPT, jobs={}, views=[accepted()], effects=())),
    "accepted and still running": ("lost", with_log(*LOG[:3], status="running", results={})),
    "a record of nobody that never ends": ("lost", replace(with_log(*LOG[:3], status="queued", results={}), views=())),
    "once, twice in a generation": (
        "duplicate_effects", replace(with_log(*RETRIED, results={"c0": 2}), effects=(effect(), effect(2))),
    ),
    "once, twice in one attempt": ("duplicate_effects", replace(KEPT, effects=(effect(), effect()))),
    "once, again in the next generation without a word": (
        "duplicate_effects",
        replace(with_log(*UNKNOWN, generation=2, results={"c0": 2}), effects=(effect(), effect(2))),
    ),
    "without a record, twice": (
        "duplicate_effects",
        replace(
            KEPT, jobs={}, effects=(effect(), effect()),
            views=[{**accepted(degraded=True), "code": 200, "status": "completed"}],
        ),
    ),
    "run without a claim": ("duplicate_effects", replace(KEPT, effects=(effect(9),))),
    "repeatable, run again after its result": (
        "duplicate_effects",
        replace(
            with_log(*LOG[:4], event(5, "job.started", 2), event(6, "job.completed", 2), once=frozenset()),
            effects=(effect(), effect(2)),
        ),
    ),
    "run although a person said that it completed": (
        "duplicate_effects",
        replace(
            with_log(*UNKNOWN, generation=2, results={"c0": 2}, once=frozenset()),
            effects=(effect(), effect(2)),
            views=[accepted(), view("person", verb="resolve", call="c0", decision="completed", code=200, generation=1)],
        ),
    ),
    "a hole in the log": ("stale_writes", with_log(*LOG[:2], *LOG[3:])),
    "a lower fence after a higher one": (
        "stale_writes", with_log(*LOG[:3], event(4, "job.started", 2), event(5, "tool.completed", 1, tool_call_id="c0"),
                                 event(6, "job.completed", 2)),
    ),
    "an attempt that was never started": (
        "stale_writes",
        with_log(*LOG[:3], event(4, "tool.completed", 2, tool_call_id="c0"), event(5, "job.completed", 2)),
    ),
    "a stored result of another attempt": ("stale_writes", with_log(*LOG, results={"c0": 7})),
    "a client's result of another attempt": (
        "stale_writes", also(view("result", generation=1, status="completed", calls={"c0": ["completed", 7]})),
    ),
    "an event that the log has otherwise": (
        "stale_writes", also(view("connect", client=2, after=4), seen(5, "job.failed", client=2)),
    ),
    "an event after the end": ("terminal_changed", with_log(*LOG, event(6, "job.cancelled"))),
    "a progress after the end": ("terminal_changed", with_log(*LOG, event(6, "tool.progress"))),
    "polled as another end": ("terminal_changed", also(view("poll", generation=1, status="failed"))),
    "a result of another end": ("terminal_changed", also(view("result", generation=1, status="failed", calls={}))),
    "submitted again and told another end": (
        "terminal_changed", also({**accepted(), "code": 200, "status": "unknown"}),
    ),
    "polled as running long after its end": (
        "terminal_changed", also({**view("poll", generation=1, status="running"), "t": 99.0}),
    ),
    "an event left out": (
        "stream_gaps",
        also(
            view("connect", client=2, after=2), seen(4, "tool.completed", client=2), seen(5, "job.completed", client=2)
        ),
    ),
    "a gap told": ("stream_gaps", also(view("event", client=1, id=None, type="gap", attempt=None))),
    "a stream that never came to an end": ("stream_gaps", also(view("connect", client=2, after=0))),
    "an event twice": ("stream_repeats", also(seen(5, "job.completed"))),
    "an event again after a reconnect": (
        "stream_repeats", also(view("connect", client=1, after=5), seen(4, "tool.completed")),
    ),
    "a message left": ("left_in_stream", replace(KEPT, left_in_stream=1)),
    "a lease left": ("left_leases", replace(KEPT, left_running=1)),
    "no dead letter": ("letters_missing", replace(with_log(*DEAD, status="failed", results={}), effects=())),
    "two dead letters": (
        "letters_repeated",
        replace(with_log(*DEAD, status="failed", results={}), effects=(), letters=(LETTER, replace(LETTER, seq=2))),
    ),
    "two dead letters, of two attempts": (
        "letters_repeated",
replace(
        with_log(
            *LOG[:2],
            event(3, "job.started", 2),
            event(4, "job.failed", 2, error={"code": "too_many_starts"}),
            status="failed",
            results={},
        ),
        effects=(),
        letters=(LETTER, replace(LETTER, seq=2, attempt=2)),
    ),
    ),
    "a dead letter of a job that completed": ("letters_repeated", replace(KEPT, letters=(LETTER,))),
    "a malformed message without one": ("letters_missing", replace(KEPT, malformed=("not json",))),
    "a malformed message with two": (
        "letters_repeated",
        replace(KEPT, malformed=("x",), letters=tuple(Letter(n, None, 0, "malformed", "x") for n in (1, 2))),
    ),
    "tools called in more starts than are allowed": (
        "starts_beyond_limit",
        replace(
            with_log(*POISON, status="failed", results={}, once=frozenset(), kind="poison"),
            effects=tuple(effect(n) for n in (1, 2, 3, 4)), letters=(replace(LETTER, attempt=5),),
        ),
    ),
    "refused, and run all the same": (
        "ran_though_refused",
        replace(KEPT, views=[view("refused", n=0, code=503, type="", accepted=False)]),
    ),
    "one key, two jobs": ("wrong_answers", also({**accepted(), "job": "job_B"})),
    "an answer that no client should get": ("wrong_answers", replace(KEPT, wrong=("G8 job_A: a cancel gave 500",))),
    "silence": ("silent", replace(KEPT, silent=("a stream of job_A",))),
    "an exit in disorder": ("bad_exits", replace(KEPT, bad_exits=("low-1 ended with 1",))),
    "slow receipts": ("slow_cancels", replace(KEPT, calm_cancel_p99_ms=1001.0)),
}  # fmt: skip

ALLOWED: dict[str, Evidence] = {
    "everything in order": KEPT,
    "a repeatable call, run again by the next attempt": replace(
        with_log(*RETRIED, results={"c0": 2}, once=frozenset()), effects=(effect(), effect(2))
    ),
    "run again as a person said": replace(
        with_log(*UNKNOWN, generation=2, results={"c0": 2}),
        effects=(effect(), effect(2)),
        views=[accepted(), view("asks", verb="resolve", call="c0", decision="rerun", generation=1)],
    ),
    "run again after a failure that was known": replace(
        with_log(
            *LOG[:3],
            event(4, "tool.failed", tool_call_id="c0", will_retry=False),
            event(5, "job.failed"),
            event(6, "job.queued", 1, 2),
            event(7, "job.started", 2, 2),
            event(8, "tool.completed", 2, 2, tool_call_id="c0"),
            event(9, "job.completed", 2, 2),
            generation=2,
            results={"c0": 2},
        ),
        effects=(effect(), effect(2)),
    ),
    "a dead letter": replace(with_log(*DEAD, status="failed", results={}), effects=(), letters=(LETTER,)),
    "a dead letter whose job was cancelled before its end was written": replace(
        with_log(*LOG[:2], event(3, "job.cancelled"), status="cancelled", results={}), effects=(), letters=(LETTER,)
    ),
    "refused and not there": replace(KEPT, jobs={}, effects=(), views=[view("refused", n=0, code=503, accepted=False)]),
    "refused in doubt": replace(KEPT, views=[view("refused", n=0, code=503, accepted="unknown")]),
    "refused, asked again and accepted": also(view("refused", n=0, code=503, accepted=False)),
    "refused after a submit that broke off": replace(
        KEPT, views=[view("unanswered", n=0), view("refused", n=0, code=503, accepted=False)]
    ),
    "ran with queue and store down": replace(
        KEPT, jobs={}, effects=(effect(),), views=[{**accepted(degraded=True), "code": 200, "status": "completed"}]
    ),
    "polled as running a moment after its end": also({**view("poll", generation=1, status="running"), "t": 5.0}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_breach_is_found_under_its_figure(case: str) -> None:
    figure, evidence = BROKEN[case]
    verdict = audit(evidence)
    assert figure in {finding.figure for finding in verdict.findings}
    assert not verdict.passed
    assert verdict.figures[figure] > 0


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_allowed_passes(case: str) -> None:
    assert audit(ALLOWED[case]).findings == ()


def test_every_figure_has_a_breach_that_raises_it() -> None:
    assert {figure for figure, _ in BROKEN.values()} == set(MUST_BE_ZERO)


def test_there_is_a_line_a_promise_and_one_a_finding() -> None:
    verdict = audit(BROKEN["a message left"][1])
    told = lines(verdict)
    assert [line.split()[0] for line in told[:12]] == list(PROMISES)
    assert "BROKEN" in told[0]
    assert len(told) == 13
