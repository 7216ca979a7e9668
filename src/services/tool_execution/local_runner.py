"""Tools that are functions of this process: for benchmarks, tests and programs that bring their own tools.

It costs a few microseconds a call and imports nothing of MCP, so what a benchmark measures is the queue.
"""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from toolfleet.services.background_jobs.errors import (
    ResultTooLarge,
    ToolFailure,
    ToolServerFailed,
    ToolTimedOut,
    UnknownTool,
)
from toolfleet.services.background_jobs.ports import CallContext, ToolSpec
from toolfleet.services.background_jobs.task_models import ToolCall, ToolResult
from toolfleet.services.background_jobs.transitions import CallStop

LocalAnswer = ToolResult | dict[str, Any] | str
LocalTool = Callable[[dict[str, Any], CallContext], Awaitable[LocalAnswer]]
"""``(arguments, context)`` -> a result, structured content, or text."""

_DEFAULT_MAX_RESULT: Final = 8 << 20


class LocalToolRunner:
    """A `ToolRunner` and a `ToolCatalogue` over functions.

    Args:
        tools: by name, the spec and the coroutine function.
        max_result_bytes: of a result's JSON, as for a tool server's results.
    """

    def __init__(
        self, tools: Mapping[str, tuple[ToolSpec, LocalTool]], *, max_result_bytes: int = _DEFAULT_MAX_RESULT
    ) -> None:
        self._tools = dict(tools)
        self._max_result_bytes = max_result_bytes

    async def find(self, tool_name: str) -> ToolSpec:
        """The spec of a tool.

        Raises:
            UnknownTool: no function has this name; ``details["nearest"]`` lists the nearest names.
        """
        entry = self._tools.get(tool_name)
        if entry is None:
            nearest = difflib.get_close_matches(tool_name, self._tools, n=5, cutoff=0.5)
            raise UnknownTool(f"there is no tool '{tool_name}'", nearest=nearest)
        return entry[0]

    async def describe(self, tool_name: str) -> ToolSpec:
        """As `find`: what is not here can't come up later."""
        return await self.find(tool_name)

    async def tools(self) -> Sequence[ToolSpec]:
        """All tools, by name."""
        return [self._tools[name][0] for name in sorted(self._tools)]

    async def run(self, spec: ToolSpec, call: ToolCall, context: CallContext) -> ToolResult:
        """Run the function.

        Raises:
            UnknownTool: the spec is not of this runner.
            ToolTimedOut: it took longer than ``context.timeout_s``; it has been cancelled.
            ToolServerFailed: it raised. A `ToolFailure` that it raises itself passes unchanged.
            ResultTooLarge: its answer is above the limit.
        """
        await self.find(spec.name)
        function = self._tools[spec.name][1]
        started = time.monotonic()
        context.before_send()
        bound = asyncio.timeout(context.timeout_s)
        try:
            async with bound:
                answer = await function(dict(call.tool_args), context)
        except ToolFailure:
            raise
        except asyncio.CancelledError:
            context.on_stop(CallStop.STOPPED)  # its last line has run
            raise
        except TimeoutError as error:
            if bound.expired():
                raise ToolTimedOut(f"'{spec.name}' did not answer within {context.timeout_s:g} s") from None
            raise ToolServerFailed(f"'{spec.name}' raised TimeoutError") from error
        except Exception as error:
            # The boundary to foreign code: whatever it raises is the tool's failure, with its type as the reason.
            raise ToolServerFailed(f"'{spec.name}' raised {type(error).__name__}") from error
        return self._result(call, context, answer, int((time.monotonic() - started) * 1000))

    async def close(self) -> None:
        """Nothing to end."""

    def _result(self, call: ToolCall, context: CallContext, answer: LocalAnswer, duration_ms: int) -> ToolResult:
        about = {"tool_call_id": call.tool_call_id, "tool_name": call.tool_name, "attempt": context.attempt}
        match answer:
            case ToolResult():
                result = answer.model_copy(update={**about, "duration_ms": duration_ms})
            case str():
                result = ToolResult(
                    status="completed", content=({"type": "text", "text": answer},), duration_ms=duration_ms, **about
                )
            case _:
                result = ToolResult(status="completed", structured_content=answer, duration_ms=duration_ms, **about)
        size = len(result.to_json())
        if size > self._max_result_bytes:
            raise ResultTooLarge(
                f"the result of '{call.tool_name}' has {size} bytes, more than the limit of {self._max_result_bytes}; "
                "raise TOOLFLEET_MAX_RESULT_BYTES or let the tool return less",
                size=size,
                limit=self._max_result_bytes,
            )
        return result
