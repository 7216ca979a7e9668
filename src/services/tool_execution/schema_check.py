"""Arguments against a tool's own input schema, before anything is queued (G11).

Schemas come from tool servers and arguments from clients, so neither may cost more than a bounded amount of time:
nothing is fetched for a `$ref`, a regular expression is matched only where a bound on its steps is known beforehand
and low (`pattern_cost`) and is left to the tool server elsewhere, and `uniqueItems` is decided in linear time. Messages
name keywords, property names and paths, never a value: arguments may hold secrets.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
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
from toolfleet.services.tool_execution.pattern_cost import pattern_cost

_log = logging.getLogger(__name__)

_MAX_ERRORS: Final = 10
_MAX_NAME: Final = 64
"""Characters of a property name or of an allowed value in a message."""
_MAX_LISTED: Final = 10
"""Names or allowed values listed in a message."""
_COMPILED_SCHEMAS: Final = 512

_MATCH_STEPS: Final = 4_000_000
"""Of one match at most, by the bound of `pattern_cost`: about 0.1 s of the event loop."""
_MATCHING_S: Final = 0.2
"""For all matches of one check; what comes later is left to the tool server."""
_matching_left: ContextVar[float] = ContextVar("toolfleet_matching_left")

_pattern_cost = lru_cache(maxsize=_COMPILED_SCHEMAS)(pattern_cost)


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
    _matching_left.set(_MATCHING_S)
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
    except (SchemaError, Unresolvable, RecursionError, OverflowError) as error:  # overflow: `a{99999999999}`
        reason = error.message if isinstance(error, SchemaError) else str(error)
        _log.warning("input schema of tool %s/%s is not valid (%s); its server decides", server, tool, reason[:200])
        return None
    replaced = {
        "uniqueItems": _unique_items,
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    if '"patternProperties"' in schema_json:
        # jsonschema matches those patterns once more, by itself, to tell which names are left.
        replaced["unevaluatedProperties"] = _left_to_the_server
    known = {keyword: check for keyword, check in replaced.items() if keyword in base.VALIDATORS}
    bounded = extend(base, known)  # type: ignore[no-untyped-call]
    # An empty registry: a reference resolves inside the schema or not at all; nothing is fetched.
    compiled: Validator = bounded(schema, registry=Registry())
    return compiled


def _matches(pattern: str, text: str) -> bool | None:
    """Whether the pattern is found in the text; None where finding out could take long."""
    cost = _pattern_cost(pattern)
    left = _matching_left.get()
    if cost is None or cost.on(len(text)) > _MATCH_STEPS or left <= 0:
        return None
    started = time.perf_counter()
    found = re.search(pattern, text) is not None
    _matching_left.set(left - (time.perf_counter() - started))
    return found


def _pattern(validator: Validator, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "string") and _matches(pattern, instance) is False:
        yield ValidationError("does not match")


def _pattern_properties(
    validator: Validator, patterns: Mapping[str, Any], instance: Any, schema: Any
) -> Iterator[ValidationError]:
    if not validator.is_type(instance, "object"):
        return
    for pattern, subschema in patterns.items():
        for name, value in instance.items():
            if _matches(pattern, name):
                yield from validator.descend(value, subschema, path=name, schema_path=pattern)  # type: ignore[attr-defined]


def _additional_properties(
    validator: Validator, allowed: Any, instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    """`additionalProperties`; a name whose patterns can't be decided counts as one of the known."""
    if not validator.is_type(instance, "object"):
        return
    properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    extra = [
        name
        for name in instance
        if name not in properties and all(_matches(pattern, name) is False for pattern in patterns)
    ]
    if isinstance(allowed, dict):
        for name in extra:
            yield from validator.descend(instance[name], allowed, path=name)  # type: ignore[attr-defined]
    elif not allowed and extra:
        yield ValidationError("has unknown properties")


def _left_to_the_server(validator: Validator, value: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    return iter(())


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
