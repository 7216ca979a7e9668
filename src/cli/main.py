"""The commands of `toolfleet` and their options. What a command does is imported when it is called: `--help`, and a
command that only asks the API, load neither a server nor the job core.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from toolfleet.cli.dlq import dlq
from toolfleet.cli.exits import FAILED, INTERRUPTED, USAGE, CliError
from toolfleet.cli.options import Api, JobId, Json, api_url, settings_of

app = typer.Typer(
    name="toolfleet",
    help="Durable background tool execution for AI agents.",
    epilog="Exit codes: 0 done or job completed, 1 failed, 2 usage, 3 job cancelled, 4 job unknown, 69 API "
    "unreachable, 75 try again later, 130 Ctrl-C. Client commands talk to the API at TOOLFLEET_API_URL.",
    no_args_is_help=True,
    add_completion=False,
    # Errors are one line, as of other programs of a shell; a traceback is for whoever develops this.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(dlq, name="dlq")


class TierName(StrEnum):
    """As `task_models.Tier`, which would bring the job core with it."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class StatusName(StrEnum):
    """As `task_models.Status`."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class DecisionName(StrEnum):
    """What a person can say of a call whose outcome is not known."""

    RERUN = "rerun"
    COMPLETED = "completed"
    FAILED = "failed"


Limit = Annotated[int, typer.Option("--limit", min=1, max=500, help="Rows of a page.")]


# -- the fleet on this machine -------------------------------------------------------------------------------------


@app.command()
def demo() -> None:
    """Show all of it: start everything, run a job of four web crawls, stop everything."""
    from toolfleet.cli.demo import demo as run

    raise typer.Exit(run())


@app.command()
def up(
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Of the API; 0 takes a free one.")] = None,
    data: Annotated[Path | None, typer.Option(help="Keep the data here; otherwise it is temporary.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Gets the addresses as JSON once all is ready.")] = None,
) -> None:
    """Start everything and leave it running until Ctrl-C, which drains; a second one ends it at once."""
    from toolfleet.cli.up import up as run

    raise typer.Exit(run(settings_of(api_port=port), data, ready_file))


@app.command()
def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on; TOOLFLEET_API_HOST.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="TOOLFLEET_API_PORT; 0 takes a free one.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Gets the API's URL once it answers.")] = None,
) -> None:
    """Serve the jobs API."""
    from toolfleet.cli.processes import run_api

    raise typer.Exit(run_api(settings_of(api_host=host, api_port=port), ready_file))


@app.command()
def worker(
    tier: Annotated[TierName, typer.Option(help="Whose jobs it runs.")] = TierName.NORMAL,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Jobs at once; TOOLFLEET_CONCURRENCY.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name in the fleet, unique; TOOLFLEET_WORKER_NAME.")] = None,
    status_file: Annotated[Path | None, typer.Option(help="Gets its state as JSON every few seconds.")] = None,
) -> None:
    """Run jobs of one tier until SIGTERM, which drains."""
    from toolfleet.cli.processes import run_worker
    from toolfleet.services.background_jobs.task_models import Tier

    settings = settings_of(concurrency=concurrency, worker_name=name)
    raise typer.Exit(run_worker(settings, Tier(tier.value), status_file))


@app.command()
def doctor(
    api: Api = None,
    accept_stream: Annotated[
        bool, typer.Option("--accept-stream", help="The empty stream that is there replaces the lost one.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what is reachable, in which version, set how, and what to do; exit code 1 where something is wrong."""
    from toolfleet.cli.doctor import doctor as run

    settings = settings_of(api_url=api)
    raise typer.Exit(run(settings, settings.api_url, accept_stream=accept_stream, as_json=as_json))


# -- one job -------------------------------------------------------------------------------------------------------


@app.command()
def submit(
    tool: Annotated[str, typer.Argument(metavar="TOOL", help="tool, or server/tool.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...",
            help="Arguments: JSON where the value is JSON (max_pages=5), else text; key='\"5\"' is the text 5, "
            "key=@path the text of a file.",
        ),
    ] = None,
    args: Annotated[
        str | None, typer.Option("--args", metavar="JSON", help="All arguments as JSON; @path a file, - stdin.")
    ] = None,
    priority: Annotated[TierName | None, typer.Option(help="normal where not given.")] = None,
    retries: Annotated[int | None, typer.Option(min=0, max=20, help="After failures that may pass.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds of running time.")] = None,
    delay: Annotated[float | None, typer.Option(help="Seconds before it may start.")] = None,
    key: Annotated[str | None, typer.Option(help="Idempotency-Key: the same key gives the same job.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it; the exit code is the job's.")] = False,
    api: Api = None,
    as_json: Json = False,
) -> None:
    """Queue a job of one tool call and print its id."""
    from toolfleet.cli.job_commands import submit as run

    call = {"tool_name": tool, "words": words or [], "args": args}
    options = {
        "priority": priority.value if priority else None,
        "max_retries": retries,
        "timeout_seconds": timeout,
        "delay_seconds": delay,
    }
    raise typer.Exit(run(api_url(api), call, options, key=key, watch_it=watch, as_json=as_json))


@app.command()
def watch(
    job: JobId,
    after: Annotated[int, typer.Option(min=0, help="Begin after the event of this id.")] = 0,
    api: Api = None,
    as_json: Json = False,
) -> None:
    """Follow a job to its end; the exit code is the job's. Ctrl-C leaves the job running."""
    from toolfleet.cli.job_commands import watch as run

    raise typer.Exit(run(api_url(api), job, after=after, as_json=as_json))


@app.command()
def result(job: JobId, api: Api = None, as_json: Json = False) -> None:
    """Print what each call of a job gave; exit code 75 while it runs, 4 where a call is to be decided first."""
    from toolfleet.cli.job_commands import result as run

    raise typer.Exit(run(api_url(api), job, as_json=as_json))


@app.command()
def cancel(job: JobId, api: Api = None, as_json: Json = False) -> None:
    """Stop a job, and say how far that got."""
    from toolfleet.cli.job_commands import cancel as run

    raise typer.Exit(run(api_url(api), job, as_json=as_json))


@app.command()
def retry(
    job: JobId,
    note: Annotated[str | None, typer.Option(help="Why; it is kept in the job's log.")] = None,
    api: Api = None,
    as_json: Json = False,
) -> None:
    """Run a failed or cancelled job again, without the calls that succeeded."""
    from toolfleet.cli.job_commands import retry as run

    raise typer.Exit(run(api_url(api), job, note=note, as_json=as_json))


@app.command()
def resolve(
    job: JobId,
    call: Annotated[str, typer.Argument(metavar="CALL", help="The tool_call_id, such as call_1.")],
    decision: Annotated[DecisionName, typer.Argument(help="It did not happen, it succeeded, it failed.")],
    result: Annotated[
        str | None, typer.Option(metavar="JSON", help="With completed: what it gave; @path a file, - stdin.")
    ] = None,
    note: Annotated[str, typer.Option(help="Why; it is kept in the job's log.")] = "",
    api: Api = None,
    as_json: Json = False,
) -> None:
    """Decide a call that must not run twice and whose outcome is not known."""
    from toolfleet.cli.job_commands import resolve as run

    if result is not None and decision is not DecisionName.COMPLETED:
        raise CliError("--result goes with the decision completed", USAGE)
    raise typer.Exit(run(api_url(api), job, call, decision.value, result_text=result, note=note, as_json=as_json))


# -- the fleet through the API -------------------------------------------------------------------------------------


@app.command()
def stats(
    watch: Annotated[bool, typer.Option("--watch", help="Again every two seconds, until Ctrl-C.")] = False,
    api: Api = None,
    as_json: Json = False,
) -> None:
    """Figures of tiers, jobs, queue and workers."""
    from toolfleet.cli.fleet_commands import stats as run

    raise typer.Exit(run(api_url(api), watch_it=watch, as_json=as_json))


@app.command()
def jobs(
    status: Annotated[StatusName | None, typer.Option(help="Only these.")] = None,
    tier: Annotated[TierName | None, typer.Option(help="Only these.")] = None,
    limit: Limit = 20,
    cursor: Annotated[str | None, typer.Option(help="Of the page before.")] = None,
    api: Api = None,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    from toolfleet.cli.fleet_commands import jobs as run

    raise typer.Exit(
        run(
            api_url(api),
            status=status.value if status else None,
            tier=tier.value if tier else None,
            limit=limit,
            cursor=cursor,
            as_json=as_json,
        )
    )


@app.command()
def tools(api: Api = None, as_json: Json = False) -> None:
    """List what the fleet can call."""
    from toolfleet.cli.fleet_commands import tools as run

    raise typer.Exit(run(api_url(api), as_json=as_json))


# -- around the commands -------------------------------------------------------------------------------------------


def main() -> None:
    """The program `toolfleet`; ends with `SystemExit`."""
    try:
        app(prog_name="toolfleet")
    except CliError as error:
        if error.document is not None and "--json" in sys.argv:
            from toolfleet.cli.output import print_json

            print_json(error.document)
        print(f"toolfleet: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except OSError as error:
        # A file that can't be written, a full disk behind stdout.
        print(f"toolfleet: {error}", file=sys.stderr)
        sys.exit(FAILED)
