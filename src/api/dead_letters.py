"""Routes about dead letters: list, show, redrive, discard."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Response

from toolfleet.api.bodies import body_schema, json_body
from toolfleet.api.dependencies import ApiParts, Service, UserName, known_query
from toolfleet.api.letter_models import (
    MAX_SEQ,
    DeadLetterDetail,
    DeadLetterList,
    Discarded,
    LeftAlone,
    LetterSelection,
    ManyLetters,
    Note,
    Redriven,
)
from toolfleet.api.letter_views import detail_of, entry_of
from toolfleet.api.openapi import LOCATION, answer, problem, problems
from toolfleet.services.background_jobs.dead_letter_values import LetterFilter, ManyDone
from toolfleet.services.background_jobs.job_request import Moment
from toolfleet.services.background_jobs.task_models import Status, millis_of

router = APIRouter(prefix="/api/v1/dead-letters", tags=["dead letters"], dependencies=[Depends(known_query)])

_NO_LETTER = problem(404, "There is no such dead letter: it was redriven, discarded, or grew too old.")

_ACTIONS = ("redrive", "discard")

LetterId = Annotated[
    str,
    Path(
        description="The id of a job, or `letter_<seq>` of a malformed message, as the list tells it.",
        json_schema_extra={"pattern": "^(job_[0-7][0-9A-HJKMNP-TV-Z]{25}|letter_[0-9]{1,18})$"},
        examples=["job_01JZ0G9V6M4Q2R8T3W5X7Y9ZAB"],
    ),
]


@router.get("", operation_id="list_dead_letters", summary="What needs a person", responses=problems(422, 503))
async def dead_letters(
    service: Service,
    reason: Annotated[str | None, Query(max_length=100, description="Only these.", examples=["malformed"])] = None,
    tool_name: Annotated[
        str | None, Query(max_length=256, description="Only jobs that were to call it, by the name they gave it.")
    ] = None,
    older_than: Annotated[Moment | None, Query(description="Written before this time.")] = None,
    newer_than: Annotated[Moment | None, Query(description="Written after it.")] = None,
    cursor: Annotated[int, Query(ge=0, le=MAX_SEQ, description="Of the page before.")] = 0,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> DeadLetterList:
    """Oldest first; a job that died several times has a letter for each."""
    wanted = _filter(reason, tool_name, older_than, newer_than)
    page = await service.letters.page(wanted, cursor, limit)
    return DeadLetterList(dead_letters=[entry_of(letter) for letter in page.letters], cursor=page.cursor)


@router.get(
    "/{letter_id}",
    operation_id="get_dead_letter",
    summary="A dead letter with its history",
    responses={404: _NO_LETTER, **problems(422, 503)},
)
async def show(api: ApiParts, service: Service, letter_id: LetterId) -> DeadLetterDetail:
    """The job's task, attempts, errors, log and stored results, as far as they are kept; a malformed message raw."""
    if letter_id in _ACTIONS:
        # These paths are operations of their own, which are asked for with POST.
        raise HTTPException(405)
    return detail_of(letter_id, await service.letters.show(letter_id), api.views)


@router.post(
    "/redrive",
    operation_id="redrive_dead_letters",
    summary="Run many jobs again",
    responses={
        200: answer("What was redriven, and what was not and why; with `dry_run`, what would be."),
        **problems(413, 415, 422, 503),
    },
    openapi_extra=body_schema(
        LetterSelection,
        examples={
            "those of a tool": {"tool_name": "web_crawl", "limit": 100, "note": "its server is up again"},
            "how many": {"reason": "too_many_starts", "limit": 500, "dry_run": True},
        },
    ),
)
async def redrive_many(
    service: Service, selection: Annotated[LetterSelection, Depends(json_body(LetterSelection))], user: UserName = None
) -> ManyLetters:
    """Those that fit the filter, oldest first, at most `limit` jobs. Malformed messages are left out."""
    done = await service.letters.redrive_many(
        _filter(selection.reason, selection.tool_name, selection.older_than, selection.newer_than),
        limit=selection.limit,
        after=selection.cursor,
        dry_run=selection.dry_run,
        by=user or "",
        note=selection.note or "",
    )
    return _many(done, selection)


@router.post(
    "/discard",
    operation_id="discard_dead_letters",
    summary="Remove many dead letters",
    responses={
        200: answer("What was removed; with `dry_run`, what would be."),
        **problems(413, 415, 422, 503),
    },
    openapi_extra=body_schema(LetterSelection, examples={"malformed ones": {"reason": "malformed", "limit": 100}}),
)
async def discard_many(
    service: Service, selection: Annotated[LetterSelection, Depends(json_body(LetterSelection))], user: UserName = None
) -> ManyLetters:
    """Exactly the letters that fit the filter, oldest first, at most `limit`; jobs are left as they are."""
    done = await service.letters.discard_many(
        _filter(selection.reason, selection.tool_name, selection.older_than, selection.newer_than),
        limit=selection.limit,
        after=selection.cursor,
        dry_run=selection.dry_run,
        by=user or "",
        note=selection.note or "",
    )
    return _many(done, selection)


@router.post(
    "/{letter_id}/redrive",
    operation_id="redrive_dead_letter",
    summary="Run the job of a dead letter again",
    status_code=202,
    responses={
        202: answer("A new generation of the job has begun; its letters are gone.", headers=LOCATION),
        404: _NO_LETTER,
        409: problem(
            409,
            "It is a malformed message, which nobody can run; or it was redriven already, or the job runs or ended "
            "otherwise since (`job_status`): then nothing was run.",
        ),
        **problems(413, 415, 422, 503),
    },
    openapi_extra=body_schema(Note, optional=True),
)
async def redrive(
    api: ApiParts,
    service: Service,
    response: Response,
    letter_id: LetterId,
    why: Annotated[Note, Depends(json_body(Note, optional=True))],
    user: UserName = None,
) -> Redriven:
    """It keeps its id, its log and its stored results; calls without a result, and those that failed, run."""
    done = await service.letters.redrive(letter_id, by=user or "", note=why.note or "")
    links = api.views.links(letter_id, done.generation, Status.QUEUED)
    response.headers["Location"] = api.views.job_url(letter_id)
    return Redriven.model_validate({"id": letter_id, "generation": done.generation, **links})


@router.post(
    "/{letter_id}/discard",
    operation_id="discard_dead_letter",
    summary="Remove a dead letter",
    responses={
        200: answer("The letters of the job, or the malformed message, are gone for good."),
        404: _NO_LETTER,
        **problems(413, 415, 422, 503),
    },
    openapi_extra=body_schema(Note, optional=True),
)
async def discard(
    service: Service,
    letter_id: LetterId,
    why: Annotated[Note, Depends(json_body(Note, optional=True))],
    user: UserName = None,
) -> Discarded:
    """The job itself, if its record is kept, stays as it is. Who and why are written to the API's own log."""
    removed = await service.letters.discard(letter_id, by=user or "", note=why.note or "")
    return Discarded(id=letter_id, discarded=removed)


def _filter(
    reason: str | None, tool_name: str | None, older_than: Moment | None, newer_than: Moment | None
) -> LetterFilter:
    return LetterFilter(
        reason=reason,
        tool_name=tool_name,
        older_than=millis_of(older_than) if older_than else None,
        newer_than=millis_of(newer_than) if newer_than else None,
    )


def _many(done: ManyDone, selection: LetterSelection) -> ManyLetters:
    return ManyLetters(
        matched=len(done.matched),
        ids=list(done.matched if selection.dry_run else done.done),
        done=len(done.done),
        failed=[LeftAlone(id=one.letter_id, why=one.why) for one in done.refused],
        dry_run=selection.dry_run,
        cursor=done.cursor,
    )
