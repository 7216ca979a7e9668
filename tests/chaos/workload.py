"""What is asked of the fleet: jobs of every kind, a pure function of the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Final, Literal

SERVERS: Final = ("web", "reg", "std")
"""Tool servers: over HTTP, over HTTP and found by Consul where there is one, over stdio."""


@dataclass(frozen=True, slots=True)
class JobPlan:
    """One job and how its clients treat it. Times are in seconds."""

    number: int
    at_s: float
    kind: str
    body: dict[str, Any]
    key: str | None
    """The Idempotency-Key; None lets the API make one."""
    twins: int = 0
    """Further submits with the same key at the same moment."""
    again_after_s: float | None = None
    """One more submit with the same key, later."""
    gives_up: bool = False
    """Whether a word that nothing was accepted ends it."""
    conflict: bool = False
    """One more submit with the same key and another body, which must be refused."""
    watchers: int = 0
    """Stream clients."""
    drops: bool = False
    """Whether they go and come back at random."""
    polls: bool = False
    cancel_after_s: float | None = None
    person: bool = False
    """Whether a person acts on its end: retries, decides, redrives."""
    calls: dict[str, Literal["once", "repeatable"]] = field(default_factory=dict)
    """By tool_call_id."""


@dataclass(frozen=True, slots=True)
class RawMessage:
    """A message that is no task, published into the stream past the API."""

    at_s: float
    tier: str
    payload: str


# Shares out of 1000 jobs.
_KINDS: Final = {
    "short": 300, "many": 120, "long": 80, "once": 150, "mixed": 60, "refused": 50, "server_error": 20, "crash": 8,
    "once_crash": 6, "hang": 20, "once_hang": 10, "flood": 30, "delayed": 50, "sync": 40, "fallback": 40,
    "rejected": 8, "invalid": 8, "bulk": 4,
}  # fmt: skip


def workload(seed: int, jobs: int, seconds: float, scale: float) -> list[JobPlan]:
    """The jobs of a run in the order of their submission, spread over its time."""
    chance = random.Random(f"jobs-{seed}")
    kinds = chance.choices(list(_KINDS), list(_KINDS.values()), k=jobs)
    # The rare ones are always there, and early enough to meet faults.
    needed = ["hang", "once_hang", "flood", "delayed", "crash", "once_crash", "sync", "fallback", "invalid", "refused"]
    for place, kind in zip(chance.sample(range(max(1, jobs // 2)), min(len(needed), jobs // 2)), needed, strict=False):
        kinds[place] = kind
    poison = set(chance.sample(range(max(1, jobs // 2)), max(1, min(jobs // 150, 8)))) if jobs > 20 else set()
    plans = []
    for number, kind in enumerate(kinds):
        at_s = seconds * number / jobs
        plans.append(_plan(chance, seed, number, at_s, "poison" if number in poison else kind, scale))
    return plans


def raw_messages(seed: int, jobs: int, seconds: float) -> list[RawMessage]:
    """Malformed messages."""
    chance = random.Random(f"raw-{seed}")
    texts = ("not json", '{"v":1}', "[]", '{"v":1,"job_id":"job_x","tools":[]}', '{"v":"one"}', "\u0000\u0001")
    return [
        RawMessage(
            chance.uniform(0, 0.8 * seconds),
            chance.choice(("high", "normal", "low")),
            f"{chance.choice(texts)} #{seed}-{number}",
        )
        for number in range(max(2, jobs // 100))
    ]


def _plan(chance: random.Random, seed: int, number: int, at_s: float, kind: str, scale: float) -> JobPlan:
    body, calls = _body(chance, kind, scale)
    in_background = kind not in ("sync", "fallback", "invalid", "rejected", "poison")
    plain = in_background and chance.random()
    cancelled = in_background and chance.random() < 0.15
    return JobPlan(
        number=number,
        at_s=at_s,
        kind=kind,
        body=body,
        key=None if kind == "fallback" and chance.random() < 0.3 else f"chaos-{seed}-{number}",
        twins=chance.choice((1, 3, 8)) if in_background and chance.random() < 0.08 else 0,
        again_after_s=chance.uniform(0.1, 6) if in_background and chance.random() < 0.06 else None,
        gives_up=chance.random() < 0.1,
        conflict=bool(in_background and chance.random() < 0.03),
        watchers=(2 if chance.random() < 0.1 else 1) if plain and chance.random() < 0.45 else 0,
        drops=chance.random() < 0.5,
        polls=chance.random() < 0.3,
        cancel_after_s=chance.choice((0.0, 0.05, chance.uniform(0, 1), chance.uniform(0, 5))) if cancelled else None,
        person=chance.random() < 0.5,
        calls=calls,
    )


def _body(chance: random.Random, kind: str, scale: float) -> tuple[dict[str, Any], dict[str, Any]]:
    tools = [_call(chance, f"c{n}", kind, n, scale) for n in range(_count(chance, kind))]
    body: dict[str, Any] = {
        "tools": tools,
        "priority": chance.choices(("high", "normal", "low"), (2, 5, 2))[0],
        "max_retries": chance.choice((0, 1, 2)),
        "metadata": {"kind": kind},
    }
    match kind:
        case "hang" | "once_hang":
            # Above what a worker that loses Redis or NATS for a moment needs, below the length of a run.
            body["timeout_seconds"] = max(1.5, round(20 * scale, 1))
        case "delayed":
            body["delay_seconds"] = round(chance.uniform(0.2, 60 * scale), 2)
        case "bulk":
            # A few of them fill the stream, and submits are answered with 429 until they run.
            body["metadata"]["padding"] = "x" * 400_000
            body["delay_seconds"] = round(chance.uniform(2, max(3, 30 * scale)), 1)
        case "sync":
            body["mode"] = "sync"
        case "fallback":
            body["fallback"] = "sync"
        case "invalid":
            body["tools"] = [{"tool_name": "web/no_such_tool", "tool_args": {}}]
        case "rejected":
            body["tools"][0]["tool_args"] = {"ms": "many"}
    return body, {call["tool_call_id"]: _policy(call["tool_name"]) for call in tools}


def _policy(tool_name: str) -> str:
    return "once" if tool_name.partition("/")[2].startswith("once_") else "repeatable"


def _count(chance: random.Random, kind: str) -> int:
    match kind:
        case "many":
            return chance.randint(5, 16)
        case "mixed":
            return chance.randint(3, 5)
        case "short" | "once" | "delayed":
            return chance.choice((1, 1, 2))
    return 1


def _call(chance: random.Random, call_id: str, kind: str, number: int, scale: float) -> dict[str, Any]:
    server = chance.choices(SERVERS, (5, 3, 2))[0]
    name, args = "work", {"ms": chance.randint(0, 30)}
    match kind:
        case "long":
            args["ms"] = int(1000 * chance.uniform(1, max(2, 45 * scale)))
        case "many":
            args["ms"] = chance.randint(0, 120)
        case "once" | "delayed":
            name, args["ms"] = chance.choice(("work", "once_work", "once_work")), chance.randint(0, 400)
        case "mixed":
            name = chance.choice(("work", "once_work", "once_refuse", "refuse") if number else ("work", "once_work"))
            args["ms"] = chance.randint(0, 500)
        case "refused":
            name = chance.choice(("refuse", "once_refuse"))
        case "server_error":
            name = chance.choice(("fail", "once_fail"))
        case "crash" | "once_crash":
            server, name = "std", kind
        case "poison":
            server, name = "std", "poison"
        case "hang" | "once_hang":
            name = kind
        case "flood":
            name, args = "flood", {"count": chance.choice((200, 1000, 3000))}
    return {"tool_name": f"{server}/{name}", "tool_args": args, "tool_call_id": call_id}
