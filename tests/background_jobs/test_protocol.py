"""Every function of the Lua library, in every order, against what is promised of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis import Redis

from tests.background_jobs.dumping import check_job, dump, log_of, record_of, results_of
from tests.background_jobs.making import ERROR, LEASE_MS, ending, make_task, result
from toolfleet.bootstrap import redis_client
from toolfleet.services.background_jobs.ports import CancelAnswer, Changes, Granted, Lease, NotNow, Over
from toolfleet.services.background_jobs.redis_records import partition_of, root_of
from toolfleet.services.background_jobs.redis_state_manager import RedisStateManager
from toolfleet.services.background_jobs.task_models import EventType, NewEvent, Status, TaskDefinition, ToolResult
from toolfleet.services.background_jobs.transitions import LEGAL_MOVES, REOPENING_MOVES
from toolfleet.settings import Settings

CALLS = ("c1", "c2", "c3")
ONCE = ("c1", "c2")
"""The calls that must not run twice; the others may."""


@dataclass
class Attempt:
    """An attempt that was granted, as the model knows it."""

    lease: Lease
    token: str
    generation: int
    wseq: int = 0
    sent: set[str] = field(default_factory=set)


STUCK_MS = 300_000


class Protocol(RuleBasedStateMachine):
    """One job, several workers, clients and reconcilers; time passes when a rule says so."""

    settings_: Settings
    url: str

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.redis = Redis.from_url(self.url, decode_responses=True)
        self.redis.flushall()
        self.client = redis_client(self.settings_, self.url)
        self.store = RedisStateManager(self.client, timeout_s=5, log_max=1000, result_ttl_s=86400, max_starts=3)
        self.tokens = 0
        self.another_job()

    def another_job(self) -> None:
        self.task = make_task(len(CALLS), timeout_ms=10**9)
        self.attempts: list[Attempt] = []
        self.ended: dict[int, str] = {}
        self.stored: dict[int, dict[str, str]] = {}
        self.started: set[str] = set()
        self.status: Status | None = None

    def teardown(self) -> None:
        self.loop.run(self.client.aclose())
        self.redis.close()
        self.loop.close()

    # -- what every call must keep -------------------------------------------------------------------------------

    def do(self, call: Callable[[], Awaitable[Any]], *, same: Callable[[Any, Any], bool] | None = None) -> Any:
        """A write, and the same write again as after a lost answer: the second one changes nothing."""
        before = self.state()
        answer = self.loop.run(_await(call))
        self.check_move(before, self.state())
        self.status = self.state()[0]
        standing = dump(self.redis, without_leases=True)
        again = self.loop.run(_await(call))
        assert dump(self.redis, without_leases=True) == standing, "the repetition changed something"
        assert (same or (lambda a, b: a == b))(answer, again), f"first {answer}, then {again}"
        return answer

    def state(self) -> tuple[Status | None, int]:
        record = record_of(self.redis, self.task.job_id)
        return (Status(record["status"]), int(record["generation"])) if record else (None, 0)

    def check_move(self, before: tuple[Status | None, int], after: tuple[Status | None, int]) -> None:
        (old, generation), (new, next_generation) = before, after
        if new is None or (old, generation) == (new, next_generation):
            return
        if old is None:
            # A record is made queued, and may go on from there in the same step.
            assert new is Status.QUEUED or (Status.QUEUED, new) in LEGAL_MOVES
        elif generation == next_generation:
            assert (old, new) in LEGAL_MOVES, f"{old} -> {new}"
        else:
            assert next_generation == generation + 1
            assert (old, new) in REOPENING_MOVES, f"{old} -> {new} in a new generation"

    def is_current(self, attempt: Attempt) -> bool:
        record = record_of(self.redis, self.task.job_id)
        return record["fence"] == str(attempt.lease.fence) and record["status"] == "running"

    def open_calls(self) -> list[str]:
        return [call for call in CALLS if call not in results_of(self.redis, self.task.job_id)]

    # -- clients -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.status is Status.COMPLETED)
    @rule()
    def next_job(self) -> None:
        """Nothing more can happen to this one."""
        self.another_job()

    @rule()
    def enqueue(self) -> None:
        self.do(lambda: self.store.enqueue(self.task), same=lambda a, b: a[0] == b[0] and not b[1])

    @precondition(lambda self: self.status in (None, Status.RUNNING) or len(self.attempts) > 3)
    @rule(with_task=st.booleans())
    def cancel(self, with_task: bool) -> None:
        def same(first: CancelAnswer, second: CancelAnswer) -> bool:
            return first == second or (first.found, second.found) == ("cancelled_now", "already_cancelled")

        task = self.task if with_task else None
        was = self.state()[0]
        answer = self.do(lambda: self.store.cancel(self.task.job_id, "test", task), same=same)
        if was is None and not with_task:
            assert answer.found == "absent"

    @precondition(lambda self: self.status not in (Status.QUEUED, Status.RUNNING))
    @rule()
    def reopen(self) -> None:
        was, generation = self.state()
        answer = self.do(
            lambda: self.store.reopen(self.task.job_id, "test"),
            same=lambda a, b: b.verdict == ("not_allowed" if a.verdict == "reopened" else a.verdict),
        )
        assert (answer.verdict == "reopened") == (was in (Status.FAILED, Status.CANCELLED))
        if answer.verdict == "reopened":
            assert answer.task.generation == generation + 1
            self.begin_generation(answer.task)
            # A failed call may run again on a person's word.
            self.started -= {call for call in self.started if call in self.failed_before(generation)}

    @precondition(lambda self: self.status in (Status.FAILED, Status.CANCELLED) or len(self.attempts) == 2)
    @rule(old=st.booleans())
    def redrive(self, old: bool) -> None:
        """A dead letter of the last attempt, or of an earlier generation."""
        was, generation = self.state()
        record = record_of(self.redis, self.task.job_id)
        fence = int(record.get("fence", 0)) - old
        letter = self.task.model_copy(update={"generation": generation - old})
        if fence < 1 or letter.generation < 1:
            return
        answered = int(self.redis.get(f"{root_of(self.task.job_id)}:letter:{self.task.job_id}") or 0)
        answer = self.do(
            lambda: self.store.redrive(letter, fence, 60_000, "", ""),
            same=lambda a, b: b.verdict == ("answered" if a.verdict == "reopened" else a.verdict),
        )
        may = was in (Status.FAILED, Status.CANCELLED) and not old and fence > answered
        assert (answer.verdict == "reopened") == may, answer
        if may:
            assert answer.task.generation == generation + 1
            self.begin_generation(answer.task)
            self.started -= {call for call in self.started if call in self.failed_before(generation)}

    def failed_before(self, generation: int) -> set[str]:
        return {call for call, payload in self.stored.get(generation, {}).items() if payload[0] == "f"}

    @precondition(lambda self: self.status is Status.UNKNOWN or len(self.attempts) == 1)
    @rule(call=st.sampled_from(CALLS), decision=st.sampled_from(["rerun", "completed", "failed"]))
    def resolve(self, call: str, decision: Any) -> None:
        was, generation = self.state()
        undecided = set(self.undecided())
        decided: ToolResult | None = None if decision == "rerun" else result(call, decision, "decided")

        def same(first: Any, second: Any) -> bool:
            if first.verdict in ("waiting", "reopened", "closed"):
                return second.verdict in ("decided_already", "not_allowed")
            return bool(first == second)

        answer = self.do(lambda: self.store.resolve(self.task.job_id, call, decision, decided, "note"), same=same)
        if was is not Status.UNKNOWN:
            assert answer.verdict in ("absent", "not_allowed")
            return
        assert (answer.verdict in ("waiting", "reopened", "closed")) == (call in undecided)
        if call in undecided and decision == "rerun":
            self.started.discard(call)
        if answer.verdict in ("reopened", "closed"):
            assert undecided == {call}
            assert self.state()[1] == generation + 1
            self.begin_generation(answer.task)

    def begin_generation(self, task: TaskDefinition | None) -> None:
        if task is not None:
            self.task = task
        else:
            self.task = self.task.model_copy(update={"generation": self.state()[1]})

    def undecided(self) -> list[str]:
        return [name[2:] for name in record_of(self.redis, self.task.job_id) if name.startswith("u:")]

    # -- workers -------------------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(["w1", "w2"]), old=st.sampled_from([False, False, True]), crashed=st.booleans())
    def claim(self, worker: str, old: bool, crashed: bool) -> None:
        if crashed:
            self.lease_runs_out()
        self.tokens += 1
        token = f"token{self.tokens}"
        task = self.task.model_copy(update={"generation": self.task.generation - 1}) if old else self.task
        if task.generation == 0:
            return
        was, record = self.state()[0], record_of(self.redis, self.task.job_id)
        held = was is Status.RUNNING and record["lease_until"] != "1"
        waits = was is Status.QUEUED and int(record["not_before"]) > 0 and "cancel" not in record
        answer = self.do(
            lambda: self.store.claim(task, token=token, worker=worker, lease_ms=LEASE_MS, published_at=None),
            same=lambda a, b: a == b or (isinstance(a, NotNow) and isinstance(b, NotNow)),
        )
        if old:
            if was is not None:
                assert answer == Over("superseded")
            return
        if was is not None and was.terminal:
            assert answer == Over(was)
        if held:
            assert isinstance(answer, NotNow)
        elif "cancel" in record and was is not None and not was.terminal:
            assert answer == Over("cancelled")
        elif waits and isinstance(answer, NotNow):
            assert answer.delay_ms <= LEASE_MS
        if isinstance(answer, Granted):
            self.granted(answer, token)

    def granted(self, answer: Granted, token: str) -> None:
        record = record_of(self.redis, self.task.job_id)
        assert all(answer.fence > earlier.lease.fence for earlier in self.attempts)
        results = results_of(self.redis, self.task.job_id)
        words = {"c": "completed", "f": "failed"}
        assert dict(answer.done) == {call: words[payload[0]] for call, payload in results.items()}, "G4"
        unsure = {call for call in self.started if call not in results}
        assert unsure <= answer.marked, f"G5: {unsure - answer.marked} would be started again"
        assert (answer.dead is not None) == (int(record["starts"]) - int(record.get("retries", 0)) > 3), "G9"
        self.attempts.append(Attempt(Lease(self.task.job_id, answer.fence), token, self.task.generation))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), call=st.sampled_from(ONCE), times=st.integers(1, 2))
    def mark_start(self, data: st.DataObject, call: str, times: int) -> None:
        attempt = self.pick(data)
        for name in ONCE if times == 2 else (call,):
            self.mark_one(attempt, name)

    def mark_one(self, attempt: Attempt, call: str) -> None:
        if call in results_of(self.redis, self.task.job_id) or (call in self.started and call not in attempt.sent):
            return  # an attempt is told of both by its claim, and leaves them alone
        tool_call = next(c for c in self.task.tools if c.tool_call_id == call)
        if self.guarded(attempt, lambda: self.store.mark_start(attempt.lease, tool_call, LEASE_MS)) == "ok":
            self.started.add(call)
            attempt.sent.add(call)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), call=st.sampled_from(ONCE))
    def withdraw(self, data: st.DataObject, call: str) -> None:
        attempt = self.pick(data)
        if call not in attempt.sent or call in results_of(self.redis, self.task.job_id):
            return
        if self.guarded(attempt, lambda: self.store.withdraw_mark(attempt.lease, call)) == "ok":
            attempt.sent.discard(call)
            self.started.discard(call)

    @precondition(lambda self: self.attempts)
    @rule(
        data=st.data(),
        results=st.dictionaries(st.sampled_from(CALLS), st.sampled_from(["completed", "failed"])),
        lost_answer=st.booleans(),
    )
    def progress(self, data: st.DataObject, results: dict[str, Any], lost_answer: bool) -> None:
        attempt = self.pick(data)
        changes = self.changes(attempt, results)
        attempt.wseq += 1
        wseq = attempt.wseq
        self.guarded(attempt, lambda: self.store.progress(attempt.lease, changes, wseq))
        if lost_answer and self.is_current(attempt):
            # What was not heard to be stored is told again, in other words, with the next write.
            again = Changes(results=tuple(r.model_copy(update={"duration_ms": 1}) for r in changes.results))
            attempt.wseq += 1
            wseq = attempt.wseq
            self.guarded(attempt, lambda: self.store.progress(attempt.lease, again, wseq))

    def changes(self, attempt: Attempt, results: dict[str, Any]) -> Changes:
        """What an attempt can tell: results of calls that it ran, which no earlier attempt has told."""
        known = results_of(self.redis, self.task.job_id)
        mine = {
            call: status
            for call, status in results.items()
            if call not in known and (call not in ONCE or call in attempt.sent)
        }
        return Changes(
            results=tuple(result(call, status, f"by {attempt.lease.fence}") for call, status in mine.items()),
            events=tuple(NewEvent(EventType.TOOL_COMPLETED, {"tool_call_id": call}) for call in mine)
            or (NewEvent(EventType.TOOL_PROGRESS, {"progress": 1}),),
            current_tool="echo",
            percent=50.0,
        )

    @precondition(lambda self: self.attempts)
    @rule()
    def renew(self) -> None:
        leases = [attempt.lease for attempt in self.attempts]
        current = [self.is_current(attempt) for attempt in self.attempts]
        answers = self.do(lambda: self.store.renew(leases, LEASE_MS))
        assert [answer != "lost" for answer in answers] == current

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), delay=st.sampled_from([0, LEASE_MS]))
    def retry(self, data: st.DataObject, delay: int) -> None:
        attempt = self.pick(data)
        changes = self.changes(attempt, {"c3": "failed"})
        self.leaves(attempt, lambda: self.store.retry(attempt.lease, delay, ERROR, changes))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data())
    def hand_back(self, data: st.DataObject) -> None:
        attempt = self.pick(data)
        current, before = self.is_current(attempt), record_of(self.redis, self.task.job_id)
        self.leaves(attempt, lambda: self.store.hand_back(attempt.lease, Changes()))
        after = record_of(self.redis, self.task.job_id)
        if current and after["status"] == "queued":
            assert int(after["starts"]) == int(before["starts"]) - 1, "handing back counts no start"

    def leaves(self, attempt: Attempt, call: Callable[[], Awaitable[Any]]) -> None:
        current = self.is_current(attempt)
        cancelled = "cancel" in record_of(self.redis, self.task.job_id)
        answer = self.guarded(attempt, call)
        if current:
            assert answer == ("cancelled" if cancelled else "ok"), "a cancel request wins"

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), status=st.sampled_from(["completed", "failed", "cancelled", "unknown"]))
    def finish(self, data: st.DataObject, status: Any) -> None:
        attempt, status = self.pick(data), Status(status)
        undecided = tuple(sorted(attempt.sent & set(self.open_calls())))
        if status is Status.UNKNOWN and not undecided:
            return
        if status is Status.COMPLETED:
            if any(call in ONCE and call not in attempt.sent for call in self.open_calls()):
                return
            changes = self.changes(attempt, dict.fromkeys(self.open_calls(), "completed"))
        else:
            changes = Changes()
        end = ending(status, self.task.job_id, undecided)
        self.guarded(attempt, lambda: self.store.finish(attempt.lease, end, changes), settles=status)

    def pick(self, data: st.DataObject) -> Attempt:
        # The newest is the likeliest: the older ones have lost their fence.
        ago = data.draw(st.sampled_from([0, 0, 0, 1, 2]), label="attempts ago")
        index = min(ago, len(self.attempts) - 1)
        return self.attempts[-1 - index]

    def guarded(self, attempt: Attempt, call: Callable[[], Awaitable[Any]], *, settles: Status | None = None) -> Any:
        """A write of an attempt: one whose fence is old, or that has ended, changes nothing (G2)."""
        was, generation = self.state()
        fence = record_of(self.redis, self.task.job_id)["fence"]
        may_settle = settles is Status.COMPLETED and was is Status.UNKNOWN and fence == str(attempt.lease.fence)
        may_write = self.is_current(attempt) or may_settle
        standing = dump(self.redis)
        answer = self.do(call)
        if not may_write:
            assert dump(self.redis) == standing, f"G2: {attempt} changed something"
            assert answer == "lost" or (fence == str(attempt.lease.fence) and was is not Status.RUNNING)
        if self.state()[1] != generation:
            self.begin_generation(None)
        return answer

    # -- time, and the reconciler --------------------------------------------------------------------------------

    @rule()
    def lease_runs_out(self) -> None:
        if self.state()[0] is Status.RUNNING:
            self.redis.hset(f"{root_of(self.task.job_id)}:job:{self.task.job_id}", "lease_until", 1)

    @rule()
    def due_time_comes(self) -> None:
        if self.state()[0] is Status.QUEUED:
            self.redis.hset(f"{root_of(self.task.job_id)}:job:{self.task.job_id}", "not_before", 0)

    @rule(meanwhile=st.booleans())
    def reconcile(self, meanwhile: bool) -> None:
        root = root_of(self.task.job_id)
        if self.redis.zscore(f"{root}:due", self.task.job_id) is not None:
            self.redis.zadd(f"{root}:due", {self.task.job_id: 1})
        partition = partition_of(self.task.job_id)
        for orphan in self.loop.run(self.store.orphans(partition, 10, STUCK_MS)):
            assert orphan.task is not None
            assert orphan.task.generation == self.state()[1]
            if meanwhile:
                self.claim("w3", False, True)
            record = record_of(self.redis, self.task.job_id)
            moved = record["fence"] != str(orphan.fence) or record["status"] != orphan.status
            again = "publish" if orphan.status is Status.QUEUED else "changed"
            verdict = self.do(
                partial(self.store.reclaim, orphan),
                same=partial(lambda again, a, b: b == (again if a == "publish" else "changed"), again),
            )
            assert not moved or verdict == "changed"

    @precondition(lambda self: self.status is Status.RUNNING)
    @rule(meanwhile=st.booleans())
    def overruns(self, meanwhile: bool) -> None:
        root, before = root_of(self.task.job_id), record_of(self.redis, self.task.job_id)
        key = f"{root}:job:{self.task.job_id}"
        lasts = before["lease_until"] != "1"
        self.redis.hset(key, "run_from", 1)
        self.redis.zadd(f"{root}:due", {self.task.job_id: 1})
        found = self.loop.run(self.store.orphans(partition_of(self.task.job_id), 10, STUCK_MS))
        assert [orphan.trouble for orphan in found] == ["overrun" if lasts else "stuck"]
        if meanwhile:
            # Somebody else has the job by now, and begins its time.
            self.redis.hset(key, "lease_until", 1)
            self.redis.hset(key, "run_from", before["run_from"])
            self.claim("w3", False, False)
        verdict = self.do(lambda: self.store.end_overrun(found[0], STUCK_MS), same=lambda _, again: again == "changed")
        assert (verdict == "settled") == (lasts and not meanwhile)
        if self.status is Status.RUNNING:
            self.redis.hset(key, "run_from", before["run_from"])

    # -- at every moment -----------------------------------------------------------------------------------------

    @invariant()
    def everything_agrees(self) -> None:
        check_job(self.redis, self.task.job_id)

    @invariant()
    def the_end_is_the_end(self) -> None:
        status, generation = self.state()
        if generation in self.ended:
            assert status == self.ended[generation], "G3"
        if status is not None and status.terminal:
            self.ended[generation] = status

    @invariant()
    def results_stay(self) -> None:
        _, generation = self.state()
        earlier, now = self.stored.get(generation, {}), results_of(self.redis, self.task.job_id)
        assert earlier.items() <= now.items(), "G4: a result went or changed within a generation"
        self.stored[generation] = now

    @invariant()
    def one_terminal_event_a_generation(self) -> None:
        ends = [event.generation for event in log_of(self.redis, self.task.job_id) if event.ends_stream]
        assert len(ends) == len(set(ends))


async def _await(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()


@pytest.mark.promise("G2")
@pytest.mark.promise("G3")
@pytest.mark.promise("G4")
@pytest.mark.promise("G5")
@pytest.mark.leaves_open_jobs
def test_every_order_of_writes_keeps_the_promises(settings: Settings, redis_url: str) -> None:
    machine = type("TheProtocol", (Protocol,), {"settings_": settings, "url": redis_url})
    run_state_machine_as_test(machine, settings=PROFILE)


PROFILE = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
