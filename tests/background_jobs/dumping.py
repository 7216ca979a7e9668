"""All that Redis holds, as plain values, and what must be true of it at every moment."""

from __future__ import annotations

from typing import Any

from toolfleet.services.background_jobs.redis_records import ROOTS, events_from, root_of
from toolfleet.services.background_jobs.task_models import JobEvent, Status, Tier

Dump = dict[str, Any]

INDEXES = (":due", ":expiry", ":totals", ":beats")
"""Keys without TTL by design, by their ends; with them `ix` sets and the streams' identities."""

_READ = {
    "string": lambda client, key: client.get(key),
    "hash": lambda client, key: client.hgetall(key),
    "zset": lambda client, key: dict(client.zrange(key, 0, -1, withscores=True)),
    "stream": lambda client, key: client.xrange(key),
}


def dump(client: Any, *, without_leases: bool = False) -> Dump:
    """Every key with its value, and whether it has a TTL. A renewal changes nothing but `lease_until`."""
    found: Dump = {}
    for key in sorted(client.scan_iter(count=1000)):
        kind = client.type(key)
        value = _READ[kind](client, key)
        if without_leases and kind == "hash":
            value.pop("lease_until", None)
        found[key] = (value, client.ttl(key) >= 0)
    return found


def record_of(client: Any, job_id: str) -> dict[str, str]:
    """A record's hash; empty where there is none."""
    fields: dict[str, str] = client.hgetall(f"{root_of(job_id)}:job:{job_id}")
    return fields


def results_of(client: Any, job_id: str) -> dict[str, str]:
    """The stored results as they lie there: a letter, then JSON."""
    stored: dict[str, str] = client.hgetall(f"{root_of(job_id)}:res:{job_id}")
    return stored


def log_of(client: Any, job_id: str) -> list[JobEvent]:
    """The whole log."""
    entries = client.xrange(f"{root_of(job_id)}:log:{job_id}")
    return [event for _, fields in entries for event in events_from(job_id, fields["e"])]


def check_job(client: Any, job_id: str) -> None:
    """Record, results, log and indexes of a job agree."""
    root, record, results = root_of(job_id), record_of(client, job_id), results_of(client, job_id)
    indexed = {
        (tier, status)
        for tier in Tier
        for status in Status
        if client.zscore(f"{root}:ix:{tier}:{status}", job_id) is not None
    }
    expiry = [member for member in client.zrange(f"{root}:expiry", 0, -1) if member.endswith(f":{job_id}")]
    if not record:
        assert not indexed
        assert not expiry
        return
    status, tier = Status(record["status"]), record["tier"]
    assert indexed == {(tier, status)}, f"{job_id} is {status} and stands in {indexed}"

    ids = [event.id for event in log_of(client, job_id)]
    assert ids == list(range(1, len(ids) + 1)), f"the log's ids are {ids}"
    assert record["seq"] == str(len(ids))

    outcomes = [payload[0] for payload in results.values()]
    counts = (int(record.get("done", 0)), int(record.get("failed", 0)))
    assert counts == (outcomes.count("c"), outcomes.count("f")), f"{counts} counted, stored {results}"

    keys = [key for key in (f"{root}:{kind}:{job_id}" for kind in ("job", "log", "res")) if client.exists(key)]
    with_ttl = [key for key in keys if client.ttl(key) >= 0]
    due = client.zscore(f"{root}:due", job_id)
    if status.terminal:
        assert with_ttl == keys, f"{status}, and no TTL on {set(keys) - set(with_ttl)}"
        assert expiry == [f"{tier}:{status}:{job_id}"]
        assert due is None, f"{status}, and the reconciler is to look at it"
    else:
        assert with_ttl == [], f"{status}, and a TTL on {with_ttl}"
        assert expiry == []
        assert due is not None, f"{status}, and the reconciler will never look at it"


def leaks(client: Any, *, open_jobs_are_fine: bool = False) -> list[str]:
    """Keys that nothing will ever remove."""
    found = []
    for key in client.scan_iter(count=1000):
        if client.ttl(key) >= 0 or key.endswith(INDEXES) or ":ix:" in key or key.startswith("tf:stream:"):
            continue
        root, _, rest = key.partition("}:")
        job_id = rest.partition(":")[2]
        if f"{root}}}" in ROOTS and client.exists(f"{root}}}:job:{job_id}"):
            status = client.hget(f"{root}}}:job:{job_id}", "status")
            if status is not None and not Status(status).terminal and open_jobs_are_fine:
                continue
        found.append(key)
    return sorted(found)
