"""All that is known of one job, in one text: for whoever looks into a failed run."""

from __future__ import annotations

import json
from pathlib import Path

from tests.chaos.audit import Verdict
from tests.chaos.evidence import Evidence


def case_file(job_id: str, evidence: Evidence, verdict: Verdict, folder: Path) -> str:
    """Findings, log, results, effects, what clients saw, and the lines of the processes' logs that name the job."""
    parts = [f"# {job_id}"]
    parts += [f"{f.promise} {f.figure}: {f.text}" for f in verdict.findings if f.job_id == job_id]
    job = evidence.jobs.get(job_id)
    if job is None:
        parts.append("no record")
    else:
        parts.append(f"\n## record: {job.kind}, {job.status}, generation {job.generation}, once {sorted(job.once)}")
        parts += [f"{e.id} g{e.generation} a{e.attempt} {e.type} {json.dumps(dict(e.data))}" for e in job.log]
        parts.append(f"results by attempt: {dict(job.results)}")
    parts.append("\n## effects")
    parts += [json.dumps(effect) for effect in evidence.effects if effect["job"] == job_id]
    parts.append("\n## dead letters")
    parts += [str(letter) for letter in evidence.letters if letter.job_id == job_id]
    parts.append("\n## what clients saw, with the faults")
    numbers = {view["n"] for view in evidence.views if view.get("job") == job_id and "n" in view}
    parts += [
        json.dumps(view)
        for view in evidence.views
        if view.get("job") == job_id or view.get("n") in numbers or view["k"] in ("fault", "healed")
    ]
    parts.append("\n## logs")
    for path in sorted(folder.glob("*.log")):
        parts += [f"{path.stem}: {line}" for line in path.read_text(errors="replace").splitlines() if job_id in line]
    return "\n".join(parts) + "\n"
