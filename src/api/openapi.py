"""What OpenAPI says beyond what FastAPI finds out by itself: problems, headers, bodies, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from toolfleet.api.letter_models import LetterSelection, Note
from toolfleet.api.models import Decision, Event, Reason
from toolfleet.api.problems import KEY_HEADER, MEDIA_TYPE, Problem
from toolfleet.services.background_jobs.job_request import NewJob

Responses = dict[int | str, dict[str, Any]]

TAGS: Final = [
    {"name": "jobs", "description": "Submit, watch, cancel and decide jobs."},
    {"name": "fleet", "description": "Tools, workers and figures."},
    {"name": "dead letters", "description": "What needs a person: look, redrive, discard."},
    {"name": "health", "description": "Whether this process and what it stands on are there."},
]

KEY: Final = {
    KEY_HEADER: {
        "description": "The key of this submit: the caller's, or a new one. Ask again with it after a 503.",
        "schema": {"type": "string"},
    }
}
RETRY_AFTER: Final = {
    "Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}},
}
LOCATION: Final = {"Location": {"description": "Where to poll the job.", "schema": {"type": "string"}}}

_INPUT_MODELS: Final[Sequence[type[BaseModel]]] = (NewJob, Decision, Reason, Note, LetterSelection)
_OTHER_MODELS: Final[Sequence[type[BaseModel]]] = (Problem, Event)

_PROBLEMS: Final[Mapping[int, tuple[str, dict[str, Any]]]] = {
    404: ("There is no such job.", {}),
    409: ("The job's status does not allow this; `job_status` tells it.", {}),
    410: ("The job ended and its record is no longer kept.", {}),
    413: ("The body, or the task that it becomes, is above the limit (`limit`, in bytes).", {}),
    415: ("The body is not announced as JSON.", {}),
    422: ("The request is not valid: `path` and `errors` tell where.", {}),
    429: ("The queue is full.", RETRY_AFTER),
    500: ("The API itself failed.", {}),
    503: ("A part that this needs is down.", RETRY_AFTER),
}


def answer(description: str, **more: Any) -> dict[str, Any]:
    """One answer of an operation."""
    return {"description": description, **more}


def problem(
    status: int, description: str | None = None, *, headers: Mapping[str, Any] | None = None, example: Any = None
) -> dict[str, Any]:
    """One answer that is a problem."""
    said, usual = _PROBLEMS[status]
    content: dict[str, Any] = {"schema": {"$ref": "#/components/schemas/Problem"}}
    if example is not None:
        content["example"] = example
    return {
        "description": description or said,
        "content": {MEDIA_TYPE: content},
        "headers": {**usual, **(headers or {})},
    }


def problems(*statuses: int, headers: Mapping[str, Any] | None = None) -> Responses:
    """Answers that are problems, as they are usually described; every operation may answer 500."""
    return {status: problem(status, headers=headers) for status in (*statuses, 500)}


def complete(app: FastAPI) -> None:
    """Give an app a description that has everything; it is made once."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = describe  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _described(app: FastAPI) -> dict[str, Any]:
    description = get_openapi(
        title=app.title,
        version=app.version,
        summary=app.summary,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
        servers=app.servers,
    )
    wanted = [
        *((model, "validation") for model in _INPUT_MODELS),
        *((model, "serialization") for model in _OTHER_MODELS),
    ]
    _, extra = models_json_schema(wanted, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas: dict[str, Any] = description.setdefault("components", {}).setdefault("schemas", {})
    for name, schema in extra["$defs"].items():
        schemas.setdefault(name, schema)
    for operations in description["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = _without_null(parameter["schema"])
    return description


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter that may be left out: FastAPI says that it may be null, which no query or header can."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) != 1:
        return schema
    return {**{name: value for name, value in schema.items() if name != "anyOf"}, **kinds[0]}
