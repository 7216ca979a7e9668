"""The outcome of an attempt from the ends of its calls, over all combinations."""

from __future__ import annotations

import itertools

import pytest

from toolfleet.services.background_jobs import transitions
from toolfleet.services.background_jobs.task_models import ErrorInfo, EventType, Status
from toolfleet.services.background_jobs.transitions import (
    CallEnd,
    CallStop,
    Cancelled,
    Completed,
    Failed,
    HandedBack,
    Lost,
    Outcome,
    Retry,
    Stop,
    StoppedCall,
    Unknown,
    conclude,
)

ENDS = list(itertools.product(CallEnd, repeat=3))
STOPS = [None, *Stop]


def conclude_all(ends: tuple[CallEnd, ...], stop: Stop | None) -> Outcome:
    named = {f"c{n}": end for n, end in enumerate(ends)}
    errors = {call: ErrorInfo(code="timeout", message="late", tool_call_id=call) for call in named}
    return conclude(named, errors, stop=stop, stopped=[stopped(CallStop.STOPPED)], timeout_s=600)


@pytest.mark.parametrize("stop", STOPS)
def test_completed_means_that_every_call_has_a_result(stop: Stop | None) -> None:
    for ends in ENDS:
        completed = isinstance(conclude_all(ends, stop), Completed)
        assert completed == (set(ends) == {CallEnd.COMPLETED} and stop is not Stop.LOST), ends


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.promise("G2")
def test_a_lost_attempt_writes_nothing(ends: tuple[CallEnd, ...]) -> None:
    assert conclude_all(ends, Stop.LOST) == Lost()


@pytest.mark.parametrize("stop", STOPS)
def test_a_call_that_never_ended_leaves_no_ending_that_nobody_asked_for(stop: Stop | None) -> None:
    expected = {
        None: Lost,
        Stop.LOST: Lost,
        Stop.CANCEL: Cancelled,
        Stop.DRAIN: HandedBack,
    }
    for ends in ENDS:
        if CallEnd.STOPPED not in ends:
            continue
        outcome = conclude_all(ends, stop)
        if stop is Stop.TIMEOUT:
            assert isinstance(outcome, Unknown if CallEnd.UNKNOWN in ends else Failed), ends
        else:
            assert isinstance(outcome, expected[stop]), ends


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.promise("G5")
def test_an_unknown_outcome_never_ends_as_if_it_were_known(stop: Stop | None) -> None:
    for ends in ENDS:
        if CallEnd.UNKNOWN not in ends:
            continue
        outcome = conclude_all(ends, stop)
        assert not isinstance(outcome, Completed | Failed), ends
        if isinstance(outcome, Unknown):
            assert outcome.calls == tuple(f"c{n}" for n, end in enumerate(ends) if end is CallEnd.UNKNOWN)


@pytest.mark.parametrize("stop", [None, Stop.DRAIN])
def test_a_call_that_may_run_again_does(stop: Stop | None) -> None:
    for ends in ENDS:
        if CallEnd.RETRY in ends and CallEnd.STOPPED not in ends:
            outcome = conclude_all(ends, stop)
            assert isinstance(outcome, Retry), (ends, outcome)
            assert ends[int(str(outcome.error.tool_call_id)[1:])] is CallEnd.RETRY


@pytest.mark.parametrize("stop", [Stop.CANCEL, Stop.TIMEOUT])
def test_a_job_that_is_to_end_is_not_retried(stop: Stop) -> None:
    assert not any(isinstance(conclude_all(ends, stop), Retry) for ends in ENDS)


def test_failed_names_the_call_and_counts() -> None:
    ends = {"c1": CallEnd.COMPLETED, "c2": CallEnd.FAILED, "c3": CallEnd.FAILED}
    outcome = conclude(ends, {"c2": ErrorInfo(code="rejected", message="bad url")}, stop=None)
    assert isinstance(outcome, Failed)
    assert outcome.error.tool_call_id == "c2"
    assert outcome.error.message == "2 of 3 calls failed; c2: bad url"


def test_endings_carry_the_event_of_their_status() -> None:
    error = ErrorInfo(code="timeout", message="late")
    endings = [
        transitions.completed(2),
        transitions.failed(error),
        transitions.cancelled(Cancelled((stopped(CallStop.TOLD),))),
        transitions.unknown("job_x", ["c1"]),
    ]
    assert [end.status for end in endings] == [s for s in Status if s.terminal]
    assert all(end.event.type == EventType(f"job.{end.status}") for end in endings)
    assert all(end.event.data["status"] == end.status for end in endings)


def stopped(state: CallStop, name: str = "c1") -> StoppedCall:
    return StoppedCall(name, "echo", state)


@pytest.mark.promise("G8")
@pytest.mark.parametrize(
    ("states", "reached", "said"),
    [
        ([CallStop.STOPPED], "tool", "stopped"),
        ([CallStop.TOLD], "tool", "not_confirmed"),
        ([CallStop.NOT_TOLD], "worker", "not_confirmed"),
        ([CallStop.STOPPED, CallStop.NOT_TOLD], "tool", "not_confirmed"),
        ([CallStop.ENDED, CallStop.STOPPED], "tool", "stopped"),
        ([CallStop.ENDED, CallStop.NOT_SENT], "worker", "nothing_was_running"),
    ],
)
def test_whether_the_tool_has_stopped_is_said_never_assumed(states: list[CallStop], reached: str, said: str) -> None:
    outcome = Cancelled(tuple(stopped(state, f"c{n}") for n, state in enumerate(states, 1)))
    data = transitions.cancelled(outcome).event.data
    assert (data["reached"], data["tool_stopped"]) == (reached, said)
    assert [call["state"] for call in data["calls"]] == states
    doubtful = (CallStop.TOLD, CallStop.NOT_TOLD)
    assert data["still_running"] == [f"c{n}" for n, state in enumerate(states, 1) if state in doubtful]
