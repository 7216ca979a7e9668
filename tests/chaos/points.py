"""The places at which a process can be stopped or killed: between any two steps of the way of a job."""

from __future__ import annotations

from typing import Final

from tests.chaos.weaving import Point

_JOBS = "services.background_jobs"
_SUBMISSION = f"{_JOBS}.submission"
_EXECUTOR = f"{_JOBS}.task_executor"
_ATTEMPT = f"{_JOBS}.attempt"
_CONTROL = f"{_JOBS}.job_control"
_REOPENING = f"{_JOBS}.reopening"
_RECONCILER = f"{_JOBS}.reconciler"

POINTS: Final[dict[str, Point]] = {
    # Step 1, in the API.
    "before-publish": Point(_SUBMISSION, "Submitter.submit", "before", "self._queue.publish"),
    "after-publish-ack-before-enqueue": Point(_SUBMISSION, "Submitter.submit", "after", "self._queue.publish"),
    "after-enqueue-before-202": Point(_SUBMISSION, "Submitter._enqueue", "after", "self._store.enqueue"),
    # Steps 2 and 3.
    "after-delivery-before-claim": Point(_EXECUTOR, "JobExecutor.execute", "before", "self._claim"),
    "after-claim-before-run": Point(_EXECUTOR, "JobExecutor.execute", "before", "self._attempt"),
    "after-sync-claim-before-run": Point(_EXECUTOR, "JobExecutor.run_now", "before", "self._attempt"),
    # Step 4. The marks are those of calls that must not run twice.
    "before-start-mark": Point(_ATTEMPT, "Attempt._begin", "before", "self._gate.insist"),
    "after-start-mark-before-last-check": Point(_ATTEMPT, "Attempt._begin", "after", "self._gate.insist"),
    "after-last-check-before-call": Point(_ATTEMPT, "Attempt._before_send", "before", "self._sent.add"),
    "after-effect-before-result": Point(f"{_JOBS}.call_run", "run_call", "after", "runner.run"),
    "before-progress-write": Point(f"{_JOBS}.attempt_log", "AttemptLog._flush", "before", "self._gate.insist"),
    "after-progress-write": Point(f"{_JOBS}.attempt_log", "AttemptLog._flush", "after", "self._gate.insist"),
    # Step 5.
    "before-renewal": Point(f"{_JOBS}.task_lease", "LeaseKeeper._renew_leases", "before", "self._store.renew"),
    # Steps 6 to 8.
    "before-finish": Point(_EXECUTOR, "JobExecutor._settle", "before", "_ending"),
    "after-finish-before-ack": Point(_EXECUTOR, "JobExecutor._settle", "before", "delivery.ack"),
    "before-retry": Point(_EXECUTOR, "JobExecutor._settle", "before", "self._rules.retries.delay_ms"),
    "after-retry-before-nak": Point(_EXECUTOR, "JobExecutor._settle", "before", "delivery.nak"),
    # Step 9.
    "before-dead-letter": Point(_EXECUTOR, "JobExecutor._dead", "before", "self._bury"),
    "after-dead-letter-before-finish": Point(_EXECUTOR, "JobExecutor._dead", "after", "self._bury"),
    "after-dead-finish-before-ack": Point(
        _EXECUTOR, "JobExecutor._settle", "before", "delivery.ack", when="attempt._granted.dead is not None"
    ),
    # Steps 10 and 11, in the API.
    "after-cancel-before-purge": Point(_CONTROL, "JobControl.cancel", "before", "self._purge"),
    "after-reopen-before-purge": Point(_REOPENING, "publish_generation", "before", "queue.purge"),
    "after-purge-before-publish": Point(_REOPENING, "publish_generation", "before", "queue.publish"),
    # Step 12.
    "after-orphan-before-reclaim": Point(_RECONCILER, "Reconciler._recover", "before", "self._store.reclaim"),
    "after-reclaim-before-publish": Point(_RECONCILER, "Reconciler._recover", "before", "self._queue.publish"),
}
"""By name. ``tests/chaos/test_weaving.py`` holds them against the source."""

API_POINTS: Final = (
    *(name for name, point in POINTS.items() if point.module in (_SUBMISSION, _CONTROL, _REOPENING)),
    "after-sync-claim-before-run",
)
"""Those that an API comes to. The others are a worker's; an API comes to some of them in a synchronous run as well."""

BEYOND_PROTOCOL: Final = frozenset({"after-last-check-before-call"})
"""A process that is stopped here past its lease makes a call that it no longer may: nothing but the tool can tell (G5).
Killing it here is harmless."""
