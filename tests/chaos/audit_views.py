"""Checks of what clients saw, against each other and against the logs."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Final

from tests.chaos.evidence import ENDS, TERMINAL, Evidence
from tests.chaos.findings import Checked, Finding

LATE_S: Final = 15.0
"""An answer that was true when it was made may be this late: links are slow, and lines of a ledger cross."""


def statuses(evidence: Evidence) -> Checked:
    """G3: all that was seen of the end of a generation, by anybody, is one status, and nobody saw it open later."""
    checked: Counter[str] = Counter()
    seen: defaultdict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for job in evidence.jobs.values():
        for event in job.log:
            if event.type in ENDS:
                seen[job.job_id, event.generation][event.type.removeprefix("job.")] = float("inf")
        if job.status in TERMINAL:
            seen[job.job_id, job.generation].setdefault(job.status, float("inf"))
    # What was accepted while Redis was away says nothing of a job that may stand there already.
    views = [v for v in evidence.views if v["k"] in ("poll", "result", "accepted") and not v.get("degraded")]
    for view in views:
        if view["status"] in TERMINAL:
            checked["G3"] += 1
            first = seen[view["job"], view["generation"]]
            first[view["status"]] = min(view["t"], first.get(view["status"], float("inf")))
    findings = [
        Finding("terminal_changed", "G3", job_id, f"generation {generation} was seen as {' and '.join(sorted(ends))}")
        for (job_id, generation), ends in seen.items()
        if len(ends) > 1
    ]
    for view in views:
        ends = seen.get((view["job"], view["generation"]), {})
        ended_at = min(ends.values(), default=float("inf"))
        if view["status"] in ("queued", "running") and view["t"] > ended_at + LATE_S:
            text = f"generation {view['generation']} was seen as {view['status']} long after its end"
            findings.append(Finding("terminal_changed", "G3", view["job"], text))
    return findings, checked


def streams(evidence: Evidence) -> Checked:
    """G7: each client has every event from where it began, once, in order, as it stands in the log, up to an end."""
    findings, checked = [], Counter[str]()
    last: dict[int, int] = {}
    jobs: dict[int, str] = {}
    logs = {job_id: {entry.id: entry for entry in job.log} for job_id, job in evidence.jobs.items()}
    for view in evidence.views:
        if view["k"] == "connect":
            last.setdefault(view["client"], view["after"])
            jobs[view["client"]] = view["job"]
        if view["k"] != "event":
            continue
        client, job_id, event_id = view["client"], view["job"], view["id"]
        if event_id is None:
            findings.append(
                Finding("stream_gaps", "G7", job_id, f"client {client} was told of a gap after {last[client]}")
            )
            continue
        checked["G7"] += 1
        if event_id <= last[client]:
            text = f"client {client} got event {event_id} after {last[client]}"
            findings.append(Finding("stream_repeats", "G7", job_id, text))
        elif event_id > last[client] + 1:
            text = f"client {client} got event {event_id} after {last[client]}"
            findings.append(Finding("stream_gaps", "G7", job_id, text))
        entry = logs.get(job_id, {}).get(event_id)
        if entry is None or (entry.type, entry.attempt) != (view["type"], view["attempt"]):
            stands = f"{entry.type} of attempt {entry.attempt}" if entry else "nothing"
            text = (
                f"client {client} got {view['type']} of attempt {view['attempt']} as {event_id}; the log has {stands}"
            )
            findings.append(Finding("stale_writes", "G7", job_id, text))
        last[client] = max(event_id, last[client])
    for client, job_id in jobs.items():
        entry = logs.get(job_id, {}).get(last[client])
        if entry is None or entry.type not in ENDS:
            text = f"client {client} never got an end; its last event is {last[client]}"
            findings.append(Finding("stream_gaps", "G7", job_id, text))
    return findings, checked


def keys(evidence: Evidence) -> Checked:
    """G6: one key, one job; one plan, one job."""
    by_key: defaultdict[str, set[str]] = defaultdict(set)
    for view in evidence.of("accepted"):
        by_key[view["key"]].add(view["job"])
    findings = [
        Finding("wrong_answers", "G6", sorted(ids)[0], f"the Idempotency-Key {key} gave the jobs {sorted(ids)}")
        for key, ids in by_key.items()
        if len(ids) > 1
    ]
    return findings, Counter({"G6": len(evidence.of("accepted"))})


def refusals(evidence: Evidence) -> Checked:
    """G12 and G11: who was told that nothing was accepted, and left it at that, has no job."""
    checked: Counter[str] = Counter()
    accepted = {view["n"] for view in evidence.of("accepted")}
    doubtful = {view["n"] for view in evidence.of("refused") if view["accepted"] == "unknown"}
    doubtful |= {view["n"] for view in evidence.of("unanswered")}
    findings = []
    ran = {effect["job"] for effect in evidence.effects}
    refused: dict[int, str | None] = {}
    for view in evidence.of("refused"):
        checked["G12" if view["code"] in (429, 503) else "G11"] += 1
        refused[view["n"]] = view.get("job")
    checked["G12"] += sum(1 for view in evidence.of("accepted") if view.get("fallback"))
    for number, job_id in refused.items():
        if number in accepted or number in doubtful or job_id is None:
            continue
        if job_id in evidence.jobs or job_id in ran:
            text = f"job {number} was refused, and its client left it at that; it is there all the same"
            findings.append(Finding("ran_though_refused", "G12", job_id, text))
    return findings, checked
