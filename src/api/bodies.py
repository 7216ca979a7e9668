"""Request bodies: strict JSON into strict models.

FastAPI's own reading takes NaN, lone surrogates and the string "3" for a number, and breaks off on deep nesting with an
error of its own kind. Here the text decides: what the schema in OpenAPI does not allow is a 422.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from toolfleet.api.problems import ApiProblem, invalid_body, invalid_request

Model = TypeVar("Model", bound=BaseModel)


def json_body(model: type[Model], *, optional: bool = False) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads the body as a model.

    Args:
        model: what the body must be.
        optional: whether no body at all stands for ``{}``.

    Raises:
        ApiProblem: 413, 415 or 422.
    """

    async def read(request: Request) -> Model:
        raw = await request.body()
        if not raw and optional:
            return model()
        _check_media_type(request)
        try:
            # For what the validating parser lets through: NaN and Infinity are not JSON.
            from_json(raw, allow_inf_nan=False)
        except ValueError as error:
            found = {"loc": (), "msg": f"not valid JSON: {error}"}
            raise invalid_request([found], "body") from None
        try:
            return model.model_validate_json(raw, strict=True)
        except ValidationError as error:
            raise invalid_body(error) from None

    return read


def _check_media_type(request: Request) -> None:
    # Refusing other types also keeps web pages out: a browser sends a form or plain text to any origin unasked, and
    # JSON only after this API had allowed it.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json")):
        return
    raise ApiProblem(
        415, None, "Unsupported Media Type", "send the body as JSON, with the header Content-Type: application/json"
    )


def body_schema(
    model: type[BaseModel], *, optional: bool = False, examples: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What OpenAPI says of such a body; `openapi.complete` adds the schema itself."""
    content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if examples:
        content["examples"] = {name: {"value": value} for name, value in examples.items()}
    return {"requestBody": {"required": not optional, "content": {"application/json": content}}}
