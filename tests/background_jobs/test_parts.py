"""Single parts of a worker, where time or order has to be held in the hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from tests.background_jobs.making import ERROR, make_task, result
from toolfleet.services.background_jobs.attempt import Attempt, AttemptRules
from toolfleet.services.background_jobs.attempt_log import AttemptLog
from toolfleet.services.background_jobs.call_run import CallOutcome
from toolfleet.services.background_jobs.errors import StoreError, StoreUnavailable
from toolfleet.services.background_jobs.loop_watchdog import Silence
from toolfleet.services.background_jobs.ports import (
    Changes,
    Granted,
    Lease,
    MarkAnswer,
    RenewAnswer,
    ToolSpec,
    WriteAnswer,
)
from toolfleet.services.background_jobs.retry_policy import RetryPolicy
from toolfleet.services.background_jobs.store_gate import StoreGate
from toolfleet.services.background_jobs.task_lease import Held, LeaseKeeper
from toolfleet.services.background_jobs.task_models import ToolCall
from toolfleet.services.background_jobs.transitions import CallEnd, Failed, HandedBack, Lost, Stop
from toolfleet.services.tool_execution.local_runner import LocalToolRunner


async def a_few_turns() -> None:
    """Lets everything run that can run without time passing."""
    for _ in range(50):
        await asyncio.sleep(0)


# -- the gate --------------------------------------------------------------------------------------------------------


async def test_a_store_that_answers_and_refuses_is_not_asked_without_a_pause() -> None:
    pings = writes = 0

    async def ping() -> None:
        nonlocal pings
        pings += 1

    async def write() -> str:
        nonlocal writes
        writes += 1
        if writes < 3:
            raise StoreUnavailable
        return "written"

    gate = StoreGate(ping)
    written = asyncio.create_task(gate.insist(write))
    await a_few_turns()
    assert (pings, writes) == (0, 1)
    async with asyncio.timeout(5):
        assert await written == "written"
    assert (pings, writes) == (2, 3)
    await gate.close()


async def test_one_question_serves_everyone_who_waits_and_they_are_told() -> None:
    pings, opened, down = 0, 0, True

    async def ping() -> None:
        nonlocal pings, down
        pings += 1
        if pings < 3:
            raise StoreUnavailable
        down = False

    async def write() -> bool:
        if down:
            raise StoreUnavailable
        return True

    def on_open() -> None:
        nonlocal opened
        opened += 1

    gate = StoreGate(ping)
    gate.listen(on_open)
    async with asyncio.timeout(5):
        assert all(await asyncio.gather(*(gate.insist(write) for _ in range(100))))
    assert (pings, opened, gate.is_open) == (3, 1, True)


async def test_a_refusal_is_no_outage() -> None:
    async def ping() -> None:
        pytest.fail("nobody asks")

    async def write() -> None:
        raise StoreError("wrong")

    gate = StoreGate(ping)
    with pytest.raises(StoreError, match="wrong"):
        await gate.insist(write)
    assert gate.is_open


# -- leases ----------------------------------------------------------------------------------------------------------


@dataclass
class Holder:
    """An attempt, as the keeper sees it."""

    lease: Lease
    stops: list[Stop] = field(default_factory=list)

    def stop(self, why: Stop) -> None:
        self.stops.append(why)


class Keeping:
    """A keeper with a clock in the hand, and a store that answers as it is told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.answers: dict[str, RenewAnswer] = {}
        self.error: Exception | None = None
        self.asked: list[Sequence[Lease]] = []
        self.gate = StoreGate(self._ping)
        self.keeper = LeaseKeeper(self, self.gate, lease_s=30, ack_wait_s=30, clock=lambda: self.now)  # type: ignore[arg-type]

    async def _ping(self) -> None:
        raise StoreUnavailable

    async def renew(self, leases: Sequence[Lease], lease_ms: int) -> Sequence[RenewAnswer]:
        assert lease_ms == 30_000
        self.asked.append(leases)
        self.now += 1
        if self.error is not None:
            raise self.error
        return [self.answers.get(lease.job_id, "held") for lease in leases]


@pytest.mark.promise("G2")
async def test_a_lease_ends_by_our_own_clock_where_it_can_not_be_renewed() -> None:
    keeping = Keeping()
    holder = Holder(Lease("a", 1))
    with keeping.keeper.attempt(holder, asked_at=1000.0) as held:
        keeping.now = 1010.0
        await keeping.keeper.renew_all()
        assert held.deadline == 1040.0, "counted from before the question"
        keeping.error = StoreUnavailable()
        keeping.now = 1020.0
        await keeping.keeper.renew_all()
        assert not keeping.gate.is_open
        keeping.now = 1039.9
        keeping.keeper.expire()
        assert holder.stops == []
        keeping.now = 1040.0
        for _ in range(3):
            keeping.keeper.expire()
        assert holder.stops == [Stop.LOST], "told once"
    await keeping.gate.close()


async def test_a_renewal_carries_cancels_and_lost_fences_to_their_attempts() -> None:
    keeping = Keeping()
    keeping.answers = {"b": "cancel", "c": "lost"}
    holders = [Holder(Lease(name, 1)) for name in "abc"]
    with (
        keeping.keeper.attempt(holders[0], 1000.0),
        keeping.keeper.attempt(holders[1], 1000.0) as cancelled,
        keeping.keeper.attempt(holders[2], 1000.0) as lost,
    ):
        await keeping.keeper.renew_all()
        assert [holder.stops for holder in holders] == [[], [Stop.CANCEL], [Stop.LOST]]
        assert (cancelled.deadline, lost.deadline) == (1030.0, 1030.0)
        assert len(keeping.asked) == 1, "one question for all"
    await keeping.keeper.renew_all()
    assert len(keeping.asked) == 1, "nothing is held any more"


async def test_a_renewal_that_was_refused_is_no_outage_and_no_renewal() -> None:
    keeping = Keeping()
    keeping.error = StoreError("wrong")
    with keeping.keeper.attempt(Holder(Lease("a", 1)), 1000.0) as held:
        await keeping.keeper.renew_all()
        assert (held.deadline, keeping.gate.is_open) == (1030.0, True)


async def test_an_attempt_whose_job_was_claimed_again_by_the_same_process_is_stopped() -> None:
    keeping = Keeping()
    old, new = Holder(Lease("a", 1)), Holder(Lease("a", 2))
    with keeping.keeper.attempt(old, 1000.0):
        with keeping.keeper.attempt(new, 1010.0):
            assert (old.stops, new.stops) == ([Stop.LOST], [])
        with keeping.keeper.attempt(new, 1010.0) as held:
            keeping.keeper.cancel("a")
            assert (old.stops, new.stops) == ([Stop.LOST], [Stop.CANCEL])
            assert held.deadline == 1040.0


@pytest.mark.promise("G8")
async def test_cancels_that_could_have_been_missed_are_asked_for_at_once() -> None:
    keeping = Keeping()
    keeping.answers = {"a": "cancel"}
    holder = Holder(Lease("a", 1))
    run = asyncio.create_task(keeping.keeper.run())
    with keeping.keeper.attempt(holder, 1000.0):
        await a_few_turns()
        assert holder.stops == [], "the next renewal is 10 s away"
        keeping.keeper.cancel(None)
        await a_few_turns()
        assert holder.stops == [Stop.CANCEL]
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)


@pytest.mark.promise("G8")
@pytest.mark.parametrize("answer", ["cancel", "held"])
async def test_a_cancel_that_comes_before_the_answer_of_its_claim_is_asked_for(answer: RenewAnswer) -> None:
    keeping = Keeping()
    keeping.answers = {"a": answer}
    holder = Holder(Lease("a", 1))
    run = asyncio.create_task(keeping.keeper.run())
    await a_few_turns()
    keeping.keeper.cancel("a")
    with keeping.keeper.attempt(holder, 1000.0):
        await a_few_turns()
        assert holder.stops == ([Stop.CANCEL] if answer == "cancel" else []), "as the store says"
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)


class Message:
    """A delivery whose `in_progress` may hang."""

    def __init__(self) -> None:
        self.told = 0
        self.hangs = False

    async def in_progress(self) -> None:
        self.told += 1
        if self.hangs:
            await asyncio.Event().wait()


async def test_messages_in_hand_are_kept_and_a_silent_queue_does_not_hold_up_the_leases() -> None:
    keeping, message = Keeping(), Message()
    with keeping.keeper.delivery(message), keeping.keeper.attempt(Holder(Lease("a", 1)), 1000.0):  # type: ignore[arg-type]
        await keeping.keeper.renew_all()
        assert (message.told, len(keeping.asked)) == (1, 1)
        message.hangs = True
        renewal = asyncio.create_task(keeping.keeper.renew_all())
        await a_few_turns()
        assert (message.told, len(keeping.asked)) == (2, 2)
        renewal.cancel()
        await asyncio.gather(renewal, return_exceptions=True)
    await keeping.keeper.renew_all()
    assert message.told == 2


# -- what an attempt tells -------------------------------------------------------------------------------------------


class Notebook:
    """A store that notes what it is told, or refuses it."""

    def __init__(self) -> None:
        self.written: list[tuple[int, Changes]] = []
        self.news = asyncio.Event()
        self.error: Exception | None = None
        self.answer: WriteAnswer = "ok"

    async def progress(self, lease: Lease, changes: Changes, wseq: int) -> WriteAnswer:
        if self.error is not None:
            error, self.error = self.error, None
            self.news.set()
            raise error
        self.written.append((wseq, changes))
        self.news.set()
        return self.answer

    async def mark_start(self, lease: Lease, call: ToolCall, lease_ms: int) -> MarkAnswer:
        return "ok"

    async def withdraw_mark(self, lease: Lease, tool_call_id: str) -> WriteAnswer:
        return "ok"

    async def next_write(self) -> Changes:
        async with asyncio.timeout(5):
            await self.news.wait()
        self.news.clear()
        return self.written[-1][1] if self.written else Changes()


def telling(notebook: Notebook, *, interval: float, on_lost: Callable[[], None] = lambda: None) -> AttemptLog:
    async def ping() -> None:
        pass

    task = make_task(tools=(CALL, OTHER))
    granted = Granted(task.job_id, 1, 1, 0, 1000, {}, frozenset())
    gate = StoreGate(ping)
    return AttemptLog(notebook, gate, Lease(task.job_id, 1), task, granted, interval, on_lost)


CALL = ToolCall(tool_call_id="c1", tool_name="echo")
OTHER = ToolCall(tool_call_id="c2", tool_name="echo")
DONE = CallOutcome(CallEnd.COMPLETED, result("c1"))


async def test_of_much_progress_the_last_state_is_told_and_how_much_was_left_out() -> None:
    notebook = Notebook()
    log = telling(notebook, interval=0.05)
    for page in range(1, 6):
        log.progress(CALL, page, 10, f"page {page}")
    log.progress(OTHER, 1, None, None)
    changes = await notebook.next_write()
    assert [dict(event.data) for event in changes.events] == [
        {"tool_call_id": "c1", "tool_name": "echo", "progress": 5, "total": 10, "message": "page 5", "coalesced": 4},
        {"tool_call_id": "c2", "tool_name": "echo", "progress": 1},
    ]
    assert (changes.percent, changes.message, changes.current_tool) == (25.0, "page 5", "echo")
    log.progress(CALL, 6, 10, None)
    assert "coalesced" not in (await notebook.next_write()).events[0].data
    await log.take()


async def test_a_quick_call_is_told_in_one_write_with_the_jobs_end() -> None:
    notebook = Notebook()
    log = telling(notebook, interval=0.2)
    log.started(CALL)
    log.progress(CALL, 1, 1, None)
    log.ended(CALL, DONE, 7, flush=False)
    changes = await log.take()
    assert [event.type.value for event in changes.events] == ["tool.started", "tool.progress", "tool.completed"]
    assert [r.duration_ms for r in changes.results] == [7]
    assert notebook.written == []
    log.progress(OTHER, 1, None, None)
    log.ended(OTHER, DONE, 1, flush=True)
    await a_few_turns()
    assert notebook.written == [], "nothing is told after the end"


async def test_writes_are_numbered_and_follow_each_other() -> None:
    notebook = Notebook()
    log = telling(notebook, interval=0)
    for number in range(1, 4):
        log.progress(CALL, number, 10, None)
        await notebook.next_write()
    log.ended(CALL, DONE, 1, flush=True)
    assert (await notebook.next_write()).results == (result("c1").model_copy(update={"duration_ms": 1}),)
    assert [wseq for wseq, _ in notebook.written] == [1, 2, 3, 4]
    assert (await log.take()).results == ()


async def test_what_the_store_refused_is_told_with_the_next_write() -> None:
    notebook = Notebook()
    log = telling(notebook, interval=0)
    notebook.error = StoreError("wrong")
    log.ended(CALL, DONE, 1, flush=True)
    await notebook.next_write()
    await a_few_turns()
    assert notebook.written == []
    last = await log.take()
    assert [r.tool_call_id for r in last.results] == ["c1"]
    assert [event.type.value for event in last.events] == ["tool.completed"]


async def test_an_attempt_that_lost_its_job_hears_of_it() -> None:
    notebook, lost = Notebook(), asyncio.Event()
    notebook.answer = "lost"
    log = telling(notebook, interval=0, on_lost=lost.set)
    log.started(CALL)
    async with asyncio.timeout(5):
        await lost.wait()
    await log.take()


async def test_how_a_call_failed_is_told() -> None:
    notebook = Notebook()
    log = telling(notebook, interval=0)
    log.ended(CALL, CallOutcome(CallEnd.RETRY, None, ERROR), 1, flush=False)
    log.ended(OTHER, CallOutcome(CallEnd.UNKNOWN, None, ERROR), 1, flush=False)
    retry, unknown = (await log.take()).events
    assert (retry.data["will_retry"], "outcome" in retry.data) == (True, False)
    assert (unknown.data["will_retry"], unknown.data["outcome"]) == (False, "unknown")
    assert unknown.data["error"] == {"code": "tool_failed", "message": "it failed"}


# -- an attempt ------------------------------------------------------------------------------------------------------


class SlowStore(Notebook):
    """Takes the mark of a call, and does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[str] = []

    async def mark_start(self, lease: Lease, call: ToolCall, lease_ms: int) -> MarkAnswer:
        self.marks.append(call.tool_call_id)
        self.news.set()
        await asyncio.Event().wait()
        return "ok"

    async def withdraw_mark(self, lease: Lease, tool_call_id: str) -> WriteAnswer:
        self.marks.remove(tool_call_id)
        return "ok"


@pytest.mark.promise("G5")
@pytest.mark.parametrize("why", [Stop.DRAIN, Stop.TIMEOUT, Stop.LOST])
async def test_the_mark_of_a_call_that_was_never_sent_is_taken_back(why: Stop) -> None:
    async def never(_args: object, _context: object) -> str:
        pytest.fail("the call was sent")

    store, task = SlowStore(), make_task(tools=(CALL,))
    attempt = Attempt(
        task,
        Granted(task.job_id, 1, 1, 0, 60_000, {}, frozenset()),
        store=store,
        gate=StoreGate(a_few_turns),
        runner=LocalToolRunner({"echo": (ToolSpec("echo", "local", "echo"), never)}),
        rules=AttemptRules(30_000, 60, 8, 0.2, RetryPolicy()),
    )
    run = asyncio.create_task(attempt.run(Held(attempt, float("inf"))))
    async with asyncio.timeout(5):
        await store.news.wait()
        attempt.stop(why)
        outcome, _ = await run
    # An attempt that has lost its job may not even take that back.
    assert store.marks == (["c1"] if why is Stop.LOST else [])
    assert type(outcome) is {Stop.DRAIN: HandedBack, Stop.TIMEOUT: Failed, Stop.LOST: Lost}[why]


def test_a_stop_of_the_process_is_not_silence_of_its_loop() -> None:
    silence = Silence(1.0, now=0.0)
    assert silence.at(1.0, beats=1) == 0
    assert silence.at(3600.0, beats=1) == 2, "it was asleep itself"
    assert silence.at(3601.0, beats=1) == 3
    assert silence.at(3602.0, beats=2) == 0
    for second in range(1, 21):
        assert silence.at(3602.0 + second, beats=2) == second
