"""What was acknowledged, against what is there after the power came back. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

from tests.powercut.ledger import Note
from tests.powercut.servers import CONTROL

TERMINAL: Final = frozenset({"completed", "failed", "cancelled", "unknown"})


@dataclass(frozen=True, slots=True)
class Found:
    """A job as it stands at the end; `status` is None where nobody knows it."""

    status: str | None
    results: Mapping[str, str] = field(default_factory=dict)
    """The text of each stored result by tool_call_id."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Counts. Those of `LOST` must be 0 where the servers keep what they acknowledge."""

    accepted: int
    """Jobs with a 202."""
    results: int
    """Results whose write was answered before the cut."""
    seen_over: int
    """Jobs that a client or a worker knew to be over before the cut."""
    open_at_cut: int
    """Jobs that had to be brought to their end afterwards."""
    jobs_lost: int
    """Accepted, and unknown afterwards or never brought to an end."""
    results_lost: int
    """Acknowledged, and gone or another one afterwards."""
    terminal_changed: int
    """Known to be over with one status, and afterwards with another or none."""
    rerun_after_result: int
    """Effects of a call after the cut whose result was acknowledged before it."""
    duplicate_effects: int
    """Effects of a call that must not run twice, beyond its first."""
    ended: Mapping[str, int]
    """Accepted jobs by their status at the end; an `unknown` one had such a call under way at the cut."""

    def as_json(self) -> dict[str, object]:
        """For the last line of a report."""
        return asdict(self)


LOST: Final = ("jobs_lost", "results_lost", "terminal_changed", "rerun_after_result", "duplicate_effects")


def audit(notes: Iterable[Note], found: Mapping[str, Found], *, cut_at: int) -> Figures:
    """Compare.

    Args:
        notes: of all ledgers, by time.
        found: each accepted job as it stands at the end.
        cut_at: when the power went, on the ledgers' clock.
    """
    accepted: set[str] = set()
    seen: dict[str, str] = {}
    results: dict[tuple[str, str], str] = {}
    effects: Counter[tuple[str, str]] = Counter()
    rerun = duplicates = 0
    for note in notes:
        job, before = note["job"], note["at"] <= cut_at
        match note["what"]:
            case "accepted":
                accepted.add(job)
            case "seen" if before:
                seen[job] = note["status"]
            case "result" if before:
                results[job, note["call"]] = note["text"]
            case "effect":
                call = (job, note["call"])
                effects[call] += 1
                duplicates += note["once"] and effects[call] > 1
                rerun += not before and call in results
    nothing = Found(None)
    ends = {job: found.get(job, nothing).status for job in accepted}
    return Figures(
        accepted=len(accepted),
        results=len(results),
        seen_over=len(seen),
        open_at_cut=len(accepted - seen.keys()),
        jobs_lost=sum(status not in TERMINAL for status in ends.values()),
        results_lost=sum(found.get(job, nothing).results.get(call) != text for (job, call), text in results.items()),
        terminal_changed=sum(found.get(job, nothing).status != status for job, status in seen.items()),
        rerun_after_result=rerun,
        duplicate_effects=duplicates,
        ended=dict(sorted(Counter(status or "lost" for status in ends.values()).items())),
    )


def verdict(settings: str, figures: Figures, jobs: int) -> list[str]:
    """Why a run fails; empty where it is as it must be. The control has to lose something, or nothing was tested."""
    counts = {name: int(getattr(figures, name)) for name in LOST}
    wrong = []
    if figures.accepted < jobs:
        wrong.append(f"{settings}: only {figures.accepted} of {jobs} jobs were acknowledged before the cut")
    if not figures.results or not figures.open_at_cut:
        wrong.append(f"{settings}: at the cut there was no result yet, or no job left to do: it proves nothing")
    if settings == CONTROL:
        if not figures.jobs_lost and not figures.results_lost:
            wrong.append(
                "default: the control lost nothing, so the cut cuts nothing and the other figures prove nothing"
            )
    else:
        wrong += [f"{settings}: {name} is {count} and must be 0" for name, count in counts.items() if count]
    return wrong
