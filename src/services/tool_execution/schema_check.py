"""Arguments against a tool's own input schema, before anything is queued (G11).

Schemas come from tool servers and arguments from clients, so neither may cost more than a bounded amount of time:
nothing is fetched for a `$ref`, regular expressions that can run for ever are left to the tool server, and
`uniqueItems` is decided in linear time. Messages name keywords, property names and paths, never a value: arguments
may hold secrets.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, Final

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from toolfleet.services.background_jobs.errors import InvalidArguments
from toolfleet.services.background_jobs.ports import ToolSpec

_log = logging.getLogger(__name__)

_MAX_ERRORS: Final = 10
_MAX_NAME: Final = 64
"""Characters of a property name or of an allowed value in a message."""
_MAX_LISTED: Final = 10
"""Names or allowed values listed in a message."""
_COMPILED_SCHEMAS: Final = 512

_NESTED_REPEAT: Final = re.compile(r"\([^()]*(?:[*+|]|\{\d*,)[^()]*\)\s*(?:[*+]|\{\d*,)")
"""A repeated group that holds a repetition or alternatives: what makes Python's backtracking `re` exponential."""
_LITERAL_KEYWORDS: Final = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose value is data and not a schema."""


def check_arguments(spec: ToolSpec, arguments: Mapping[str, Any]) -> None:
    """Check the arguments of a call against the tool's input schema.

    The draft is the one that `$schema` names, 2020-12 without it (MCP, "JSON Schema Usage"). A schema that is not
    valid itself decides nothing: the tool's server has the last word anyway.

    Raises:
        InvalidArguments: they do not fit. ``details["path"]`` is where, such as ``$.urls[0]``; ``details["errors"]``
            lists up to 10 entries of ``{"path", "message"}``.
    """
    validator = _validator(spec.server, spec.tool, json.dumps(spec.input_schema))
    if validator is None:
        return
    try:
        found = list(islice(validator.iter_errors(dict(arguments)), _MAX_ERRORS))
    except (Unresolvable, RecursionError) as error:
        _log.warning("schema of tool %s/%s can't be applied (%s); its server decides", spec.server, spec.tool, error)
        return
    if not found:
        return
    errors = [{"path": _path(error), "message": _message(error)} for error in found]
    first = errors[0]
    raise InvalidArguments(
        f"the arguments of '{spec.name}' do not fit its schema: {first['path']} {first['message']}",
        path=first["path"],
        errors=errors,
    )


@lru_cache(maxsize=_COMPILED_SCHEMAS)
def _validator(server: str, tool: str, schema_json: str) -> Validator | None:
    """A compiled validator, or None for a broken schema; keyed by the schema's text, so each is compiled once."""
    schema = json.loads(schema_json)
    if not isinstance(schema, dict) or not schema:
        return None
    base = validator_for(schema, default=Draft202012Validator)
    try:
        base.check_schema(schema)
    except (SchemaError, Unresolvable, RecursionError) as error:
        reason = error.message if isinstance(error, SchemaError) else str(error)
        _log.warning("input schema of tool %s/%s is not valid (%s); its server decides", server, tool, reason[:200])
        return None
    bounded = extend(base, {"uniqueItems": _unique_items})  # type: ignore[no-untyped-call]
    # An empty registry: a reference resolves inside the schema or not at all; nothing is fetched.
    compiled: Validator = bounded(_without_costly_patterns(schema), registry=Registry())
    return compiled


def _without_costly_patterns(schema: Any) -> Any:
    """The schema without the regular expressions that could block the event loop; their check is the server's."""
    if isinstance(schema, list):
        return [_without_costly_patterns(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for keyword, value in schema.items():
        if keyword == "pattern" and isinstance(value, str) and _NESTED_REPEAT.search(value):
            continue
        kept[keyword] = value if keyword in _LITERAL_KEYWORDS else _without_costly_patterns(value)
    by_pattern = kept.get("patternProperties")
    if isinstance(by_pattern, dict) and any(_NESTED_REPEAT.search(pattern) for pattern in by_pattern):
        # What these two say depends on which names the pattern matches, so they go with it.
        for keyword in ("patternProperties", "additionalProperties", "unevaluatedProperties"):
            kept.pop(keyword, None)
    return kept


def _unique_items(validator: Validator, unique: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """`uniqueItems` by the items' canonical text: jsonschema compares every pair, minutes for a few 10,000 objects."""
    if not unique or not validator.is_type(instance, "array"):
        return
    seen = {json.dumps(item, sort_keys=True) for item in instance}
    if len(seen) < len(instance):
        yield ValidationError("has items that repeat")


def _path(error: ValidationError) -> str:
    """Where in the arguments, as a JSON path; a missing property is named by the path it should have."""
    path = error.json_path
    if error.validator == "required":
        missing = _missing(error)
        return f"{path}.{missing[0]}" if len(missing) == 1 else path
    return path


def _missing(error: ValidationError) -> list[str]:
    wanted: Any = error.validator_value
    instance: Any = error.instance
    return [name for name in wanted if name not in instance]


def _message(error: ValidationError) -> str:
    """What is wrong, said without the value; jsonschema's own message would repeat it."""
    wanted: Any = error.validator_value
    match error.validator:
        case "required":
            missing = _missing(error)
            return f"is missing ({_names(missing)})" if len(missing) > 1 else "is missing"
        case "type":
            types = wanted if isinstance(wanted, list) else [wanted]
            return f"must be of type {' or '.join(str(name) for name in types)}"
        case "enum":
            return f"must be one of {_names(wanted)}"
        case "const":
            return f"must be {_names([wanted])}"
        case "additionalProperties" | "unevaluatedProperties":
            instance: Any = error.instance
            known = error.schema.get("properties", {}) if isinstance(error.schema, dict) else {}
            return f"has unknown properties: {_names([name for name in instance if name not in known])}"
        case "pattern" | "format":
            return f"must match the {error.validator} {_names([wanted])}"
        case "uniqueItems":
            return "has items that repeat"
        case "anyOf" | "oneOf" | "allOf" | "not" | "if" | "dependentSchemas" | "contains" | "propertyNames":
            return f"does not satisfy '{error.validator}' of the schema"
        case _ if isinstance(wanted, int | float | str):
            return f"violates '{error.validator}: {str(wanted)[:_MAX_NAME]}' of the schema"
        case _:
            return f"does not satisfy '{error.validator or 'false'}' of the schema"


def _names(values: Any) -> str:
    """A bounded list of property names or of values that the schema itself states."""
    shown = [str(value)[:_MAX_NAME] for value in islice(values, _MAX_LISTED)]
    more = len(values) - len(shown)
    return ", ".join(f"'{name}'" for name in shown) + (f" and {more} more" if more > 0 else "")
