"""The commands about the fleet: stats, jobs, tools."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from rich.live import Live

from toolfleet.cli.client import JobsClient, ask
from toolfleet.cli.exits import INTERRUPTED, OK
from toolfleet.cli.output import ago, out, print_json, say, span, table

Answer = dict[str, Any]

REFRESH_S = 2.0
"""Of `stats --watch`."""
TIERS = ("high", "normal", "low")


def stats(api: str, *, watch_it: bool, as_json: bool) -> int:
    """Figures of tiers, totals, queue and workers; with `watch_it` again and again until Ctrl-C."""
    if not watch_it:
        answer = ask(api, lambda client: client.get("jobs/stats"))
        if as_json:
            print_json(answer)
        else:
            print(_stats_text(answer))
            _warn(answer)
        return OK
    try:
        asyncio.run(_watch_stats(api, as_json=as_json))
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


async def _watch_stats(api: str, *, as_json: bool) -> None:
    console = out()
    async with JobsClient(api) as client:
        if as_json or not console.is_terminal:
            while True:
                answer = await client.get("jobs/stats")
                if as_json:
                    print_json(answer, line=True)
                else:
                    print(_stats_text(answer) + "\n", flush=True)
                await asyncio.sleep(REFRESH_S)
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(_stats_text(await client.get("jobs/stats")), refresh=True)
                await asyncio.sleep(REFRESH_S)


def _stats_text(answer: Answer) -> str:
    workers, by_tier = answer["workers"], answer["workers"]["by_tier"]
    lines = [f"{'tier':<8}{'queued':>8}{'running':>9}{'oldest':>9}{'workers':>9}{'in queue, of at most':>23}"]
    for tier in TIERS:
        figures = answer["tiers"].get(tier, {})
        oldest = figures.get("oldest_age_seconds") or 0
        queue = "-" if figures.get("in_queue") is None else f"{figures['in_queue']} of {figures['max_in_queue']}"
        lines.append(
            f"{tier:<8}{figures.get('queued', 0):>8}{figures.get('running', 0):>9}"
            f"{span(oldest) if oldest else '-':>9}{by_tier.get(tier, 0):>9}{queue:>23}"
        )
    totals = ", ".join(f"{count} {status}" for status, count in answer["totals"].items())
    rates = answer["rates"]
    lines += [
        "",
        f"jobs       {totals}",
        f"finished   {rates['finished_last_minute']} in the last minute, "
        f"{rates['finished_last_15_minutes']} in 15 minutes; leases lost: {answer['leases_lost']}",
        f"workers    {workers['total']} with {workers['slots']} slots, {workers['in_flight']} in use",
        _fill("queue", answer["queue"], "messages"),
        _fill("dead", answer["dead_letters"], "count"),
    ]
    return "\n".join(lines)


def _fill(name: str, figures: Mapping[str, Any] | None, count: str) -> str:
    if figures is None:
        return f"{name:<11}NATS is down"
    share = 100 * figures["bytes"] / figures["max_bytes"] if figures["max_bytes"] > 0 else 0
    word = "letters" if name == "dead" else "messages"
    return f"{name:<11}{figures[count]} {word}, {figures['bytes']} bytes ({share:.1f} % of the limit)"


def _warn(answer: Answer) -> None:
    for warning in answer.get("warnings") or ():
        say(f"warning: {warning}")


def jobs(api: str, *, status: str | None, tier: str | None, limit: int, cursor: str | None, as_json: bool) -> int:
    """A page of jobs, newest first."""
    answer = ask(api, lambda client: client.get("jobs", status=status, tier=tier, limit=limit, cursor=cursor))
    if as_json:
        print_json(answer)
        return OK
    table(
        ("job", "status", "tier", "calls>", "progress>", "age>", "error"),
        (
            (
                job["job_id"],
                job["status"],
                job["priority"],
                job["progress"]["total_tools"],
                f"{job['progress']['percent']:.0f} %",
                ago(job["created_at"]),
                (job["error"] or {}).get("message", ""),
            )
            for job in answer["jobs"]
        ),
    )
    _say_more(answer)
    return OK


def tools(api: str, *, as_json: bool) -> int:
    """What the fleet can call."""
    answer = ask(api, lambda client: client.get("tools"))
    if as_json:
        print_json(answer)
        return OK
    table(
        ("tool", "server", "arguments", "may run", "description"),
        (
            (tool["name"], tool["server"], _arguments(tool["input_schema"]), _policy(tool), _first_line(tool))
            for tool in answer["tools"]
        ),
    )
    if not answer["tools"]:
        say("no tool server is registered; set TOOLFLEET_MCP_CONFIG, or register one in Consul with the tag 'mcp'")
    return OK


def _say_more(answer: Answer) -> None:
    if answer.get("cursor") is not None:
        say(f"there are more; go on with: --cursor {answer['cursor']}")


def _arguments(schema: Mapping[str, Any]) -> str:
    """The names of the arguments; those that need not be given in brackets."""
    required = schema.get("required") or ()
    return " ".join(name if name in required else f"[{name}]" for name in schema.get("properties") or {})


def _policy(tool: Mapping[str, Any]) -> str:
    """How often a call may run, and who says so."""
    return f"{'again' if tool['repeatable'] else 'once'} ({tool['policy_source']})"


def _first_line(tool: Mapping[str, Any]) -> str:
    lines = str(tool.get("description") or "").strip().splitlines()
    return lines[0] if lines else ""
