"""The job store on Redis: one typed method per function of `lua/`, and the reads."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, Literal

import redis.asyncio as redis
import structlog

from toolfleet.services.background_jobs.errors import (
    InvalidCursor,
    MalformedTask,
    NewerTask,
    StoreUnavailable,
)
from toolfleet.services.background_jobs.ports import (
    CancelAnswer,
    Changes,
    ClaimAnswer,
    JobPage,
    Lease,
    MarkAnswer,
    NotNow,
    Orphan,
    Over,
    RenewAnswer,
    ReopenAnswer,
    RetryAnswer,
    StoreStats,
    TierStats,
    WorkerInfo,
    WriteAnswer,
)
from toolfleet.services.background_jobs.redis_functions import RedisFunctions
from toolfleet.services.background_jobs.redis_records import (
    ROOTS,
    birth_args,
    change_args,
    event_data,
    events_from,
    granted_from,
    payload_of,
    record_from,
    record_of,
    root_of,
)
from toolfleet.services.background_jobs.task_models import (
    ErrorInfo,
    JobEvent,
    JobRecord,
    Millis,
    Status,
    TaskDefinition,
    Tier,
    ToolCall,
    ToolResult,
    is_job_id,
)
from toolfleet.services.background_jobs.transitions import Ending

log = structlog.get_logger(__name__)

WORKERS_ROOT: Final = "tf:{workers}"
"""Heartbeats lie beside the partitions, in a slot of their own."""


class RedisStateManager:
    """`JobStore` on one Redis server."""

    def __init__(
        self,
        client: redis.Redis,
        *,
        timeout_s: float,
        log_max: int,
        result_ttl_s: float,
        max_starts: int,
    ) -> None:
        """Use a client made with ``decode_responses=True``; it stays the caller's to close."""
        self._redis = RedisFunctions(client, timeout_s)
        self.gate = self._redis.gate
        """Whether the server can be used; the one of this process."""
        self._log_max = log_max
        self._ttl_ms = int(result_ttl_s * 1000)
        self._max_starts = max_starts

    async def load(self) -> None:
        """Load the function library; also done on demand."""
        await self._redis.load()

    async def close(self) -> None:
        """Wait for writes that were accepted."""
        await self._redis.close()

    async def ping(self) -> None:
        """Ask the server itself, whatever is known of it. Raises `StoreUnavailable` where it does not serve."""
        await self._redis.ping()

    async def read(self, *command: Any) -> Any:
        """One plain command, for what others keep in the same Redis; in the shared pipeline, bounded, and failing at
        once while the server does not answer. Raises `StoreError`."""
        return await self._redis.read(*command)

    # -- submit and claim --------------------------------------------------------------------------------------

    def _birth(self, task: TaskDefinition) -> tuple[Any, ...]:
        return birth_args(task, task.to_json().decode(), self._log_max, self._ttl_ms)

    async def enqueue(self, task: TaskDefinition) -> tuple[JobRecord, bool]:
        """Make the record of a published task if there is none; answers what stands, and whether it is new."""
        birth = self._birth(task)
        reply = await self._redis.call("enqueue", root_of(task.job_id), task.job_id, *birth, size=len(birth[-1]))
        if reply[0] == "new":
            return record_of(task, int(reply[1]), Status.QUEUED, task.generation), True
        created, status, generation, body_hash = reply[1:]
        if body_hash != task.body_hash:
            # Somebody else's job under this id: the caller compares with what stands there.
            return await self._standing(task.job_id), False
        return record_of(task, int(created), Status(status), int(generation)), False

    async def _standing(self, job_id: str) -> JobRecord:
        record = await self.get(job_id)
        if record is None:
            raise StoreUnavailable(f"the record of {job_id} ended while it was read; ask again")
        return record

    async def claim(
        self, task: TaskDefinition, *, token: str, worker: str, lease_ms: int, published_at: Millis | None
    ) -> ClaimAnswer:
        """Step 3. The same token gets the same answer again."""
        birth = self._birth(task)
        reply = await self._redis.call(
            "claim", root_of(task.job_id), task.job_id, token, worker, lease_ms,
            "" if published_at is None else published_at, self._max_starts, *birth, size=len(birth[-1]),
        )  # fmt: skip
        if reply[0] == "over":
            return Over(reply[1])
        if reply[0] == "later":
            return NotNow(int(reply[1]), reply[2])
        return granted_from(task, reply)

    # -- a running attempt -------------------------------------------------------------------------------------

    async def mark_start(self, lease: Lease, call: ToolCall, lease_ms: int) -> MarkAnswer:
        """Step 4: the start of a call that must not run twice."""
        data = json.dumps({"tool_call_id": call.tool_call_id, "tool_name": call.tool_name, "runs_once": True})
        answer: MarkAnswer = await self._redis.call(
            "mark_start", root_of(lease.job_id), lease.job_id, lease.fence, call.tool_call_id, lease_ms, data
        )
        return answer

    async def withdraw_mark(self, lease: Lease, tool_call_id: str) -> WriteAnswer:
        """Take the mark of a call back that was surely not sent."""
        root = root_of(lease.job_id)
        answer: WriteAnswer = await self._redis.call("withdraw_mark", root, lease.job_id, lease.fence, tool_call_id)
        return answer

    async def progress(self, lease: Lease, changes: Changes, wseq: int) -> WriteAnswer:
        """Store results and events of a running attempt; a repeated `wseq` changes nothing."""
        tail, size = change_args(changes)
        answer: WriteAnswer = await self._redis.call(
            "progress", root_of(lease.job_id), lease.job_id, lease.fence, wseq,
            changes.current_tool or "", changes.stage or "",
            "" if changes.percent is None else f"{changes.percent:.1f}", changes.message or "", *tail, size=size,
        )  # fmt: skip
        return answer

    async def renew(self, leases: Sequence[Lease], lease_ms: int) -> Sequence[RenewAnswer]:
        """Step 5: one function call a partition, all in one pipeline."""
        by_root: defaultdict[str, list[int]] = defaultdict(list)
        for position, lease in enumerate(leases):
            by_root[root_of(lease.job_id)].append(position)

        async def renew_partition(root: str, positions: Sequence[int]) -> list[RenewAnswer]:
            args = [word for p in positions for word in (leases[p].job_id, leases[p].fence)]
            answers: list[RenewAnswer] = await self._redis.call("renew", root, lease_ms, *args)
            return answers

        parts = await asyncio.gather(*(renew_partition(root, positions) for root, positions in by_root.items()))
        renewed: dict[int, RenewAnswer] = {}
        for positions, answers in zip(by_root.values(), parts, strict=True):
            renewed.update(zip(positions, answers, strict=True))
        return [renewed[position] for position in range(len(leases))]

    async def finish(self, lease: Lease, ending: Ending, changes: Changes) -> WriteAnswer:
        """Step 6: everything of a terminal transition at once, under the fence."""
        tail, size = change_args(changes)
        undecided = ending.undecided
        answer: WriteAnswer = await self._redis.call(
            "finish", root_of(lease.job_id), lease.job_id, lease.fence, ending.status.value, ending.event.type.value,
            event_data(ending.event), ending.error.model_dump_json(exclude_none=True) if ending.error else "",
            len(undecided), *undecided, *tail, size=size,
        )  # fmt: skip
        return answer

    async def retry(self, lease: Lease, delay_ms: int, error: ErrorInfo, changes: Changes) -> RetryAnswer:
        """Step 8: back to queued with a due time; a cancel request wins."""
        return await self._leave("retry", lease, delay_ms, error.model_dump_json(exclude_none=True), changes)

    async def hand_back(self, lease: Lease, changes: Changes) -> RetryAnswer:
        """Give the job back unfinished; a cancel request wins."""
        return await self._leave("hand_back", lease, 0, "", changes)

    async def _leave(self, function: str, lease: Lease, delay_ms: int, error: str, changes: Changes) -> RetryAnswer:
        tail, size = change_args(changes)
        answer: RetryAnswer = await self._redis.call(
            function, root_of(lease.job_id), lease.job_id, lease.fence, delay_ms, error, *tail, size=size
        )
        return answer

    # -- control -----------------------------------------------------------------------------------------------

    async def cancel(self, job_id: str, reason: str, task: TaskDefinition | None = None) -> CancelAnswer:
        """Step 10. `task` makes the record where there is none."""
        data = json.dumps({"status": "cancelled", "reason": reason})
        found, status, tier, worker, told = await self._redis.call(
            "cancel", root_of(job_id), job_id, data, *(self._birth(task) if task else ())
        )
        return CancelAnswer(
            found,
            Status(status) if status else None,
            Tier(tier) if tier else None,
            worker or None,
            json.loads(told) if told else {},
        )

    async def reopen(self, job_id: str, reason: str, by: str = "") -> ReopenAnswer:
        """Step 11 for a failed or cancelled job."""
        data = json.dumps({"reason": reason} | ({"by": by} if by else {}))
        return _reopened(await self._redis.call("reopen", root_of(job_id), job_id, data))

    async def redrive(self, letter: TaskDefinition, fence: int, keep_ms: int, note: str, by: str) -> ReopenAnswer:
        """Step 11 for a dead letter; where the record is gone, the letter's task makes a new one."""
        data = json.dumps({"reason": "redrive"} | ({"by": by} if by else {}) | ({"note": note} if note else {}))
        birth = self._birth(renewed(letter, letter.generation + 1))
        reply = await self._redis.call(
            "redrive", root_of(letter.job_id), letter.job_id, letter.generation, fence, data, keep_ms, *birth,
            size=len(birth[-1]),
        )  # fmt: skip
        return _reopened(reply)

    async def resolve(
        self,
        job_id: str,
        tool_call_id: str,
        decision: Literal["rerun", "completed", "failed"],
        result: ToolResult | None,
        note: str,
        by: str = "",
    ) -> ReopenAnswer:
        """Decide one call of an unknown job; the last decision opens the new generation."""
        data = json.dumps({"tool_call_id": tool_call_id, "decision": decision, "note": note, "by": by})
        payload = payload_of(result) if result else ""
        reply = await self._redis.call("resolve", root_of(job_id), job_id, tool_call_id, decision, payload, data)
        return _reopened(reply)

    # -- reads -------------------------------------------------------------------------------------------------

    async def get(self, job_id: str) -> JobRecord | None:
        """The record, or None."""
        fields = _mapping(await self._redis.read("HGETALL", f"{root_of(job_id)}:job:{job_id}"))
        return record_from(job_id, fields) if fields else None

    async def expired(self, job_id: str) -> bool:
        """Whether something still proves that a job of this id ended and its record is gone."""
        return bool(int(await self._redis.call("expired", root_of(job_id), job_id)))

    async def results(self, job_id: str) -> Mapping[str, ToolResult]:
        """The stored results by tool_call_id."""
        stored = _mapping(await self._redis.read("HGETALL", f"{root_of(job_id)}:res:{job_id}"))
        return {call: ToolResult.model_validate_json(payload[1:]) for call, payload in stored.items()}

    async def events(self, job_id: str, after: int = 0, limit: int = 500) -> Sequence[JobEvent]:
        """The log after an id, in order."""
        entries = await self._redis.read(
            "XRANGE", f"{root_of(job_id)}:log:{job_id}", f"({after}-0" if after else "-", "+", "COUNT", limit
        )
        found = [event for entry in entries for event in events_from(job_id, _mapping(entry[1])["e"])]
        # An entry holds the events of one write; its first ones may be known already.
        return [event for event in found if event.id > after]

    async def jobs(
        self, tenant: str, status: Status | None, tier: Tier | None, cursor: str | None, limit: int
    ) -> JobPage:
        """A page of a tenant's jobs, newest first; the cursor is ``<created>_<job_id>`` of the last job given."""
        edge = _parse_cursor(cursor)
        found: list[JobRecord] = []
        while len(found) <= limit:
            ids = await self._page_of_ids(status, tier, edge, limit + 1)
            if not ids:
                break
            records = await self._records([job_id for _, job_id in ids])
            found += [r for r in records if r.task.tenant == tenant and status in (None, r.status)]
            edge = ids[-1]
        page = found[:limit]
        more = len(found) > limit
        return JobPage(page, f"{page[-1].created_at}_{page[-1].job_id}" if more else None)

    async def _page_of_ids(
        self, status: Status | None, tier: Tier | None, edge: tuple[int, str] | None, limit: int
    ) -> list[tuple[int, str]]:
        """The newest ids below an edge, by (creation time, id), merged from all partitions."""
        commands = [
            ("ZREVRANGEBYSCORE", f"{root}:ix:{t}:{s}", edge[0] if edge else "+inf", "-inf", "WITHSCORES",
             "LIMIT", 0, limit + (MAX_SAME_MILLISECOND if edge else 0))
            for root in ROOTS
            for t in ([tier] if tier else Tier)
            for s in ([status] if status else Status)
        ]  # fmt: skip
        merged: list[tuple[int, str]] = []
        for answer in await self._redis.read_all(commands):
            merged += [(int(float(score)), job_id) for job_id, score in _scored(answer)]
        merged.sort(reverse=True)
        return [item for item in merged if edge is None or item < edge][:limit]

    async def _records(self, job_ids: Sequence[str]) -> list[JobRecord]:
        answers = await self._redis.read_all([("HGETALL", f"{root_of(i)}:job:{i}") for i in job_ids])
        pairs = zip(job_ids, map(_mapping, answers), strict=True)
        return [record_from(job_id, fields) for job_id, fields in pairs if fields]

    async def stats(self) -> StoreStats:
        """Counts and ages over all partitions."""
        replies = await asyncio.gather(*(self._redis.call("stats", root) for root in ROOTS))
        queued: defaultdict[Tier, list[int]] = defaultdict(lambda: [0, 0, 0])
        totals: defaultdict[str, int] = defaultdict(int)
        minute = quarter = 0
        for reply in replies:
            for at in (0, 4, 8):
                figures = queued[Tier(reply[at])]
                figures[0] += int(reply[at + 1])
                figures[1] += int(reply[at + 2])
                figures[2] = max(figures[2], int(reply[at + 3]))
            minute += int(reply[12])
            quarter += int(reply[13])
            for name, number in _pairs(reply[14:]).items():
                totals[name] += int(number)
        tiers = {tier: TierStats(*queued[tier]) for tier in Tier}
        by_status = {status: totals[status.value] for status in Status if status.terminal}
        by_status[Status.QUEUED] = sum(t.queued for t in tiers.values())
        by_status[Status.RUNNING] = sum(t.running for t in tiers.values())
        return StoreStats(tiers, by_status, minute, quarter, totals["leases_lost"])

    # -- upkeep ------------------------------------------------------------------------------------------------

    async def orphans(self, partition: int, limit: int, stuck_ms: int) -> Sequence[Orphan]:
        """Jobs of a partition that are to be looked at."""
        reply = await self._redis.call("orphans", ROOTS[partition], limit, stuck_ms)
        found = []
        for at in range(0, len(reply), 6):
            job_id, status, generation, fence, task, trouble = reply[at : at + 6]
            try:
                definition = _renewed(task, int(generation)) if task else None
            except (MalformedTask, NewerTask) as error:
                # A newer worker looks after it, or a person: nothing that is here can publish it.
                log.warning("store.orphan_unreadable", job_id=job_id, error=str(error))
                continue
            found.append(Orphan(job_id, Status(status), int(generation), int(fence), definition, trouble))
        return found

    async def reclaim(self, orphan: Orphan) -> Literal["publish", "settled", "changed"]:
        """Step 12 for a job that is not in the stream."""
        answer: Literal["publish", "settled", "changed"] = await self._redis.call(
            "reclaim", root_of(orphan.job_id), orphan.job_id, orphan.status.value, orphan.generation, orphan.fence,
            orphan.trouble,
        )  # fmt: skip
        return answer

    async def end_overrun(self, orphan: Orphan, stuck_ms: int) -> Literal["settled", "changed"]:
        """Step 12 for a run that its worker should have ended."""
        answer: Literal["settled", "changed"] = await self._redis.call(
            "end_overrun", root_of(orphan.job_id), orphan.job_id, orphan.generation, orphan.fence, stuck_ms
        )
        return answer

    async def prune(self, partition: int, limit: int) -> int:
        """Drop expired jobs from the indexes."""
        return int(await self._redis.call("prune", ROOTS[partition], limit))

    async def heartbeat(self, info: WorkerInfo, ttl_s: float) -> None:
        """Say that a worker is alive, by Redis' clock."""
        await self._redis.call("heartbeat", WORKERS_ROOT, info.worker_id, int(ttl_s * 1000), json.dumps(asdict(info)))

    async def retire(self, worker_id: str) -> None:
        """A worker has ended in order."""
        await self._redis.read("HDEL", f"{WORKERS_ROOT}:beats", worker_id)

    async def workers(self) -> Sequence[WorkerInfo]:
        """The workers whose heartbeat has not run out."""
        reply = await self._redis.call("workers", WORKERS_ROOT)
        alive = []
        for seen, text in zip(reply[::2], reply[1::2], strict=True):
            values = json.loads(text)
            alive.append(WorkerInfo(**{**values, "tier": Tier(values["tier"]), "seen_at": int(seen)}))
        return sorted(alive, key=lambda w: w.worker_id)

    async def stream_identity(self, stream: str, created: str) -> str:
        """The creation time of the task stream that this store belongs to; the first one to ask sets it."""
        await self._redis.read("SETNX", f"tf:stream:{stream}", created)
        known: str = await self._redis.read("GET", f"tf:stream:{stream}")
        return known

    async def adopt_stream(self, stream: str, created: str) -> None:
        """From now on this store belongs to a stream that was made anew."""
        await self._redis.read("SET", f"tf:stream:{stream}", created)

    async def server_info(self) -> Mapping[str, str]:
        """What `doctor` and the start-up check want to know of the server: version and durability settings."""
        info, aof, fsync, policy = await self._redis.read_all(
            [
                ("INFO", "server"),
                ("CONFIG", "GET", "appendonly"),
                ("CONFIG", "GET", "appendfsync"),
                ("CONFIG", "GET", "maxmemory-policy"),
            ]
        )
        values = info if isinstance(info, dict) else _info(info)
        found = {**_mapping(aof), **_mapping(fsync), **_mapping(policy)}
        found["version"] = str(values.get("valkey_version") or values.get("redis_version", "?"))
        found["server"] = str(values.get("server_name", "redis"))
        return found


MAX_SAME_MILLISECOND: Final = 200
"""Jobs of one index made in one millisecond that a page may have to step over; the cursor's score includes them."""


def _info(text: str) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, value in pairs}


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _mapping(answer: Any) -> dict[str, str]:
    """HGETALL and its kin: a map where the client has parsed it, a flat list where it has not."""
    return dict(answer) if isinstance(answer, dict) else _pairs(answer or ())


def _scored(answer: Sequence[Any]) -> list[tuple[str, Any]]:
    if answer and isinstance(answer[0], (list, tuple)):
        return [(pair[0], pair[1]) for pair in answer]
    return list(_pairs(answer).items())


def renewed(task: TaskDefinition, generation: int) -> TaskDefinition:
    """A task as the message of a generation; what bounds the first one's start is left out."""
    if generation == task.generation:
        return task
    return task.model_copy(update={"generation": generation, "delay_ms": 0, "run_at": None, "expires_at": None})


def _renewed(task: str, generation: int) -> TaskDefinition:
    return renewed(TaskDefinition.from_json(task), generation)


def _reopened(reply: Sequence[Any]) -> ReopenAnswer:
    verdict, status, task = reply[:3]
    definition = _renewed(task, int(reply[3])) if task else None
    generation = int(reply[3]) if len(reply) > 3 else 0
    return ReopenAnswer(verdict, Status(status) if status else None, definition, generation)


def _parse_cursor(cursor: str | None) -> tuple[int, str] | None:
    if not cursor:
        return None
    created, _, job_id = cursor.partition("_")
    if not (created.isascii() and created.isdigit() and len(created) <= 15 and is_job_id(job_id)):
        raise InvalidCursor
    return int(created), job_id
