"""The commands `toolfleet dlq …` and their options; what they do is imported when they are called."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

import typer

from toolfleet.cli.exits import USAGE, CliError
from toolfleet.cli.options import JOB_ID, Api, Json, api_url

dlq = typer.Typer(help="Dead letters: what needs a person.", no_args_is_help=True, rich_markup_mode=None)

_LETTER: Final = re.compile(r"letter_[0-9]{1,18}")


def _letter_id(text: str) -> str:
    if not (JOB_ID.fullmatch(text) or _LETTER.fullmatch(text)):
        raise CliError(f"'{text}' is not the id of a dead letter; see: toolfleet dlq list", USAGE)
    return text


def _letter_ids(texts: list[str] | None) -> list[str] | None:
    return [_letter_id(text) for text in texts] if texts else None


LetterId = Annotated[
    str, typer.Argument(metavar="ID", help="A job's id, or letter_… of a malformed message.", callback=_letter_id)
]
LetterIds = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="As dlq list tells them.", callback=_letter_ids)
]
Reason = Annotated[str | None, typer.Option(help="Only these, such as too_many_starts or malformed.")]
ToolName = Annotated[str | None, typer.Option("--tool", help="Only jobs that were to call it.")]
OlderThan = Annotated[str | None, typer.Option(metavar="AGE", help="90s, 15m, 2h, 3d, or a time with its zone.")]
NewerThan = Annotated[str | None, typer.Option(metavar="AGE", help="As --older-than.")]
Everything = Annotated[bool, typer.Option("--all", help="All of them, without a filter.")]
Most = Annotated[int, typer.Option("--limit", min=1, max=500, help="With a filter: at most so many.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="With a filter: only say which.")]
Yes = Annotated[bool, typer.Option("--yes", help="With a filter: do not ask.")]
WhyNote = Annotated[
    str | None, typer.Option("--note", help="Why; in the job's log, and of discard in that of the API.")
]


@dlq.command("list")
def dlq_list(
    reason: Reason = None,
    tool: ToolName = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=200, help="Rows of a page.")] = 20,
    cursor: Annotated[str | None, typer.Option(help="Of the page before.")] = None,
    api: Api = None,
    as_json: Json = False,
) -> None:
    """List dead letters, oldest first."""
    from toolfleet.cli.letter_commands import listed as run

    wanted = _letters(reason, tool, older_than, newer_than)
    raise typer.Exit(run(api_url(api), wanted, limit=limit, cursor=cursor, as_json=as_json))


@dlq.command("show")
def dlq_show(letter: LetterId, api: Api = None, as_json: Json = False) -> None:
    """Show one with its history; a malformed message raw."""
    from toolfleet.cli.letter_commands import show as run

    raise typer.Exit(run(api_url(api), letter, as_json=as_json))


@dlq.command("redrive")
def dlq_redrive(
    letters: LetterIds = None,
    reason: Reason = None,
    tool: ToolName = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    everything: Everything = False,
    limit: Most = 100,
    dry_run: DryRun = False,
    yes: Yes = False,
    note: WhyNote = None,
    api: Api = None,
    as_json: Json = False,
) -> None:
    """Run jobs again, by id or by a filter; they keep their ids, logs and stored results."""
    _act(
        "redrive", letters, _letters(reason, tool, older_than, newer_than), everything=everything, limit=limit,
        dry_run=dry_run, yes=yes, note=note, api=api, as_json=as_json,
    )  # fmt: skip


@dlq.command("discard")
def dlq_discard(
    letters: LetterIds = None,
    reason: Reason = None,
    tool: ToolName = None,
    older_than: OlderThan = None,
    newer_than: NewerThan = None,
    everything: Everything = False,
    limit: Most = 100,
    dry_run: DryRun = False,
    yes: Yes = False,
    note: WhyNote = None,
    api: Api = None,
    as_json: Json = False,
) -> None:
    """Remove dead letters for good, by id or by a filter; the jobs' records are left alone."""
    _act(
        "discard", letters, _letters(reason, tool, older_than, newer_than), everything=everything, limit=limit,
        dry_run=dry_run, yes=yes, note=note, api=api, as_json=as_json,
    )  # fmt: skip


def _act(
    act: Literal["redrive", "discard"],
    letters: list[str] | None,
    wanted: dict[str, str | None],
    *,
    everything: bool,
    limit: int,
    dry_run: bool,
    yes: bool,
    note: str | None,
    api: str | None,
    as_json: bool,
) -> None:
    from toolfleet.cli.letter_commands import act_on, act_on_many

    filtered = any(wanted.values())
    if bool(letters) + filtered + everything != 1:
        raise CliError(f"say which letters to {act}: their ids, a filter such as --reason, or --all", USAGE)
    if letters and dry_run:
        raise CliError("--dry-run goes with a filter; see one letter with: toolfleet dlq show", USAGE)
    if letters:
        raise typer.Exit(act_on(api_url(api), act, letters, note=note, as_json=as_json))
    chosen: dict[str, Any] = {**wanted, "limit": limit}
    raise typer.Exit(act_on_many(api_url(api), act, chosen, dry_run=dry_run, yes=yes, note=note, as_json=as_json))


def _letters(
    reason: str | None, tool: str | None, older_than: str | None, newer_than: str | None
) -> dict[str, str | None]:
    """A filter as the API takes it."""
    from toolfleet.cli.values import moment

    return {
        "reason": reason,
        "tool_name": tool,
        "older_than": moment(older_than, "--older-than"),
        "newer_than": moment(newer_than, "--newer-than"),
    }
