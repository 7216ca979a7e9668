"""Holds what a run left behind against the promises. Pure: `audit` reads an `Evidence` and nothing else.

Everything is counted within a generation: what a person has opened again is a life of its own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from tests.chaos import audit_logs, audit_views
from tests.chaos.evidence import TERMINAL, Evidence
from tests.chaos.findings import Finding

CHECKS: Final = (
    audit_logs.effects,
    audit_logs.reruns,
    audit_logs.fences,
    audit_logs.terminal_events,
    audit_logs.letters,
    audit_views.statuses,
    audit_views.streams,
    audit_views.keys,
    audit_views.refusals,
)
MUST_BE_ZERO: Final = (
    "lost", "duplicate_effects", "stale_writes", "terminal_changed", "stream_gaps", "stream_repeats", "left_in_stream",
    "left_leases", "letters_missing", "letters_repeated", "starts_beyond_limit", "ran_though_refused", "wrong_answers",
    "silent", "bad_exits", "slow_cancels",
)  # fmt: skip
SLOW_CANCEL_MS: Final = 1000.0
"""Issue 3: p99 of cancel receipts, with Redis up."""
PROMISES: Final = {
    "G1": "jobs that were accepted have ended",
    "G2": "events and results are of the attempt that could write them",
    "G3": "ends of a generation that were seen are one",
    "G4": "calls with a stored result were not run again",
    "G5": "calls that must not run twice ran once",
    "G6": "Idempotency-Keys gave one job each",
    "G7": "events reached stream clients once and in order",
    "G8": "cancels were answered with how far they got",
    "G9": "poisoned jobs ended as one dead letter within their starts",
    "G10": "processes left in order after SIGTERM",
    "G11": "bad jobs were refused and malformed messages became one dead letter each",
    "G12": "refusals and synchronous runs while the queue was down, none silent",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of an audit."""

    accepted: int
    terminal: int
    findings: tuple[Finding, ...]
    checked: Counter[str] = field(default_factory=Counter)
    """How often each promise was looked at."""

    @property
    def figures(self) -> dict[str, int]:
        """What must be zero."""
        counted = Counter(finding.figure for finding in self.findings)
        return {name: counted[name] for name in MUST_BE_ZERO}

    @property
    def passed(self) -> bool:
        return not self.findings


def audit(evidence: Evidence) -> Verdict:
    """Look at everything."""
    accepted = {view["job"] for view in evidence.of("accepted")}
    ended = {job for job in accepted if job in evidence.jobs and evidence.jobs[job].status in TERMINAL}
    ended |= _ran_unrecorded(evidence)
    checked: Counter[str] = Counter({"G1": len(accepted), "G8": len(evidence.of("cancel")), "G10": evidence.terms})
    findings = [*_lost(accepted - ended, evidence), *_left(evidence), *_noted(evidence)]
    for check in CHECKS:
        found, looked_at = check(evidence)
        findings += found
        checked.update(looked_at)
    return Verdict(len(accepted), len(ended), tuple(findings), checked)


def _ran_unrecorded(evidence: Evidence) -> set[str]:
    """With queue and store down a synchronous run answers its caller and nobody else ever knows it."""
    return {
        view["job"]
        for view in evidence.of("accepted")
        if view["code"] == 200 and view.get("degraded") and view["status"] in TERMINAL
    }


def _lost(missing: set[str], evidence: Evidence) -> Iterator[Finding]:
    for job_id in sorted(missing):
        job = evidence.jobs.get(job_id)
        state = f"is {job.status} in generation {job.generation}" if job else "has no record"
        yield Finding("lost", "G1", job_id, f"it was accepted and {state} after everything was healed")


def _left(evidence: Evidence) -> Iterator[Finding]:
    if evidence.left_in_stream:
        text = f"{evidence.left_in_stream} messages stand in the stream when nothing is left to do"
        yield from [Finding("left_in_stream", "G1", "", text)] * evidence.left_in_stream
    if evidence.left_running:
        text = f"{evidence.left_running} jobs still hold a lease when nothing is left to do"
        yield from [Finding("left_leases", "G1", "", text)] * evidence.left_running
    # Jobs that nobody was promised, such as those of a client whose submit broke off, must end as well.
    accepted = {view["job"] for view in evidence.of("accepted")}
    for job in evidence.jobs.values():
        if job.status not in TERMINAL and job.job_id not in accepted:
            yield Finding("lost", "G1", job.job_id, f"it has a record and is {job.status} at the end")


def _noted(evidence: Evidence) -> Iterator[Finding]:
    for text in evidence.wrong:
        promise, _, what = text.partition(" ")
        yield Finding("wrong_answers", promise, _job_in(what), what)
    for text in evidence.silent:
        yield Finding("silent", "G12", _job_in(text), text)
    for text in evidence.bad_exits:
        yield Finding("bad_exits", "G10", "", text)
    p99 = evidence.calm_cancel_p99_ms
    if p99 is not None and p99 >= SLOW_CANCEL_MS:
        yield Finding("slow_cancels", "G8", "", f"p99 of undisturbed cancel receipts is {p99:.0f} ms")


def _job_in(text: str) -> str:
    return next((word.strip(":,/") for word in text.replace("/", " ").split() if word.startswith("job_")), "")


def lines(verdict: Verdict) -> list[str]:
    """One line a promise, and one a finding."""
    broken: defaultdict[str, int] = defaultdict(int)
    for finding in verdict.findings:
        broken[finding.promise] += 1
    told = [
        f"{name:<4}{'BROKEN' if broken[name] else 'kept  '} {text}: {verdict.checked[name]} looked at"
        + (f", {broken[name]} broken" if broken[name] else "")
        for name, text in PROMISES.items()
    ]
    return told + [f"  {f.promise} {f.figure} {f.job_id} {f.text}" for f in verdict.findings]
