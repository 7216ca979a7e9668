"""A job's events as a person, or a program, follows them: bars on a terminal, lines in a pipe, JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, aclosing
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from toolfleet.cli.client import JobsClient
from toolfleet.cli.output import plain, print_json
from toolfleet.cli.sse import ServerEvent

MAX_MESSAGE = 60
"""Characters of a tool's message beside its bar; it changes a few times a second."""


class Follower(AbstractContextManager["Follower"], Protocol):
    """Shows events; open while there are any."""

    def show(self, event: ServerEvent) -> None:
        """Show one event."""


async def follow(client: JobsClient, job_id: str, follower: Follower, after: int = 0) -> dict[str, Any]:
    """Show a job's events up to its end; the job as it is then. Raises as `JobsClient.events`."""
    with follower:
        async with aclosing(client.events(job_id, after)) as events:
            async for event in events:
                follower.show(event)
    return await client.job(job_id)


def follower_for(console: Console, *, as_json: bool) -> Follower:
    """What fits where stdout goes."""
    if as_json:
        return JsonLines()
    return Bars(console) if console.is_terminal else Lines(console)


class _Unchanged:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


class JsonLines(_Unchanged):
    """One JSON object a line: `id`, `event`, `data`."""

    def show(self, event: ServerEvent) -> None:
        print_json(event.document(), line=True)


class Lines(_Unchanged):
    """One line an event: the time, the event, what it says."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, event: ServerEvent) -> None:
        at = str(event.data.get("at", ""))[11:19]
        self._console.print(Text(f"{at} {event.event:<15} {describe(event)}".strip()))
        self._console.file.flush()


class Bars:
    """One bar a call, and a line above them for what happens to the job."""

    def __init__(self, console: Console, names: Mapping[str, str] | None = None) -> None:
        """`names` are shown instead of the ids and tools of the calls."""
        self._names = names or {}
        self._bars: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            # On a narrow terminal the note gives way, not the bar, the count or the time.
            BarColumn(bar_width=30, table_column=Column(min_width=16)),
            TextColumn("{task.fields[count]}", markup=False, table_column=Column(min_width=5)),
            TimeElapsedColumn(table_column=Column(min_width=7)),
            TextColumn("{task.fields[note]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            console=console,
            expand=True,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        for call, name in self._names.items():
            self._bars[call] = self._add(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, event: ServerEvent) -> None:
        call = event.data.get("tool_call_id")
        if not event.event.startswith("tool.") or not isinstance(call, str):
            self._progress.console.print(Text(f"{event.event:<15} {describe(event)}".strip()))
            return
        if call not in self._bars:
            self._bars[call] = self._add(f"{call} {event.data.get('tool_name', '')}")
        self._move(self._bars[call], event)

    def _add(self, name: str) -> TaskID:
        return self._progress.add_task(name, total=None, start=False, count="", note="waiting")

    def _move(self, bar: TaskID, event: ServerEvent) -> None:
        data = event.data
        if event.event == "tool.started":
            self._progress.reset(bar, start=True, total=None, count="", note="started")
        elif event.event == "tool.progress":
            total = data.get("total")
            self._progress.start_task(bar)
            self._progress.update(
                bar,
                completed=float(data["progress"]),
                total=None if total is None else float(total),
                count=_count(data),
                note=str(data.get("message") or "")[:MAX_MESSAGE],
            )
        else:
            # Of a bar that never had a total, any will do: it is full.
            total = self._progress.tasks[self._progress.task_ids.index(bar)].total or 1
            done = total if event.event == "tool.completed" else None
            self._progress.update(bar, total=total, completed=done, note=describe(event, with_call=False))
            self._progress.stop_task(bar)


def describe(event: ServerEvent, *, with_call: bool = True) -> str:
    """What an event says, in a few words."""
    data = event.data
    words: list[str] = []
    if with_call and "tool_call_id" in data:
        words.append(f"{data['tool_call_id']} {data.get('tool_name', '')}".strip())
    if event.event == "tool.progress":
        words += [_count(data), str(data.get("message") or "")]
    elif event.event == "tool.completed":
        words.append(f"done in {data.get('duration_ms', 0) / 1000:.1f} s")
    elif event.event == "gap":
        words.append("earlier events are no longer kept")
    words += [_decided(told) for told in data.get("decisions") or () if isinstance(told, Mapping)]
    for key, text in _WORDS.items():
        if data.get(key):
            words.append(text.format(data[key]))
    # A job's reason repeats those of its calls, and ends the command as its last line.
    if isinstance(error := data.get("error"), Mapping) and event.event != "job.failed":
        words.append(str(error.get("message", "")))
    return plain(" ".join(" ".join(words).split()))


_WORDS = {
    "worker": "by {}",
    "next_attempt_at": "next attempt at {}",
    "reached": "reached: {}",
    "reason": "({})",
    "by": "by {}",
    "note": "note: {}",
    "will_retry": "will be tried again:",
}


def _decided(told: Mapping[str, Any]) -> str:
    text = f"{told.get('tool_call_id')} {told.get('decision')}"
    text += f" by {told['by']}" if told.get("by") else ""
    return f"{text}: {told['note']};" if told.get("note") else f"{text};"


def _count(data: Mapping[str, Any]) -> str:
    done, total = data.get("progress", 0), data.get("total")
    return f"{done:g}" if total is None else f"{done:g}/{total:g}"
