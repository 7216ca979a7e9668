"""Checks of jobs' logs, their stored results, the tools' effects and the dead letters."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from typing import Final

from tests.chaos.evidence import ENDS, Evidence, Job, LogEntry
from tests.chaos.findings import Checked, Finding
from tests.chaos.ledger import Entry
from toolfleet.services.background_jobs.task_executor import CONFLICT

DEAD: Final = frozenset({"too_many_starts", "stale"})
"""Error codes of jobs that end as a dead letter."""


def _begins(evidence: Evidence) -> dict[tuple[str, str], list[Entry]]:
    """The effects by job and call."""
    found: defaultdict[tuple[str, str], list[Entry]] = defaultdict(list)
    for effect in evidence.effects:
        if effect["what"] == "begin":
            found[effect["job"], effect["call"]].append(effect)
    return found


def effects(evidence: Evidence) -> Checked:
    """G5: a call that must not run twice has one effect in a generation, and in a later one only where a person said
    so or its failure was known."""
    findings, checked = [], Counter[str]()
    # `failed` is a word as well: a retry runs what has failed.
    said = {(e["job"], e["call"], e["generation"]) for e in evidence.of("asks")
            if e.get("decision") in ("rerun", "failed")}  # fmt: skip
    for (job_id, call), begun in _begins(evidence).items():
        job = evidence.jobs.get(job_id)
        if job is None:
            # Without a record a job runs once, where its API found neither queue nor store: nobody else can know of it.
            text = f"{call} ran {len(begun)} times, and the job has no record"
            findings.extend([Finding("duplicate_effects", "G5", job_id, text)] * (len(begun) - 1))
            continue
        generations = [job.generation_of(effect["attempt"]) for effect in begun]
        if None in generations:
            findings.append(Finding("duplicate_effects", "G5", job_id, f"{call} ran in an attempt without a claim"))
        if call not in job.once:
            continue
        checked["G5"] += 1
        counted = Counter(g for g in generations if g is not None)
        for generation, times in counted.items():
            if times > 1:
                text = f"{call} must not run twice and ran {times} times in generation {generation}"
                findings.extend([Finding("duplicate_effects", "G5", job_id, text)] * (times - 1))
        ordered = sorted(counted)
        for earlier, later in itertools.pairwise(ordered):
            allowed = any((job_id, call, g) in said for g in range(earlier, later))
            if not allowed and not _failed_for_good(job, call, range(earlier, later)):
                text = f"{call} must not run twice and ran in generations {earlier} and {later}, and nobody said so"
                findings.append(Finding("duplicate_effects", "G5", job_id, text))
    return findings, checked


def _failed_for_good(job: Job, call: str, generations: range) -> bool:
    return any(
        e.type == "tool.failed" and e.data.get("tool_call_id") == call and e.generation in generations and _stored(e)
        for e in job.log
    )


def _stored(event: LogEntry) -> bool:
    """Whether a result was stored with this event of a call."""
    if event.type == "tool.completed":
        return True
    return event.type == "tool.failed" and not event.data.get("will_retry") and event.data.get("outcome") != "unknown"


def reruns(evidence: Evidence) -> Checked:
    """G4: no attempt that was started after a call's result was stored has run it again."""
    findings, checked = [], Counter[str]()
    begins = _begins(evidence)
    closed = {(e["job"], e["call"]): e["generation"] for e in evidence.of("person")
              if e.get("decision") == "completed" and e["code"] == 200}  # fmt: skip
    for job in evidence.jobs.values():
        for event in job.log:
            if not _stored(event):
                continue
            call = str(event.data["tool_call_id"])
            checked["G4"] += 1
            for effect in begins.get((job.job_id, call), ()):
                started = job.started_at(effect["attempt"])
                again = job.generation_of(effect["attempt"])
                if started is None or started < event.id:
                    continue
                if again == event.generation or event.type == "tool.completed":
                    text = f"{call} was run by attempt {effect['attempt']}; its result was stored by {event.attempt}"
                    findings.append(Finding("duplicate_effects", "G4", job.job_id, text))
        for (job_id, call), generation in closed.items():
            if job_id != job.job_id:
                continue
            for effect in begins.get((job_id, call), ()):
                if (job.generation_of(effect["attempt"]) or 0) > generation:
                    text = f"{call} was run by attempt {effect['attempt']} after a person had said that it completed"
                    findings.append(Finding("duplicate_effects", "G4", job_id, text))
    return findings, checked


def fences(evidence: Evidence) -> Checked:
    """G2: the log has no hole, fences and generations never fall in it, and every result is of an attempt that told
    of it under its own fence."""
    findings, checked = [], Counter[str]()
    told_to_clients = _results_seen(evidence)
    for job in evidence.jobs.values():
        fence = generation = last = 0
        started: set[int] = set()
        tellers: defaultdict[str, set[int]] = defaultdict(set)
        for event in job.log:
            checked["G2"] += 1
            problem = None
            if event.id != last + 1:
                problem = f"event {event.id} follows on {last}"
            elif event.attempt < fence or event.generation < generation:
                problem = (
                    f"event {event.id} is of attempt {event.attempt} in generation {event.generation}, after one of "
                    f"attempt {fence} in generation {generation}"
                )
            elif event.type.startswith("tool.") and event.attempt not in started:
                problem = f"event {event.id} is of attempt {event.attempt}, which was never started"
            if problem:
                findings.append(Finding("stale_writes", "G2", job.job_id, problem))
            if event.type == "job.started":
                started.add(event.attempt)
            if _stored(event):
                tellers[str(event.data["tool_call_id"])].add(event.attempt)
            last, fence, generation = event.id, event.attempt, event.generation
        for call, attempt in {*job.results.items(), *told_to_clients.get(job.job_id, ())}:
            checked["G2"] += 1
            if attempt and attempt not in tellers[call]:
                text = f"the result of {call} is of attempt {attempt}, the log has it from {sorted(tellers[call])}"
                findings.append(Finding("stale_writes", "G2", job.job_id, text))
    return findings, checked


def _results_seen(evidence: Evidence) -> dict[str, set[tuple[str, int]]]:
    seen: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)
    for view in evidence.of("result"):
        for call, (status, attempt) in view["calls"].items():
            if status in ("completed", "failed") and attempt:
                seen[view["job"]].add((call, attempt))
    return seen


def terminal_events(evidence: Evidence) -> Checked:
    """G3: nothing follows on the end of a generation but the next generation."""
    findings, checked = [], Counter[str]()
    for job in evidence.jobs.values():
        ended: dict[int, LogEntry] = {}
        for event in job.log:
            checked["G3"] += 1
            end = ended.get(event.generation)
            if end is not None:
                text = f"{event.type} ({event.id}) follows on {end.type} ({end.id}) in generation {event.generation}"
                findings.append(Finding("terminal_changed", "G3", job.job_id, text))
            if event.type in ENDS:
                ended.setdefault(event.generation, event)
    return findings, checked


def letters(evidence: Evidence) -> Checked:
    """G9 and G11: one dead letter for each generation that ended as one and for each malformed message, and no job was
    started beyond its limit."""
    findings, checked = [], Counter[str]()
    found: Counter[tuple[str, int | None]] = Counter()
    raw: Counter[str] = Counter()
    for letter in evidence.letters:
        job = evidence.jobs.get(letter.job_id or "")
        if letter.reason in ("malformed", CONFLICT) or job is None:
            raw[letter.payload] += 1
        else:
            found[job.job_id, job.generation_of(letter.attempt)] += 1
    expected: Counter[tuple[str, int | None]] = Counter()
    overtaken: Counter[tuple[str, int | None]] = Counter()
    for job in evidence.jobs.values():
        for event in job.log:
            if event.type == "job.cancelled":
                # The letter stands before the end is written; where its ack was lost, a cancel may come in between.
                overtaken[job.job_id, event.generation] += 1
            error = event.data.get("error") or {}
            if event.type == "job.failed" and isinstance(error, dict) and error.get("code") in DEAD:
                expected[job.job_id, event.generation] += 1
                checked["G9"] += 1
        findings += _starts(job, evidence, checked)
    for (job_id, generation), times in (found - expected - overtaken).items():
        text = f"{times} dead letters too many in generation {generation}"
        findings.append(Finding("letters_repeated", "G9", job_id, text))
    for job_id, generation in expected - found:
        findings.append(Finding("letters_missing", "G9", job_id, f"no dead letter of generation {generation}"))
    for payload in evidence.malformed:
        checked["G11"] += 1
        if raw[payload] == 0:
            findings.append(Finding("letters_missing", "G11", "", f"no dead letter of the message {payload!r}"))
        elif raw[payload] > 1:
            findings.append(Finding("letters_repeated", "G11", "", f"{raw[payload]} of the message {payload!r}"))
    return findings, checked


def _starts(job: Job, evidence: Evidence, checked: Counter[str]) -> list[Finding]:
    """Starts that ended without a word: those that are neither followed by a retry nor handed back nor the last."""
    findings = []
    wordless: Counter[int] = Counter()
    open_start: LogEntry | None = None
    for event in job.log:
        if event.type == "job.started":
            if open_start is not None and open_start.generation == event.generation:
                wordless[event.generation] += 1
            open_start = event
        elif event.type == "job.retrying" or event.data.get("reason") == "handed_back":
            open_start = None
    for generation, times in wordless.items():
        checked["G9"] += 1
        # The start that writes the dead letter may itself be cut off, again and again; no tool is called by it.
        ran = {
            effect["attempt"]
            for effect in evidence.effects
            if effect["job"] == job.job_id and job.generation_of(effect["attempt"]) == generation
        }
        if times > evidence.max_starts and job.kind == "poison" and len(ran) > evidence.max_starts:
            text = (
                f"its tools ran in {len(ran)} attempts of generation {generation}; the limit is {evidence.max_starts}"
            )
            findings.append(Finding("starts_beyond_limit", "G9", job.job_id, text))
    return findings
