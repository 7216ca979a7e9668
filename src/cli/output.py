"""What commands print: results on stdout, everything about them on stderr; with `--json`, stdout is JSON alone."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def out() -> Console:
    """Where results go. Nothing but our own styles is highlighted, and long words are not broken in a pipe."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def say(text: str) -> None:
    """A line for the person, on stderr. A terminal that is gone must not keep anything from being stopped."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def plain(text: str) -> str:
    """A text with its control characters, but for tabs and line ends, written as ``\\x1b``.

    What a stranger's message holds must not move the cursor, change colours or answer for the terminal.
    """
    return "".join(one if one.isprintable() or one in "\t\n" else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    return one.encode("unicode_escape", "backslashreplace").decode()


def print_json(document: Any, *, line: bool = False) -> None:
    """JSON on stdout; with `line` on one line, and sent at once."""
    print(json.dumps(document, ensure_ascii=False, indent=None if line else 2), flush=line)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table, with the columns whose name ends with ``>`` to the right.

    Where stdout is no terminal, its lines are tab separated without a heading, so that `cut` and `awk` can read them.
    """
    console = out()
    if console.is_terminal:
        draw_table(console, columns, rows)
        return
    for row in rows:
        print("\t".join(plain(" ".join(str(cell).split())) for cell in row))


def draw_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A table for people, wherever it goes."""
    drawn = Table(box=None, pad_edge=False, header_style="bold", title=title or None, title_justify="left")
    for name in columns:
        drawn.add_column(name.removesuffix(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    for row in rows:
        # As text: a tool's title may contain what rich takes for markup.
        drawn.add_row(*(Text(plain(str(cell))) for cell in row))
    console.print(drawn)


def ago(text: object) -> str:
    """How long a time of the API (RFC 3339) lies back: ``3 s``, ``12 min``, ``5 h``, ``2 d``; empty for None."""
    if not isinstance(text, str):
        return ""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
    return span(max(0.0, seconds))


def span(seconds: float) -> str:
    """A duration in the largest unit that keeps two digits telling."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"
