"""From what came over the wire to what the worker works with: a `ToolResult`, or the `ToolFailure` that fits.

The one place that decides what a failure says about the call's outcome. Where the evidence is unclear it errs towards
'sent and not known', because the other error would run a call twice that must not run twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from mcp.shared.exceptions import MCPError
from mcp_types import (
    CONNECTION_CLOSED,
    HEADER_MISMATCH,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    MISSING_REQUIRED_CLIENT_CAPABILITY,
    PARSE_ERROR,
    UNSUPPORTED_PROTOCOL_VERSION,
    URL_ELICITATION_REQUIRED,
)
from pydantic import JsonValue
from pydantic_core import to_json

from toolfleet.services.background_jobs.errors import (
    ResultTooLarge,
    ToolAnswerUnclear,
    ToolConnectionLost,
    ToolFailure,
    ToolfleetError,
    ToolRejected,
    ToolServerFailed,
    ToolUnavailable,
)
from toolfleet.services.background_jobs.task_models import ErrorInfo, ToolCall, ToolResult
from toolfleet.services.discovery.models import McpServer
from toolfleet.services.tool_execution.exchange import (
    TOO_LARGE_CODE,
    UNREADABLE_CODE,
    Broken,
    Exchange,
    NotSent,
    Oversized,
    Refused,
)

_E = TypeVar("_E", bound=BaseException)

_MAX_TEXT: Final = 500
"""Characters of a server's own words in an error message."""
_REJECTIONS: Final = frozenset({INVALID_PARAMS, METHOD_NOT_FOUND, INVALID_REQUEST, HEADER_MISMATCH})
_UNREADABLE: Final = frozenset({PARSE_ERROR, UNREADABLE_CODE})
"""An answer came that could not be read: the SDK's code for it over HTTP, and our own over stdio."""
_WANTS_INPUT: Final = frozenset({MISSING_REQUIRED_CLIENT_CAPABILITY, URL_ELICITATION_REQUIRED})
_SSE_TOO_LARGE: Final = "SSE stream failed: Server-sent event exceeded"
"""How the SDK (2.3) reports an event above `max_sse_event_size`; it has no code of its own."""


class SessionGone(ToolUnavailable):
    """The server does not know this session any more; the call was not processed. A new session can take it."""


@dataclass(frozen=True, slots=True)
class Where:
    """A call in messages, and the bound of its result in bytes."""

    server: str
    tool: str
    limit: int

    @property
    def name(self) -> str:
        """``server/tool``."""
        return f"{self.server}/{self.tool}"

    def too_large(self, size: str) -> ResultTooLarge:
        """The failure of a call whose answer is above the limit."""
        return ResultTooLarge(
            f"the result of '{self.name}' has {size} bytes, more than the limit of {self.limit}; raise "
            "TOOLFLEET_MAX_RESULT_BYTES, or ask the tool for less",
            limit=self.limit,
        )


def failure_of(where: Where, error: MCPError, exchange: Exchange) -> ToolFailure:
    """What an error answer says about the call, with the transport's own evidence first."""
    match exchange.fault:
        case NotSent(reason):
            return SessionGone(f"MCP server '{where.server}' can't be reached ({reason}); the call was not sent")
        case Oversized(size):
            return where.too_large(f"more than {size}")
        case Broken(reason):
            return ToolConnectionLost(f"the connection to MCP server '{where.server}' broke during the call ({reason})")
        case Refused(status) if (failure := _refused(where, status, error)) is not None:
            return failure
    if error.code == TOO_LARGE_CODE:
        return where.too_large(str(error.data))
    if error.code == CONNECTION_CLOSED:
        return _closed(where, error, exchange)
    if error.code == UNSUPPORTED_PROTOCOL_VERSION:
        return SessionGone(f"MCP server '{where.server}' does not speak this session's protocol version any more")
    text = f"MCP server '{where.server}' answered the call of '{where.name}' with error {error.code}: {_bounded(error)}"
    if error.code in _WANTS_INPUT:
        return _wants_input(where)
    if error.code in _REJECTIONS:
        return ToolRejected(text, jsonrpc_code=error.code)
    if error.code in _UNREADABLE:
        return ToolAnswerUnclear(text, jsonrpc_code=error.code)
    return ToolServerFailed(text, jsonrpc_code=error.code)


def not_opened(server: McpServer, error: BaseException, exchange: Exchange) -> ToolUnavailable:
    """Why a session could not be opened. ``details["closed"]`` where the server ended instead of answering."""
    known = _first(error, ToolUnavailable)
    if known is not None:
        return known
    match exchange.fault:
        case NotSent(reason):
            return ToolUnavailable(f"MCP server '{server.name}' ({server.location}) can't be reached: {reason}")
        case Refused(status):
            hint = "; check the 'headers' (credentials) in its configuration" if status in (401, 403) else ""
            return ToolUnavailable(f"MCP server '{server.name}' ({server.location}) answered with HTTP {status}{hint}")
    answer = _first(error, MCPError)
    if answer is not None and answer.code == CONNECTION_CLOSED:
        return ToolUnavailable(
            f"MCP server '{server.name}' ended before it was ready; its lines in this program's log say more",
            closed=True,
        )
    reason = _bounded(answer) if answer else named(error)
    return ToolUnavailable(f"no session with MCP server '{server.name}' ({server.location}): {reason}")


def result_of(where: Where, raw: Mapping[str, Any], call: ToolCall, *, attempt: int, duration_ms: int) -> ToolResult:
    """The result of an answered call, its content untouched.

    Raises:
        ToolRejected: the tool asks for input (elicitation, sampling), which a background job can't give.
        ToolAnswerUnclear: the answer is no tool result.
        ResultTooLarge: it is above the limit.
    """
    if raw.get("resultType") == "input_required":
        raise _wants_input(where)
    size = len(to_json(raw))
    if size > where.limit:
        raise where.too_large(str(size))
    content = raw.get("content") or []
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise ToolAnswerUnclear(
            f"MCP server '{where.server}' answered '{where.name}' with something else than a result"
        )
    is_error = raw.get("isError") is True
    structured: JsonValue = raw.get("structuredContent")
    return ToolResult(
        tool_call_id=call.tool_call_id,
        tool_name=call.tool_name,
        status="failed" if is_error else "completed",
        content=tuple(content),
        structured_content=structured,
        is_error=is_error,
        error=ErrorInfo(code="tool_error", message=_first_text(content)) if is_error else None,
        attempt=attempt,
        duration_ms=duration_ms,
    )


def _refused(where: Where, status: int, error: MCPError) -> ToolFailure | None:
    """What an HTTP status says; None where the JSON-RPC error in its body says more."""
    answer = f"MCP server '{where.server}' answered with HTTP {status}"
    if status in (401, 403):
        return ToolRejected(f"{answer}; check the 'headers' (credentials) in the server's configuration", status=status)
    if _session_unknown(status, error):
        return SessionGone(f"{answer}: it does not know this session any more")
    if status == 404 and error.code == METHOD_NOT_FOUND and error.message == "Not Found":  # the SDK's stand-in
        return ToolUnavailable(f"{answer}; check the 'url' in the server's configuration", status=status)
    if status == 429:
        return ToolUnavailable(f"{answer} (too many requests); the call was not processed", status=status)
    if status >= 500:
        # Often a gateway's word and not the tool's: whether the call went through, and how far, it does not say.
        return ToolAnswerUnclear(f"{answer}: {_bounded(error)}", status=status)
    return None


def _session_unknown(status: int, error: MCPError) -> bool:
    """Whether a server lost its sessions, most often by a restart.

    The specification's answer is 404 (2025-11-25, "Session Management"); widely copied servers of the TypeScript SDK
    answer 400 with a message that names the session id.
    """
    about_session = "session" in error.message.lower()
    return (status == 404 and about_session) or (status == 400 and about_session and error.code != INVALID_PARAMS)


def _closed(where: Where, error: MCPError, exchange: Exchange) -> ToolFailure:
    if error.message.startswith(_SSE_TOO_LARGE):
        return where.too_large(f"more than {where.limit}")
    if not exchange.sent:
        return SessionGone(f"the session with MCP server '{where.server}' ended before the call was sent")
    return ToolConnectionLost(f"MCP server '{where.server}' ended the connection during the call: {_bounded(error)}")


def _wants_input(where: Where) -> ToolRejected:
    return ToolRejected(
        f"'{where.name}' asks for input from a person or a model (elicitation or sampling), which a background job "
        "can't give; call it with all that it needs"
    )


def _bounded(error: MCPError) -> str:
    return error.message[:_MAX_TEXT]


def _first_text(content: list[dict[str, Any]]) -> str:
    for block in content:
        text = block.get("text")
        if block.get("type") == "text" and isinstance(text, str) and text.strip():
            return text.strip()[:_MAX_TEXT]
    return "the tool reported an error without a text"


def _first(error: BaseException, kind: type[_E]) -> _E | None:
    """The first exception of a kind, inside exception groups too."""
    if isinstance(error, kind):
        return error
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            if (found := _first(inner, kind)) is not None:
                return found
    return None


def named(error: BaseException) -> str:
    """An exception by type, and by text where it is known to hold nothing of a request."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) if isinstance(error, ToolfleetError | MCPError | RuntimeError) else type(error).__name__
