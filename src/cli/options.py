"""What several commands take, and the settings behind them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import typer

from toolfleet.cli.exits import USAGE, CliError

JOB_ID: Final = re.compile(r"job_[0-7][0-9A-HJKMNP-TV-Z]{25}")
"""As `task_models.is_job_id`, which would bring the job core with it."""

Api = Annotated[str | None, typer.Option("--api", metavar="URL", help="Of the jobs API; TOOLFLEET_API_URL.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]


def _job_id(text: str) -> str:
    # What is no id names no job: the API need not be there to say so.
    if not JOB_ID.fullmatch(text):
        raise CliError(f"'{text}' is not the id of a job; ids look like job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB", USAGE)
    return text


JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, job_….", callback=_job_id)]


def settings_of(**given: Any) -> Any:
    """The settings, with the options that were given in place of their variables.

    Raises:
        CliError: a variable or option does not parse; the message names it and shows no value.
    """
    from pydantic import ValidationError

    from toolfleet.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False, include_context=False)
        text = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in found)
        raise CliError(f"a setting is not valid: {text}", USAGE) from None


def api_url(given: str | None) -> str:
    """Where the jobs API is: as given, or as the settings say. Raises as `settings_of`."""
    url: str = given or settings_of().api_url
    return url
